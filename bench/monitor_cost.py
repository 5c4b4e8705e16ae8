"""What a Monitor costs: ``python -m bench.monitor_cost`` from the repository root.

A training step of a network is timed without a monitor, with one that does not observe it, and with one
that does, in interleaved rounds. The differences are smaller than the noise of a busy machine, so the time
inside the monitor's own calls is taken as well, and is what the average over many steps is made of. With
``--threads 1`` the time is the processor's.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import inspect
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import ghl_kernels as ghl
from bench import machine, steps
from bench.interleave import Candidate, Spread, interleave
from bench.steps import METHODS, Network, Workload
from examples.models import MODELS
from ghl_kernels._probe import Probe
from ghl_kernels.demo.arguments import positive

EVERY = inspect.signature(ghl.Monitor).parameters["every"].default
# Many layers of little work each: what a layer costs is the largest share of a step there.
NETWORKS = steps.NETWORKS | {"ResNet-110": Network(MODELS["resnet110"], 4, sums_at="backward")}
_NEVER = sys.maxsize
_WARMUP = 2
# In step mode the second of the last two runs inside the first.
_CALLS = ("observe_responses", "gate_arguments", "observe_rule", "measure_rule")


class Stopwatch:
    """Seconds inside the probes' calls; calls within calls count once.

    Args:
        clock: seconds, read before and after every call.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.seconds = 0.0
        self._clock = clock
        self._depth = 0

    def timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def run(*args: Any) -> Any:
            start = self._clock()
            self._depth += 1
            try:
                return call(*args)
            finally:
                self._depth -= 1
                if self._depth == 0:
                    self.seconds += self._clock() - start

        return run

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Every probe's calls are timed inside the block."""
        with contextlib.ExitStack() as stack:
            for name in _CALLS:
                stack.enter_context(mock.patch.object(Probe, name, self.timed(getattr(Probe, name))))
            yield

    def share_of(self, run: Callable[[], object], shares: list[float]) -> Callable[[], None]:
        """``run``, which also notes the time inside the calls as a share of the time outside them."""

        def measured() -> None:
            self.seconds, start = 0.0, self._clock()
            run()
            elapsed = self._clock() - start
            shares.append(self.seconds / (elapsed - self.seconds))

        return measured


class Cost(NamedTuple):
    """Milliseconds of a plain step; an observed one by the clock, and shares of a step inside the calls."""

    plain: float
    observed: Spread
    unobserved_inside: Spread
    observed_inside: Spread

    @property
    def average(self) -> float:
        """Share of a step, where every EVERY-th is observed."""
        return ((EVERY - 1) * self.unobserved_inside.median + self.observed_inside.median) / EVERY


def cost(network: str, method: str, options: argparse.Namespace, progress: Progress) -> Cost:
    """Measure one method on one network."""
    clock = _clock(options.threads)
    workload, stopwatch = Workload(NETWORKS[network], options.batch), Stopwatch(clock)
    plain = workload.prepare(METHODS[method]).candidate
    candidates: list[Candidate] = [plain]
    monitors: list[ghl.Monitor] = []
    shares: list[list[float]] = []
    for name, every in (("unobserved", _NEVER), ("observed", 1)):
        trainee = workload.prepare(METHODS[method])
        monitors.append(ghl.Monitor(trainee.model, every))
        shares.append([])
        run, reset = trainee.candidate.run, trainee.candidate.reset
        candidates.append(Candidate(name, stopwatch.share_of(run, shares[-1]), reset))
    runs = options.rounds + _WARMUP
    task = progress.add_task(f"{network}, {method}", total=len(candidates) * runs)
    with stopwatch.installed():
        timings = interleave(
            candidates,
            rounds=options.rounds,
            threads=options.threads,
            warmup=_WARMUP,
            clock=clock,
            on_run=lambda: progress.advance(task),
        )
    gates = [{reading.gates for reading in monitor.read().values()} for monitor in monitors]
    assert gates == [{1}, {runs}], f"observed {gates} of {runs} steps"
    inside = [Spread.of(share[_WARMUP:]) for share in shares]
    return Cost(timings[plain.name].milliseconds.median, timings["observed"].cost, *inside)


def _clock(threads: int) -> Callable[[], float]:
    """The time of a single thread leaves other programs out; of several, only the clock on the wall tells."""
    return time.thread_time if threads == 1 else time.perf_counter


def _conditions(threads: int) -> str:
    found = machine.describe(torch.device("cpu"))
    cpu, version = found["machine"]["cpu"], found["versions"]["torch"]
    return f"{cpu} ({found['instruction_set']}), threads: {threads}, torch {version}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m bench.monitor_cost", description=__doc__.splitlines()[0])
    parser.add_argument("--network", choices=NETWORKS, nargs="+", default=["DeepHebb", "ResNet-110"])
    methods = [name for name, method in METHODS.items() if method.rule and not method.compiled]
    parser.add_argument("--method", choices=methods, nargs="+", default=["GHL softmax", "GHL winners=0.02"])
    parser.add_argument("--batch", type=positive, help="images in a step (default: the network's)")
    parser.add_argument("--rounds", type=positive, default=15, help="timed rounds (default 15)")
    parser.add_argument("--threads", type=positive, default=2, help="torch threads (default 2)")
    options = parser.parse_args(arguments)
    out = Table(title=f"Cost of a Monitor, {options.rounds} rounds", caption=_conditions(options.threads))
    out.add_column("step")
    for heading in ("plain", "observed / plain", "unobserved", "observed", f"average, every {EVERY}"):
        out.add_column(heading, justify="right", no_wrap=True)
    with Progress(console=Console(stderr=True)) as progress:
        for network in options.network:
            for method in options.method:
                found = cost(network, method, options, progress)
                out.add_row(
                    f"{network}, {method}",
                    f"{found.plain:.1f} ms",
                    f"{found.observed.median:.3f}x ({found.observed.p20:.3f} - {found.observed.p80:.3f})",
                    f"{found.unobserved_inside.median:.4%}",
                    f"{found.observed_inside.median:.2%}",
                    f"{found.average:.3%}",
                )
    Console(width=None if sys.stdout.isatty() else 130).print(out)


if __name__ == "__main__":
    main()
