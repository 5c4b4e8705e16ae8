"""Loads the native modules, and says why where there is none.

Two failures are different things: a module that was not built (a choice, or no compiler at
installation) is unavailable; one that was built and does not load is an error to be shown whole.
GHL_NATIVE_DIR names folders (separated as in PATH) whose native modules come before the package's own:
tools/sanitize runs the tests on an instrumented build that way, tools/cuda_on_host the CUDA kernels on a CPU.
"""

import functools
import importlib
import json
import os
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

# First, so that the native module finds torch's OpenMP runtime loaded and shares its threads.
import torch  # noqa: F401

import ghl_kernels

_BUILD_INFO = Path(__file__).parent / "_build_info.json"


class NativeNotBuilt(RuntimeError):  # noqa: N818
    """The installation has no native module; the message says why."""


class NativeBroken(RuntimeError):  # noqa: N818
    """The native module is there and does not load; the cause is chained."""


def build_info() -> dict[str, Any]:
    """What the installation recorded: ``native``, and ``reason`` or ``compiler``, ``flags``, ``isas``."""
    if not _BUILD_INFO.exists():
        return {"native": False, "reason": "the package was not installed (run pip install)"}
    info: dict[str, Any] = json.loads(_BUILD_INFO.read_text())
    return info


def _import_native(name: str) -> ModuleType:
    """Import ``ghl_kernels.<name>``; raises NativeNotBuilt or NativeBroken."""
    for override in reversed(os.environ.get("GHL_NATIVE_DIR", "").split(os.pathsep)):
        if override and override not in ghl_kernels.__path__:
            ghl_kernels.__path__.insert(0, override)
    qualified = f"ghl_kernels.{name}"
    try:
        return importlib.import_module(qualified)
    except ModuleNotFoundError as error:
        if error.name != qualified:
            raise NativeBroken(f"{qualified} is there but does not load: {error}") from error
        raise NativeNotBuilt(_why_not_built(qualified)) from None
    except Exception as error:
        raise NativeBroken(f"{qualified} was built but does not load: {error}") from error


def _why_not_built(qualified: str) -> str:
    info = build_info()
    if info["native"]:
        return f"{qualified} was built but is gone, or is another Python's; install the package again"
    return f"{qualified} was not built: {info['reason']}"


@functools.cache
def _cpu() -> ModuleType | NativeNotBuilt | NativeBroken:
    try:
        return _import_native("_cpu")
    except NativeNotBuilt as error:
        return error
    except NativeBroken as error:
        # falling back without a word would hide a broken installation behind slow training
        warnings.warn(f"{error}; torch's own operators are used instead", RuntimeWarning, stacklevel=2)
        return error


def load_cpu() -> ModuleType:
    """The module ``ghl_kernels._cpu``.

    Raises:
        NativeNotBuilt: it was not built; the message says why.
        NativeBroken: it was built and its import failed.
    """
    result = _cpu()
    if isinstance(result, ModuleType):
        return result
    raise result


@functools.cache
def _cuda() -> ModuleType | NativeNotBuilt | NativeBroken:
    try:
        return _import_native("_cuda")
    except NativeNotBuilt as error:
        return error
    except NativeBroken as error:
        warnings.warn(f"{error}; other backends are used instead", RuntimeWarning, stacklevel=2)
        return error


def load_cuda() -> ModuleType:
    """The module ``ghl_kernels._cuda``; it loads without a GPU and without a driver.

    Raises:
        NativeNotBuilt: it was not built; the message says why.
        NativeBroken: it was built and its import failed.
    """
    result = _cuda()
    if isinstance(result, ModuleType):
        return result
    raise result


def cpu_problem() -> str:
    """Why the native CPU kernels cannot run, or "" when they can; asked before every operation."""
    result = _cpu()
    return "" if isinstance(result, ModuleType) else str(result)


def cpu_status() -> tuple[bool, str]:
    """Whether the native CPU kernels can run, and what they are or why not."""
    result = _cpu()
    if not isinstance(result, ModuleType):
        return False, str(result)
    info = result.build_info()
    return True, f"{info['compiler']}, {result.selected_isa()} of {', '.join(info['isas'])}"
