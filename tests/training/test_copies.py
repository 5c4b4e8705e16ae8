"""Averages, checkpoints and resumed runs: what leaves a model and what comes back into it."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from beside_reference import RULE, BesideReference, sgd
from reference_model import small_batches, small_network, summed_loss
from torch import Tensor, nn
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

import ghl_kernels as ghl

BOTH = pytest.mark.parametrize("gate_at", ["backward", "step"])


@BOTH
@pytest.mark.parametrize("kind", ["EMA", "SWA"])
def test_averaged_models(kind: str, gate_at: str) -> None:
    """The average is that of the reference's weights, and averaging does not touch the training."""
    run = BesideReference(gate_at)
    average = {"multi_avg_fn": get_ema_multi_avg_fn(0.9)} if kind == "EMA" else {}
    averaged, reference = (AveragedModel(m, **average) for m in (run.model, run.reference.model))
    schedules = [SWALR(o, swa_lr=0.05) for o in (run.optimizer, run._reference_optimizer)]
    for seed in range(3):
        run.backward(seed)
        averaged.update_parameters(run.model)  # between backward and the step, where sums are pending
        reference.update_parameters(run.reference.model)
        run.step()
        run.optimizer.zero_grad()
        for schedule in schedules:
            schedule.step()
    run.assert_equal()
    for mine, theirs in zip(averaged.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-9)
    loader = [x for x, _ in small_batches(4, 4)]
    for model in (averaged, reference):
        update_bn(loader, model)
    with torch.no_grad():
        torch.testing.assert_close(averaged.eval()(loader[0]), reference.eval()(loader[0]))
    run.train(steps=1)


@BOTH
def test_averaged_weights_go_back_into_the_model(gate_at: str) -> None:
    run = BesideReference(gate_at)
    averaged = AveragedModel(run.model)
    for seed in range(2):
        run.backward(seed)
        run.step()
        run.optimizer.zero_grad()
        averaged.update_parameters(run.model)
    run.model.load_state_dict(averaged.module.state_dict())
    run.reference.follow(run.model)
    run.train(steps=2)


def _fresh(gate_at: str) -> tuple[nn.Module, torch.optim.Optimizer, torch.amp.GradScaler | None]:
    torch.manual_seed(5)
    model = ghl.convert(small_network(), RULE, gate_at=gate_at)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    if gate_at == "backward":
        return model, optimizer, None
    ghl.StepGate(optimizer, model)
    return model, optimizer, torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=2)


def _steps(run: Any, seeds: range) -> None:
    model, optimizer, scaler = run
    for seed in seeds:
        (batch,) = small_batches(5, dtype=torch.float32, seed=seed)
        loss = summed_loss(model, batch)
        (loss if scaler is None else scaler.scale(loss)).backward()
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()


@BOTH
def test_resumed_run_is_the_same_bit_for_bit(gate_at: str) -> None:
    """Model, optimizer and scaler through a file, and a StepGate made anew."""
    whole = _fresh(gate_at)
    _steps(whole, range(6))
    first = _fresh(gate_at)
    _steps(first, range(3))
    file = io.BytesIO()
    torch.save([part.state_dict() for part in first if part is not None], file)
    file.seek(0)
    second = _fresh(gate_at)
    for part, state in zip(second, torch.load(file), strict=False):
        assert part is not None
        part.load_state_dict(state)
    _steps(second, range(3, 6))
    for name, tensor in whole[0].state_dict().items():
        assert torch.equal(second[0].state_dict()[name], tensor), name


@BOTH
def test_backpropagation_rule_and_backpropagation_again(gate_at: str) -> None:
    """State dicts of models and optimizers go from torch's model to ours and back."""
    run = BesideReference(gate_at)
    plain = small_network().double()
    optimizer = sgd(plain.parameters())

    def backpropagate(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
        optimizer.zero_grad()
        summed_loss(model, small_batches(6, seed=seed)[0]).backward()
        optimizer.step()

    backpropagate(plain, optimizer, 10)
    for model, its in ((run.model, run.optimizer), (run.reference.model, run._reference_optimizer)):
        model.load_state_dict(plain.state_dict(), strict=True)
        its.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run.train()
    trained: list[list[Tensor]] = []
    for model, its in ((run.model, run.optimizer), (run.reference.model, run._reference_optimizer)):
        plain.load_state_dict(model.state_dict(), strict=True)
        optimizer.load_state_dict(copy.deepcopy(its.state_dict()))
        backpropagate(plain, optimizer, 11)
        trained.append([p.detach().clone() for p in plain.parameters()])
    for mine, theirs in zip(*trained, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-9)


def test_reverted_after_training_is_the_torch_model() -> None:
    """The same optimizer, with its momentum, goes on by backpropagation once the gate is removed."""
    run = BesideReference("step")
    run.train()
    assert run.gate is not None
    run.gate.remove()
    ghl.revert(run.model)
    (batch,) = small_batches(6, seed=12)
    for model, optimizer in (
        (run.model, run.optimizer),
        (run.reference.model, run._reference_optimizer),
    ):
        optimizer.zero_grad()
        summed_loss(model, batch).backward()
        optimizer.step()
    run.assert_equal()
