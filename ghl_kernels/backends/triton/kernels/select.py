"""Exact selection of the k largest of a row without sorting, the device functions.

The k-th largest of the maxima of small groups is a lower bound of the k-th largest value, mostly a close one.
It is raised past distinct values until fewer than k are above. Where that takes too long, bisection on keys,
integers in the order of the values, ends it within the bits of a key.

``row`` is (tile, base, unit_stride, units, here) for BP rows at once. tile is [BP, BN] in float32. If WHOLE
it holds the rows, with -inf beyond the end; else it gives a shape only, and every pass reads the rows anew,
BN units at a time. base [BP] points to the rows, here [BP] says which are rows of u. What comes out for a
row with a NaN is not defined, and does no harm: every loop has a bound.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Real responses need 1 to 3; a bisection costs about as many passes as a key has bits.
RAISES = tl.constexpr(8)
# Bits of a float32 key that the bound does without: it is raised to a value anyway.
COARSE_SHIFT = tl.constexpr(13)

_SIGN = tl.constexpr(-(1 << 31))
_REST = tl.constexpr((1 << 31) - 1)


@triton.jit
def key_of(x, SHIFT: tl.constexpr):
    """Integers in the order of x (float32); -0.0 and 0.0 have the same.

    SHIFT drops low bits, those that are zero where x was widened from a 16-bit type.
    """
    bits = x.to(tl.int32, bitcast=True)
    sign = bits >> 31
    return (((bits & _REST) ^ sign) - sign) >> SHIFT


@triton.jit
def value_of(key, SHIFT: tl.constexpr):
    """The float32 of a key; of the zeros the positive one."""
    key = key << SHIFT
    sign = key >> 31
    return (((key ^ sign) - sign) | (sign & _SIGN)).to(tl.float32, bitcast=True)


@triton.jit
def load_units(base, unit_stride, start, units, here, BN: tl.constexpr):
    """u of BN units from start on, [BP, BN] in float32; -inf where there is none."""
    unit = start + tl.arange(0, BN)
    return tl.load(
        base[:, None] + unit.to(tl.int64)[None, :] * unit_stride,
        mask=here[:, None] & (unit < units)[None, :],
        other=float("-inf"),
    ).to(tl.float32)


@triton.jit
def read(row, start, WHOLE: tl.constexpr):
    """BN values of every row from start on."""
    tile, base, unit_stride, units, here = row
    return tile if WHOLE else load_units(base, unit_stride, start, units, here, tile.shape[1])


@triton.jit
def end_of(row, WHOLE: tl.constexpr):
    """Where a loop over the row by steps of BN ends; known when compiling if there is one step only."""
    return row[0].shape[1] if WHOLE else row[3]


@triton.jit
def grouped(x, GROUP: tl.constexpr, STRIDED: tl.constexpr):
    """x [BP, BN] as groups along dimension 1 (STRIDED) or 2, each in one thread or almost.

    Neighbours are in one thread where units are contiguous in memory, else units far apart are.
    """
    if STRIDED:
        groups = tl.reshape(x, (x.shape[0], GROUP, x.shape[1] // GROUP))
    else:
        groups = tl.reshape(x, (x.shape[0], x.shape[1] // GROUP, GROUP))
    return groups


@triton.jit
def smallest(x, GROUP: tl.constexpr, STRIDED: tl.constexpr, SHIFT: tl.constexpr):
    """Minimum of every row of x; across lanes in integers, where GPUs have one instruction for it."""
    if GROUP > 1:
        x = tl.min(grouped(x, GROUP, STRIDED), 1 if STRIDED else 2)
    return value_of(tl.min(key_of(x, SHIFT), 1), SHIFT)


@triton.jit
def above(values, bound, ORBOUND: tl.constexpr):
    """(1 where a value is above its row's bound, or at it if ORBOUND, else 0; the value there, else inf)."""
    passes = values >= bound[:, None] if ORBOUND else values > bound[:, None]
    return passes.to(tl.int32), tl.where(passes, values, float("inf"))


@triton.jit
def count_above(
    row,
    bound,
    ORBOUND: tl.constexpr,
    WHOLE: tl.constexpr,
    GROUP: tl.constexpr,
    STRIDED: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """(how many values of a row are above its bound, or at it if ORBOUND; the least of them)."""
    step: tl.constexpr = row[0].shape[1]
    hits, least = above(read(row, 0, WHOLE), bound, ORBOUND)
    for start in range(step, end_of(row, WHOLE), step):
        more, candidates = above(read(row, start, WHOLE), bound, ORBOUND)
        hits += more
        least = tl.minimum(least, candidates)
    return tl.sum(hits, 1), smallest(least, GROUP, STRIDED, SHIFT)


@triton.jit
def bisect(
    row, k, low, high, WHOLE: tl.constexpr, GROUP: tl.constexpr, STRIDED: tl.constexpr, SHIFT: tl.constexpr
):
    """k-th largest value of every row, of which is known that its key is in [low, high)."""
    # an interval of keys is shorter than 2^bits
    for _ in range(32 - SHIFT):
        if tl.max((low + 1 < high).to(tl.int32), 0) > 0:
            # the mean without overflow, rounded down
            middle = (low & high) + ((low ^ high) >> 1)
            count, least = count_above(row, value_of(middle, SHIFT), True, WHOLE, GROUP, STRIDED, SHIFT)
            low = tl.where(count < k, low, middle)
            high = tl.where(count < k, middle, tl.where(count == k, middle + 1, high))
    # low is the k-th value's, or exactly k values reach it
    count, least = count_above(row, value_of(low, SHIFT), True, WHOLE, GROUP, STRIDED, SHIFT)
    return least


@triton.jit
def maxima(row, WHOLE: tl.constexpr, GROUP: tl.constexpr, STRIDED: tl.constexpr):
    """(maxima of disjoint groups of units, the same but +inf for groups beyond the row's end)."""
    tile, units = row[0], row[3]
    if WHOLE:
        most = tl.max(grouped(tile, GROUP, STRIDED), 1 if STRIDED else 2)
        first = tl.arange(0, tile.shape[1] // GROUP) * (1 if STRIDED else GROUP)
        real = tl.where((first < units)[None, :], most, float("inf"))
    else:
        most = read(row, 0, WHOLE)
        for start in range(tile.shape[1], units, tile.shape[1]):
            most = tl.maximum(most, read(row, start, WHOLE))
        real = most
    return most, real


@triton.jit
def lower_bound(most, real, k, SHIFT: tl.constexpr):
    """A value of every row of ``most`` that k of its values reach: the k-th largest, or close below it."""
    COARSE: tl.constexpr = SHIFT if SHIFT > 0 else COARSE_SHIFT
    keys = key_of(most, COARSE)
    low = tl.min(key_of(real, COARSE), 1)
    span = tl.max(tl.max(keys, 1) - low, 0)
    # of the float: the integer's bit length
    bits = (span.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 126
    for bit in range(1, bits + 1):
        middle = low + (1 << (bits - bit))
        count = tl.sum((keys >= middle[:, None]).to(tl.int32), 1)
        low = tl.where(count < k, low, middle)
    reaches = tl.where(keys >= low[:, None], key_of(most, SHIFT), _REST)
    return value_of(tl.min(reaches, 1), SHIFT)


@triton.jit
def lowest_key(row, WHOLE: tl.constexpr, SHIFT: tl.constexpr):
    """Key of the least value of every row."""
    tile, units = row[0], row[3]
    least = tl.full(tile.shape, float("inf"), tl.float32)
    for start in range(0, end_of(row, WHOLE), tile.shape[1]):
        inside = (start + tl.arange(0, tile.shape[1]) < units)[None, :]
        least = tl.minimum(least, tl.where(inside, read(row, start, WHOLE), float("inf")))
    return tl.min(key_of(least, SHIFT), 1)


@triton.jit
def kth_largest(row, k, WHOLE: tl.constexpr, GROUP: tl.constexpr, STRIDED: tl.constexpr, SHIFT: tl.constexpr):
    """(k-th largest value of every row, how many values are above it), 1 <= k <= units.

    GROUP: units in a group of a whole row. 0 is for k too large a part of the row: there may then be
    fewer than k groups, and the values are bisected at once.
    """
    SPAN: tl.constexpr = GROUP if GROUP > 0 else 1
    most, real = maxima(row, WHOLE, SPAN, STRIDED)
    high = tl.max(key_of(most, SHIFT), 1) + 1
    if GROUP > 0:
        bound = lower_bound(most, real, k, SHIFT)
        count, following = count_above(row, bound, False, WHOLE, SPAN, STRIDED, SHIFT)
        for _ in range(RAISES):
            if tl.max(count, 0) >= k:
                bound = tl.where(count < k, bound, following)
                count, following = count_above(row, bound, False, WHOLE, SPAN, STRIDED, SHIFT)
        if tl.max(count, 0) >= k:
            low = key_of(bound, SHIFT)
            high = tl.where(count < k, low + 1, high)
            bound = bisect(row, k, low, high, WHOLE, SPAN, STRIDED, SHIFT)
            count, following = count_above(row, bound, False, WHOLE, SPAN, STRIDED, SHIFT)
    else:
        low = lowest_key(row, WHOLE, SHIFT)
        # all of them win: nothing to search for
        high = tl.where(k == row[3], low + 1, high)
        bound = bisect(row, k, low, high, WHOLE, SPAN, STRIDED, SHIFT)
        count, following = count_above(row, bound, False, WHOLE, SPAN, STRIDED, SHIFT)
    return bound, count


@triton.jit
def tie_cut(row, threshold, room, WHOLE: tl.constexpr):
    """Unit up to which values equal to the threshold win, such that ``room`` of them do, the first ones."""
    tile = row[0]
    unit = tl.arange(0, tile.shape[1])[None, :]
    ties = read(row, 0, WHOLE) == threshold[:, None]
    hits = ties.to(tl.int32)
    last = tl.where(ties, unit, -1)
    for start in range(tile.shape[1], end_of(row, WHOLE), tile.shape[1]):
        ties = read(row, start, WHOLE) == threshold[:, None]
        hits += ties.to(tl.int32)
        last = tl.where(ties, start + unit, last)
    cut = tl.max(last, 1)
    if tl.max(tl.sum(hits, 1) - room, 0) > 0:
        seen = tl.zeros_like(room)
        last = tl.full(tile.shape, -1, tl.int32)
        for start in range(0, end_of(row, WHOLE), tile.shape[1]):
            hits = (read(row, start, WHOLE) == threshold[:, None]).to(tl.int32)
            wins = (hits > 0) & (seen[:, None] + tl.cumsum(hits, 1) <= room[:, None])
            last = tl.where(wins, start + unit, last)
            seen += tl.sum(hits, 1)
        cut = tl.max(last, 1)
    return cut
