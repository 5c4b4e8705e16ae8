"""Layers of a StepGate whose tensors torch converts by swapping what is behind them."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import ghl_kernels as ghl


@pytest.fixture(autouse=True)
def _swaps() -> Iterator[None]:
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


class Run:
    def __init__(self, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.layer = ghl.GHLLinear(5, 6, gate_at="step", dtype=dtype)
        self.optimizer = torch.optim.SGD(self.layer.parameters(), lr=1.0)
        self.gate = ghl.StepGate(self.optimizer, self.layer)

    def backward(self, seed: int) -> None:
        x = torch.randn(7, 5, generator=torch.Generator().manual_seed(seed))
        self.layer(x.to(self.layer.weight.dtype)).square().sum().backward()

    def step(self) -> Tensor:
        """What the weight moved by."""
        before = self.layer.weight.detach().clone()
        self.optimizer.step()
        return self.layer.weight.detach() - before


@pytest.mark.parametrize("when", ["before a pass", "between passes", "before the step", "after the step"])
def test_conversion(when: str) -> None:
    """The step is that of a layer that was not converted."""
    runs = [Run(torch.float32), Run(torch.float32)]
    moves = []
    for run, converts in zip(runs, (True, False), strict=True):
        if when == "after the step":
            run.backward(2)
            run.step()
            if converts:
                run.layer.double()
            run.optimizer.zero_grad()
        if converts and when == "before a pass":
            run.layer.double()
        run.backward(0)
        if converts and when == "between passes":
            run.layer.double()
        run.backward(1)
        if converts and when == "before the step":
            run.layer.double()
        moves.append(run.step().double())
    assert runs[0].layer.weight.dtype == torch.float64
    torch.testing.assert_close(*moves, rtol=1e-4, atol=1e-5)


def test_conversion_that_changes_nothing() -> None:
    run = Run(torch.float32)
    run.backward(0)
    run.layer.to("cpu")
    run.layer.float()
    assert run.step().abs().max().item() == pytest.approx(1.0, rel=1e-4)


def test_loading_a_state_dict() -> None:
    """A new weight: what waited for the old one is refused, and the next pass is gated."""
    run = Run(torch.float64)
    other = copy.deepcopy(run.layer.state_dict())
    other["weight"] += 1.0
    run.backward(0)
    run.layer.load_state_dict(other)
    if run.layer.weight.grad is not None:
        with pytest.raises(RuntimeError, match="changed between backward"):
            run.optimizer.step()
    run.optimizer.zero_grad()
    run.backward(1)
    assert run.step().abs().max().item() == pytest.approx(1.0, rel=1e-4)


def test_hooks_of_the_user_are_called_again() -> None:
    run = Run(torch.float32)
    seen: list[torch.dtype] = []
    run.layer.weight.register_hook(lambda grad: seen.append(grad.dtype))
    nn.Sequential(run.layer).double()
    run.backward(0)
    assert seen == [torch.float64]
