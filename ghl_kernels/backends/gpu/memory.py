"""Workspaces: what the slices of a sum are written to before they are added."""

from __future__ import annotations

import math

import torch
from torch import Tensor

WORKSPACE_BYTES = 32 << 20  # of all slices of one result; it is read back while it is in L2


def workspace(shape: tuple[int, ...], device: torch.device, purpose: str) -> Tensor:
    """An uninitialized float32 tensor; out of memory, the error says for what.

    Raises:
        torch.OutOfMemoryError: with the bytes that were asked for and the purpose.
    """
    try:
        return torch.empty(shape, dtype=torch.float32, device=device)
    except torch.OutOfMemoryError as error:
        size = 4 * math.prod(shape) / 2**20
        raise torch.OutOfMemoryError(f"no memory for a workspace of {size:.0f} MiB for {purpose}") from error
