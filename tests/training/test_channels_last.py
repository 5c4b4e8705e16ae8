"""channels_last goes through a network and back: no tensor is copied that the torch model does not copy."""

from __future__ import annotations

import copy
import functools
from collections import Counter
from typing import Any

import pytest
import torch
from beside_reference import RULE
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import ghl_kernels as ghl
from ghl_kernels import HebbianRule
from ghl_kernels.nn import GHLLayer

SIZE = 32  # of an image; every activation has more elements than any weight
RULES = {"softmax": RULE, "kwta": HebbianRule.kwta(2), "kwta, dense": HebbianRule.kwta(0.5)}


class Residual(nn.Module):
    """A branch with batch norm and ReLU in place, added to its input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.branch(x) + x


def _network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 16, 5, padding=2),
        nn.ReLU(),
        Residual(16),
        nn.Conv2d(16, 16, 3, padding=1, groups=2),
        nn.MaxPool2d(2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 4),
    ]
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


def _images() -> Tensor:
    return torch.randn(4, 3, SIZE, SIZE).contiguous(memory_format=torch.channels_last)


def _copies(model: nn.Module, x: Tensor) -> Counter[tuple[int, ...]]:
    """Shapes of what a training pass copies, inside operators too, from the size of the input on."""
    with torch.profiler.profile(
        record_shapes=True, activities=[torch.profiler.ProfilerActivity.CPU]
    ) as trace:
        model(x).square().sum().backward()
    shapes = [
        tuple(event.input_shapes[0])
        for event in trace.events()
        if event.name in ("aten::copy_", "aten::clone")
    ]
    return Counter(shape for shape in shapes if len(shape) == 4 and torch.Size(shape).numel() >= x.numel())


@pytest.mark.parametrize("gate_at", ["backward", "step"])
@pytest.mark.parametrize("sums_at", ["forward", "backward"])
@pytest.mark.parametrize("rule", RULES)
def test_no_hidden_copies(rule: str, sums_at: str, gate_at: str) -> None:
    plain, x = _network(), _images()
    model = ghl.convert(copy.deepcopy(plain), RULES[rule], gate_at=gate_at, sums_at=sums_at)
    if gate_at == "step":
        ghl.StepGate(torch.optim.SGD(model.parameters(), lr=0.1), model)
    assert not _copies(model, x) - _copies(plain, x)


def test_a_copy_would_be_counted() -> None:
    class Contiguous(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.contiguous()

    plain, x = _network(), _images()
    assert (
        sum((_copies(nn.Sequential(plain[0], Contiguous(), *plain[1:]), x) - _copies(plain, x)).values()) > 0
    )


@pytest.mark.parametrize("gate_at", ["backward", "step"])
def test_layouts_are_those_of_the_torch_model(gate_at: str) -> None:
    """Of every layer's output, its gradient, and of the gradients of all parameters; also after a step."""
    plain, x = _network(), _images()
    model = ghl.convert(copy.deepcopy(plain), RULE, gate_at=gate_at)
    layouts = []
    for network in (model, plain):
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
        if network is model and gate_at == "step":
            ghl.StepGate(optimizer, model)
        seen: list[tuple[int, ...]] = []
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(functools.partial(_note, seen))
        network(x).square().sum().backward()
        optimizer.step()
        seen += [p.grad.stride() for p in network.parameters()]
        seen += [optimizer.state[p]["momentum_buffer"].stride() for p in network.parameters()]
        layouts.append(seen)
    assert layouts[0] == layouts[1]
    assert sum(isinstance(m, GHLLayer) for m in model.modules()) == 4
    assert model[0].weight.grad.is_contiguous(memory_format=torch.channels_last)


def _note(seen: list[tuple[int, ...]], _module: nn.Module, _inputs: object, u: Tensor) -> None:
    seen.append(u.stride())
    assert u.is_contiguous(memory_format=torch.channels_last)
    u.register_hook(lambda grad: seen.append(grad.stride()))


class _Gates(TorchDispatchMode):
    """Layouts of what a gate is given: G, A and the weight."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[set[tuple[int, ...]]] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), options: Any = None
    ) -> Any:
        if function is torch.ops.ghl.gate_.default:
            G, A, _, weight, *_ = arguments
            self.seen.append({tensor.stride() for tensor in (G, A, weight)})
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("name", ["triton", "cuda"])
@pytest.mark.parametrize("sums_at", ["forward", "backward"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("channels_last", [True, False])
def test_a_gate_on_a_gpu_reads_one_order(name: str, rule: str, sums_at: str, channels_last: bool) -> None:
    if not {status.name: status.available for status in ghl.backends()}[name]:
        pytest.skip(f"backend {name!r} cannot run here")
    layer = ghl.GHLConv2d(8, 16, 3, rule=RULES[rule], sums_at=sums_at)
    x = torch.randn(2, 8, 6, 6)
    if channels_last:
        layer, x = (t.to(memory_format=torch.channels_last) for t in (layer, x))
    with ghl.use_backend(name), _Gates() as gates:
        layer(x).square().sum().backward()
    assert gates.seen == [{layer.weight.stride()}]
