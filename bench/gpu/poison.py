"""NaN where the next results will lie.

An allocator hands out what it got back last: a kernel that writes nothing would be found to have the result
of the one before it.
"""

from __future__ import annotations

import os

import torch

# Of the caching allocator's two pools, whose blocks are at most and above a MiB.
_SMALL, _LARGE = 1 << 18, 1 << 26
_COUNT = 8


def poison(device: torch.device) -> None:
    """Fill memory that is free, so that what is allocated next is not a result."""
    if device.type == "cuda" and "PYTORCH_NO_CUDA_MEMORY_CACHING" not in os.environ:
        blocks = [torch.full((_SMALL,), torch.nan, device=device) for _ in range(_COUNT)]
        blocks.append(torch.full((_LARGE,), torch.nan, device=device))
        del blocks
