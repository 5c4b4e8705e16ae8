"""From the sums to the weights: decay, norm, then store, gate or learn, for many layers in two launches.

The first launch leaves, for every row of every W, the factor of W in the decay (Oja's dot) and the largest
|H|; the second one applies them. Both find their layer in a table on the device, so that the number of
launches does not depend on the number of layers.
"""

from __future__ import annotations

import array
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ghl_kernels import _tape
from ghl_kernels.backends import eager
from ghl_kernels.backends.gpu.jobs import Job, run
from ghl_kernels.backends.gpu.memory import workspace
from ghl_kernels.backends.triton.launch import current, launch

# (rows, columns) that a program holds at a time; longer rows go in pieces. A tile of a single row does not
# compile for AMD GPUs.
NARROW_ROWS, NARROW_COLUMNS = 4, 128
WIDE_ROWS, WIDE_COLUMNS = 2, 256
# Programs of one layer: enough for every multiprocessor, few enough for one load of all their maxima.
MAX_BLOCKS = 1024
# What a table is searched with is padded to a power of two, and at least this: one kernel for most networks.
LEAST_JOBS = 64
# (elements of a program, splits that it loads at a time) of a sum. Results of many splits are small: an H100
# took 21 us for 7200 elements in 8 programs.
SUM_OF_FEW, SUM_OF_MANY = (1024, 1), (128, 16)
MANY_SPLITS = 8
_WARPS = 4
_VECTOR = tl.constexpr(8)  # elements; 16 bytes of the narrowest dtype
_TABLES = 512  # an allocator gives the same addresses again, if not every step; a new table is one more copy

_EPS = tl.constexpr(eager.EPS)
_INFINITY_BITS = tl.constexpr(0x7F800000)
_NONE, _OJA, _INSTAR = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_MEAN, _FILTER, _LAYER = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
_NARROW, _WIDE, _WIDE_ALIGNED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
_DECAYS = {"none": _NONE.value, "oja": _OJA.value, "instar": _INSTAR.value}
_NORMS = {"none": _NONE.value, "mean": _MEAN.value, "filter": _FILTER.value, "layer": _LAYER.value}
_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Fields(NamedTuple):
    """One layer as the table on the device holds it; strides in elements, from row to row."""

    A: int
    A_stride: int
    weight: int
    weight_stride: int
    out: int
    out_stride: int
    grad: int
    grad_stride: int
    row_decay: int  # address of the moments that multiply the rows of W (instar)
    positions: int  # address of their number
    rows: int
    columns: int
    rows_per_block: int
    blocks: int
    first_row: int  # of this layer in the workspace
    tile: int
    decay: int
    normalize: int


def _field(name: str) -> tl.constexpr:
    return tl.constexpr(Fields._fields.index(name))


_FIELDS = tl.constexpr(len(Fields._fields))
# an address, then its stride
_A, _WEIGHT, _OUT, _GRAD = _field("A"), _field("weight"), _field("out"), _field("grad")
_ROW_DECAY, _POSITIONS = _field("row_decay"), _field("positions")
_ROWS, _COLUMNS, _ROWS_PER_BLOCK = _field("rows"), _field("columns"), _field("rows_per_block")
_BLOCKS, _FIRST_ROW, _TILE = _field("blocks"), _field("first_row"), _field("tile")
_DECAY, _NORMALIZE = _field("decay"), _field("normalize")


@triton.jit(
    do_not_specialize=[
        *("A_stride", "weight_stride", "out_stride", "grad_stride", "last_moment"),
        *("rows", "columns", "rows_per_block", "programs", "tile", "decay", "normalize"),
    ]
)
def describe_kernel(
    table,
    A,
    A_stride,
    weight,
    weight_stride,
    out,
    out_stride,
    grad,
    grad_stride,
    moments,
    last_moment,
    rows,
    columns,
    rows_per_block,
    programs,
    tile,
    decay,
    normalize,
):
    """The table of a single layer, whose addresses the host need not know."""
    tl.store(table, 0)
    job = table + 1
    tl.store(job + _A, A.to(tl.int64))
    tl.store(job + _A + 1, A_stride)
    tl.store(job + _WEIGHT, weight.to(tl.int64))
    tl.store(job + _WEIGHT + 1, weight_stride)
    tl.store(job + _OUT, out.to(tl.int64))
    tl.store(job + _OUT + 1, out_stride)
    tl.store(job + _GRAD, grad.to(tl.int64))
    tl.store(job + _GRAD + 1, grad_stride)
    tl.store(job + _ROW_DECAY, moments.to(tl.int64))
    tl.store(job + _POSITIONS, (moments + last_moment).to(tl.int64))
    tl.store(job + _ROWS, rows)
    tl.store(job + _COLUMNS, columns)
    tl.store(job + _ROWS_PER_BLOCK, rows_per_block)
    tl.store(job + _BLOCKS, programs)
    tl.store(job + _FIRST_ROW, 0)
    tl.store(job + _TILE, tile)
    tl.store(job + _DECAY, decay)
    tl.store(job + _NORMALIZE, normalize)


