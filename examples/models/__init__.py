"""The networks of the papers, built from torch's own layers so that ``ghl.convert`` can swap them.

    deephebb, fasthebb      the CIFAR-10 networks of the Hebbian literature
    vgg16                   3 x 3 convolutions without batch norm
    resnet18, 34, 50        residual networks for ImageNet; for images below 64 x 64 with the small stem
    resnet20, ..., 1202     residual networks for CIFAR-10
    vit                     a small vision transformer, all of whose products are ``nn.Linear``; patches
                            of 4 x 4 for images below 128 x 128, else of 16 x 16

Every network maps (B, 3, size, size) to logits (B, classes); its last Linear is what ``convert`` keeps.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from examples.models.hebbian import DeepHebb, FastHebb, Triangle
from examples.models.resnet import BasicBlock, Bottleneck, CifarResNet, ResNet
from examples.models.vgg import VGG
from examples.models.vit import ViT

__all__ = [
    "MODELS",
    "VGG",
    "BasicBlock",
    "Bottleneck",
    "CifarResNet",
    "DeepHebb",
    "FastHebb",
    "ResNet",
    "Triangle",
    "ViT",
]

SMALL_IMAGES = 64  # below this size the ImageNet stem would leave too few positions
LARGE_IMAGES = 128  # from this size on patches of 4 x 4 would be a thousand, each attending to all


def _resnet(
    block: type[BasicBlock | Bottleneck], counts: tuple[int, ...], size: int = 224, classes: int = 1000
) -> ResNet:
    return ResNet(block, counts, classes=classes, stem="small" if size < SMALL_IMAGES else "imagenet")


def _cifar_resnet(depth: int, size: int = 32, classes: int = 10) -> CifarResNet:
    return CifarResNet(depth, classes=classes)  # averages over positions: any size will do


def _vit(size: int = 32, classes: int = 10) -> ViT:
    return ViT(size, classes, patch=4 if size < LARGE_IMAGES else 16)


# Builders by the name that a command line takes; each has the keywords size and classes, with the
# defaults of the data set that the network was published on.
MODELS: dict[str, Callable[..., nn.Module]] = {
    "deephebb": DeepHebb,
    "fasthebb": FastHebb,
    "vgg16": VGG,
    "resnet18": partial(_resnet, BasicBlock, (2, 2, 2, 2)),
    "resnet34": partial(_resnet, BasicBlock, (3, 4, 6, 3)),
    "resnet50": partial(_resnet, Bottleneck, (3, 4, 6, 3)),
    **{f"resnet{depth}": partial(_cifar_resnet, depth) for depth in (20, 32, 56, 110, 1202)},
    "vit": _vit,
}
