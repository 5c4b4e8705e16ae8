"""Stage 8: the races of bench/races, this package's backends beside every baseline, in bfloat16.

Each contender is compared with the float64 reference before it is timed. "ghl auto" is what runs where
nothing is chosen; section "auto" has its time over that of the fastest backend. Rows are bench.report.Row's
JSON, in a section for each class of arithmetic intensity (bench/intensity.py); "means" has the geometric mean
of each. The suites take turns, so that a stage which runs out of time has the first shapes of all of them.
``--warm I N`` only compiles the compiled rivals of every N-th race from the I-th on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import pathlib
import sys
from collections.abc import Callable, Iterator
from unittest import mock

import torch

from bench import intensity, race
from bench.baselines import BASELINES
from bench.gpu import ceilings, shapes, stage
from bench.gpu.stage import Stage
from bench.race import Race, Target
from bench.races import SUITES, compete, correlate, delta, depthwise, epilogue, linear, pair, sparse, winners
from bench.report import Row
from bench.shapes import ConvShape, LinearShape

ROUNDS = 9
_CONV = ConvShape(2, 4, 16, 4, 3)
# In place of a quick selection's shapes, which would keep the interpreter busy for hours.
_TOYS = {
    compete: {"MAPS": ((), (2, 16, 3, 3))},
    winners: {"MAPS": ((), (2, 16, 3, 3))},
    correlate: {"QUICK_CONV": (_CONV,)},
    pair: {"QUICK_CONV": (_CONV,)},
    sparse: {"QUICK_CONV": (_CONV,)},
    delta: {"QUICK_CONV": (_CONV, ConvShape(1, 3, 8, 3, 1))},
    linear: {"QUICK_LINEAR": (LinearShape(12, 8, 50),)},
    depthwise: {"QUICK_DEPTHWISE": (ConvShape(1, 4, 4, 4, 3, groups=4),)},
    epilogue: {"SHAPES": ((6, 3, 3, 3), (5, 4))},
}


def run(this: Stage) -> None:
    """Every race while there is time, then the means."""
    torch.backends.cudnn.benchmark = True  # or the rivals would run by a guess
    limits = ceilings.load_or_measure(this)
    this.add("ceilings", limits)
    options = race.Options(
        rounds=ROUNDS,
        threads=torch.get_num_threads(),
        target=_target(this.device, this.dry),
        # named, a compiled rival takes part in the quick selection too
        baselines=frozenset(BASELINES) if this.dry else None,
    )
    rows: list[Row] = []
    with _shapes(this.dry):
        for one in this.each(map(_with_auto, entered(options.target)), _label, least=5):
            found = this.attempt(_label(one), lambda one=one: race.measure(one, options, limits)) or []
            _record(this, found)
            rows += found
            if not this.dry:
                torch.cuda.empty_cache()  # the next race's tensors have other sizes
    for name in dict.fromkeys(map(intensity.class_of, rows)):
        mean = intensity.mean([row for row in rows if intensity.class_of(row) == name])
        if mean is not None:
            this.add("means", {"class": name, **mean._asdict()})
    shapes.enter(this, _faster(rows))


def entered(target: Target) -> Iterator[Race]:
    """The first race of every suite, the second of every suite, and so on; in a dry run two of each."""
    groups = itertools.zip_longest(*(suite(target) for suite in SUITES.values()))
    for group in itertools.islice(groups, 2 if target.dry else None):
        yield from (one for one in group if one is not None)


def _with_auto(one: Race) -> Race:
    """The race with one more contender where its form is the default's: the backend that auto chooses."""
    first = next((c for c in one.contenders if c.backend == "triton" and c.auto), None)
    if first is None:
        return one
    others = [dataclasses.replace(contender, auto=False) for contender in one.contenders]
    name = first.name.replace("triton", "auto")
    auto = dataclasses.replace(first, name=name, backend="auto", absent="")
    return dataclasses.replace(one, contenders=[*others, auto])


def _of_best(rows: list[Row]) -> float | None:
    """auto's time over that of the fastest other backend; None where either was not timed."""
    timed = [row for row in rows if row.is_ours and row.seconds is not None]
    autos, others = ([intensity.seconds(row) for row in timed if row.auto is auto] for auto in (True, False))
    return min(autos) / min(others) if autos and others else None


def _faster(rows: list[Row]) -> dict[str, bool]:
    """Of the kernels that the table of shapes knows as a whole: whether the CUDA backend's are faster."""
    found = {}
    for suite in ("depthwise", "sparse", "epilogue"):
        factors = []
        for case in intensity.by_case(row for row in rows if row.suite == suite and row.seconds):
            times = {row.name: intensity.seconds(row) for row in case}
            both = ((name, name.replace(" triton", " cuda")) for name in times if name.endswith(" triton"))
            factors += [times[cuda] / times[triton] for triton, cuda in both if cuda in times]
        if factors:
            found[f"{suite}:cuda"] = math.prod(factors) < 1
    return found


def calls(device: torch.device, dry: bool) -> Iterator[Callable[[], object]]:
    """What Triton has to compile."""
    with _shapes(dry):
        for one in entered(_target(device, dry)):
            inputs = one.inputs()
            for contender in one.contenders:
                if contender.backend == "triton" and not contender.absent:
                    yield functools.partial(contender, *inputs)


def warm(out: pathlib.Path, index: int, count: int) -> int:
    """Run every ``count``-th race's compiled rivals once, so that their code is in Inductor's cache."""
    this = Stage(f"warm-races-{index}", stage.Options(out))
    compiled = [
        (one, contender)
        for one in entered(_target(this.device, this.dry))
        for contender in one.contenders
        if contender.compiled
    ]
    for one, contender in this.each(compiled[index::count], lambda pair: _label(pair[0]), least=5):
        torch._dynamo.reset()
        this.attempt(_label(one), lambda one=one, contender=contender: contender(*one.inputs()))
    return this.finish()


def _target(device: torch.device, dry: bool) -> Target:
    return Target(device, torch.bfloat16, quick=dry, dry=dry)


def _label(one: Race) -> str:
    return f"{one.suite}, {one.case}"


def _record(this: Stage, rows: list[Row]) -> None:
    """A rival that is wrong or cannot be timed is a finding; one of ours is an error."""
    for row in rows:
        if row.is_ours and row.error:
            this.errors.append(f"{row.suite}, {row.case}, {row.name}: {row.error}")
    for name in dict.fromkeys(map(intensity.class_of, rows)):
        this.add(name, *(row.to_json() for row in rows if intensity.class_of(row) == name))
    if (of_best := _of_best(rows)) is not None:
        this.add("auto", {"suite": rows[0].suite, "case": rows[0].case, "of_best": of_best})


@contextlib.contextmanager
def _shapes(dry: bool) -> Iterator[None]:
    """Toy shapes in a dry run, and compiled rivals as graphs that no compiler is needed for."""
    with contextlib.ExitStack() as stack:
        if dry:
            for suite, constants in _TOYS.items():
                stack.enter_context(mock.patch.multiple(suite, **constants))
            eager = functools.partial(torch.compile, backend="eager")
            stack.enter_context(mock.patch.object(torch, "compile", eager))
        yield


if __name__ == "__main__":
    if sys.argv[1:2] == ["--warm"]:
        sys.exit(warm(pathlib.Path(sys.argv[4]), int(sys.argv[2]), int(sys.argv[3])))
    sys.exit(stage.main("races", run))