@triton.jit
def _find_job(table, jobs, program, JOBS: tl.constexpr):
    """(where the fields of this program's layer lie, which of the layer's blocks it is)."""
    program = program.to(tl.int64)
    index = tl.arange(0, JOBS)
    first = tl.load(table + index, mask=index < jobs, other=0x7FFFFFFFFFFFFFFF)
    begun = first <= program
    job = tl.sum(begun.to(tl.int32), 0) - 1
    block = program - tl.max(tl.where(begun, first, 0), 0)
    return table + jobs + job * _FIELDS, block.to(tl.int32)


@triton.jit
def _matrix(job, FIELD: tl.constexpr, DTYPE: tl.constexpr, VECTOR: tl.constexpr):
    """(pointer, row stride); both lose what is known of their alignment on the way through the table."""
    pointer = tl.load(job + FIELD).to(tl.pointer_type(DTYPE))
    stride = tl.load(job + FIELD + 1)
    if VECTOR > 1:
        pointer = tl.multiple_of(pointer, 16)
        stride = tl.multiple_of(stride, VECTOR)
    return pointer, stride


@triton.jit
def _small(job, FIELD: tl.constexpr):
    """A field of 31 bits: a count of rows or columns, or a code. Only offsets need 64."""
    return tl.load(job + FIELD).to(tl.int32)


@triton.jit
def _rows_of(job, block, VECTOR: tl.constexpr):
    """(first row, end of the rows, columns) of a block."""
    rows_per_block = _small(job, _ROWS_PER_BLOCK)
    # not by _small: what is known of the result of a call is lost when that is inlined
    columns = tl.load(job + _COLUMNS).to(tl.int32)
    if VECTOR > 1:
        columns = tl.multiple_of(columns, VECTOR)
    begin = block * rows_per_block
    return begin, tl.minimum(begin + rows_per_block, _small(job, _ROWS)), columns


@triton.jit
def _magnitude(h):
    """|h| as an integer of the same order, in which NaN is the largest: maxima of it cannot lose a NaN."""
    return h.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _update(a, w, factor, decays):
    """H before the norm; one rounding, the same in both launches. W is not looked at without decay."""
    return tl.where(decays, tl.fma(-factor, w, a), a)


