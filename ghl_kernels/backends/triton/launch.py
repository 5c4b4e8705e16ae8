"""Every kernel starts here, so that what a GPU would run can be listed, and compiled, without one."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ghl_kernels import _tape


class Launch(NamedTuple):
    """One launch as it was asked for."""

    kernel: Any
    blocks: int
    arguments: dict[str, Any]  # by parameter name, constants of the compilation included
    warps: int
    stages: int
    registers: int | None = None  # that a thread may take; NVIDIA only

    @property
    def options(self) -> dict[str, Any]:
        """Of the compilation. Contraction is asked for explicitly: Triton's default is about to change."""
        limit = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True, **limit}


_record: list[Launch] | None = None

# Triton's compiled kernels by what they were launched with: integers by their values, which is more than they
# are specialized on. Triton itself finds out anew at every launch what each argument is specialized on.
_compiled: dict[tuple[Any, ...], Any] = {}
_MOST_COMPILED = 4096  # launches of other sizes are other entries


def launch(
    kernel: Any, blocks: int, *, warps: int, stages: int = 1, registers: int | None = None, **arguments: Any
) -> None:
    """Run a kernel on a grid of ``blocks`` (axis 0, the only one that may be long) with arguments by name.

    It runs on the current stream of the tensors' device and nothing waits for it.
    """
    if blocks == 0:
        return
    if _record is not None:
        _record.append(Launch(kernel, blocks, arguments, warps, stages, registers))
        return
    values = [arguments[name] for name in kernel.arg_names]
    key: list[Any] = [kernel.fn, warps, stages, registers]
    device = None
    for value in values:
        if isinstance(value, Tensor):
            device = value.device
            key.append((value.dtype, value.data_ptr() % 16 == 0))
        else:
            key.append(float if isinstance(value, float) else value)
    assert device is not None
    key.append(device)
    hashed = tuple(key)
    start = _compiled.get(hashed)
    if start is None:
        asked = Launch(kernel, blocks, arguments, warps, stages, registers)
        with current(device):
            compiled = kernel[(blocks,)](**arguments, **asked.options)
        if not hasattr(compiled, "run") or torch.version.hip:
            # an interpreted kernel; and on AMD, kernels are specialized on the size of a tensor's storage too
            start = functools.partial(_by_triton, kernel, asked.options)
        else:
            start = functools.partial(_directly, compiled)
        if len(_compiled) >= _MOST_COMPILED:
            _compiled.clear()
        _compiled[hashed] = start
    else:
        start(device, blocks, *values)
    _tape.note(start, (device, blocks, *values))


def _directly(compiled: Any, device: torch.device, blocks: int, *values: Any) -> None:
    with current(device):
        compiled[blocks, 1, 1](*values)


def _by_triton(kernel: Any, options: dict[str, Any], device: torch.device, blocks: int, *values: Any) -> None:
    with current(device):
        kernel[(blocks,)](*values, **options)


def current(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Makes the device of the tensors the current one, where it is not."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device(device)


_NOTHING = contextlib.nullcontext()


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Collects the launches made inside in place of running them; results are then not defined."""
    global _record
    previous, _record = _record, []
    try:
        with _tape.bypassed():
            yield _record
    finally:
        _record = previous
