"""The networks of examples/models: published sizes and shapes; every one of them converts and trains."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ghl_kernels as ghl
from examples.models import (
    MODELS,
    VGG,
    BasicBlock,
    Bottleneck,
    CifarResNet,
    DeepHebb,
    FastHebb,
    ResNet,
    Triangle,
    ViT,
)
from ghl_kernels.nn import GHLLayer

SMALL = {
    "DeepHebb": lambda: DeepHebb((4, 6, 8), size=16),
    "FastHebb": lambda: FastHebb((4, 6, 8, 10), size=24),
    "VGG": lambda: VGG((1, 1, 1, 1, 1), width=4, hidden=16, size=32, classes=10),
    "ResNet, basic": lambda: ResNet(BasicBlock, (1, 1), width=4, classes=10, stem="small"),
    "ResNet, bottleneck": lambda: ResNet(Bottleneck, (1, 1), width=4, classes=10),
    "CifarResNet": lambda: CifarResNet(8, width=4),
    "ViT": lambda: ViT(size=8, dim=12, depth=2, heads=3, hidden=16),
}
SIZES = {"DeepHebb": 16, "FastHebb": 24, "ViT": 8}


@pytest.mark.parametrize(
    ("network", "positions", "features"),
    [
        (DeepHebb, [(96, 32, 32), (384, 16, 16), (1536, 8, 8)], 24576),
        (FastHebb, [(96, 28, 28), (128, 12, 12), (192, 10, 10), (256, 3, 3)], 2304),
    ],
)
def test_hebbian_networks_have_the_published_shapes(network, positions, features: int) -> None:
    with torch.device("meta"):
        model = network()
        sizes = []
        for stage in model.stages:
            stage[1].register_forward_hook(lambda conv, args, u: sizes.append(tuple(u.shape[1:])))
        logits = model(torch.zeros(1, 3, 32, 32))
    assert sizes == positions
    assert model.classifier.in_features == features
    assert logits.shape == (1, 10)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("vgg16", 138_357_544),
        ("resnet18", 11_689_512),
        ("resnet34", 21_797_672),
        ("resnet50", 25_557_032),
        ("resnet20", 269_722),
        ("resnet32", 464_154),
        ("resnet56", 853_018),
        ("resnet110", 1_727_962),
        ("resnet1202", 19_421_274),
    ],
)
def test_networks_have_the_published_number_of_parameters(name: str, parameters: int) -> None:
    with torch.device("meta"):
        model = MODELS[name]()
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


# one size of the network whose thousand layers take seconds to build
@pytest.mark.parametrize(
    ("name", "size"),
    [(name, size) for name in MODELS for size in ((32,) if name == "resnet1202" else (32, 64))],
)
def test_every_builder_takes_size_and_classes(name: str, size: int) -> None:
    with torch.device("meta"):
        logits = MODELS[name](size=size, classes=7)(torch.zeros(2, 3, size, size))
    assert logits.shape == (2, 7)


@pytest.mark.parametrize(("size", "patches"), [(32, 64), (64, 256), (224, 196)])
def test_the_builder_of_vit_chooses_a_patch_that_attention_can_afford(size: int, patches: int) -> None:
    with torch.device("meta"):
        assert len(MODELS["vit"](size=size).position) == patches


@pytest.mark.parametrize("name", SMALL)
def test_every_network_converts_and_trains(name: str) -> None:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # convert warns when the last layer is not the one kept
        model = ghl.convert(SMALL[name](), ghl.HebbianRule.kwta(0.3))
    size = SIZES.get(name, 32)
    F.cross_entropy(model(torch.randn(2, 3, size, size)), torch.tensor([0, 1])).backward()
    layers = [module for module in model.modules() if isinstance(module, GHLLayer)]
    kept = [m for m in model.modules() if type(m) in (nn.Conv2d, nn.Linear)]
    assert len(kept) == 1
    assert kept[0].out_features == 10
    # H is scaled to a largest entry of 1, and the gate zeroes only what has no gradient
    assert all(0.0 < layer.weight.grad.abs().max() <= 1.0 + 1e-5 for layer in layers)


@pytest.mark.parametrize(
    ("network", "argument"),
    [
        (DeepHebb, {"size": 7}),
        (DeepHebb, {"size": 0}),
        (DeepHebb, {"activation": "tanh"}),
        (DeepHebb, {"widths": (4, 4)}),
        (FastHebb, {"size": 23}),
        (FastHebb, {"widths": (4, 4, 4)}),
        (VGG, {"size": 48}),
        (VGG, {"convolutions": (1, 1)}),
        (ResNet, {"stem": "large"}),
        (CifarResNet, {"depth": 21}),
        (ViT, {"size": 30}),
        (ViT, {"dim": 100}),
    ],
)
def test_networks_refuse(network: type[nn.Module], argument: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="got"):
        network(**argument)


def test_triangle() -> None:
    u = torch.tensor([0.0, 2.0, 7.0]).view(1, 3, 1, 1)
    assert Triangle()(u).flatten().tolist() == [0.0, 0.0, 4.0]
    assert Triangle(0.5)(u).flatten().tolist() == [0.0, 0.0, 2.0]
