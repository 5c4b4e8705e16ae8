"""Fixtures of all tests: fixed seeds, the backends, poisoned torch.empty; the count of skips by reason."""

from __future__ import annotations

import collections
import importlib.util
import os
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import pytest
import torch

import ghl_kernels as ghl
from bench.interleave import pinned_threads
from ghl_kernels import _dispatch, _native

# Where tools/cuda_on_host builds the CUDA kernels for the CPU; kernels for a GPU are tested by test_gpu.py.
HOST_BUILD = pathlib.Path(__file__).resolve().parents[1] / "build" / "cuda-on-host"
if not torch.cuda.is_available():
    os.environ.setdefault("GHL_NATIVE_DIR", str(HOST_BUILD))

# Triton reads it when it is imported, so that its kernels run on CPU tensors in the whole session.
os.environ["TRITON_INTERPRET"] = "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None
if HAS_TRITON:
    import triton_bf16

    triton_bf16.install()

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


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For small tensors: they gain nothing from more threads, and lose much where the cores are busy."""
    with pinned_threads(1):
        yield


@pytest.fixture(params=["eager", "cpu", "triton", "cuda"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Runs the test on each backend; one that is not built or installed is skipped, with its reason.

    All but "eager" are chosen by "auto", which takes them wherever they can run, so that other dtypes go
    through the fallback that users get. Triton's kernels run in its interpreter, CUDA's in a build for the
    host. A native module that is built and does not load is an error, never a skip.
    """
    if request.param == "cpu":
        try:
            _native.load_cpu()
        except _native.NativeNotBuilt as reason:
            pytest.skip(str(reason))
    if request.param == "triton" and not HAS_TRITON:
        pytest.skip("triton is not installed")
    if request.param == "cuda":
        try:
            on_host = _native.load_cuda().build_info()["on_host"]
        except _native.NativeNotBuilt as reason:
            pytest.skip(str(reason))
        if not on_host:
            pytest.skip("the CUDA module is built for GPUs, not for the host")
    if request.param in ("triton", "cuda"):
        monkeypatch.setattr(_dispatch, "_PREFERENCE", {"cpu": (request.param, "eager")})
        monkeypatch.setattr(_dispatch, "computes_pairs", lambda device_type: True)
    with ghl.use_backend("eager" if request.param == "eager" else "auto"):
        yield request.param


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The share of kernels that a CPU runs thread by thread, or in Triton's interpreter, is cut.

    Sweeps on the interpreter are slow tests, and so is all but every seventh case of a broad one, and of a
    large one with CUDA's kernels; the folders of these backends have sweeps of their own that are not.
    """
    cases: collections.Counter[str] = collections.Counter()
    for item in items:
        callspec = getattr(item, "callspec", None)
        backend = callspec.params.get("backend") if callspec else None
        is_large = item.get_closest_marker("large") is not None
        name = f"{item.path}::{item.originalname} {backend}"
        if backend == "triton" and is_large:
            item.add_marker(pytest.mark.skip(reason="too much for Triton's interpreter"))
            continue
        if backend not in ("triton", "cuda"):
            continue
        is_one_of_many = is_large if backend == "cuda" else item.get_closest_marker("broad") is not None
        sweeps = backend == "triton" and hypothesis.is_hypothesis_test(item.obj)
        if sweeps or (is_one_of_many and cases[name] % 7):
            item.add_marker("slow")
        cases[name] += 1


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
