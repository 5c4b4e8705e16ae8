"""GHLSGD: a step is torch.optim.SGD's under StepGate; to the bit by torch's operators, fused to rounding."""

from __future__ import annotations

import copy
import pickle
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from reference_model import small_batches, small_network, summed_loss
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import ghl_kernels as ghl
from ghl_kernels import HebbianRule, _native
from ghl_kernels.backends import eager

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 10
RULES = {
    "softmax": HebbianRule.ghl(temperature=0.5),
    "kwta": HebbianRule.kwta(2),
    "filter": HebbianRule(normalize="filter"),
    "instar": HebbianRule(decay="instar", normalize="mean"),
    "sanger": HebbianRule(activity="linear", decay="sanger"),
    "no gate": HebbianRule.softhebb(),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "weight decay": {"weight_decay": 0.1},
    "momentum": {"momentum": 0.9},
    "dampening": {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1},
    "nesterov": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    "maximize": {"momentum": 0.9, "weight_decay": 0.1, "maximize": True},
}


@pytest.fixture(params=["eager", "cpu", "fused"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The step by torch's operators, on the CPU's kernels, and fused: by CUDA's kernels, run on the host."""
    name = request.param
    try:
        if name == "cpu":
            _native.load_cpu()
        if name == "fused" and not _native.load_cuda().build_info()["on_host"]:
            pytest.skip("the CUDA module is built for GPUs, not for the host")
    except _native.NativeNotBuilt as reason:
        pytest.skip(str(reason))
    if name == "fused":
        from ghl_kernels.backends.cuda.kernels import epilogue

        monkeypatch.setattr(eager, "fused_sgd_", epilogue.fused_sgd_, raising=False)
    with ghl.use_backend("cpu" if name == "cpu" else "eager"):
        yield name


def network(rule: HebbianRule = RULES["softmax"], dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return ghl.convert(small_network().to(dtype), rule, gate_at="step")


class Both:
    """One model trained by GHLSGD, its twin by torch.optim.SGD under a StepGate."""

    def __init__(self, model: nn.Module | None = None, **options: Any) -> None:
        self.model = network() if model is None else model
        self.twin = copy.deepcopy(self.model)
        self.optimizer = ghl.GHLSGD(self.model, lr=0.1, **options)
        self.twin_optimizer = torch.optim.SGD(self.twin.parameters(), lr=0.1, **options)
        ghl.StepGate(self.twin_optimizer, self.twin)
        self.dtype = next(self.model.parameters()).dtype

    def backward(self, *sizes: int, seed: int = 1) -> None:
        for batch in small_batches(*sizes, dtype=self.dtype, seed=seed):
            for model in (self.model, self.twin):
                summed_loss(model, batch).backward()

    def step(self) -> None:
        self.optimizer.step()
        self.twin_optimizer.step()

    def zero(self) -> None:
        self.optimizer.zero_grad()
        self.twin_optimizer.zero_grad()

    def synchronize(self) -> None:
        """The twin takes over everything, the momentum through a state dict."""
        self.twin.load_state_dict(self.model.state_dict())
        self.twin_optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))

    def tensors(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        """Parameters and momenta."""
        named = dict(model.named_parameters())
        momenta = {f"{name}'": optimizer.state[p].get("momentum_buffer") for name, p in named.items()}
        return named | {name: m for name, m in momenta.items() if m is not None}

    def assert_equal(self, rounding: float = 0.0) -> None:
        mine = self.tensors(self.model, self.optimizer)
        other = self.tensors(self.twin, self.twin_optimizer)
        assert mine.keys() == other.keys()
        for name, tensor in mine.items():
            torch.testing.assert_close(
                tensor, other[name], rtol=rounding, atol=rounding, msg=lambda text, n=name: f"{n}: {text}"
            )


def train(both: Both, way: str, rounding: float = 1e-6) -> None:
    """STEPS steps, equal bit for bit; the fused one to rounding, each from where the last one led.

    Without that, an element of G within rounding of 0 may get another sign, and then a full step.
    """
    for seed in range(STEPS):
        both.backward(3, 2, seed=seed)
        both.step()
        both.assert_equal(rounding if way == "fused" else 0.0)
        both.zero()
        if way == "fused":
            both.synchronize()


@pytest.mark.parametrize("name", OPTIONS)
def test_equals_step_gate_for_all_options(name: str, way: str) -> None:
    train(Both(**OPTIONS[name]), way)


@pytest.mark.parametrize("name", RULES)
def test_equals_step_gate_for_all_rules(name: str, way: str) -> None:
    train(Both(network(RULES[name]), **OPTIONS["nesterov"]), way)


def test_bfloat16(way: str) -> None:
    """torch rounds weights and momentum at every operation, the fused step once."""
    train(Both(network(dtype=torch.bfloat16), **OPTIONS["nesterov"]), way, 2**-6)


def test_float64() -> None:
    train(Both(network(dtype=torch.float64), **OPTIONS["dampening"]), "eager")


def test_channels_last(way: str) -> None:
    train(Both(network().to(memory_format=torch.channels_last), **OPTIONS["nesterov"]), way)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zeroing_and_accumulation(set_to_none: bool, way: str) -> None:
    """Passes, and whole steps, add up until the gradients are zeroed."""
    # without a gate, which would make a step of a rounding (see train)
    both = Both(network(RULES["no gate" if way == "fused" else "softmax"]), **OPTIONS["momentum"])
    for seed in range(4):
        both.backward(3, seed=seed)
        both.step()
        both.assert_equal(1e-6 if way == "fused" else 0.0)
        if seed % 2:
            both.optimizer.zero_grad(set_to_none)
            both.twin_optimizer.zero_grad(set_to_none)


@pytest.mark.parametrize("name", ["softmax", "filter", "no gate"])
def test_zeroing_in_place_forgets_sums_that_are_nan(name: str, way: str) -> None:
    layer = ghl.GHLLinear(4, 6, rule=RULES[name], gate_at="step")
    optimizer = ghl.GHLSGD(layer, lr=0.1)
    kept = copy.deepcopy(layer.state_dict())
    layer(torch.full((3, 4), torch.nan)).sum().backward()
    optimizer.zero_grad(set_to_none=False)
    optimizer.step()
    assert all(torch.equal(p, kept[key]) for key, p in layer.named_parameters())


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("name", ["softmax", "no gate"])
def test_step_after_zeroing_moves_nothing(name: str, set_to_none: bool, way: str) -> None:
    """Whether a step used the pass or not."""
    both = Both(network(RULES[name]))
    for seed in range(2):
        both.backward(3, seed=seed)
        if seed:
            both.step()
        both.optimizer.zero_grad(set_to_none)
        both.twin_optimizer.zero_grad(set_to_none)
        kept = copy.deepcopy(both.model.state_dict())
        both.step()
        assert all(torch.equal(p, kept[key]) for key, p in both.model.named_parameters())
        both.assert_equal(1e-6 if way == "fused" else 0.0)


def test_gradients_stay_plain(way: str) -> None:
    both = Both(**OPTIONS["momentum"])
    both.backward(3, 5)
    grads = {name: p.grad for name, p in both.model.named_parameters()}
    values = {name: grad.clone() for name, grad in grads.items()}
    both.optimizer.step()
    for name, p in both.model.named_parameters():
        assert p.grad is grads[name]
        assert torch.equal(p.grad, values[name])


def test_parameter_groups_and_a_scheduler(way: str) -> None:
    model = network()
    twin = copy.deepcopy(model)

    def groups(model: nn.Sequential) -> list[dict[str, Any]]:
        return [
            {"params": model[0].parameters(), "lr": 0.5},
            {"params": list(model[3].parameters()) + list(model[1].parameters()), "weight_decay": 0.1},
            {"params": [p for i in (6, 8) for p in model[i].parameters()], "momentum": 0.9},
        ]

    optimizer = ghl.GHLSGD(model, lr=0.1, params=groups(model))
    other = torch.optim.SGD(groups(twin), lr=0.1)
    ghl.StepGate(other, twin)
    schedulers = [torch.optim.lr_scheduler.StepLR(o, 1, 0.5) for o in (optimizer, other)]
    for seed in range(3):
        for batch in small_batches(3, dtype=torch.float32, seed=seed):
            for each in (model, twin):
                summed_loss(each, batch).backward()
        for step in (optimizer, other, *schedulers):
            step.step()
        for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            tolerance = 1e-6 if way == "fused" else 0.0
            torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)
        optimizer.zero_grad()
        other.zero_grad()
        twin.load_state_dict(model.state_dict())
    assert len(optimizer.state) == len(other.state) == 4


def test_closure(way: str) -> None:
    both = Both(**OPTIONS["momentum"])
    (batch,) = small_batches(5, dtype=torch.float32)

    def closure_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = summed_loss(model, batch)
            loss.backward()
            return loss

        return closure

    for _ in range(2):
        loss = both.optimizer.step(closure_of(both.model, both.optimizer))
        other = both.twin_optimizer.step(closure_of(both.twin, both.twin_optimizer))
        assert torch.equal(loss, other)
        both.assert_equal(1e-6 if way == "fused" else 0.0)
        both.synchronize()


def test_exception_in_the_closure_changes_nothing() -> None:
    both = Both()

    def closure() -> Tensor:
        both.backward(7, seed=9)
        raise ArithmeticError

    kept = copy.deepcopy(both.model.state_dict())
    with pytest.raises(ArithmeticError):
        both.optimizer.step(closure)
    assert all(torch.equal(p, kept[name]) for name, p in both.model.named_parameters())
    both.zero()
    train(both, "eager")


def test_state_dicts_are_those_of_torch(way: str) -> None:
    """There and back, and training goes on as if nothing had been."""
    both = Both(**OPTIONS["nesterov"])
    both.backward(3)
    both.step()
    both.zero()
    mine, theirs = both.optimizer.state_dict(), both.twin_optimizer.state_dict()
    assert mine["param_groups"] == theirs["param_groups"]
    assert mine["state"].keys() == theirs["state"].keys()
    model = copy.deepcopy(both.model)
    optimizer = ghl.GHLSGD(model, lr=1.0)
    optimizer.load_state_dict(copy.deepcopy(theirs))
    both.optimizer, both.model = optimizer, model
    both.synchronize()
    train(both, way)


def test_momentum_that_begins_later(way: str) -> None:
    """A layer that the first passes did not reach has no momentum when others have."""
    torch.manual_seed(0)
    model = nn.ModuleList([ghl.GHLLinear(4, 4, gate_at="step") for _ in range(2)])
    both = Both(model, **OPTIONS["dampening"])
    x = torch.randn(3, 4)
    for reached in (1, 2, 2):
        for each in (both.model, both.twin):
            for layer in each[:reached]:
                layer(x).square().sum().backward()
        kept = both.model[1].weight.detach().clone()
        both.step()
        assert torch.equal(kept, both.model[1].weight) == (reached == 1)
        both.assert_equal(1e-6 if way == "fused" else 0.0)
        both.zero()


def test_frozen_layer_is_left_alone(way: str) -> None:
    both = Both(**OPTIONS["momentum"])
    for model in (both.model, both.twin):
        model[3].weight.requires_grad_(False)
    kept = both.model[3].weight.clone()
    both.backward(3)
    both.step()
    both.assert_equal(1e-6 if way == "fused" else 0.0)
    assert torch.equal(both.model[3].weight, kept)


@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler(unscale: bool, way: str) -> None:
    """Right steps, a skipped one that changes nothing, and a right one after it."""
    both = Both(**OPTIONS["momentum"])
    pairs = [(both.model, both.optimizer), (both.twin, both.twin_optimizer)]
    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**12) for _ in pairs]
    for seed, is_poisoned in enumerate((False, True, False)):
        (batch,) = small_batches(3, dtype=torch.float32, seed=seed)
        kept = both.model[0].weight.detach().clone()
        for (model, optimizer), scaler in zip(pairs, scalers, strict=True):
            scaler.scale(summed_loss(model, batch)).backward()
            if is_poisoned:
                model[0].weight.grad[0, 0, 0, 0] = float("inf")
            if unscale:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
        assert torch.equal(kept, both.model[0].weight) == is_poisoned
        both.assert_equal(1e-6 if way == "fused" else 0.0)
        both.zero()
        both.synchronize()


