"""StepGate: however gradients came about, the step is the reference rule on all the data behind them."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference_model import ReferenceModel, assert_gradients_close, small_batches, small_network, summed_loss
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import ghl_kernels as ghl
from ghl_kernels import HebbianRule, _attachment
from ghl_kernels._processes import Processes
from ghl_kernels.nn import GHLLayer

pytestmark = pytest.mark.usefixtures("one_thread")

RULE = HebbianRule.ghl(temperature=0.5)
LR = 0.0625  # a power of two: weights differ by exactly the gradient times this, up to their own rounding
RULES = {
    "softmax": RULE,
    "kwta": HebbianRule.kwta(2),
    "anti": HebbianRule(losers="anti", winners=0.5),
    "mean": HebbianRule(normalize="mean"),
    "filter": HebbianRule(normalize="filter"),
    "instar": HebbianRule(decay="instar", normalize="none"),
    "subspace": HebbianRule(activity="relu", decay="subspace"),
    "sanger": HebbianRule(activity="linear", decay="sanger"),
    "no decay": HebbianRule(activity="binary", winners=2, decay="none"),
    "no gate": HebbianRule.softhebb(),
    "no gate, mean": HebbianRule.hpca(),
    "no gate, instar": HebbianRule.instar(),
}


class Training:
    """A model under StepGate beside its reference; plain SGD, so that a step shows the gradient it used."""

    def __init__(
        self,
        model: nn.Module | None = None,
        *,
        rule: HebbianRule = RULE,
        dtype: torch.dtype = torch.float64,
        sums_at: str = "forward",
    ) -> None:
        torch.manual_seed(0)
        model = small_network(inplace=sums_at == "forward") if model is None else model
        self.dtype = dtype
        self.model = ghl.convert(model.to(dtype), rule, gate_at="step", sums_at=sums_at)
        self.reference = ReferenceModel(self.model)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=LR)
        self.gate = ghl.StepGate(self.optimizer, self.model)

    def batches(self, *sizes: int, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
        return small_batches(*sizes, dtype=self.dtype, seed=seed)

    def backward(self, *sizes: int, seed: int = 1) -> None:
        """One backward pass for each size, in both models."""
        for batch in self.batches(*sizes, seed=seed):
            summed_loss(self.model, batch).backward()
            self.reference.backward(batch)

    def step_and_check(self, step: Callable[[], Any] | None = None) -> None:
        """The step moves the parameters by the reference's gradient on the data since the last zeroing."""
        before = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        (step or self.optimizer.step)()
        applied = {name: (before[name] - p.detach()) / LR for name, p in self.model.named_parameters()}
        assert_gradients_close(applied, self.reference, self.dtype)
        self.reference.follow(self.model)

    def zero(self) -> None:
        self.optimizer.zero_grad()
        self.reference.forget()


@pytest.fixture(params=[torch.float64, torch.float32], ids=["float64", "float32"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


# --- how gradients come about -------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(6,), (3, 5), (1, 4, 2)], ids=["whole", "two", "three"])
def test_step_equals_the_rule_on_the_whole_batch(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    training = Training(dtype=dtype)
    for seed in (1, 2):
        training.backward(*sizes, seed=seed)
        training.step_and_check()
        training.zero()


@pytest.mark.parametrize("sums_at", ["forward", "backward"])
@pytest.mark.parametrize("name", RULES)
def test_step_accumulates_what_every_rule_needs(name: str, sums_at: str) -> None:
    training = Training(rule=RULES[name], sums_at=sums_at)
    for seed in (1, 2):
        training.backward(3, 5, seed=seed)
        training.step_and_check()
        training.zero()


class Twice(nn.Module):
    """Uses one convolution and one linear layer twice in one graph."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.hidden = nn.Linear(192, 192)
        self.head = nn.Linear(192, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.conv(torch.tanh(self.conv(x))))
        x = torch.tanh(self.hidden(torch.tanh(self.hidden(x.flatten(1)))))
        return self.head(x)


def test_layer_used_twice_in_one_graph(dtype: torch.dtype) -> None:
    training = Training(Twice(), dtype=dtype)
    training.backward(3, 5)
    training.step_and_check()


def test_graph_walked_twice_counts_twice() -> None:
    training = Training(rule=RULES["mean"])
    (batch,) = training.batches(4)
    loss = summed_loss(training.model, batch)
    loss.backward(retain_graph=True)
    loss.backward()
    for _ in range(2):
        training.reference.backward(batch)
    # the mean is over positions seen, which a second walk doubles as well
    training.step_and_check()


@pytest.mark.parametrize("keyword", [False, True], ids=["positional", "keyword"])
def test_closure_passed_to_step(keyword: bool) -> None:
    training = Training()

    def closure() -> Tensor:
        training.zero()
        (batch,) = training.batches(5)
        loss = summed_loss(training.model, batch)
        loss.backward()
        training.reference.backward(batch)
        return loss

    losses = []

    def step() -> None:
        arguments = {"closure": closure} if keyword else {}
        losses.append(training.optimizer.step(*([] if keyword else [closure]), **arguments))

    for _ in range(2):
        training.step_and_check(step)
    assert all(isinstance(loss, Tensor) and loss.isfinite() for loss in losses)


class TwoEvaluations(torch.optim.SGD):
    """Calls its closure twice in one step, as line searches and second-order steps do."""

    def step(self, closure: Callable[[], Tensor]) -> Tensor:
        closure()
        return super().step(closure)


def test_closure_called_twice_in_one_step() -> None:
    training = Training()
    training.gate.remove()
    training.optimizer = TwoEvaluations(training.model.parameters(), lr=LR)
    training.gate = ghl.StepGate(training.optimizer, training.model)

    def closure() -> Tensor:
        training.zero()
        training.backward(5)
        return torch.zeros(())

    training.step_and_check(lambda: training.optimizer.step(closure))


@pytest.mark.parametrize("set_to_none", [True, False], ids=["to None", "in place"])
@pytest.mark.parametrize("weights", [(0, 1), (1, 0), (1, 0, 1), (0, 0, 1)], ids=str)
def test_pass_whose_gradient_is_zero_keeps_its_sums(weights: tuple[int, ...], set_to_none: bool) -> None:
    """Its data are part of the batch, and it leaves what zeroing in place leaves."""
    training = Training()
    for seed in (1, 2, 3):
        batches = training.batches(*[4] * len(weights), seed=seed)
        for weight, batch in zip(weights, batches, strict=True):
            for model in (training.model, training.reference.model):
                (weight * summed_loss(model, batch)).backward()
        training.step_and_check()
        training.optimizer.zero_grad(set_to_none)
        training.reference.forget()


def test_discarded_backward_pass_leaves_no_trace() -> None:
    training = Training()
    training.backward(7, seed=9)
    training.zero()
    training.backward(3, 5)
    training.step_and_check()


def test_forward_without_backward_leaves_no_trace() -> None:
    training = Training()
    training.backward(3)
    summed_loss(training.model, training.batches(7, seed=9)[0])
    training.backward(5, seed=2)
    # the discarded forward was recorded by the batch norm of one model only, which no step sees in training
    training.step_and_check()


@pytest.mark.parametrize("pending", [False, True], ids=["before", "between"])
def test_gradient_of_the_input_alone_leaves_no_trace(pending: bool) -> None:
    """The inner loop of adversarial training."""
    training = Training()
    if pending:
        training.backward(3)
    x, target = training.batches(7, seed=9)[0]
    x.requires_grad_()
    (grad,) = torch.autograd.grad(summed_loss(training.model, (x, target)), x)
    assert grad.abs().sum() > 0
    training.backward(5, seed=2)
    training.step_and_check()


def test_gradient_asked_of_the_weight_leaves_no_trace() -> None:
    training = Training()
    training.backward(3)
    weight = training.model[0].weight
    (G,) = torch.autograd.grad(summed_loss(training.model, training.batches(7, seed=9)[0]), weight)
    assert G.abs().sum() > 0
    training.backward(5, seed=2)
    training.step_and_check()


class Blocked(torch.autograd.Function):
    """Lets no gradient through, not even one of zeros."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        return None


@pytest.mark.parametrize("pending", [False, True], ids=["alone", "between"])
@pytest.mark.parametrize("rule", ["softmax", "no gate, mean"])
def test_undefined_gradient_is_no_pass(rule: str, pending: bool) -> None:
    training = Training(rule=RULES[rule])
    if pending:
        training.backward(3)
    Blocked.apply(training.model(training.batches(7, seed=9)[0][0])).sum().backward()
    if not pending:
        assert all(p.grad is None for p in training.model.parameters())
        training.optimizer.step()
    training.backward(5, seed=2)
    training.step_and_check()


def test_checkpoint_that_drops_a_branch() -> None:
    training = Training()
    other = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    u = training.model(training.batches(3)[0][0])
    checkpoint(lambda dropped, kept: kept.sum(), u, other, use_reentrant=True).backward()
    training.optimizer.step()
    training.backward(5, seed=2)
    training.step_and_check()


@pytest.mark.parametrize("order", ["before the gate", "after it"])
def test_gradient_that_a_hook_takes_away(order: str) -> None:
    """As who moves gradients elsewhere does: there is none, and so no step."""
    training = Training()
    training.gate.remove()
    weight = training.model[3].weight
    if order == "before the gate":
        handle = weight.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    training.gate = ghl.StepGate(training.optimizer, training.model)
    if order == "after it":
        handle = weight.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    kept = weight.detach().clone()
    for _ in range(2):
        training.backward(3, 4)
        training.optimizer.step()
        training.zero()
    assert torch.equal(weight, kept)
    handle.remove()
    _recovers(training)


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(inplace=True), nn.Flatten())
        self.shared = nn.Sequential(nn.Linear(192, 192), nn.Tanh())
        self.head = nn.Linear(192, 5)
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        # the reentrant kind differentiates only what comes from an input that requires a gradient
        x = x.clone().requires_grad_()
        for segment in (self.features, self.shared, self.shared):
            x = checkpoint(segment, x, use_reentrant=self.use_reentrant)
        return self.head(x)


@pytest.mark.parametrize("sums_at", ["forward", "backward"])
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["saved tensors", "reentrant"])
def test_activation_checkpointing(use_reentrant: bool, sums_at: str) -> None:
    model = Checkpointed(use_reentrant)
    if sums_at == "backward":
        model.features[1] = nn.ReLU()
    training = Training(model, sums_at=sums_at)
    for seed in (1, 2):
        training.backward(3, 5, seed=seed)
        training.step_and_check()
        training.zero()


@pytest.mark.parametrize("penalized", [False, True])
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["saved tensors", "reentrant"])
def test_layer_in_a_checkpoint_and_outside_of_it_with_a_penalty(use_reentrant: bool, penalized: bool) -> None:
    """Recomputed, it finds sums whose gradient still waits for that of the penalty: refused, though right."""
    layer = ghl.GHLLinear(4, 4, rule=RULE, gate_at="step", dtype=torch.float64)
    optimizer = torch.optim.SGD(layer.parameters(), lr=LR)
    ghl.StepGate(optimizer, layer)
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    penalty = layer.weight.square().sum()
    inner = checkpoint(layer, x, use_reentrant=use_reentrant)
    u = layer(inner)
    (u.square().sum() + (penalty if penalized else 0)).backward()
    if use_reentrant and penalized:
        with pytest.raises(RuntimeError, match="has no Hebbian sums"):
            optimizer.step()
        return
    W, G = layer.weight.detach().clone(), layer.weight.grad.clone()
    optimizer.step()
    data = torch.cat([x, inner]).detach(), torch.cat([inner, u]).detach()
    want = ghl.reference.gate(ghl.reference.linear_delta(*data, W, RULE), G)
    torch.testing.assert_close((W - layer.weight.detach()) / LR, want)


