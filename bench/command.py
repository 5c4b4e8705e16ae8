"""``python -m ghl_kernels bench``: measure, print, draw, keep, compare."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from bench import ceilings, figures, machine, overhead, race, races, ratios, report, scaling, steps, tables
from bench.baselines import BASELINES
from bench.compare import MARGIN, compare
from bench.gpu import ceilings as gpu_ceilings
from bench.interleave import pinned_threads
from bench.race import Target
from bench.report import Row
from ghl_kernels.demo.arguments import positive
from ghl_kernels.demo.errors import UserError

DESCRIPTION = """\
Time every operation and training step against what users would pick instead, and against the floor of this
machine: max(bytes / copy bandwidth, operations / matrix rate), both measured in the same run.

Only ratios of things timed in turn are printed, and only after every result has been compared with the
float64 reference in the same run. Run on an otherwise idle machine.
"""
EPILOG = """\
examples:
  python -m ghl_kernels bench --quick
  python -m ghl_kernels bench --suite ratios
  python -m ghl_kernels bench --suite kwta delta --baseline B1 B4 --json out.json --out figures
  python -m ghl_kernels bench --quick --compare bench/results/quick-baseline.json
"""
QUICK_NETWORKS = ("FastHebb",)
QUICK_METHODS = ("backprop", "GHL softmax", "GHL winners=0.02", "learn_ softmax", "learn_ winners=0.02")
FEWER_ROUNDS = 9  # of the steps of networks that have no bar; one takes a second
Measure = Callable[["Run", str], list[Row]]


@dataclasses.dataclass
class Run:
    """One run of the benchmark: its options, the machine's ceilings, and the bar that shows how far it is."""

    options: argparse.Namespace
    ceilings: Mapping[str, float]
    progress: Progress

    @property
    def limits(self) -> race.Options:
        """How long and with what the races are measured."""
        options = self.options
        return race.Options(
            rounds=options.rounds,
            threads=options.threads,
            target=Target.of(options.device, options.quick),
            baselines=frozenset(options.baseline) if options.baseline else None,
            seconds=options.seconds,
        )

    def races(self, suite: str) -> list[Row]:
        """The rows of a suite of races."""
        entered = list(races.SUITES[suite](self.limits.target))
        task = self.progress.add_task(suite, total=len(entered))
        rows = []
        for one in entered:
            self.progress.update(task, description=f"{suite}: {one.case}")
            rows += race.measure(one, self.limits, self.ceilings)
            self.progress.advance(task)
        self.progress.update(task, description=suite)
        return rows

    def steps(self, suite: str) -> list[Row]:
        """Training steps and local passes: in one interleaving where both are asked for."""
        options = self.options
        asked = [name for name in ("step", "local") if name in options.suite]
        if suite != asked[0]:
            return []
        methods = [
            name
            for name, method in steps.METHODS.items()
            if ("local" if method.local else "step") in asked and (not options.quick or name in QUICK_METHODS)
        ]
        rows = []
        for network in QUICK_NETWORKS if options.quick else steps.NETWORKS:
            rounds = options.rounds if network == ratios.NETWORK else min(options.rounds, FEWER_ROUNDS)
            rows += steps.step_rows(network, methods, rounds, options.threads, self.progress, self.ceilings)
        return rows


