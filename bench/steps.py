"""Training steps and local passes on a CPU, every method on every network, against a backprop step.

Each method's first step is compared with the float64 reference before it is timed: its weights have to
change by lr |H| (by lr H where nothing is gated). All methods on a network share one set of weights, which
is put back before every run; they are timed in turn, round by round.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

import ghl_kernels as ghl
from bench import parity
from bench.failures import guarded, reason
from bench.interleave import Candidate, Spread, Timing, interleave, pinned_threads
from bench.report import Bar, Row
from bench.training import (
    AUTHORS,
    SOFTHEBB,
    Method,
    by_learning,
    by_rule,
    dense_passes,
    learning_layers,
    needs,
    training_step,
)
from bench.work import Work
from examples.models import MODELS, VGG
from ghl_kernels.demo.memory import peak_bytes

if TYPE_CHECKING:
    from rich.progress import Progress

SEED = 0
LR = 0.01
BACKPROP = "backprop"
_WARMUP = 1
_LEAST_ROUNDS = 3

SOFTMAX = ghl.HebbianRule.ghl()
_WINNERS = {f"winners={fraction}": ghl.HebbianRule.kwta(fraction) for fraction in (0.02, 0.004)}


class Network(NamedTuple):
    """A network and the batch on which a backprop step takes about a second on two cores.

    ``sums_at`` is where the sums of a softmax rule take the least memory: "backward" where batch norm
    keeps the responses anyway.
    """

    build: Callable[[], nn.Module]
    batch: int
    size: int = 32
    classes: int = 10
    sums_at: str = "forward"


NETWORKS = {
    "DeepHebb": Network(MODELS["deephebb"], 32),
    "FastHebb": Network(MODELS["fasthebb"], 64),
    # no bias, which the authors' algorithm does not have
    "VGG-16": Network(functools.partial(VGG, bias=False), 1, 224, 1000),
    "ResNet-18": Network(MODELS["resnet18"], 4, 224, 1000, "backward"),
    "ResNet-20": Network(MODELS["resnet20"], 64, sums_at="backward"),
    "ResNet-50": Network(MODELS["resnet50"], 4, 224, 1000, "backward"),
}

METHODS = {
    method.name: method
    for method in (
        Method(BACKPROP, baseline="B0"),
        Method("backprop, compiled", compiled=True, baseline="B0"),
        by_rule("GHL softmax", SOFTMAX),
        by_rule("GHL softmax, gate_at=step", SOFTMAX, gate_at="step"),
        by_rule("GHL softmax, compiled", SOFTMAX, compiled=True),
        AUTHORS,
        by_learning("learn_ softmax", SOFTMAX),
        *(
            method
            for winners, rule in _WINNERS.items()
            for method in (
                by_rule(f"GHL {winners}", rule),
                by_rule(f"GHL {winners}, gate_at=step", rule, gate_at="step"),
                by_learning(f"learn_ {winners}", rule),
            )
        ),
        by_learning("learn_ softhebb", ghl.HebbianRule.softhebb()),
        SOFTHEBB,
    )
}

# Cost as a multiple of a backprop step.
BARS = {
    ("DeepHebb", "GHL softmax"): Bar(1.42),
    ("DeepHebb", "GHL winners=0.02"): Bar(1.10),
    ("DeepHebb", "learn_ softmax"): Bar(0.75),
    ("DeepHebb", "learn_ winners=0.02"): Bar(0.45),
}


class MemoryCase(NamedTuple):
    """A network, its batch and a way to train it, and what its peak may be as a multiple of backprop's."""

    network: str
    batch: int
    method: str
    bar: Bar | None = None

    @property
    def is_small(self) -> bool:
        """Whether its images are: a step takes no more than a few seconds."""
        return NETWORKS[self.network].size <= 32


MEMORY = (
    MemoryCase("DeepHebb", 64, "GHL softmax", Bar(1.15)),
    MemoryCase("DeepHebb", 64, "GHL winners=0.02", Bar(1.02)),
    MemoryCase("DeepHebb", 64, AUTHORS.name),
    MemoryCase("ResNet-20", 64, "GHL softmax", Bar(1.02)),
    MemoryCase("ResNet-20", 64, "GHL winners=0.02", Bar(1.02)),
    *(
        MemoryCase(network, batch, method)
        for network, batch in (("FastHebb", 64), ("VGG-16", 4), ("ResNet-18", 8))
        for method in ("GHL softmax", "GHL winners=0.02")
    ),
)


class Limits(NamedTuple):
    """Timed steps of each method at most, torch's threads, and seconds for all steps together (None: any)."""

    rounds: int
    threads: int
    seconds: float | None = None


