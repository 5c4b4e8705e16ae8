"""The judge of every kernel: the float64 reference, and how close to it is close enough.

A result is accepted when its error against the float64 reference is at most twice that of plain PyTorch
in float32 on the same (rounded) inputs, plus a stated floor. The floor is needed where plain PyTorch
happens to be exact; it is a few roundings of the sum of absolute values, so it grows only where the
mathematics itself cancels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ghl_kernels import HebbianRule, _dispatch, reference

EPS32 = torch.finfo(torch.float32).eps
# Sums every y_p x_p^T and nothing else.
CORRELATION = HebbianRule(activity="linear", decay="none", normalize="none", gate="none")


def assert_as_good(
    actual: Tensor, eager_float32: Tensor, oracle_float64: Tensor, floor: float | Tensor
) -> None:
    """Row by row: err(actual) <= 2 * err(eager_float32) + floor, errors being max |. - oracle|.

    The baseline is rounded to actual's dtype first. NaN must be exactly where the oracle has NaN.
    """
    assert actual.shape == oracle_float64.shape
    missing, spurious = _where(actual, oracle_float64)
    assert not missing, f"{missing} NaN of the reference are absent"
    assert not spurious, f"{spurious} NaN that the reference does not have"

    def rows(tensor: Tensor) -> Tensor:
        if tensor.numel() == 0:
            return tensor.new_zeros(1)
        return tensor.reshape(tensor.shape[0] if tensor.dim() > 1 else 1, -1).nan_to_num(0.0).amax(1)

    oracle = oracle_float64.double()
    error = rows((actual.double() - oracle).abs())
    baseline = rows((eager_float32.to(actual.dtype).double() - oracle).abs())
    allowed = 2 * baseline + rows(torch.as_tensor(floor, dtype=torch.float64).expand_as(oracle))
    bad = error > allowed
    assert not bad.any(), (
        f"{int(bad.sum())} of {bad.numel()} rows are too far from the reference; the worst: "
        f"error {error[bad].max().item():.3e}, allowed {allowed[bad][error[bad].argmax()].item():.3e}"
    )


def _where(actual: Tensor, oracle: Tensor) -> tuple[int, int]:
    return int((oracle.isnan() & ~actual.isnan()).sum()), int((actual.isnan() & ~oracle.isnan()).sum())


class Judgement(NamedTuple):
    """H by the float64 reference, by the same code in float32, and the floor."""

    oracle: Tensor
    eager: Tensor
    floor: Tensor


def judge_delta(
    delta: Callable[..., Tensor],
    x: Tensor,
    u: Tensor,
    weight: Tensor,
    rule: HebbianRule,
    dim: int,
    **conv: Any,
) -> Judgement:
    """H for ``delta``, reference.linear_delta or conv_delta; units are dimension ``dim`` of u."""
    x, u, weight = x.detach(), u.detach(), weight.detach()
    oracle = delta(x.double(), u.double(), weight.double(), rule, **conv)
    eager = delta(x.float(), u.float(), weight.float(), rule, **conv)
    rounding = operand_rounding(x.dtype)
    floor = _floor(delta, x.double(), u.double(), weight.double(), rule, dim, rounding, **conv)
    return Judgement(oracle, eager, floor)


def operand_rounding(dtype: torch.dtype) -> float:
    """Relative error of an activity as the operand of a product: tensor cores take it in x's dtype."""
    on_tensor_cores = _dispatch._PREFERENCE["cpu"][0] in ("triton", "cuda") and dtype.itemsize == 2
    return torch.finfo(dtype).eps / 2 if on_tensor_cores else 0.0


