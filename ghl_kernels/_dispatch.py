"""Which backend runs an operation, and whether its sparse or its dense form."""

from __future__ import annotations

import functools
import importlib
import logging
import math
import os
from collections.abc import Hashable
from types import ModuleType, TracebackType
from typing import NamedTuple

import torch

from ghl_kernels import _processor
from ghl_kernels._geometry import Geometry, is_by_tap
from ghl_kernels.backends.gpu.layout import FEW_CHANNELS

logger = logging.getLogger("ghl_kernels")

_MODULES = {
    "eager": "ghl_kernels.backends.eager",
    "cpu": "ghl_kernels.backends.cpu",
    "triton": "ghl_kernels.backends.triton",
    "cuda": "ghl_kernels.backends.cuda",
}
# By device type, best first. `auto` takes the first one that can run.
# Under "triton" operations go to "cuda" one by one, where that is the faster (backends/triton/choice.py).
_PREFERENCE = {"cpu": ("cpu", "eager"), "cuda": ("triton", "cuda", "eager")}

# Largest winners / units at which the sparse correlation beats the dense one that would run in its place, by
# device type and kind of layer. On "cpu" measured by bench/crossover.py on an AMD EPYC (Zen 4), float32; on
# "cuda" an estimate that no GPU has confirmed yet: a gather of patches is bound by L2.
_CROSSOVER: dict[tuple[str, str], float] = {
    ("cpu", "linear"): 0.25,
    ("cpu", "pointwise"): 0.16,
    ("cpu", "thin"): 0.17,
    ("cpu", "conv"): 0.40,
    ("cpu", "winograd"): 0.20,
    ("cpu", "depthwise"): 0.0,
    ("cuda", "linear"): 0.01,
    ("cuda", "pointwise"): 0.01,
    ("cuda", "thin"): 0.01,
    ("cuda", "conv"): 0.01,
    ("cuda", "winograd"): 0.01,
    ("cuda", "depthwise"): 0.0,
}

# Channels and units (of a group) from which on the CPU's Winograd kernel, whose vectors hold sixteen of them,
# is faster than the library.
LEAST_WINOGRAD = 8

# Where torch's products are slow, the CPU's kernel sums those of rows: A, and G of float32 layers of so many
# weights, on whose products the cost of one more operation does not show.
HAS_SLOW_PRODUCTS = _processor.has_slow_products()
_LEAST_WEIGHTS = 1 << 17

# Lists of winners take 8 bytes a winner, a float u 4 bytes a unit: up to here the lists are 6% of u, 12% of a
# 16-bit one, and less of all that a layer and what follows it keep for backward. Else A or u itself is kept.
_WORTH_KEEPING = 0.03


class BackendStatus(NamedTuple):
    """One row of :func:`backends`."""

    name: str
    available: bool
    reason: str


class _Choice:
    name = os.environ.get("GHL_BACKEND") or "auto"


_logged: set[str] = set()


def kind_of_layer(channels: int, geometry: Geometry | None) -> str:
    """Row of the crossover table: ``channels`` per group of the input, ``geometry`` None for linear."""
    if geometry is None:
        return "linear"
    if channels == 1:
        return "depthwise"
    if all(size == 1 for size in geometry.kernel_size):
        return "pointwise"
    if geometry.has_short_form and channels >= LEAST_WINOGRAD:
        return "winograd"
    return "thin" if channels < 16 else "conv"


def prefers_sparse(device_type: str, kind: str, units: int, winners: int) -> bool:
    """Whether A is to be summed from the winners alone (cost ~ winners), not by the dense product (~ units).

    A pure function of what does not change from batch to batch, so that a compiled model needs no guard
    on it. ``winners`` is 0 when all units compete.
    """
    return 0 < winners <= _CROSSOVER.get((device_type, kind), 0.0) * units


def keeps_winners(device_type: str, kind: str, units: int, winners: int) -> bool:
    """Whether the winners' lists are what a layer keeps for backward, to sum A from them then."""
    return prefers_sparse(device_type, kind, units, winners) and winners <= _WORTH_KEEPING * units


def computes_pairs(device_type: str) -> bool:
    """Whether A and G are summed by one operation where both are due, in place of the library's own G.

    On a CPU the two sums would share next to nothing.
    """
    return device_type == "cuda" or _Choice.name in ("triton", "cuda")


def pairs_winners(weight: torch.Tensor, geometry: Geometry | None, winners: int, dtype: torch.dtype) -> bool:
    """Whether A from the winners' lists and G are summed together: CUDA's kernel for first layers does so.

    A by itself would need u again, or x, gathered an element at a time. That x and the responses will be in
    channels_last is seen by the weight, which then is too; of a single tap it does not show.
    """
    units, channels = weight.shape[:2]
    if geometry is None or geometry.groups > 1 or not 1 < channels <= FEW_CHANNELS:
        return False
    in_channels_last = math.prod(geometry.kernel_size) > 1 and is_by_tap(weight)
    if not 0 < winners <= _WORTH_KEEPING * units or not in_channels_last:
        return False
    return _pairs_lists(weight.device, dtype, units, channels, geometry.kernel_size, winners)


