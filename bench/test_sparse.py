"""A of k winners from their lists, against the dense product."""

from __future__ import annotations

from bench.entrants import entrants


@entrants("sparse")
def test_sparse(enter, race, contender) -> None:
    enter(race, contender)
