"""The operations on the native CPU kernels: float32 and bfloat16 in, float32 sums.

A dense A is a weight gradient of activities that the native kernel computes: of 3 x 3 convolutions, and of
linear layers where torch's products are slow, by a kernel too, otherwise torch's own. Everything else runs in
csrc/cpu. Tensors that a kernel reads are bound to names until it returns.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ghl_kernels import _dispatch, _native
from ghl_kernels._geometry import Geometry
from ghl_kernels.backends import eager
from ghl_kernels.rule import Competition

_DTYPE = {torch.float32: 0, torch.bfloat16: 1}
_ACTIVITY = {"softmax": 0, "linear": 1, "relu": 2, "binary": 3}
_DECAY = {"none": 0, "oja": 1, "instar": 2}
_NORMALIZE = {"layer": 0, "filter": 1, "mean": 2, "none": 2}
_GATE, _DELTA, _LEARN = 0, 1, 2

# With few rows a unit's list is too short to pay for a pass over its part of A, and the crossover is lower.
# Decided here and not by _dispatch.prefers_sparse, which must not depend on the batch.
_FEW_ROWS = 256
_FEW_ROWS_CROSSOVER = 0.01

# Of fewer, the call of our kernel takes longer than torch's product.
_LEAST_PRODUCTS = 1 << 19

# With fewer, what the Winograd kernel does once for each weight shows beside its sums over positions.
_LEAST_WINOGRAD_POSITIONS = 64


def status() -> tuple[bool, str]:
    """(available, reason)."""
    return _native.cpu_status()


def refusal(device: torch.device, dtype: torch.dtype) -> str:
    """Why this backend cannot run on such tensors, or "" when it can."""
    if problem := _native.cpu_problem():
        return problem
    if device.type != "cpu":
        return f"it runs on CPU tensors, not on {device.type}"
    if dtype not in _DTYPE:
        return f"it takes float32 and bfloat16, not {dtype}"
    return ""


def compete(u: Tensor, dim: int, competition: Competition) -> Tensor:
    """y = c(u), same shape and dtype as u."""
    return _activities(u, dim, competition, u.dtype)


def competition_state(u: Tensor, dim: int, competition: Competition) -> tuple[Tensor, Tensor, Tensor]:
    """Per position: the k-th largest u, the last unit that wins a tie at it, logsumexp over the winners."""
    shape = [size for i, size in enumerate(u.shape) if i != dim]
    threshold, logsumexp = u.new_empty(shape, dtype=torch.float32), u.new_empty(shape, dtype=torch.float32)
    cut = u.new_empty(shape, dtype=torch.int32)
    if not competition.winners:
        competition = competition._replace(winners=u.shape[dim])
    outputs = {"threshold": threshold.data_ptr(), "cut": cut.data_ptr(), "logsumexp": logsumexp.data_ptr()}
    _run_competition(_rows_or_planes(u, dim), dim, competition, outputs)
    return threshold, cut, logsumexp


def winners(u: Tensor, dim: int, competition: Competition) -> tuple[Tensor, Tensor]:
    """Winning units (int32, ascending) and their activities, (P, k); the first unit is -1 where u is NaN."""
    positions = u.numel() // max(u.shape[dim], 1)
    unit = u.new_empty((positions, competition.winners), dtype=torch.int32)
    activity = u.new_empty(unit.shape, dtype=torch.float32)
    outputs = {"winner_unit": unit.data_ptr(), "winner_activity": activity.data_ptr()}
    _run_competition(_rows_or_planes(u, dim), dim, competition, outputs)
    return unit, activity


def linear_sums(x: Tensor, u: Tensor, competition: Competition, decay: str) -> tuple[Tensor, Tensor]:
    """A (N, D) and the moments of y, from x (..., D) and u (..., N)."""
    return eager.linear_sums(x, u, competition, decay, _float_activities, _add_outer)


def conv_sums(
    x: Tensor, u: Tensor, geometry: Geometry, competition: Competition, decay: str
) -> tuple[Tensor, Tensor]:
    """A (N, C / groups, *kernel_size) and the moments of y, from x (B, C, *size) and u (B, N, *out_size)."""
    return eager.conv_sums(x, u, geometry, competition, decay, _float_activities, _conv_correlate)


def linear_pair(
    x: Tensor, u: Tensor, grad_u: Tensor, competition: Competition, decay: str
) -> tuple[Tensor, Tensor, Tensor]:
    """A (N, D), the moments of y and G (N, D), from x (..., D), u and dL/du (..., N)."""
    return eager.linear_pair(x, u, grad_u, competition, decay, _float_activities, _add_outer)


def linear_grad(x: Tensor, grad_u: Tensor) -> Tensor:
    """G (N, D), of A's dtype, from x (..., D) and dL/du (..., N)."""
    return eager.linear_grad(x, grad_u, _add_outer)