def _floor(
    delta: Callable[..., Tensor],
    x: Tensor,
    u: Tensor,
    weight: Tensor,
    rule: HebbianRule,
    dim: int,
    rounding: float,
    **conv: Any,
) -> Tensor:
    """Eight roundings of all that is added up to H, over its scale; softmax adds those of u / temperature.

    And one of every activity, where it is rounded before the product.
    """
    roundings = 8.0
    if rule.activity == "softmax" and u.numel():
        roundings += 2.0 * (u.abs().nan_to_num(0.0, 0.0, 0.0).max().item() / rule.temperature)
    y = reference.compete(u, rule, dim)
    A = delta(x.abs(), y.abs(), weight.abs(), CORRELATION, **conv)
    decayed = delta(
        x.abs(), y.abs(), weight.abs(), dataclasses.replace(CORRELATION, decay=rule.decay), **conv
    )
    total = A + (A - decayed)
    unit = roundings * EPS32 + rounding
    H = delta(x, u, weight, dataclasses.replace(rule, normalize="none"), **conv)
    if rule.normalize == "none" or H.numel() == 0:
        return unit * total
    if rule.normalize == "mean":
        return unit * total / max(1, u.numel() // u.shape[dim])
    over = tuple(range(H.dim())) if rule.normalize == "layer" else tuple(range(1, H.dim()))
    scale = H.abs().amax(over, keepdim=True) + reference.EPS
    floor = unit * total / scale
    # the scale itself is rounded too
    return floor + H.abs() / scale * floor.amax(over, keepdim=True)


def assert_gated(actual: Tensor, judgement: Judgement, G: Tensor, G_magnitude: Tensor, G_eps: float) -> None:
    """actual is |H| * sign(G): its size everywhere, its sign where |G| is above the rounding of G.

    G is the float64 weight gradient, G_magnitude the sum of the absolute values of its terms and G_eps
    the rounding unit of the dtype it is computed in. A gradient within rounding of 0 may come out as
    exactly 0, whose sign is 0.
    """
    certain = G.abs() > 4 * G_eps * G_magnitude
    dead = G_magnitude == 0
    gone = (actual == 0) & ~certain & ~dead
    size = torch.where(gone, judgement.oracle.abs().to(actual.dtype), actual.abs())
    eager = torch.where(dead, 0.0, judgement.eager.abs())
    assert_as_good(size, eager, torch.where(dead, 0.0, judgement.oracle.abs()), judgement.floor)
    big = certain & (judgement.oracle.abs() > judgement.floor)
    wrong = big & (actual.sign() != G.sign().to(actual.dtype)) & (actual != 0)
    assert not wrong.any(), f"{int(wrong.sum())} signs differ from those of the weight gradient"


def padded_input(layer: torch.nn.Module, x: Tensor) -> Tensor:
    """x as a convolution without padding sees it: batched, and padded by hand for every padding option."""
    dims = len(layer.kernel_size)
    if x.dim() == dims + 1:
        x = x.unsqueeze(0)
    if layer.padding == "valid":
        return x
    if layer.padding == "same":
        totals = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        sides = [(total // 2, total - total // 2) for total in totals]
    else:
        sides = [(size, size) for size in layer.padding]
    flat = [side for pair in reversed(sides) for side in pair]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return torch.nn.functional.pad(x, flat, mode=mode) if any(flat) else x


def embed(tensor: Tensor, layout: str) -> Tensor:
    """The same values in another layout; "slice" lies in a larger buffer whose other elements are NaN."""
    tensor = tensor.detach().clone(memory_format=torch.contiguous_format)
    if layout == "channels_last" and tensor.dim() in (4, 5):
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        return tensor.contiguous(memory_format=formats[tensor.dim()])
    if layout in ("transposed", "channels_last") and tensor.dim() >= 2:
        return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout in ("slice", "step"):
        step = 2 if layout == "step" else 1
        buffer = tensor.new_full([step * size + 2 for size in tensor.shape], float("nan"))
        view = buffer[tuple(slice(1, 1 + step * size, step) for size in tensor.shape)]
        view.copy_(tensor)
        return view
    return tensor


LAYOUTS = ("contiguous", "channels_last", "transposed", "slice", "step")


def guards_intact(view: Tensor) -> bool:
    """Whether all elements of an embedded tensor's buffer outside the view are still NaN."""
    buffer = view._base
    assert buffer is not None
    outside = buffer.clone()
    torch.as_strided(outside, view.shape, view.stride(), view.storage_offset()).fill_(float("nan"))
    return bool(outside.isnan().all())