def test_frozen_layer_is_left_alone() -> None:
    training = Training()
    frozen = training.model[3]
    frozen.weight.requires_grad_(False)
    training.reference.model[3].weight.requires_grad_(False)
    kept = frozen.weight.detach().clone()
    training.backward(3, 5)
    training.step_and_check()
    assert torch.equal(frozen.weight, kept)
    assert frozen.weight.grad is None
    frozen.weight.requires_grad_(True)
    training.reference.model[3].weight.requires_grad_(True)
    training.zero()
    training.backward(3, 5, seed=2)
    training.step_and_check()


def test_layer_that_was_frozen_when_attached() -> None:
    """It is its torch layer; once thawed it is a layer without StepGate."""
    model = ghl.convert(small_network(), RULE, gate_at="step")
    model[3].weight.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    gate = ghl.StepGate(optimizer, model)
    (batch,) = small_batches(4, dtype=torch.float32)
    summed_loss(model, batch).backward()
    optimizer.step()
    model[3].weight.requires_grad_(True)
    with pytest.raises(RuntimeError, match="StepGate"):
        model(batch[0])
    gate.remove()
    assert "layers: 0, 3, 6)" in repr(ghl.StepGate(optimizer, model))
    model(batch[0])


def test_layer_that_a_pass_did_not_reach_is_not_stepped() -> None:
    torch.manual_seed(0)
    model = nn.ModuleList([ghl.GHLLinear(4, 4, gate_at="step") for _ in range(2)])
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    ghl.StepGate(optimizer, model)
    kept = model[1].weight.detach().clone()
    model[0](torch.randn(3, 4)).sum().backward()
    optimizer.step()
    assert torch.equal(model[1].weight, kept)
    assert model[1].weight.grad is None


# --- zeroing ------------------------------------------------------------------------------------


def _by_hand(model: nn.Module, zero: Callable[[nn.Parameter], Any]) -> None:
    for p in model.parameters():
        if p.grad is not None:
            zero(p)


def _new_zeros(p: nn.Parameter) -> None:
    p.grad = torch.zeros_like(p)


def _none(p: nn.Parameter) -> None:
    p.grad = None


ZEROING: dict[str, Callable[[nn.Module, torch.optim.Optimizer], Any]] = {
    "optimizer, to None": lambda model, optimizer: optimizer.zero_grad(),
    "optimizer, in place": lambda model, optimizer: optimizer.zero_grad(set_to_none=False),
    "model, to None": lambda model, optimizer: model.zero_grad(),
    "model, in place": lambda model, optimizer: model.zero_grad(set_to_none=False),
    "by hand, None": lambda model, optimizer: _by_hand(model, _none),
    "by hand, new zeros": lambda model, optimizer: _by_hand(model, _new_zeros),
    "by hand, zero_": lambda model, optimizer: _by_hand(model, lambda p: p.grad.zero_()),
    "by hand, data.zero_": lambda model, optimizer: _by_hand(model, lambda p: p.grad.data.zero_()),
    "by hand, times 0": lambda model, optimizer: _by_hand(model, lambda p: p.grad.mul_(0)),
}


