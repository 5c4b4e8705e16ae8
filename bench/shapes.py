"""The shapes that are timed: the convolutions of DeepHebb at B = 32."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class ConvShape(NamedTuple):
    """A square convolution with stride 1 and "same" padding."""

    batch: int
    channels: int
    units: int
    size: int
    kernel: int

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        return (self.units, self.channels, self.kernel, self.kernel)

    @property
    def padding(self) -> int:
        return self.kernel // 2

    def __str__(self) -> str:
        return f"B{self.batch}-{self.channels}to{self.units}-k{self.kernel}-{self.size}x{self.size}"


DEEPHEBB = (ConvShape(32, 3, 96, 32, 5), ConvShape(32, 96, 384, 16, 3), ConvShape(32, 384, 1536, 8, 3))
MEMORY_FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


def conv_tensors(shape: ConvShape, memory_format: str = "nchw") -> tuple[Tensor, Tensor, Tensor]:
    """x (B, C, S, S), u (B, N, S, S) and weight (N, C, k, k): u = weight * x at a layer's usual scale."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape.batch, shape.channels, shape.size, shape.size, generator=generator)
    fan_in = shape.channels * shape.kernel**2
    weight = torch.randn(shape.weight_shape, generator=generator) / fan_in**0.5
    layout = MEMORY_FORMATS[memory_format]
    x = x.to(memory_format=layout)
    u = torch.nn.functional.conv2d(x, weight, padding=shape.padding).to(memory_format=layout)
    return x, u, weight