def test_process_group(tmp_path: Any, way: str) -> None:
    """The sums go through an all-reduce, of one process here; tests of two are in test_distributed."""
    distributed = torch.distributed
    if not distributed.is_available():
        pytest.skip("torch was built without distributed")
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = network()
        both = Both(model)
        both.optimizer.remove()
        both.optimizer = ghl.GHLSGD(model, lr=0.1, process_group=distributed.group.WORLD)
        train(both, way)
    finally:
        distributed.destroy_process_group()


class Calls(TorchDispatchMode):
    """Counts the operations that reach the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.overloadpacket._qualified_op_name] += 1
        return func(*args, **(kwargs or {}))


def test_one_operation_a_group_and_no_wait_for_the_device() -> None:
    both = Both(**OPTIONS["momentum"])
    both.backward(3)
    with ghl.use_backend("eager"), Calls() as calls:
        both.optimizer.step()
    assert calls.counts["ghl::gated_sgd_"] == 1
    assert calls.counts["aten::_local_scalar_dense"] == 0


def test_hooks_of_the_user_run_once_a_step() -> None:
    """Also where torch has wrapped SGD's own step before."""
    both = Both()
    calls: list[str] = []
    both.optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    both.optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    both.backward(3)
    both.optimizer.step()
    assert calls == ["before", "after"]