@pytest.mark.parametrize("rule", ["softmax", "no gate, mean"])
@pytest.mark.parametrize("way", ZEROING)
def test_every_way_of_zeroing_starts_afresh(way: str, rule: str) -> None:
    training = Training(rule=RULES[rule])
    for seed in (1, 2, 3):
        training.backward(3, 5, seed=seed)
        training.step_and_check()
        ZEROING[way](training.model, training.optimizer)
        training.reference.forget()


@pytest.mark.parametrize("rule", ["softmax", "no gate, mean"])
@pytest.mark.parametrize("way", ZEROING)
def test_zeroing_without_a_step_discards_the_pass(way: str, rule: str) -> None:
    training = Training(rule=RULES[rule])
    training.backward(7, seed=9)
    ZEROING[way](training.model, training.optimizer)
    training.reference.forget()
    training.backward(3, 5)
    training.step_and_check()


@pytest.mark.parametrize("rule", ["softmax", "no gate, mean"])
def test_without_zeroing_gradients_and_sums_go_on_accumulating(rule: str) -> None:
    training = Training(rule=RULES[rule])
    for seed in (1, 2, 3):
        training.backward(4, seed=seed)
        training.step_and_check()


@pytest.mark.parametrize("after", ["a step", "a pass"])
@pytest.mark.parametrize("rule", ["softmax", "no gate", "no gate, mean"])
@pytest.mark.parametrize("way", ZEROING)
def test_step_after_zeroing_moves_nothing(way: str, rule: str, after: str) -> None:
    training = Training(rule=RULES[rule])
    training.backward(4)
    if after == "a step":
        training.optimizer.step()
    ZEROING[way](training.model, training.optimizer)
    kept = [p.detach().clone() for p in training.model.parameters()]
    for _ in range(2):
        training.optimizer.step()
    assert all(torch.equal(p, k) for p, k in zip(training.model.parameters(), kept, strict=True))
    _recovers(training)


@pytest.mark.parametrize("scaled", [False, True], ids=["", "a step that GradScaler skipped"])
@pytest.mark.parametrize("other", [False, True], ids=["", "a pass of another layer"])
@pytest.mark.parametrize("rule", ["softmax", "filter", "instar", "no gate"])
@pytest.mark.parametrize("way", [way for way in ZEROING if "times" not in way])  # 0 times NaN is NaN
def test_zeroing_forgets_sums_that_are_nan(way: str, rule: str, other: bool, scaled: bool) -> None:
    """A batch that was no good leaves nothing to a step that does not reach the layer."""
    model = nn.ModuleList([ghl.GHLLinear(4, 6, rule=RULES[rule], gate_at="step") for _ in range(2)])
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    ghl.StepGate(optimizer, model)
    scaler = torch.amp.GradScaler("cpu", enabled=scaled)
    x, kept = torch.randn(3, 4), copy.deepcopy(model.state_dict())
    scaler.scale(model[1](x / 0.0).sum()).backward()
    if scaled:
        scaler.step(optimizer)
        scaler.update()
    ZEROING[way](model, optimizer)
    if other:
        scaler.scale(model[0](x).square().sum()).backward()
    optimizer.step()
    assert torch.equal(model[1].weight, kept["1.weight"])
    assert torch.equal(model[0].weight, kept["0.weight"]) != other
    assert model[0].weight.isfinite().all()


def _renormalize(layer: ghl.GHLLinear) -> None:
    with torch.no_grad():
        layer.weight.div_(layer.weight.norm(dim=1, keepdim=True))


CHANGES: dict[str, Callable[[Any], Any]] = {
    "kept": lambda layer: None,
    "renormalized": _renormalize,
    "loaded": lambda layer: layer.load_state_dict(copy.deepcopy(layer.state_dict())),
    "frozen": lambda layer: layer.requires_grad_(False),
}


@pytest.mark.parametrize("set_to_none", [True, False], ids=["to None", "in place"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("rule", ["softmax", "no gate"])
def test_layer_that_later_passes_do_not_reach(rule: str, change: str, set_to_none: bool) -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"rule": RULES[rule], "gate_at": "step", "dtype": torch.float64}
    model = nn.ModuleList([ghl.GHLLinear(4, 6, **options) for _ in range(2)])
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    ghl.StepGate(optimizer, model)
    x = torch.randn(3, 4, dtype=torch.float64)
    sum(layer(x).square().sum() for layer in model).backward()
    optimizer.step()
    CHANGES[change](model[1])
    optimizer.zero_grad(set_to_none)
    kept = model[1].weight.detach().clone()
    for _ in range(3):
        model[0](x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none)
    assert torch.equal(model[1].weight, kept)
    model[1].requires_grad_(True)
    u = model[1](2 * x)
    u.square().sum().backward()
    optimizer.step()
    want = ghl.reference.linear_weight_grad(2 * x, u.detach(), 2 * u.detach(), kept, RULES[rule])
    torch.testing.assert_close((kept - model[1].weight.detach()) / LR, want)


@pytest.mark.parametrize("way", ["new zeros", "eval mode"])
def test_gradient_of_zeros_is_none(way: str) -> None:
    """Also one that was there before the gate, and that no pass with sums has made."""
    training = Training()
    if way == "new zeros":
        for p in training.model.parameters():
            _new_zeros(p)
    else:
        training.model.eval()
        (0 * summed_loss(training.model, training.batches(3)[0])).backward()
        training.model.train()
    kept = training.model[3].weight.detach().clone()
    training.optimizer.step()
    assert torch.equal(training.model[3].weight, kept)
    training.backward(3, 5)
    training.step_and_check()


def test_zeroing_after_the_forward_pass() -> None:
    training = Training()
    training.backward(7, seed=9)
    batch, *_ = training.batches(5, seed=2)
    loss = summed_loss(training.model, batch)
    training.zero()
    loss.backward()
    training.reference.backward(batch)
    training.step_and_check()


# --- clipping -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("clip", "rule"), [("norm", "softmax"), ("value", "softmax"), ("value", "no gate, mean")]
)
def test_clipping_changes_neither_sign_nor_size(clip: str, rule: str) -> None:
    training = Training(rule=RULES[rule])

    def clip_gradients(parameters: Any) -> None:
        if clip == "norm":
            nn.utils.clip_grad_norm_(parameters, 0.1)
        else:
            nn.utils.clip_grad_value_(parameters, 0.01)

    for seed in (1, 2):
        training.backward(3, 5, seed=seed)
        clip_gradients(training.model.parameters())
        clip_gradients(training.reference.model.parameters())
        training.step_and_check()
        training.zero()


@pytest.mark.parametrize("rule", ["softmax", "no gate, mean"])
def test_clipping_between_accumulated_passes_keeps_their_sums(rule: str) -> None:
    training = Training(rule=RULES[rule])
    for seed in (1, 2):
        training.backward(4, seed=seed)
        for model in (training.model, training.reference.model):
            nn.utils.clip_grad_value_(model.parameters(), 1e3)
    training.step_and_check()


# --- optimizers ---------------------------------------------------------------------------------

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "SGD, momentum and decay": lambda p: torch.optim.SGD(
        p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01
    ),
    "Adam, decay": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.01),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, maximize=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_with_state(name: str) -> None:
    training = Training()
    training.gate.remove()
    optimizer = OPTIMIZERS[name](training.model.parameters())
    ghl.StepGate(optimizer, training.model)
    reference_optimizer = OPTIMIZERS[name](training.reference.model.parameters())
    for seed in range(3):
        training.backward(3, 5, seed=seed)
        optimizer.step()
        training.reference.step(reference_optimizer)
        optimizer.zero_grad()
        training.reference.forget()
    for mine, theirs in zip(training.model.parameters(), training.reference.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-9)


