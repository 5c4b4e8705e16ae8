r"""The rule written plainly in PyTorch: the oracle of the tests and the slow baseline of the benchmarks.

Works in any floating dtype and on any device; in float64 it is the judge of every kernel. Nothing
here is fast, in place or fused: patches are built in full, every sum is one ``einsum``.

The functions mirror :mod:`ghl_kernels.functional` (same names, arguments and results, but in the inputs'
dtype) and share no computation with any backend.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ghl_kernels._geometry import to_int
from ghl_kernels.rule import Competition, HebbianRule

EPS = 1e-30


def compete(u: Tensor, rule: HebbianRule, dim: int = -1) -> Tensor:
    """Activities y = c(u) of the units along ``dim``; same shape and dtype as u."""
    return _compete(u.movedim(dim, -1), rule.competition(u.shape[dim])).movedim(-1, dim)


def kwta(u: Tensor, k: int | float, dim: int = -1) -> Tensor:
    """u where it is among the k largest along ``dim`` (ties to the lowest index), 0 elsewhere."""
    return compete(u, HebbianRule.kwta(k), dim)


def _compete(u: Tensor, competition: Competition) -> Tensor:
    activity, k, temperature, anti = competition
    order = torch.sort(u, dim=-1, descending=True, stable=True).indices  # stable: ties to the lowest index
    rank = torch.argsort(order, dim=-1)
    wins = rank < (k or u.shape[-1])
    if activity == "softmax":
        y = torch.softmax((u / temperature).masked_fill(~wins, float("-inf")), dim=-1)
    elif activity == "linear":
        y = u
    elif activity == "relu":
        y = torch.relu(u)
    else:
        y = torch.ones_like(u)
    y = torch.where(wins, y, torch.zeros_like(y))
    if anti:
        y = torch.where(rank == 0, y, -y)
    return torch.where(u.isnan().any(-1, keepdim=True), torch.full_like(y, float("nan")), y)


def linear_delta(x: Tensor, u: Tensor, weight: Tensor, rule: HebbianRule) -> Tensor:
    """Normalised local update H (N, D) of a linear layer: x (..., D), u (..., N), weight (N, D)."""
    return _delta(_positions(x).unsqueeze(0), _positions(u), weight, rule)


def linear_weight_grad(x: Tensor, u: Tensor, grad_u: Tensor, weight: Tensor, rule: HebbianRule) -> Tensor:
    """Gated weight gradient (N, D) of a linear layer: grad_u = dL/du (..., N)."""
    patches = _positions(x).unsqueeze(0)
    H = _delta(patches, _positions(u), weight, rule)
    if rule.gate == "none":
        return -H
    return gate(H, _correlate(_positions(grad_u), patches))


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
    """Normalised local update H, of weight's shape, of a convolution with zero padding.

    x (B, C, *size), u (B, N, *out_size), both also without B; weight (N, C / groups, *kernel_size).

    Raises:
        ValueError: a padding that torch does not take: another word, or "same" with a stride other than 1.
    """
    patches = _patches(_batched(x, weight), weight.shape[2:], stride, padding, dilation, groups)
    return _delta(patches, _rows(u, weight), weight.flatten(1), rule).view_as(weight)


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
    """Gated weight gradient, of weight's shape, of a convolution: grad_u = dL/du, of u's shape.

    Shapes and errors are those of :func:`conv_delta`.
    """
    patches = _patches(_batched(x, weight), weight.shape[2:], stride, padding, dilation, groups)
    H = _delta(patches, _rows(u, weight), weight.flatten(1), rule)
    if rule.gate == "none":
        return -H.view_as(weight)
    return gate(H, _correlate(_rows(grad_u, weight), patches)).view_as(weight)


def gate(H: Tensor, G: Tensor) -> Tensor:
    """|H| * sign(G) + (G - G), which is NaN wherever G is not finite."""
    return H.abs() * torch.sign(G) + (G - G)


def _positions(t: Tensor) -> Tensor:
    """x or u of a linear layer as rows; without features or units there are as many."""
    return t.reshape(t.shape[:-1].numel(), t.shape[-1])


def _batched(t: Tensor, weight: Tensor) -> Tensor:
    """x or u of a convolution with its batch dimension."""
    return t.unsqueeze(0) if t.dim() == weight.dim() - 1 else t


def _rows(u: Tensor, weight: Tensor) -> Tensor:
    """u of a convolution as (P, N)."""
    return _batched(u, weight).movedim(1, -1).flatten(0, -2)


def _patches(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: int | Sequence[int],
    padding: int | Sequence[int] | str,
    dilation: int | Sequence[int],
    groups: int,
) -> Tensor:
    """Patches (groups, P, D) of x (B, C, *size), D = C / groups x kernel volume."""
    dims, groups = len(kernel_size), operator.index(groups)

    def per_dim(value: int | Sequence[int]) -> list[int]:
        number = to_int(value)
        values = [number] if number is not None else [operator.index(v) for v in cast(Sequence[int], value)]
        return values * dims if len(values) == 1 else values

    steps, spreads = per_dim(stride), per_dim(dilation)
    if padding == "same":
        if any(step != 1 for step in steps):
            raise ValueError(f"padding='same' needs stride 1, got stride {stride!r}")
        totals = [spread * (size - 1) for size, spread in zip(kernel_size, spreads, strict=True)]
        sides = [(total // 2, total - total // 2) for total in totals]
    elif isinstance(padding, str) and padding != "valid":
        raise ValueError(f"padding must be an int, ints, 'same' or 'valid', got {padding!r}")
    else:
        sides = [(size, size) for size in per_dim(0 if isinstance(padding, str) else padding)]
    x = F.pad(x, [side for pair in reversed(sides) for side in pair])
    for i, (size, step, spread) in enumerate(zip(kernel_size, steps, spreads, strict=True)):
        x = x.unfold(2 + i, spread * (size - 1) + 1, step)[..., ::spread]
    batch, channels, *rest = x.shape
    x = x.reshape(batch, groups, channels // groups, *rest)
    # (B, g, C/g, *out, *kernel) -> (g, B, *out, C/g, *kernel)
    x = x.permute(1, 0, *range(3, 3 + dims), 2, *range(3 + dims, 3 + 2 * dims))
    positions, volume = math.prod((batch, *rest[:dims])), math.prod(kernel_size)
    return x.reshape(groups, positions, (channels // groups) * volume)


def _correlate(y: Tensor, patches: Tensor) -> Tensor:
    """sum_p y_p x_p^T per group: y (P, N), patches (groups, P, D) -> (N, D)."""
    groups = patches.shape[0]
    y = y.reshape(y.shape[0], groups, y.shape[1] // groups)
    return torch.einsum("pgn,gpd->gnd", y, patches).flatten(0, 1)


def _decay(y: Tensor, A: Tensor, weight: Tensor, groups: int, decay: str) -> Tensor:
    if decay == "oja":
        return (weight * A).sum(1, keepdim=True) * weight
    if decay == "instar":
        return y.sum(0).unsqueeze(1) * weight
    if decay == "none":
        return torch.zeros_like(weight)
    grouped = y.reshape(y.shape[0], groups, y.shape[1] // groups)
    C = torch.einsum("pgn,pgm->gnm", grouped, grouped)
    if decay == "sanger":
        C = C.tril()
    per_group = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1])
    return (C @ per_group).flatten(0, 1)


def _delta(patches: Tensor, u: Tensor, weight: Tensor, rule: HebbianRule) -> Tensor:
    y = _compete(u, rule.competition(u.shape[1]))
    A = _correlate(y, patches)
    H = A - _decay(y, A, weight, patches.shape[0], rule.decay)
    if rule.normalize == "mean":
        return H / max(u.shape[0], 1)
    if rule.normalize == "none" or H.numel() == 0:
        return H
    scale = H.abs().amax() if rule.normalize == "layer" else H.abs().amax(1, keepdim=True)
    return torch.where(scale.isfinite(), H / (scale + EPS), torch.full_like(H, float("nan")))
