"""Compiles every Triton kernel as each architecture would run it, without a GPU, and asserts its budgets.

    tools/aot_check                          every layer, architecture and dtype
    tools/aot_check --reduced --arch sm_90   few layers, one architecture
    tools/aot_check --only correlate         kernels with this in their name
    tools/aot_check --choices                every choice of the correlation's tile, by shape and competition

Budgets: no spilled registers, no serialized wgmma in a product of 16-bit operands, shared memory within the
architecture's limit, tensor cores wherever 16-bit operands are multiplied. NVIDIA's numbers are ptxas' own
report and the disassembly; AMD's the metadata of the assembly (spill counts, scratch). Nothing is run, so
nothing here is about speed. The exit status is 1 when a budget is broken.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import dataclasses
import functools
import importlib
import json
import multiprocessing
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from bench.aot.cases import DTYPES, Case, cases, choices
from bench.aot.compilation import Compilation, specialize
from bench.aot.measure import Measured, measure
from bench.gpu.tiles import every_candidate, library, tf32
from ghl_kernels.backends.triton import arch as architectures
from ghl_kernels.backends.triton.arch import Arch
from ghl_kernels.backends.triton.launch import recording
from ghl_kernels.demo.arguments import positive

COLUMNS = ("kernel", "arch", "types", "constants", "warps", "regs", "spill", "shared", "matrix", "16 B loads")

# Only products of float32 depend on whether torch allows tf32.
_TF32 = {name: (False, True) if dtype == torch.float32 else (False,) for name, dtype in DTYPES.items()}


@dataclasses.dataclass
class Found:
    """Distinct compilations with the calls that ask for them, and the calls that raised."""

    compilations: dict[str, Compilation] = dataclasses.field(default_factory=dict)
    asked_by: dict[str, list[str]] = dataclasses.field(default_factory=lambda: collections.defaultdict(list))
    raised: list[str] = dataclasses.field(default_factory=list)


def find(options: argparse.Namespace) -> Found:
    """Record every call on every architecture, in every dtype."""
    found = Found()
    operations = importlib.import_module(options.operations)
    for name in options.arch:
        arch = (architectures.KNOWN | architectures.CONSUMER)[name]
        for dtype in options.dtype:
            for case in _cases(options, dtype):
                label = f"{case.name} {dtype} {name}"
                call = functools.partial(case.run, operations, DTYPES[dtype])
                try:
                    wanted = [c for allowed in _TF32[dtype] for c in _compilations(call, arch, allowed)]
                except Exception as error:  # the check goes on: one call must not hide the others
                    found.raised.append(f"{label}: {type(error).__name__}: {error}")
                    continue
                for compilation in wanted:
                    if options.only in compilation.kernel:
                        found.compilations[compilation.key] = compilation
                        found.asked_by[compilation.key].append(label)
    return found


def _compilations(call: Callable[[], object], arch: Arch, tf32_allowed: bool) -> list[Compilation]:
    """What the call launches with the configured tiles and with every other candidate."""
    found = []
    # the library's products would run, on a CPU, and launch nothing that other calls do not
    with architectures.assume(arch), library(False), tf32(tf32_allowed):
        for context in every_candidate(call):
            with context, recording() as launches:
                call()
            found += [specialize(launch, arch) for launch in launches]
    return found


def _cases(options: argparse.Namespace, dtype: str) -> Iterator[Case]:
    made = choices() if options.choices else cases(dtype, options.reduced)
    return (case for case in made if options.case in case.name)


def compile_all(compilations: Sequence[Compilation], jobs: int) -> list[Measured]:
    """Measure in parallel processes, with a bar on standard error."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    context = multiprocessing.get_context("fork")
    # a hash of all of Triton that every process inherits, and would otherwise take a second to make
    importlib.import_module("triton.runtime.cache").triton_key()
    with (
        Progress(*columns, console=Console(stderr=True)) as progress,
        concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context) as pool,
    ):
        task = progress.add_task("compile", total=len(compilations))
        futures = [pool.submit(measure, compilation) for compilation in compilations]
        for future in futures:
            future.add_done_callback(lambda _: progress.advance(task))
        return [future.result() for future in futures]


def table(rows: Sequence[Measured]) -> Table:
    """One line a kernel, broken budgets in red."""
    out = Table(title="Kernels compiled ahead of time", title_justify="left")
    for heading in COLUMNS:
        out.add_column(heading, overflow="fold")
    for m in sorted(rows, key=lambda m: (m.kernel, m.arch, m.dtypes, m.constants)):
        out.add_row(
            m.kernel,
            m.arch,
            m.dtypes,
            m.constants,
            str(m.warps),
            str(m.registers),
            str(m.spill),
            str(m.shared),
            " ".join(f"{name} x{count}" for name, count in m.matrix.items())
            + (f" serialized {' '.join(m.serialized)}" if m.serialized else ""),
            f"{m.wide_loads}/{m.loads}",
            style="red" if m.problems else None,
        )
    return out


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="tools/aot_check", description=__doc__.splitlines()[0])
    known = list(architectures.KNOWN)
    every = [*known, *architectures.CONSUMER]
    parser.add_argument("--arch", nargs="+", choices=every, default=known, help=f"default: {' '.join(known)}")
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES), help="default: all")
    parser.add_argument("--only", default="", metavar="NAME", help="kernels with this in their name")
    parser.add_argument("--case", default="", metavar="TEXT", help="calls with this in their name")
    parser.add_argument("--reduced", action="store_true", help="few layers and competitions")
    parser.add_argument("--choices", action="store_true", help="every choice of a tile, not layers")
    parser.add_argument("--jobs", type=positive, default=os.cpu_count() or 1, help="parallel compilers")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="also write everything to FILE")
    parser.add_argument(
        "--operations",
        default="ghl_kernels.backends.triton",
        metavar="MODULE",
        help="where the operations are (the check's own test puts bad kernels there)",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Check and print; 1 when a budget is broken."""
    options = parse(arguments)
    found = find(options)
    rows = compile_all(list(found.compilations.values()), options.jobs)
    asked_by = list(found.asked_by.values())
    console = Console() if sys.stdout.isatty() else Console(width=220)
    console.print(table(rows))
    broken = [
        f"{m.kernel} {m.arch} {m.dtypes} [{m.constants} warps={m.warps}]: {problem}\n"
        f"    asked for by {calls[0]}" + (f" and {len(calls) - 1} more" if len(calls) > 1 else "")
        for m, calls in zip(rows, asked_by, strict=True)
        for problem in m.problems
    ]
    if options.json is not None:
        _write_json(options, rows, asked_by, found.raised)
    for line in (*found.raised, *broken):
        print(line)
    import triton

    problems = len(broken) + len(found.raised)
    print(f"Triton {triton.__version__}: {len(rows)} compilations, {problems} problems")
    if not rows:
        print("nothing was compiled")
    return 1 if problems or not rows else 0


def _write_json(
    options: argparse.Namespace,
    rows: Sequence[Measured],
    asked_by: Sequence[Sequence[str]],
    raised: Sequence[str],
) -> None:
    import triton

    kernels = [
        dataclasses.asdict(m) | {"asked_by": list(calls)} for m, calls in zip(rows, asked_by, strict=True)
    ]
    document = {"triton": triton.__version__, "kernels": kernels, "raised": list(raised)}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
