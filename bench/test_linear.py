"""A linear layer's H, A and G."""

from __future__ import annotations

from bench.entrants import entrants


@entrants("linear")
def test_linear(enter, race, contender) -> None:
    enter(race, contender)