def conv_pair(
    x: Tensor, u: Tensor, grad_u: Tensor, geometry: Geometry, competition: Competition, decay: str
) -> tuple[Tensor, Tensor, Tensor]:
    """As conv_sums, and G, from dL/du of u's shape."""
    return eager.conv_pair(x, u, grad_u, geometry, competition, decay, _float_activities, _conv_correlate)


def conv_grad(x: Tensor, grad_u: Tensor, geometry: Geometry) -> Tensor:
    """G, of A's shape and dtype, from dL/du of u's shape."""
    return eager.conv_grad(x, grad_u, geometry, _conv_correlate)


def linear_winner_sums(
    x: Tensor, unit: Tensor, activity: Tensor, units: int, decay: str
) -> tuple[Tensor, Tensor]:
    """As linear_sums, from the winners' lists (P, k), at a cost of k / N of the dense product."""
    few_rows = unit.shape[0] < _FEW_ROWS and unit.shape[1] > _FEW_ROWS_CROSSOVER * units
    if decay not in _DECAY or few_rows:
        return eager.linear_winner_sums(x, unit, activity, units, decay, _add_outer)
    x = x.reshape(-1, x.shape[-1])
    A = x.new_empty((units, x.shape[1]), dtype=torch.float32)
    return A, _correlate(x, unit, activity, A, Geometry((), (), (), (), 1), decay)


