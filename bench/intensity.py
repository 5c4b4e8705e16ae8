"""Rows by the arithmetic intensity of their case, and how this package fares against its fastest rivals."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from bench.report import Row

# FLOP per byte: below the first a GPU's memory is the limit, above the second its matrix units
CLASSES = (("below 184", 0.0, 184.0), ("184 to 800", 184.0, 800.0), ("above 800", 800.0, math.inf))
NO_PRODUCTS = "no products"


class Mean(NamedTuple):
    """Geometric mean, over ``cases``, of the fastest rival's time as a multiple of ours."""

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


class Contest(NamedTuple):
    """What this package does by default on one case, and the rivals that compute the same, fastest first."""

    ours: Row
    rivals: list[Row]


def contests(rows: Iterable[Row]) -> list[Contest]:
    """Of every case and rule for which this package and a rival were timed."""
    found = []
    for case in by_case(rows):
        timed = sorted((row for row in case if row.seconds is not None), key=seconds)
        for ours in (row for row in timed if row.auto):
            rivals = [row for row in timed if not row.is_ours and row.rule == ours.rule]
            if rivals:
                found.append(Contest(ours, rivals))
    return found


def seconds(row: Row) -> float:
    """Median of a row that was timed."""
    assert row.seconds is not None
    return row.seconds.median


def mean(rows: Iterable[Row]) -> Mean | None:
    """None where no case has both a contender of this package and a rival."""
    factors = [seconds(rivals[0]) / seconds(ours) for ours, rivals in contests(rows)]
    if not factors:
        return None
    return Mean(math.exp(sum(map(math.log, factors)) / len(factors)), len(factors))
