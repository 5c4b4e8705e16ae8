"""``python -m ghl_kernels bench``: measure, print, draw, keep, compare."""

from __future__ import annotations

import argparse
import contextlib
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench import ceilings, figures, machine, report, steps, tables
from bench.baselines import BASELINES
from bench.compare import MARGIN, compare
from bench.failures import fails_a_run
from bench.gpu import ceilings as gpu_ceilings
from bench.interleave import pinned_threads
from bench.recording import Clock, Recording
from bench.report import Row
from bench.suites import CPU_ONLY, SUITES, Run, together
from ghl_kernels.demo.arguments import positive, thread_count
from ghl_kernels.demo.errors import UserError
from ghl_kernels.demo.output import try_to_write

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
  python -m ghl_kernels bench --suite step local --json record.json --update
  python -m ghl_kernels bench --quick --compare bench/results/quick/baseline.json --margin 1
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; 1 if something of this package failed or a compared ratio got worse or is missing.

    Raises:
        UserError: an option that does not fit this machine, or a file that cannot be read or written.
    """
    options = parse(arguments)
    before = _read(options.compare) if options.compare else None
    earlier = _read(options.json) if options.update else None
    _require_writable(options)
    torch.manual_seed(0)
    with pinned_threads(options.threads), _progress() as progress:
        rows, recording = _measure(options, earlier, progress)
    console = Console()
    tables.print_rows(console, rows)
    console.print(_summary(recording, options), soft_wrap=True, highlight=False)
    _draw(options, recording, console)
    failed = [row for row in rows if fails_a_run(row)]
    for row in failed:
        console.print(f"FAILED: {row.suite}, {row.case}, {row.name}: {row.error}", soft_wrap=True)
    worse = False
    if before is not None:
        comparison = compare(rows, before.rows, options.suite, options.margin)
        console.print(f"Against {options.compare}: {comparison}", soft_wrap=True, highlight=False)
        worse = comparison.failed
    return int(bool(failed) or worse)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, with what depends on --quick filled in.

    Raises:
        UserError: --device cuda without a GPU, or with a suite that only knows the CPU; --update without
            --json; "ratios" recorded beside the suites whose rows it repeats.
    """
    options = _parser().parse_args(arguments)
    options.rounds = options.rounds or (5 if options.quick else 25)
    options.seconds = 0.5 if options.quick else 10.0
    options.device = torch.device(options.device)
    if options.device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda needs a GPU that torch can use; there is none here.")
    cpu_only = CPU_ONLY if options.device.type == "cuda" else ()
    if refused := sorted({*cpu_only} & {*(options.suite or ())}):
        raise UserError(f"--suite {refused[0]} is the CPU's; on a GPU tools/gpu_check measures steps.")
    # "ratios" repeats what the others measure, and microseconds of overhead are not to be had on a shared
    # machine in a few rounds
    left_out = {*cpu_only, "ratios", *(("overhead",) if options.quick else ())}
    options.suite = list(dict.fromkeys(options.suite or [name for name in SUITES if name not in left_out]))
    if options.update and not options.json:
        raise UserError("--update needs --json FILE, the document to update.")
    if options.json and "ratios" in options.suite and (options.update or len(options.suite) > 1):
        raise UserError("--suite ratios repeats rows of step, local, kwta and memory: record it by itself.")
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
        choices=tuple(SUITES),
        metavar="NAME",
        help=f"{', '.join(SUITES)} (default: all; ratios repeats the promised ones beside their bars)",
    )
    add(
        "--baseline",
        nargs="+",
        choices=tuple(BASELINES),
        metavar="CODE",
        help=f"only these rivals in the races: {', '.join(BASELINES)} (default: all)",
    )
    add(
        "--network",
        nargs="+",
        choices=tuple(steps.NETWORKS),
        metavar="NAME",
        help=f"only the training steps of these: {', '.join(steps.NETWORKS)} (default: all)",
    )
    add(
        "--compare",
        type=pathlib.Path,
        metavar="FILE",
        help="fail where a stable ratio got worse than in FILE",
    )
    add("--margin", type=_share, default=MARGIN, help=f"by more than this share (default {MARGIN:g})")
    add("--json", type=pathlib.Path, metavar="FILE", help="write everything to FILE, after every suite")
    add(
        "--update",
        action="store_true",
        help="keep what --json FILE has of other suites, from the same machine, versions and settings",
    )
    add("--out", type=pathlib.Path, metavar="DIR", help="draw the figures into DIR")
    add("--rounds", type=positive, metavar="N", help="timed rounds at most (default 25; 5 with --quick)")
    add(
        "--threads",
        type=thread_count,
        metavar="N",
        default=torch.get_num_threads(),
        help="torch's threads (default: torch's choice, %(default)s here)",
    )
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    return parser


