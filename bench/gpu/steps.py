"""Stage 5: whole training steps and local passes, bfloat16 autocast and channels_last; time and peak memory.

A step is what a user runs: forward, cross-entropy, backward, SGD, launched one by one and not captured.
``--warm MODEL`` only compiles what the stage will load from Inductor's and Triton's caches.
"""

from __future__ import annotations

import argparse
import contextlib
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ghl_kernels as ghl
from bench.baselines import unfold
from bench.gpu import stage
from bench.gpu.models import VGG, ResNet
from bench.gpu.stage import Stage
from bench.gpu.timing import time_all
from bench.models import DeepHebb

SOFTMAX = ghl.HebbianRule.ghl()
FEW = ghl.HebbianRule.kwta(0.004)
# Small enough that hundreds of steps leave the weights, and so the data, what they were.
LR = 1e-6
_GHL_LAYERS = (ghl.GHLLinear, ghl.GHLConv1d, ghl.GHLConv2d, ghl.GHLConv3d)


class Network(NamedTuple):
    """A model to time; ``sums_at`` is where its softmax rule is cheapest in memory."""

    build: Callable[[], nn.Module]
    small: Callable[[], nn.Module]
    batch: int
    size: int
    small_size: int
    classes: int
    sums_at: str
    bar: float  # of the compiled softmax step over compiled backprop


NETWORKS = {
    "DeepHebb": Network(DeepHebb, lambda: DeepHebb((2, 4, 4), size=8), 512, 32, 8, 10, "forward", 1.28),
    "ResNet-50": Network(
        ResNet, lambda: ResNet((1, 1, 1, 1), width=4, classes=10), 128, 224, 32, 1000, "backward", 1.13
    ),
    "VGG-16": Network(VGG, lambda: VGG((1, 1, 1, 1, 1), 4, 16, 32, 10), 128, 224, 32, 1000, "forward", 1.27),
}


class Method(NamedTuple):
    """One way to train; ``against`` names its baseline."""

    name: str
    against: str
    prepare: Callable[[nn.Module, Network], nn.Module]
    compiled: bool = False
    local: bool = False
    finish: Callable[[nn.Module], None] = lambda model: None
    only: tuple[str, ...] = ()


def _plain(model: nn.Module, network: Network) -> nn.Module:
    return model


def _converted(rule: ghl.HebbianRule, sums_at: str = "") -> Callable[[nn.Module, Network], nn.Module]:
    return lambda model, network: ghl.convert(model, rule, sums_at=sums_at or network.sums_at)


METHODS = (
    Method("backprop, compiled", "backprop, compiled", _plain, compiled=True),
    Method("softmax, compiled", "backprop, compiled", _converted(SOFTMAX), compiled=True),
    Method("k-WTA 0.4%, compiled", "backprop, compiled", _converted(FEW), compiled=True),
    Method("backprop", "backprop", _plain),
    Method("softmax, sums_at=forward", "backprop", _converted(SOFTMAX, "forward")),
    # VGG's ReLU works in place, on what the backward sums would need
    Method(
        "softmax, sums_at=backward",
        "backprop",
        _converted(SOFTMAX, "backward"),
        only=("DeepHebb", "ResNet-50"),
    ),
    Method("k-WTA 0.4%", "backprop", _converted(FEW)),
    Method("learn_ softmax", "backprop", _converted(SOFTMAX), local=True),
    Method("learn_ k-WTA 0.4%", "backprop", _converted(FEW), local=True),
    Method(
        "authors' algorithm (unfold)",
        "backprop",
        lambda model, network: unfold.convert(model),
        finish=unfold.gate_,
        only=("DeepHebb",),
    ),
)


class Step(NamedTuple):
    """A method made ready: ``run`` is one step of ``model``."""

    model: nn.Module
    run: Callable[[int], object]


def run(this: Stage) -> None:
    """Every method on every network, time by interleaved rounds, memory of one step alone."""
    torch.backends.cudnn.benchmark = True
    for name in this.each(NETWORKS, str, least=20):
        with _backend(this, name):
            _network(this, name)
        if not this.dry:
            torch.cuda.empty_cache()


