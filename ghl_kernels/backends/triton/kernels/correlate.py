"""A = sum_p y_p x_p^T and G = sum_p (dL/du)_p x_p^T in one pass over x, y rebuilt from u and the state.

An implicit matrix product: rows are units, columns the elements of a patch, the summed dimension the
positions. Patches are read where they lie in x; y exists only in registers. Each program sums one tile of
one or both results over one slice of the positions and writes it to a workspace; the slices are added in
a fixed order afterwards.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ghl_kernels.backends.gpu.layout import VECTOR, Patches, Responses, is_long
from ghl_kernels.backends.gpu.memory import workspace
from ghl_kernels.backends.gpu.state import State, lift_of
from ghl_kernels.backends.triton import config
from ghl_kernels.backends.triton.arch import of as arch_of
from ghl_kernels.backends.triton.kernels import compete
from ghl_kernels.backends.triton.kernels.activity import LOG2E, activities, constants, load_state
from ghl_kernels.backends.triton.kernels.epilogue import sum_filters
from ghl_kernels.backends.triton.kernels.patch import GEOMETRY, locate, split_tap
from ghl_kernels.backends.triton.launch import launch
from ghl_kernels.rule import Competition

# Specializing on these would compile a kernel per layer and gain nothing.
_PLAIN = [*GEOMETRY, "slice_length", "unit_blocks", "column_blocks", "groups"]


@triton.jit(do_not_specialize=_PLAIN)
def correlate_kernel(
    x_ptr,
    u_ptr,
    grad_ptr,
    threshold_ptr,
    cut_ptr,
    logsumexp_ptr,
    first_ptr,
    a_ptr,
    g_ptr,
    positions,
    units,
    channels,
    columns,
    slice_length,
    unit_blocks,
    column_blocks,
    groups,
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
    x_stride_b,
    x_stride_c,
    x_stride_d,
    x_stride_h,
    x_stride_w,
    scale,
    ACTIVITY: tl.constexpr,
    SELECTS: tl.constexpr,
    ANTI: tl.constexpr,
    LIFT: tl.constexpr,
    STATE_HERE: tl.constexpr,
    DIMS: tl.constexpr,
    WITHIN_TAP: tl.constexpr,
    U_ROWS: tl.constexpr,
    GRAD_ROWS: tl.constexpr,
    VECTOR: tl.constexpr,
    UNIT_VECTOR: tl.constexpr,
    LONG: tl.constexpr,
    PRECISION: tl.constexpr,
    UNITS: tl.constexpr,
    COLUMNS: tl.constexpr,
    POSITIONS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One [UNITS, COLUMNS] tile of A (a_ptr) and G (g_ptr) over one slice; either pointer may be None.

    units, channels and columns = taps * channels are those of one group. channels, columns and the strides
    of x are given in multiples of VECTOR, units and the strides of positions in multiples of UNIT_VECTOR: the
    compiler cannot see a factor of 8 in an argument, only in a product. DIMS is 0 for a linear layer, whose
    patches are rows of x.
    """
    pid = tl.program_id(0)
    # programs of one slice are neighbors: they read the same x, u and dL/du while these are in L2
    unit_block = pid % unit_blocks
    pid = pid // unit_blocks
    column_block = pid % column_blocks
    pid = pid // column_blocks
    group = pid % groups
    part = pid // groups
    n = unit_block * UNITS + tl.arange(0, UNITS)
    if LONG:
        # all offsets are made from these, and take their width
        part, group, n = part.to(tl.int64), group.to(tl.int64), n.to(tl.int64)
    channels, columns, units = channels * VECTOR, columns * VECTOR, units * UNIT_VECTOR
    u_batch_stride, u_position_stride = u_batch_stride * UNIT_VECTOR, u_position_stride * UNIT_VECTOR
    grad_batch_stride *= UNIT_VECTOR
    grad_position_stride *= UNIT_VECTOR
    unit, in_units = group * units + n, n < units

    if WITHIN_TAP:
        # whether a patch is inside x is then one test per position
        blocks_per_tap = tl.cdiv(channels, COLUMNS)
        tap = tl.full((1,), column_block // blocks_per_tap, tl.int32)
        c = (column_block % blocks_per_tap) * COLUMNS + tl.arange(0, COLUMNS)
        column = (column_block // blocks_per_tap) * channels + c
        in_columns = c < channels
    else:
        column = column_block * COLUMNS + tl.arange(0, COLUMNS)
        tap, c = column // channels, column % channels
        in_columns = column < columns
    tap_d, tap_h, tap_w = split_tap(tap[None, :], kernel_h, kernel_w)
    x_column = ((group * channels + c) * x_stride_c)[None, :]
    masked_u: tl.constexpr = float("-inf") if ACTIVITY == "softmax" else 0.0

    a = tl.zeros((UNITS, COLUMNS), tl.float32)
    g = tl.zeros((UNITS, COLUMNS), tl.float32)
    start = part * slice_length
    for p0 in tl.range(start, tl.minimum(start + slice_length, positions), POSITIONS, num_stages=STAGES):
        p = p0 + tl.arange(0, POSITIONS)
        in_positions = p < positions
        x_row, in_x = locate(
            p[:, None],
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
        in_x &= in_positions[:, None] & in_columns[None, :]
        x = tl.load(x_ptr + x_row + x_column, mask=in_x, other=0.0)
        in_u = in_positions[:, None] & in_units[None, :]
        if g_ptr is not None:
            # first, so that the tensor cores work on it while y's exponentials are computed
            grad_row = row_offset(p, grad_inner, grad_batch_stride, grad_position_stride, GRAD_ROWS)
            grad_offset = grad_row[:, None] + (unit * grad_unit_stride)[None, :]
            grad = tl.load(grad_ptr + grad_offset, mask=in_u, other=0.0)
            g = tl.dot(tl.trans(grad), x, g, input_precision=PRECISION)
        if a_ptr is not None:
            u_row = row_offset(p, u_inner, u_batch_stride, u_position_stride, U_ROWS)
            u_offset = u_row[:, None] + (unit * u_unit_stride)[None, :]
            u = tl.load(u_ptr + u_offset, mask=in_u, other=masked_u).to(tl.float32)
            if STATE_HERE:
                y = softmax(u, in_positions, scale)
            else:
                threshold, cut, logsumexp, first = load_state(
                    threshold_ptr, cut_ptr, logsumexp_ptr, first_ptr, p[:, None], in_positions[:, None]
                )
                y = activities(
                    u, unit[None, :], threshold, cut, logsumexp, first, scale, ACTIVITY, SELECTS, ANTI
                )
            if LIFT != 1.0:
                y *= LIFT
            a = tl.dot(tl.trans(y.to(x.dtype)), x, a, input_precision=PRECISION)

    row = ((part * groups + group) * units + n).to(tl.int64)
    offset = row[:, None] * columns + column[None, :]
    in_tile = in_units[:, None] & in_columns[None, :]
    if a_ptr is not None:
        if LIFT != 1.0:
            a *= 1.0 / LIFT
        tl.store(a_ptr + offset, a, mask=in_tile)
    if g_ptr is not None:
        tl.store(g_ptr + offset, g, mask=in_tile)


@triton.jit
def row_offset(p, inner, batch_stride, position_stride, ROWS: tl.constexpr):
    """Where a position of layout.Responses begins; of p's width, unlike activity.position_offset.

    The plain division, not patch.divide, through which the compiler cannot see that positions are contiguous.
    """
    return p * batch_stride if ROWS else (p // inner) * batch_stride + (p % inner) * position_stride


@triton.jit
def softmax(u, in_positions, scale):
    """softmax over the units of a tile that holds all of them, 0 outside the positions."""
    e = tl.exp2((u - tl.max(u, 1)[:, None]) * (scale * LOG2E))
    return tl.where(in_positions[:, None], e / tl.sum(e, 1)[:, None], 0.0)


def correlate(
    x: Patches,
    u: Responses | None,
    grad: Responses | None,
    state: State | None,
    competition: Competition,
    *,
    channels: int | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """A (if u is given) and G (if grad is), float32 (units, channels, taps).

    ``channels`` of a group are wanted, all by default; those of x from there on are padding. Fast where the
    channels of x are contiguous. ``state`` None: it is computed, in this kernel where makes_state says so.
    """
    some = u or grad
    assert some is not None
    columns = x.taps * x.channels
    here = u is not None and state is None and makes_state(x, u, grad, competition)
    if u is not None and state is None and not here:
        state = compete.state(u, competition)
    problem = config.Problem(
        some.units // x.groups,
        columns,
        x.channels,
        some.positions,
        x.groups,
        x.tensor.element_size(),
        results=(u is not None) + (grad is not None),
        makes_y=u is not None,
        state_here=here,
        aligned=unit_vector(u, grad, some.units // x.groups) > 1,
        bounded=competition.activity == "softmax" or competition.winners > 0,
        long=_is_long(x, u, grad),
    )
    arch = arch_of(x.tensor.device)
    tile = config.tile(problem, arch)
    slices = config.slices(problem, tile, arch)
    shape = (slices.number, some.units, x.taps, x.channels)
    what = f"the sums of {some.units} units over {problem.columns} inputs at {some.positions} positions"
    a = workspace(shape, x.tensor.device, what) if u else None
    g = workspace(shape, x.tensor.device, what) if grad else None
    unit_blocks, column_blocks = -(-problem.units // tile.units), config.column_blocks(problem, tile)
    launch(
        correlate_kernel,
        unit_blocks * column_blocks * x.groups * slices.number,
        warps=tile.warps,
        stages=tile.stages,
        registers=config.registers(tile, arch),
        x_ptr=x.tensor,
        a_ptr=a,
        g_ptr=g,
        positions=some.positions,
        slice_length=slices.length,
        unit_blocks=unit_blocks,
        column_blocks=column_blocks,
        groups=x.groups,
        **_state_arguments(state),
        **_response_arguments(u, grad, problem),
        **x.arguments(x.vector),
        channels=x.channels // x.vector,
        columns=columns // x.vector,
        **constants(competition),
        LIFT=lift_of(x.tensor.dtype, competition),
        STATE_HERE=problem.state_here,
        WITHIN_TAP=config.within_tap(problem, tile),
        LONG=problem.long,
        PRECISION=config.precision(x.tensor.dtype, is_conv=x.dims > 0, arch=arch),
        UNITS=tile.units,
        COLUMNS=tile.columns,
        POSITIONS=tile.positions,
        STAGES=tile.stages,
    )
    wanted = channels or x.channels
    return (
        sum_filters(a, wanted, by_tap=x.by_tap) if a is not None else None,
        sum_filters(g, wanted, by_tap=x.by_tap) if g is not None else None,
    )


def makes_state(x: Patches, u: Responses, grad: Responses | None, competition: Competition) -> bool:
    """Whether :func:`correlate` computes the state in its own kernel if it is given none.

    Not with offsets of 64 bits, which leave no registers for tiles of all units.
    """
    if _is_long(x, u, grad):
        return False
    aligned = unit_vector(u, grad, u.units // x.groups) > 1
    columns, itemsize = x.taps * x.channels, x.tensor.element_size()
    return config.state_here(u.units, columns, x.groups, itemsize, aligned, competition)


def _is_long(x: Patches, u: Responses | None, grad: Responses | None) -> bool:
    return is_long(x.positions, x.tensor, *(view.tensor for view in (u, grad) if view))


def _state_arguments(state: State | None) -> dict[str, Any]:
    fields = state or State(None, None, None, None)
    return {f"{name}_ptr": value for name, value in fields._asdict().items()}


def _response_arguments(
    u: Responses | None, grad: Responses | None, problem: config.Problem
) -> dict[str, Any]:
    """u and dL/du by name, their sizes in multiples of UNIT_VECTOR; the absent one borrows the other's."""
    vector = unit_vector(u, grad, problem.units)
    arguments: dict[str, Any] = {"units": problem.units // vector, "UNIT_VECTOR": vector}
    for name, view in {"u": u or grad, "grad": grad or u}.items():
        assert view is not None
        arguments |= view.arguments(name, vector) | {f"{name.upper()}_ROWS": view.inner == 1}
    return arguments | {"u_ptr": u.tensor if u else None, "grad_ptr": grad.tensor if grad else None}


def unit_vector(u: Responses | None, grad: Responses | None, units: int) -> int:
    """Units that one load can always take."""
    whole = units % VECTOR == 0 and all(view.is_aligned for view in (u, grad) if view)
    return VECTOR if whole else 1