def test_parameter_groups_keep_their_own_settings() -> None:
    training = Training()
    training.gate.remove()
    layers = list(training.model)

    def grouped(model: nn.Sequential) -> torch.optim.Optimizer:
        groups = [
            {"params": model[0].parameters(), "lr": 0.5},
            {"params": model[3].parameters(), "weight_decay": 0.1},
            {"params": [p for i in (1, 6, 8) for p in model[i].parameters()], "momentum": 0.9},
        ]
        return torch.optim.SGD(groups, lr=0.1)

    optimizer, reference_optimizer = grouped(training.model), grouped(training.reference.model)
    ghl.StepGate(optimizer, training.model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    reference_scheduler = torch.optim.lr_scheduler.StepLR(reference_optimizer, 1, 0.5)
    for seed in range(3):
        training.backward(3, 5, seed=seed)
        optimizer.step()
        training.reference.step(reference_optimizer)
        scheduler.step()
        reference_scheduler.step()
        optimizer.zero_grad()
        training.reference.forget()
    assert len(layers) == 9
    for mine, theirs in zip(training.model.parameters(), training.reference.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10)


def test_several_optimizers_each_with_its_own_gate() -> None:
    training = Training()
    training.gate.remove()
    first = torch.optim.SGD(training.model[:3].parameters(), lr=LR)
    second = torch.optim.SGD(training.model[3:].parameters(), lr=LR)
    gates = [ghl.StepGate(optimizer, training.model) for optimizer in (first, second)]
    assert "layers: 0)" in repr(gates[0])
    assert "layers: 3, 6)" in repr(gates[1])

    def step() -> None:
        first.step()
        second.step()

    for seed in (1, 2):
        training.backward(3, 5, seed=seed)
        training.step_and_check(step)
        first.zero_grad()
        second.zero_grad()
        training.reference.forget()


# --- GradScaler ---------------------------------------------------------------------------------

SCALED: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    f"{kind.__name__}, {form}": (
        lambda p, kind=kind, form=form: kind(
            p,
            lr=0.125,
            foreach=form == "foreach" or (False if form == "plain" else None),
            fused=form == "fused",
        )
    )
    for kind in (torch.optim.SGD, torch.optim.Adam)
    for form in ("plain", "foreach", "fused")
}


@pytest.mark.parametrize("unscale", [False, True], ids=["", "unscaled and clipped"])
@pytest.mark.parametrize("name", SCALED)
def test_grad_scaler(name: str, unscale: bool) -> None:
    """Right steps, a skipped one that changes nothing, and a right one after it."""
    torch.manual_seed(0)
    training = Training(dtype=torch.float32)
    training.gate.remove()
    model, reference = training.model, training.reference
    optimizer = SCALED[name](model.parameters())
    ghl.StepGate(optimizer, model)
    steps = _capture_gradients(optimizer, model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)

    for round_, poison in enumerate((False, True, False, False)):
        for batch in training.batches(3, 5, seed=round_):
            if poison:
                batch[0][0, 0, 0, 0] = float("inf")
            else:
                reference.backward(batch)
            scaler.scale(summed_loss(model, batch)).backward()
        if unscale:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            nn.utils.clip_grad_norm_(reference.model.parameters(), 0.5)
        before = {key: p.detach().clone() for key, p in model.named_parameters()}
        steps.clear()
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        if poison:
            assert scaler.get_scale() < scale
            assert all(torch.equal(before[key], p) for key, p in model.named_parameters())
            for name_, buffer in model.named_buffers():  # an inf that batch norm has averaged stays there
                buffer.copy_(reference.model.get_buffer(name_))
        else:
            (grads,) = steps
            fused = "fused" in name and not unscale
            grads = {key: grad / scale if fused else grad for key, grad in grads.items()}
            assert_gradients_close(grads, reference, torch.float32)
            assert all(not torch.equal(before[key], p) for key, p in model.named_parameters())
            if "SGD" in name:
                for key, p in model.named_parameters():
                    torch.testing.assert_close(
                        before[key] - 0.125 * grads[key], p.detach(), rtol=1e-6, atol=1e-7
                    )
        optimizer.zero_grad()
        reference.forget()
        reference.follow(model)


def _capture_gradients(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[dict[str, Tensor]]:
    """The gradients that every step of an optimizer is about to use."""
    steps: list[dict[str, Tensor]] = []

    def capture(*_: Any) -> None:
        steps.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})

    optimizer.register_step_pre_hook(capture)
    return steps


@pytest.mark.parametrize("bad", [float("inf"), float("nan")], ids=["inf", "nan"])
@pytest.mark.parametrize("rule", ["softmax", "kwta", "no gate"])
def test_bad_sums_alone_are_seen_by_grad_scaler(rule: str, bad: float) -> None:
    """Positions that the loss ignores reach A and not G."""
    torch.manual_seed(0)
    model = nn.Sequential(ghl.GHLLinear(4, 6, rule=RULES[rule], gate_at="step"))
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    ghl.StepGate(optimizer, model)
    scaler = torch.amp.GradScaler("cpu")
    x = torch.randn(3, 4)
    x[2, 1] = bad
    kept = model[0].weight.detach().clone()
    scaler.scale(model(x)[:2].sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(model[0].weight, kept)
    optimizer.zero_grad()
    scaler.scale(model(x[:2]).sum()).backward()
    scaler.step(optimizer)
    assert model[0].weight.isfinite().all()
    assert not torch.equal(model[0].weight, kept)


@pytest.mark.parametrize("normalize", ["layer", "none"])
@pytest.mark.parametrize("exponent", [10, 16, 18])
def test_grad_scaler_and_float16_weights(exponent: int, normalize: str) -> None:
    """float16 does not hold |H| times the scale; the step is of the rule's size, and others of theirs."""
    torch.manual_seed(0)
    rule = HebbianRule(normalize=normalize)
    layer = ghl.GHLLinear(5, 4, rule=rule, gate_at="step", dtype=torch.float16)
    optimizer = torch.optim.Adam(layer.parameters(), lr=2.0**-6, fused=True)
    ghl.StepGate(optimizer, layer)
    used: dict[str, Tensor] = {}
    optimizer.register_step_pre_hook(
        lambda *_: used.update(
            {n: p.grad.double() / optimizer.grad_scale for n, p in layer.named_parameters()}
        )
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**exponent)
    x, before = 4 * torch.randn(40, 5).half(), layer.weight.detach().double()
    u = layer(x)
    grad_u = torch.randn(40, 4).half() * 2.0**-12
    scaler.scale((u.float() * grad_u.float()).sum()).backward()
    plain = {name: p.grad for name, p in layer.named_parameters()}
    values = {name: grad.clone() for name, grad in plain.items()}
    scaler.step(optimizer)
    want = ghl.reference.linear_weight_grad(x.double(), u.detach().double(), grad_u.double(), before, rule)
    torch.testing.assert_close(
        used["weight"].abs(), want.abs(), rtol=2**-9, atol=2**-10 * want.abs().max().item()
    )
    torch.testing.assert_close(used["bias"], values["bias"].double() / 2.0**exponent, rtol=2**-10, atol=0)
    moved = (layer.weight.detach().double() - before).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, 2.0**-6), rtol=2**-4, atol=0)
    assert all(
        p.grad is plain[name] and torch.equal(p.grad, values[name]) for name, p in layer.named_parameters()
    )


