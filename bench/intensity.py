"""Rows by the arithmetic intensity of their case, and how each class fares against its fastest rivals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from bench.report import Row

# FLOP per byte: below the first a GPU's memory is the limit, above the second its matrix units
CLASSES = (("below 184", 0.0, 184.0), ("184 to 800", 184.0, 800.0), ("above 800", 800.0, math.inf))
NO_PRODUCTS = "no products"


class Mean(NamedTuple):
    """Geometric mean, over ``cases``, of the fastest rival's time as a multiple of our fastest backend's."""

    times_faster: float
    cases: int


def class_of(row: Row) -> str:
    """Name of the row's class; ``NO_PRODUCTS`` where no matrices are multiplied."""
    if row.intensity is None:
        return NO_PRODUCTS
    return next(name for name, low, high in CLASSES if low <= row.intensity < high)


def by_case(rows: Iterable[Row]) -> list[list[Row]]:
    """The rows of each suite and case, in the order in which they come."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row.suite, row.case), []).append(row)
    return list(found.values())


def fastest(rows: Iterable[Row]) -> Row | None:
    """The row with the smallest median time; None where nothing was timed."""
    timed = [row for row in rows if row.seconds is not None]
    return min(timed, key=lambda row: row.seconds.median, default=None)


def mean(rows: Sequence[Row]) -> Mean | None:
    """None where no case has both a contender of this package and a rival."""
    factors = []
    for case in by_case(rows):
        ours = fastest(row for row in case if row.is_ours)
        rival = fastest(row for row in case if not row.is_ours)
        if ours and rival:
            factors.append(rival.seconds.median / ours.seconds.median)
    if not factors:
        return None
    return Mean(math.exp(sum(map(math.log, factors)) / len(factors)), len(factors))
