"""k-WTA over the channels of (B, N, H, W) and over rows, against torch.topk + scatter."""

from __future__ import annotations

import pytest
import torch

import ghl_kernels as ghl
from bench.baselines.topk import kwta_topk
from bench.shapes import MEMORY_FORMATS

SIZES = {
    "B32-N96-32x32": (32, 96, 32, 32),
    "B32-N384-16x16": (32, 384, 16, 16),
    "B32-N1536-8x8": (32, 1536, 8, 8),
}


def responses(size: str, memory_format: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(SIZES[size], generator=generator).to(memory_format=MEMORY_FORMATS[memory_format])


@pytest.mark.parametrize("memory_format", MEMORY_FORMATS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("k", [1, 8, 0.05], ids=lambda k: f"k{k}")
class TestKwta:
    def test_ghl(self, benchmark, backend: str, size: str, k: int | float, memory_format: str) -> None:
        u = responses(size, memory_format)
        assert torch.equal(ghl.functional.kwta(u, k, dim=1), ghl.reference.kwta(u, k, dim=1))
        benchmark.group = f"kwta {size} k={k} {memory_format}"
        benchmark(ghl.functional.kwta, u, k, dim=1)

    def test_topk_scatter(self, benchmark, size: str, k: int | float, memory_format: str) -> None:
        u = responses(size, memory_format)
        winners = ghl.HebbianRule.kwta(k).winners_of(u.shape[1])
        assert torch.equal(kwta_topk(u, winners), ghl.reference.kwta(u, k, dim=1))
        benchmark.group = f"kwta {size} k={k} {memory_format}"
        benchmark(kwta_topk, u, winners)


@pytest.mark.parametrize("units", [384, 4096])
class TestRows:
    """A linear layer's responses: (P, N), units contiguous."""

    def test_ghl(self, benchmark, backend: str, units: int) -> None:
        u = torch.randn(2048, units, generator=torch.Generator().manual_seed(0))
        assert torch.equal(ghl.functional.kwta(u, 8), ghl.reference.kwta(u, 8))
        benchmark.group = f"kwta rows 2048x{units} k=8"
        benchmark(ghl.functional.kwta, u, 8)

    def test_topk_scatter(self, benchmark, units: int) -> None:
        u = torch.randn(2048, units, generator=torch.Generator().manual_seed(0))
        assert torch.equal(kwta_topk(u, 8, dim=-1), ghl.reference.kwta(u, 8))
        benchmark.group = f"kwta rows 2048x{units} k=8"
        benchmark(kwta_topk, u, 8, dim=-1)
