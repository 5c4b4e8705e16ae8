"""Where the backend can run, and what it says where it cannot."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

import ghl_kernels as ghl
from ghl_kernels import _dispatch
from ghl_kernels.backends import triton as backend

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is found out once a process is found out again, before and after."""
    monkeypatch.setattr(_dispatch, "_logged", set())
    caches = (backend.is_interpreted, backend._problem, backend._device_problem)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A machine with one GPU and Triton compiling for it."""
    chip = SimpleNamespace(capability=(9, 0))
    monkeypatch.setattr(backend, "is_interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: chip.capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Some GPU")
    return chip


def test_the_interpreter_runs_on_cpu_tensors() -> None:
    assert backend.status() == (True, "Triton's interpreter, on CPU tensors (TRITON_INTERPRET is set)")
    assert backend.refusal(CPU, torch.float32) == ""
    assert "not on cuda" in backend.refusal(CUDA, torch.float32)
    with ghl.use_backend("triton"):
        assert ghl.functional.kwta(torch.tensor([[1.0, 3.0, 2.0]]), 1).tolist() == [[0.0, 3.0, 0.0]]


def test_a_gpu_that_can(gpu: SimpleNamespace) -> None:
    available, reason = backend.status()
    assert available
    assert reason.startswith("Triton 3.")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert backend.refusal(CUDA, dtype) == ""
        assert _dispatch.select(CUDA, dtype) is backend
    assert "not on cpu" in backend.refusal(CPU, torch.float32)


def test_an_old_gpu(gpu: SimpleNamespace, caplog: pytest.LogCaptureFixture) -> None:
    """auto falls back and says why once; the explicit choice raises with the reason."""
    gpu.capability = (7, 5)
    reason = "it needs a GPU of sm_80 or newer, Some GPU is sm_75"
    assert backend.status() == (False, reason)
    assert backend.refusal(CUDA, torch.float32) == reason
    with caplog.at_level(logging.INFO, "ghl_kernels"):
        for _ in range(3):
            assert _dispatch.select(CUDA, torch.float32).__name__.endswith("eager")
    assert [reason in message for message in caplog.messages if "'triton'" in message] == [True]
    with pytest.raises(RuntimeError, match=reason):
        ghl.use_backend("triton")


@pytest.mark.parametrize(
    ("found", "version", "reason"),
    [
        (False, "", "Triton is not installed"),
        (True, "3.5.1", r"it needs Triton 3.6 or newer, found 3.5.1"),
        (True, "2.9", r"it needs Triton 3.6 or newer, found 2.9"),
        (True, "3.5rc1", r"it needs Triton 3.6 or newer, found 3.5rc1"),
    ],
)
def test_no_triton_or_an_old_one(
    gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, found: bool, version: str, reason: str
) -> None:
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: found or None)
    monkeypatch.setattr(backend, "_version", lambda: version)
    assert reason in backend.status()[1]
    assert reason in backend.refusal(CUDA, torch.float32)
    with pytest.raises(RuntimeError, match=reason):
        ghl.use_backend("triton")


def test_a_triton_that_does_not_load(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> str:
        raise ImportError("libtriton.so: undefined symbol")

    monkeypatch.setattr(backend, "_version", broken)
    assert backend.status() == (False, "Triton does not load: libtriton.so: undefined symbol")


def test_a_newer_version_is_taken(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_version", lambda: "3.10.0+git1234")
    assert backend.status() == (True, "Triton 3.10.0+git1234")


def test_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "is_interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert backend.status() == (False, "torch sees no GPU")


def test_dtypes(gpu: SimpleNamespace) -> None:
    """float64 goes to the eager backend under auto and is refused otherwise."""
    assert "not torch.float64" in backend.refusal(CUDA, torch.float64)
    assert _dispatch.select(CUDA, torch.float64).__name__.endswith("eager")
    with (
        ghl.use_backend("triton"),
        pytest.raises(RuntimeError, match=r"bfloat16 and float16, not torch\.float64"),
    ):
        _dispatch.select(CUDA, torch.float64)


def test_the_interpreter_without_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's own interpreter gets it wrong without an error, so it is refused there."""
    monkeypatch.setattr(backend, "_interpreter_rounds_bfloat16", lambda: False)
    assert "bfloat16 wrongly" in backend.refusal(CPU, torch.bfloat16)
    assert backend.refusal(CPU, torch.float16) == ""


def test_other_names_are_no_operations() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'linear'"):
        _ = backend.linear
