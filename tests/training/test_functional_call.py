"""Parameters from outside the module: functional_call, torch.func, load_state_dict, replicas, exports."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import pytest
import torch
from beside_reference import RULE, BesideReference, sgd
from reference_model import ReferenceModel, assert_gradients_close, small_batches, small_network
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import ghl_kernels as ghl
from ghl_kernels.nn import GHLLayer


def _without_norm(gate_at: str) -> nn.Module:
    """Batch norm counts its batches in place, which torch.func allows for no captured buffer."""
    torch.manual_seed(0)
    layers = [m for m in small_network(inplace=False).double() if not isinstance(m, nn.BatchNorm2d)]
    return ghl.convert(nn.Sequential(*layers), RULE, gate_at=gate_at)


def _loss(parameters: dict[str, Tensor], model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, target = batch
    return F.cross_entropy(functional_call(model, parameters, (x,)), target, reduction="sum")


def _others(model: nn.Module) -> dict[str, Tensor]:
    """Parameters that are not the module's own, of other values."""
    return {name: (1.1 * p).detach().requires_grad_() for name, p in model.named_parameters()}


@pytest.mark.parametrize("way", ["backward", "torch.func.grad"])
def test_functional_call_in_backward_mode(way: str) -> None:
    """The rule for the parameters that were given, on them and nowhere else."""
    model = _without_norm("backward")
    parameters = _others(model)
    reference = ReferenceModel(model)
    with torch.no_grad():
        for name, p in reference.model.named_parameters():
            p.copy_(parameters[name])
    (batch,) = small_batches(6)
    if way == "backward":
        _loss(parameters, model, batch).backward()
        grads: dict[str, Any] = {name: p.grad for name, p in parameters.items()}
    else:
        grads = torch.func.grad(_loss)({name: p.detach() for name, p in parameters.items()}, model, batch)
    reference.backward(batch)
    assert_gradients_close(grads, reference, torch.float64)
    assert all(p.grad is None for p in model.parameters())


def test_functional_call_with_the_registered_parameters_in_step_mode() -> None:
    run = BesideReference("step")
    for seed in range(2):
        for batch in run.batches(seed):
            _loss(dict(run.model.named_parameters()), run.model, batch).backward()
            run.reference.backward(batch)
        run.step()
        run.optimizer.zero_grad()
    run.assert_equal()


@pytest.mark.parametrize("way", ["backward", "torch.func.grad"])
def test_functional_call_with_other_parameters_is_refused_in_step_mode(way: str) -> None:
    """Their gradients would be plain, and no optimizer's step would make them anything else."""
    model = _without_norm("step")
    ghl.StepGate(sgd(model.parameters()), model)
    (batch,) = small_batches(3)
    call = _loss if way == "backward" else torch.func.grad(_loss)
    with pytest.raises(RuntimeError, match="is not the parameter that its StepGate is attached to"):
        call(_others(model), model, batch)
    model.eval()
    assert _loss(_others(model), model, batch).isfinite()


def _ensemble(model: nn.Module, x: Tensor) -> Tensor:
    """Three models whose parameters are stacked."""
    stacked = {n: torch.stack([p.detach()] * 3).requires_grad_() for n, p in model.named_parameters()}
    return torch.func.vmap(lambda p: functional_call(model, p, (x,)))(stacked)


def _per_sample(model: nn.Module, x: Tensor) -> Any:
    """One gradient for every item of the batch."""
    own = {name: p.detach() for name, p in model.named_parameters()}
    grad = torch.func.grad(lambda p, item: functional_call(model, p, (item[None],)).sum())
    return torch.func.vmap(grad, in_dims=(None, 0))(own, x)


def _per_member(model: nn.Module, x: Tensor) -> Any:
    """One gradient for every member of an ensemble."""
    stacked = {n: torch.stack([p.detach()] * 3) for n, p in model.named_parameters()}
    return torch.func.vmap(torch.func.grad(lambda p: functional_call(model, p, (x,)).sum()))(stacked)


def _mapped(model: nn.Module, x: Tensor) -> Tensor:
    """The model itself, over the batch."""
    return torch.func.vmap(lambda item: model(item[None]))(x)


@pytest.mark.parametrize("use", [_ensemble, _per_sample, _per_member, _mapped])
@pytest.mark.parametrize("gate_at", ["backward", "step"])
def test_vmap_is_refused_in_training(gate_at: str, use: Any) -> None:
    """It would train by plain gradients, without a word."""
    model = _without_norm(gate_at)
    if gate_at == "step":
        ghl.StepGate(sgd(model.parameters()), model)
    x = small_batches(3)[0][0]
    with pytest.raises(RuntimeError, match=r"torch\.func\.vmap cannot train GHL layers"):
        use(model, x)
    use(model.eval(), x)
    if use in (_ensemble, _mapped):  # torch.func.grad turns it on again
        with torch.no_grad():
            use(model.train(), x)


