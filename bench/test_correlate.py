"""A, dense, from activities that are there."""

from __future__ import annotations

from bench.entrants import entrants


@entrants("correlate")
def test_correlate(enter, race, contender) -> None:
    enter(race, contender)
