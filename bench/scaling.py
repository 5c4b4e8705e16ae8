"""How cost grows: exponents in B, N, D and k, speedup with threads, and where few winners stop paying.

    sweep      one size at a time over powers of two, the others fixed; cost = c * size ** exponent is fitted
               by least squares in log-log. The same fit to the operations of bench/work.py at these sizes (to
               the bytes, where nothing is multiplied) is what the arithmetic says
    threads    (CPU) the same call with 1, 2, 4, ... torch threads
    crossover  the sparse path from u to H as a multiple of the dense one, over k/N

The points of one sweep take turns (bench/interleave.py on a CPU, bench/gpu/timing.py on a GPU), so that a
slow second of the machine does not bend the line. float32 on a CPU, bfloat16 and channels_last on a GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

import ghl_kernels as ghl
from bench import step_threads, work
from bench.baselines._oja import oja
from bench.crossover import FRACTIONS, crossover
from bench.failures import guarded
from bench.gpu.timing import l2_bytes, sets_for, time_all
from bench.interleave import Candidate, Spread, interleave, pinned_threads
from bench.parity import TOLERANCE, assert_close
from bench.race import Target
from bench.report import Row
from bench.shapes import ConvShape, LinearShape, conv_tensors, linear_tensors
from bench.work import Work
from ghl_kernels import _dispatch
from ghl_kernels._autograd import make_plan, sums

# what measures on a machine with a GPU may find neither there
if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.progress import Progress

SUITE = "scaling"
SOFTMAX = ghl.HebbianRule.ghl()
# H of these is A itself, and G with dL/du in place of u.
_ACTIVITIES = ghl.HebbianRule(decay="none", normalize="none", gate="none")
_GRADIENT = ghl.HebbianRule(activity="linear", decay="none", normalize="none", gate="none")
_80TH_PERCENTILE = 0.8416  # of the standard normal distribution
# A linear layer has its positions in place of a batch.
_FIELDS = {
    ConvShape: {"B": "batch", "N": "units", "D": "channels"},
    LinearShape: {"B": "positions", "N": "units", "D": "features"},
}


class Point(NamedTuple):
    """Where on the axes a cost is taken: a layer and its number of winners."""

    shape: ConvShape | LinearShape
    winners: int

    def size(self, variable: str) -> int:
        """Value of "B", "N", "D" (the length of a patch) or "k"."""
        if variable == "k":
            return self.winners
        if variable == "D":
            return self.shape.layer().columns
        return getattr(self.shape, _FIELDS[type(self.shape)][variable])

    def scaled(self, variable: str, factor: float) -> Point:
        """The same with one size or k multiplied; D of a convolution by way of its channels.

        Raises:
            ValueError: the size does not stay a positive integer.
        """
        field = _FIELDS[type(self.shape)].get(variable, "")
        before = self.winners if variable == "k" else getattr(self.shape, field)
        after = before * factor
        if after < 1 or after != int(after):
            raise ValueError(f"{variable} must stay a positive integer, got {before} * {factor:g}")
        if variable == "k":
            return self._replace(winners=int(after))
        return self._replace(shape=self.shape._replace(**{field: int(after)}))

    def __str__(self) -> str:
        return f"{self.shape} k={self.winners}"


def sweep(base: Point, variable: str, points: int) -> list[Point]:
    """``points`` powers of two of one size, ascending, with the base in the middle.

    Raises:
        ValueError: fewer than three points, through which no line could fail to pass, or a size below 1.
    """
    if points < 3:
        raise ValueError(f"a sweep needs at least three points, got {points}")
    return [base.scaled(variable, 2.0 ** (i - points // 2)) for i in range(points)]


class Fit(NamedTuple):
    """cost = coefficient * size ** exponent; ``error`` is the exponent's standard error."""

    exponent: float
    error: float
    coefficient: float

    def spread(self) -> Spread:
        """The exponent, with percentiles from its standard error taken as normal."""
        reach = _80TH_PERCENTILE * self.error
        return Spread(self.exponent, self.exponent - reach, self.exponent + reach)


