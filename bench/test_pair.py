"""A and G from one pass over x, against two library weight gradients."""

from __future__ import annotations

from bench.entrants import entrants


@entrants("pair")
def test_pair(enter, race, contender) -> None:
    enter(race, contender)
