"""A document that grows suite by suite.

It is on disk after every suite, so that a failure loses nothing that was measured before it. A long recording
may be made in several runs: ``update`` keeps the rows of other suites, if they were measured on the same
machine, with the same versions and settings. What may differ between runs is kept for each of them: commit,
date, seconds, clocks and ceilings.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

from bench import machine, report
from bench.report import Row

_SAME_MACHINE = ("machine", "versions", "instruction_set", "device", "gpu")
_SAME_SETTINGS = ("quick", "baselines", "networks", "rounds", "threads")


@dataclasses.dataclass
class Recording:
    """Rows so far, and the runs that they are from.

    Attributes:
        path: of the document; None keeps it in memory.
        order: of the suites in the document.
    """

    path: pathlib.Path | None
    settings: Mapping[str, Any]
    machine: Mapping[str, Any]
    order: Sequence[str]
    rows: list[Row] = dataclasses.field(default_factory=list)
    runs: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def update(self, before: report.Document) -> None:
        """Start from an earlier document.

        Raises:
            ValueError: it is from another machine or was made with other versions or settings.
        """
        pairs = [("machine", before.machine, self.machine, _SAME_MACHINE)]
        pairs += [("settings", before.settings, self.settings, _SAME_SETTINGS)]
        for what, then, now, names in pairs:
            for name in names:
                old, new = then.get(name), json.loads(json.dumps(now.get(name)))
                if old != new:
                    raise ValueError(f"{what}, {name}: now {new}, in the document {old}")
        self.rows, self.runs = list(before.rows), list(before.runs)

    def add(self, suites: Sequence[str], rows: Sequence[Row], run: Mapping[str, Any]) -> None:
        """Replace the rows of the suites, and write the document.

        Raises:
            OSError: it cannot be written.
        """
        kept = [row for row in self.rows if row.suite not in suites]
        self.rows = sorted([*kept, *rows], key=lambda row: self.order.index(row.suite))
        for old in self.runs:
            old["suites"] = [name for name in old["suites"] if name not in suites]
        self.runs = [old for old in self.runs if old["suites"]] + [{"suites": list(suites), **run}]
        if self.path is not None:
            recorded = {name for each in self.runs for name in each["suites"]}
            settings = dict(self.settings) | {"suites": [name for name in self.order if name in recorded]}
            report.write_json(self.path, self.rows, settings, self.machine, self.runs)


class Clock:
    """What is said of one run: when it began, how long it took, and the machine's state around it."""

    def __init__(self, described: Mapping[str, Any]) -> None:
        self._described = described
        self._date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self._before = machine.clocks()
        self._start = time.perf_counter()

    def stop(self) -> dict[str, Any]:
        """The run's entry, without its suites."""
        return {
            "date": self._date,
            "seconds": round(time.perf_counter() - self._start, 1),
            **{name: self._described[name] for name in ("commit", "uncommitted_changes", "ceilings")},
            "clocks": {"before": self._before, "after": machine.clocks()},
        }
