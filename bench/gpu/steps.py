"""Stage 7: whole training steps and local passes, bfloat16 autocast and channels_last; time, kernels, memory.

A step is what a user runs: forward, cross-entropy, backward, SGD, launched one by one and not captured. Some
follow one another, as in training: a wait after each would add the host's first launches to every step.
What has a bar comes first, timed in turn and on disk network by network; then every other method on every
network, each in turn with the baseline that it is quoted against.

``--warm MODEL NUMBER FOLDER`` only compiles what the stage will load from Inductor's and Triton's caches.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

import ghl_kernels as ghl
from bench import steps, training
from bench.gpu import profile, stage, verdicts
from bench.gpu.stage import Stage
from bench.gpu.timing import time_all
from bench.training import Method, by_rule
from examples.models import VGG, BasicBlock, Bottleneck, CifarResNet, DeepHebb, FastHebb, ResNet

SOFTMAX, FEW = ghl.HebbianRule.ghl(), ghl.HebbianRule.kwta(0.004)
# Small enough that hundreds of steps leave the weights, and so the data, what they were.
LR = 1e-6
ROUNDS = 8
SAMPLE = 40e-3  # seconds of steps between two waits
DRY_NETWORK = "DeepHebb"  # the only one that a dry run runs in the interpreter


class Network(NamedTuple):
    """A network of bench.steps at the batch of its paper, and one small enough for a dry run."""

    small: Callable[[], nn.Module]
    batch: int
    small_size: int
    bar: float | None = None  # of the compiled softmax step over compiled backprop


NETWORKS = {
    "DeepHebb": Network(lambda: DeepHebb((2, 4, 4), size=8), 512, 8, 1.28),
    "VGG-16": Network(lambda: VGG((1, 1, 1, 1, 1), 4, 16, 32, 10, bias=False), 128, 32, 1.27),
    "ResNet-50": Network(lambda: ResNet(Bottleneck, (1, 1, 1, 1), width=4, classes=10), 128, 32, 1.13),
    "FastHebb": Network(lambda: FastHebb((2, 4, 4, 4), size=24), 512, 24),
    "ResNet-18": Network(lambda: ResNet(BasicBlock, (1, 1), width=4, classes=10), 128, 32),
    "ResNet-20": Network(lambda: CifarResNet(8, width=4), 128, 8),
}

BACKPROP = steps.BACKPROP
# compiled, those that are judged
COMPILED, SOFTMAX_STEP, FEW_STEP = verdicts.BACKPROP, verdicts.SOFTMAX, verdicts.FEW
_SHARED = steps.METHODS
METHODS = (
    _SHARED[COMPILED],
    # one kernel then sums A and G; what works in place on u is no obstacle to a compiled step
    by_rule(SOFTMAX_STEP, SOFTMAX, sums_at="backward", compiled=True),
    by_rule(FEW_STEP, FEW, compiled=True),
    _SHARED[BACKPROP],
    by_rule("GHL softmax, sums_at=forward", SOFTMAX, sums_at="forward"),
    # VGG's ReLU works in place, on what the backward sums would need
    by_rule(
        "GHL softmax, sums_at=backward",
        SOFTMAX,
        sums_at="backward",
        only=tuple(name for name in NETWORKS if name != "VGG-16"),
    ),
    _SHARED["GHL softmax, gate_at=step"],
    _SHARED["GHL winners=0.004"],
    _SHARED["GHL winners=0.004, gate_at=step"],
    _SHARED["learn_ softmax"],
    _SHARED["learn_ winners=0.004"],
    _SHARED[training.SOFTHEBB.name],
    # elsewhere a sum for every sample is more than a GPU holds
    dataclasses.replace(training.AUTHORS, only=("DeepHebb", "FastHebb", "ResNet-20")),
)


# The networks whose compiled steps have a bar, and those steps.
BARRED = tuple(name for name, network in NETWORKS.items() if network.bar is not None)
_DRY = frozenset({BACKPROP, "GHL winners=0.004", "learn_ softmax", training.AUTHORS.name})
FIRST = frozenset({COMPILED, SOFTMAX_STEP, FEW_STEP})


class Step(NamedTuple):
    """A method made ready: ``run`` is one step of ``model``."""

    model: nn.Module
    run: Callable[[int], object]


def run(this: Stage) -> None:
    """Time by interleaved rounds, memory of one step alone."""
    torch.backends.cudnn.benchmark = True
    for name in this.each(BARRED, lambda name: f"{name}, the steps with a bar", least=20):
        with _network(this, name):
            made = _all_made(this, name, [m for m in _methods(name, this.dry) if m.name in FIRST])
            _measure(this, name, made, made)
    for name in this.each(NETWORKS, str, least=10):
        with _network(this, name):
            _measure_others(this, name)


@contextlib.contextmanager
def _network(this: Stage, name: str) -> Iterator[None]:
    """The kernels under test; in a dry run only the smallest network can afford the interpreter."""
    torch._dynamo.reset()
    with ghl.use_backend("triton" if this.dry and name == DRY_NETWORK else "auto"):
        yield
    if not this.dry:
        torch.cuda.empty_cache()


class Made(NamedTuple):
    """A method made ready, and the memory of a step."""

    method: Method
    step: Step
    peak: int | None


def _measure(this: Stage, name: str, made: list[Made], shown: list[Made]) -> None:
    """Time them in turn; a row for each of those that are shown."""
    timed = time_all(
        {one.method.name: one.step.run for one in made},
        sets=1,
        device=this.device,
        rounds=ROUNDS,
        capture=False,
        sample=SAMPLE,
    )
    times = {method: sample.row() for method, sample in timed.items()}
    peaks = {one.method.name: one.peak for one in made}
    for one in shown:
        this.add("steps", _row(this, name, one.method, times, peaks))
        _profile(this, name, one)


def _profile(this: Stage, name: str, one: Made) -> None:
    """The step's kernels, in a section of their own."""
    label = f"{name}, {one.method.name}: profile"
    found = this.attempt(label, lambda: profile.kernels(one.step.run, this.device))
    rows = [{"network": name, "method": one.method.name, **row} for row in found or ()]
    this.add("kernels", *rows)


