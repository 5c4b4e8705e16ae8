"""Where the elements of a patch lie in x, the device functions that every correlation shares."""

from __future__ import annotations

import triton
import triton.language as tl


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
def split_position(position, out_d, out_h, out_w):
    """(item, depth, height, width) of an output position."""
    w = position % out_w
    rest = position // out_w
    h = rest % out_h
    rest = rest // out_h
    return rest // out_d, rest % out_d, h, w


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
