"""Optimizers of every make, in both modes: their steps are the rule's, skipped ones leave no trace."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from beside_reference import RULE, BesideReference, OptimizerOf, sgd
from reference_model import Batch, small_batches, small_network, summed_loss
from torch import Tensor, nn
from torch.optim import Optimizer

import ghl_kernels as ghl
from ghl_kernels import HebbianRule

BOTH = pytest.mark.parametrize("gate_at", ["backward", "step"])


def scale_by_trust(params: Any) -> None:
    """What LARS does: every gradient gets the length of its weight."""
    for p in params:
        if p.grad is not None and p.grad.any():
            p.grad.mul_(0.05 * p.detach().norm() / p.grad.norm())


class LARS(torch.optim.SGD):
    """Trust ratios in the step."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        scale_by_trust(p for group in self.param_groups for p in group["params"])
        return super().step(closure)


class GoesOn(torch.optim.SGD):
    """Uses the gradients again after super().step()."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(p.grad.abs(), alpha=-0.01)
        return loss


torch.optim.SGD(
    [torch.zeros(1)]
)  # without one of them, super().step() has no hooks that could tell of its end

FORMS: dict[str, dict[str, bool]] = {
    "plain": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}
OPTIMIZERS: dict[str, OptimizerOf] = {
    **{
        f"{kind.__name__}, {form}": (lambda p, kind=kind, form=form: kind(p, lr=0.02, **FORMS[form]))
        for kind in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad)
        for form in FORMS
    },
    "SGD, momentum": sgd,
    "AdamW, amsgrad": lambda p: torch.optim.AdamW(p, lr=0.02, amsgrad=True, weight_decay=0.1),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.02, decoupled_weight_decay=True, weight_decay=0.1),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.02),
    "LARS": lambda p: LARS(p, lr=0.5, momentum=0.9, weight_decay=0.01),
    "SGD that goes on": lambda p: GoesOn(p, lr=0.1, momentum=0.9),
}


@BOTH
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_are_those_of_the_rule(name: str, gate_at: str) -> None:
    BesideReference(gate_at, OPTIMIZERS[name]).train()


@pytest.mark.parametrize("rule", [HebbianRule.softhebb(), HebbianRule.hpca(), RULE], ids=str)
@pytest.mark.parametrize("layout", ["channels_last", "transposed"])
def test_fused_steps_of_weights_that_are_not_contiguous(layout: str, rule: HebbianRule) -> None:
    """Fused optimizers take the elements of a gradient as they lie."""
    layer = ghl.GHLConv2d(5, 6, 3) if layout == "channels_last" else ghl.GHLLinear(5, 6)
    layer.set_rule(rule, "step")
    if layout == "channels_last":
        layer.to(memory_format=torch.channels_last)
    else:
        layer.weight = nn.Parameter(layer.weight.detach().t().contiguous().t())
    twin = copy.deepcopy(layer)
    x = torch.randn(4, 5, 8, 8) if layout == "channels_last" else torch.randn(9, 5)
    for one, fused in ((layer, True), (twin, False)):
        optimizer = torch.optim.SGD(one.parameters(), lr=0.1, fused=fused)
        ghl.StepGate(optimizer, one)
        one(x).square().sum().backward()
        optimizer.step()
    torch.testing.assert_close(layer.weight, twin.weight)


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad])
def test_adam_discards_the_size_of_the_update(kind: Any) -> None:
    """Why docs/training.md says to use SGD: the first step is the learning rate times the sign."""
    layer = ghl.GHLLinear(20, 12, dtype=torch.float64)
    optimizer = kind(layer.parameters(), lr=0.01, weight_decay=0.0)
    before = layer.weight.detach().clone()
    layer(torch.randn(50, 20, dtype=torch.float64)).square().sum().backward()
    assert layer.weight.grad.abs().median() < 0.5
    optimizer.step()
    torch.testing.assert_close(layer.weight.detach() - before, -0.01 * layer.weight.grad.sign())


@pytest.mark.parametrize("how", ["closure", "GradScaler", "compiled"])
def test_gradients_after_super_step_are_gated(how: str) -> None:
    """And plain again after the whole step."""
    run = BesideReference("step", lambda p: GoesOn(p, lr=0.1))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=how == "GradScaler")

    def passes(seed: int) -> Tensor:
        run.optimizer.zero_grad()
        run.reference.forget()
        for batch in run.batches(seed):
            scaler.scale(summed_loss(run.model, batch)).backward()
            run.reference.backward(batch)
        return torch.zeros(())

    step = torch.compile(run.optimizer.step, backend="aot_eager") if how == "compiled" else run.optimizer.step
    for seed in range(2):
        if how == "closure":
            step(functools.partial(passes, seed))
        elif how == "GradScaler":
            passes(seed)
            scaler.step(run.optimizer)
            scaler.update()
        else:
            passes(seed)
            step()
        for name in run.reference.rules:
            G = run.reference.model.get_submodule(name).weight.grad
            torch.testing.assert_close(run.model.get_submodule(name).weight.grad, G)
        run.step_reference()
    run.assert_equal()


def test_what_is_to_change_the_gated_gradient_is_a_hook_after_the_gate() -> None:
    """As a wrapper's code between backward and the step it would see, and change, G alone."""
    run = BesideReference("step")
    run.optimizer.register_step_pre_hook(lambda *_: scale_by_trust(run.model.parameters()))
    run._reference_optimizer.register_step_pre_hook(
        lambda *_: scale_by_trust(run.reference.model.parameters())
    )
    run.train()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW], ids=lambda kind: kind.__name__)
