"""The competition: its state, the activities, and the winners' lists.

One kernel reads u and writes whichever of these is asked for. Its tiles are [positions, units], with lanes
along whichever of the two is contiguous in memory, so that rows, channels_last and NCHW need no copy.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl

from ghl_kernels.backends.gpu import competition
from ghl_kernels.backends.gpu.layout import Responses
from ghl_kernels.backends.triton.arch import of as arch_of
from ghl_kernels.backends.triton.kernels import activity, select
from ghl_kernels.backends.triton.kernels.activity_sums import activity_sums
from ghl_kernels.backends.triton.kernels.tiles import grid, tile_of
from ghl_kernels.backends.triton.launch import launch
from ghl_kernels.rule import Competition

__all__ = ["activities", "activity_sums", "full_state", "state", "winner_lists"]

_KEY_SHIFT = {torch.float32: 0, torch.bfloat16: 16, torch.float16: 13}


@triton.jit
def has_nan(row, WHOLE: tl.constexpr):
    """Whether any value of a row is NaN."""
    tile = row[0]
    bad = tl.zeros(tile.shape, tl.int32)
    for start in range(0, select.end_of(row, WHOLE), tile.shape[1]):
        u = select.read(row, start, WHOLE)
        bad |= (u != u).to(tl.int32)
    return tl.max(bad, 1) > 0


@triton.jit
def is_winner(u, unit, threshold, cut):
    """The k largest of a row, of equals the first."""
    return (u > threshold[:, None]) | ((u == threshold[:, None]) & (unit[None, :] <= cut[:, None]))


@triton.jit
def logsumexp_of(row, threshold, cut, scale, SELECTS: tl.constexpr, WHOLE: tl.constexpr):
    """logsumexp of u / temperature over the winners, or over all; in one pass."""
    tile = row[0]
    top = tl.full((tile.shape[0],), float("-inf"), tl.float32)
    total = tl.zeros((tile.shape[0],), tl.float32)
    shift = tl.zeros((tile.shape[0],), tl.float32)
    for start in range(0, select.end_of(row, WHOLE), tile.shape[1]):
        u = select.read(row, start, WHOLE)
        if SELECTS:
            u = tl.where(is_winner(u, start + tl.arange(0, tile.shape[1]), threshold, cut), u, float("-inf"))
        previous, top = top, tl.maximum(top, tl.max(u * scale, 1))
        # a difference of infinities is NaN
        shift = tl.where(tl.abs(top) < float("inf"), top, 0.0)
        total *= tl.exp2((previous - shift) * activity.LOG2E)
        total += tl.sum(tl.exp2((u * scale - shift[:, None]) * activity.LOG2E), 1)
    return shift + tl.log2(total) / activity.LOG2E


@triton.jit
def first_largest(row, WHOLE: tl.constexpr):
    """Unit of the largest value of every row, the first of equals."""
    tile = row[0]
    largest = tl.full((tile.shape[0],), float("-inf"), tl.float32)
    for start in range(0, select.end_of(row, WHOLE), tile.shape[1]):
        largest = tl.maximum(largest, tl.max(select.read(row, start, WHOLE), 1))
    none = 2**31 - 1
    first = tl.full(tile.shape, none, tl.int32)
    for start in range(0, select.end_of(row, WHOLE), tile.shape[1]):
        unit = start + tl.arange(0, tile.shape[1])
        is_largest = select.read(row, start, WHOLE) == largest[:, None]
        first = tl.minimum(first, tl.where(is_largest, unit[None, :], none))
    return tl.min(first, 1)


@triton.jit
def compete_kernel(
    u_ptr,
    y_ptr,
    threshold_ptr,
    cut_ptr,
    logsumexp_ptr,
    first_ptr,
    winner_unit_ptr,
    winner_activity_ptr,
    inner,
    tiles,
    units,
    k,
    scale,
    u_batch_stride,
    u_position_stride,
    u_unit_stride,
    y_batch_stride,
    y_position_stride,
    y_unit_stride,
    ACTIVITY: tl.constexpr,
    SELECTS: tl.constexpr,
    ANTI: tl.constexpr,
    POISONS: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,
    WHOLE: tl.constexpr,
    GROUP: tl.constexpr,
    STRIDED: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """Every output that has a pointer, for BP positions of one batch item.

    inner: positions of an item, tiles: tiles of an item, scale: 1 / temperature. POISONS: an infinite
    logsumexp becomes NaN, which is what a softmax makes of +inf.
    """
    item = (tl.program_id(0) // tiles).to(tl.int64)
    within = (tl.program_id(0) % tiles).to(tl.int64) * BP + tl.arange(0, BP)
    here = within < inner
    position = item * inner + within
    # in planes, lanes beside each other along positions: most of a reduction over units is then within a lane
    base = u_ptr + item * u_batch_stride + tl.max_contiguous(within, 2) * u_position_stride
    if WHOLE:
        u = select.load_units(base, u_unit_stride, 0, units, here, BN)
    else:
        u = tl.full((BP, BN), float("-inf"), tl.float32)
    row = (u, base, u_unit_stride, units, here)

    threshold = tl.zeros((BP,), tl.float32)
    cut = tl.zeros((BP,), tl.int32)
    bad = here & False
    if SELECTS or ACTIVITY != "softmax":
        bad = has_nan(row, WHOLE)
    if SELECTS:
        threshold, above = select.kth_largest(row, k, WHOLE, GROUP, STRIDED, SHIFT)
        cut = select.tie_cut(row, threshold, k - above, WHOLE)
    logsumexp = tl.zeros((BP,), tl.float32)
    if ACTIVITY == "softmax":
        logsumexp = logsumexp_of(row, threshold, cut, scale, SELECTS, WHOLE)
        logsumexp = tl.where(bad | (POISONS & (logsumexp == float("inf"))), float("nan"), logsumexp)
    first = tl.zeros((BP,), tl.int32)
    if ANTI:
        first = first_largest(row, WHOLE)
    mark = tl.where(bad, float("nan"), threshold)

    if threshold_ptr is not None:
        tl.store(threshold_ptr + position, mark, mask=here)
    if cut_ptr is not None:
        tl.store(cut_ptr + position, tl.where(bad, -1, cut), mask=here)
    if logsumexp_ptr is not None:
        tl.store(logsumexp_ptr + position, logsumexp, mask=here)
    if first_ptr is not None:
        tl.store(first_ptr + position, first, mask=here)
    if y_ptr is not None:
        y_base = y_ptr + item * y_batch_stride + within * y_position_stride
        for start in range(0, select.end_of(row, WHOLE), BN):
            unit = start + tl.arange(0, BN)
            y = activity.activities(
                select.read(row, start, WHOLE),
                unit[None, :],
                mark[:, None],
                cut[:, None],
                logsumexp[:, None],
                first[:, None],
                scale,
                ACTIVITY,
                SELECTS,
                ANTI,
            )
            y_pointer = y_base[:, None] + unit.to(tl.int64)[None, :] * y_unit_stride
            tl.store(y_pointer, y.to(y_ptr.dtype.element_ty), mask=here[:, None] & (unit < units)[None, :])
    if winner_unit_ptr is not None:
        listed = tl.zeros((BP,), tl.int32)
        for start in range(0, select.end_of(row, WHOLE), BN):
            unit = start + tl.arange(0, BN)
            values = select.read(row, start, WHOLE)
            # some k units of a bad position, so that the list is written
            wins = tl.where(bad[:, None], (unit < k)[None, :], is_winner(values, unit, threshold, cut))
            y = activity.activities(
                values,
                unit[None, :],
                mark[:, None],
                cut[:, None],
                logsumexp[:, None],
                first[:, None],
                scale,
                ACTIVITY,
                SELECTS,
                ANTI,
            )
            rank = listed[:, None] + tl.cumsum(wins.to(tl.int32), 1) - 1
            slot = position[:, None] * k + rank
            named = tl.where(bad[:, None] & (rank == 0), -1, unit[None, :])
            tl.store(winner_unit_ptr + slot, named, mask=wins & here[:, None])
            tl.store(winner_activity_ptr + slot, y, mask=wins & here[:, None])
            listed += tl.sum(wins.to(tl.int32), 1)


def _compete(
    u: Responses,
    competition: Competition,
    y: Responses | None = None,
    keeps_infinity: bool = False,
    **outputs: Any,
) -> None:
    """Write y and those outputs of the kernel, tensors by name, that are given."""
    cut = max(u.inner, y.inner if y else 1)
    source, target = grid(u, cut if cut > 1 else 0), grid(y, cut if cut > 1 else 0) if y else None
    tile = tile_of(source, u.units, competition.winners, arch_of(u.tensor.device))
    tiles = triton.cdiv(source.inner, tile.positions)
    names = ("threshold", "cut", "logsumexp", "first", "winner_unit", "winner_activity")
    pointers: dict[str, Any] = {f"{name}_ptr": outputs.get(name) for name in names}
    launch(
        compete_kernel,
        source.items * tiles if u.tensor.numel() else 0,
        warps=tile.warps,
        registers=tile.registers,
        u_ptr=u.tensor,
        y_ptr=target.tensor if target else None,
        **pointers,
        inner=source.inner,
        tiles=tiles,
        units=u.units,
        k=competition.winners,
        **source.strides("u_"),
        **(target or source).strides("y_"),
        **activity.constants(competition),
        POISONS=not keeps_infinity,
        BP=tile.positions,
        BN=tile.units,
        WHOLE=tile.whole,
        GROUP=tile.group,
        STRIDED=tile.strided,
        SHIFT=_KEY_SHIFT[u.tensor.dtype],
    )


state = functools.partial(competition.state, _compete)
full_state = functools.partial(competition.full_state, _compete)
activities = functools.partial(competition.activities, _compete)
winner_lists = functools.partial(competition.winner_lists, _compete)
