"""Fixtures of all tests: fixed seeds, the backends, poisoned torch.empty; the count of skips by reason."""

from __future__ import annotations

import collections
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import pytest
import torch

import ghl_kernels as ghl
from ghl_kernels import _native

# Derandomized: CI must be red for the same examples as the machine at hand. GHL_EXAMPLES scales every sweep.
hypothesis.settings.register_profile(
    "ghl",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=int(os.environ.get("GHL_EXAMPLES", "60")),
    # function-scoped fixtures only set state that every example shares (backend, poison)
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("ghl")


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same random numbers in every run."""
    torch.manual_seed(20260113)


@pytest.fixture(params=["eager", "cpu"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test on each backend; the cpu one is skipped, with its reason, where it is not built.

    "cpu" is chosen by "auto", which takes it wherever it can run, so that float16 and float64 go through
    the fallback that users get. A native module that is built and does not load is an error, never a skip.
    """
    if request.param == "cpu":
        try:
            _native.load_cpu()
        except _native.NativeNotBuilt as reason:
            pytest.skip(str(reason))
    with ghl.use_backend("eager" if request.param == "eager" else "auto"):
        yield request.param


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty and its kin, called from the package, return NaN (integers: a huge value), not leftovers.

    An element that a kernel forgets to write is then wrong in every run, not only in unlucky ones.
    """
    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
    ):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


def _poisoned(empty: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = empty(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.startswith("ghl_kernels") and tensor.device.type != "meta":
            tensor.fill_(float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)
        return tensor

    return poisoned


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """How many tests were skipped, by reason."""
    reasons = collections.Counter(
        report.longrepr[2].removeprefix("Skipped: ") if isinstance(report.longrepr, tuple) else "no reason"
        for report in terminalreporter.stats.get("skipped", [])
    )
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"{count} skipped: {reason}")
