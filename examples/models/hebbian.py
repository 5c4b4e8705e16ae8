"""DeepHebb and FastHebb: the networks for 32 x 32 images on which Hebbian rules are compared."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class Triangle(nn.Module):
    """relu(u - mean of u over the channels) ** power, on (B, N, *size).

    Source: Coates, Ng & Lee, "An analysis of single-layer networks in unsupervised feature learning",
    2011; the power after Journé et al., "Hebbian Deep Learning Without Feedback", ICLR 2023.
    """

    def __init__(self, power: float = 1.0) -> None:
        super().__init__()
        self.power = power

    def forward(self, u: Tensor) -> Tensor:
        excess = F.relu(u - u.mean(1, keepdim=True))
        return excess if self.power == 1.0 else excess**self.power


class HebbianNetwork(nn.Module):
    """Stages of batch norm (no parameters), convolution (no bias), activation, pooling; a linear read-out.

    ``stages`` holds one Sequential of these four modules a convolution.
    """

    def __init__(self, stages: Sequence[nn.Sequential], features: int, classes: int) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.classifier = nn.Linear(features, classes)

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x)
        return self.classifier(x.flatten(1))


def _stages(
    widths: Sequence[int],
    kernels: Sequence[int],
    paddings: Sequence[int],
    pools: Sequence[nn.Module],
    activation: str,
    channels: int = 3,
) -> list[nn.Sequential]:
    if activation not in ("relu", "triangle"):
        raise ValueError(f"activation must be 'relu' or 'triangle', got {activation!r}")
    return [
        nn.Sequential(
            nn.BatchNorm2d(before, affine=False),
            nn.Conv2d(before, width, kernel, padding=padding, bias=False),
            nn.ReLU() if activation == "relu" else Triangle(),
            pool,
        )
        for before, width, kernel, padding, pool in zip(
            (channels, *widths[:-1]), widths, kernels, paddings, pools, strict=True
        )
    ]


class DeepHebb(HebbianNetwork):
    """The CIFAR-10 network of SoftHebb and GHL: three stages of batch norm, convolution, activation, pooling.

    Input (B, channels, size, size), output (B, classes). For 32 x 32 images the convolutions (k5, k3, k3;
    no bias) see 32 x 32, 16 x 16 and 8 x 8 positions and the classifier 24,576 features. The pools are max
    4 stride 2 pad 1, twice, and average 2; each halves the size and rounds down.

    Args:
        widths: output channels of the three convolutions.
        size: height and width of the input, at least 8.
        classes: outputs.
        activation: "relu" or "triangle".
        channels: of the input.

    Raises:
        ValueError: any other activation, other than three widths, or a size below 8.

    Source: Hua et al., arXiv 2601.21367; Journé et al., ICLR 2023.
    """

    def __init__(
        self,
        widths: Sequence[int] = (96, 384, 1536),
        size: int = 32,
        classes: int = 10,
        activation: str = "relu",
        channels: int = 3,
    ) -> None:
        if size < 8:
            raise ValueError(f"size must be at least 8, got {size}")
        _check_widths(widths, 3)
        pools = (nn.MaxPool2d(4, 2, 1), nn.MaxPool2d(4, 2, 1), nn.AvgPool2d(2))
        stages = _stages(widths, (5, 3, 3), (2, 1, 1), pools, activation, channels)
        super().__init__(stages, widths[-1] * (size // 8) ** 2, classes)


class FastHebb(HebbianNetwork):
    """The CIFAR-10 network of FastHebb: four convolutions without padding, two of them followed by pooling.

    Input (B, 3, size, size), output (B, classes). The convolutions are k5, k3, k3, k3 with widths 96, 128,
    192, 256; for 32 x 32 images they give 28 x 28, 12 x 12, 10 x 10 and 3 x 3 positions, and the classifier
    sees 2,304 features. Widths, kernels and positions are the published ones; max pooling by 2 after the
    first and the third convolution is what gives these positions. Chosen here, as DeepHebb has it: batch
    norm without parameters in front of every convolution, no bias, and a linear read-out.

    Args:
        widths: output channels of the four convolutions.
        size: height and width of the input, at least 24.
        classes: outputs.
        activation: "relu" or "triangle".

    Raises:
        ValueError: any other activation, other than four widths, or a size that leaves no position.

    Source: Lagani et al., "FastHebb: Scaling Hebbian Training of Deep Neural Networks to ImageNet Level",
    2022 (arXiv 2207.03172); Hua et al., arXiv 2601.21367.
    """

    def __init__(
        self,
        widths: Sequence[int] = (96, 128, 192, 256),
        size: int = 32,
        classes: int = 10,
        activation: str = "relu",
    ) -> None:
        positions = ((size - 4) // 2 - 4) // 2 - 2
        if positions < 1:
            raise ValueError(f"size must be at least 24, got {size}")
        _check_widths(widths, 4)
        pools = (nn.MaxPool2d(2), nn.Identity(), nn.MaxPool2d(2), nn.Identity())
        stages = _stages(widths, (5, 3, 3, 3), (0, 0, 0, 0), pools, activation)
        super().__init__(stages, widths[-1] * positions**2, classes)


def _check_widths(widths: Sequence[int], count: int) -> None:
    if len(widths) != count:
        raise ValueError(f"widths must be {count} numbers of channels, got {tuple(widths)}")
