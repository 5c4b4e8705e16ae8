"""The library's products: what is asked of torch where it can widen a product of 16 bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ghl_kernels import reference
from ghl_kernels._geometry import make_geometry
from ghl_kernels.backends import eager
from ghl_kernels.backends.gpu import operations
from ghl_kernels.backends.triton import config
from ghl_kernels.backends.triton.kernels import correlate
from ghl_kernels.backends.triton.operations import OPERATIONS
from ghl_kernels.rule import HebbianRule


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_products_are_added_in_float32(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """On tensors without data: a CPU has no product of 16 bits with a float32 result."""

    def refuses(total: Tensor, *operands: Tensor, **options: object) -> Tensor:
        raise RuntimeError("self and mat2 must have the same dtype")  # torch before 2.10, on CUDA

    monkeypatch.setattr(torch, "addmm", refuses)
    monkeypatch.setattr(Tensor, "addmm_", refuses)
    rows, x = (torch.empty(4, size, dtype=dtype, device="meta") for size in (3, 5))
    total = operations._add_product(None, rows, x)
    assert (total.dtype, total.shape) == (torch.float32, (3, 5))
    assert operations._add_product(total, rows, x) is total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_are_added_to_a_total(dtype: torch.dtype) -> None:
    rows, x = torch.randn(6, 3, dtype=dtype), torch.randn(6, 5, dtype=dtype)
    total = torch.randn(3, 5)
    expected = total.double() + rows.double().t() @ x.double()
    assert torch.allclose(operations._add_product(total, rows, x).double(), expected, atol=1e-5)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("rule", [HebbianRule(decay="instar"), HebbianRule(winners=3)], ids=str)
def test_sums_of_the_kernel_and_the_gradient_of_the_library(
    monkeypatch: pytest.MonkeyPatch, rule: HebbianRule, layout: torch.memory_format
) -> None:
    """x without the padding of its channels, which only the kernel needs; A in float32, not rounded."""
    _, geometry = make_geometry((3, 3), 2, 1, 1, 1)
    x = torch.randn(2, 5, 7, 7).bfloat16().contiguous(memory_format=layout)
    u, grad = (torch.randn(2, 16, 4, 4).bfloat16().contiguous(memory_format=layout) for _ in range(2))
    made: list[bool] = []
    kernel = correlate.correlate

    def noted(*arguments: Any, **options: Any) -> Any:
        made.append(arguments[2] is not None)
        return kernel(*arguments, **options)

    monkeypatch.setattr(correlate, "correlate", noted)
    arguments = (x, u, grad, geometry, rule.competition(16), rule.decay)
    A, moments, G = OPERATIONS.conv_pair(*arguments)
    monkeypatch.setattr(config, "leaves_grad_to_library", lambda problem, arch: True)
    apart = OPERATIONS.conv_pair(*arguments)
    assert made == [True, False]
    torch.testing.assert_close(apart[:2], (A, moments), rtol=1e-5, atol=1e-5)
    assert torch.equal(apart[2], eager.conv_grad(x, grad, geometry))
    torch.testing.assert_close(apart[2], G, rtol=2**-7, atol=1e-2)
    y = reference.compete(u.double(), rule, 1)
    expected = eager.conv_correlate(x.double(), y, tuple(A.shape), geometry)
    assert (apart[0] - expected).abs().max() < 2**-8 * expected.abs().max()