# --- the operation ------------------------------------------------------------------------------


def operation(**changes: Any) -> dict[str, Any]:
    """Arguments of ghl::gated_sgd_ for two layers."""
    torch.manual_seed(0)
    shapes = ((3, 4), (5, 2, 2))

    def tensors() -> list[Tensor]:
        return [torch.randn(shape) for shape in shapes]

    arguments = {
        "weights": tensors(),
        "momentum_buffers": tensors(),
        "grads": tensors(),
        "A": tensors(),
        "moments": [torch.full((1,), 7.0) for _ in shapes],
        "begins": [False, True],
        "groups": [1, 1],
        "decays": ["oja", "none"],
        "normalizes": ["layer", "filter"],
        "gates": ["sign", "none"],
        "lr": 0.1,
        "momentum": 0.9,
        "dampening": 0.0,
        "weight_decay": 0.1,
        "nesterov": False,
        "maximize": False,
    }
    return arguments | changes


def first_changed(name: str, tensor: Tensor) -> dict[str, Any]:
    arguments = operation()
    return arguments | {name: [tensor, *arguments[name][1:]]}


def test_versions_are_bumped() -> None:
    arguments = operation()
    written = [*arguments["weights"], *arguments["momentum_buffers"]]
    before = [t._version for t in written]
    torch.ops.ghl.gated_sgd_(**arguments)
    assert all(t._version > version for t, version in zip(written, before, strict=True))


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (first_changed("grads", torch.randn(3, 5)), ValueError, "grad must have shape"),
        (first_changed("grads", torch.randn(3, 4).double()), TypeError, "one dtype"),
        (first_changed("momentum_buffers", torch.randn(4, 3)), ValueError, "momentum_buffer must have shape"),
        (first_changed("momentum_buffers", torch.randn(3, 4).half()), TypeError, "one dtype"),
        (first_changed("A", torch.randn(3, 4).double()), TypeError, "A and the moments must be"),
        (first_changed("weights", torch.randn(1, 4).expand(3, 4)), ValueError, "weight is written in place"),
        (operation(gates=["sign", "maybe"]), ValueError, "gate must be one of"),
        (operation(decays=["oja", "no"]), ValueError, "decay must be one of"),
        (operation(begins=[True]), ValueError, "argument"),
    ],
)
def test_operands_that_do_not_fit(arguments: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        torch.ops.ghl.gated_sgd_(**arguments)


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"lr": torch.tensor(0.1)}, "lr must be a number"),
        ({"weight_decay": torch.tensor(0.1)}, "weight_decay must be a number"),
        ({"lr": -1.0}, "learning rate"),
        ({"momentum": -0.1}, "momentum"),
        ({"nesterov": True}, "Nesterov"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], match: str) -> None:
    model = network()
    with pytest.raises(ValueError, match=match):
        ghl.GHLSGD(model, **{"lr": 0.1, **options})
    ghl.GHLSGD(model, lr=0.1)  # nothing was attached


