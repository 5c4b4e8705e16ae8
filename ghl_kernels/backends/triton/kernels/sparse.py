"""A from the winners' lists: every unit adds up the patches that it won, at k / N of the dense product.

The winners are sorted by unit, and each unit's run is cut into segments of fixed length, so that a unit which
wins everywhere is the work of many programs. The sort is stable and the segments are added in their order:
the result is the same bit for bit every time.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ghl_kernels.backends import eager
from ghl_kernels.backends.gpu.layout import Patches, is_long, magic, new_sum
from ghl_kernels.backends.gpu.memory import WORKSPACE_BYTES, workspace
from ghl_kernels.backends.triton.arch import of as arch_of
from ghl_kernels.backends.triton.kernels.patch import GEOMETRY, divide, locate, split_tap
from ghl_kernels.backends.triton.launch import launch

ENTRIES = 16  # of a segment, gathered at a time
COLUMNS = 128  # of a patch, per program
SEGMENT = 256  # entries, where the workspace allows it
SEARCHED = 128  # units, or segments, that a program looks up at a time
TOGETHER = 8  # segments of a unit whose sums are loaded at a time, as each load waits for L2
SCANNED = 1024  # units whose segments a program counts at a time
_WARPS = 4
_INT16 = torch.iinfo(torch.int16).max

# Compiling a kernel for each of their values would gain nothing.
_PLAIN = [
    *GEOMETRY,
    *("units", "units_per_group", "winners", "winners_magic", "channels", "taps", "column_blocks", "length"),
    *(f"x_stride_{axis}" for axis in "bdhw"),
    *("A_stride_c", "A_stride_tap"),
]


@triton.jit
def _count_below(ascending, count, limit, steps, BLOCK: tl.constexpr):
    """How many of ``count`` ascending numbers are below each limit, by ``steps`` halvings."""
    low = tl.zeros((BLOCK,), tl.int64)
    high = low + count
    for _ in range(steps):
        middle = (low + high) // 2
        is_below = tl.load(ascending + middle, mask=low < high, other=0).to(tl.int64) < limit
        low, high = tl.where((low < high) & is_below, middle + 1, low), tl.where(is_below, high, middle)
    return low


@triton.jit(do_not_specialize=["units", "entries", "steps"])
def starts_kernel(sorted_units, starts, units, entries, steps, BLOCK: tl.constexpr):
    """starts[n] = how many entries belong to units below n, for n up to ``units``."""
    unit = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(starts + unit, _count_below(sorted_units, entries, unit, steps, BLOCK), mask=unit <= units)


@triton.jit(do_not_specialize=["units", "length"])
def ends_kernel(starts, ends, units, length, BLOCK: tl.constexpr):
    """ends[n] = how many segments the units up to n have; by one program."""
    before = tl.zeros((), tl.int64)
    for begin in range(0, units, BLOCK):
        unit = begin + tl.arange(0, BLOCK)
        mask = unit < units
        first = tl.load(starts + unit, mask=mask, other=0)
        count = tl.cdiv(tl.load(starts + unit + 1, mask=mask, other=0) - first, length)
        tl.store(ends + unit, before + tl.cumsum(count, 0), mask=mask)
        before += tl.sum(count, 0)


@triton.jit(do_not_specialize=["units", "segments", "steps"])
def owners_kernel(ends, owner, units, segments, steps, BLOCK: tl.constexpr):
    """owner[s] = the unit of segment s; ``units`` from the last unit's last one on."""
    segment = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    passed = _count_below(ends, units, segment + 1, steps, BLOCK)
    tl.store(owner + segment, passed, mask=segment < segments)


@triton.jit
def _unit_segments(starts, unit, length):
    """(first entry of a unit, end of its entries, number of its segments)."""
    first, end = tl.load(starts + unit), tl.load(starts + unit + 1)
    return first, end, tl.cdiv(end - first, length)