# --- precision ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["softmax", "kwta", "sanger"])
def test_autocast_bfloat16(name: str) -> None:
    """The reference gets the layer's own x, u and dL/du; sums and the weight in the decay are float32."""
    rule = RULES[name]
    torch.manual_seed(0)
    layer = ghl.GHLLinear(6, 8, rule=rule, gate_at="step")
    optimizer = torch.optim.SGD(layer.parameters(), lr=LR)
    ghl.StepGate(optimizer, layer)
    steps = _capture_gradients(optimizer, layer)
    seen = []
    for size in (3, 5):
        x = torch.randn(size, 6)
        with torch.autocast("cpu", torch.bfloat16):
            u = layer(x)
        assert u.dtype == torch.bfloat16
        grad_u = torch.randn(size, 8).bfloat16()
        u.backward(grad_u)
        seen.append((x.bfloat16(), u.detach(), grad_u))
    weight = layer.weight.detach().double()
    optimizer.step()
    x, u, grad_u = (torch.cat(parts).double() for parts in zip(*seen, strict=True))
    want = ghl.reference.linear_weight_grad(x, u, grad_u, weight, rule)
    gated = steps[0]["weight"]
    assert gated.dtype == torch.float32
    assert (gated.double().abs() - want.abs()).abs().max() <= 1e-5
    assert (gated.double() - want).abs().max() <= 1e-5  # 48 sums of 8 products of size 1: none is near 0


def test_bfloat16_weights() -> None:
    """The sums stay float32; the reference sees the very numbers that the layer saw."""
    torch.manual_seed(0)
    layer = ghl.GHLLinear(6, 8, rule=RULE, gate_at="step", dtype=torch.bfloat16)
    before = layer.weight.detach().double()
    optimizer = torch.optim.SGD(layer.parameters(), lr=LR)
    ghl.StepGate(optimizer, layer)
    steps = _capture_gradients(optimizer, layer)
    seen = []
    for size in (3, 5):
        x = torch.randn(size, 6).bfloat16()
        u = layer(x)
        grad_u = torch.randn(size, 8).bfloat16()
        u.backward(grad_u)
        seen.append((x, u.detach(), grad_u))
    optimizer.step()
    x, u, grad_u = (torch.cat(parts).double() for parts in zip(*seen, strict=True))
    weight = steps[0]["weight"]
    want = ghl.reference.linear_weight_grad(x, u, grad_u, before, RULE)
    assert weight.dtype == torch.bfloat16
    assert (weight.double().abs() - want.abs()).abs().max() <= 2**-8  # one rounding to bfloat16


def test_module_moved_to_another_dtype_after_attaching() -> None:
    training = Training(dtype=torch.float32)
    training.backward(4)
    training.step_and_check()
    training.zero()
    training.model.double()
    training.dtype = torch.float64
    training.reference.follow(training.model)
    for name, buffer in training.model.named_buffers():
        training.reference.model.get_buffer(name).copy_(buffer)
    for seed in (2, 3):
        training.backward(3, 5, seed=seed)
        training.step_and_check()
        training.zero()


@pytest.mark.parametrize("when", ["between passes", "before the step"])
def test_module_moved_to_another_dtype_while_a_pass_is_pending(when: str) -> None:
    training = Training(dtype=torch.float32)
    training.backward(3)
    training.model.double()
    if when == "between passes":
        training.dtype = torch.float64
        training.backward(5, seed=2)
    training.dtype = torch.float32  # what the first pass was in
    training.step_and_check()
    training.dtype = torch.float64
    training.zero()
    training.backward(3, 5, seed=3)
    training.step_and_check()


# --- what is left behind ------------------------------------------------------------------------


def test_plain_gradient_is_back_after_the_step() -> None:
    training = Training()
    training.backward(3, 5)
    plain = {name: p.grad for name, p in training.model.named_parameters()}
    values = {name: grad.clone() for name, grad in plain.items()}
    training.optimizer.step()
    for name, p in training.model.named_parameters():
        assert p.grad is plain[name]
        assert torch.equal(p.grad, values[name])
        torch.testing.assert_close(p.grad, training.reference.model.get_parameter(name).grad)


def test_remove_and_attach_again() -> None:
    training = Training()
    training.backward(4)
    training.gate.remove()
    with pytest.raises(RuntimeError, match="StepGate"):
        training.model(training.batches(2)[0][0])
    training.zero()
    kept = training.model[0].weight.detach().clone()
    training.gate.remove()  # again: nothing left to do
    training.gate = ghl.StepGate(training.optimizer, training.model)
    training.backward(3, 5)
    training.step_and_check()
    assert not torch.equal(training.model[0].weight, kept)


@pytest.mark.parametrize("after", ["a pass", "a step", "a step and a clip"])
@pytest.mark.parametrize("fused", [False, True])
def test_a_removed_gate_leaves_no_plain_gradient(fused: bool, after: str) -> None:
    training = Training()
    gate = training.gate
    if fused:
        gate.remove()
        training.optimizer = gate = ghl.GHLSGD(training.model, lr=LR)
    training.backward(4)
    if after != "a pass":
        training.optimizer.step()
    if after == "a step and a clip":
        _clip(training)
    before = copy.deepcopy(training.model)
    gate.remove()
    torch.optim.SGD(training.model.parameters(), lr=LR).step()
    for layer, kept in zip(training.model, before, strict=True):
        if isinstance(layer, ghl.GHLLayer):
            assert layer.weight.grad is None
            assert torch.equal(layer.weight, kept.weight)
    assert not torch.equal(training.model[-1].weight, before[-1].weight)


