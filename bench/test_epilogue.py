"""From A to the gated gradient, to the step and to the learned weight."""

from __future__ import annotations

from bench.entrants import entrants


@entrants("epilogue")
def test_epilogue(enter, race, contender) -> None:
    enter(race, contender)
