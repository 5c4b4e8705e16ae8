"""The operations as Triton kernels, for NVIDIA GPUs of sm_80 and newer and for AMD's.

Triton is imported by the first operation, never by the package, so that an installation without it
works. With ``TRITON_INTERPRET=1``, set before Triton is first imported, the same kernels run on CPU tensors.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import re
from collections.abc import Hashable
from typing import Any

import torch

from ghl_kernels.backends.gpu import OPERATION_NAMES
from ghl_kernels.backends.gpu.precision import allows_tf32
from ghl_kernels.backends.triton.arch import of as arch_of

_OLDEST = (3, 6)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def status() -> tuple[bool, str]:
    """(available, reason)."""
    if problem := _problem():
        return False, problem
    if is_interpreted():
        return True, "Triton's interpreter, on CPU tensors (TRITON_INTERPRET is set)"
    if not torch.cuda.is_available():
        return False, "torch sees no GPU"
    problems = [_device_problem(index) for index in range(torch.cuda.device_count())]
    if all(problems):
        return False, problems[0]
    return True, f"Triton {_version()}"


def refusal(device: torch.device, dtype: torch.dtype) -> str:
    """Why this backend cannot run on such tensors, or "" when it can."""
    if problem := _problem():
        return problem
    if dtype not in _DTYPES:
        return f"it takes float32, bfloat16 and float16, not {dtype}"
    if is_interpreted():
        if device.type != "cpu":
            return f"Triton's interpreter runs on CPU tensors here, not on {device.type}"
        if dtype == torch.bfloat16 and not _interpreter_rounds_bfloat16():
            return "Triton's interpreter computes bfloat16 wrongly"
        return ""
    if device.type != "cuda":
        return f"it runs on CUDA and ROCm tensors, not on {device.type}"
    return _device_problem(torch.cuda.current_device() if device.index is None else device.index)


def tape_settings(device: torch.device, dtype: torch.dtype) -> Hashable:
    """What kernels and tiles are chosen by, besides an operation's arguments and the file of measured.py."""
    takes_tf32 = (allows_tf32(False), allows_tf32(True)) if dtype == torch.float32 else None
    return arch_of(device), takes_tf32


@functools.cache
def is_interpreted() -> bool:
    """Whether Triton was imported as an interpreter of kernels."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def _interpreter_rounds_bfloat16() -> bool:
    """Whether somebody (our tests) has put right what Triton's interpreter does with bfloat16."""
    interpreter = importlib.import_module("triton.runtime.interpreter")
    return getattr(interpreter, "rounds_bfloat16", False)


def _version() -> str:
    return importlib.import_module("triton").__version__


@functools.cache
def _problem() -> str:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; pip install triton"
    try:
        version = _version()
    except ImportError as error:
        return f"Triton does not load: {error}"
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < _OLDEST:
        return f"it needs Triton {_OLDEST[0]}.{_OLDEST[1]} or newer, found {version}"
    return ""


@functools.cache
def _device_problem(index: int) -> str:
    if torch.version.hip:
        return ""
    major, minor = torch.cuda.get_device_capability(index)
    if major < 8:
        return f"it needs a GPU of sm_80 or newer, {torch.cuda.get_device_name(index)} is sm_{major}{minor}"
    return ""


def __getattr__(name: str) -> Any:
    """The operations themselves, from the module that imports Triton."""
    if name not in OPERATION_NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.operations").OPERATIONS, name)