def test_skipped_step_leaves_weights_and_state(kind: type[Optimizer], form: str) -> None:
    """One step, one that an inf makes GradScaler skip, one more: as if the second had never been."""
    options = {"lr": 0.02, **FORMS[form]} | ({"momentum": 0.9} if kind is torch.optim.SGD else {})
    run = BesideReference("step", lambda p: kind(p, **options))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for seed, is_skipped in enumerate((False, True, False)):
        for batch in run.batches(seed):
            scaler.scale(summed_loss(run.model, batch)).backward()
            if not is_skipped:
                run.reference.backward(batch)
        if is_skipped:
            run.model[6].weight.grad[0, 0] = float("inf")
        kept = copy.deepcopy((run.model.state_dict(), run.optimizer.state_dict()))
        scaler.step(run.optimizer)
        scaler.update()
        if is_skipped:
            _assert_same((run.model.state_dict(), run.optimizer.state_dict()), kept)
        else:
            run.step_reference()
        run.optimizer.zero_grad()
    run.assert_equal()


def _assert_same(actual: Any, expected: Any) -> None:
    """Nested containers with the same bits."""
    if isinstance(expected, Tensor):
        assert torch.equal(actual, expected)
    elif isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        for key, value in expected.items():
            _assert_same(actual[key], value)
    elif isinstance(expected, list | tuple):
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            _assert_same(one, other)
    else:
        assert actual == expected


def test_one_scaler_for_several_optimizers() -> None:
    """The one whose gradients are finite steps though the other is skipped."""
    run = BesideReference("step")
    assert run.gate is not None
    run.gate.remove()
    parts = [run.model[:3], run.model[3:]]
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.1) for part in parts]
    for optimizer in optimizers:
        ghl.StepGate(optimizer, run.model)
    reference_optimizer = torch.optim.SGD(run.reference.model[3:].parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    kept = run.model[0].weight.detach().clone()
    for batch in run.batches(0):
        scaler.scale(summed_loss(run.model, batch)).backward()
        run.reference.backward(batch)
    run.model[0].weight.grad[0, 0] = float("nan")
    for optimizer in optimizers:
        scaler.step(optimizer)
    scaler.update()
    run.reference.step(reference_optimizer)
    assert torch.equal(run.model[0].weight, kept)
    run.assert_equal()


def _steps_in_backward(model: nn.Module, optimizers: dict[nn.Parameter, Optimizer]) -> None:
    def step(p: nn.Parameter) -> None:
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step)


def test_optimizer_steps_inside_the_backward_pass() -> None:
    """One optimizer a parameter, stepped as soon as its gradient is there, so that no gradient is kept."""
    run = BesideReference("backward")
    _steps_in_backward(run.model, {p: sgd([p]) for p in run.model.parameters()})
    for seed in range(3):
        run.backward(seed)
        run.step_reference()
    assert all(p.grad is None for p in run.model.parameters())
    run.assert_equal()


@pytest.mark.skipif(torch.__version__ < "2.10", reason="the sums come first there (see _autograd.saveable)")
def test_step_inside_the_backward_pass_comes_too_early_for_step_mode() -> None:
    """The sums may not be there yet; a step on the plain gradient is refused."""
    model = ghl.convert(small_network(), gate_at="step")
    optimizers = {p: sgd([p]) for p in model.parameters()}
    for i in (0, 3, 6):
        ghl.StepGate(optimizers[model[i].weight], model)
    _steps_in_backward(model, optimizers)
    with pytest.raises(RuntimeError, match="has no Hebbian sums"):
        summed_loss(model, small_batches(3, dtype=torch.float32)[0]).backward()


def test_another_optimizer_must_not_step_on_the_plain_gradient() -> None:
    """The one made anew after the gate, say; the gate's own may be gone."""
    run = BesideReference("step")
    other = sgd(run.model.parameters())
    run.backward(0)
    with pytest.raises(RuntimeError, match="'0' was stepped on its plain gradient by an optimizer"):
        other.step()
    run.optimizer = run.gate = None
    other.zero_grad()
    run.backward(1)
    with pytest.raises(RuntimeError, match="'0' was stepped on its plain gradient by an optimizer"):
        other.step()


