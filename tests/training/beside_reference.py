"""A model that trains as users train it, beside the float64 reference that trains by the rule as written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from reference_model import Batch, ReferenceModel, small_batches, small_network, summed_loss
from torch import nn
from torch.optim import Optimizer

import ghl_kernels as ghl
from ghl_kernels import HebbianRule

RULE = HebbianRule.ghl(temperature=0.5)
# How a step's data come: exact in "backward" for one pass, in "step" for any number.
PASSES = {"backward": (8,), "step": (3, 5)}

OptimizerOf = Callable[[Any], Optimizer]


def sgd(params: Any) -> Optimizer:
    """With everything that SGD offers."""
    return torch.optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01)


class BesideReference:
    """float64 on both sides, so that what differs is the mathematics and not a sign within rounding."""

    def __init__(
        self,
        gate_at: str,
        optimizer: OptimizerOf = sgd,
        *,
        model: nn.Module | None = None,
        rule: HebbianRule = RULE,
        sums_at: str = "forward",
    ) -> None:
        torch.manual_seed(0)
        model = small_network() if model is None else model
        self.gate_at = gate_at
        self.model = ghl.convert(model.double(), rule, gate_at=gate_at, sums_at=sums_at)
        self.reference = ReferenceModel(self.model)
        self.optimizer = optimizer(self.model.parameters())
        self.gate = ghl.StepGate(self.optimizer, self.model) if gate_at == "step" else None
        self._reference_optimizer = optimizer(self.reference.model.parameters())

    def batches(self, seed: int) -> list[Batch]:
        """The data of one step, in as many passes as the mode allows."""
        return small_batches(*PASSES[self.gate_at], seed=seed)

    def backward(self, seed: int) -> None:
        """The passes of one step, on both sides."""
        for batch in self.batches(seed):
            summed_loss(self.model, batch).backward()
            self.reference.backward(batch)

    def step(self) -> None:
        """Both optimizers step, the reference's on the gradients of the rule."""
        self.optimizer.step()
        self.step_reference()

    def step_reference(self) -> None:
        """The reference's optimizer alone, and its record starts afresh."""
        self.reference.step(self._reference_optimizer)
        self.reference.forget()

    def train(self, steps: int = 3) -> None:
        """The ordinary loop."""
        for seed in range(steps):
            self.backward(seed)
            self.step()
            self.optimizer.zero_grad()
        self.assert_equal()

    def assert_equal(self) -> None:
        """All parameters are the reference's, to what float64 rounds."""
        theirs = dict(self.reference.model.named_parameters())
        for name, mine in self.model.named_parameters():
            torch.testing.assert_close(
                mine, theirs[name], rtol=1e-8, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
            )
