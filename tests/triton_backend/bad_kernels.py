"""Kernels that break each budget of tools/aot_check, in the place of the operations."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ghl_kernels.backends.triton.launch import launch
from ghl_kernels.rule import Competition


@triton.jit
def product_kernel(x_ptr, u_ptr, out_ptr, positions, STAGES: tl.constexpr):
    """The operand that is made in registers goes first: wgmma is serialized, whatever the tile."""
    n, d = tl.arange(0, 64), tl.arange(0, 128)
    a = tl.zeros((64, 128), tl.float32)
    g = tl.zeros((64, 128), tl.float32)
    for p0 in tl.range(0, positions, 64, num_stages=STAGES):
        p = p0 + tl.arange(0, 64)
        x = tl.load(x_ptr + p[:, None] * 128 + d[None, :])
        u = tl.load(u_ptr + p[:, None] * 64 + n[None, :])
        y = tl.exp2(u.to(tl.float32)).to(x.dtype)
        a = tl.dot(tl.trans(y), x, a)
        g = tl.dot(tl.trans(u), x, g)
    tl.store(out_ptr + n[:, None] * 128 + d[None, :], a + g)


@triton.jit
def long_row_kernel(x_ptr, out_ptr, SIZE: tl.constexpr):
    """A row that one warp cannot hold in registers."""
    i = tl.arange(0, SIZE)
    x = tl.load(x_ptr + i)
    tl.store(out_ptr + i, x / tl.sum(x, 0))


def compete(u: Tensor, dim: int, competition: Competition) -> None:
    """Serialized, within every other budget."""
    _product(3, u.dtype)


def competition_state(u: Tensor, dim: int, competition: Competition) -> None:
    """Spills."""
    x = torch.empty(1 << 15)
    launch(long_row_kernel, 1, warps=1, x_ptr=x, out_ptr=x, SIZE=x.numel())


def winners(u: Tensor, dim: int, competition: Competition) -> None:
    """Stages of more shared memory than any block gets."""
    _product(12, u.dtype)


def delta(*arguments: object) -> None:
    """An operation that raises."""
    raise RuntimeError("no such kernel")


def _product(stages: int, dtype: torch.dtype) -> None:
    launch(
        product_kernel,
        1,
        warps=4,
        stages=stages,
        x_ptr=torch.empty(4096, 128, dtype=dtype),
        u_ptr=torch.empty(4096, 64, dtype=dtype),
        out_ptr=torch.empty(64, 128),
        positions=4096,
        STAGES=stages,
    )
