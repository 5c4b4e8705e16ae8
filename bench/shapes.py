"""The shapes that are timed: layers of published networks, and odd ones that no tile was made for."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench import work
from ghl_kernels._geometry import Geometry


class ConvShape(NamedTuple):
    """A square convolution; ``padding`` None is "same" (kernel // 2 times the dilation)."""

    batch: int
    channels: int
    units: int
    size: int
    kernel: int
    stride: int = 1
    padding: int | None = None
    dilation: int = 1
    groups: int = 1

    @property
    def geometry(self) -> Geometry:
        padding = self.kernel // 2 * self.dilation if self.padding is None else self.padding
        return Geometry(
            (self.kernel,) * 2, (self.stride,) * 2, (padding,) * 2, (self.dilation,) * 2, self.groups
        )

    @property
    def conv(self) -> dict[str, tuple[int, int]]:
        """Keyword arguments of a convolution, without groups."""
        geometry = self.geometry
        return {"stride": geometry.stride, "padding": geometry.padding, "dilation": geometry.dilation}

    @property
    def out_size(self) -> int:
        return self.geometry.out_size((self.size, self.size))[0]

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        return (self.units, self.channels // self.groups, self.kernel, self.kernel)

    def layer(self, itemsize: int = 4) -> work.Layer:
        """The sizes that bench.work counts with."""
        return work.Layer(
            positions=self.batch * self.out_size**2,
            units=self.units,
            columns=math.prod(self.weight_shape[1:]),
            inputs=self.batch * self.channels * self.size**2,
            itemsize=itemsize,
        )

    def __str__(self) -> str:
        odd = [
            f"{letter}{value}"
            for letter, value, usual in (
                ("s", self.stride, 1),
                ("p", self.padding, None),
                ("d", self.dilation, 1),
                ("g", self.groups, 1),
            )
            if value != usual
        ]
        name = f"B{self.batch}-{self.channels}to{self.units}-k{self.kernel}-{self.size}x{self.size}"
        return "-".join([name, *odd])


class LinearShape(NamedTuple):
    """A linear layer on P positions."""

    positions: int
    features: int
    units: int

    def layer(self, itemsize: int = 4) -> work.Layer:
        return work.Layer(self.positions, self.units, self.features, self.positions * self.features, itemsize)

    def __str__(self) -> str:
        return f"P{self.positions}-{self.features}to{self.units}"


DEEPHEBB = (ConvShape(32, 3, 96, 32, 5), ConvShape(32, 96, 384, 16, 3), ConvShape(32, 384, 1536, 8, 3))
FASTHEBB = (
    ConvShape(32, 96, 128, 14, 3, padding=0),
    ConvShape(32, 128, 192, 12, 3, padding=0),
    ConvShape(32, 192, 256, 5, 3, padding=0),
)
LARGE = (  # VGG-16, then ResNet-50
    ConvShape(1, 64, 64, 224, 3),
    ConvShape(4, 512, 512, 28, 3),
    ConvShape(8, 128, 128, 28, 3),
    ConvShape(8, 512, 512, 7, 3),
)
ODD = (
    ConvShape(8, 64, 96, 32, 3, stride=2),  # the last rows and columns are never reached
    ConvShape(8, 64, 96, 16, 3, dilation=2),
    ConvShape(8, 256, 64, 14, 1),
    ConvShape(4, 3, 64, 224, 7, stride=2),  # the stem of ResNet
    ConvShape(5, 37, 53, 13, 3),
)
BATCH_10 = ConvShape(10, 96, 384, 16, 3)  # SoftHebb's batch
GROUPED = (
    ConvShape(8, 128, 128, 28, 3, groups=4),  # between dense and depthwise
    ConvShape(8, 64, 1, 28, 3),  # one unit: nothing competes
)
DEPTHWISE = (
    ConvShape(8, 96, 96, 56, 3, groups=96),
    ConvShape(8, 384, 384, 14, 7, groups=384),
    ConvShape(5, 37, 74, 13, 3, stride=2, groups=37),
)
LINEAR = (
    LinearShape(512, 2304, 4096),
    LinearShape(64, 24576, 10),
    LinearShape(64, 4096, 4096),
    LinearShape(4096, 1024, 1024),
    LinearShape(333, 517, 259),
)
QUICK_CONV = (ConvShape(8, 96, 384, 16, 3), ConvShape(5, 37, 53, 13, 3))
QUICK_LINEAR = (LinearShape(256, 1024, 1024),)
QUICK_DEPTHWISE = (ConvShape(8, 96, 96, 28, 3, groups=96),)

MEMORY_FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


def conv_tensors(
    shape: ConvShape, memory_format: str = "nchw", **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """x (B, C, S, S), u (B, N, OS, OS) and weight: u = weight * x at a layer's usual scale.

    ``options`` are the device and dtype of all three.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape.batch, shape.channels, shape.size, shape.size, generator=generator)
    fan_in = math.prod(shape.weight_shape[1:])
    weight = torch.randn(shape.weight_shape, generator=generator) / fan_in**0.5
    layout = MEMORY_FORMATS[memory_format]
    x, weight = x.to(**options), weight.to(**options)
    x = x.to(memory_format=layout)
    u = torch.nn.functional.conv2d(x, weight, **shape.conv, groups=shape.groups)
    return x, u.to(memory_format=layout), weight


def linear_tensors(shape: LinearShape, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """x (P, D), u (P, N) and weight (N, D)."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape.positions, shape.features, generator=generator).to(**options)
    weight = torch.randn(shape.units, shape.features, generator=generator) / shape.features**0.5
    weight = weight.to(**options)
    return x, x @ weight.t(), weight
