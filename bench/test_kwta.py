"""k-WTA over channels and over rows."""

from __future__ import annotations

from bench.entrants import entrants


@entrants("kwta")
def test_kwta(enter, race, contender) -> None:
    enter(race, contender)
