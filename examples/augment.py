"""The standard augmentations, in torch, on bytes. All randomness comes from the generator that is given."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def random_crop_and_flip(images: Tensor, padding: int, generator: torch.Generator) -> Tensor:
    """Shift each image by up to ``padding`` pixels each way, zeros coming in, and mirror every other one.

    Args:
        images: (B, C, H, W) of bytes.
        padding: pixels, at least 0.
        generator: draws shifts and mirrors, on the CPU.

    Returns:
        (B, C, H, W) of bytes.

    Source: He et al., "Deep Residual Learning for Image Recognition", 2016, section 4.2.
    """
    count, _, height, width = images.shape
    padded = F.pad(images, (padding,) * 4)
    top, left = torch.randint(0, 2 * padding + 1, (2, count, 1), generator=generator)
    mirrored = torch.rand(count, 1, generator=generator) < 0.5
    rows = top + torch.arange(height)
    columns = left + torch.where(mirrored, torch.arange(width).flip(0), torch.arange(width))
    batch = torch.arange(count).view(-1, 1, 1)
    # advanced indices on both sides of the channels' slice put the channels last
    return padded[batch, :, rows.unsqueeze(2), columns.unsqueeze(1)].permute(0, 3, 1, 2).contiguous()


def random_resized_crop_and_flip(
    image: Tensor,
    size: int,
    generator: torch.Generator,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Tensor:
    """A random part of an image, resized to size x size and mirrored half of the time.

    Args:
        image: (C, H, W) of bytes.
        size: pixels of the result.
        generator: draws part and mirror, on the CPU.
        scale: bounds of the part's share of the area, uniform.
        ratio: bounds of its width / height, uniform in the logarithm.

    Returns:
        (C, size, size) of bytes.

    Source: Szegedy et al., "Going Deeper with Convolutions", 2015, section 6.
    """
    top, left, height, width = _random_box(image.shape[1], image.shape[2], generator, scale, ratio)
    part = _resize(image[:, top : top + height, left : left + width], (size, size))
    return part.flip(2) if torch.rand((), generator=generator) < 0.5 else part


def _random_box(
    height: int,
    width: int,
    generator: torch.Generator,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[int, int, int, int]:
    """Top, left, height, width; the largest centered part of an allowed ratio where ten draws do not fit."""
    logarithms = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        area, logarithm, down, right = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
        wanted = height * width * (scale[0] + area * (scale[1] - scale[0]))
        shape = math.exp(logarithms[0] + logarithm * (logarithms[1] - logarithms[0]))
        w, h = round(math.sqrt(wanted * shape)), round(math.sqrt(wanted / shape))
        if 0 < w <= width and 0 < h <= height:
            return int(down * (height - h + 1)), int(right * (width - w + 1)), h, w
    w = min(width, max(1, round(height * ratio[1])))
    h = min(height, max(1, round(width / ratio[0])))
    return (height - h) // 2, (width - w) // 2, h, w


def center_crop(image: Tensor, size: int, share: float = 0.875) -> Tensor:
    """The middle of an image whose shorter side is first resized to size / share: (C, size, size) of bytes.

    ``share`` 0.875 is 224 of 256, as ImageNet is tested.
    """
    target = round(size / share)
    height, width = image.shape[1:]
    shorter = min(height, width)
    resized = _resize(image, (round(height * target / shorter), round(width * target / shorter)))
    top, left = (resized.shape[1] - size) // 2, (resized.shape[2] - size) // 2
    return resized[:, top : top + size, left : left + size]


def _resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(image.unsqueeze(0), size, mode="bilinear", antialias=True)[0]


def standardize(
    images: Tensor,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    device: torch.device | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """(pixels / 255 - mean) / std by channel, in float32 on the device; what travels there are the bytes."""
    x = images.to(device, non_blocking=True).to(torch.float32, memory_format=memory_format)
    scale = torch.tensor(std, device=x.device).mul_(255).view(-1, 1, 1)
    shift = torch.tensor(mean, device=x.device).div_(torch.tensor(std, device=x.device)).view(-1, 1, 1)
    return x.div_(scale).sub_(shift)
