"""Where the elements of a patch lie in x, the device functions that every correlation shares."""

from __future__ import annotations

import triton
import triton.language as tl

# The sizes of layout.Patches.arguments. A kernel specialized on them would be compiled anew for every layer.
GEOMETRY = [
    *(f"out_{axis}_magic" for axis in "dhw"),
    *(f"{name}_{axis}" for name in ("in", "out", "kernel", "stride", "pad", "dilation") for axis in "dhw"),
]


@triton.jit
def divide(n, divisor, magic, LONG: tl.constexpr):
    """n // divisor, by a multiplication where n < 2**31; magic = layout.magic(divisor).

    Source: Granlund and Montgomery, "Division by invariant integers using multiplication", 1994.
    """
    if LONG:
        quotient = n // divisor
    else:
        multiplier = tl.cast(magic & 0xFFFFFFFF, tl.uint32)
        shift = tl.cast((magic >> 32) - 1, tl.uint32)
        quotient = (tl.umulhi(n.to(tl.uint32) << 1, multiplier) >> shift).to(tl.int32)
    return quotient


@triton.jit
def split_tap(tap, kernel_h, kernel_w):
    """(depth, height, width) of a tap of the kernel."""
    w = tap % kernel_w
    rest = tap // kernel_w
    return rest // kernel_h, rest % kernel_h, w


@triton.jit
def along(position, tap, stride, pad, dilation, size):
    """(coordinate in x, whether it lies inside) along one dimension."""
    i = position * stride - pad + tap * dilation
    return i, (i >= 0) & (i < size)


@triton.jit
def locate(
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
    x_stride_d,
    x_stride_h,
    x_stride_w,
    x_stride_b,
    DIMS: tl.constexpr,
    LONG: tl.constexpr,
):
    """(offset in x without the channel's, whether it lies inside x); the taps broadcast against position.

    Offsets have position's width. DIMS is layout.Patches.dims: dimensions of size 1 cost nothing.
    """
    item = position
    offset = tl.zeros_like(position)
    inside = position >= 0
    if DIMS > 0:
        item = divide(position, out_w, out_w_magic, LONG)
        i, within = along(position - item * out_w, tap_w, stride_w, pad_w, dilation_w, in_w)
        offset, inside = offset + i * x_stride_w, inside & within
    if DIMS > 1:
        rest = item
        item = divide(rest, out_h, out_h_magic, LONG)
        i, within = along(rest - item * out_h, tap_h, stride_h, pad_h, dilation_h, in_h)
        offset, inside = offset + i * x_stride_h, inside & within
    if DIMS > 2:
        rest = item
        item = divide(rest, out_d, out_d_magic, LONG)
        i, within = along(rest - item * out_d, tap_d, stride_d, pad_d, dilation_d, in_d)
        offset, inside = offset + i * x_stride_d, inside & within
    return offset + item * x_stride_b, inside
