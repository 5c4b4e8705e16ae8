"""Where the backend for GPUs can run, and what it says where it cannot."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

import ghl_kernels as ghl
from ghl_kernels import _dispatch, _native
from ghl_kernels.backends import cuda as backend

CUDA = torch.device("cuda", 0)
NO_IMAGE = (
    "device 0: cudaErrorNoKernelImageForDevice: no kernel image is available for execution on the device"
)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """Two GPUs, and a module that answers as the test says; `asked` are the devices it was asked for."""
    machine = SimpleNamespace(capability=(9, 0), problem="", asked=[])

    def problem(device: int) -> str:
        machine.asked.append(device)
        return machine.problem

    info = {"on_host": False, "compiler": "nvcc 13.0", "architectures": "80-real"}
    module = SimpleNamespace(build_info=lambda: info, device_count=lambda: (2, ""), problem=problem)
    monkeypatch.setattr(_native, "cuda_problem", lambda: "")
    monkeypatch.setattr(_native, "load_cuda", lambda: module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: machine.capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Some GPU")
    caches = (backend._runs_on_host, backend._device_problem)
    for cache in caches:
        cache.cache_clear()
    yield machine
    for cache in caches:
        cache.cache_clear()


def test_a_device_that_launches(machine: SimpleNamespace) -> None:
    assert backend.status() == (True, "nvcc 13.0, for 80-real")
    for _ in range(3):
        assert backend.refusal(CUDA, torch.float32) == ""
    assert machine.asked == [0], "once, and not of the device that is not current"


def test_a_device_that_the_module_has_no_code_for(machine: SimpleNamespace) -> None:
    """auto goes on to the next backend, and the reason is CUDA's own."""
    machine.problem = NO_IMAGE
    reason = f"its kernels, built for 80-real, do not run on Some GPU: {NO_IMAGE}"
    assert backend.status() == (False, reason)
    assert backend.refusal(CUDA, torch.float32) == reason
    assert _dispatch.select(CUDA, torch.float32) is not backend
    with pytest.raises(RuntimeError, match="no kernel image is available"):
        ghl.use_backend("cuda")


def test_an_old_device_is_asked_nothing_more(machine: SimpleNamespace) -> None:
    machine.capability = (7, 5)
    reason = "it needs a GPU of sm_80 or newer, Some GPU is sm_75"
    assert backend.status() == (False, reason)
    assert backend.refusal(CUDA, torch.float32) == reason
    assert machine.asked == []
