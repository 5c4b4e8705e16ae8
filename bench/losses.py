"""Where a rival is faster than what this package does by default, by how much, and why.

The causes are written by hand, after a recording, in ``reasons.json``: patterns of "suite/case" with a
sentence each, of which the first that fits is taken.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from bench import intensity
from bench.machine import ROOT
from bench.report import Row

REASONS = ROOT / "bench" / "reasons.json"
_WITHIN_NOISE = "none: the spreads of the rounds overlap"


class Loss(NamedTuple):
    """A case in which the fastest rival takes ``factor`` times less; the cause is "" where none is known."""

    ours: Row
    rival: Row
    factor: float
    overlaps: bool
    cause: str


def reasons() -> dict[str, str]:
    """Pattern -> sentence."""
    found: dict[str, str] = json.loads(REASONS.read_text())
    return found


def losses(rows: Iterable[Row], causes: Mapping[str, str]) -> list[Loss]:
    """The worst first."""
    found = []
    for ours, (rival, *_) in intensity.contests(rows):
        factor = intensity.seconds(ours) / intensity.seconds(rival)
        if factor > 1.0:
            assert ours.seconds is not None
            assert rival.seconds is not None
            overlaps = rival.seconds.p80 >= ours.seconds.p20
            cause = _cause(ours, causes) or (_WITHIN_NOISE if overlaps else "")
            found.append(Loss(ours, rival, factor, overlaps, cause))
    return sorted(found, key=lambda loss: -loss.factor)


def _cause(row: Row, causes: Mapping[str, str]) -> str:
    where = f"{row.suite}/{row.case}"
    return next((text for pattern, text in causes.items() if fnmatch.fnmatchcase(where, pattern)), "")