@triton.jit
def _row_factors(
    job, A, A_row, W, W_row, row, inside, columns, decay, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """What W's rows are multiplied by in the decay."""
    factor = tl.zeros((ROWS,), tl.float32)
    if decay == _OJA:
        dot = tl.zeros((ROWS, COLUMNS), tl.float32)
        for start in range(0, columns, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            mask = inside[:, None] & (column < columns)[None, :]
            a = tl.load(A + A_row[:, None] + column[None, :], mask=mask, other=0.0)
            w = tl.load(W + W_row[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
            dot += a * w
        factor = tl.sum(dot, 1)
    elif decay == _INSTAR:
        moments = tl.load(job + _ROW_DECAY).to(tl.pointer_type(tl.float32))
        factor = tl.load(moments + row, mask=inside, other=0.0)
    return factor


@triton.jit
def _reduce_rows(
    job,
    block,
    factors,
    maxima,
    WEIGHT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    A, A_stride = _matrix(job, _A, tl.float32, VECTOR)
    W, W_stride = _matrix(job, _WEIGHT, WEIGHT, VECTOR)
    begin, end, columns = _rows_of(job, block, VECTOR)
    decay, normalize, first = _small(job, _DECAY), _small(job, _NORMALIZE), tl.load(job + _FIRST_ROW)
    decays = decay != _NONE
    block_maximum = tl.zeros((ROWS,), tl.int32)
    for start_row in range(begin, end, ROWS):
        row = start_row + tl.arange(0, ROWS)
        inside = row < end
        A_row, W_row = row.to(tl.int64) * A_stride, row.to(tl.int64) * W_stride
        factor = _row_factors(job, A, A_row, W, W_row, row, inside, columns, decay, ROWS, COLUMNS)
        tl.store(factors + first + row, factor, mask=inside)
        if normalize >= _FILTER:
            largest = tl.zeros((ROWS, COLUMNS), tl.int32)
            for start in range(0, columns, COLUMNS):
                column = start + tl.arange(0, COLUMNS)
                mask = inside[:, None] & (column < columns)[None, :]
                a = tl.load(A + A_row[:, None] + column[None, :], mask=mask, other=0.0)
                w = tl.load(W + W_row[:, None] + column[None, :], mask=mask & decays, other=0.0)
                h = _update(a, w.to(tl.float32), factor[:, None], decays)
                largest = tl.maximum(largest, _magnitude(h))
            row_maximum = tl.max(largest, 1)
            if normalize == _FILTER:
                tl.store(maxima + first + row, row_maximum.to(tl.float32, bitcast=True), mask=inside)
            block_maximum = tl.maximum(block_maximum, row_maximum)
    if normalize == _LAYER:
        tl.store(maxima + first + block, tl.max(block_maximum, 0).to(tl.float32, bitcast=True))


@triton.jit
def reduce_kernel(
    table,
    jobs,
    factors,
    maxima,
    WEIGHT: tl.constexpr,
    JOBS: tl.constexpr,
    NARROW_ROWS: tl.constexpr,
    NARROW_COLUMNS: tl.constexpr,
    WIDE_ROWS: tl.constexpr,
    WIDE_COLUMNS: tl.constexpr,
):
    """factors: per row of W. maxima: of |H|, per row for the norm of filters, per block for a layer's."""
    # From the last row to the first: the end of A, which was written last, is still in L2. The other launch
    # goes back the same way.
    job, block = _find_job(table, jobs, tl.num_programs(0) - 1 - tl.program_id(0), JOBS)
    tile = _small(job, _TILE)
    if tile == _NARROW:
        _reduce_rows(job, block, factors, maxima, WEIGHT, NARROW_ROWS, NARROW_COLUMNS, 1)
    elif tile == _WIDE:
        _reduce_rows(job, block, factors, maxima, WEIGHT, WIDE_ROWS, WIDE_COLUMNS, 1)
    else:
        _reduce_rows(job, block, factors, maxima, WEIGHT, WIDE_ROWS, WIDE_COLUMNS, _VECTOR)


@triton.jit
def _finite_scale(bits):
    """The divisor for a maximum; NaN where that is not finite, so that its whole scope becomes NaN."""
    return tl.where(bits < _INFINITY_BITS, bits.to(tl.float32, bitcast=True) + _EPS, float("nan"))


@triton.jit
def _scope_divisor(job, maxima, first, normalize, MAX_BLOCKS: tl.constexpr):
    """What all rows of a layer are divided by."""
    divisor = 1.0
    if normalize == _LAYER:
        block = tl.arange(0, MAX_BLOCKS)
        bits = tl.load(maxima + first + block, mask=block < _small(job, _BLOCKS), other=0.0)
        divisor = _finite_scale(tl.max(bits.to(tl.int32, bitcast=True), 0))
    elif normalize == _MEAN:
        divisor = tl.maximum(tl.load(tl.load(job + _POSITIONS).to(tl.pointer_type(tl.float32))), 1.0)
    return divisor


@triton.jit
def _apply_rows(
    job,
    block,
    factors,
    maxima,
    rate,
    OPERATION: tl.constexpr,
    WEIGHT: tl.constexpr,
    OUT: tl.constexpr,
    GRAD: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    VECTOR: tl.constexpr,
    MAX_BLOCKS: tl.constexpr,
):
    A, A_stride = _matrix(job, _A, tl.float32, VECTOR)
    W, W_stride = _matrix(job, _WEIGHT, WEIGHT, VECTOR)
    out, out_stride = _matrix(job, _OUT, OUT, VECTOR)
    grad, grad_stride = _matrix(job, _GRAD, GRAD, VECTOR)
    begin, end, columns = _rows_of(job, block, VECTOR)
    normalize, first = _small(job, _NORMALIZE), tl.load(job + _FIRST_ROW)
    decays = _small(job, _DECAY) != _NONE
    scope = _scope_divisor(job, maxima, first, normalize, MAX_BLOCKS)
    for start_row in range(begin, end, ROWS):
        row = start_row + tl.arange(0, ROWS)
        inside = row < end
        wide_row = row.to(tl.int64)
        A_row, W_row, out_row = wide_row * A_stride, wide_row * W_stride, wide_row * out_stride
        grad_row = wide_row * grad_stride
        factor = tl.load(factors + first + row, mask=inside, other=0.0)
        divisor = scope + tl.zeros((ROWS,), tl.float32)
        if normalize == _FILTER:
            bits = tl.load(maxima + first + row, mask=inside, other=0.0).to(tl.int32, bitcast=True)
            divisor = _finite_scale(bits)
        for start in range(0, columns, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            mask = inside[:, None] & (column < columns)[None, :]
            a = tl.load(A + A_row[:, None] + column[None, :], mask=mask, other=0.0)
            w_mask = mask
            if OPERATION != "learn":
                w_mask = mask & decays
            w = tl.load(W + W_row[:, None] + column[None, :], mask=w_mask, other=0.0).to(tl.float32)
            h = _update(a, w, factor[:, None], decays)
            h = tl.div_rn(h, divisor[:, None])
            if OPERATION == "gate":
                g = tl.load(grad + grad_row[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
                sign = tl.where(g > 0.0, 1.0, tl.where(g < 0.0, -1.0, 0.0))
                h = tl.where(tl.abs(g) < float("inf"), tl.abs(h) * sign, float("nan"))
            elif OPERATION == "learn":
                h = w + rate * h
            tl.store(out + out_row[:, None] + column[None, :], h.to(OUT), mask=mask)


@triton.jit
def apply_kernel(
    table,
    jobs,
    factors,
    maxima,
    rate,
    OPERATION: tl.constexpr,
    WEIGHT: tl.constexpr,
    OUT: tl.constexpr,
    GRAD: tl.constexpr,
    JOBS: tl.constexpr,
    NARROW_ROWS: tl.constexpr,
    NARROW_COLUMNS: tl.constexpr,
    WIDE_ROWS: tl.constexpr,
    WIDE_COLUMNS: tl.constexpr,
    MAX_BLOCKS: tl.constexpr,
):
    """OPERATION "delta": out <- H; "gate": out <- |H| sign(G) + (G - G); "learn": out <- W + rate H."""
    job, block = _find_job(table, jobs, tl.program_id(0), JOBS)
    tile = _small(job, _TILE)
    if tile == _NARROW:
        _apply_rows(
            job,
            block,
            factors,
            maxima,
            rate,
            OPERATION,
            WEIGHT,
            OUT,
            GRAD,
            NARROW_ROWS,
            NARROW_COLUMNS,
            1,
            MAX_BLOCKS,
        )
    elif tile == _WIDE:
        _apply_rows(
            job,
            block,
            factors,
            maxima,
            rate,
            OPERATION,
            WEIGHT,
            OUT,
            GRAD,
            WIDE_ROWS,
            WIDE_COLUMNS,
            1,
            MAX_BLOCKS,
        )
    else:
        _apply_rows(
            job,
            block,
            factors,
            maxima,
            rate,
            OPERATION,
            WEIGHT,
            OUT,
            GRAD,
            WIDE_ROWS,
            WIDE_COLUMNS,
            _VECTOR,
            MAX_BLOCKS,
        )


@triton.jit
def _sum_parts(parts, mask, splits, part_size, BLOCK: tl.constexpr, TOGETHER: tl.constexpr):
    """Sum over the splits in their order; TOGETHER loads are under way at a time, as each waits for L2."""
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, splits, TOGETHER):
        for index in tl.static_range(TOGETHER):
            total += tl.load(parts, mask=mask & (first + index < splits), other=0.0)
            parts += part_size
    return total


@triton.jit
def sum_splits_kernel(parts, result, splits, size, BLOCK: tl.constexpr, TOGETHER: tl.constexpr):
    """result[i] = sum of parts[s, i], in the order of s."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < size
    total = _sum_parts(parts + index, mask, splits, size, BLOCK, TOGETHER)
    tl.store(result + index, total, mask=mask)


@triton.jit(do_not_specialize=["splits", "size", "part_size", "channels", "padded", "taps"])
def sum_filters_kernel(
    parts,
    result,
    splits,
    size,
    part_size,
    channels,
    padded,
    taps,
    BLOCK: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """result[n, c, t] = sum of parts[s, n, t, c], in the order of s; of the parts' ``padded`` channels."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    columns = channels * taps
    # one wide division a program, so that those of every element are narrow
    first = start // columns
    offset = (start - first * columns).to(tl.int32) + tl.arange(0, BLOCK)
    row, column = offset // columns, offset % columns
    mask = start + tl.arange(0, BLOCK) < size
    parts += ((first + row) * taps + column % taps) * padded + column // taps
    total = _sum_parts(parts, mask, splits, part_size, BLOCK, TOGETHER)
    tl.store(result + start + tl.arange(0, BLOCK), total, mask=mask)


def delta(jobs: Sequence[Job]) -> None:
    """out <- H of every layer: what eager.delta returns."""
    run(jobs, functools.partial(_launch_both, "delta", 0.0))


def gate_(jobs: Sequence[Job]) -> None:
    """out <- |H| * sign(G) + (G - G) of every layer, G being its ``grad``, or out itself."""
    run(jobs, functools.partial(_launch_both, "gate", 0.0))


def learn_(jobs: Sequence[Job], lr: float) -> None:
    """out <- weight + lr * H of every layer, out being the weight."""
    run(jobs, functools.partial(_launch_both, "learn", lr))


def sum_splits(parts: Tensor) -> Tensor:
    """Sum over the first dimension of contiguous float32 parts (S, ...), in its order; S = 1 is no copy."""
    if parts.shape[0] == 1:
        return parts[0]
    result = torch.empty(parts.shape[1:], dtype=torch.float32, device=parts.device)
    block, together = _sum_tile(parts.shape[0])
    launch(
        sum_splits_kernel,
        -(-result.numel() // block),
        parts=parts,
        result=result,
        splits=parts.shape[0],
        size=result.numel(),
        BLOCK=block,
        TOGETHER=together,
        warps=_WARPS,
    )
    return result


def sum_filters(parts: Tensor, channels: int, *, by_tap: bool = False) -> Tensor:
    """The same sum of parts (S, units, taps, C) in a weight's order, (units, channels, taps), channels <= C.

    A pass over the sum of its own would read and write as much again as two splits. ``by_tap``: the taps'
    order of the parts stays, as in a weight in channels_last.
    """
    splits, units, taps, padded = parts.shape
    if by_tap:
        rows = sum_filters(parts.view(splits, units * taps, 1, padded), channels)
        return rows.view(units, taps, channels).transpose(1, 2)
    if taps == 1 and padded == channels:
        return sum_splits(parts).view(units, channels, taps)
    result = torch.empty((units, channels, taps), dtype=torch.float32, device=parts.device)
    block, together = _sum_tile(splits)
    launch(
        sum_filters_kernel,
        -(-result.numel() // block),
        parts=parts,
        result=result,
        splits=splits,
        size=result.numel(),
        part_size=parts.stride(0),
        channels=channels,
        padded=padded,
        taps=taps,
        BLOCK=block,
        TOGETHER=together,
        warps=_WARPS,
    )
    return result


def _sum_tile(splits: int) -> tuple[int, int]:
    return SUM_OF_MANY if splits >= MANY_SPLITS else SUM_OF_FEW


def tile_of(columns: int, aligned: bool) -> tuple[int, int]:
    """(the tile of a layer whose rows have this length, how many rows it holds)."""
    if columns <= NARROW_COLUMNS:
        return _NARROW.value, NARROW_ROWS
    return (_WIDE_ALIGNED if aligned else _WIDE).value, WIDE_ROWS


def rows_per_block(rows: int, tile_rows: int) -> int:
    """Rows of one program: a whole number of tiles, and at most MAX_BLOCKS programs."""
    tiles = -(-rows // tile_rows)
    return -(-tiles // MAX_BLOCKS) * tile_rows


def _launch_both(operation: str, rate: float, jobs: list[Job]) -> None:
    device = jobs[0].out.device
    fields, starts, blocks, rows = [], [], 0, 0
    for job in jobs:
        fields.append(_fields(job, rows))
        starts.append(blocks)
        blocks += fields[-1].blocks
        rows += fields[-1].rows
    factors, maxima = workspace((2, rows), device, f"the epilogue of {rows} units")
    if len(jobs) == 1:
        table = _described(jobs[0], fields[0])
    else:
        table = _on_device([*starts, *(value for job in fields for value in job)], device)
    shared: dict[str, Any] = {
        "table": table,
        "jobs": len(jobs),
        "factors": factors,
        "maxima": maxima,
        "WEIGHT": _DTYPES[jobs[0].weight.dtype],
        "JOBS": max(LEAST_JOBS, 1 << (len(jobs) - 1).bit_length()),
        "NARROW_ROWS": NARROW_ROWS,
        "NARROW_COLUMNS": NARROW_COLUMNS,
        "WIDE_ROWS": WIDE_ROWS,
        "WIDE_COLUMNS": WIDE_COLUMNS,
    }
    launch(reduce_kernel, blocks, **shared, warps=_WARPS)
    launch(
        apply_kernel,
        blocks,
        **shared,
        rate=rate,
        OPERATION=operation,
        OUT=_DTYPES[jobs[0].out.dtype],
        GRAD=_DTYPES[jobs[0].signs.dtype],
        MAX_BLOCKS=MAX_BLOCKS,
        warps=_WARPS,
    )
    if len(jobs) == 1:
        job = jobs[0]
        _tape.note(_keep, (job.A, job.weight, job.out, job.signs, job.moments))


def _keep(*_: Tensor) -> None:
    """What the table names is read until here, though no launch is given it."""


def _described(job: Job, fields: Fields) -> Tensor:
    """The table of a single layer, made on the device: nothing is copied there, and a tape can repeat it."""
    table = torch.empty(1 + len(fields), dtype=torch.int64, device=job.out.device)
    strides = ("A_stride", "weight_stride", "out_stride", "grad_stride")
    sizes = ("rows", "columns", "rows_per_block", "tile", "decay", "normalize")
    launch(
        describe_kernel,
        1,
        table=table,
        A=job.A,
        weight=job.weight,
        out=job.out,
        grad=job.signs,
        moments=job.moments,
        last_moment=job.moments.numel() - 1,
        programs=fields.blocks,
        **{name: getattr(fields, name) for name in (*strides, *sizes)},
        warps=1,
    )
    return table


def _fields(job: Job, first_row: int) -> Fields:
    rows = job.out.shape[0]
    columns = job.out.numel() // rows
    # the stride of a single row is never used, and may be anything
    matrices = job.A, job.weight, job.out, job.signs
    strides = [t.stride(0) if rows > 1 else columns for t in matrices]
    addresses = [t.data_ptr() for t in matrices]
    step = math.gcd(columns, *strides)
    aligned = step % _VECTOR.value == 0 and all(address % 16 == 0 for address in addresses)
    tile, tile_rows = tile_of(columns, aligned)
    per_block = rows_per_block(rows, tile_rows)
    moments = job.moments.data_ptr()
    return Fields(
        A=addresses[0],
        A_stride=strides[0],
        weight=addresses[1],
        weight_stride=strides[1],
        out=addresses[2],
        out_stride=strides[2],
        grad=addresses[3],
        grad_stride=strides[3],
        row_decay=moments,
        positions=moments + 4 * (job.moments.numel() - 1),
        rows=rows,
        columns=columns,
        rows_per_block=per_block,
        blocks=-(-rows // per_block),
        first_row=first_row,
        tile=tile,
        decay=_DECAYS[job.decay],
        normalize=_NORMS[job.normalize],
    )


def _on_device(values: list[int], device: torch.device) -> Tensor:
    """The table as int64 on the device; one that was there before, where nothing has moved since."""
    content = array.array("q", values).tobytes()
    if device.type == "cpu":
        return _upload(content, device, 0)
    if _is_capturing(device):
        # Not from the cache and not for it: this copy runs at every replay, and not before the first.
        return _upload.__wrapped__(content, device, 0)
    # the stream is part of the key because nothing else orders the copy before another stream's kernels
    return _upload(content, device, torch.cuda.current_stream(device).cuda_stream)


def _is_capturing(device: torch.device) -> bool:
    """Whether the stream that the kernels go to is; torch answers for the current device's."""
    with current(device):
        return torch.cuda.is_current_stream_capturing()


# Pinned tables that a CUDA graph reads at its replays. Nothing tells when the graph is gone.
_captured: list[Tensor] = []


@functools.lru_cache(maxsize=_TABLES)
def _upload(content: bytes, device: torch.device, stream: int) -> Tensor:
    source = torch.frombuffer(bytearray(content), dtype=torch.int64)
    if device.type == "cpu":
        return source
    source = source.pin_memory()
    if _is_capturing(device):
        _captured.append(source)
    # torch's pinned allocator does not hand the memory out again before the copy has been made
    return source.to(device, non_blocking=True)
