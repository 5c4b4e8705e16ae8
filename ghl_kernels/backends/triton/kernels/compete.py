"""The competition: its state, the activities, and the winners' lists.

One kernel reads u and writes whichever of these is asked for. Its tiles are [positions, units], with lanes
along whichever of the two is contiguous in memory, so that rows, channels_last and NCHW need no copy.
"""

from __future__ import annotations

import functools
from typing import Any

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


@triton.jit
def has_nan(row, loaded, WHOLE: tl.constexpr):
    """Whether any value of a row is NaN."""
    tile = row[0][0]
    bad = tl.zeros(tile.shape, tl.int1)
    if WHOLE:
        for piece in tl.static_range(len(loaded)):
            bad |= loaded[piece] != loaded[piece]
    else:
        for start in range(0, row[3], tile.shape[1]):
            u = select.read(row, start)
            bad |= u != u
    return tl.max(bad.to(tl.int32), 1) > 0


@triton.jit
def is_winner(u, unit, threshold, cut):
    """The k largest of a row, of equals the first."""
    return (u > threshold[:, None]) | ((u == threshold[:, None]) & (unit[None, :] <= cut[:, None]))


@triton.jit
def wins_of(values, unit, kth, cut, SELECTS: tl.constexpr):
    """Which values of a row's tile win; kth: the k-th largest of them."""
    if not SELECTS:
        wins = values == values
    elif values.dtype == tl.int32:
        wins = values >= kth[:, None]
    else:
        wins = is_winner(values, unit, kth, cut)
    return wins


@triton.jit
def logsumexp_of(
    row, loaded, kth, cut, scale, SELECTS: tl.constexpr, WHOLE: tl.constexpr, UNIT_BITS: tl.constexpr
):
    """logsumexp of u / temperature over the winners, or over all."""
    tile = row[0][0]
    step: tl.constexpr = tile.shape[1]
    total = tl.zeros((tile.shape[0],), tl.float32)
    shift = tl.zeros((tile.shape[0],), tl.float32)
    if WHOLE:
        # the largest value wins
        largest = tl.max(select.largest_two(row, WHOLE)[0], 1)
        if UNIT_BITS > 0:
            largest = select.float_of(largest, loaded[0].dtype)
        top = largest * scale
        # a difference of infinities is NaN
        shift = tl.where(tl.abs(top) < float("inf"), top, 0.0)
        terms = tl.zeros(tile.shape, tl.float32)
        for piece in tl.static_range(len(loaded)):
            term = tl.exp2((loaded[piece].to(tl.float32) * scale - shift[:, None]) * activity.LOG2E)
            wins = wins_of(row[0][piece], tl.arange(0, step) + piece * step, kth, cut, SELECTS)
            terms += tl.where(wins, term, 0.0) if SELECTS else term
        total = tl.sum(terms, 1)
    else:
        top = tl.full((tile.shape[0],), float("-inf"), tl.float32)
        for start in range(0, row[3], step):
            u = select.read(row, start)
            if SELECTS:
                u = tl.where(is_winner(u, start + tl.arange(0, step), kth, cut), u, float("-inf"))
            previous, top = top, tl.maximum(top, tl.max(u * scale, 1))
            shift = tl.where(tl.abs(top) < float("inf"), top, 0.0)
            total *= tl.exp2((previous - shift) * activity.LOG2E)
            total += tl.sum(tl.exp2((u * scale - shift[:, None]) * activity.LOG2E), 1)
    return shift + tl.log2(total) / activity.LOG2E


