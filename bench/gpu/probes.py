"""Smallest kernels that show whether a feature of the toolchain works here at all."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def add_kernel(a_ptr, b_ptr, out_ptr, size, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(a_ptr + i, mask=i < size, other=0.0)
    b = tl.load(b_ptr + i, mask=i < size, other=0.0)
    tl.store(out_ptr + i, a + b, mask=i < size)


@triton.jit
def dot_kernel(a_ptr, b_ptr, out_ptr, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    """One square product of contiguous matrices."""
    i = tl.arange(0, SIZE)
    at = i[:, None] * SIZE + i[None, :]
    a, b = tl.load(a_ptr + at), tl.load(b_ptr + at)
    tl.store(out_ptr + at, tl.dot(a, b, input_precision=PRECISION))


def add(device: torch.device) -> float:
    """Largest error of a + b."""
    a, b = torch.randn(2, 1000, device=device)
    out = torch.full_like(a, float("nan"))
    add_kernel[(4,)](a, b, out, a.numel(), BLOCK=256)
    return _error(out, a.double() + b.double())


def dot(device: torch.device, dtype: torch.dtype, precision: str) -> float:
    """Largest error of a b, relative to the largest entry."""
    a, b = (torch.randn(64, 64, device=device).to(dtype) for _ in range(2))
    out = torch.full((64, 64), float("nan"), device=device)
    dot_kernel[(1,)](a, b, out, SIZE=64, PRECISION=precision)
    return _error(out, a.double() @ b.double())


def mm_float32(device: torch.device) -> float:
    """As dot, by torch.mm of bfloat16 operands with a float32 result."""
    a, b = (torch.randn(64, 64, device=device).bfloat16() for _ in range(2))
    return _error(torch.mm(a, b, out_dtype=torch.float32), a.double() @ b.double())


def _error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).abs().max() / expected.abs().max()).item()