@pytest.mark.parametrize("gate_at", ["backward", "step"])
def test_vmap_is_refused_under_compile(gate_at: str) -> None:
    torch._dynamo.reset()
    model = _without_norm(gate_at)
    if gate_at == "step":
        ghl.StepGate(sgd(model.parameters()), model)
    with pytest.raises(Exception, match=r"torch\.func\.vmap cannot train GHL layers"):
        torch.compile(_ensemble, backend="aot_eager")(model, small_batches(3)[0][0])
    torch._dynamo.reset()


def test_vmap_over_the_input_of_a_frozen_layer() -> None:
    """It is its torch layer."""
    model = _without_norm("backward").requires_grad_(False)
    x = small_batches(3)[0][0]
    torch.testing.assert_close(_mapped(model, x).squeeze(1), model(x))


def test_parameters_that_load_state_dict_replaced() -> None:
    """assign=True makes other parameters, which the optimizer does not hold and the gate does not see."""
    run = BesideReference("step")
    run.model.load_state_dict(copy.deepcopy(run.model.state_dict()), assign=True)
    with pytest.raises(RuntimeError, match="needs a new optimizer and StepGate"):
        run.backward(0)
    assert run.gate is not None
    run.gate.remove()
    run.reference.forget()
    run.optimizer = sgd(run.model.parameters())
    run.gate = ghl.StepGate(run.optimizer, run.model)
    run.train()


@pytest.mark.parametrize("kind", ["StepGate", "GHLSGD"])
def test_parameters_that_load_state_dict_replaced_after_backward(kind: str) -> None:
    """The step would be that of the old parameters, which the model no longer has."""
    model = _without_norm("step")
    if kind == "GHLSGD":
        optimizer: torch.optim.Optimizer = ghl.GHLSGD(model, lr=0.1)
    else:
        optimizer = sgd(model.parameters())
        ghl.StepGate(optimizer, model)
    model(small_batches(3)[0][0]).sum().backward()
    old = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    with pytest.raises(RuntimeError, match=r"'0' was replaced .* make a new optimizer and StepGate"):
        optimizer.step()
    assert all(torch.equal(p, o) for p, o in zip(optimizer.param_groups[0]["params"], old, strict=True))


def _replicate(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """As DataParallel does on two GPUs, but for the device that the copies lie on."""
    module = importlib.import_module("torch.nn.parallel.replicate")
    monkeypatch.setattr(
        module,
        "_broadcast_coalesced_reshape",
        lambda tensors, devices, detach=False: [[t.clone() for t in tensors] for _ in devices],
    )
    return module.replicate(model, [0, 1])


@pytest.mark.parametrize("gate_at", ["backward", "step"])
def test_data_parallel_is_refused_in_training(gate_at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = BesideReference(gate_at).model
    with pytest.raises(RuntimeError, match="DataParallel cannot train GHL layers"):
        _replicate(model, monkeypatch)
    x = small_batches(3)[0][0]
    want = model.eval()(x)
    for replica in _replicate(model, monkeypatch):
        assert torch.equal(replica(x), want)
    with torch.no_grad():
        assert len(_replicate(model.train(), monkeypatch)) == 2
    for layer in model.modules():
        if isinstance(layer, GHLLayer):
            layer.weight.requires_grad_(False)
    assert len(_replicate(model, monkeypatch)) == 2


@pytest.mark.parametrize("strict", [False, True])
def test_export_in_training_is_refused(strict: bool) -> None:
    """The program would train what is above the layer, and neither it nor what is below."""
    layer = ghl.GHLLinear(4, 3)
    with pytest.raises(Exception, match=r"would leave a program that does not train it|Observed exception"):
        torch.export.export(layer, (torch.randn(2, 4),), strict=strict)
    torch.export.export(layer.eval(), (torch.randn(2, 4),), strict=strict)


@pytest.mark.parametrize("gate_at", ["backward", "step"])
def test_export_in_eval_mode(gate_at: str) -> None:
    """The graph is the torch model's: no operator of ours, the same numbers, batches of any size."""
    model = BesideReference(gate_at).model.float().eval()
    plain = ghl.revert(copy.deepcopy(model))
    (x, _), (larger, _) = small_batches(3, 7, dtype=torch.float32)
    sizes = {"input": {0: torch.export.Dim("batch")}}
    exported, expected = (torch.export.export(m, (x,), dynamic_shapes=sizes) for m in (model, plain))
    targets, wanted = (
        [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
        for program in (exported, expected)
    )
    assert targets == wanted
    assert torch.equal(exported.module()(larger), plain(larger))
