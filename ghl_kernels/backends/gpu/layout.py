"""Tensors of any rank as the kernels see them: responses as (position, unit), inputs as patches in 3-d."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ghl_kernels._geometry import Geometry

FEW_CHANNELS = 4  # of a network's input, at most: a kernel of the CUDA backend takes them as they are
VECTOR = 8  # elements; 16 bytes, one load, of the narrowest dtype
_SHORT = 1 << 30  # what 31 bits hold, with a tile's width and a padded row to spare


class Responses(NamedTuple):
    """u or dL/du as a matrix of positions and units.

    Element (p, n) lies at ``(p // inner) * batch_stride + (p % inner) * position_stride + n * unit_stride``
    from the start of ``tensor``; positions are counted in the order of u's dimensions without the units'.
    """

    tensor: Tensor
    positions: int
    units: int
    inner: int  # positions per batch item; 1 where one stride serves all positions
    batch_stride: int
    position_stride: int
    unit_stride: int

    @property
    def is_aligned(self) -> bool:
        """Contiguous units, every position beginning at a multiple of VECTOR."""
        return self.unit_stride == 1 and not (self.batch_stride % VECTOR or self.position_stride % VECTOR)

    def arguments(self, name: str, vector: int) -> dict[str, int]:
        """Arguments of a kernel by their names, the strides of positions in multiples of ``vector``."""
        return {
            f"{name}_inner": self.inner,
            f"{name}_batch_stride": self.batch_stride // vector,
            f"{name}_position_stride": self.position_stride // vector,
            f"{name}_unit_stride": self.unit_stride,
        }


def responses(u: Tensor, dim: int) -> Responses:
    """u with its units along ``dim``; a contiguous copy where two strides cannot describe the positions.

    Rows (..., N) and channels_last have contiguous units, NCHW has contiguous positions.
    """
    view = _strided(u, dim)
    return view if view is not None else _must(_strided(u.contiguous(), dim))


def _strided(u: Tensor, dim: int) -> Responses | None:
    units, positions = u.shape[dim], math.prod(s for i, s in enumerate(u.shape) if i != dim)
    if u.numel() == 0:
        return Responses(u, positions, units, 1, 0, 0, 1)
    others = [(u.shape[i], u.stride(i)) for i in range(u.dim()) if i != dim and u.shape[i] > 1]
    runs: list[tuple[int, int]] = []  # (positions, stride), adjacent dimensions that are one run merged
    for size, stride in others:
        if runs and runs[-1][1] == size * stride:
            runs[-1] = (runs[-1][0] * size, stride)
        else:
            runs.append((size, stride))
    if len(runs) > 2:
        return None
    unit_stride = u.stride(dim) if units > 1 else 1
    if len(runs) < 2:
        stride = runs[0][1] if runs else 0
        return Responses(u, positions, units, 1, stride, 0, unit_stride)
    return Responses(u, positions, units, runs[1][0], runs[0][1], runs[1][1], unit_stride)


def _must(view: Responses | None) -> Responses:
    assert view is not None
    return view


class Patches(NamedTuple):
    """An input as the patches of a 3-d convolution; 1-d, 2-d and linear have leading sizes of 1.

    Position p is (item, output depth, output height, output width); column d of its patch is (tap, channel
    of the group), the taps in the order of the kernel's dimensions.
    """

    tensor: Tensor
    batch: int
    channels: int  # per group
    groups: int
    in_size: tuple[int, int, int]
    out_size: tuple[int, int, int]
    kernel: tuple[int, int, int]
    stride: tuple[int, int, int]
    padding: tuple[int, int, int]
    dilation: tuple[int, int, int]
    batch_stride: int
    channel_stride: int
    strides: tuple[int, int, int]
    dims: int  # spatial ones; 0 for linear, whose patches are the rows of x
    by_tap: bool = False  # sums over the patches are written (unit, tap, channel)

    @property
    def positions(self) -> int:
        """Patches, over the whole batch."""
        return self.batch * math.prod(self.out_size)

    @property
    def taps(self) -> int:
        """Kernel volume."""
        return math.prod(self.kernel)

    @property
    def is_aligned(self) -> bool:
        """Contiguous channels, every step in another dimension a multiple of VECTOR."""
        return self.channel_stride == 1 and not any(s % VECTOR for s in (self.batch_stride, *self.strides))

    @property
    def vector(self) -> int:
        """Channels of a group that one load can always take."""
        return VECTOR if self.is_aligned and self.channels % VECTOR == 0 else 1

    def arguments(self, vector: int) -> dict[str, int]:
        """Arguments of a kernel that calls patch.locate; strides but the channel's count ``vector`` elements.

        The compiler cannot see a factor in an argument, only in a product: the kernel multiplies by VECTOR.
        """
        named = {
            "in": self.in_size,
            "out": self.out_size,
            "kernel": self.kernel,
            "stride": self.stride,
            "pad": self.padding,
            "dilation": self.dilation,
            "x_stride": tuple(stride // vector for stride in self.strides),
        }
        sizes = {
            f"out_{axis}_magic": magic(max(size, 1)) for axis, size in zip("dhw", self.out_size, strict=True)
        }
        sizes |= {
            f"{name}_{axis}": value
            for name, three in named.items()
            for axis, value in zip("dhw", three, strict=True)
        }
        strides = {"x_stride_b": self.batch_stride // vector, "x_stride_c": self.channel_stride}
        return sizes | strides | {"DIMS": self.dims, "VECTOR": vector}


def patches(x: Tensor, geometry: Geometry | None) -> Patches:
    """x (P, D) of a linear layer (geometry None) or x (B, C, *size) of a convolution; never a copy."""
    if geometry is None:
        ones, zeros = (1, 1, 1), (0, 0, 0)
        rows, features = x.shape
        return Patches(
            x, rows, features, 1, ones, ones, ones, ones, zeros, ones, x.stride(0), x.stride(1), zeros, 0
        )
    size = x.shape[2:]
    return Patches(
        x,
        x.shape[0],
        x.shape[1] // geometry.groups,
        geometry.groups,
        three(size, 1),
        three(geometry.out_size(size), 1),
        three(geometry.kernel_size, 1),
        three(geometry.stride, 1),
        three(geometry.padding, 0),
        three(geometry.dilation, 1),
        x.stride(0),
        x.stride(1),
        three(x.stride()[2:], 0),
        len(size),
        geometry.by_tap,
    )


def sum_strides(x: Patches, channels: int) -> tuple[int, int, int]:
    """Of sums (units, channels, taps) over the patches, in the order that they ask for."""
    return (channels * x.taps, 1, channels) if x.by_tap else (channels * x.taps, x.taps, 1)


def new_sum(x: Patches, units: int, channels: int) -> Tensor:
    """An uninitialized float32 (units, channels, taps) with those strides."""
    shape, strides = (units, channels, x.taps), sum_strides(x, channels)
    return torch.empty_strided(shape, strides, dtype=torch.float32, device=x.tensor.device)


def is_long(count: int, *tensors: Tensor) -> bool:
    """Whether an index below ``count``, or an offset in one of the tensors, may not fit 31 bits."""
    reach = (
        sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True)) for t in tensors
    )
    return max(count, *reach) >= _SHORT


def magic(divisor: int) -> int:
    """What patch.divide needs to divide 0 <= n < 2**31 by this: a 32-bit multiplier, above it the shift + 1.

    Never below 2**32, so that every kernel takes it as a 64-bit integer.
    """
    shift = (divisor - 1).bit_length()
    return shift + 1 << 32 | -(-(1 << 31 + shift) // divisor)


def three(values: Sequence[int], fill: int) -> tuple[int, int, int]:
    """``values`` with leading dimensions added up to three."""
    padded = (fill,) * (3 - len(values)) + tuple(values)
    return padded[0], padded[1], padded[2]
