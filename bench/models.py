"""The networks that are timed, built from torch's own layers so that ``ghl.convert`` can swap them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
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


class DeepHebb(nn.Module):
    """The CIFAR-10 network of SoftHebb and GHL: three stages of batch norm, convolution, activation, pooling.

    Input (B, 3, size, size) with size a multiple of 8, output (B, classes). For 32 x 32 images the
    convolutions (k5, k3, k3; no bias) see 32 x 32, 16 x 16 and 8 x 8 positions and the classifier
    24,576 features. The pools are max 4 stride 2 pad 1, twice, and average 2.

    Args:
        widths: output channels of the three convolutions.
        size: height and width of the input.
        classes: outputs.
        activation: "relu" or "triangle".

    Raises:
        ValueError: any other activation, or a size that is not a positive multiple of 8.

    Source: Hua et al., arXiv 2601.21367; Journé et al., ICLR 2023.
    """

    def __init__(
        self,
        widths: Sequence[int] = (96, 384, 1536),
        size: int = 32,
        classes: int = 10,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        if activation not in ("relu", "triangle"):
            raise ValueError(f"activation must be 'relu' or 'triangle', got {activation!r}")
        if size < 8 or size % 8:
            raise ValueError(f"size must be a positive multiple of 8, got {size}")
        channels = (3, *widths)
        kernels = (5, 3, 3)
        pools = (nn.MaxPool2d(4, 2, 1), nn.MaxPool2d(4, 2, 1), nn.AvgPool2d(2))
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm2d(channels[i], affine=False),
                nn.Conv2d(channels[i], channels[i + 1], kernels[i], padding=kernels[i] // 2, bias=False),
                nn.ReLU() if activation == "relu" else Triangle(),
                pools[i],
            )
            for i in range(3)
        )
        self.classifier = nn.Linear(channels[3] * (size // 8) ** 2, classes)

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x)
        return self.classifier(x.flatten(1))

    @torch.no_grad()
    def learn_(self, x: Tensor, lr: float) -> Tensor:
        """One purely local pass: every convolution learns from its own input as the batch goes by.

        Needs the GHL layers of ``ghl.convert``. Returns the logits; the classifier does not learn.
        """
        for stage in self.stages:
            norm, conv, activation, pool = stage
            x = pool(activation(conv.learn_(norm(x), lr)))
        return self.classifier(x.flatten(1))


class ResidualBlock(nn.Module):
    """relu(x + bn(conv(relu(bn(conv(x)))))); a 1 x 1 convolution on the skip where shapes differ."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.skip: nn.Module = nn.Identity()
        if stride != 1 or channels != width:
            self.skip = nn.Sequential(
                nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(out)) + self.skip(x), inplace=True)


class ResNet(nn.Module):
    """A residual network for small images, (B, 3, H, W) -> (B, classes); blocks=3 is ResNet-20.

    Every convolution is followed by batch norm, which keeps the convolution's output for its own backward.

    Source: He et al., "Deep Residual Learning for Image Recognition", 2016, section 4.2.
    """

    def __init__(self, blocks: int = 3, width: int = 16, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        )
        layers: list[nn.Module] = []
        channels = width
        for stage in range(3):
            for block in range(blocks):
                out = width << stage
                layers.append(ResidualBlock(channels, out, 2 if stage and block == 0 else 1))
                channels = out
        self.blocks = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.blocks(self.stem(x)).mean((2, 3)))
