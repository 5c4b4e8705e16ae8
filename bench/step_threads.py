"""How a training step of DeepHebb gains from threads, by backpropagation and by rule.

A part of ``python -m ghl_kernels bench --suite scaling``; ``python -m bench.step_threads`` measures it alone.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from bench.interleave import Candidate, Spread, interleave, pinned_threads
from bench.report import Row
from bench.steps import METHODS, NETWORKS, Workload
from ghl_kernels.demo.arguments import positive

if TYPE_CHECKING:
    from rich.progress import Progress

NETWORK = "DeepHebb"
STEPS = ("backprop", "GHL softmax", "GHL winners=0.02", "learn_ softmax")
_ROUNDS = 7  # a step on one thread takes seconds


def thread_counts(most: int) -> list[int]:
    """Powers of two up to ``most``, and ``most``."""
    return sorted({1 << i for i in range(most.bit_length())} | {most})


def rows(options: argparse.Namespace, progress: Progress) -> list[Row]:
    """Speedup over one thread, each method by itself; every step starts from the same weights."""
    workload = Workload(NETWORKS[NETWORK])
    found = []
    task = progress.add_task("training step, threads", total=len(STEPS))
    for name in STEPS:
        trainee = workload.prepare(METHODS[name])
        workload.check(trainee)
        found += _method_rows(name, trainee.candidate, min(options.rounds, _ROUNDS))
        progress.advance(task)
    return found


def _method_rows(name: str, step: Candidate, rounds: int) -> list[Row]:
    def reset(threads: int) -> Callable[[], None]:
        def run() -> None:
            torch.set_num_threads(threads)
            step.reset()

        return run

    counts = thread_counts(os.cpu_count() or 1)
    timings = interleave(
        [Candidate(f"threads={n}", step.run, reset(n)) for n in counts], rounds=rounds, threads=1, warmup=1
    )
    base = timings["threads=1"]
    return [
        Row(
            suite="scaling",
            name=f"{NETWORK} step, {name}",
            case=case,
            against="threads=1",
            ratio=timing.speedup,
            speedup=True,
            seconds=Spread.of(timing.seconds),
            against_seconds=Spread.of(base.seconds),
            note=f"times faster, parallel efficiency {timing.speedup.median / n:.0%}",
        )
        for n, (case, timing) in zip(counts, timings.items(), strict=True)
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    from rich.console import Console  # the rest is used where there may be no rich
    from rich.progress import Progress

    from bench import tables

    parser = argparse.ArgumentParser(
        prog="python -m bench.step_threads",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--rounds", type=positive, default=_ROUNDS, help="timed rounds, at most %(default)s (the default)"
    )
    options = parser.parse_args(arguments)
    with pinned_threads(torch.get_num_threads()), Progress(console=Console(stderr=True)) as progress:
        found = rows(options, progress)
    tables.print_rows(Console(), found)


if __name__ == "__main__":
    main()
