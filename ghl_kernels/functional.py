r"""The rule as functions: competition, local update, gated weight gradient.

All are free of autograd: they run under no_grad and what they return requires no gradient. The
layers of :mod:`ghl_kernels.nn` are the way to train; these are for rules of one's own and for study.
Shapes: linear x (..., D), u (..., N), weight (N, D); convolution x (B, C, *size) or (C, *size),
u (B, N, *out_size) or (N, *out_size), weight (N, C / groups, *kernel_size). Dtypes: float32,
bfloat16, float16 or float64; sums, H and the gradients that are returned are float32 (float64 for
float64 inputs).

Source of the formulas: Hua et al., ICASSP 2026 (arXiv 2601.21367); docs of :class:`HebbianRule`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ghl_kernels import _check
from ghl_kernels._autograd import Plan, make_plan, pair, sums
from ghl_kernels._geometry import Geometry, make_geometry
from ghl_kernels.backends.eager import sum_dtype
from ghl_kernels.rule import HebbianRule


@torch.no_grad()
def compete(u: Tensor, rule: HebbianRule, dim: int = -1) -> Tensor:
    """Activities y = c(u) of the units along ``dim``.

    Args:
        u: responses, of any shape; the competition at every position runs along ``dim``.
        rule: gives activity, winners, temperature and losers.
        dim: dimension of the units (1 for a convolution's output).

    Returns:
        y, of u's shape and dtype. A NaN at a position makes all of its y NaN.

    Raises:
        TypeError, ValueError: u is not a real floating-point tensor with data, ``dim`` does not exist,
            ``rule`` is no HebbianRule or has more winners than there are units.
    """
    _check.floats(u=u)
    _check.rule(rule)
    units = u.shape[_check.dimension(u, dim)]
    return torch.ops.ghl.compete(u, dim, *rule.competition(units))


@torch.no_grad()
def kwta(u: Tensor, k: int | float, dim: int = -1) -> Tensor:
    """k-winner-take-all: u where it is among the k largest along ``dim``, 0 elsewhere.

    Exactly k winners; ties go to the lowest index, -0.0 equals 0.0. Same as :func:`compete` with
    ``HebbianRule.kwta(k)``; ``k`` may be a fraction, and the errors are those.
    """
    return compete(u, HebbianRule.kwta(k), dim)


@torch.no_grad()
def linear_delta(x: Tensor, u: Tensor, weight: Tensor, rule: HebbianRule) -> Tensor:
    """Local update H (N, D) of a linear layer, normalised; W += lr * H is Hebbian learning.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices that do not fit, or no HebbianRule.
    """
    _check.floats(x=x, u=u, weight=weight)
    _check.rule(rule)
    _check.same_dtype(x=x, u=u)
    _check.alike_precision(x=x, u=u, weight=weight)
    _check.linear(x, u)
    _check.shape("weight", weight, (u.shape[-1], x.shape[-1]))
    if weight.numel() == 0:
        return _empty(weight, rule, weight.dtype)
    return _delta(x, u, weight, rule, None)


@torch.no_grad()
def linear_weight_grad(x: Tensor, u: Tensor, grad_u: Tensor, weight: Tensor, rule: HebbianRule) -> Tensor:
    """Gated weight gradient |H| * sign(G) (N, D) of a linear layer; -H without a gate; grad_u = dL/du.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices that do not fit, or no HebbianRule.
    """
    _check.floats(x=x, u=u, grad_u=grad_u, weight=weight)
    _check.rule(rule)
    _check.shape("grad_u", grad_u, u.shape)
    _check.same_dtype(x=x, u=u)
    _check.alike_precision(x=x, u=u, weight=weight)
    _check.linear(x, u)
    _check.shape("weight", weight, (u.shape[-1], x.shape[-1]))
    if weight.numel() == 0:
        return _empty(weight, rule, weight.dtype if rule.gate == "none" else grad_u.dtype)
    plan = make_plan(None, weight, rule, sums_at="backward")
    if plan.is_pair and grad_u.dtype == u.dtype:
        return _gated_pair(x, u, grad_u, weight, rule, plan)
    H = _delta(x, u, weight, rule, None)
    if rule.gate == "none":
        return -H
    return gate(H, torch.ops.ghl.linear_grad(*_alike(x, grad_u)))


@torch.no_grad()
def conv_delta(
    x: Tensor,
    u: Tensor,
    weight: Tensor,
    rule: HebbianRule,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """Local update H, of weight's shape, of a 1d, 2d or 3d convolution with zero padding, normalised.

    Raises:
        TypeError, ValueError: shapes, dtypes, devices or convolution arguments that do not fit, or no
            HebbianRule.
    """
    _check.rule(rule)
    x, u, geometry = _conv_inputs(x, u, weight, stride, padding, dilation, groups)
    return _delta(x, u, weight, rule, geometry)


@torch.no_grad()
def conv_weight_grad(
    x: Tensor,
    u: Tensor,
    grad_u: Tensor,
    weight: Tensor,
    rule: HebbianRule,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """Gated weight gradient |H| * sign(G), of weight's shape, of a convolution; -H without a gate.

    grad_u is dL/du, of u's shape.

    Raises:
        TypeError, ValueError: shapes, dtypes, devices or convolution arguments that do not fit, or no
            HebbianRule.
    """
    _check.floats(x=x, u=u, grad_u=grad_u, weight=weight)
    _check.rule(rule)
    _check.shape("grad_u", grad_u, u.shape)
    x, u, geometry = _conv_inputs(x, u, weight, stride, padding, dilation, groups)
    plan = make_plan(geometry, weight, rule, sums_at="backward")
    if plan.is_pair and grad_u.dtype == u.dtype:
        return _gated_pair(x, u, grad_u.reshape(u.shape), weight, rule, plan)
    H = _delta(x, u, weight, rule, geometry)
    if rule.gate == "none":
        return -H
    return gate(H, torch.ops.ghl.conv_grad(*_alike(x, grad_u.reshape(u.shape)), *geometry))


@torch.no_grad()
def gate(H: Tensor, G: Tensor) -> Tensor:
    """|H| * sign(G) + (G - G): H's size in G's direction, and NaN wherever G is not finite; sign(0) = 0.

    Raises:
        TypeError, ValueError: not real floating-point tensors of one shape on one device.
    """
    _check.floats(H=H, G=G)
    _check.shape("G", G, H.shape)
    return H.abs() * G.sign() + (G - G)


def _delta(x: Tensor, u: Tensor, weight: Tensor, rule: HebbianRule, geometry: Geometry | None) -> Tensor:
    A, moments = sums(x, u, make_plan(geometry, weight, rule))
    groups = geometry.groups if geometry else 1
    return torch.ops.ghl.delta(A, moments, weight, groups, rule.decay, rule.normalize)


def _empty(weight: Tensor, rule: HebbianRule, dtype: torch.dtype) -> Tensor:
    """What is summed for no weights at all: there is nothing that a kernel could read the positions from."""
    _check.winners(rule.winners_of(weight.shape[0]), weight.shape[0])
    return torch.zeros_like(weight, dtype=torch.promote_types(sum_dtype(weight.dtype), dtype))


def _alike(x: Tensor, grad_u: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the wider dtype."""
    dtype = torch.promote_types(x.dtype, grad_u.dtype)
    return x.to(dtype), grad_u.to(dtype)


def _gated_pair(
    x: Tensor, u: Tensor, grad_u: Tensor, weight: Tensor, rule: HebbianRule, plan: Plan
) -> Tensor:
    """The gated gradient from one pass over x."""
    A, moments, G = pair(x, u, grad_u, plan)
    groups = plan.geometry.groups if plan.geometry else 1
    torch.ops.ghl.gate_(G, A, moments, weight, groups, rule.decay, rule.normalize)
    return G


def _conv_inputs(
    x: Tensor,
    u: Tensor,
    weight: Tensor,
    stride: int | Sequence[int],
    padding: int | Sequence[int] | str,
    dilation: int | Sequence[int],
    groups: int,
) -> tuple[Tensor, Tensor, Geometry]:
    """x and u batched, x with the surplus of "same" padding, and the geometry; all checked."""
    _check.floats(x=x, u=u, weight=weight)
    _check.same_dtype(x=x, u=u)
    _check.alike_precision(x=x, u=u, weight=weight)
    if not 3 <= weight.dim() <= 5:
        raise ValueError(
            f"weight must be (units, channels / groups, 1 to 3 kernel sizes), got {tuple(weight.shape)}"
        )
    surplus, geometry = make_geometry(tuple(weight.shape[2:]), stride, padding, dilation, groups)
    if x.dim() == weight.dim() - 1:
        x, u = x.unsqueeze(0), u.unsqueeze(0)
    if surplus is not None:
        x = F.pad(x, surplus)
    _check.conv(x, u, geometry)
    _check.shape("weight", weight, (u.shape[1], x.shape[1] // groups, *geometry.kernel_size))
    return x, u, geometry
