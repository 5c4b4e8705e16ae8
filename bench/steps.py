"""Training steps of DeepHebb, one builder a method; all are checked against the reference before timing."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ghl_kernels as ghl
from bench import parity
from bench.baselines import unfold
from bench.interleave import Candidate
from bench.models import DeepHebb
from bench.report import Bar

SEED = 0
LR = 0.01
SOFTMAX = ghl.HebbianRule.ghl()
WINNERS = ghl.HebbianRule.kwta(0.02)


def images(batch: int) -> tuple[Tensor, Tensor]:
    """A batch the size of CIFAR-10's: (B, 3, 32, 32) and labels (B,)."""
    generator = torch.Generator().manual_seed(SEED)
    x = torch.randn(batch, 3, 32, 32, generator=generator)
    return x, torch.randint(10, (batch,), generator=generator)


def deephebb() -> DeepHebb:
    """The same weights at every call."""
    torch.manual_seed(SEED)
    return DeepHebb()


def training_step(
    model: nn.Module, x: Tensor, target: Tensor, finish: Callable[[nn.Module], None] = lambda model: None
) -> Callable[[], None]:
    """Forward, cross-entropy, backward, ``finish(model)``, SGD step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), target).backward()
        finish(model)
        optimizer.step()

    return step


def restorer(model: nn.Module) -> Callable[[], None]:
    """A function that puts the model's parameters and buffers back to what they are now."""
    saved = [(tensor, tensor.detach().clone()) for tensor in (*model.parameters(), *model.buffers())]

    @torch.no_grad()
    def restore() -> None:
        for tensor, value in saved:
            tensor.copy_(value)

    return restore


def backprop(x: Tensor, target: Tensor) -> Candidate:
    """B0: the model as it is."""
    model = deephebb()
    return Candidate("backprop", training_step(model, x, target), restorer(model))


def ghl_step(name: str, rule: ghl.HebbianRule, x: Tensor, target: Tensor) -> Candidate:
    """The converted model in the same loop."""
    model = ghl.convert(deephebb(), rule)
    parity.check_step(name, model, x, target, rule)
    return Candidate(name, training_step(model, x, target), restorer(model))


def authors_step(name: str, x: Tensor, target: Tensor) -> Candidate:
    """B1: unfold, one product per sample, gate by hand."""
    model = unfold.convert(deephebb())
    parity.check_step(name, model, x, target, SOFTMAX, unfold.gate_)
    return Candidate(name, training_step(model, x, target, unfold.gate_), restorer(model))


def local_pass(name: str, rule: ghl.HebbianRule, x: Tensor) -> Candidate:
    """``learn_`` layer by layer, no backward."""
    model = ghl.convert(deephebb(), rule)
    parity.check_learn(name, model, x, rule)
    return Candidate(name, lambda: model.learn_(x, LR), restorer(model))


class Method(NamedTuple):
    """A way to train; ``bar`` is its cost as a multiple of a backprop step, None for a rival."""

    suite: str
    build: Callable[[str, Tensor, Tensor], Candidate]
    bar: Bar | None


METHODS = {
    "GHL softmax": Method("step", lambda name, x, target: ghl_step(name, SOFTMAX, x, target), Bar(1.42)),
    "GHL winners=0.02": Method("step", lambda name, x, target: ghl_step(name, WINNERS, x, target), Bar(1.10)),
    "authors' algorithm (unfold)": Method("step", authors_step, None),
    "learn_ softmax": Method("local", lambda name, x, target: local_pass(name, SOFTMAX, x), Bar(0.75)),
    "learn_ winners=0.02": Method("local", lambda name, x, target: local_pass(name, WINNERS, x), Bar(0.45)),
}