def _pairs_lists(
    device: torch.device, dtype: torch.dtype, units: int, channels: int, kernel: tuple[int, ...], winners: int
) -> bool:
    """Whether the CUDA backend may and can sum A and G of such a layer from lists."""
    if "cuda" not in _candidates(device) or _load("cuda").refusal(device, dtype):
        return False
    return bool(_load("cuda").pairs_lists(device, dtype, units, channels, kernel, winners))


# For a compiler, which cannot trace it. torch.compiler.assume_constant_result does the same, and loads all of
# the compiler and Triton for it, whenever this package is imported.
_pairs_lists._dynamo_marked_constant = True  # type: ignore[attr-defined]


def sums_grads(device_type: str, kind: str, group_units: int, weights: int) -> bool:
    """Whether G is summed by an operation of ours even where A is not due at the same time.

    Only where the CPU's kernels do so with fewer multiplications, or faster ones. (An installation without
    them then takes the library's weight gradient in a call of its own.)
    """
    if device_type != "cpu" or _Choice.name not in ("auto", "cpu"):
        return False
    if kind == "linear":
        return HAS_SLOW_PRODUCTS and weights >= _LEAST_WEIGHTS
    return kind == "winograd" and group_units >= LEAST_WINOGRAD


def backends() -> list[BackendStatus]:
    """Every backend with its state, and the reason where it cannot run."""
    return [BackendStatus(name, *_load(name).status()) for name in _MODULES]


class use_backend:  # noqa: N801  reads as a function, and is one until it is entered
    """Choose the backend of every operation: ``"auto"``, ``"cpu"``, ``"triton"``, ``"cuda"`` or ``"eager"``.

    A call takes effect at once; as a context manager it is undone on leaving. The choice is the
    process's, not the thread's, because autograd runs backward passes in threads of its own.
    The environment variable ``GHL_BACKEND`` gives the initial choice.

    Raises:
        TypeError: ``name`` is no str.
        ValueError: an unknown name.
        RuntimeError: a backend that cannot run here, with the reason.
    """

    def __init__(self, name: str) -> None:
        _check_available(name)
        self._previous = _Choice.name
        _Choice.name = name

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _Choice.name = self._previous


def is_automatic() -> bool:
    """Whether no backend was chosen, so that any of them may run an operation."""
    return _Choice.name == "auto"


def _candidates(device: torch.device) -> tuple[str, ...]:
    """The backends that may run an operation, best first."""
    return _PREFERENCE.get(device.type, ()) if is_automatic() else (_Choice.name,)


def select(device: torch.device, dtype: torch.dtype) -> ModuleType:
    """The backend module that runs an operation on tensors of this device and dtype.

    Raises:
        RuntimeError: the backend chosen by use_backend cannot run it.
    """
    if _Choice.name != "auto":
        module = _load(_Choice.name)
        refusal = module.refusal(device, dtype)
        if refusal:
            raise RuntimeError(f"backend {_Choice.name!r} cannot run this: {refusal}")
        return module
    for name in _PREFERENCE.get(device.type, ()):
        module = _load(name)
        refusal = module.refusal(device, dtype)
        if not refusal:
            return module
        _log_once(f"backend {name!r} is passed over: {refusal}")
    return _load("eager")


def tape_settings(device: torch.device, dtype: torch.dtype) -> Hashable:
    """What the choices of an operation on such tensors depend on; None where none is taped, see _tape.py."""
    names = _candidates(device)
    if not _tapes(names):
        return None
    for name in names:
        module = _load(name)
        if not module.refusal(device, dtype):
            settings = getattr(module, "tape_settings", None)
            return None if settings is None else (_Choice.name, name, settings(device, dtype))
    return None


@functools.cache
def _tapes(names: tuple[str, ...]) -> bool:
    """Whether one of these backends does."""
    return any(hasattr(_load(name), "tape_settings") for name in names)


def select_with(operation: str, device: torch.device, dtype: torch.dtype) -> ModuleType:
    """As select(), but ``auto`` takes the first backend that has an operation which only some have."""
    if is_automatic():
        for name in _PREFERENCE.get(device.type, ()):
            module = _load(name)
            if hasattr(module, operation) and not module.refusal(device, dtype):
                return module
    return select(device, dtype)


def _check_available(name: str) -> None:
    if not isinstance(name, str):
        raise TypeError(f"name must be one of {('auto', *_MODULES)}, got {name!r}")
    if name == "auto":
        return
    available, reason = _load(name).status()
    if not available:
        raise RuntimeError(f"backend {name!r} cannot run here: {reason}")


@functools.cache
def _load(name: str) -> ModuleType:
    if name not in _MODULES:
        raise ValueError(f"unknown backend {name!r}; there are 'auto', {', '.join(map(repr, _MODULES))}")
    return importlib.import_module(_MODULES[name])


def _log_once(message: str) -> None:
    if message not in _logged:
        _logged.add(message)
        logger.info(message)