def fit_power(sizes: Sequence[float], costs: Sequence[float]) -> Fit:
    """Least squares in log-log.

    Args:
        sizes, costs: positive; at least three different sizes.

    Raises:
        ValueError: fewer, or a value that has no logarithm.
    """
    if len(set(sizes)) < 3 or len(sizes) != len(costs):
        raise ValueError(
            f"a fit needs a cost at each of at least three different sizes, got {sizes} and {costs}"
        )
    if not all(value > 0 and math.isfinite(value) for value in (*sizes, *costs)):
        raise ValueError(f"sizes and costs must be positive and finite, got {sizes} and {costs}")
    line, covariance = np.polyfit(np.log(sizes), np.log(costs), 1, cov=True)
    return Fit(float(line[0]), math.sqrt(max(0.0, covariance[0, 0])), math.exp(line[1]))


# --- what is timed ------------------------------------------------------------------------------


class Call(NamedTuple):
    """An operation on tensors of its own, and what it must return; running it again changes nothing."""

    run: Callable[[], Tensor]
    expected: Callable[[], Tensor]
    tolerance: float


@dataclasses.dataclass(frozen=True)
class Operation:
    """One line of the figure.

    Attributes:
        variables: the sizes it depends on.
        base: middle of its sweeps by device type, so large that a call's own overhead is small beside it.
        build: a Call with fresh tensors at a point.
        work: bytes and operations at a point, with inputs of an element size.
    """

    name: str
    variables: str
    base: dict[str, Point]
    build: Callable[[Point, Target], Call]
    work: Callable[[Point, int], Work]


def _tensors(point: Point, target: Target) -> tuple[Tensor, Tensor, Tensor]:
    """x, u and the weight, which is float32 on every device."""
    if isinstance(point.shape, LinearShape):
        x, u, weight = linear_tensors(point.shape, **target.options)
    else:
        x, u, weight = conv_tensors(point.shape, target.memory_format, **target.options)
    return x, u, weight.float()


def _delta(point: Point, target: Target, rule: ghl.HebbianRule, sparse: bool) -> Call:
    """u -> H by the path asked for, whichever ``auto`` prefers."""
    x, u, weight = _tensors(point, target)
    shape = point.shape
    geometry = None if isinstance(shape, LinearShape) else shape.geometry
    plan = make_plan(geometry, weight, rule)._replace(is_sparse=sparse)

    def run() -> Tensor:
        A, moments = sums(x, u, plan)
        return torch.ops.ghl.delta(A, moments, weight, 1, rule.decay, rule.normalize)

    def expected() -> Tensor:
        inputs = x.double(), u.double(), weight.double(), rule
        if isinstance(shape, LinearShape):
            return ghl.reference.linear_delta(*inputs)
        return ghl.reference.conv_delta(*inputs, **shape.conv)

    return Call(run, expected, target.tolerance)


def _softmax(point: Point, target: Target) -> Call:
    return _delta(point, target, SOFTMAX, sparse=False)


def _sparse_winners(point: Point, target: Target) -> Call:
    return _delta(point, target, ghl.HebbianRule.kwta(point.winners), sparse=True)


def _dense_winners(point: Point, target: Target) -> Call:
    return _delta(point, target, ghl.HebbianRule.kwta(point.winners), sparse=False)


def _kwta(point: Point, target: Target) -> Call:
    _, u, _ = _tensors(point, target)
    k = point.winners
    return Call(
        lambda: ghl.functional.kwta(u, k, dim=1), lambda: ghl.reference.kwta(u, k, dim=1), tolerance=0.0
    )


