"""A of a depthwise convolution."""

from __future__ import annotations

from bench.entrants import entrants


@entrants("depthwise")
def test_depthwise(enter, race, contender) -> None:
    enter(race, contender)