def _network(this: Stage, name: str) -> None:
    steps, memory = {}, {}
    torch._dynamo.reset()
    for method in this.each(_methods(name), lambda method: f"{name}, {method.name}", least=10):
        label = f"{name}, {method.name}"
        step = this.attempt(
            label, lambda method=method: _ready(this.device, this.dry, NETWORKS[name], method)
        )
        if step is not None:
            steps[method.name] = step
            memory[method.name] = this.attempt(f"{label}: memory", lambda step=step: _peak(this, step))
    candidates = {method: step.run for method, step in steps.items()}
    timed = time_all(candidates, sets=1, device=this.device, rounds=10, capture=False)
    rows = {method: sample.row() for method, sample in timed.items()}
    for method in _methods(name):
        if method.name in rows:
            this.add("steps", _row(this, name, method, rows, memory))


def calls(device: torch.device, dry: bool) -> Iterator[Callable[[], object]]:
    """One step of every method that launches kernels of ours: what has to be compiled."""
    for name, network in NETWORKS.items():
        for method in _methods(name):
            if not method.compiled and method.name.startswith(("softmax", "k-WTA", "learn_")):
                yield lambda network=network, method=method: _ready(device, dry, network, method)


def _methods(network: str) -> list[Method]:
    return [method for method in METHODS if network in (method.only or NETWORKS)]


def _row(
    this: Stage,
    name: str,
    method: Method,
    rows: dict[str, dict[str, Any]],
    memory: dict[str, int | None],
) -> dict[str, Any]:
    """One line of the table: time and peak memory, and both as multiples of the baseline's."""
    network = NETWORKS[name]
    own, base = rows[method.name], rows.get(method.against, {})
    peak, base_peak = memory.get(method.name), memory.get(method.against)
    return {
        "network": name,
        "batch": 2 if this.dry else network.batch,
        "method": method.name,
        "against": method.against,
        **own,
        "ratio": own["us"] / base["us"] if "us" in own and "us" in base else None,
        "bar": network.bar if method.name == "softmax, compiled" else None,
        "peak_bytes": peak,
        "peak_ratio": peak / base_peak if peak and base_peak else None,
    }


def _ready(device: torch.device, dry: bool, network: Network, method: Method) -> Step:
    """The method's step on data of its own, run once."""
    torch.manual_seed(0)
    model = (network.small if dry else network.build)().to(device)
    model = method.prepare(model.to(memory_format=torch.channels_last), network)
    batch, size = (2, network.small_size) if dry else (network.batch, network.size)
    x = torch.randn(batch, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
    target = torch.randint(10 if dry else network.classes, (batch,), device=device)
    body = _local(model, x) if method.local else _training(dry, model, x, target, method)

    def step(_: int) -> object:
        with torch.autocast(x.device.type, torch.bfloat16):
            return body()

    step(0)
    return Step(model, step)


def _training(dry: bool, model: nn.Module, x: Tensor, target: Tensor, method: Method) -> Callable[[], object]:
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
    # Inductor needs a compiler on a CPU; a dry run checks the graph, not its code
    backend = "eager" if dry else "inductor"
    forward = torch.compile(model, backend=backend, dynamic=False) if method.compiled else model

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(forward(x).float(), target).backward()
        method.finish(model)
        optimizer.step()

    return step


def _local(model: nn.Module, x: Tensor) -> Callable[[], object]:
    """One pass in which every GHL layer learns as the batch goes by."""
    for layer in model.modules():
        if isinstance(layer, _GHL_LAYERS):
            layer.forward = lambda x, layer=layer: layer.learn_(x, LR)

    @torch.no_grad()
    def step() -> object:
        return model(x)

    return step


@contextlib.contextmanager
def _backend(this: Stage, network: str) -> Iterator[None]:
    """The kernels under test; in a dry run only the smallest network can afford the interpreter."""
    with ghl.use_backend("triton" if this.dry and network == "DeepHebb" else "auto"):
        yield


def _peak(this: Stage, step: Step) -> int | None:
    """Most bytes allocated during one step beyond weights, buffers and momenta; None on a CPU."""
    if this.dry:
        step.run(0)
        return None
    step.model.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step.run(0)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def warm(out: pathlib.Path, name: str) -> int:
    """Run every compiled method of a network once, so that its code is in the caches."""
    options = argparse.Namespace(out=out, dry_run=False, small=False, seconds=120.0)
    this = Stage(f"warm-{name}", options)
    torch.backends.cudnn.benchmark = False
    for method in this.each([m for m in _methods(name) if m.compiled], lambda m: m.name, least=5):
        this.attempt(
            f"{name}, {method.name}",
            lambda method=method: _ready(this.device, this.dry, NETWORKS[name], method),
        )
    return this.finish()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--warm"]:
        sys.exit(warm(pathlib.Path(sys.argv[3]), sys.argv[2]))
    sys.exit(stage.main("steps", run))
