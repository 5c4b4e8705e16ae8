"""The softmax activity over the units of every position."""

from __future__ import annotations

from bench.entrants import entrants


@entrants("softmax")
def test_softmax(enter, race, contender) -> None:
    enter(race, contender)
