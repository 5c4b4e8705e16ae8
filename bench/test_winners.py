"""Lists of the k winners of every position."""

from __future__ import annotations

from bench.entrants import entrants


@entrants("winners")
def test_winners(enter, race, contender) -> None:
    enter(race, contender)
