"""Stage 9: bench/scaling.py and bench/overhead.py on a GPU; rows in the JSON of bench.report.Row.

``--warm`` only compiles what the overhead of compiled calls is measured with.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from unittest import mock

import torch

from bench import overhead, scaling
from bench.gpu import stage
from bench.gpu.stage import Stage
from bench.race import Target
from bench.report import Row
from bench.scaling import Operation, Point
from bench.shapes import ConvShape, LinearShape

ROUNDS = 7
_TOY = Point(ConvShape(16, 8, 16, 3, 3), 4)
_TOY_CROSSOVERS = {"winograd": ConvShape(2, 8, 16, 4, 3), "linear": LinearShape(12, 8, 16)}
Job = Callable[[], list[Row]]


class Silent:
    """A rich.progress.Progress that shows nothing, for machines that have no rich."""

    def add_task(self, label: str, total: float) -> int:
        return 0

    def advance(self, task: int, advance: float = 1) -> None:
        pass


def run(this: Stage) -> None:
    """One line of the figure after the other, those that decide something first."""
    # the overhead's gradients are compared in float32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    with _shapes(this.dry):
        for name, job in this.each(_jobs(this).items(), lambda item: item[0], least=6):
            rows = this.attempt(name, job) or []
            this.errors += [f"{row.case}, {row.name}: {row.error}" for row in rows if row.error]
            this.add("rows", *(row.to_json() for row in rows))


def calls(device: torch.device, dry: bool) -> Iterator[Callable[[], object]]:
    """What Triton has to compile for the sweeps: every operation at every point."""
    target = _target(device, dry)
    with _shapes(dry):
        for operation in scaling.OPERATIONS:
            base = scaling._base(operation, target)
            for variable in operation.variables:
                for point in scaling.sweep(base, variable, 3 if dry else 5):
                    yield operation.build(point, target).run


def warm(out: pathlib.Path) -> int:
    """Measure the overhead once, coarsely: its compiled layers are in Inductor's cache then."""
    this = Stage("warm-overhead", stage.Options(out))
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    this.attempt("overhead", lambda: overhead.overhead_rows(_options(this, rounds=1), Silent()))
    return this.finish()


def _jobs(this: Stage) -> dict[str, Job]:
    first, *others = scaling.OPERATIONS
    conv, *kinds = scaling.CROSSOVERS[this.device.type]
    options = _options(this)
    return {
        **_sweeps(this, [first]),
        **_crossovers(this, [conv]),
        "overhead": lambda: overhead.overhead_rows(options, Silent()),
        **_crossovers(this, kinds),
        **_sweeps(this, others),
    }


def _sweeps(this: Stage, operations: Sequence[Operation]) -> dict[str, Job]:
    target, options = _target(this.device, this.dry), _options(this)
    return {
        f"{operation.name} in {variable}": lambda o=operation, v=variable: scaling.sweep_rows(
            o, v, target, options, Silent()
        )
        for operation in operations
        for variable in operation.variables
    }


def _crossovers(this: Stage, kinds: Sequence[str]) -> dict[str, Job]:
    target, options = _target(this.device, this.dry), _options(this)
    return {
        f"crossover, {kind}": lambda kind=kind: scaling.crossover_rows(kind, target, options, Silent())
        for kind in kinds
    }


def _target(device: torch.device, dry: bool) -> Target:
    return Target(device, torch.bfloat16, quick=dry, dry=dry)


def _options(this: Stage, rounds: int = ROUNDS) -> argparse.Namespace:
    return argparse.Namespace(
        rounds=1 if this.dry else rounds,
        threads=torch.get_num_threads(),
        quick=this.dry,
        device=this.device,
    )


@contextlib.contextmanager
def _shapes(dry: bool) -> Iterator[None]:
    """Toy sizes in a dry run."""
    with contextlib.ExitStack() as stack:
        if dry:
            toys = tuple(dataclasses.replace(o, base={"cpu": _TOY}) for o in scaling.OPERATIONS)
            stack.enter_context(mock.patch.object(scaling, "OPERATIONS", toys))
            stack.enter_context(mock.patch.dict(scaling.CROSSOVERS, cpu=_TOY_CROSSOVERS))
            stack.enter_context(mock.patch.object(overhead, "_CALLS", 1))
        yield


if __name__ == "__main__":
    if sys.argv[1:2] == ["--warm"]:
        sys.exit(warm(pathlib.Path(sys.argv[2])))
    sys.exit(stage.main("scaling", run))
