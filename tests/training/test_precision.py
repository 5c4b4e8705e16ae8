"""bfloat16 and float16 through a whole network: every step is the float64 rule on what the layers saw."""

from __future__ import annotations

import pytest
import torch
from precision import train_in

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])


@DTYPES
@pytest.mark.parametrize("gate_at", ["backward", "step"])
def test_autocast(gate_at: str, dtype: torch.dtype) -> None:
    train_in(dtype, gate_at, autocast=True)


@DTYPES
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW], ids=lambda kind: kind.__name__)
def test_autocast_with_grad_scaler(optimizer: type[torch.optim.Optimizer], dtype: torch.dtype) -> None:
    train_in(dtype, "step", autocast=True, scaled=True, optimizer=optimizer)


@pytest.mark.parametrize("gate_at", ["backward", "step"])
def test_bfloat16_weights(gate_at: str) -> None:
    train_in(torch.bfloat16, gate_at, autocast=False)
