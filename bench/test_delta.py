"""The whole Hebbian part, u -> H, against everything that computes it."""

from __future__ import annotations

from bench.entrants import entrants


@entrants("delta")
def test_delta(enter, race, contender) -> None:
    enter(race, contender)
