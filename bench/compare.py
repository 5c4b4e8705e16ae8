"""A run against an earlier one: which ratios got worse, which are new and which are missing.

Ratios, not times: on a shared machine only these survive from run to run, and only those of rows that are
marked as stable in the earlier run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence

from bench.report import Row

MARGIN = 0.25  # two quiet runs on a shared machine differ by less


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Sentences, a row each. A run fails where something got worse or is missing, or nothing was compared."""

    worse: list[str]
    new: list[str]
    missing: list[str]
    compared: int

    @property
    def failed(self) -> bool:
        return bool(self.worse or self.missing) or not self.compared

    def __str__(self) -> str:
        lines = [f"{self.compared} stable ratios compared, {len(self.worse)} got worse"]
        for heading, texts in (("WORSE", self.worse), ("new", self.new), ("missing", self.missing)):
            lines += [f"  {heading}: {text}" for text in texts]
        return "\n".join(lines)


def compare(
    rows: Sequence[Row], before: Sequence[Row], suites: Collection[str], margin: float = MARGIN
) -> Comparison:
    """Compare the stable rows of two runs.

    Args:
        rows: of this run.
        before: of the earlier one.
        suites: that this run took; the earlier rows of others are left out.
        margin: share by which a ratio may get worse.

    Raises:
        ValueError: a margin that is not positive.
    """
    if not margin > 0.0:
        raise ValueError(f"margin must be positive, got {margin}")
    now = {row.key[:3]: row for row in rows}
    then = {row.key[:3]: row for row in before if row.stable and row.ratio and row.suite in suites}
    both = now.keys() & then.keys()
    worse = [
        _name(now[key]) + why for key in then if key in both and (why := _worse(now[key], then[key], margin))
    ]
    return Comparison(
        worse=worse,
        new=[_name(row) for key, row in now.items() if row.stable and key not in then],
        missing=[_name(row) for key, row in then.items() if key not in now],
        compared=len(both),
    )


def _worse(now: Row, then: Row, margin: float) -> str:
    """Why a row is worse than it was; "" where it is not."""
    if now.ratio is None:
        return f": no ratio, {now.error or now.note}"
    if now.against != then.against:
        return f": against {now.against}, before against {then.against}"
    assert then.ratio is not None
    change = now.ratio.median / then.ratio.median
    if (1.0 / change if now.speedup else change) <= 1.0 + margin:
        return ""
    better = "at least" if now.speedup else "at most"
    allowed = then.ratio.median * (1.0 / (1.0 + margin) if now.speedup else 1.0 + margin)
    return f": {now.ratio.median:.3g}x, before {then.ratio.median:.3g}x, allowed {better} {allowed:.3g}x"


def _name(row: Row) -> str:
    return f"{row.suite}, {row.case}, {row.name}"