@pytest.mark.parametrize("name", ["lr", "momentum", "dampening", "weight_decay"])
@pytest.mark.parametrize("value", ["0.1", None, [0.1], 1j])
def test_options_of_another_type(name: str, value: Any) -> None:
    model = network()
    message = re.escape(f"{name} must be a number, got {value!r}")
    with pytest.raises(TypeError, match=message):
        ghl.GHLSGD(model, **{name: value})
    with pytest.raises(TypeError, match=message):
        ghl.GHLSGD(model, params=[{"params": model.parameters(), name: value}])
    ghl.GHLSGD(model, lr=np.float32(0.1), momentum=1 // 2)  # nothing was attached


@pytest.mark.parametrize(("lr", "error"), [(torch.tensor(0.1), ValueError), ("0.1", TypeError)])
def test_learning_rate_that_becomes_something_else(lr: Any, error: type[Exception]) -> None:
    both = Both()
    both.backward(3)
    kept = both.model[0].weight.detach().clone()
    both.optimizer.param_groups[0]["lr"] = lr
    with pytest.raises(error, match="lr must be a number"):
        both.optimizer.step()
    assert torch.equal(kept, both.model[0].weight)


def test_wrong_model() -> None:
    with pytest.raises(TypeError, match=r"torch\.nn\.Module, got generator"):
        ghl.GHLSGD(network().parameters(), lr=0.1)


def test_model_without_layers_to_serve() -> None:
    with pytest.raises(ValueError, match="3 GHL layers with gate_at='backward'; pass gate_at='step'"):
        ghl.GHLSGD(ghl.convert(small_network()), lr=0.1)
    model = network()
    with pytest.raises(ValueError, match="no trainable weight of the model's 3 layers"):
        ghl.GHLSGD(model, lr=0.1, params=[model[1].weight])


def test_layers_are_gated_once() -> None:
    both = Both()
    for attach in (
        lambda: ghl.StepGate(both.optimizer, both.model),
        lambda: ghl.GHLSGD(both.model, lr=0.1),
    ):
        with pytest.raises(ValueError, match="attached to a GHLSGD already"):
            attach()
    train(both, "eager")


def test_removed() -> None:
    both = Both()
    both.backward(3)
    both.optimizer.remove()
    with pytest.raises(RuntimeError, match=r"remove\(\) was called"):
        both.optimizer.step()
    both.optimizer.remove()  # again: nothing left to do
    both.zero()
    both.optimizer = ghl.GHLSGD(both.model, lr=0.1)
    train(both, "eager")


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickle.dumps])
def test_copies(duplicate: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError, match="load the state_dict"):
        duplicate(Both().optimizer)


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="this torch has no grad_dtype")
def test_gradients_of_another_dtype_are_refused_before_any_step() -> None:
    layer = ghl.GHLLinear(5, 6, gate_at="step", dtype=torch.bfloat16)
    for p in layer.parameters():
        p.grad_dtype = torch.float32
    optimizer = ghl.GHLSGD(layer, lr=0.1)
    layer(torch.randn(7, 5, dtype=torch.bfloat16)).square().sum().backward()
    kept = copy.deepcopy(layer.state_dict())
    with pytest.raises(TypeError, match=r"which is torch.bfloat16 for .*, got torch.float32; use"):
        optimizer.step()
    assert all(torch.equal(p, kept[name]) for name, p in layer.named_parameters())


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda layer: setattr(layer.weight, "grad", torch.ones_like(layer.weight)), "no Hebbian sums"),
        (lambda layer: layer.weight.detach().mul_(0.9), "was changed"),
    ],
    ids=["gradient of unknown origin", "weight changed"],
)
def test_nothing_is_stepped_where_a_layer_cannot_be(spoil: Callable[[Any], Any], match: str) -> None:
    model = network()
    optimizer = ghl.GHLSGD(model, lr=0.1)
    if "changed" in match:
        summed_loss(model, small_batches(3, dtype=torch.float32)[0]).backward()
    kept = copy.deepcopy(model.state_dict())
    spoil(model[6])
    kept["6.weight"] = model[6].weight.detach().clone()
    with pytest.raises(RuntimeError, match=match):
        optimizer.step()
    assert all(torch.equal(p, kept[name]) for name, p in model.named_parameters())