def _pair(point: Point, target: Target) -> Call:
    """A and G in one operation."""
    x, u, weight = _tensors(point, target)
    grad_u = torch.empty_like(u).copy_(torch.randn(u.shape, generator=torch.Generator().manual_seed(1)))
    competition = SOFTMAX.competition(point.shape.units)

    def run() -> Tensor:
        A, _, G = torch.ops.ghl.conv_pair(x, u, grad_u, *point.shape.geometry, *competition, "none")
        return torch.stack((A, G))

    def expected() -> Tensor:
        inputs = ((u.double(), _ACTIVITIES), (grad_u.double(), _GRADIENT))
        deltas = [
            ghl.reference.conv_delta(x.double(), y, weight.double(), rule, **point.shape.conv)
            for y, rule in inputs
        ]
        return torch.stack(deltas)

    return Call(run, expected, target.tolerance)


def _depthwise(point: Point, target: Target) -> Call:
    """A of y = u, each unit with the patches of its own channel."""
    x, u, weight = _tensors(point, target)
    shape, competition = point.shape, _GRADIENT.competition(point.shape.units)
    return Call(
        lambda: torch.ops.ghl.conv_sums(x, u, *shape.geometry, *competition, "none")[0],
        lambda: ghl.reference.conv_delta(
            x.double(), u.double(), weight.double(), _GRADIENT, **shape.conv, groups=shape.groups
        ),
        target.tolerance,
    )


def _gate(point: Point, target: Target) -> Call:
    """In place, but what is gated already stays as it is."""
    generator = torch.Generator().manual_seed(0)
    grad, A, weight = (
        torch.randn(point.shape.weight_shape, generator=generator).to(target.device) for _ in range(3)
    )
    G, moments = grad.clone(), torch.ones(1, device=target.device)

    def run() -> Tensor:
        torch.ops.ghl.gate_(grad, A, moments, weight, 1, SOFTMAX.decay, SOFTMAX.normalize)
        return grad

    return Call(run, lambda: ghl.reference.gate(oja(A.double(), weight.double()), G.double()), TOLERANCE)


def _dense_work(point: Point, itemsize: int) -> Work:
    return work.delta(point.shape.layer(itemsize))


def _sparse_work(point: Point, itemsize: int) -> Work:
    return work.delta(point.shape.layer(itemsize), point.winners)


_SUMS = {
    "cpu": Point(ConvShape(16, 64, 256, 16, 3), 8),
    "cuda": Point(ConvShape(128, 128, 512, 16, 3), 4),
}
_SPARSE = Operation("ghl u -> H k-WTA, sparse", "BNDk", _SUMS, _sparse_winners, _sparse_work)
_DENSE = Operation("ghl u -> H k-WTA, dense", "BND", _SUMS, _dense_winners, _dense_work)
OPERATIONS = (
    Operation("ghl u -> H softmax, dense", "BND", _SUMS, _softmax, _dense_work),
    _SPARSE,
    Operation(
        "ghl k-WTA",
        "BNk",
        {
            "cpu": Point(ConvShape(32, 1, 256, 16, 3), 8),
            "cuda": Point(ConvShape(512, 1, 512, 16, 3), 8),
        },
        _kwta,
        lambda point, itemsize: Work(2 * point.shape.layer().responses * itemsize),
    ),
    Operation(
        "ghl gate",
        "ND",
        {"cpu": Point(ConvShape(32, 256, 512, 8, 3), 8), "cuda": Point(ConvShape(32, 512, 2048, 8, 3), 8)},
        _gate,
        lambda point, itemsize: work.gate(point.shape.layer().weights),
    ),
    Operation(
        "ghl pair A and G", "BND", _SUMS, _pair, lambda p, itemsize: work.pair(p.shape.layer(itemsize))
    ),
    Operation(
        "ghl u -> H softmax, linear",
        "BND",
        {"cpu": Point(LinearShape(512, 1024, 1024), 8), "cuda": Point(LinearShape(8192, 2048, 2048), 8)},
        _softmax,
        _dense_work,
    ),
    Operation(
        "ghl depthwise A",
        "B",
        {
            "cpu": Point(ConvShape(8, 96, 96, 56, 3, groups=96), 8),
            "cuda": Point(ConvShape(64, 256, 256, 56, 3, groups=256), 8),
        },
        _depthwise,
        lambda point, itemsize: work.correlate(point.shape.layer(itemsize)),
    ),
)

