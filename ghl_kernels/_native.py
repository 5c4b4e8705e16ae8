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

# First, so that the native module finds torch's OpenMP runtime loaded and shares its threads.
import torch  # noqa: F401

import ghl_kernels

_BUILD_INFO = Path(__file__).parent / "_build_info.json"


class NativeNotBuilt(RuntimeError):  # noqa: N818
    """The installation has no native module; the message says why."""


class NativeBroken(RuntimeError):  # noqa: N818
    """The native module is there and does not load; the cause is chained."""


def _recorded_reason(name: str) -> str | None:
    """Why the installation built no such module; "" where it built one, None where nothing is installed."""
    if not _BUILD_INFO.exists():
        return None
    reason: str | None = json.loads(_BUILD_INFO.read_text()).get(name)
    return reason


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
        raise NativeNotBuilt(_why_not_built(name)) from None
    except Exception as error:
        raise NativeBroken(f"{qualified} was built but does not load: {error}") from error


def _why_not_built(name: str) -> str:
    qualified, reason = f"ghl_kernels.{name}", _recorded_reason(name)
    if reason is None:
        return f"{qualified} was not built: the package was not installed (run pip install)"
    if not reason:
        return f"{qualified} was built but is gone, or is another Python's; install the package again"
    return f"{qualified} was not built: {reason}"


@functools.cache
def _load(name: str) -> ModuleType | NativeNotBuilt | NativeBroken:
    try:
        return _import_native(name)
    except NativeNotBuilt as error:
        return error
    except NativeBroken as error:
        # falling back without a word would hide a broken installation behind slow training
        warnings.warn(f"{error}; other backends are used instead", RuntimeWarning, stacklevel=3)
        return error


def _module_or_raise(name: str) -> ModuleType:
    result = _load(name)
    if isinstance(result, ModuleType):
        return result
    raise result


def _problem(name: str) -> str:
    result = _load(name)
    return "" if isinstance(result, ModuleType) else str(result)


def load_cpu() -> ModuleType:
    """The module ``ghl_kernels._cpu``.

    Raises:
        NativeNotBuilt: it was not built; the message says why.
        NativeBroken: it was built and its import failed.
    """
    return _module_or_raise("_cpu")


def load_cuda() -> ModuleType:
    """The module ``ghl_kernels._cuda``; it loads without a GPU and without a driver.

    Raises:
        NativeNotBuilt: it was not built; the message says why.
        NativeBroken: it was built and its import failed.
    """
    return _module_or_raise("_cuda")


def cpu_problem() -> str:
    """Why the native CPU kernels cannot run, or "" when they can; asked before every operation."""
    return _problem("_cpu")


def cuda_problem() -> str:
    """Why the CUDA kernels cannot run on any machine, or "" when they can where there is a GPU."""
    return _problem("_cuda")


def cpu_status() -> tuple[bool, str]:
    """Whether the native CPU kernels can run, and what they are or why not."""
    if problem := cpu_problem():
        return False, problem
    module = load_cpu()
    info = module.build_info()
    return True, f"{info['compiler']}, {module.selected_isa()} of {', '.join(info['isas'])}"
