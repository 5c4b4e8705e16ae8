"""The sum of the activities over positions, from u and the state."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ghl_kernels.backends.gpu.layout import Responses
from ghl_kernels.backends.gpu.state import State
from ghl_kernels.backends.triton.arch import of as arch_of
from ghl_kernels.backends.triton.kernels import activity
from ghl_kernels.backends.triton.kernels.tiles import grid
from ghl_kernels.backends.triton.launch import launch
from ghl_kernels.rule import Competition

_WAVES = 4  # programs per multiprocessor
_WARPS = 4
_ADD_SPLITS, _ADD_UNITS = 16, 128


@triton.jit
def activity_sums_kernel(
    u_ptr,
    threshold_ptr,
    cut_ptr,
    logsumexp_ptr,
    first_ptr,
    partial_ptr,
    inner,
    tiles,
    all_tiles,
    tiles_per_split,
    units,
    scale,
    batch_stride,
    position_stride,
    unit_stride,
    ACTIVITY: tl.constexpr,
    SELECTS: tl.constexpr,
    ANTI: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,
):
    """partial[split, unit] = sum of y over the positions of a split; a program has BN units of one split."""
    blocks = tl.cdiv(units, BN)
    split = tl.program_id(0) // blocks
    unit = (tl.program_id(0) % blocks) * BN + tl.arange(0, BN)
    begin = split * tiles_per_split
    total = tl.zeros((BP, BN), tl.float32)
    for tile in range(begin, tl.minimum(begin + tiles_per_split, all_tiles)):
        item = (tile // tiles).to(tl.int64)
        within = (tile % tiles).to(tl.int64) * BP + tl.arange(0, BP)
        here = within < inner
        position = item * inner + within
        base = u_ptr + item * batch_stride + within * position_stride
        u = tl.load(
            base[:, None] + unit.to(tl.int64)[None, :] * unit_stride,
            mask=here[:, None] & (unit < units)[None, :],
            other=float("-inf") if ACTIVITY == "softmax" else 0.0,
        ).to(tl.float32)
        threshold, cut, logsumexp, first = activity.load_state(
            threshold_ptr, cut_ptr, logsumexp_ptr, first_ptr, position[:, None], here[:, None]
        )
        total += activity.activities(
            u,
            unit[None, :],
            threshold,
            cut,
            logsumexp,
            first,
            scale,
            ACTIVITY,
            SELECTS,
            ANTI,
        )
    tl.store(partial_ptr + split.to(tl.int64) * units + unit, tl.sum(total, 0), mask=unit < units)


@triton.jit
def add_splits_kernel(partial_ptr, sum_ptr, splits, units, BS: tl.constexpr, BN: tl.constexpr):
    """sum[unit] = sum of partial[split, unit] in a fixed order."""
    unit = tl.program_id(0) * BN + tl.arange(0, BN)
    total = tl.zeros((BS, BN), tl.float32)
    for start in range(0, splits, BS):
        split = start + tl.arange(0, BS)
        total += tl.load(
            partial_ptr + split.to(tl.int64)[:, None] * units + unit[None, :],
            mask=(split < splits)[:, None] & (unit < units)[None, :],
            other=0.0,
        )
    tl.store(sum_ptr + unit, tl.sum(total, 0), mask=unit < units)


def activity_sums(u: Responses, state: State, competition: Competition) -> Tensor:
    """sum_p y_p, (N,) in float32; the positions are split among programs and added in a fixed order."""
    cut = grid(u)
    positions, units = _sums_tile(u.units, cut.inner, cut.planes)
    tiles = triton.cdiv(cut.inner, positions)
    all_tiles, blocks = cut.items * tiles if u.tensor.numel() else 0, triton.cdiv(u.units, units)
    gpu = arch_of(u.tensor.device)
    per_split = triton.cdiv(all_tiles, max(1, _WAVES * gpu.multiprocessors // max(1, blocks))) or 1
    splits = triton.cdiv(all_tiles, per_split)
    partial = u.tensor.new_empty((splits, u.units), dtype=torch.float32)
    launch(
        activity_sums_kernel,
        splits * blocks,
        warps=_WARPS,
        u_ptr=u.tensor,
        **{f"{name}_ptr": field for name, field in state._asdict().items()},
        partial_ptr=partial,
        inner=cut.inner,
        tiles=tiles,
        all_tiles=all_tiles,
        tiles_per_split=per_split,
        units=u.units,
        **cut.strides(),
        **activity.constants(competition),
        BP=positions,
        BN=units,
    )
    total = u.tensor.new_empty(u.units, dtype=torch.float32)
    launch(
        add_splits_kernel,
        triton.cdiv(u.units, _ADD_UNITS),
        warps=_WARPS,
        partial_ptr=partial,
        sum_ptr=total,
        splits=splits,
        units=u.units,
        BS=_ADD_SPLITS,
        BN=_ADD_UNITS,
    )
    return total


def _sums_tile(units: int, inner: int, planes: bool) -> tuple[int, int]:
    """(positions, units) of a tile, longer along what is contiguous."""
    positions, width = (128, 32) if planes else (16, 256)
    return min(positions, triton.next_power_of_2(inner)), min(width, triton.next_power_of_2(units))
