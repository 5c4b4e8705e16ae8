"""Shared by the microbenchmarks: pinned threads, and one contender of one race timed by pytest-benchmark."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from bench import ceilings
from bench.interleave import pinned_threads
from bench.race import Contender, Race


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--torch-threads", type=int, default=2, help="torch's intra-op threads (default 2)")


@pytest.fixture(autouse=True)
def _pinned_threads(request: pytest.FixtureRequest) -> Iterator[None]:
    with pinned_threads(request.config.getoption("--torch-threads")):
        yield


@pytest.fixture(scope="session")
def limits(request: pytest.FixtureRequest) -> dict[str, float]:
    """The machine's ceilings, for the floors."""
    return ceilings.measure(request.config.getoption("--torch-threads"), size=1024)


@pytest.fixture
def enter(benchmark: Any, limits: dict[str, float]) -> Callable[[Race, Contender], None]:
    """Check a contender against the float64 reference, then time it."""

    def run(race: Race, contender: Contender) -> None:
        if contender.absent:
            pytest.skip(contender.absent)
        if contender.compiled:
            torch._dynamo.reset()  # it keeps a few shapes only, and raises at the next
        inputs = race.inputs()
        race.check(contender, inputs, race.expected(*inputs))
        benchmark.group = f"{race.suite} {race.case}"
        floor = race.work.floor_seconds(limits, race.target.precision)
        benchmark.extra_info.update(race.work._asdict(), floor_seconds=floor)
        benchmark(contender, *inputs)

    return run
