"""Every ratio beside its bar, in one table: ``python -m bench.ratios`` from the repository root.

    step     a training step against backprop: GHL by rule, and the authors' algorithm
    local    a pass with ``learn_`` (no backward) against a backprop step
    kwta     k-WTA over channels against torch.topk + scatter, both memory formats
    memory   peak memory of a training step against backprop's

Times are medians of per-round ratios (bench/interleave.py). What is timed is first compared with the
float64 reference, so a speed is never printed for a wrong result.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

import ghl_kernels as ghl
from bench import parity, report
from bench.baselines import topk, unfold
from bench.interleave import Candidate, Spread, Timing, interleave, pinned_threads
from bench.models import DeepHebb, ResNet
from bench.report import Bar, Row
from bench.steps import METHODS, SEED, SOFTMAX, WINNERS, backprop, images, training_step
from ghl_kernels.demo.memory import peak_bytes

SUITES = ("step", "local", "kwta", "memory")


def step_rows(suites: Sequence[str], options: argparse.Namespace, progress: Progress) -> list[Row]:
    """The suites that share the backprop step as their baseline, in one interleaving."""
    x, target = images(32)
    judged = {name: method for name, method in METHODS.items() if method.suite in suites}
    candidates = [backprop(x, target), *(method.build(name, x, target) for name, method in judged.items())]
    timings = _measure(candidates, "DeepHebb B=32", options, progress)
    against = f"backprop step, {timings['backprop'].milliseconds.median:.0f} ms"
    return [
        Row(method.suite, name, against, timings[name].cost, _ms(timings[name]), method.bar)
        for name, method in judged.items()
    ]


def kwta_rows(options: argparse.Namespace, progress: Progress) -> list[Row]:
    """k-WTA on (32, 384, 16, 16), k = 8."""
    rows = []
    for label, memory_format in (("NCHW", torch.contiguous_format), ("channels_last", torch.channels_last)):
        generator = torch.Generator().manual_seed(SEED)
        u = torch.randn(32, 384, 16, 16, generator=generator).to(memory_format=memory_format)
        ours, rival = f"kwta {label}", f"topk + scatter {label}"
        parity.assert_close(
            ours, ghl.functional.kwta(u, 8, dim=1), ghl.reference.kwta(u, 8, dim=1), tolerance=0.0
        )
        parity.assert_close(rival, topk.kwta_topk(u, 8), ghl.reference.kwta(u, 8, dim=1), tolerance=0.0)
        timings = _measure(
            [
                Candidate(rival, lambda u=u: topk.kwta_topk(u, 8)),
                Candidate(ours, lambda u=u: ghl.functional.kwta(u, 8, dim=1)),
            ],
            ours,
            options,
            progress,
        )
        against = f"topk + scatter, {timings[rival].milliseconds.median:.1f} ms (x = times faster)"
        rows.append(
            Row("kwta", ours, against, timings[ours].speedup, _ms(timings[ours]), Bar(8.0, at_least=True))
        )
    return rows


class MemoryCase(NamedTuple):
    """A model and a way to train it, and what its peak may be as a multiple of backprop's."""

    model: type[nn.Module]
    name: str
    prepare: Callable[[nn.Module], nn.Module]
    finish: Callable[[nn.Module], None] = lambda model: None
    bar: Bar | None = None


MEMORY = (
    MemoryCase(DeepHebb, "GHL softmax", lambda model: ghl.convert(model, SOFTMAX), bar=Bar(1.15)),
    MemoryCase(DeepHebb, "GHL winners=0.02", lambda model: ghl.convert(model, WINNERS), bar=Bar(1.02)),
    MemoryCase(DeepHebb, "authors' algorithm (unfold)", unfold.convert, unfold.gate_),
    MemoryCase(
        ResNet,
        "GHL softmax, sums_at='backward'",
        lambda model: ghl.convert(model, SOFTMAX, sums_at="backward"),
        bar=Bar(1.02),
    ),
)


def memory_rows(progress: Progress) -> list[Row]:
    """Peak memory of one training step at B = 64; exact and repeatable, so each is run once."""
    baselines = dict.fromkeys((case.model for case in MEMORY), 0)
    task = progress.add_task("peak memory, B=64", total=len(baselines) + len(MEMORY))
    for model in baselines:
        baselines[model] = step_peak(model())
        progress.advance(task)
    rows = []
    for case in MEMORY:
        peak, backprop_peak = step_peak(case.prepare(case.model()), case.finish), baselines[case.model]
        ratio = Spread.of([peak / backprop_peak])
        name = f"{case.model.__name__} B=64, {case.name}"
        rows.append(Row("memory", name, f"backprop, {_mib(backprop_peak)}", ratio, _mib(peak), case.bar))
        progress.advance(task)
    return rows


def step_peak(model: nn.Module, finish: Callable[[nn.Module], None] = lambda model: None) -> int:
    """Most bytes held during a training step beyond weights, buffers and the batch."""
    step = training_step(model, *images(64), finish)
    step()  # the first step allocates what every later one finds in place
    model.zero_grad()  # gradients that are there before the step would not count
    return peak_bytes(step)


def _measure(
    candidates: Sequence[Candidate],
    label: str,
    options: argparse.Namespace,
    progress: Progress,
    warmup: int = 2,
) -> dict[str, Timing]:
    task = progress.add_task(label, total=len(candidates) * (options.rounds + warmup))
    return interleave(
        candidates,
        rounds=options.rounds,
        threads=options.threads,
        warmup=warmup,
        on_run=lambda: progress.advance(task),
    )


def _mib(count: int) -> str:
    return f"{count / 2**20:.0f} MiB"


def _ms(timing: Timing) -> str:
    return f"{timing.milliseconds.median:.1f} ms"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.ratios", description="Every ratio beside its bar.")
    parser.add_argument("--rounds", type=_positive, default=25, help="timed rounds (default 25)")
    parser.add_argument("--threads", type=_positive, default=2, help="torch threads (default 2)")
    parser.add_argument(
        "--only", choices=SUITES, nargs="+", default=list(SUITES), metavar="SUITE", help=", ".join(SUITES)
    )
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="also write the rows to FILE")
    return parser.parse_args(arguments)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write the JSON if asked to."""
    options = parse(arguments)
    # a table that is piped or logged must not be cut to 80 columns
    console = Console() if sys.stdout.isatty() else Console(width=150)
    rows: list[Row] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress, pinned_threads(options.threads):
        if {"step", "local"} & set(options.only):
            rows += step_rows(options.only, options, progress)
        if "kwta" in options.only:
            rows += kwta_rows(options, progress)
        if "memory" in options.only:
            rows += memory_rows(progress)
    machine = report.environment()
    console.print(report.table(rows))
    console.print(
        f"{machine['cpu']}, {options.threads} threads, {options.rounds} rounds, torch {machine['torch']}, "
        f"commit {machine['commit']}{' with uncommitted changes' if machine['uncommitted_changes'] else ''}"
    )
    if options.json is not None:
        settings = {"threads": options.threads, "rounds": options.rounds, "suites": options.only}
        report.write_json(options.json, rows, settings)


if __name__ == "__main__":
    main()