def _measure(
    options: argparse.Namespace, earlier: report.Document | None, progress: Progress
) -> tuple[list[Row], Recording]:
    """The rows of every suite that was asked for, and the document with what it had before."""
    groups = together(options.suite)
    described = machine.describe(options.device)
    recording = _recording(options, described, earlier)  # before minutes of measuring: it may be refused
    whole = progress.add_task("all", total=len(groups) + 1)
    limits = _ceilings(options)
    progress.advance(whole)
    recording.machine = described = described | {"ceilings": limits}
    run = Run(options, limits, progress)
    rows: list[Row] = []
    for suites in groups:
        clock = Clock(described)
        found = run.measure(suites)
        with _writing(options.json):
            recording.add(suites, found, clock.stop())
        rows += found
        progress.advance(whole)
    return rows, recording


def _recording(
    options: argparse.Namespace, described: Mapping[str, Any], earlier: report.Document | None
) -> Recording:
    settings = {
        "quick": options.quick,
        "baselines": options.baseline,
        "networks": options.network,
        "rounds": options.rounds,
        "threads": options.threads,
    }
    recording = Recording(options.json, settings, described, tuple(SUITES))
    if earlier is not None:
        try:
            recording.update(earlier)
        except ValueError as error:
            raise UserError(f"{options.json} cannot be updated: {error}.") from None
    return recording


def _ceilings(options: argparse.Namespace) -> dict[str, float]:
    if options.device.type == "cpu":
        return ceilings.measure(options.threads, size=1024 if options.quick else 2048)
    return gpu_ceilings.measure(gpu_ceilings.Place(options.device, []))


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True))


def _summary(recording: Recording, options: argparse.Namespace) -> str:
    described, last = recording.machine, recording.runs[-1]
    rates = ", ".join(
        f"{name} {value / 1e9:.3g} {'GB/s' if name == 'copy' else 'GFLOP/s'}"
        for name, value in described["ceilings"].items()
    )
    changed = " with uncommitted changes" if described["uncommitted_changes"] else ""
    load = last["clocks"]["after"]["load_average"]
    seconds = sum(run["seconds"] for run in recording.runs if {*run["suites"]} <= {*options.suite})
    return (
        f"{described['machine']['cpu']}, {options.threads} threads, at most {options.rounds} rounds, "
        f"torch {described['versions']['torch']}, commit {described['commit']}{changed}\n"
        f"Ceilings: {rates}. Load average at the end: {load[0] if load else 'unknown'}. {seconds:.0f} s."
    )


def _draw(options: argparse.Namespace, recording: Recording, console: Console) -> None:
    if options.json is not None:
        console.print(f"Wrote {options.json}.", soft_wrap=True)
    if options.out is not None:
        with _writing(options.out):
            written = figures.write_all(recording.rows, recording.machine["ceilings"], options.out)
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


def _require_writable(options: argparse.Namespace) -> None:
    """Try --json and --out while nothing is lost yet; leaves no file and no folder.

    Raises:
        UserError: one of them cannot be written.
    """
    if options.json is not None:
        if options.json.is_dir():
            raise UserError(f"{options.json} cannot be written: it is a folder.")
        with _writing(options.json):
            _try_folder(options.json.parent)
    if options.out is not None:
        with _writing(options.out):
            _try_folder(options.out)


def _try_folder(folder: pathlib.Path) -> None:
    there = next(each for each in (folder, *folder.parents) if each.exists())
    try_to_write(there)


@contextlib.contextmanager
def _writing(path: pathlib.Path | None) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}.") from None


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a share above 0, got {text!r}")
    return value