@triton.jit
def _slot(first, segment, segments, length):
    """Row of the workspace for a segment of a unit that has several, and whose entries begin at ``first``.

    All but a unit's last segment are whole, so that over all units their first entries lie at least
    ``length`` apart; so do those of the last segments, as a whole one lies between two. Hence two banks of
    one row for every ``length`` entries, and no table.
    """
    return (first // length + segment) * 2 + (segment == segments - 1).to(tl.int64)


@triton.jit
def _bad_position(sorted_units):
    """NaN where a position has no winners because its u is NaN, marked -1, else 0; all of A gets it."""
    return tl.where(tl.load(sorted_units) < 0, float("nan"), 0.0)


@triton.jit(do_not_specialize=_PLAIN)
def gather_kernel(
    x,
    activity,
    order,
    sorted_units,
    starts,
    owner,
    ends,
    A,
    A_stride_c,
    A_stride_tap,
    sums,
    partial_A,
    partial_sums,
    units,
    units_per_group,
    winners,
    winners_magic,
    channels,
    taps,
    column_blocks,
    length,
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
    DIMS: tl.constexpr,
    LONG: tl.constexpr,
    VECTOR: tl.constexpr,
    WITHIN_TAP: tl.constexpr,
    ENTRIES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One segment and one block of a patch's columns: to A itself where the unit has no other segment.

    channels and the strides of x are given in multiples of VECTOR, which shows the compiler the factor.
    """
    program = tl.program_id(0).to(tl.int64)
    index, block = program // column_blocks, (program % column_blocks).to(tl.int32)
    unit = tl.load(owner + index)
    if unit >= units:
        return
    first, end, segments = _unit_segments(starts, unit, length)
    segment = index - (tl.load(ends + unit) - segments)
    begin = first + segment * length
    end = tl.minimum(begin + length, end)

    channels = channels * VECTOR
    if WITHIN_TAP:
        # whether a patch is inside x is then one test per position
        blocks_per_tap = tl.cdiv(channels, COLUMNS)
        tap = tl.full((1,), block // blocks_per_tap, tl.int32)
        channel = (block % blocks_per_tap) * COLUMNS + tl.arange(0, COLUMNS)
        in_columns = channel < channels
    else:
        column = block * COLUMNS + tl.arange(0, COLUMNS)
        tap, channel = column // channels, column % channels
        in_columns = tap < taps
    tap_d, tap_h, tap_w = split_tap(tap[None, :], kernel_h, kernel_w)
    first_channel = (unit // units_per_group) * channels
    x_column = x + (first_channel + channel)[None, :] * x_stride_c

    row = tl.zeros((ENTRIES, COLUMNS), tl.float32)
    total = tl.zeros((ENTRIES,), tl.float32)
    for start in range(begin, end, ENTRIES):
        entry = start + tl.arange(0, ENTRIES)
        inside = entry < end
        source = tl.load(order + entry, mask=inside, other=0)
        y = tl.load(activity + source, mask=inside, other=0.0)
        if not LONG:
            source = source.to(tl.int32)
        offset, in_x = locate(
            divide(source, winners, winners_magic, LONG)[:, None],
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
        mask = inside[:, None] & in_x & in_columns[None, :]
        row += y[:, None] * tl.load(x_column + offset, mask=mask, other=0.0).to(tl.float32)
        total += y

    row_sum = tl.sum(row, 0)
    if segments == 1:
        bad = _bad_position(sorted_units)
        target = A + unit * channels * taps + channel * A_stride_c + tap * A_stride_tap
        tl.store(target, row_sum + bad, mask=in_columns)
        if (sums is not None) and block == 0:
            tl.store(sums + unit, tl.sum(total, 0) + bad)
    else:
        slot = _slot(first, segment, segments, length)
        tl.store(partial_A + (slot * taps + tap) * channels + channel, row_sum, mask=in_columns)
        if (sums is not None) and block == 0:
            tl.store(partial_sums + slot, tl.sum(total, 0))


@triton.jit(do_not_specialize=_PLAIN)
def combine_kernel(
    sorted_units,
    starts,
    A,
    A_stride_c,
    A_stride_tap,
    sums,
    partial_A,
    partial_sums,
    channels,
    taps,
    column_blocks,
    length,
    COLUMNS: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """The segments of one unit added in their order, for one block of columns; 0 for a unit without any."""
    program = tl.program_id(0).to(tl.int64)
    unit, block = program // column_blocks, (program % column_blocks).to(tl.int32)
    first, _, segments = _unit_segments(starts, unit, length)
    if segments == 1:
        return
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    columns = taps * channels
    row = tl.zeros((COLUMNS,), tl.float32)
    total = 0.0
    for begin in range(0, segments, TOGETHER):
        for index in tl.static_range(TOGETHER):
            segment = begin + index
            slot = _slot(first, segment, segments, length)
            mask = (column < columns) & (segment < segments)
            row += tl.load(partial_A + slot * columns + column, mask=mask, other=0.0)
            if sums is not None:
                total += tl.load(partial_sums + slot, mask=segment < segments, other=0.0)
    bad = _bad_position(sorted_units)
    tap, channel = column // channels, column % channels
    target = A + unit * columns + channel * A_stride_c + tap * A_stride_tap
    tl.store(target, row + bad, mask=column < columns)
    if (sums is not None) and block == 0:
        tl.store(sums + unit, total + bad)


def _segments(sorted_units: Tensor, units: int, segments: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """What the three first kernels find: starts (units + 1,), ends (units,), owner (segments,)."""
    entries = sorted_units.numel()
    starts, ends, owner = (
        torch.empty(size, dtype=torch.int64, device=sorted_units.device)
        for size in (units + 1, units, segments)
    )
    launch(
        starts_kernel,
        triton.cdiv(units + 1, SEARCHED),
        sorted_units=sorted_units,
        starts=starts,
        units=units,
        entries=entries,
        steps=entries.bit_length(),
        BLOCK=SEARCHED,
        warps=_WARPS,
    )
    launch(ends_kernel, 1, starts=starts, ends=ends, units=units, length=length, BLOCK=SCANNED, warps=_WARPS)
    launch(
        owners_kernel,
        triton.cdiv(segments, SEARCHED),
        ends=ends,
        owner=owner,
        units=units,
        segments=segments,
        steps=units.bit_length(),
        BLOCK=SEARCHED,
        warps=_WARPS,
    )
    return starts, ends, owner


def segment_length(entries: int, columns: int) -> int:
    """Entries of a segment: SEGMENT, or more so that the workspace takes at most WORKSPACE_BYTES.

    The bound gives way only where it does not hold four rows.
    """
    banks = max(WORKSPACE_BYTES // (8 * (columns + 1)), 2)
    return max(SEGMENT, triton.cdiv(entries // banks + 1, ENTRIES) * ENTRIES)


def workspace_rows(entries: int, length: int) -> int:
    """Rows for the segments of all units that have several; see _slot."""
    return 2 * (entries // length + 1)


def column_tiling(channels: int, taps: int) -> tuple[bool, int, int]:
    """(whether a block lies within one tap, its columns, number of blocks)."""
    if taps == 1 or 2 * channels >= COLUMNS:
        width = min(COLUMNS, triton.next_power_of_2(channels))
        return True, width, taps * triton.cdiv(channels, width)
    return False, COLUMNS, triton.cdiv(channels * taps, COLUMNS)


def correlate(
    x: Patches, unit: Tensor, activity: Tensor, units: int, sum_activity: bool
) -> tuple[Tensor, Tensor | None]:
    """A (units, channels per group, taps), the sum of y_pn patch_p over the positions p that n won; sum y_pn.

    ``unit`` (P, k) int32 and ``activity`` (P, k) float32 are the winners' lists; a unit sees the channels of
    its group. A first unit of -1 marks a position whose u is NaN, and makes everything NaN, as in a dense
    product. Both results are float32; the second is None unless ``sum_activity``.

    Raises:
        torch.OutOfMemoryError: no memory for the workspace, with its size.
    """
    entries, columns, device = unit.numel(), x.channels * x.taps, activity.device
    shape = (units, x.channels, x.taps)
    if entries == 0 or columns == 0:
        _, moments = eager.linear_winner_sums(activity[:, :1], unit, activity, units, "instar")
        return activity.new_zeros(shape), moments[:-1] if sum_activity else None
    length = segment_length(entries, columns)
    # a radix sort takes a pass for every byte of its keys
    keys = unit.to(torch.int16) if units <= _INT16 else unit
    sorted_units, order = keys.reshape(-1).sort(stable=True)
    segments = units + entries // length
    starts, ends, owner = _segments(sorted_units, units, segments, length)
    A = new_sum(x, units, x.channels)
    sums = torch.empty(units, dtype=torch.float32, device=device) if sum_activity else None
    rows = workspace_rows(entries, length)
    purpose = f"the segments of {units} units of {columns} inputs with {entries} winners"
    within_tap, width, blocks = column_tiling(x.channels, x.taps)
    long = is_long(entries, x.tensor)
    shared: dict[str, Any] = {
        "sorted_units": sorted_units,
        "starts": starts,
        "A": A,
        "A_stride_c": A.stride(1),
        "A_stride_tap": A.stride(2),
        "sums": sums,
        "partial_A": workspace((rows, columns), device, purpose),
        "partial_sums": workspace((rows,), device, purpose),
        "taps": x.taps,
        "length": length,
        "warps": _WARPS,
    }
    launch(
        gather_kernel,
        segments * blocks,
        **shared,
        **x.arguments(x.vector),
        x=x.tensor,
        channels=x.channels // x.vector,
        activity=activity.contiguous(),
        order=order,
        owner=owner,
        ends=ends,
        units=units,
        units_per_group=units // x.groups,
        winners=unit.shape[1],
        winners_magic=magic(unit.shape[1]),
        column_blocks=blocks,
        LONG=long,
        # offsets of 64 bits are more than ptxas counts on where it aims at many blocks
        registers=arch_of(device).registers if long else None,
        WITHIN_TAP=within_tap,
        ENTRIES=ENTRIES,
        COLUMNS=width,
    )
    combine_blocks = triton.cdiv(columns, COLUMNS)
    launch(
        combine_kernel,
        units * combine_blocks,
        **shared,
        channels=x.channels,
        column_blocks=combine_blocks,
        COLUMNS=COLUMNS,
        TOGETHER=TOGETHER,
    )
    return A, sums