# One of every kind of which ghl_kernels._dispatch knows a crossover of its own, by device type. On a GPU
# 3 x 3 convolutions ("winograd") are computed as all others are.
CROSSOVERS: dict[str, dict[str, ConvShape | LinearShape]] = {
    "cpu": {
        "conv": ConvShape(16, 64, 256, 16, 5),
        "winograd": ConvShape(16, 64, 256, 16, 3),
        "linear": LinearShape(1024, 1024, 1024),
        "pointwise": ConvShape(32, 256, 256, 16, 1),
        "thin": ConvShape(32, 3, 96, 32, 5),
    },
    "cuda": {
        "winograd": ConvShape(128, 128, 1024, 16, 3),
        "linear": LinearShape(16384, 2304, 4096),
        "pointwise": ConvShape(128, 256, 1024, 16, 1),
        "thin": ConvShape(128, 3, 1024, 32, 5),
    },
}


# --- how it is timed ----------------------------------------------------------------------------


class Contender(NamedTuple):
    """A function of the number of a buffer set, and how many sets it has."""

    run: Callable[[int], object]
    sets: int = 1


class Measured(NamedTuple):
    """Seconds of one call, and a ratio; from ``measure`` that is the cost as a multiple of the first's."""

    seconds: Spread
    ratio: Spread


def measure(
    contenders: dict[str, Contender],
    label: str,
    options: argparse.Namespace,
    progress: Progress,
    *,
    calls: int = 1,
    capture: bool = True,
) -> dict[str, Measured]:
    """Time contenders in turn, on the device of the options.

    Args:
        calls: on a CPU, calls that one timed run makes, for those too short for the clock.
        capture: on a GPU, replay a CUDA graph in place of launching call by call.

    Raises:
        RuntimeError: a contender failed on the GPU, or could not be captured although that was asked for.
    """
    device: torch.device = options.device
    if device.type == "cpu":
        return _measure_on_cpu(contenders, label, options, progress, calls)
    task = progress.add_task(label, total=1)
    timed = time_all(
        {
            name: lambda i, contender=contender: contender.run(i % contender.sets)
            for name, contender in contenders.items()
        },
        sets=max(contender.sets for contender in contenders.values()),
        device=device,
        rounds=options.rounds,
        capture=capture,
    )
    progress.advance(task)
    for name, sample in timed.items():
        if sample.seconds is None or (capture and not sample.captured):
            raise RuntimeError(f"{label}, {name}: {sample.problem or 'no CUDA graph could be captured'}")
    seconds = {name: sample.seconds for name, sample in timed.items()}
    first = next(iter(seconds.values()))
    return {name: Measured(own, _quotient(own, first)) for name, own in seconds.items()}


def _measure_on_cpu(
    contenders: dict[str, Contender],
    label: str,
    options: argparse.Namespace,
    progress: Progress,
    calls: int,
) -> dict[str, Measured]:
    def repeated(contender: Contender) -> Callable[[], None]:
        def run() -> None:
            for _ in range(calls):
                contender.run(0)

        return run

    task = progress.add_task(label, total=len(contenders) * (options.rounds + 2))
    timings = interleave(
        [Candidate(name, repeated(contender)) for name, contender in contenders.items()],
        rounds=options.rounds,
        threads=options.threads,
        on_run=lambda: progress.advance(task),
    )
    return {
        name: Measured(Spread.of([seconds / calls for seconds in timing.seconds]), timing.cost)
        for name, timing in timings.items()
    }


def _quotient(own: Spread, other: Spread) -> Spread:
    """Of two samples that are not paired round by round: the percentiles are the least favorable ones."""
    return Spread(own.median / other.median, own.p20 / other.p80, own.p80 / other.p20)


def _prepare(operation: Operation, point: Point, target: Target) -> Contender:
    """The operation at a point, checked, with as many buffer sets as outgrow a GPU's cache."""
    moved = math.ceil(operation.work(point, target.dtype.itemsize).bytes)
    sets = sets_for(moved, l2_bytes(target.device)) if target.device.type == "cuda" else 1
    calls = [operation.build(point, target) for _ in range(sets)]
    first = calls[0]
    assert_close(f"{operation.name}, {point}", first.run(), first.expected(), first.tolerance)
    return Contender(lambda i: calls[i].run(), sets)


