"""The library's products: what is asked of torch where it can widen a product of 16 bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ghl_kernels.backends.gpu import operations


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
