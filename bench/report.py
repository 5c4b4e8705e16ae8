"""What a benchmark reports: rows beside their bars, kept as JSON (bench/tables.py prints them)."""

from __future__ import annotations

import collections
import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from bench.interleave import Spread
from ghl_kernels.demo.output import replacing

FORMAT = 2  # of the JSON documents


@dataclasses.dataclass(frozen=True)
class Bar:
    """What a median has to reach."""

    limit: float
    at_least: bool = False

    def met_by(self, median: float) -> bool:
        return median >= self.limit if self.at_least else median <= self.limit

    def __str__(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.limit:g}x"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One contender on one case.

    Attributes:
        suite: which part of the benchmark.
        name: the contender.
        case: shape and rule, or the network.
        against: what ``ratio`` is a multiple of.
        ratio: time as a multiple of the reference's, per round; with ``speedup`` how many times faster.
            None where nothing was timed: ``error`` or ``note`` says why.
        speedup: larger ratios are better.
        bar: what the median has to reach; None for what is shown and not judged.
        stable: the ratio may be compared between runs on a shared machine.
        baseline: code of the baseline (bench.baselines.BASELINES); None for this package.
        auto: what this package does where nothing is chosen; its other ways are shown beside it.
        rule: what the contender computes, where one case has contenders of several rules.
        seconds, against_seconds: of one run of the contender and of the reference.
        operations, bytes: what the case needs at least; multiplications and additions count one each.
        floor_seconds: max(bytes / bandwidth, operations / rate) of the machine, measured in the same run.
        peak_ratio: peak memory as a multiple of the reference's.
        images_per_second: of a training step.
        fraction: winners / units where few units win.
        note: what a reader has to know.
        error: why the contender failed.
    """

    suite: str
    name: str
    case: str = ""
    against: str = ""
    ratio: Spread | None = None
    speedup: bool = False
    bar: Bar | None = None
    stable: bool = False
    baseline: str | None = None
    auto: bool = False
    rule: str | None = None
    seconds: Spread | None = None
    against_seconds: Spread | None = None
    operations: float | None = None
    bytes: float | None = None
    floor_seconds: float | None = None
    peak_ratio: float | None = None
    images_per_second: float | None = None
    fraction: float | None = None
    note: str | None = None
    error: str | None = None

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What names the row in every run."""
        return self.suite, self.case, self.name, self.against

    @property
    def is_ours(self) -> bool:
        """Whether the contender is of this package."""
        return self.name.startswith(("ghl ", "GHL", "learn_"))

    @property
    def unit(self) -> str:
        """Of ``ratio``: "x", and "" where it is a fitted exponent or crossover, which took no time."""
        return "" if self.suite == "scaling" and self.seconds is None else "x"

    @property
    def met(self) -> bool | None:
        """Whether the bar is met; None without a bar. A row that failed misses its bar."""
        if self.bar is None:
            return None
        return self.ratio is not None and self.bar.met_by(self.ratio.median)

    @property
    def of_floor(self) -> float | None:
        """Time as a multiple of the floor."""
        if self.seconds is None or not self.floor_seconds:
            return None
        return self.seconds.median / self.floor_seconds

    @property
    def intensity(self) -> float | None:
        """Operations per byte that has to be moved."""
        return self.operations / self.bytes if self.operations and self.bytes else None

    def to_json(self) -> dict[str, Any]:
        """Without the fields that are at their defaults."""
        plain = dataclasses.asdict(self)
        return {
            field.name: plain[field.name]
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Row:
        """The inverse of to_json.

        Raises:
            TypeError: a field that a row does not have, or one that is missing.
        """
        fields = dict(document)
        for name, kind in (("ratio", Spread), ("seconds", Spread), ("against_seconds", Spread), ("bar", Bar)):
            if fields.get(name) is not None:
                fields[name] = kind(**fields[name])
        return cls(**fields)


def duration(seconds: float) -> str:
    """With three digits and the unit that suits."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def write_json(
    path: pathlib.Path,
    rows: Sequence[Row],
    settings: Mapping[str, object],
    machine: Mapping[str, object],
    runs: Sequence[Mapping[str, object]] = (),
) -> None:
    """Write the rows with the machine and the settings that they were measured on and with.

    A reader never finds half a document: the file is replaced when the new one is complete.

    Args:
        runs: what is not the same for all suites, by the run that measured them (bench/recording.py).

    Raises:
        ValueError: two rows of one suite, case and name, which no comparison could tell apart.
    """
    counts = collections.Counter((row.suite, row.case, row.name) for row in rows)
    if repeated := [", ".join(key) for key, count in counts.items() if count > 1]:
        raise ValueError(f"rows must have a suite, case and name of their own, got twice: {repeated}")
    document = {
        "format": FORMAT,
        "machine": machine,
        "settings": settings,
        "runs": runs,
        "rows": [row.to_json() for row in rows],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as unfinished:
        unfinished.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")


class Document:
    """A JSON document that write_json wrote.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is something else than such a document.
    """

    def __init__(self, path: pathlib.Path) -> None:
        try:
            document = json.loads(path.read_text())
        except ValueError:
            document = None
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise ValueError(f"{path} is no benchmark document of format {FORMAT}")
        self.machine: dict[str, Any] = document["machine"]
        self.settings: dict[str, Any] = document["settings"]
        self.runs: list[dict[str, Any]] = document.get("runs", [])
        try:
            self.rows = [Row.from_json(row) for row in document["rows"]]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} has a row that is none: {error}") from None