# --- rows ---------------------------------------------------------------------------------------


def scaling_rows(
    options: argparse.Namespace, progress: Progress, ceilings: Mapping[str, float] | None = None
) -> list[Row]:
    """Every sweep, the threads (on a CPU) and the crossovers.

    Args:
        options: ``rounds``, ``threads`` (int), ``quick`` (bool: three points a sweep, a quarter of the batch,
            one crossover) and ``device`` (torch.device, CPU or CUDA).
        ceilings: of bench.ceilings, for the floors; None: rows have none.

    Returns:
        Rows of suite "scaling". Of a sweep: one for each size, its ratio the cost as a multiple of the
        smallest size's, and one whose ratio is the fitted exponent. Of the threads: the speedup. Of a
        crossover: the sparse path's cost at each k/N, and the k/N up to which it pays. One row in their place
        where a result is not the reference's or something else fails.

    Raises:
        ValueError: any other type of device.
    """
    device: torch.device = options.device
    if device.type not in CROSSOVERS:
        raise ValueError(f"device must be one of {tuple(CROSSOVERS)}, got {device}")
    target = Target.of(device, options.quick)
    rows: list[Row] = []
    with pinned_threads(options.threads):
        for case, part in _parts(target, options, progress):
            rows += guarded(SUITE, case, part)
    return [_with_floor(row, ceilings or {}, target.precision) for row in rows]


def _parts(
    target: Target, options: argparse.Namespace, progress: Progress
) -> Iterator[tuple[str, Callable[[], list[Row]]]]:
    """What is measured together, with its name."""
    given = target, options, progress
    for operation in OPERATIONS:
        for variable in operation.variables:
            part = functools.partial(sweep_rows, operation, variable, *given)
            yield f"{operation.name} in {variable}", part
    if target.device.type == "cpu":
        for operation in OPERATIONS:
            yield f"{operation.name}, threads", functools.partial(thread_rows, operation, *given)
        if not options.quick:
            yield "training step, threads", functools.partial(step_threads.rows, options, progress)
    kinds = list(CROSSOVERS[target.device.type])
    for kind in kinds[:1] if options.quick else kinds:
        yield f"crossover, {kind}", functools.partial(crossover_rows, kind, *given)


def _with_floor(row: Row, ceilings: Mapping[str, float], precision: str) -> Row:
    """Of rows that count their bytes. Ceilings are those of all threads: fewer may be far above the floor."""
    if row.bytes is None:
        return row
    floor = work.floor_seconds(ceilings, precision, row.bytes, row.operations or 0.0)
    return dataclasses.replace(row, floor_seconds=floor)


def sweep_rows(
    operation: Operation, variable: str, target: Target, options: argparse.Namespace, progress: Progress
) -> list[Row]:
    """One size over powers of two: a row for each, and the row of the exponent."""
    points = sweep(_base(operation, target), variable, 3 if target.quick else 5)
    cases = {f"{variable}={point.size(variable)}": point for point in points}
    contenders = {case: _prepare(operation, point, target) for case, point in cases.items()}
    measured = measure(contenders, f"{operation.name} in {variable}", options, progress)
    smallest, *_, largest = cases
    rows = [
        dataclasses.replace(
            _timed(operation, point, target, measured[case], measured[smallest]), case=case, against=smallest
        )
        for case, point in cases.items()
    ]
    sizes = [point.size(variable) for point in points]
    fit = fit_power(sizes, [measured[case].seconds.median for case in cases])
    counts = [operation.work(point, target.dtype.itemsize) for point in points]
    arithmetic = fit_power(sizes, [count.operations or count.bytes for count in counts])
    traffic = fit_power(sizes, [count.bytes for count in counts])
    verdict = Row(
        suite=SUITE,
        name=operation.name,
        case=f"{smallest} to {largest.partition('=')[2]}",
        against=f"exponent in {variable}; arithmetic says {_rounded(arithmetic.exponent)}",
        ratio=fit.spread(),
        note=f"standard error {fit.error:.2g}, {len(sizes)} points; bytes say {_rounded(traffic.exponent)}",
    )
    return [*rows, verdict]