def _measure_others(this: Stage, name: str) -> None:
    """Each of the methods that are not among the first on their own beside its baseline."""
    methods = {method.name: method for method in _methods(name, this.dry)}
    done = FIRST if name in BARRED else frozenset[str]()
    for against in (BACKPROP, COMPILED):
        others = [m for m in methods.values() if _against(m) == against and m.name not in {*done, against}]
        if against not in methods or (against in done and not others):
            continue
        base = _all_made(this, name, [methods[against]])
        if base and against not in done:
            _measure(this, name, base, base)
        for method in this.each(others, lambda method: f"{name}, {method.name}", least=6):
            made = _all_made(this, name, [method])
            _measure(this, name, [*base, *made], made)


def _all_made(this: Stage, name: str, methods: list[Method]) -> list[Made]:
    """Those of the methods that run here."""
    found = []
    for method in methods:
        label = f"{name}, {method.name}"
        step = this.attempt(label, lambda method=method: _ready(this.device, this.dry, name, method))
        if step is not None:
            peak = this.attempt(f"{label}: memory", lambda step=step: _peak(this, step))
            found.append(Made(method, step, peak))
    return found


def _against(method: Method) -> str:
    return COMPILED if method.compiled else BACKPROP


def calls(device: torch.device, dry: bool) -> Iterator[Callable[[], object]]:
    """One step of every method that launches kernels of ours: what has to be compiled."""
    # a dry run's other networks run without the interpreter
    for name in [DRY_NETWORK] if dry else NETWORKS:
        for method in _methods(name):
            if not method.compiled and method.rule is not None and method.baseline is None:
                yield lambda name=name, method=method: _ready(device, dry, name, method)


def _methods(network: str, dry: bool = False) -> list[Method]:
    """All that can train it; in a dry run a few where the interpreter does not run."""
    few = dry and network != DRY_NETWORK
    return [method for method in METHODS if method.trains(network) and (not few or method.name in _DRY)]


def _row(
    this: Stage,
    name: str,
    method: Method,
    rows: dict[str, dict[str, Any]],
    memory: dict[str, int | None],
) -> dict[str, Any]:
    """One line of the table: time and peak memory, and both as multiples of the baseline's."""
    network = NETWORKS[name]
    batch = 2 if this.dry else network.batch
    against = _against(method)
    own, base = rows[method.name], rows.get(against, {})
    peak, base_peak = memory.get(method.name), memory.get(against)
    return {
        "network": name,
        "batch": batch,
        "method": method.name,
        "against": against,
        **own,
        "ratio": own["us"] / base["us"] if "us" in own and "us" in base else None,
        "images_per_second": batch / own["us"] * 1e6 if "us" in own else None,
        "bar": network.bar if method.name == SOFTMAX_STEP else None,
        "peak_bytes": peak,
        "peak_ratio": peak / base_peak if peak and base_peak else None,
    }


def _ready(device: torch.device, dry: bool, name: str, method: Method) -> Step:
    """The method's step on data of its own, run once."""
    torch.manual_seed(0)
    network, full = NETWORKS[name], steps.NETWORKS[name]
    model = (network.small if dry else full.build)().to(device)
    model = method.prepare(model.to(memory_format=torch.channels_last), full.sums_at)
    batch, size = (2, network.small_size) if dry else (network.batch, full.size)
    x = torch.randn(batch, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
    target = torch.randint(10 if dry else full.classes, (batch,), device=device)
    if method.local is None:
        optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)
        # Inductor needs a compiler on a CPU; a dry run checks the graph, not its code
        compiler = "eager" if dry else "inductor"
        body = training.training_step(method, model, x, target, optimizer, compiler)
    else:
        body = functools.partial(method.local, model, x, LR)

    def step(_: int) -> object:
        with torch.autocast(x.device.type, torch.bfloat16):
            return body()

    step(0)
    return Step(model, step)


def _peak(this: Stage, step: Step) -> int | None:
    """Most bytes allocated during one step beyond weights, buffers and momenta; None on a CPU."""
    if this.dry:
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step.run(0)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def warm(out: pathlib.Path, name: str, number: str) -> int:
    """Run one of a network's first methods once, so that its code is in the caches."""
    this = Stage(f"warm-{name}-{number}", stage.Options(out))
    method = [method for method in METHODS if method.name in FIRST][int(number)]
    this.attempt(f"{name}, {method.name}", lambda: _ready(this.device, this.dry, name, method))
    return this.finish()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--warm"]:
        sys.exit(warm(pathlib.Path(sys.argv[4]), sys.argv[2], sys.argv[3]))
    sys.exit(stage.main("steps", run))
