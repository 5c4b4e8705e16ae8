"""Residual networks for ImageNet and for CIFAR-10.

Every convolution is followed by batch norm, which keeps the convolution's output for its own backward:
``sums_at="backward"`` costs no memory here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

# (channels in, channels out, stride) -> the skip of a block whose input and output differ
Shortcut = Callable[[int, int, int], nn.Module]


class PadShortcut(nn.Module):
    """Every stride-th position, new channels filled with zeros: a skip without parameters (option A)."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.surplus = out - channels
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.surplus))


def projection(channels: int, out: int, stride: int) -> nn.Module:
    """A 1 x 1 convolution with batch norm (option B)."""
    return nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))


class BasicBlock(nn.Module):
    """relu(skip(x) + bn(conv(relu(bn(conv(x)))))), both convolutions 3 x 3."""

    expansion = 1

    def __init__(self, channels: int, width: int, stride: int, shortcut: Shortcut = projection) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        same = stride == 1 and channels == width
        self.skip = nn.Identity() if same else shortcut(channels, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(out)) + self.skip(x), inplace=True)


class Bottleneck(nn.Module):
    """Convolutions 1 x 1, 3 x 3 (with the stride) and 1 x 1 to 4 * width channels, each with batch norm."""

    expansion = 4

    def __init__(self, channels: int, width: int, stride: int, shortcut: Shortcut = projection) -> None:
        super().__init__()
        out = self.expansion * width
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        same = stride == 1 and channels == out
        self.skip = nn.Identity() if same else shortcut(channels, out, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        return F.relu(self.bn3(self.conv3(out)) + self.skip(x), inplace=True)


class ResNet(nn.Module):
    """(B, 3, H, W) -> (B, classes); the default is ResNet-50 with the stride in the 3 x 3 convolution.

    Args:
        block: :class:`BasicBlock` or :class:`Bottleneck`.
        counts: blocks of each stage; width and stride double from stage to stage.
        width: channels of the first stage's 3 x 3 convolutions.
        classes: outputs.
        stem: "imagenet": 7 x 7 with stride 2, then max pooling; "small": 3 x 3 with stride 1, for images
            such as CIFAR-10's.

    Raises:
        ValueError: any other stem.

    Source: He et al., "Deep Residual Learning for Image Recognition", 2016, table 1. The small stem is
    the usual adaptation and not from the paper.
    """

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck] = Bottleneck,
        counts: Sequence[int] = (3, 4, 6, 3),
        width: int = 64,
        classes: int = 1000,
        stem: str = "imagenet",
    ) -> None:
        super().__init__()
        if stem not in ("imagenet", "small"):
            raise ValueError(f"stem must be 'imagenet' or 'small', got {stem!r}")
        large = stem == "imagenet"
        first = nn.Conv2d(3, width, 7, 2, 3, bias=False) if large else _conv3(3, width)
        self.stem = nn.Sequential(first, nn.BatchNorm2d(width), nn.ReLU(inplace=True))
        if large:
            self.stem.append(nn.MaxPool2d(3, 2, 1))
        self.blocks, channels = _blocks(block, counts, width, projection)
        self.classifier = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.blocks(self.stem(x)).mean((2, 3)))


class CifarResNet(nn.Module):
    """Three stages of basic blocks for small images, (B, 3, H, W) -> (B, classes).

    Args:
        depth: 6 n + 2 layers: 20, 32, 44, 56, 110, 1202.
        width: channels of the first stage; they double twice.
        classes: outputs.

    Raises:
        ValueError: a depth that is not 6 n + 2 with n at least 1.

    Source: He et al., "Deep Residual Learning for Image Recognition", 2016, section 4.2, with its skips
    without parameters.
    """

    def __init__(self, depth: int = 20, width: int = 16, classes: int = 10) -> None:
        super().__init__()
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"depth must be 6 n + 2 with n at least 1, got {depth}")
        self.stem = nn.Sequential(_conv3(3, width), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
        self.blocks, channels = _blocks(BasicBlock, [depth // 6] * 3, width, PadShortcut)
        self.classifier = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.blocks(self.stem(x)).mean((2, 3)))


def _conv3(channels: int, out: int) -> nn.Conv2d:
    return nn.Conv2d(channels, out, 3, padding=1, bias=False)


def _blocks(
    block: type[BasicBlock | Bottleneck], counts: Sequence[int], width: int, shortcut: Shortcut
) -> tuple[nn.Sequential, int]:
    """All blocks in order, and the channels that leave the last."""
    layers: list[nn.Module] = []
    channels = width
    for stage, count in enumerate(counts):
        for i in range(count):
            layers.append(block(channels, width << stage, 2 if stage and i == 0 else 1, shortcut))
            channels = block.expansion * (width << stage)
    return nn.Sequential(*layers), channels