class ThroughData(Optimizer):
    """Changes the parameters where no version counts it."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.data.add_(p.grad, alpha=-0.1)


def test_another_optimizer_that_steps_through_data() -> None:
    run = BesideReference("step")
    other = ThroughData(run.model.parameters())
    run.backward(0)
    with pytest.raises(RuntimeError, match="'0' was stepped on its plain gradient by an optimizer"):
        other.step()


@pytest.mark.parametrize("kind", [sgd, ThroughData], ids=["in place", "through data"])
@pytest.mark.parametrize("clips", [False, True], ids=["", "clipped"])
def test_another_optimizer_after_the_gates_own_step(clips: bool, kind: OptimizerOf) -> None:
    """The gradient is the plain one again until it is zeroed."""
    run = BesideReference("step")
    other = kind(run.model.parameters())
    run.backward(0)
    run.step()
    if clips:
        nn.utils.clip_grad_norm_(run.model.parameters(), 0.1)
    with pytest.raises(RuntimeError, match="'0' was stepped on its plain gradient by an optimizer"):
        other.step()


def test_another_optimizer_after_zeroing_in_place() -> None:
    """It may decay the weights that the gate's own has stepped."""
    run = BesideReference("step")
    run.backward(0)
    run.step()
    run.optimizer.zero_grad(set_to_none=False)
    kept = run.model[0].weight.detach().clone()
    torch.optim.SGD(run.model.parameters(), lr=0.5, weight_decay=1.0).step()
    torch.testing.assert_close(run.model[0].weight.detach(), kept / 2)


class Outer(Optimizer):
    """Steps by an optimizer of its own, as wrappers do."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})
        self.inner = torch.optim.SGD([p for group in self.param_groups for p in group["params"]], lr=0.1)

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)


class EverySecond(Outer):
    """Steps in every second call."""

    calls = 0

    def step(self, closure: Any = None) -> None:
        self.calls += 1
        if self.calls % 2 == 0:
            super().step()


def test_another_optimizer_that_does_not_step_yet() -> None:
    """A wrapper's own step is no step of the gate's optimizer, and changes nothing before that steps."""
    run = BesideReference("step")
    wrapper = EverySecond(run.model.parameters())
    wrapper.inner = run.optimizer
    for seed in range(2):
        for batch in run.batches(seed):
            summed_loss(run.model, batch).backward()
            run.reference.backward(batch)
            wrapper.step()
        run.step_reference()
        run.optimizer.zero_grad()
    run.assert_equal()


@pytest.mark.parametrize("zeroes", [False, True], ids=["", "zeroed in the step"])
def test_wrapper_of_the_gates_optimizer(zeroes: bool) -> None:
    """Its step is the gate's optimizer's, also with the gradients that the last one has left."""
    run = BesideReference("step")
    wrapper = Outer(run.model.parameters())
    wrapper.inner = run.optimizer
    if zeroes:
        run.optimizer.register_step_post_hook(lambda optimizer, *_: optimizer.zero_grad())
    for seed in range(2):
        run.backward(seed)
        for _ in range(1 if zeroes else 2):
            wrapper.step()
            run.reference.step(run._reference_optimizer)
        if zeroes:
            run.reference.forget()
    run.assert_equal()


def test_other_optimizers_go_their_ways() -> None:
    """One of another model, one that holds a gated weight but has nothing to step on, one inside another."""
    run = BesideReference("step", Outer)
    unrelated = nn.Linear(2, 2)
    bystander = sgd([*unrelated.parameters(), run.model[0].weight])
    for seed in range(2):
        unrelated(torch.ones(2)).sum().backward()
        bystander.step()
        run.backward(seed)
        run.step()
        run.optimizer.zero_grad()
        bystander.zero_grad()
    run.assert_equal()


@pytest.mark.parametrize("set_to_none", [True, False], ids=["to None", "in place"])
@pytest.mark.parametrize(
    ("gate_at", "what"), [("backward", "whole step"), ("step", "whole step"), ("step", "optimizer")]
)
def test_compiled_step(gate_at: str, what: str, set_to_none: bool) -> None:
    """torch.compile around optimizer.step, and around forward, backward and step together."""
    torch._dynamo.reset()
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ELU(), nn.Linear(8, 5))
    run = BesideReference(gate_at, lambda p: torch.optim.SGD(p, lr=0.1), model=model)

    def passes(batches: list[Batch]) -> None:
        for batch in batches:
            summed_loss(run.model, batch).backward()

    def step(batches: list[Batch]) -> None:
        if what == "whole step":
            passes(batches)
        run.optimizer.step()

    compiled = torch.compile(step, backend="aot_eager")
    for seed in range(2):
        batches = run.batches(seed)
        if what == "optimizer":
            passes(batches)
        compiled(batches)
        for batch in batches:
            run.reference.backward(batch)
        run.step_reference()
        run.optimizer.zero_grad(set_to_none)
    run.assert_equal()
    torch._dynamo.reset()