class Workload:
    """A network, its batch (B, 3, size, size) with labels (B,), and the weights that all methods start from.

    Args:
        network: what is trained.
        batch: in place of the network's.
    """

    def __init__(self, network: Network, batch: int | None = None) -> None:
        self.network = network
        self.batch = batch or network.batch
        torch.manual_seed(SEED)
        self.x = torch.randn(self.batch, 3, network.size, network.size)
        self.target = torch.randint(network.classes, (self.batch,))
        self._model = network.build()
        self._initial = {name: tensor.clone() for name, tensor in self._model.state_dict().items()}
        self.passes = dense_passes(self._model, self.x)

    @functools.cached_property
    def updates(self) -> parity.Updates:
        """The reference's first step."""
        self._restore(self._model)
        return parity.Updates(self._model, self.x, self.target)

    def prepare(self, method: Method) -> Trainee:
        """A model of the method's own on the shared weights; its ``reset`` puts them back."""
        memo = {id(p): nn.Parameter(p.detach()) for p in self._model.parameters()}
        model = method.prepare(copy.deepcopy(self._model, memo), self.network.sums_at)
        if method.local is None:
            optimizer = torch.optim.SGD(model.parameters(), lr=LR)
            run = training_step(method, model, self.x, self.target, optimizer)
        else:
            run = functools.partial(method.local, model, self.x, LR)
        return Trainee(method, model, Candidate(method.name, run, lambda: self._restore(model)))

    def check(self, trainee: Trainee) -> None:
        """Compare the first step with the reference; one without a rule, with the gradient's own.

        Raises:
            ParityError: it is another one.
        """
        method, (run, reset) = trainee.method, (trainee.candidate.run, trainee.candidate.reset)
        reset()
        if method.rule is None:
            parity.check_descent(run, trainee.model, self.updates, LR)
        else:
            layers = learning_layers(trainee.model).items()
            signed = method.local is not None
            parity.check_update(run, layers, self.updates, method.rule, LR, signed=signed)

    def needs(self, trainee: Trainee) -> Work:
        """What a step of it has to multiply and add, and to move."""
        return needs(trainee.method, self.passes, set(learning_layers(trainee.model)))

    @torch.no_grad()
    def _restore(self, model: nn.Module) -> None:
        for name, tensor in model.state_dict().items():
            tensor.copy_(self._initial[name])


class Trainee(NamedTuple):
    """A method made ready on a workload."""

    method: Method
    model: nn.Module
    candidate: Candidate

    def peak(self) -> int:
        """Most bytes held during a step beyond weights, buffers and the batch."""
        self.candidate.reset()
        self.candidate.run()  # the first step allocates what every later one finds in place
        return peak_bytes(self.candidate.run)


def suite_of(method: Method) -> str:
    """ "step" or "local"."""
    return "step" if method.local is None else "local"


def step_rows(
    network: str,
    methods: Sequence[str],
    limits: Limits,
    progress: Progress,
    ceilings: Mapping[str, float] | None = None,
) -> list[Row]:
    """Check, time and weigh some methods on a network, against an eager backprop step of the same rounds.

    Args:
        network: a name of ``NETWORKS``.
        methods: names of ``METHODS``; "backprop" takes part whether named or not.
        limits: of the timing; at least three rounds are timed.
        progress: gets a task that counts every preparation and run.
        ceilings: of bench.ceilings, for the floor; None: rows have none.

    Returns:
        A row for each method, backprop first; where a method could not be timed, with the reason.

    Raises:
        ValueError: an unknown network or method.
    """
    chosen = _chosen(network, methods)
    task = progress.add_task(f"{network}, training steps", total=len(chosen))
    torch._dynamo.reset()  # a compiler keeps few models of one class, and needs none of the last network's
    rows: dict[str, Row] = {}
    ready: dict[str, Trainee] = {}
    with pinned_threads(limits.threads):  # compiled code has the number of threads built in
        workload = Workload(NETWORKS[network])
        for method in chosen:
            row, trainee = _ready(network, workload, method)
            rows[method.name] = row
            if trainee is not None:
                ready[method.name] = trainee
            progress.advance(task)
        del workload.updates  # as large as the model, several times over
        peaks = {name: trainee.peak() for name, trainee in ready.items()}
        timings = _time(list(ready.values()), limits, f"{network}, rounds", progress)
    counted = {name: workload.needs(trainee) for name, trainee in ready.items()}
    for name, timing in timings.items():
        rows[name] = dataclasses.replace(
            rows[name],
            **_measured(timing, workload.batch),
            **_floor(counted[name], counted[BACKPROP], ceilings or {}, METHODS[name].note),
            peak_ratio=peaks[name] / peaks[BACKPROP],
        )
    return list(rows.values())


