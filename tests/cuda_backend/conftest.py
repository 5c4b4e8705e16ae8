"""The kernels of csrc/cuda, built to run on the CPU (tools/cuda_on_host)."""

from __future__ import annotations

from types import ModuleType

import pytest

from ghl_kernels import _native


@pytest.fixture
def cuda() -> ModuleType:
    """The module ghl_kernels._cuda; where it is built for GPUs, or not at all, the test is skipped."""
    try:
        module = _native.load_cuda()
    except _native.NativeNotBuilt as reason:
        pytest.skip(str(reason))
    if not module.build_info()["on_host"]:
        pytest.skip("the CUDA module is built for GPUs, not for the host")
    module.schedule("forward")
    return module
