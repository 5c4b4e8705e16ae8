"""Exact selection of the k largest of a row without sorting, the device functions.

A row is cut into pieces, tiles of BN units. Units BN apart are a group, one of each piece. The k-th largest
of the groups' maxima is a lower bound of the k-th largest value, mostly a close one. It is raised past
distinct values until fewer than k are above, first among the two largest of every group, then among all.
Where that takes too long, bisection on keys, integers in the order of the values, ends it within the bits of
a key.

``row`` is (tiles, base, unit_stride, units, here) for BP rows at once. If WHOLE, tiles are the row's pieces,
[BP, BN] each, less than any value beyond the end. They hold float32, or int32 as :func:`distinct` makes them.
Else there is one, which gives a shape only: every pass reads the rows anew, BN units at a time. base [BP]
points to the rows, here [BP] says which are rows of u. There are at least BN units. What comes out for a row
with a NaN is not defined, and does no harm: every loop has a bound.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Real responses need 1 to 3; a bisection costs about as many passes as a key has bits.
RAISES = tl.constexpr(8)
# Bits of a key that the bound does without: it is raised to a value anyway. Among the others are all of a
# 16-bit value's.
COARSE_SHIFT = tl.constexpr(16)
# Groups' maxima, beyond k, that reach a bound which is taken as it is.
SURPLUS = tl.constexpr(4)

_COARSE_STEP = tl.constexpr(1 << 16)
_SIGN = tl.constexpr(-(1 << 31))
_REST = tl.constexpr((1 << 31) - 1)


@triton.jit
def key_of(x):
    """Integers in the order of x, float32; -0.0 and 0.0 have the same. Those of distinct() are keys."""
    if x.dtype == tl.int32:
        key = x
    else:
        bits = x.to(tl.int32, bitcast=True)
        sign = bits >> 31
        key = ((bits & _REST) ^ sign) - sign
    return key


@triton.jit
def value_of(key, like):
    """The value of a key in the type of ``like``; of the zeros the positive one."""
    if like.dtype == tl.int32:
        value = key
    else:
        sign = key >> 31
        value = (((key ^ sign) - sign) | (sign & _SIGN)).to(tl.float32, bitcast=True)
    return value


@triton.jit
def distinct(u, unit, UNIT_BITS: tl.constexpr):
    """u of 16 bits as int32 in the order of its values, of equals the first the largest: no two are equal.

    unit < 2^UNIT_BITS takes the upper ones of the lower 16 bits.
    """
    bits = u.to(tl.int16, bitcast=True).to(tl.int32) << 16
    sign = bits >> 31
    return (((bits & _REST) ^ sign) - sign) + (((1 << UNIT_BITS) - 1 - unit) << (16 - UNIT_BITS))


@triton.jit
def unit_of(key, UNIT_BITS: tl.constexpr):
    """The unit of what distinct() returns."""
    return (1 << UNIT_BITS) - 1 - ((key & 0xFFFF) >> (16 - UNIT_BITS))


@triton.jit
def float_of(key, dtype: tl.constexpr):
    """The value of what distinct() returns, in float32; of the zeros the positive one."""
    value = key >> 16
    sign = value >> 31
    bits = ((value ^ sign) - sign) | (sign & 0x8000)
    return bits.to(tl.int16).to(dtype, bitcast=True).to(tl.float32)


@triton.jit
def load_units(base, unit_stride, start, units, here, BN: tl.constexpr, EVEN: tl.constexpr):
    """u of BN units from start on, [BP, BN]; -inf where there is none. EVEN: all of them are units."""
    unit = start + tl.arange(0, BN)
    return tl.load(
        base[:, None] + unit.to(tl.int64)[None, :] * unit_stride,
        mask=here[:, None] if EVEN else here[:, None] & (unit < units)[None, :],
        other=float("-inf"),
    )


@triton.jit
def read(row, start):
    """BN values of every row from start on."""
    tiles, base, unit_stride, units, here = row
    return load_units(base, unit_stride, start, units, here, tiles[0].shape[1], False).to(tl.float32)


@triton.jit
def lowest(tile):
    """Less than any value of the tile's type."""
    return tl.full(tile.shape, _SIGN if tile.dtype == tl.int32 else float("-inf"), tile.dtype)


@triton.jit
def highest(tile):
    """No less than any value of the tile's type."""
    return tl.full(tile.shape, _REST if tile.dtype == tl.int32 else float("inf"), tile.dtype)


