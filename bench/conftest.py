"""Shared by the microbenchmarks: pinned threads and the backends that run here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import ghl_kernels as ghl
from bench.interleave import pinned_threads


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--torch-threads", type=int, default=2, help="torch's intra-op threads (default 2)")


@pytest.fixture(autouse=True)
def _pinned_threads(request: pytest.FixtureRequest) -> Iterator[None]:
    with pinned_threads(request.config.getoption("--torch-threads")):
        yield


@pytest.fixture(params=["cpu", "eager"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test once with each backend of this package, skipping those that cannot run here."""
    status = next(status for status in ghl.backends() if status.name == request.param)
    if not status.available:
        pytest.skip(f"backend {status.name}: {status.reason}")
    with ghl.use_backend(request.param):
        yield request.param
