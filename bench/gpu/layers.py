"""The layers that the pair kernel is measured on, and tensors of their shapes."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ghl_kernels._geometry import Geometry


class Layer(NamedTuple):
    """A linear layer (size 0; ``batch`` positions) or a square convolution with "same" padding."""

    name: str
    batch: int
    channels: int
    units: int
    size: int = 0
    kernel: int = 1

    @property
    def geometry(self) -> Geometry:
        two, padding = (1, 1), (self.kernel // 2,) * 2
        return Geometry((self.kernel,) * 2, two, padding, two, 1)

    @property
    def positions(self) -> int:
        return self.batch * (self.size**2 or 1)

    @property
    def columns(self) -> int:
        """Length of a patch."""
        return self.channels * (self.kernel**2 if self.size else 1)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return (self.units, self.channels, *((self.kernel,) * 2 if self.size else ()))

    @property
    def operations(self) -> int:
        """Of A and G together."""
        return 4 * self.positions * self.units * self.columns

    def moved(self, itemsize: int) -> int:
        """Bytes that have to be moved: x, u and dL/du once, A and G in float32."""
        inputs = self.batch * self.channels * (self.size**2 or 1) + 2 * self.positions * self.units
        return inputs * itemsize + 2 * 4 * math.prod(self.weight_shape)

    def tensors(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Random x, u and dL/du; u as large as a layer makes it, channels_last."""
        size = (self.size, self.size) if self.size else ()
        # not the default one, which a failed capture leaves unusable
        generator = torch.Generator(device).manual_seed(0)
        x, u, grad_u = (
            torch.randn(self.batch, channels, *size, generator=generator, device=device)
            for channels in (self.channels, self.units, self.units)
        )
        layout = torch.channels_last if size else torch.contiguous_format
        return tuple(t.to(dtype).contiguous(memory_format=layout) for t in (x, u, grad_u))


LAYERS = (
    Layer("DeepHebb conv1", 512, 3, 96, 32, 5),
    Layer("ResNet-50 64-256 k1", 128, 64, 256, 56, 1),
    Layer("DeepHebb conv2", 512, 96, 384, 16, 3),
    Layer("DeepHebb conv3", 512, 384, 1536, 8, 3),
    Layer("ResNet-50 128 k3", 128, 128, 128, 28, 3),
    Layer("ResNet-50 512 k3", 128, 512, 512, 7, 3),
    Layer("linear 4096", 4096, 4096, 4096),
    Layer("linear 2304-4096", 16384, 2304, 4096),
)
SMALL = (Layer("conv", 2, 8, 16, 5, 3), Layer("linear", 33, 24, 16))