@triton.jit
def passing(values, bound, ORBOUND: tl.constexpr):
    """Which values are above their row's bound, or at it if ORBOUND."""
    return values >= bound[:, None] if ORBOUND else values > bound[:, None]


@triton.jit
def count_above(row, bound, ORBOUND: tl.constexpr, WHOLE: tl.constexpr):
    """How many values of a row are above its bound, or at it if ORBOUND."""
    tiles, units = row[0], row[3]
    step: tl.constexpr = tiles[0].shape[1]
    hits = tl.zeros(tiles[0].shape, tl.int32)
    if WHOLE:
        for piece in tl.static_range(len(tiles)):
            hits += passing(tiles[piece], bound, ORBOUND).to(tl.int32)
    else:
        for start in range(0, units, step):
            hits += passing(read(row, start), bound, ORBOUND).to(tl.int32)
    return tl.sum(hits, 1)


@triton.jit
def least_above(row, bound, ORBOUND: tl.constexpr, WHOLE: tl.constexpr):
    """The least value of a row above its bound, or at it if ORBOUND."""
    tiles, units = row[0], row[3]
    step: tl.constexpr = tiles[0].shape[1]
    most = highest(tiles[0])
    if WHOLE:
        least = tl.where(passing(tiles[0], bound, ORBOUND), tiles[0], most)
        for piece in tl.static_range(1, len(tiles)):
            least = tl.minimum(least, tl.where(passing(tiles[piece], bound, ORBOUND), tiles[piece], most))
    else:
        least = most
        for start in range(0, units, step):
            values = read(row, start)
            least = tl.minimum(least, tl.where(passing(values, bound, ORBOUND), values, most))
    # across lanes in integers, where GPUs have one instruction for it
    return value_of(tl.min(key_of(least), 1), least)


@triton.jit
def bisect(row, k, low, high, WHOLE: tl.constexpr):
    """k-th largest value of every row, of which is known that its key is in [low, high)."""
    # an interval of keys is shorter than 2^32
    for _ in range(32):
        if tl.max((low + 1 < high).to(tl.int32), 0) > 0:
            # the mean without overflow, rounded down
            middle = (low & high) + ((low ^ high) >> 1)
            count = count_above(row, value_of(middle, row[0][0]), True, WHOLE)
            low = tl.where(count < k, low, middle)
            high = tl.where(count < k, middle, tl.where(count == k, middle + 1, high))
    # low is the k-th value's, or exactly k values reach it
    return least_above(row, value_of(low, row[0][0]), True, WHOLE)


