"""Every kernel starts here, so that what a GPU would run can be listed, and compiled, without one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor


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


def launch(
    kernel: Any, blocks: int, *, warps: int, stages: int = 1, registers: int | None = None, **arguments: Any
) -> None:
    """Run a kernel on a grid of ``blocks`` (axis 0, the only one that may be long) with arguments by name.

    It runs on the current stream of the tensors' device and nothing waits for it.
    """
    if blocks == 0:
        return
    asked = Launch(kernel, blocks, arguments, warps, stages, registers)
    if _record is not None:
        _record.append(asked)
        return
    device = next(value.device for value in arguments.values() if isinstance(value, Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[(blocks,)](**arguments, **asked.options)


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Collects the launches made inside in place of running them; results are then not defined."""
    global _record
    previous, _record = _record, []
    try:
        yield _record
    finally:
        _record = previous