@triton.jit
def first_largest(row, WHOLE: tl.constexpr, UNIT_BITS: tl.constexpr):
    """Unit of the largest value of every row, the first of equals."""
    tile = row[0][0]
    step: tl.constexpr = tile.shape[1]
    largest = tl.max(select.largest_two(row, WHOLE)[0], 1)
    if UNIT_BITS > 0:
        first = select.unit_of(largest, UNIT_BITS)
    else:
        none = 2**31 - 1
        units = tl.full(tile.shape, none, tl.int32)
        if WHOLE:
            for piece in tl.static_range(len(row[0])):
                unit = tl.arange(0, step) + piece * step
                units = tl.minimum(units, tl.where(row[0][piece] == largest[:, None], unit[None, :], none))
        else:
            for start in range(0, row[3], step):
                unit = start + tl.arange(0, step)
                is_largest = select.read(row, start) == largest[:, None]
                units = tl.minimum(units, tl.where(is_largest, unit[None, :], none))
        first = tl.min(units, 1)
    return first


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
    PIECES: tl.constexpr,
    WHOLE: tl.constexpr,
    EVEN: tl.constexpr,
    BOUNDED: tl.constexpr,
    UNIT_BITS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Every output that has a pointer, for BP positions of one batch item.

    inner: positions of an item, tiles: tiles of an item, scale: 1 / temperature. POISONS: an infinite
    logsumexp becomes NaN, which is what a softmax makes of +inf. UNIT_BITS: of select.distinct, 0 without.
    VECTOR: positions that a lane holds beside each other, in planes.
    """
    item = (tl.program_id(0) // tiles).to(tl.int64)
    within = (tl.program_id(0) % tiles).to(tl.int64) * BP + tl.arange(0, BP)
    here = within < inner
    position = item * inner + within
    # in planes, lanes beside each other along positions: most of a reduction over units is then within a lane
    base = u_ptr + item * u_batch_stride + tl.max_contiguous(within, VECTOR) * u_position_stride
    loaded = ()  # type: Any
    pieces = ()  # type: Any
    if WHOLE:
        for piece in tl.static_range(PIECES):
            u = select.load_units(base, u_unit_stride, piece * BN, units, here, BN, EVEN)
            loaded += (u,)
            if UNIT_BITS > 0:
                unit = piece * BN + tl.arange(0, BN)
                values = select.distinct(u, unit[None, :], UNIT_BITS)
                values = values if EVEN else tl.where((unit < units)[None, :], values, select.lowest(values))
            else:
                values = u.to(tl.float32)
            pieces += (values,)
    else:
        pieces = (tl.full((BP, BN), float("-inf"), tl.float32),)
    row = (pieces, base, u_unit_stride, units, here)

    kth = tl.zeros((BP,), pieces[0].dtype)
    threshold = tl.zeros((BP,), tl.float32)
    cut = tl.zeros((BP,), tl.int32)
    bad = here & False
    if SELECTS or ACTIVITY != "softmax":
        bad = has_nan(row, loaded, WHOLE)
    if SELECTS:
        kth, above = select.kth_largest(row, k, WHOLE, BOUNDED)
        if UNIT_BITS > 0:
            threshold, cut = select.float_of(kth, u_ptr.dtype.element_ty), select.unit_of(kth, UNIT_BITS)
        else:
            threshold, cut = kth, select.tie_cut(row, kth, k - above, WHOLE)
        # no value reaches it: none wins
        kth = tl.where(bad, 2**31 - 1 if UNIT_BITS > 0 else float("nan"), kth)
    logsumexp = tl.zeros((BP,), tl.float32)
    if ACTIVITY == "softmax":
        logsumexp = logsumexp_of(row, loaded, kth, cut, scale, SELECTS, WHOLE, UNIT_BITS)
        logsumexp = tl.where(bad | (POISONS & (logsumexp == float("inf"))), float("nan"), logsumexp)
    first = tl.zeros((BP,), tl.int32)
    if ANTI:
        first = first_largest(row, WHOLE, UNIT_BITS)
    mark = tl.where(bad, float("nan"), threshold)

    if threshold_ptr is not None:
        tl.store(threshold_ptr + position, mark, mask=here)
    if cut_ptr is not None:
        tl.store(cut_ptr + position, tl.where(bad, -1, cut), mask=here)
    if logsumexp_ptr is not None:
        tl.store(logsumexp_ptr + position, logsumexp, mask=here)
    if first_ptr is not None:
        tl.store(first_ptr + position, first, mask=here)
    state = (bad, kth, cut, logsumexp, first, scale)
    if y_ptr is not None:
        y_base = y_ptr + item * y_batch_stride + tl.max_contiguous(within, VECTOR) * y_position_stride
        if WHOLE:
            for piece in tl.static_range(PIECES):
                unit = piece * BN + tl.arange(0, BN)
                y, _ = outputs_of(loaded[piece], pieces[piece], unit, state, ACTIVITY, SELECTS, ANTI)
                store_units(y_base, y_unit_stride, unit, units, here, y, EVEN)
        else:
            for start in range(0, units, BN):
                unit = start + tl.arange(0, BN)
                values = select.read(row, start)
                y, _ = outputs_of(values, values, unit, state, ACTIVITY, SELECTS, ANTI)
                store_units(y_base, y_unit_stride, unit, units, here, y, False)
    if winner_unit_ptr is not None:
        unit_base, activity_base = winner_unit_ptr + position * k, winner_activity_ptr + position * k
        rank = tl.zeros((BP,), tl.int32)
        if WHOLE:
            for piece in tl.static_range(PIECES):
                unit = piece * BN + tl.arange(0, BN)
                y, wins = outputs_of(loaded[piece], pieces[piece], unit, state, ACTIVITY, SELECTS, ANTI)
                rank = list_winners(unit_base, activity_base, rank, unit, y, wins, bad, here, k)
        else:
            for start in range(0, units, BN):
                unit = start + tl.arange(0, BN)
                values = select.read(row, start)
                y, wins = outputs_of(values, values, unit, state, ACTIVITY, SELECTS, ANTI)
                rank = list_winners(unit_base, activity_base, rank, unit, y, wins, bad, here, k)


@triton.jit
def outputs_of(u, values, unit, state, ACTIVITY: tl.constexpr, SELECTS: tl.constexpr, ANTI: tl.constexpr):
    """(y, which units win) of a tile of u, ``values`` those that are compared; of a bad row NaN, and none."""
    bad, kth, cut, logsumexp, first, scale = state
    wins = wins_of(values, unit, kth, cut, SELECTS)
    lost = tl.where(bad, float("nan"), 0.0)[:, None]
    y = activity.activity_of(
        u.to(tl.float32),
        unit[None, :],
        wins,
        lost,
        logsumexp[:, None],
        first[:, None],
        scale,
        ACTIVITY,
        SELECTS,
        ANTI,
    )
    if not SELECTS and ACTIVITY != "softmax":
        y = tl.where(bad[:, None], float("nan"), y)
    return y, wins


@triton.jit
def store_units(base, unit_stride, unit, units, here, y, EVEN: tl.constexpr):
    """Stores y [BP, BN] of some units."""
    tl.store(
        base[:, None] + unit.to(tl.int64)[None, :] * unit_stride,
        y.to(base.dtype.element_ty),
        mask=here[:, None] if EVEN else here[:, None] & (unit < units)[None, :],
    )


@triton.jit
def list_winners(unit_base, activity_base, rank, unit, y, wins, bad, here, k):
    """Stores the winners among some units behind ``rank`` [BP] others; returns how many there are then."""
    # some k units of a bad position, so that the list is written
    listed = (tl.where(bad[:, None], (unit < k)[None, :], wins) & here[:, None]).to(tl.int32)
    slot = tl.cumsum(listed, 1) + (rank - 1)[:, None]
    named = tl.where(bad[:, None] & (unit == 0)[None, :], -1, unit[None, :])
    tl.store(unit_base[:, None] + slot, named, mask=listed > 0)
    tl.store(activity_base[:, None] + slot, y, mask=listed > 0)
    return rank + tl.sum(listed, 1)


def _compete(
    u: Responses,
    competition: Competition,
    y: Responses | None = None,
    keeps_infinity: bool = False,
    **outputs: Any,
) -> None:
    """Write y and those outputs of the kernel, tensors by name, that are given."""
    if not u.tensor.numel():
        return
    cut = max(u.inner, y.inner if y else 1)
    source, target = grid(u, cut if cut > 1 else 0), grid(y, cut if cut > 1 else 0) if y else None
    tile = tile_of(
        source,
        u.units,
        competition.winners,
        arch_of(u.tensor.device),
        lists=outputs.get("winner_unit") is not None,
    )
    tiles = triton.cdiv(source.inner, tile.positions)
    names = ("threshold", "cut", "logsumexp", "first", "winner_unit", "winner_activity")
    pointers: dict[str, Any] = {f"{name}_ptr": outputs.get(name) for name in names}
    launch(
        compete_kernel,
        source.items * tiles,
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
        PIECES=tile.pieces,
        WHOLE=tile.whole,
        EVEN=tile.whole and tile.units * tile.pieces == u.units,
        BOUNDED=tile.bounded,
        UNIT_BITS=tile.unit_bits,
        VECTOR=tile.vector,
    )


state = functools.partial(competition.state, _compete)
full_state = functools.partial(competition.full_state, _compete)
activities = functools.partial(competition.activities, _compete)
winner_lists = functools.partial(competition.winner_lists, _compete)