def thread_rows(
    operation: Operation, target: Target, options: argparse.Namespace, progress: Progress
) -> list[Row]:
    """Speedup over one thread, up to as many threads as this machine has logical CPUs."""
    point = _base(operation, target)
    run = _prepare(operation, point, target).run

    def start_threads(count: int) -> None:
        """A run outside the clock: threads are created by the first region that needs them."""
        torch.set_num_threads(count)
        run(0)

    counts = step_threads.thread_counts(os.cpu_count() or 1)
    task = progress.add_task(f"{operation.name}, threads", total=len(counts) * (options.rounds + 2))
    timings = interleave(
        [Candidate(f"threads={n}", lambda: run(0), reset=lambda n=n: start_threads(n)) for n in counts],
        rounds=options.rounds,
        threads=1,
        on_run=lambda: progress.advance(task),
    )
    measured = {case: Measured(Spread.of(timing.seconds), timing.speedup) for case, timing in timings.items()}
    return [
        dataclasses.replace(
            _timed(operation, point, target, own, measured["threads=1"]),
            case=case,
            against="threads=1",
            note=f"times faster, parallel efficiency {own.ratio.median / n:.0%}; {point}",
        )
        for n, (case, own) in zip(counts, measured.items(), strict=True)
    ]


def crossover_rows(kind: str, target: Target, options: argparse.Namespace, progress: Progress) -> list[Row]:
    """Cost of the sparse path from u to H as a multiple of the dense one's, and where it passes 1."""
    fractions = FRACTIONS[2::2] if target.quick else FRACTIONS
    rows = [_sparse_row(kind, fraction, target, options, progress) for fraction in fractions]
    costs = [row.ratio for row in rows if row.ratio is not None]
    found = Spread(
        crossover(fractions, [cost.median for cost in costs]),
        crossover(fractions, [cost.p80 for cost in costs]),
        crossover(fractions, [cost.p20 for cost in costs]),
    )
    verdict = Row(
        suite=SUITE,
        name=rows[0].name,
        case="crossover",
        against="k/N up to which sparse pays",
        ratio=found,
        note=f"where a fitted line a + b k/N passes 1; 0: never; {fractions[-1]:g}: at least",
    )
    return [*rows, verdict]


def _sparse_row(
    kind: str, fraction: float, target: Target, options: argparse.Namespace, progress: Progress
) -> Row:
    shape = CROSSOVERS[target.device.type][kind]
    point = Point(shape, ghl.HebbianRule.kwta(fraction).winners_of(shape.units))
    case, name = f"k/N={fraction:g}", f"ghl sparse / dense, {kind}"
    contenders = {"dense": _prepare(_DENSE, point, target), "sparse": _prepare(_SPARSE, point, target)}
    measured = measure(contenders, f"{name} {case}", options, progress)
    is_sparse = _dispatch.prefers_sparse(target.device.type, kind, shape.units, point.winners)
    return dataclasses.replace(
        _timed(_SPARSE, point, target, measured["sparse"], measured["dense"]),
        name=name,
        case=case,
        against="the dense path",
        fraction=fraction,
        note=f"auto takes the {'sparse' if is_sparse else 'dense'} path; {point}",
    )


def _rounded(exponent: float) -> str:
    """Of counts, which are exact: neither 4e-16 nor -0."""
    return f"{round(exponent, 2) + 0.0:g}"


def _base(operation: Operation, target: Target) -> Point:
    base = operation.base[target.device.type]
    return base.scaled("B", 0.25) if target.quick else base


