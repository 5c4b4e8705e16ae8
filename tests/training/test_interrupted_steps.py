"""Steps that raise, and gradients that are zeroed in a step, with gate_at="step"."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ghl_kernels as ghl

X = torch.randn(7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Two(nn.Module):
    """Layers side by side, of which a pass may reach one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = (ghl.GHLLinear(5, 6, gate_at="step", dtype=torch.float64) for _ in range(2))

    def backward(self, *names: str) -> None:
        sum((self.get_submodule(name)(X).square().sum() for name in names), X.new_zeros(())).backward()


class Run:
    """Two layers whose first step is broken off by a hook that comes after the gate's, or is not taken."""

    def __init__(self, *, breaks_off: bool) -> None:
        self.model = Two()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1.0)
        self.gate = ghl.StepGate(self.optimizer, self.model)
        self.model.backward("a", "b")
        if breaks_off:
            hook = self.optimizer.register_step_pre_hook(self._raise)
            with pytest.raises(ArithmeticError):
                self.optimizer.step()
            hook.remove()

    def _raise(self, *_: Any) -> None:
        raise ArithmeticError("skip this batch")

    def weights(self) -> list[Tensor]:
        return [self.model.a.weight.detach(), self.model.b.weight.detach()]


@pytest.mark.parametrize("zeroing", ["None", "in place", "in place, unseen", "no"])
@pytest.mark.parametrize("names", ["a", "ab"])
def test_a_step_after_one_that_was_broken_off(names: str, zeroing: str) -> None:
    """It takes what was left to accumulate, of layers that its own passes do not reach, too."""
    runs = [Run(breaks_off=breaks_off) for breaks_off in (True, False)]
    for run in runs:
        if "unseen" in zeroing:
            for p in run.model.parameters():
                assert p.grad is not None
                p.grad.data.zero_()
            run.model.backward("b")  # looks at it
            run.optimizer.zero_grad(set_to_none=False)
        elif zeroing != "no":
            run.optimizer.zero_grad(set_to_none=zeroing == "None")
        run.model.backward(*names)
        run.optimizer.step()
    for broken, whole in zip(*(run.weights() for run in runs), strict=True):
        torch.testing.assert_close(broken, whole)


def test_a_gate_removed_after_a_step_that_was_broken_off_leaves_no_gradient() -> None:
    run = Run(breaks_off=True)
    run.gate.remove()
    assert run.model.a.weight.grad is None
    assert run.model.b.weight.grad is None


torch.optim.SGD([torch.zeros(1)])  # without one of them, super().step() has no hooks


class BreaksOff(torch.optim.SGD):
    """Raises once, before or after its super().step()."""

    when = ""

    def step(self, closure: Any = None) -> Any:
        self._maybe_raise("before")
        loss = super().step(closure)
        self._maybe_raise("after")
        return loss

    def _maybe_raise(self, when: str) -> None:
        if self.when == when:
            self.when = ""
            raise ArithmeticError("skip this batch")


def _attached() -> tuple[Two, BreaksOff]:
    model = Two()
    optimizer = BreaksOff(model.parameters(), lr=1.0)
    ghl.StepGate(optimizer, model)
    model.backward("a", "b")
    return model, optimizer


def _break_off(optimizer: BreaksOff, when: str) -> None:
    optimizer.when = when
    with pytest.raises(ArithmeticError):
        optimizer.step()


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_step_that_is_taken_again(when: str) -> None:
    """The plain gradients are back after it, wherever the first was broken off."""
    (model, optimizer), (whole, its) = _attached(), _attached()
    plain = [p.grad.clone() for p in model.parameters()]
    _break_off(optimizer, when)
    optimizer.step()
    its.step()
    assert all(torch.equal(p.grad, G) for p, G in zip(model.parameters(), plain, strict=True))
    if when == "before":
        for mine, theirs in zip(model.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("set_to_none", [True, False], ids=["None", "in place"])
def test_a_step_after_one_that_was_broken_off_after_super_step(set_to_none: bool) -> None:
    (model, optimizer), (whole, its) = _attached(), _attached()
    _break_off(optimizer, "after")
    its.step()
    for _ in range(2):
        for one, steps in ((model, optimizer), (whole, its)):
            steps.zero_grad(set_to_none)
            one.backward("a")
            steps.step()
    for mine, theirs in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


class ZeroingSGD(torch.optim.Optimizer):
    """Zeroes the gradients that it has used."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                p.sub_(p.grad)
                p.grad.zero_()


@pytest.mark.parametrize("rule", [ghl.HebbianRule.ghl(), ghl.HebbianRule.softhebb()], ids=["gate", "no gate"])
@pytest.mark.parametrize("who", ["optimizer", "hook"])
def test_gradients_zeroed_in_the_step_stay_so(who: str, rule: ghl.HebbianRule) -> None:
    models = [Two(), Two()]
    optimizers: list[torch.optim.Optimizer] = []
    for model, zeroes in zip(models, (True, False), strict=True):
        ghl_layers = [model.a, model.b]
        for layer in ghl_layers:
            layer.set_rule(rule)
        if zeroes and who == "optimizer":
            optimizers.append(ZeroingSGD(model.parameters()))
        else:
            optimizers.append(torch.optim.SGD(model.parameters(), lr=1.0))
        if zeroes and who == "hook":
            optimizers[-1].register_step_post_hook(lambda o, *_: o.zero_grad(set_to_none=False))
        ghl.StepGate(optimizers[-1], model)
    for _ in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            model.backward("a", "b")
            optimizer.step()
        optimizers[1].zero_grad()
        assert models[0].a.weight.grad is not None
        assert not models[0].a.weight.grad.any()
    for mine, theirs in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(mine, theirs)
