"""How a step's gradients come about in gate_at="backward"; tests/test_step_gate.py has the other mode's."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from beside_reference import BesideReference
from reference_model import small_batches, summed_loss
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

ZEROING: dict[str, Callable[[nn.Module, torch.optim.Optimizer], Any]] = {
    "optimizer, to None": lambda model, optimizer: optimizer.zero_grad(),
    "optimizer, in place": lambda model, optimizer: optimizer.zero_grad(set_to_none=False),
    "model, to None": lambda model, optimizer: model.zero_grad(),
    "model, in place": lambda model, optimizer: model.zero_grad(set_to_none=False),
    "by hand, zero_": lambda model, optimizer: [p.grad.zero_() for p in model.parameters()],
}


@pytest.mark.parametrize("way", ZEROING)
def test_every_way_of_zeroing(way: str) -> None:
    run = BesideReference("backward")
    for seed in range(3):
        run.backward(seed)
        run.step()
        ZEROING[way](run.model, run.optimizer)
    run.assert_equal()


def test_discarded_pass() -> None:
    run = BesideReference("backward")
    summed_loss(run.model, small_batches(7, seed=9)[0]).backward()
    run.optimizer.zero_grad()
    run.train(steps=2)


@pytest.mark.parametrize("of", ["input", "weight"])
def test_gradient_asked_for_by_hand_is_no_pass(of: str) -> None:
    """That of the input is the torch layer's; that of the weight is the rule's; neither is left anywhere."""
    run = BesideReference("backward")
    ((x, target),) = small_batches(7, seed=9)
    x.requires_grad_()
    wanted = x if of == "input" else run.model[0].weight
    (grad,) = torch.autograd.grad(summed_loss(run.model, (x, target)), wanted)
    run.reference.backward((x.detach(), target))
    if of == "input":
        twin = x.detach().requires_grad_()
        summed_loss(run.reference.model, (twin, target)).backward()
        torch.testing.assert_close(grad, twin.grad)
    else:
        torch.testing.assert_close(grad, run.reference.gated("0"))
    assert all(p.grad is None for p in run.model.parameters())
    run.reference.forget()
    run.train(steps=2)


def test_backward_with_respect_to_some_inputs() -> None:
    """A layer among them gets its rule, the others nothing."""
    run = BesideReference("backward")
    (batch,) = run.batches(0)
    summed_loss(run.model, batch).backward(inputs=[run.model[3].weight, run.model[8].bias])
    run.reference.backward(batch)
    torch.testing.assert_close(run.model[3].weight.grad, run.reference.gated("3"))
    torch.testing.assert_close(run.model[8].bias.grad, run.reference.model[8].bias.grad)
    assert [name for name, p in run.model.named_parameters() if p.grad is not None] == ["3.weight", "8.bias"]


def test_backward_with_respect_to_the_weights_alone_is_refused_in_step_mode() -> None:
    """The sums would have nowhere to go."""
    run = BesideReference("step")
    summed_loss(run.model, run.batches(0)[0]).backward(inputs=list(run.model.parameters()))
    with pytest.raises(RuntimeError, match="has no Hebbian sums"):
        run.optimizer.step()


def test_closure() -> None:
    run = BesideReference("backward")

    def closure(seed: int) -> Tensor:
        run.optimizer.zero_grad()
        run.reference.forget()
        run.backward(seed)
        return torch.zeros(())

    for seed in range(3):
        run.optimizer.step(functools.partial(closure, seed))
        run.step_reference()
    run.assert_equal()


class Checkpointed(nn.Module):
    """Recomputes a convolution, and a convolution with what follows it in place, in backward."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.use_reentrant = use_reentrant
        self.first = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ELU())
        self.second = nn.Sequential(nn.Conv2d(6, 4, 3), nn.ELU(inplace=True), nn.Flatten())
        self.head = nn.Linear(144, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()  # without it the reentrant kind differentiates nothing
        for segment in (self.first, self.second):
            x = checkpoint(segment, x, use_reentrant=self.use_reentrant)
        return self.head(x)


@pytest.mark.parametrize("sums_at", ["forward", "backward"])
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["saved tensors", "reentrant"])
def test_activation_checkpointing(use_reentrant: bool, sums_at: str) -> None:
    model = Checkpointed(use_reentrant)
    if sums_at == "backward":
        model.second[1] = nn.ELU()
    BesideReference("backward", model=model, sums_at=sums_at).train()


def test_frozen_layer() -> None:
    run = BesideReference("backward")
    for model in (run.model, run.reference.model):
        model[3].weight.requires_grad_(False)
    kept = run.model[3].weight.detach().clone()
    run.train(steps=2)
    assert torch.equal(run.model[3].weight, kept)
    for model in (run.model, run.reference.model):
        model[3].weight.requires_grad_(True)
    run.train(steps=2)
    assert not torch.equal(run.model[3].weight, kept)