def _timed(operation: Operation, point: Point, target: Target, own: Measured, other: Measured) -> Row:
    count = operation.work(point, target.dtype.itemsize)
    return Row(
        suite=SUITE,
        name=operation.name,
        ratio=own.ratio,
        seconds=own.seconds,
        against_seconds=other.seconds,
        operations=count.operations or None,
        bytes=count.bytes,
        note=str(point),
    )


# --- figure -------------------------------------------------------------------------------------

# Okabe and Ito's palette, told apart by the color-blind.
_COLORS = ("#0072B2", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#F0E442")
_RATIOS = {"threads": "speedup over one thread", "k/N": "time, sparse / dense"}
_MEASURED = re.compile(r"(B|N|D|k|threads|k/N)=([\d.]+)")


def series(rows: Sequence[Row]) -> dict[str, dict[str, list[tuple[float, Row]]]]:
    """variable -> name -> (value, row), ascending, of the rows that were timed."""
    found: dict[str, dict[str, list[tuple[float, Row]]]] = {}
    for row in rows:
        match = _MEASURED.fullmatch(row.case)
        if row.suite == SUITE and match:
            lines = found.setdefault(match[1], {})
            lines.setdefault(row.name, []).append((float(match[2]), row))
    return {
        variable: {name: sorted(points, key=lambda point: point[0]) for name, points in lines.items()}
        for variable, lines in found.items()
    }


def figure(rows: Sequence[Row], path: pathlib.Path) -> None:
    """Log-log plots of every sweep with its fit, the speedup with threads, and the crossovers.

    Raises:
        ValueError: no row of this suite was timed.
        OSError: the file cannot be written.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = series(rows)
    if not panels:
        raise ValueError("no row was timed by bench.scaling, so there is nothing to draw")
    columns = min(3, len(panels))
    height = math.ceil(len(panels) / columns)
    style = {"font.size": 8, "axes.spines.top": False, "axes.spines.right": False}
    # the same rows give the same file, bit for bit
    with mpl.rc_context(style | {"svg.hashsalt": "ghl_kernels"}):
        drawing = Figure(figsize=(4.2 * columns, 3.4 * height), dpi=120, layout="constrained")
        FigureCanvasAgg(drawing)
        grid = list(drawing.subplots(height, columns, squeeze=False).flat)
        names = dict.fromkeys(name for lines in panels.values() for name in lines)
        colors = {name: _COLORS[i % len(_COLORS)] for i, name in enumerate(names)}
        for axes, (variable, lines) in zip(grid, panels.items(), strict=False):
            _draw(axes, variable, lines, colors)
            axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), frameon=False)
        for axes in grid[len(panels) :]:
            axes.set_axis_off()
        drawing.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _draw(
    axes: Axes, variable: str, lines: dict[str, list[tuple[float, Row]]], colors: dict[str, str]
) -> None:
    is_ratio = variable in _RATIOS
    ticks = sorted({size for points in lines.values() for size, _ in points})
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlabel(variable)
    axes.set_ylabel(_RATIOS.get(variable, "seconds"))
    for name, points in lines.items():
        sizes = [size for size, _ in points]
        spreads = [row.ratio if is_ratio else row.seconds for _, row in points]
        values = [spread.median for spread in spreads]
        reach = [[s.median - s.p20 for s in spreads], [s.p80 - s.median for s in spreads]]
        label = name
        if not is_ratio:
            fit = fit_power(sizes, values)
            fitted = [fit.coefficient * size**fit.exponent for size in sizes]
            axes.plot(sizes, fitted, color=colors[name], linewidth=1)
            label = f"{name}: exponent {fit.exponent:.2f} ± {fit.error:.2f}"
        style = {"linestyle": "-" if is_ratio else "none", "linewidth": 1, "marker": "o", "markersize": 3}
        axes.errorbar(sizes, values, reach, capsize=2, label=label, color=colors[name], **style)
    if variable == "threads":
        axes.plot(ticks, ticks, color="#999999", linestyle="--", linewidth=1, label="ideal")
    elif variable == "k/N":
        axes.axhline(1.0, color="#999999", linestyle="--", linewidth=1)