def test_a_mark_outlives_scaling_and_clipping() -> None:
    """A rule without a gate learns where denormals are flushed, too."""
    layer = ghl.GHLLinear(6, 5, rule=HebbianRule.softhebb(), gate_at="step")
    model = nn.Sequential(layer, nn.Linear(5, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    ghl.StepGate(optimizer, model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    kept = layer.weight.detach().clone()
    torch.set_flush_denormal(True)
    try:
        scaler.scale(model(torch.randn(64, 6)).sum()).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-6)
        scaler.step(optimizer)
    finally:
        torch.set_flush_denormal(False)
    assert (layer.weight.detach() - kept).abs().max().item() == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize(
    "duplicate",
    [
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        lambda model: _saved_and_loaded(model),
    ],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_copies_are_unattached(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    training = Training()
    training.backward(4)
    twin = duplicate(training.model)
    x, _ = training.batches(2)[0]
    with pytest.raises(RuntimeError, match="StepGate"):
        twin(x)
    assert twin.eval()(x).shape == (2, 5)
    optimizer = torch.optim.SGD(twin.train().parameters(), lr=LR)
    ghl.StepGate(optimizer, twin)
    summed_loss(twin, training.batches(9)[0]).backward()
    optimizer.step()
    # and the original's sums are its own
    training.step_and_check()


def test_copy_of_a_layer_with_a_parametrization_is_unattached() -> None:
    """torch copies its attributes one by one."""
    layer = ghl.GHLLinear(4, 5, gate_at="step")
    nn.utils.parametrize.register_parametrization(layer, "bias", nn.Identity())
    optimizer = torch.optim.SGD(layer.parameters(), lr=LR)
    ghl.StepGate(optimizer, layer)
    twin = copy.deepcopy(layer)
    with pytest.raises(RuntimeError, match="without a StepGate"):
        twin(torch.randn(3, 4))
    ghl.StepGate(torch.optim.SGD(twin.parameters(), lr=LR), twin)
    twin(torch.randn(3, 4)).sum().backward()
    assert layer.weight.grad is None


def _saved_and_loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def _under_step_gate(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    ghl.StepGate(optimizer, model)
    return optimizer


ATTACH: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "StepGate": _under_step_gate,
    "GHLSGD": lambda model: ghl.GHLSGD(model, lr=LR),
}


@pytest.mark.parametrize("attach", ATTACH.values(), ids=ATTACH)
def test_model_that_nobody_holds_is_freed(attach: Callable[[nn.Module], torch.optim.Optimizer]) -> None:
    """The gate was not removed, and a pass is pending."""
    gc.collect()
    registered = len(_attachment._attached)
    model = ghl.convert(small_network(), RULE, gate_at="step")
    optimizer = attach(model)
    for batch in small_batches(4, 4, dtype=torch.float32):
        optimizer.step()
        summed_loss(model, batch).backward()
    held = [weakref.ref(model[0].weight), weakref.ref(model[0]._attachment), weakref.ref(optimizer)]
    assert len(_attachment._attached) == registered + 3
    del model, optimizer
    gc.collect()
    assert [reference() for reference in held] == [None, None, None]
    assert len(_attachment._attached) == registered


def test_gate_cannot_be_copied() -> None:
    training = Training()
    with pytest.raises(TypeError, match="make a new one"):
        copy.deepcopy(training.gate)
    with pytest.raises(TypeError, match="make a new one"):
        pickle.dumps(training.gate)


def test_state_dict_knows_nothing_of_the_gate() -> None:
    training = Training()
    assert list(training.model.state_dict()) == list(small_network().state_dict())
    assert len(list(training.model.parameters())) == len(list(small_network().parameters()))
    kept = copy.deepcopy(training.model.state_dict())
    training.backward(4)
    training.optimizer.step()
    training.model.load_state_dict(kept)
    training.zero()
    training.backward(3, 5)
    training.step_and_check()


# --- refusals -----------------------------------------------------------------------------------


def test_unattached_layer_raises_in_training_only() -> None:
    layer = ghl.GHLConv2d(3, 4, 3, gate_at="step")
    x = torch.randn(1, 3, 5, 5)
    with pytest.raises(RuntimeError, match="StepGate"):
        layer(x)
    with torch.no_grad():
        assert layer(x).shape == (1, 4, 3, 3)
    assert layer.eval()(x).shape == (1, 4, 3, 3)


def test_attached_twice() -> None:
    training = Training()
    with pytest.raises(ValueError, match="attached to a StepGate already"):
        ghl.StepGate(training.optimizer, training.model)
    training.backward(4)
    training.step_and_check()


def test_layers_that_the_optimizer_does_not_hold() -> None:
    model = ghl.convert(small_network(), gate_at="step")
    biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
    with pytest.raises(ValueError, match="no trainable weight of the model's 3 layers"):
        ghl.StepGate(torch.optim.SGD(biases, lr=LR), model)
    assert all(m._attachment is None for m in model.modules() if isinstance(m, GHLLayer))


def test_model_in_backward_mode_has_nothing_to_gate() -> None:
    model = ghl.convert(small_network())
    match = "no layer with gate_at='step' but 3 GHL layers with gate_at='backward'; pass gate_at='step' to"
    with pytest.raises(ValueError, match=match):
        ghl.StepGate(torch.optim.SGD(model.parameters(), lr=LR), model)


def test_torch_model_has_nothing_to_gate() -> None:
    model = small_network()
    with pytest.raises(ValueError, match="no GHL layer; pass it to convert with gate_at='step' first"):
        ghl.StepGate(torch.optim.SGD(model.parameters(), lr=LR), model)


def test_messages_name_a_model_that_is_the_layer() -> None:
    layer = ghl.GHLLinear(3, 4, gate_at="step")
    optimizer = torch.optim.SGD(layer.parameters(), lr=LR)
    ghl.StepGate(optimizer, layer)
    with pytest.raises(ValueError, match=r"'\(model\)' is attached to a StepGate already"):
        ghl.StepGate(optimizer, layer)
    layer.weight.grad = torch.ones_like(layer.weight)
    with pytest.raises(RuntimeError, match=r"weight\.grad of '\(model\)' has no Hebbian sums"):
        optimizer.step()


def _tie_layers(model: nn.Sequential) -> None:
    model[1].weight = model[0].weight


def _tie_to_a_torch_layer(model: nn.Sequential) -> None:
    model[2].weight = model[0].weight


@pytest.mark.parametrize("tie", [_tie_layers, _tie_to_a_torch_layer])
@pytest.mark.parametrize("attach", ATTACH.values(), ids=ATTACH)
def test_weights_that_are_shared(
    attach: Callable[[nn.Module], Any], tie: Callable[[nn.Sequential], None]
) -> None:
    model = nn.Sequential(*(ghl.GHLLinear(4, 4, gate_at="step") for _ in range(2)), nn.Linear(4, 4))
    tie(model)
    with pytest.raises(ValueError, match=r"the weight of '0' is shared \(0\.weight, [12]\.weight\)"):
        attach(model)
    assert model[0]._attachment is None


def test_weight_that_another_gate_holds() -> None:
    """In a layer that its own model does not contain."""
    first, second = (ghl.GHLLinear(4, 4, gate_at="step") for _ in range(2))
    second.weight = first.weight
    optimizer = torch.optim.SGD(first.parameters(), lr=LR)
    ghl.StepGate(optimizer, first)
    with pytest.raises(ValueError, match="attached to a StepGate already"):
        ghl.StepGate(optimizer, second)


@pytest.mark.parametrize("attach", ATTACH.values(), ids=ATTACH)
def test_gate_whose_optimizer_is_gone_is_replaced(attach: Callable[[nn.Module], Any]) -> None:
    """Nobody could call its remove()."""
    training = Training()
    training.gate.remove()
    torch.optim.lr_scheduler.StepLR(attach(training.model), 1)  # makes the optimizer part of a cycle
    training.gate = ghl.StepGate(training.optimizer, training.model)
    training.backward(3, 5)
    training.step_and_check()


def test_lbfgs() -> None:
    model = ghl.convert(small_network(), gate_at="step")
    with pytest.raises(ValueError, match="LBFGS"):
        ghl.StepGate(torch.optim.LBFGS(model.parameters()), model)


def test_wrong_types() -> None:
    model = ghl.convert(small_network(), gate_at="step")
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    with pytest.raises(TypeError, match=r"torch\.optim\.Optimizer, got Sequential"):
        ghl.StepGate(model, optimizer)
    with pytest.raises(TypeError, match=r"torch\.nn\.Module, got generator"):
        ghl.StepGate(optimizer, model.parameters())
    with pytest.raises(TypeError, match=r"torch\.distributed\.ProcessGroup, got 'gloo'"):
        ghl.StepGate(optimizer, model, "gloo")
    assert all(m._attachment is None for m in model.modules() if isinstance(m, GHLLayer))


def _refused_step(training: Training, match: str) -> None:
    before = [p.detach().clone() for p in training.model.parameters()]
    grads = [p.grad for p in training.model.parameters()]
    with pytest.raises(RuntimeError, match=match):
        training.optimizer.step()
    assert all(torch.equal(p, kept) for p, kept in zip(training.model.parameters(), before, strict=True))
    # no layer was gated before another was found wanting
    assert all(p.grad is grad for p, grad in zip(training.model.parameters(), grads, strict=True))


def _recovers(training: Training) -> None:
    """After zeroing, training goes on as if nothing had been."""
    training.zero()
    training.reference.follow(training.model)
    for seed in (5, 6):
        training.backward(3, 5, seed=seed)
        training.step_and_check()
        training.zero()


def test_gradient_without_sums() -> None:
    training = Training()
    training.model[6].weight.grad = torch.ones_like(training.model[6].weight)
    _refused_step(training, "weight.grad of '6' has no Hebbian sums")
    _recovers(training)


def test_gradient_of_a_pass_in_eval_mode() -> None:
    training = Training()
    training.model.eval()
    summed_loss(training.model, training.batches(3)[0]).backward()
    _refused_step(training, "no Hebbian sums")
    training.model.train()
    _recovers(training)


def test_gradient_partly_of_a_pass_in_eval_mode() -> None:
    training = Training()
    training.backward(3)
    training.model.eval()
    summed_loss(training.model, training.batches(3, seed=2)[0]).backward()
    _refused_step(training, "Hebbian sums")
    training.model.train()
    _recovers(training)


def _penalize(training: Training) -> None:
    sum(training.model[i].weight.square().sum() for i in (0, 3, 6)).backward()


def _set_by_hand(training: Training) -> None:
    training.model[3].weight.grad = torch.ones_like(training.model[3].weight)


@pytest.mark.parametrize("after", ["nothing", "a step"])
@pytest.mark.parametrize("plain", [lambda training: _in_eval_mode(training), _penalize, _set_by_hand])
def test_gradient_that_was_there_before_a_pass(plain: Callable[[Training], None], after: str) -> None:
    training = Training()
    if after == "a step":
        training.backward(3)
        training.optimizer.step()
        training.zero()
    plain(training)
    training.backward(5, 2)
    _refused_step(training, r"part of weight.grad of .* has no Hebbian sums")
    _recovers(training)


@pytest.mark.parametrize("how", ["another tensor", "in place"])
@pytest.mark.parametrize("after", ["a step", "a pass"])
def test_gradient_set_by_hand_after_one_was_asked_for(after: str, how: str) -> None:
    """autograd.grad is no pass, whose sums the gradient could have."""
    training = Training()
    training.backward(3)
    if after == "a step":
        training.optimizer.step()
    training.optimizer.zero_grad(set_to_none=False)
    weight = training.model[3].weight
    (G,) = torch.autograd.grad(summed_loss(training.model, training.batches(7, seed=9)[0]), weight)
    if how == "in place":
        weight.grad.copy_(G)
    else:
        weight.grad = G
    _refused_step(training, r"weight.grad of '3' has no Hebbian sums")
    _recovers(training)


@pytest.mark.parametrize("set_to_none", [True, False], ids=["to None", "in place"])
@pytest.mark.parametrize("then", ["nothing", "another pass", "clip and another pass"])
def test_rule_that_gets_a_gate_while_a_pass_is_pending(then: str, set_to_none: bool) -> None:
    """Without one it has left no G whose signs the step could take."""
    training = Training(rule=RULES["no gate"])
    training.backward(3)
    for name in training.reference.rules:
        training.model.get_submodule(name).set_rule(RULE)
        training.reference.rules[name] = RULE
    if then.startswith("clip"):
        _clip(training)
    if then != "nothing":
        training.backward(5, seed=2)
    _refused_step(training, "gate='none'" if "clip" not in then else "part of weight.grad")
    training.optimizer.zero_grad(set_to_none)
    training.reference.forget()
    for seed in (3, 4):
        training.backward(3, 5, seed=seed)
        training.step_and_check()
        training.optimizer.zero_grad(set_to_none)
        training.reference.forget()


def test_rule_that_loses_its_gate_while_a_pass_is_pending() -> None:
    """Its sums are those of any gate."""
    training = Training()
    training.backward(3)
    for name in training.reference.rules:
        training.model.get_submodule(name).set_rule(HebbianRule(temperature=0.5, gate="none"))
        training.reference.rules[name] = training.model.get_submodule(name).rule
    training.backward(5, seed=2)
    training.step_and_check()


@pytest.mark.parametrize("when", ["before a pass", "before the step"])
def test_decay_that_is_assigned_to_an_attached_layer(when: str) -> None:
    """set_rule would have refused it."""
    training = Training()
    if when == "before the step":
        training.backward(3)
    training.model[0].rule = HebbianRule.hpca()
    follows = training.optimizer.step if when == "before the step" else lambda: training.backward(3)
    with pytest.raises(RuntimeError, match=r"the decay of '0' was 'oja' .* and is 'sanger' now"):
        follows()


def test_rule_of_an_attached_layer() -> None:
    """What its StepGate sums for must stay; the mode is kept where none is given."""
    training = Training()
    layer = training.model[3]
    for change in (
        lambda: layer.set_rule(HebbianRule.ghl(), "backward"),
        lambda: layer.set_rule(HebbianRule(activity="linear", decay="sanger")),
    ):
        with pytest.raises(
            ValueError, match=r"gate_at and decay must stay 'step' and 'oja' .* remove\(\) first"
        ):
            change()
        assert layer.rule == RULE
    layer.set_rule(HebbianRule.kwta(2))
    assert (layer.rule, layer.gate_at) == (HebbianRule.kwta(2), "step")
    training.reference.rules["3"] = layer.rule
    training.backward(3, 5)
    training.step_and_check()
    training.gate.remove()
    layer.set_rule(RULE, "backward")
    assert layer.gate_at == "backward"


class OnAnotherDevice:
    """A number that can be used where it lies only."""

    def __init__(self, value: float) -> None:
        self.value = value

    def to(self, device: torch.device) -> Tensor:
        return torch.tensor(self.value, device=device)


class Unscaled(torch.optim.SGD):
    """Divides by the scale as fused optimizers do, on its parameters' device."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.data.add_(p.grad, alpha=-LR / self.grad_scale.value)


def test_grad_scale_on_another_device() -> None:
    """As in a model that is spread over devices."""
    torch.manual_seed(0)
    layer = ghl.GHLLinear(4, 6, bias=False, rule=RULE, gate_at="step").double()
    reference = ReferenceModel(nn.Sequential(layer))
    optimizer = Unscaled(layer.parameters(), lr=LR)
    ghl.StepGate(optimizer, layer)
    optimizer.grad_scale = OnAnotherDevice(8.0)
    before, x = layer.weight.detach().clone(), torch.randn(5, 4, dtype=torch.float64)
    layer(x).square().sum().backward()
    reference.model(x).square().sum().backward()
    optimizer.step()
    torch.testing.assert_close((before - layer.weight.detach()) / LR, reference.gated("0"))


def test_sums_on_several_devices_are_reduced_apart() -> None:
    layers = [ghl.GHLLinear(4, 6, gate_at="step", device=device) for device in ("cpu", "meta", "cpu")]
    processes = Processes(nn.ModuleList(layers), [layer.weight for layer in layers], None)
    local = [
        [torch.randn(6, 4).to(layer.weight.device), torch.ones(1).to(layer.weight.device)] for layer in layers
    ]
    reduced = processes._reduced(local)
    for mine, theirs in zip(local, reduced, strict=True):
        assert [t.device for t in theirs] == [t.device for t in mine]
        assert [t.shape for t in theirs] == [t.shape for t in mine]
    assert torch.equal(reduced[0][0], local[0][0])
    assert torch.equal(reduced[2][0], local[2][0])


def _clip(training: Training) -> None:
    nn.utils.clip_grad_norm_(training.model.parameters(), 1.0)


def _in_eval_mode(training: Training) -> None:
    training.model.eval()
    summed_loss(training.model, training.batches(3, seed=2)[0]).backward()
    training.model.train()


def _change_a_weight(training: Training) -> None:
    with torch.no_grad():
        training.model[3].weight.mul_(0.9)


@pytest.mark.parametrize("then", ["nothing", "another clip", "another pass"])
@pytest.mark.parametrize("wrong", [_in_eval_mode, _change_a_weight])
def test_clipping_does_not_hide_what_came_before_it(wrong: Callable[[Training], None], then: str) -> None:
    training = Training()
    training.backward(3)
    wrong(training)
    _clip(training)
    training.backward(5)
    if then != "nothing":
        _clip(training)
    if then == "another pass":
        training.backward(2)
    _refused_step(training, r"part of weight.grad of .* has no Hebbian sums, or those of an earlier")
    _recovers(training)


@pytest.mark.parametrize("way", [way for way in ZEROING if "data" not in way])
@pytest.mark.parametrize("wrong", [_in_eval_mode, _change_a_weight])
def test_zeroing_makes_up_for_what_came_before_it(wrong: Callable[[Training], None], way: str) -> None:
    training = Training()
    training.backward(3)
    wrong(training)
    ZEROING[way](training.model, training.optimizer)
    training.reference.forget()
    for name, buffer in training.reference.model.named_buffers():
        buffer.copy_(training.model.get_buffer(name))
    training.reference.follow(training.model)
    for seed in (1, 2):
        training.backward(3, 5, seed=seed)
        training.step_and_check()
        training.zero()


@pytest.mark.parametrize("after", ["a step", "a forward pass"])
def test_gradient_set_by_hand_after_zeroing(after: str) -> None:
    """The sums of the pass before are not its own."""
    training = Training()
    training.backward(3)
    if after == "a step":
        training.optimizer.step()
    training.optimizer.zero_grad()
    if after == "a forward pass":
        training.model(training.batches(2)[0][0])
    training.model[3].weight.grad = torch.ones_like(training.model[3].weight)
    _refused_step(training, "weight.grad of '3' has no Hebbian sums")
    _recovers(training)


@pytest.mark.parametrize("after", ["backward", "two passes"])
def test_weight_changed_before_the_step(after: str) -> None:
    training = Training()
    training.backward(*((3,) if after == "backward" else (3, 5)))
    with torch.no_grad():
        training.model[3].weight.mul_(0.9)
    _refused_step(training, "weight of '3' was changed")
    _recovers(training)


def test_weight_changed_between_accumulated_passes() -> None:
    training = Training()
    training.backward(3)
    with torch.no_grad():
        training.model[3].weight.mul_(0.9)
    summed_loss(training.model, training.batches(5, seed=2)[0]).backward()
    _refused_step(training, "weight of '3' was changed")
    _recovers(training)


class Failing(torch.optim.SGD):
    """Raises once in the middle of a step, when it has already scaled the gradients it was given."""

    fails = False

    def step(self, closure: Callable[[], Tensor] | None = None) -> Any:
        if self.fails:
            self.fails = False
            raise ArithmeticError("step failed")
        return super().step(closure)


@pytest.mark.parametrize("way", ["optimizer, to None", "optimizer, in place", "by hand, new zeros", "retry"])
def test_exception_in_the_step(way: str) -> None:
    training = Training()
    training.gate.remove()
    training.optimizer = Failing(training.model.parameters(), lr=LR)
    training.gate = ghl.StepGate(training.optimizer, training.model)
    training.backward(7, seed=9)
    training.optimizer.fails = True
    with pytest.raises(ArithmeticError):
        training.optimizer.step()
    if way != "retry":
        ZEROING[way](training.model, training.optimizer)
        training.reference.forget()
        training.backward(3, 5)
    training.step_and_check()


def test_exception_in_the_closure() -> None:
    training = Training()

    def closure() -> Tensor:
        training.backward(7, seed=9)
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        training.optimizer.step(closure)
    training.zero()
    training.backward(3, 5)
    training.step_and_check()


# --- costs --------------------------------------------------------------------------------------


class Calls(TorchDispatchMode):
    """Counts the operations that reach the dispatcher, in backward passes too."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket._qualified_op_name] += 1
        return func(*args, **(kwargs or {}))

    @property
    def sums(self) -> int:
        """How often A was computed."""
        return sum(
            n
            for name, n in self.counts.items()
            if name.startswith("ghl::") and name.endswith(("_sums", "_pair"))
        )


@pytest.mark.parametrize("gate_at", ["backward", "step"])
@pytest.mark.parametrize("sums_at", ["forward", "backward"])
@pytest.mark.parametrize("rule", [RULE, HebbianRule.kwta(1)], ids=["softmax", "kwta"])
def test_sums_are_computed_once_a_pass(rule: HebbianRule, sums_at: str, gate_at: str) -> None:
    torch.manual_seed(0)
    model = ghl.convert(small_network(inplace=False), rule, gate_at=gate_at, sums_at=sums_at)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    if gate_at == "step":
        ghl.StepGate(optimizer, model)
    with Calls() as calls:
        for batch in small_batches(2, 3, dtype=torch.float32):
            summed_loss(model, batch).backward()
        optimizer.step()
    assert calls.sums == 2 * 3
    with Calls() as calls, torch.no_grad():
        model(small_batches(2, dtype=torch.float32)[0][0])
        model.eval()(small_batches(2, dtype=torch.float32)[0][0])
    assert calls.sums == 0


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["saved tensors", "reentrant"])
@pytest.mark.parametrize("sums_at", ["forward", "backward"])
def test_checkpointing_computes_sums_no_more_often_than_the_layer_runs(
    sums_at: str, use_reentrant: bool
) -> None:
    training = Training(Checkpointed(use_reentrant), dtype=torch.float32)
    if sums_at == "backward":
        training.model.features[1] = nn.ReLU()
    for layer in (training.model.features[0], training.model.shared[0]):
        layer.set_rule(RULE, "step", sums_at)
    with Calls() as calls:
        summed_loss(training.model, training.batches(4)[0]).backward()
    forwards = calls.counts["aten::convolution"] + 2 * 2
    uses = 3
    assert uses <= calls.sums <= forwards


@pytest.mark.parametrize("rule", ["softmax", "no gate"])
def test_gating_never_waits_for_the_device(rule: str) -> None:
    """No value is read back on the host, which on a GPU would stop the queue."""
    training = Training(rule=RULES[rule], dtype=torch.float32)
    with ghl.use_backend("eager"), Calls() as calls:
        for seed in (1, 2, 3):
            for batch in training.batches(3, 5, seed=seed):
                summed_loss(training.model, batch).backward()
                nn.utils.clip_grad_value_(training.model.parameters(), 1e3)
            training.optimizer.step()
            training.optimizer.zero_grad(set_to_none=seed == 2)
            training.optimizer.step()  # of no pass
            with torch.no_grad():
                training.model[3].weight.clamp_(-10, 10)
    assert (calls.counts["ghl::gate_all_"], calls.counts["ghl::gate_"]) == (5 if rule == "softmax" else 0, 0)
    assert calls.counts["aten::_local_scalar_dense"] == 0
    assert calls.counts["aten::is_nonzero"] == 0