_SUITES: dict[str, Measure] = {
    **dict.fromkeys(races.SUITES, Run.races),
    "step": Run.steps,
    "local": Run.steps,
    "memory": lambda run, suite: steps.memory_rows(run.progress),
    "scaling": lambda run, suite: scaling.scaling_rows(run.options, run.progress),
    "overhead": lambda run, suite: overhead.overhead_rows(run.options, run.progress),
    "ratios": lambda run, suite: ratios.rows(run.limits, run.ceilings, run.progress),
}
_CPU_ONLY = ("step", "local", "memory", "ratios")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; 1 if a contender of this package failed or a compared ratio got worse.

    Raises:
        UserError: an option that does not fit this machine, or a file that cannot be read or written.
    """
    options = parse(arguments)
    before = _read(options.compare) if options.compare else None
    torch.manual_seed(0)
    clocks = {"before": machine.clocks()}
    start = time.perf_counter()
    with pinned_threads(options.threads):
        rows, limits = _measure(options)
    clocks["after"] = machine.clocks()
    described = machine.describe(options.device) | {"ceilings": limits, "clocks": clocks}
    console = Console()
    tables.print_rows(console, rows)
    console.print(_summary(described, options, time.perf_counter() - start), soft_wrap=True, highlight=False)
    with _writing():
        _write(options, rows, described, console)
    failed = [row for row in rows if row.is_ours and row.error]
    for row in failed:
        console.print(f"FAILED: {row.suite}, {row.case}, {row.name}: {row.error}", soft_wrap=True)
    worse = False
    if before is not None:
        comparison = compare(rows, before.rows, options.margin)
        console.print(f"Against {options.compare}: {comparison}", soft_wrap=True, highlight=False)
        worse = comparison.failed
    return int(bool(failed) or worse)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, with what depends on --quick filled in.

    Raises:
        UserError: --device cuda without a GPU, or with a suite that only knows the CPU.
    """
    options = _parser().parse_args(arguments)
    options.rounds = options.rounds or (5 if options.quick else 25)
    options.seconds = 0.5 if options.quick else 20.0
    options.device = torch.device(options.device)
    if options.device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda needs a GPU that torch can use; there is none here.")
    cpu_only = _CPU_ONLY if options.device.type == "cuda" else ()
    if refused := sorted({*cpu_only} & {*(options.suite or ())}):
        raise UserError(f"--suite {refused[0]} is the CPU's; on a GPU tools/gpu_check measures steps.")
    # "ratios" repeats what the others measure; a quick selection has the peak memory of its training steps,
    # and microseconds of overhead are not to be had on a shared machine in a few rounds
    left_out = {*cpu_only, "ratios", *(("memory", "overhead") if options.quick else ())}
    options.suite = options.suite or [name for name in _SUITES if name not in left_out]
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ghl_kernels bench",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="few small cases: less than two minutes on two cores")
    add(
        "--suite",
        nargs="+",
        choices=tuple(_SUITES),
        metavar="NAME",
        help=f"{', '.join(_SUITES)} (default: all; ratios repeats the promised ones beside their bars)",
    )
    add(
        "--baseline",
        nargs="+",
        choices=tuple(BASELINES),
        metavar="CODE",
        help=f"only these rivals in the races: {', '.join(BASELINES)} (default: all)",
    )
    add(
        "--compare",
        type=pathlib.Path,
        metavar="FILE",
        help="fail where a stable ratio got worse than in FILE",
    )
    add("--margin", type=_share, default=MARGIN, help=f"by more than this share (default {MARGIN:g})")
    add("--json", type=pathlib.Path, metavar="FILE", help="write everything to FILE")
    add("--out", type=pathlib.Path, metavar="DIR", help="draw the figures into DIR")
    add("--rounds", type=positive, metavar="N", help="timed rounds at most (default 25; 5 with --quick)")
    add(
        "--threads",
        type=positive,
        metavar="N",
        default=torch.get_num_threads(),
        help="torch's threads (default: torch's choice, %(default)s here)",
    )
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    return parser


def _measure(options: argparse.Namespace) -> tuple[list[Row], dict[str, float]]:
    """The rows of every suite that was asked for, and the machine's ceilings."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        whole = progress.add_task("all", total=len(options.suite) + 1)
        limits = _ceilings(options, progress, whole)
        run = Run(options, limits, progress)
        rows: list[Row] = []
        for suite in dict.fromkeys(options.suite):
            rows += _SUITES[suite](run, suite)
            progress.advance(whole)
    return rows, limits


def _ceilings(options: argparse.Namespace, progress: Progress, whole: TaskID) -> dict[str, float]:
    if options.device.type == "cpu":
        found = ceilings.measure(options.threads, size=1024 if options.quick else 2048)
    else:
        found = gpu_ceilings.measure(gpu_ceilings.Place(options.device, []))
    progress.advance(whole)
    return found


def _summary(described: Mapping[str, Any], options: argparse.Namespace, seconds: float) -> str:
    limits = described["ceilings"]
    rates = ", ".join(
        f"{name} {value / 1e9:.3g} {'GB/s' if name == 'copy' else 'GFLOP/s'}"
        for name, value in limits.items()
    )
    changed = " with uncommitted changes" if described["uncommitted_changes"] else ""
    load = described["clocks"]["after"]["load_average"]
    return (
        f"{described['machine']['cpu']}, {options.threads} threads, at most {options.rounds} rounds, "
        f"torch {described['versions']['torch']}, commit {described['commit']}{changed}\n"
        f"Ceilings: {rates}. Load average at the end: {load[0] if load else 'unknown'}. {seconds:.0f} s."
    )


def _write(
    options: argparse.Namespace, rows: Sequence[Row], described: Mapping[str, Any], console: Console
) -> None:
    if options.json is not None:
        settings = {
            "quick": options.quick,
            "suites": options.suite,
            "baselines": options.baseline,
            "rounds": options.rounds,
            "threads": options.threads,
        }
        report.write_json(options.json, rows, settings, described)
        console.print(f"Wrote {options.json}.", soft_wrap=True)
    if options.out is not None:
        written = figures.write_all(rows, described["ceilings"], options.out)
        if any(row.suite == "scaling" for row in rows):
            path = options.out / "scaling.svg"
            scaling.figure(rows, path)
            written.append(path)
        console.print(
            f"Wrote {', '.join(map(str, written)) or 'no figure: no row fits one'}.", soft_wrap=True
        )


def _read(path: pathlib.Path) -> report.Document:
    try:
        return report.Document(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from None
    except ValueError as error:
        raise UserError(f"{error}.") from None


@contextlib.contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename} cannot be written: {error.strerror or error}.") from None


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a share above 0, got {text!r}")
    return value
