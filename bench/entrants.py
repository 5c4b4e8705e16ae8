"""The races as pytest parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.race import Target
from bench.races import SUITES


def entrants(suite: str) -> Any:
    """A mark that runs a test for every contender of every race of the suite, on the CPU."""
    return pytest.mark.parametrize(
        ("race", "contender"),
        [
            pytest.param(race, contender, id=f"{race.case}-{contender.name}".replace(" ", "_"))
            for race in SUITES[suite](Target.of(torch.device("cpu")))
            for contender in race.contenders
        ],
    )
