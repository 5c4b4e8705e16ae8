"""The operations as CUDA kernels compiled when the package was installed, for NVIDIA GPUs of sm_80 and newer.

The same sources built to run on a CPU (tools/cuda_on_host) take CPU tensors; that is how they are tested
without a GPU.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Hashable
from typing import Any

import torch

from ghl_kernels import _native
from ghl_kernels.backends.gpu import OPERATION_NAMES
from ghl_kernels.backends.gpu.precision import allows_tf32

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_OLDEST = (8, 0)


def status() -> tuple[bool, str]:
    """(available, reason)."""
    if problem := _native.cuda_problem():
        return False, problem
    info = _native.load_cuda().build_info()
    if info["on_host"]:
        return True, f"CUDA's execution model on the CPU, on CPU tensors ({info['compiler']})"
    count, problem = _native.load_cuda().device_count()
    if not count:
        return (
            False,
            f"built by {info['compiler']}, but there is no GPU: {problem or 'the driver shows none'}",
        )
    if not torch.cuda.is_available():
        return False, "torch sees no GPU"
    too_old = [_too_old(index) for index in range(torch.cuda.device_count())]
    if all(too_old):
        return False, too_old[0]
    # of the others nothing more is asked: it would make a context on each
    current = torch.cuda.current_device()
    if not too_old[current] and (problem := _device_problem(current)):
        return False, problem
    return True, f"{info['compiler']}, for {info['architectures']}"


def refusal(device: torch.device, dtype: torch.dtype) -> str:
    """Why this backend cannot run on such tensors, or "" when it can."""
    if problem := _native.cuda_problem():
        return problem
    if dtype not in _DTYPES:
        return f"it takes float32, bfloat16 and float16, not {dtype}"
    if _runs_on_host():
        return "" if device.type == "cpu" else f"it is built to run on CPU tensors here, not on {device.type}"
    if device.type != "cuda" or torch.version.hip:
        return f"it runs on CUDA tensors, not on {'ROCm' if torch.version.hip else device.type}"
    return _device_problem(torch.cuda.current_device() if device.index is None else device.index)


def tape_settings(device: torch.device, dtype: torch.dtype) -> Hashable:
    """What kernels are chosen by, besides an operation's arguments and the device."""
    return (allows_tf32(False), allows_tf32(True)) if dtype == torch.float32 else None


@functools.cache
def _runs_on_host() -> bool:
    return bool(_native.load_cuda().build_info()["on_host"])


@functools.cache
def _device_problem(index: int) -> str:
    if problem := _too_old(index):
        return problem
    module = _native.load_cuda()
    if problem := module.problem(index):
        built = module.build_info()["architectures"]
        return f"its kernels, built for {built}, do not run on {torch.cuda.get_device_name(index)}: {problem}"
    return ""


def _too_old(index: int) -> str:
    major, minor = capability = torch.cuda.get_device_capability(index)
    if capability < _OLDEST:
        return f"it needs a GPU of sm_80 or newer, {torch.cuda.get_device_name(index)} is sm_{major}{minor}"
    return ""


def __getattr__(name: str) -> Any:
    """The operations themselves, from the module that imports the faces of the kernels."""
    if name not in OPERATION_NAMES | {"fused_sgd_", "pairs_lists"}:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.operations").OPERATIONS, name)