def conv_winner_sums(
    x: Tensor, unit: Tensor, activity: Tensor, units: int, geometry: Geometry, decay: str
) -> tuple[Tensor, Tensor]:
    """As conv_sums, from the winners' lists (P, k), at a cost of k / N of the dense product."""
    if decay not in _DECAY:
        return eager.conv_winner_sums(x, unit, activity, units, geometry, decay)
    A = x.new_empty((units, x.shape[1] // geometry.groups, *geometry.kernel_size), dtype=torch.float32)
    return A, _correlate(x, unit, activity, A, geometry, decay)


def conv_winner_pair(
    x: Tensor, unit: Tensor, activity: Tensor, grad_u: Tensor, geometry: Geometry, decay: str
) -> tuple[Tensor, Tensor, Tensor]:
    """As conv_pair, from the winners' lists (P, k)."""
    A, moments = conv_winner_sums(x, unit, activity, grad_u.shape[1], geometry, decay)
    return A, moments, conv_grad(x, grad_u, geometry)


def gate(
    grad: Tensor, A: Tensor, moments: Tensor, weight: Tensor, groups: int, decay: str, normalize: str
) -> Tensor:
    """|H| * sign(grad) + (grad - grad), of weight's dtype."""
    gated = eager.signs_in(weight.dtype, grad)
    gate_(gated, A, moments, weight, groups, decay, normalize)
    return gated


def gate_(
    grad: Tensor, A: Tensor, moments: Tensor, weight: Tensor, groups: int, decay: str, normalize: str
) -> None:
    """grad <- |H| * sign(grad) + (grad - grad), in place in two passes over the weights."""
    if grad.dtype in _DTYPE:
        _epilogue(_GATE, grad, A, moments, weight, groups, decay, normalize)
    else:
        eager.gate_(grad, A, moments, weight, groups, decay, normalize)


def gate_all_(layers: Sequence[tuple[Any, ...]]) -> None:
    """gate_ of every layer, from its arguments."""
    for arguments in layers:
        gate_(*arguments)


def learn_(
    weight: Tensor, A: Tensor, moments: Tensor, lr: float, groups: int, decay: str, normalize: str
) -> None:
    """weight <- weight + lr * H, in place."""
    _epilogue(_LEARN, weight, A, moments, weight, groups, decay, normalize, rate=lr)


def delta(A: Tensor, moments: Tensor, weight: Tensor, groups: int, decay: str, normalize: str) -> Tensor:
    """H, of weight's shape and A's dtype."""
    H = A.new_empty(A.shape)
    _epilogue(_DELTA, H, A, moments, weight, groups, decay, normalize)
    return H


def _float_activities(u: Tensor, dim: int, competition: Competition) -> Tensor:
    return _activities(u, dim, competition, torch.float32)


def _activities(u: Tensor, dim: int, competition: Competition, dtype: torch.dtype) -> Tensor:
    source = _rows_or_planes(u, dim)
    y = torch.empty_like(source, dtype=dtype)
    outputs = {"y": y.data_ptr(), "y_dtype": _DTYPE[dtype], "y_layout": _layout(y, dim)[3:]}
    _run_competition(source, dim, competition, outputs)
    if source is u:
        return y
    return torch.empty_like(u, dtype=dtype).copy_(y)


def _rows_or_planes(u: Tensor, dim: int) -> Tensor:
    """u itself where units or positions are contiguous, otherwise a contiguous copy."""
    return u if u.is_contiguous() or u.movedim(dim, -1).is_contiguous() else u.contiguous()


def _layout(u: Tensor, dim: int) -> tuple[int, int, int, int, int, int]:
    """(batch, units, positions) of u and the strides of the three."""
    units, inner = u.shape[dim], math.prod(u.shape[dim + 1 :])
    if inner == 1 or not u.is_contiguous():  # rows of units: one batch of all positions
        return 1, units, u.numel() // max(units, 1), 0, 1, units
    return u.numel() // max(units * inner, 1), units, inner, units * inner, inner, 1


def _run_competition(u: Tensor, dim: int, competition: Competition, outputs: Mapping[str, Any]) -> None:
    batch, units, positions, *strides = _layout(u, dim)
    if u.numel() == 0:
        return
    _native.load_cpu().compete(
        u=u.data_ptr(),
        u_dtype=_DTYPE[u.dtype],
        u_layout=tuple(strides),
        batch=batch,
        units=units,
        positions=positions,
        activity=_ACTIVITY[competition.activity],
        winners=competition.winners,
        temperature=competition.temperature,
        anti=competition.anti,
        threads=torch.get_num_threads(),
        **outputs,
    )


def _add_outer(A: Tensor | None, x: Tensor, y: Tensor) -> Tensor:
    """sum_p y_p x_p^T (N, D), from x (P, D) and y (P, N), in float32; added to A where there is one."""
    rows, units, channels = x.shape[0], y.shape[1], x.shape[1]
    suits = y.dtype == torch.float32 and rows * units * channels >= _LEAST_PRODUCTS
    if not (suits and _dispatch.HAS_SLOW_PRODUCTS):
        return eager.add_outer(A, x, y)
    native = _native.load_cpu()
    x, y = _with_adjacent_columns(x), _with_adjacent_columns(y)
    adds = A is not None
    if A is None:
        A = x.new_empty((units, channels), dtype=torch.float32)
    arguments = {
        "rows": rows,
        "units": units,
        "channels": channels,
        "x": x.data_ptr(),
        "x_dtype": _DTYPE[x.dtype],
        "x_stride": x.stride(0),
        "y": y.data_ptr(),
        "y_dtype": _DTYPE[y.dtype],
        "y_stride": y.stride(0),
        "a": A.data_ptr(),
        "a_stride": channels,
        "adds": adds,
        "threads": torch.get_num_threads(),
    }
    workspace = torch.empty(native.outer_workspace(**arguments), dtype=torch.uint8)
    native.outer(**arguments, workspace=workspace.data_ptr())
    return A


def _with_adjacent_columns(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _conv_correlate(x: Tensor, y: Tensor, shape: tuple[int, ...], geometry: Geometry) -> Tensor:
    """sum_p y_p x_p^T (N, C / groups, *kernel_size) in float32; contiguous."""
    if _suits_winograd(x, y, geometry):
        return _winograd(_rows_or_planes(x, 1), _rows_or_planes(y, 1), shape, geometry)
    return eager.conv_correlate(x, y, shape, geometry)


def _suits_winograd(x: Tensor, y: Tensor, geometry: Geometry) -> bool:
    if not geometry.has_short_form or x.numel() == 0 or y.numel() == 0:
        return False
    narrowest = min(x.shape[1], y.shape[1]) // geometry.groups
    return narrowest >= _dispatch.LEAST_WINOGRAD and y.numel() // y.shape[1] >= _LEAST_WINOGRAD_POSITIONS


def _winograd(x: Tensor, y: Tensor, shape: tuple[int, ...], geometry: Geometry) -> Tensor:
    native = _native.load_cpu()
    A = x.new_empty(shape, dtype=torch.float32)
    batch, channels, *in_size = x.shape
    arguments = {
        "batch": batch,
        "channels": channels,
        "units": shape[0],
        "groups": geometry.groups,
        "in_size": tuple(in_size),
        "padding": geometry.padding,
        "x": x.data_ptr(),
        "x_dtype": _DTYPE[x.dtype],
        "x_layout": _plane_strides(x),
        "y": y.data_ptr(),
        "y_dtype": _DTYPE[y.dtype],
        "y_layout": _plane_strides(y),
        "a": A.data_ptr(),
        "a_layout": _strides(A),
        "threads": torch.get_num_threads(),
    }
    workspace = torch.empty(native.winograd_workspace(**arguments), dtype=torch.uint8)
    native.winograd(**arguments, workspace=workspace.data_ptr())
    return A


def _plane_strides(images: Tensor) -> tuple[int, int, int]:
    """Strides of batch, units and positions of contiguous or channels_last images."""
    *_, stride_unit, stride_position = _layout(images, 1)
    return images.shape[1:].numel(), stride_unit, stride_position


def _correlate(
    x: Tensor, unit: Tensor, activity: Tensor, A: Tensor, geometry: Geometry, decay: str
) -> Tensor:
    """Fill A from the winners' lists; returns the moments."""
    native, units = _native.load_cpu(), A.shape[0]
    moments = eager.new_moments(units, geometry.groups, decay, unit.shape[0], torch.float32, x.device)
    unit, activity = unit.contiguous(), activity.contiguous()
    taps = A[0, 0].numel() if A.dim() > 2 and A.shape[0] and A.shape[1] else 1
    arguments = {
        "batch": x.shape[0],
        "channels": x.shape[1],
        "groups": geometry.groups,
        "in_size": _three(x.shape[2:], 1),
        "out_size": _three(geometry.out_size(x.shape[2:]), 1),
        "kernel": _three(geometry.kernel_size, 1),
        "stride": _three(geometry.stride, 1),
        "padding": _three(geometry.padding, 0),
        "dilation": _three(geometry.dilation, 1),
        "winner_unit": unit.data_ptr(),
        "winner_activity": activity.data_ptr(),
        "winners": unit.shape[1],
        "x": x.data_ptr(),
        "x_dtype": _DTYPE[x.dtype],
        "x_stride_batch": x.stride(0),
        "x_stride_channel": x.stride(1),
        "x_stride": _three(x.stride()[2:], 0),
        "units": units,
        "a": A.data_ptr(),
        "a_stride_unit": A.stride(0),
        "a_stride_channel": A.stride(1),
        "a_stride_tap": 1 if taps > 1 else 0,
        "activity_sum": moments.data_ptr() if decay == "instar" else 0,
        "threads": torch.get_num_threads(),
    }
    if x.numel() == 0 or unit.numel() == 0:
        A.zero_()
        return moments
    workspace = torch.empty(native.correlate_workspace(**arguments), dtype=torch.uint8)
    native.correlate(**arguments, workspace=workspace.data_ptr())
    return moments


def _epilogue(
    target: int,
    out: Tensor,
    A: Tensor,
    moments: Tensor,
    weight: Tensor,
    groups: int,
    decay: str,
    normalize: str,
    rate: float = 0.0,
) -> None:
    native = _native.load_cpu()
    if decay in ("subspace", "sanger"):
        A = A - eager.mixing(moments, weight.flatten(1).to(A.dtype), groups, decay).view(A.shape)
        decay = "none"
    result = out
    A, weight, out = _as_filters(A), _as_filters(weight), _as_filters(out)
    if target == _LEARN:
        weight = out
    units, channels, taps = _sizes(weight)
    arguments = {
        "units": units,
        "channels": channels,
        "taps": taps,
        "a": A.data_ptr(),
        "a_layout": _strides(A),
        "weight": weight.data_ptr(),
        "weight_dtype": _DTYPE[weight.dtype],
        "weight_layout": _strides(weight),
        "decay": _DECAY[decay],
        "row_decay": moments.data_ptr() if decay == "instar" else 0,
        "normalize": _NORMALIZE[normalize],
        "scale": 1.0 / max(moments[-1].item(), 1.0) if normalize == "mean" else 1.0,
        "target": target,
        "out": out.data_ptr(),
        "out_dtype": _DTYPE[out.dtype],
        "out_layout": _strides(out),
        "rate": rate,
        "threads": torch.get_num_threads(),
    }
    workspace = torch.empty(native.epilogue_workspace(**arguments), dtype=torch.uint8)
    native.epilogue(**arguments, workspace=workspace.data_ptr())
    if out is not result:
        result.copy_(out)


def _as_filters(tensor: Tensor) -> Tensor:
    """The tensor itself where its kernel dimensions collapse into one stride, otherwise a contiguous copy."""
    taps = _taps(tensor)
    collapsible = all(outer == size * inner for (_, outer), (size, inner) in itertools.pairwise(taps))
    return tensor if collapsible else tensor.contiguous()


def _taps(tensor: Tensor) -> list[tuple[int, int]]:
    """(size, stride) of the kernel dimensions; those of size 1 are left out, whose strides mean nothing."""
    return [
        (size, step) for size, step in zip(tensor.shape[2:], tensor.stride()[2:], strict=True) if size > 1
    ]


def _sizes(tensor: Tensor) -> tuple[int, int, int]:
    units, channels = tensor.shape[:2]
    return units, channels, tensor.numel() // max(units * channels, 1)


def _strides(tensor: Tensor) -> tuple[int, int, int]:
    taps = _taps(tensor)
    return tensor.stride(0), tensor.stride(1), taps[-1][1] if taps else 0


def _three(values: tuple[int, ...] | torch.Size, fill: int) -> tuple[int, int, int]:
    """``values`` with leading dimensions added up to three."""
    padded = (fill,) * (3 - len(values)) + tuple(values)
    return padded[0], padded[1], padded[2]