@triton.jit
def largest_two(row, WHOLE: tl.constexpr):
    """The largest and the second largest value of every group."""
    tiles, units = row[0], row[3]
    step: tl.constexpr = tiles[0].shape[1]
    if WHOLE:
        most = tiles[0]
        second = lowest(tiles[0])
        if len(tiles) > 1:
            most = tl.maximum(tiles[0], tiles[1])
            second = tl.minimum(tiles[0], tiles[1])
        # in pairs: four comparisons for two values
        for pair in tl.static_range(1, len(tiles) // 2):
            more = tl.maximum(tiles[2 * pair], tiles[2 * pair + 1])
            less = tl.minimum(tiles[2 * pair], tiles[2 * pair + 1])
            second = tl.maximum(tl.maximum(second, less), tl.minimum(most, more))
            most = tl.maximum(most, more)
        if len(tiles) % 2 == 1 and len(tiles) > 1:
            second = tl.maximum(second, tl.minimum(most, tiles[len(tiles) - 1]))
            most = tl.maximum(most, tiles[len(tiles) - 1])
    else:
        most, second = lowest(tiles[0]), lowest(tiles[0])
        for start in range(0, units, step):
            values = read(row, start)
            second = tl.maximum(second, tl.minimum(most, values))
            most = tl.maximum(most, values)
    return most, second


@triton.jit
def lower_bound(most, k):
    """A value of every row of ``most`` that k of its values reach: the k-th largest, or close below it."""
    keys = key_of(most)
    coarse = keys >> COARSE_SHIFT
    low = tl.min(coarse, 1)
    span = tl.max(tl.max(coarse, 1) - low, 0)
    # of the float: the integer's bit length
    bits = (span.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 126
    reach = tl.zeros_like(low) + most.shape[1]
    for bit in range(1, bits + 1):
        middle = low + (1 << (bits - bit))
        count = tl.sum((coarse >= middle[:, None]).to(tl.int32), 1)
        low = tl.where(count < k, low, middle)
        reach = tl.where(count < k, reach, count)
    low = low << COARSE_SHIFT
    if tl.max(reach, 0) > k + SURPLUS:
        for bit in range(1, COARSE_SHIFT + 1):
            middle = low + (_COARSE_STEP >> bit)
            low = tl.where(tl.sum((keys >= middle[:, None]).to(tl.int32), 1) < k, low, middle)
    return value_of(tl.min(tl.where(keys >= low[:, None], keys, _REST), 1), most)


@triton.jit
def raised(row, bound, k, WHOLE: tl.constexpr):
    """(bound raised past distinct values until fewer than k are above, or RAISES times, how many are)."""
    count = count_above(row, bound, False, WHOLE)
    turn = 0
    while (turn < RAISES) & (tl.max(count, 0) >= k):
        bound = tl.where(count < k, bound, least_above(row, bound, False, WHOLE))
        count = count_above(row, bound, False, WHOLE)
        turn += 1
    return bound, count


@triton.jit
def kth_largest(row, k, WHOLE: tl.constexpr, BOUNDED: tl.constexpr):
    """(k-th largest value of every row, how many values are above it), 1 <= k <= units.

    BOUNDED: k is at most BN. Otherwise there are fewer than k groups, and the values are bisected at once.
    """
    most, second = largest_two(row, WHOLE)
    high = tl.max(key_of(most), 1) + 1
    if BOUNDED:
        bound = lower_bound(most, k)
        if not WHOLE or len(row[0]) > 2:
            bound, count = raised(((most, second), row[1], row[2], row[3], row[4]), bound, k, True)
        count = count_above(row, bound, False, WHOLE)
        if tl.max(count, 0) >= k:
            bound, count = raised(row, bound, k, WHOLE)
            if tl.max(count, 0) >= k:
                low = key_of(bound)
                bound = bisect(row, k, low, tl.where(count < k, low + 1, high), WHOLE)
                count = count_above(row, bound, False, WHOLE)
    else:
        low = tl.min(key_of(most), 1)
        if WHOLE:
            for piece in tl.static_range(len(row[0])):
                inside = (tl.arange(0, most.shape[1]) + piece * most.shape[1] < row[3])[None, :]
                low = tl.minimum(low, tl.min(tl.where(inside, key_of(row[0][piece]), _REST), 1))
        else:
            least = highest(most)
            for start in range(0, row[3], most.shape[1]):
                inside = (start + tl.arange(0, most.shape[1]) < row[3])[None, :]
                least = tl.minimum(least, tl.where(inside, read(row, start), highest(most)))
            low = tl.min(key_of(least), 1)
        # all of them win: nothing to search for
        high = tl.where(k == row[3], low + 1, high)
        bound = bisect(row, k, low, high, WHOLE)
        count = count_above(row, bound, False, WHOLE)
    return bound, count


@triton.jit
def tie_cut(row, threshold, room, WHOLE: tl.constexpr):
    """Unit up to which values equal to the threshold win, such that ``room`` of them do, the first ones."""
    tiles, units = row[0], row[3]
    step: tl.constexpr = tiles[0].shape[1]
    unit = tl.arange(0, step)[None, :]
    hits = tl.zeros(tiles[0].shape, tl.int32)
    last = tl.full(tiles[0].shape, -1, tl.int32)
    if WHOLE:
        for piece in tl.static_range(len(tiles)):
            ties = tiles[piece] == threshold[:, None]
            hits += ties.to(tl.int32)
            last = tl.where(ties, unit + piece * step, last)
    else:
        for start in range(0, units, step):
            ties = read(row, start) == threshold[:, None]
            hits += ties.to(tl.int32)
            last = tl.where(ties, start + unit, last)
    cut = tl.max(last, 1)
    if tl.max(tl.sum(hits, 1) - room, 0) > 0:
        seen = tl.zeros_like(room)
        last = tl.full(tiles[0].shape, -1, tl.int32)
        if WHOLE:
            for piece in tl.static_range(len(tiles)):
                hits = (tiles[piece] == threshold[:, None]).to(tl.int32)
                wins = (hits > 0) & (seen[:, None] + tl.cumsum(hits, 1) <= room[:, None])
                last = tl.where(wins, unit + piece * step, last)
                seen += tl.sum(hits, 1)
        else:
            for start in range(0, units, step):
                hits = (read(row, start) == threshold[:, None]).to(tl.int32)
                wins = (hits > 0) & (seen[:, None] + tl.cumsum(hits, 1) <= room[:, None])
                last = tl.where(wins, start + unit, last)
                seen += tl.sum(hits, 1)
        cut = tl.max(last, 1)
    return cut
