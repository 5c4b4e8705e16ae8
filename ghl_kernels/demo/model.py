"""The demo's network."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn


class SmallCNN(nn.Module):
    """Two convolutions and a linear read-out.

        x (B, 1, H, W) -> [conv, batch norm, ReLU, max pool] -> [conv, batch norm, ReLU, global max pool]
          -> linear -> (B, classes)

    The global pooling leaves the read-out one number per filter. It makes the comparison one of filters:
    given a grid of positions instead, a linear read-out of random filters does most of the work by itself.
    Batch norm has no parameters, so that what the convolutions learn is in their weights alone, and gives
    random filters the same well-scaled features as learned ones.

    Args:
        filters: output channels of the first and the second convolution.
        kernel_size: of the first; the second is 3x3.
        pool: size and stride of the max pooling.
        classes: outputs.
    """

    def __init__(self, filters: tuple[int, int], kernel_size: int, pool: int, classes: int) -> None:
        super().__init__()
        first, second = filters
        self.features = nn.Sequential(
            nn.Conv2d(1, first, kernel_size, padding="same", bias=False),
            nn.BatchNorm2d(first, affine=False),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(pool),
            nn.Conv2d(first, second, 3, padding="same", bias=False),
            nn.BatchNorm2d(second, affine=False),
            nn.ReLU(inplace=True),
            nn.AdaptiveMaxPool2d(1),
            nn.Flatten(),
        )
        self.read_out = nn.Linear(second, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, 1, H, W)."""
        logits: Tensor = self.read_out(self.features(x))
        return logits

    def convolutions(self) -> list[nn.Parameter]:
        """The weights of the two convolutions."""
        return [
            cast(nn.Parameter, module.weight) for module in self.features if isinstance(module, nn.Conv2d)
        ]

    def first_filters(self) -> Tensor:
        """A copy of the first convolution's filters, (filters, kernel, kernel)."""
        return self.convolutions()[0].detach()[:, 0].clone()


def build(filters: tuple[int, int], kernel_size: int, pool: int, classes: int, seed: int) -> SmallCNN:
    """A network whose initial weights depend on ``seed`` alone; torch's generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SmallCNN(filters, kernel_size, pool, classes)
