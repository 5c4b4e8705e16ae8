"""A race: one operation on one case, this package's backends beside the baselines that stand for the same.

Every contender's result is compared with the float64 reference at the size that is timed, in the same run;
one that is wrong is reported and not timed. On a GPU inputs rotate through copies that no cache holds
together. On a CPU they do not: a layer's responses have just been written when they compete, and what fits
the last-level cache may be read from it, faster than the floor's copy bandwidth allows.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import ghl_kernels as ghl
from bench import parity
from bench.failures import reason
from bench.gpu.timing import Timed, l2_bytes, sets_for, time_all
from bench.interleave import Candidate, Spread, interleave
from bench.report import Bar, Row
from bench.work import Work

OURS = {"cpu": ("cpu", "eager"), "cuda": ("triton", "cuda", "eager")}
_SAMPLE = 1e-3  # seconds that a timed sample lasts at least, far above the resolution of the clock
_MOST_RUNS = 200  # in one sample
_LEAST_ROUNDS = 3
STABLE_SECONDS = 1e-3  # below, what else a shared machine does shows in the ratio


class Target(NamedTuple):
    """Where a race is run, in which dtype, and whether the small selection of cases is taken.

    ``dry``: a GPU's race on a CPU, each contender run once, to see that it works there.
    """

    device: torch.device
    dtype: torch.dtype
    quick: bool = False
    dry: bool = False

    @classmethod
    def of(cls, device: torch.device, quick: bool = False) -> Target:
        """float32 on a CPU, bfloat16 on a GPU."""
        return cls(device, torch.float32 if device.type == "cpu" else torch.bfloat16, quick)

    @property
    def kind(self) -> str:
        """Type of the device whose backends, layout and clock are taken: "cpu" or "cuda"."""
        return "cuda" if self.dry else self.device.type

    @property
    def precision(self) -> str:
        """Name of the matrix rate among the ceilings."""
        return {torch.float32: "fp32", torch.bfloat16: "bf16"}[self.dtype]

    @property
    def tolerance(self) -> float:
        """Of the largest entry of a sum; in bfloat16 y is rounded, and with a library A."""
        return parity.TOLERANCE if self.dtype == torch.float32 else 2e-2

    @property
    def memory_format(self) -> str:
        return "nchw" if self.kind == "cpu" else "nhwc"

    @property
    def options(self) -> dict[str, Any]:
        return {"device": self.device, "dtype": self.dtype}


@dataclasses.dataclass(frozen=True)
class Contender:
    """One way to the result.

    Attributes:
        run: from the race's inputs to a result; may change inputs in place, again and again.
        backend: of this package, in use while it runs.
        baseline: code of the baseline.
        result: from what ``run`` returns to the tensors that are compared.
        expected: in place of the race's, for one that computes another rule.
        absent: why it cannot run here.
        compiled: the first run compiles, which takes seconds.
        auto: it is what this package does on the device where nothing is chosen.
        rule: what it computes, if that is not what the others do.
    """

    name: str
    run: Callable[..., Any]
    backend: str | None = None
    baseline: str | None = None
    result: Callable[[Any], Any] = lambda result: result
    expected: Callable[..., Any] | None = None
    absent: str = ""
    compiled: bool = False
    note: str | None = None
    auto: bool = False
    rule: str | None = None

    def __call__(self, *inputs: Tensor) -> Any:
        if self.backend is None:
            return self.run(*inputs)
        with ghl.use_backend(self.backend):
            return self.run(*inputs)


@dataclasses.dataclass(frozen=True)
class Race:
    """One operation on one case; cheap to make, tensors come with ``inputs()``.

    Attributes:
        inputs: the tensors that every contender is given.
        expected: from the inputs to the float64 result, a tensor or a tuple of them.
        reference: name of the contender that the others are quoted against.
        work: bytes and operations of the case.
        tolerance: of the largest expected entry.
        bars: by contender.
        stable: ratios of this package's first backend may be compared between runs, if it takes long enough.
        fraction: winners / units.
    """

    suite: str
    case: str
    target: Target
    inputs: Callable[[], tuple[Tensor, ...]]
    expected: Callable[..., Any]
    contenders: Sequence[Contender]
    reference: str
    work: Work
    tolerance: float
    bars: Mapping[str, Bar] = dataclasses.field(default_factory=dict)
    stable: bool = True
    fraction: float | None = None

    def check(self, contender: Contender, inputs: Sequence[Tensor], expected: Any) -> None:
        """Compare a contender's result on copies of the inputs with the expected one.

        Raises:
            ParityError: it is off by more than the tolerance.
        """
        if contender.expected is not None:
            expected = contender.expected(*inputs)
        actual = contender.result(contender(*(tensor.clone() for tensor in inputs)))
        for one, wanted in zip(_tuple(actual), _tuple(expected), strict=True):
            parity.assert_close(contender.name, one, wanted, self.tolerance)


@dataclasses.dataclass(frozen=True)
class Options:
    """How long and with what to measure.

    Attributes:
        rounds: timed runs of each contender, fewer where they would take longer than ``seconds``.
        baselines: codes of those that take part; None for all.
    """

    rounds: int
    threads: int
    target: Target
    baselines: frozenset[str] | None = None
    seconds: float = 20.0


def ours(target: Target, run: Callable[..., Any], what: str = "ghl", **fields: Any) -> list[Contender]:
    """A contender for every backend of this package that belongs on the device."""
    status = {status.name: status for status in ghl.backends()}
    return [
        Contender(
            f"{what} {name}",
            run,
            backend=name,
            absent="" if status[name].available else status[name].reason,
            **{"auto": name == OURS[target.kind][0]} | fields,
        )
        for name in OURS[target.kind]
    ]


def measure(race: Race, options: Options, ceilings: Mapping[str, float]) -> list[Row]:
    """Check every contender and time those that are right; a row for each, the absent ones included."""
    rows = {
        contender.name: Row(
            suite=race.suite,
            case=race.case,
            name=contender.name,
            baseline=contender.baseline,
            bar=race.bars.get(contender.name),
            stable=race.stable and contender.backend == OURS[race.target.kind][0],
            operations=race.work.operations,
            bytes=race.work.bytes,
            floor_seconds=race.work.floor_seconds(ceilings, race.target.precision),
            fraction=race.fraction,
            note=contender.note,
            auto=contender.auto,
            rule=contender.rule,
        )
        for contender in race.contenders
        if _takes_part(race, contender, options)
    }
    ready = _ready(race, options, rows)
    if ready:
        _time(race, ready, options, rows)
    return list(rows.values())


def _takes_part(race: Race, contender: Contender, options: Options) -> bool:
    wanted = options.baselines
    return wanted is None or contender.name == race.reference or contender.baseline in {None, *wanted}


def _ready(race: Race, options: Options, rows: dict[str, Row]) -> list[Contender]:
    """The contenders that are here and right; the rows of the others say why not."""
    if any(contender.compiled for contender in race.contenders):
        torch._dynamo.reset()  # it keeps a few shapes only, and raises at the next
    inputs = race.inputs()
    expected = race.expected(*inputs)
    found = []
    for contender in race.contenders:
        if contender.name not in rows:
            continue
        absent = contender.absent
        if (
            contender.compiled
            and options.target.quick
            and contender.baseline not in (options.baselines or ())
        ):
            absent = absent or "it compiles for seconds; not in the quick selection"
        if absent:
            rows[contender.name] = dataclasses.replace(rows[contender.name], note=f"absent: {absent}")
            continue
        try:
            race.check(contender, inputs, expected)
        except Exception as error:  # whatever is wrong with one, the others go on
            rows[contender.name] = dataclasses.replace(rows[contender.name], error=reason(error))
            continue
        found.append(contender)
    return found


def _time(race: Race, ready: Sequence[Contender], options: Options, rows: dict[str, Row]) -> None:
    """Fill in the times and the ratios to the reference, or to the first contender where it is missing."""
    names = [contender.name for contender in ready]
    reference = race.reference if race.reference in names else names[0]
    first = names.index(reference)
    ordered = [ready[first], *ready[:first], *ready[first + 1 :]]
    inputs = race.inputs()
    clock = _time_on_cpu if race.target.kind == "cpu" else _time_on_gpu
    timed = clock(ordered, inputs, options)
    for name in names:
        if name not in timed:
            rows[name] = dataclasses.replace(rows[name], error="it is right, and could not be timed")
            continue
        seconds, ratio = timed[name]
        against, (against_seconds, _) = next(iter(timed.items()))
        rows[name] = dataclasses.replace(
            rows[name],
            against=against,
            seconds=seconds,
            against_seconds=against_seconds,
            ratio=ratio,
            speedup=True,
            stable=rows[name].stable and seconds.median >= STABLE_SECONDS,
        )


def _time_on_cpu(
    contenders: Sequence[Contender], inputs: tuple[Tensor, ...], options: Options
) -> dict[str, tuple[Spread, Spread]]:
    """Seconds of one run and times faster than the first contender, from interleaved rounds."""
    runs: dict[str, int] = {}
    candidates = []
    total = 0.0
    for contender in contenders:
        seconds = _seconds_once(contender, inputs)
        runs[contender.name] = max(1, min(_MOST_RUNS, math.ceil(_SAMPLE / max(seconds, 1e-7))))
        total += seconds * runs[contender.name]
        candidates.append(Candidate(contender.name, _repeated(contender, inputs, runs[contender.name])))
    rounds = max(_LEAST_ROUNDS, min(options.rounds, int(options.seconds / max(total, 1e-9)) - 1))
    timings = interleave(candidates, rounds=rounds, threads=options.threads, warmup=1)
    single = {
        name: tuple(seconds / runs[name] for seconds in timing.seconds) for name, timing in timings.items()
    }
    reference = single[contenders[0].name]
    return {
        name: (
            Spread.of(seconds),
            Spread.of([other / own for own, other in zip(seconds, reference, strict=True)]),
        )
        for name, seconds in single.items()
    }


def _repeated(contender: Contender, inputs: tuple[Tensor, ...], runs: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(runs):
            contender(*inputs)

    return run


def _seconds_once(contender: Contender, inputs: tuple[Tensor, ...]) -> float:
    start = time.perf_counter()
    contender(*inputs)
    return time.perf_counter() - start


def _time_on_gpu(
    contenders: Sequence[Contender], inputs: tuple[Tensor, ...], options: Options
) -> dict[str, tuple[Spread, Spread]]:
    """As on a CPU, from replays of a CUDA graph; one that could not be timed is left out."""
    moved = sum(tensor.numel() * tensor.element_size() for tensor in inputs)
    copies = sets_for(moved, l2_bytes(options.target.device)) - 1
    sets = [inputs, *(tuple(tensor.clone() for tensor in inputs) for _ in range(copies))]
    timed: dict[str, Timed] = time_all(
        {c.name: lambda index, c=c: c(*sets[index]) for c in contenders},
        sets=len(sets),
        device=options.target.device,
        rounds=options.rounds,
    )
    found = {name: sample.seconds for name, sample in timed.items() if sample.seconds is not None}
    if not found:
        return {}
    reference = next(iter(found.values()))
    return {
        name: (
            seconds,
            Spread(
                reference.median / seconds.median, reference.p20 / seconds.p80, reference.p80 / seconds.p20
            ),
        )
        for name, seconds in found.items()
    }


def _tuple(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)