def _time(ready: Sequence[Trainee], limits: Limits, label: str, progress: Progress) -> dict[str, Timing]:
    """Steps in turn, in as many rounds as there is time for."""
    candidates = [trainee.candidate for trainee in ready]
    rounds = limits.rounds
    if limits.seconds is not None:
        start = time.perf_counter()
        for candidate in candidates:
            candidate.reset()
            candidate.run()
        once = time.perf_counter() - start
        rounds = min(rounds, max(_LEAST_ROUNDS, int(limits.seconds / once)))
    task = progress.add_task(label, total=len(ready) * (_WARMUP + rounds))
    return interleave(
        candidates,
        rounds=rounds,
        threads=limits.threads,
        warmup=_WARMUP,
        on_run=lambda: progress.advance(task),
    )


def memory_rows(progress: Progress, cases: Sequence[MemoryCase] = MEMORY) -> list[Row]:
    """Peak memory of a training step; exact and repeatable, so each is run once."""
    task = progress.add_task("peak memory", total=len(cases))
    rows = []
    for (network, batch), group in itertools.groupby(cases, key=lambda case: (case.network, case.batch)):
        workload = functools.cache(lambda n=network, b=batch: Workload(NETWORKS[n], b))
        backprop = functools.cache(lambda w=workload: w().prepare(METHODS[BACKPROP]).peak())
        for case in group:
            label = f"{network} B={batch}"
            rows += guarded("memory", label, functools.partial(_memory_row, case, label, workload, backprop))
            progress.advance(task)
    return rows


def _memory_row(
    case: MemoryCase, label: str, workload: Callable[[], Workload], backprop: Callable[[], int]
) -> list[Row]:
    method, base = METHODS[case.method], backprop()
    peak = workload().prepare(method).peak()
    row = Row(
        suite="memory",
        case=label,
        name=case.method,
        against=BACKPROP,
        ratio=Spread.of([peak / base]),
        bar=case.bar,
        stable=True,
        baseline=method.baseline,
        auto=_is_auto(method),
        rule=method.rule_name,
        peak_ratio=peak / base,
        note=f"{peak / 2**20:.0f} MiB, backprop {base / 2**20:.0f} MiB",
    )
    return [row]


def _is_auto(method: Method) -> bool:
    """A converted model as it is run by default."""
    return method.baseline is None and not method.compiled and method.gate_at == "backward"


def _chosen(network: str, methods: Sequence[str]) -> list[Method]:
    """In the order of ``METHODS``, which keeps together those of one rule."""
    if network not in NETWORKS:
        raise ValueError(f"network must be one of {list(NETWORKS)}, got {network!r}")
    unknown = [name for name in methods if name not in METHODS]
    if unknown:
        raise ValueError(f"methods must be among {list(METHODS)}, got {unknown}")
    wanted = {BACKPROP, *methods}
    return [method for name, method in METHODS.items() if name in wanted and method.trains(network)]


def _ready(network: str, workload: Workload, method: Method) -> tuple[Row, Trainee | None]:
    """The method's row without a time, and the method itself if it is here and right."""
    row = Row(
        suite=suite_of(method),
        case=f"{network} B={workload.batch}, {workload.network.size} x {workload.network.size}",
        name=method.name,
        against=BACKPROP,
        bar=BARS.get((network, method.name)),
        stable=method.baseline is None and not method.compiled,
        baseline=method.baseline,
        auto=_is_auto(method),
        rule=method.rule_name,
    )
    compiler = os.environ.get("CXX", "g++")  # as Inductor chooses it
    if method.compiled and shutil.which(compiler) is None:
        return dataclasses.replace(row, note=f"absent: torch.compile needs the C++ compiler {compiler}"), None
    try:
        trainee = workload.prepare(method)
        workload.check(trainee)
    except Exception as error:  # whatever is wrong with one method, the others go on
        if method.name == BACKPROP:
            raise
        return dataclasses.replace(row, error=reason(error)), None
    return row, trainee


def _measured(timing: Timing, batch: int) -> dict[str, Any]:
    seconds = Spread.of(timing.seconds)
    return {
        "ratio": timing.cost,
        "seconds": seconds,
        "against_seconds": Spread.of(timing.baseline),
        "images_per_second": batch / seconds.median,
    }


def _floor(own: Work, backprop: Work, ceilings: Mapping[str, float], note: str | None) -> dict[str, Any]:
    """Operations and bytes of a step and the time they take at least."""
    arithmetic = f"{own.operations / backprop.operations:.2f}x the arithmetic"
    return {
        "operations": own.operations,
        "bytes": own.bytes,
        "floor_seconds": own.floor_seconds(ceilings, "fp32"),
        "note": f"{arithmetic}; {note}" if note else arithmetic,
    }
