"""A and G of a depthwise convolution: one channel per group, so there is nothing to multiply matrices of.

Bound by memory: u, dL/du and x are read once, and every tap has an accumulator for each element of the tile.
These are reduced over the positions only at the end of a slice, and the slices are added in a fixed order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ghl_kernels.backends.gpu.layout import VECTOR, Patches, Responses, is_long
from ghl_kernels.backends.gpu.memory import WORKSPACE_BYTES, workspace
from ghl_kernels.backends.gpu.state import State
from ghl_kernels.backends.triton.arch import Arch
from ghl_kernels.backends.triton.arch import of as arch_of
from ghl_kernels.backends.triton.kernels.activity import (
    activities,
    constants,
    load_state,
    position_offset,
)
from ghl_kernels.backends.triton.kernels.epilogue import sum_splits
from ghl_kernels.backends.triton.kernels.patch import GEOMETRY, locate, split_tap
from ghl_kernels.backends.triton.launch import launch
from ghl_kernels.rule import Competition

# Four elements a thread: a tap of both results then takes 8 registers.
TILE = 512  # positions * units
MAX_UNITS = 64  # of a tile whose units are contiguous; else of one whose positions are:
MAX_UNITS_STRIDED = 4
MAX_TAPS = 9  # of a program
_LEAST_TILES = 8  # of a slice, so that reading outweighs the reduction at its end
_PROGRAMS = 4  # for each multiprocessor
_WARPS = 4

# Compiling a kernel for each of their values would gain nothing.
_PLAIN = [
    *GEOMETRY,
    *("positions", "units", "taps", "slice_length", "slice_stride", "unit_blocks", "tap_blocks"),
    *(f"x_stride_{axis}" for axis in "bdhw"),
]


@triton.jit
def _append(values, value):
    return values + (value,)  # noqa: RUF005, Triton does not know the star


@triton.jit(do_not_specialize=_PLAIN)
def depthwise_kernel(
    x,
    u,
    grad,
    threshold,
    cut,
    logsumexp,
    first,
    parts_A,
    parts_G,
    positions,
    units,
    units_per_channel,
    taps,
    slice_length,
    slice_stride,
    unit_blocks,
    tap_blocks,
    u_inner,
    u_batch_stride,
    u_position_stride,
    u_unit_stride,
    grad_inner,
    grad_batch_stride,
    grad_position_stride,
    grad_unit_stride,
    in_d,
    in_h,
    in_w,
    out_d,
    out_h,
    out_w,
    out_d_magic,
    out_h_magic,
    out_w_magic,
    kernel_d,
    kernel_h,
    kernel_w,
    stride_d,
    stride_h,
    stride_w,
    pad_d,
    pad_h,
    pad_w,
    dilation_d,
    dilation_h,
    dilation_w,
    x_stride_d,
    x_stride_h,
    x_stride_w,
    x_stride_b,
    x_stride_c,
    scale,
    ACTIVITY: tl.constexpr,
    SELECTS: tl.constexpr,
    ANTI: tl.constexpr,
    UNITS_LAST: tl.constexpr,
    DIMS: tl.constexpr,
    LONG: tl.constexpr,
    VECTOR: tl.constexpr,
    POSITIONS: tl.constexpr,
    UNITS: tl.constexpr,
    TAPS: tl.constexpr,
):
    """TAPS taps of UNITS units over one slice, of A (parts_A) and G (parts_G); either pointer may be None.

    units and the strides of positions are given in multiples of VECTOR, which shows the compiler the factor.
    """
    program = tl.program_id(0)
    # programs of the same units and positions are neighbors: they read the same u and dL/du
    first_tap = (program % tap_blocks) * TAPS
    program = program // tap_blocks
    n = (program % unit_blocks) * UNITS + tl.arange(0, UNITS)
    part = program // unit_blocks
    if LONG:
        part = part.to(tl.int64)
    units = units * VECTOR
    in_units = n < units

    if UNITS_LAST:
        unit, in_columns = n[None, :], in_units[None, :]
        lane = tl.arange(0, POSITIONS)[:, None]
    else:
        unit, in_columns = n[:, None], in_units[:, None]
        lane = tl.arange(0, POSITIONS)[None, :]
    x_channel = x + (unit // units_per_channel).to(tl.int64) * x_stride_c
    u_unit = u + unit.to(tl.int64) * u_unit_stride
    if parts_G is not None:
        grad_unit = grad + unit.to(tl.int64) * grad_unit_stride
    masked_u: tl.constexpr = float("-inf") if ACTIVITY == "softmax" else 0.0

    a, g = (), ()
    for _ in tl.static_range(TAPS):
        zero = tl.zeros((POSITIONS, UNITS) if UNITS_LAST else (UNITS, POSITIONS), tl.float32)
        a, g = _append(a, zero), _append(g, zero)
    begin = part * slice_length
    for start in range(begin, tl.minimum(begin + slice_length, positions), POSITIONS):
        position = start + lane
        in_positions = position < positions
        mask = in_positions & in_columns
        if parts_A is not None:
            row = position_offset(position, u_inner, u_batch_stride * VECTOR, u_position_stride * VECTOR)
            at_threshold, at_cut, at_logsumexp, at_first = load_state(
                threshold, cut, logsumexp, first, position, in_positions
            )
            y = activities(
                tl.load(u_unit + row, mask=mask, other=masked_u).to(tl.float32),
                unit,
                at_threshold,
                at_cut,
                at_logsumexp,
                at_first,
                scale,
                ACTIVITY,
                SELECTS,
                ANTI,
            )
        if parts_G is not None:
            row = position_offset(
                position, grad_inner, grad_batch_stride * VECTOR, grad_position_stride * VECTOR
            )
            du = tl.load(grad_unit + row, mask=mask, other=0.0).to(tl.float32)
        next_a, next_g = (), ()
        for i in tl.static_range(TAPS):
            tap_d, tap_h, tap_w = split_tap(first_tap + i, kernel_h, kernel_w)
            offset, in_x = locate(
                position,
                tap_d,
                tap_h,
                tap_w,
                in_d,
                in_h,
                in_w,
                out_d,
                out_h,
                out_w,
                out_d_magic,
                out_h_magic,
                out_w_magic,
                stride_d,
                stride_h,
                stride_w,
                pad_d,
                pad_h,
                pad_w,
                dilation_d,
                dilation_h,
                dilation_w,
                x_stride_d * VECTOR,
                x_stride_h * VECTOR,
                x_stride_w * VECTOR,
                x_stride_b * VECTOR,
                DIMS,
                LONG,
            )
            read = mask & in_x & (first_tap + i < taps)
            x_tap = tl.load(x_channel + offset, mask=read, other=0.0).to(tl.float32)
            if parts_A is not None:
                next_a = _append(next_a, a[i] + y * x_tap)
            if parts_G is not None:
                next_g = _append(next_g, g[i] + du * x_tap)
        if parts_A is not None:
            a = next_a
        if parts_G is not None:
            g = next_g

    for i in tl.static_range(TAPS):
        index = part.to(tl.int64) * slice_stride + n.to(tl.int64) * taps + first_tap + i
        written = in_units & (first_tap + i < taps)
        if parts_A is not None:
            tl.store(parts_A + index, tl.sum(a[i], 0 if UNITS_LAST else 1), mask=written)
        if parts_G is not None:
            tl.store(parts_G + index, tl.sum(g[i], 0 if UNITS_LAST else 1), mask=written)


class Tile(NamedTuple):
    """What one program computes, and how the positions are cut into slices."""

    positions: int
    units: int
    taps: int
    slices: int
    slice_length: int


def tile_of(positions: int, units: int, taps: int, results: int, *, units_last: bool, arch: Arch) -> Tile:
    """Tile and slices: programs that fill the GPU, while slices are long and their sums fit the workspace."""
    limit = MAX_UNITS if units_last else MAX_UNITS_STRIDED
    tile_units = min(limit, triton.next_power_of_2(units))
    tile_positions = TILE // tile_units
    tap_blocks = triton.cdiv(taps, MAX_TAPS)
    blocks = triton.cdiv(units, tile_units) * tap_blocks
    wanted = triton.cdiv(_PROGRAMS * arch.multiprocessors, blocks)
    room = WORKSPACE_BYTES // (4 * results * units * taps)
    count = max(1, min(wanted, room, positions // (tile_positions * _LEAST_TILES)))
    length = triton.cdiv(triton.cdiv(positions, count), tile_positions) * tile_positions
    return Tile(
        tile_positions, tile_units, triton.cdiv(taps, tap_blocks), triton.cdiv(positions, length), length
    )


def correlate(
    x: Patches, u: Responses, grad: Responses | None, state: State, competition: Competition, want_A: bool
) -> tuple[Tensor | None, Tensor | None]:
    """A (if ``want_A``) and G (if ``grad`` is given), float32 (units, 1, taps), of x with groups = channels.

    Unit n sees channel n // (units / channels). x, u and dL/du may have any strides; channels_last is fast.

    Raises:
        torch.OutOfMemoryError: no memory for the workspace, with its size.
    """
    results, device = want_A + (grad is not None), x.tensor.device
    if u.units * u.positions * results == 0:
        nothing = torch.zeros((u.units, 1, x.taps), dtype=torch.float32, device=device)
        return nothing if want_A else None, nothing.clone() if grad else None
    read = [view for view in (u if want_A else None, grad) if view]
    units_last = all(view.unit_stride == 1 for view in read)
    tile = tile_of(u.positions, u.units, x.taps, results, units_last=units_last, arch=arch_of(device))
    parts = workspace(
        (tile.slices, results, u.units, x.taps),
        device,
        f"the sums of {u.units} units over {x.taps} taps at {u.positions} positions",
    )
    unit_blocks, tap_blocks = triton.cdiv(u.units, tile.units), triton.cdiv(x.taps, tile.taps)
    launch(
        depthwise_kernel,
        tap_blocks * unit_blocks * tile.slices,
        warps=_WARPS,
        **state._asdict(),
        **_operands(x, u, grad, read),
        **constants(competition),
        parts_A=parts[:, 0] if want_A else None,
        parts_G=parts[:, -1] if grad else None,
        positions=u.positions,
        taps=x.taps,
        slice_length=tile.slice_length,
        slice_stride=parts.stride(0),
        unit_blocks=unit_blocks,
        tap_blocks=tap_blocks,
        UNITS_LAST=units_last,
        LONG=is_long(u.positions, x.tensor),
        POSITIONS=tile.positions,
        UNITS=tile.units,
        TAPS=tile.taps,
    )
    sums = sum_splits(parts).unsqueeze(2)
    return sums[0] if want_A else None, sums[-1] if grad else None


def _operands(x: Patches, u: Responses, grad: Responses | None, read: list[Responses]) -> dict[str, Any]:
    """x, u and dL/du by name, units and strides of positions in multiples of VECTOR."""
    aligned = x.is_aligned and all(view.is_aligned for view in read)
    vector = VECTOR if aligned and u.units == x.groups and u.units % VECTOR == 0 else 1
    arguments = x.arguments(vector) | u.arguments("u", vector) | (grad or u).arguments("grad", vector)
    return arguments | {
        "x": x.tensor,
        "u": u.tensor,
        "grad": grad.tensor if grad else None,
        "units": u.units // vector,
        "units_per_channel": u.units // x.groups,
    }
