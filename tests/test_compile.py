"""torch.compile: no graph break, no more graphs than the torch model, and the results of eager mode."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from reference_model import small_batches, small_network, summed_loss
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.testing import CompileCounterWithBackend

import ghl_kernels as ghl
from ghl_kernels import HebbianRule

RULES = {
    "softmax": HebbianRule.ghl(),
    "kwta, dense": HebbianRule.kwta(0.5),
    "kwta, sparse": HebbianRule.kwta(1),
    "sanger": HebbianRule.hpca(),
    "instar, no gate": HebbianRule.instar(),
}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Nothing compiled before, and one thread, as tensors this small gain nothing from more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    torch.set_num_threads(threads)


def _model(rule: HebbianRule, gate_at: str, sums_at: str = "forward") -> nn.Sequential:
    torch.manual_seed(0)
    return ghl.convert(small_network(inplace=sums_at == "forward"), rule, gate_at=gate_at, sums_at=sums_at)


def _steps(
    model: nn.Module, run: nn.Module, gate_at: str, sizes: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> list[list[Tensor]]:
    """The loss and the parameters after one step for every batch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    gate = ghl.StepGate(optimizer, model) if gate_at == "step" else None
    results = []
    for batch in small_batches(*sizes, dtype=dtype):
        optimizer.zero_grad()
        loss = summed_loss(run, batch)
        loss.backward()
        optimizer.step()
        results.append([loss.detach().clone(), *(p.detach().clone() for p in model.parameters())])
    if gate is not None:
        gate.remove()
    return results


def _compare(
    rule: HebbianRule,
    gate_at: str,
    sums_at: str,
    backend: object,
    *,
    dynamic: bool | None,
    sizes: tuple[int, ...],
) -> None:
    model = _model(rule, gate_at, sums_at).double()
    twin = copy.deepcopy(model)
    eager = _steps(twin, twin, gate_at, sizes, torch.float64)
    compiled_model = torch.compile(model, fullgraph=True, dynamic=dynamic, backend=backend)
    compiled = _steps(model, compiled_model, gate_at, sizes, torch.float64)
    for got, want in zip(compiled, eager, strict=True):
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    ("rule", "sums_at"),
    [*((rule, "forward") for rule in RULES), ("softmax", "backward"), ("kwta, sparse", "backward")],
)
@pytest.mark.parametrize("gate_at", ["backward", "step"])
def test_full_graph_equals_eager(rule: str, gate_at: str, sums_at: str) -> None:
    _compare(RULES[rule], gate_at, sums_at, "aot_eager", dynamic=None, sizes=(4, 4))


@pytest.mark.broad
@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("gate_at", ["backward", "step"])
@pytest.mark.parametrize("rule", ["softmax", "kwta, sparse"])
def test_float32_on_every_backend(rule: str, gate_at: str) -> None:
    model = _model(RULES[rule], gate_at)
    twin = copy.deepcopy(model)
    (eager,) = _steps(twin, twin, gate_at, (5,))
    compiled_model = torch.compile(model, fullgraph=True, backend="aot_eager")
    (compiled,) = _steps(model, compiled_model, gate_at, (5,))
    for a, b in zip(compiled, eager, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("in_autocast", [False, True])
def test_a_first_layer_of_few_winners_on_every_backend(in_autocast: bool) -> None:
    """In 16 bits, where CUDA's backend keeps the winners and sums A and G together."""
    torch.manual_seed(0)
    last = {"memory_format": torch.channels_last}
    layer = ghl.GHLConv2d(3, 40, 3, padding=1, rule=HebbianRule.kwta(1)).to(**last)
    x, e = (torch.randn(2, channels, 5, 4).contiguous(**last) for channels in (3, 40))
    if not in_autocast:
        layer, x = layer.bfloat16(), x.bfloat16()
    gradients = []
    for forward in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=in_autocast):
            u = forward(x)
        assert u.dtype == torch.bfloat16
        u.backward(e.bfloat16())
        gradients.append(layer.weight.grad)
    assert torch.equal(*gradients)
    assert gradients[0].abs().max() > 0


@pytest.mark.parametrize("gate_at", ["backward", "step"])
@pytest.mark.parametrize("rule", ["softmax", "kwta, sparse"])
def test_one_dynamic_graph_takes_all_batch_sizes(rule: str, gate_at: str) -> None:
    counter = CompileCounterWithBackend("eager")  # "aot_eager" counts the first graph twice
    _compare(RULES[rule], gate_at, "forward", counter, dynamic=True, sizes=(4, 7, 3))
    assert counter.frame_count == 1


@pytest.mark.parametrize(("rule", "gate_at"), [("softmax", "backward"), ("kwta, sparse", "step")])
def test_changing_batch_sizes_need_no_more_graphs_than_the_torch_model(rule: str, gate_at: str) -> None:
    """One of the sizes equals a dimension of a weight, with which it must not be confused."""
    sizes = (4, 7, 3)
    counters = []

    def counting() -> CompileCounterWithBackend:
        torch._dynamo.reset()
        counters.append(CompileCounterWithBackend("aot_eager"))
        return counters[-1]

    _compare(RULES[rule], gate_at, "forward", counting(), dynamic=None, sizes=sizes)
    model = small_network().double()
    run = torch.compile(model, fullgraph=True, backend=counting())
    _steps(model, run, "none", sizes, torch.float64)
    ours, theirs = (counter.frame_count for counter in counters)
    assert ours <= theirs


def test_step_mode_accumulates_in_compiled_passes() -> None:
    """By one graph for the passes that find a gradient and those that do not."""
    model = _model(RULES["softmax"], "step").double()
    twin = copy.deepcopy(model)
    weights = []
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for network, run in ((model, compiled), (twin, twin)):
        optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
        ghl.StepGate(optimizer, network)
        for seed in (1, 2):
            for batch in small_batches(4, 7, seed=seed):
                summed_loss(run, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
        weights.append(list(network.parameters()))
    for a, b in zip(*weights, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    assert counter.frame_count == 1


def _vjp(function: Any) -> Any:
    return lambda z: torch.func.vjp(function, z)[1](torch.ones((), dtype=torch.float64))[0]


@pytest.mark.parametrize("of", ["weights", "input"])
@pytest.mark.parametrize("transform", [torch.func.grad, _vjp])
@pytest.mark.parametrize("fullgraph", [False, True])
def test_compiled_function_transforms_lose_no_rule(fullgraph: bool, transform: Any, of: str) -> None:
    """A compiler inlines autograd functions in them: the whole graph is refused, a broken one is right."""
    torch.manual_seed(0)
    layer, x = ghl.GHLLinear(4, 6, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)

    def of_input(z: Tensor) -> Tensor:
        return layer(z).square().sum()

    def of_weights(z: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(layer, z, (x,)).square().sum()

    weights = {name: p.detach() for name, p in layer.named_parameters()}
    function, z = (of_input, x) if of == "input" else (of_weights, weights)
    run = torch.compile(lambda z: transform(function)(z), backend="eager", fullgraph=fullgraph)
    if fullgraph:
        with pytest.raises(Exception, match=r"torch.func.grad|Observed exception"):
            run(z)
    else:
        # earlier compilers may fail on autograd functions there, and are not to be wrong
        errors = (TorchDynamoException, AssertionError) if torch.__version__ < "2.13" else ()
        found = None
        with contextlib.suppress(*errors):
            found = run(z)
        if found is not None:
            torch.testing.assert_close(found, transform(function)(z))
    torch._dynamo.reset()
    layer.weight.requires_grad_(False)  # a frozen layer is its torch layer
    if of == "input":
        torch.testing.assert_close(run(x), transform(of_input)(x))


@pytest.mark.skipif(torch.__version__ < "2.13", reason="the operator fails on torch's own layers there")
def test_a_backward_pass_in_a_compiled_function() -> None:
    """Operations outside of a graph: traced, a kernel's memory was freed before it was written to."""
    layer = ghl.GHLLinear(64, 96)

    def gradient(x: Tensor) -> Tensor | None:
        layer.weight.grad = None
        layer(x).square().sum().backward()
        return layer.weight.grad

    run = torch.compile(gradient, backend="eager")
    for x in torch.randn(3, 32, 64):
        torch.testing.assert_close(run(x), gradient(x))


def test_step_mode_in_a_region_that_is_compiled_once() -> None:
    """Its operator refuses operands that share memory."""
    torch.manual_seed(0)
    layers = [ghl.GHLLinear(4, 4, gate_at="step", dtype=torch.float64)]
    layers.append(copy.deepcopy(layers[0]))
    x = torch.randn(3, 4, dtype=torch.float64)
    for layer, compiles in zip(layers, (True, False), strict=True):
        optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
        ghl.StepGate(optimizer, layer)
        once = torch.compiler.nested_compile_region(lambda z, layer=layer: layer(z)) if compiles else layer
        twice = lambda z, once=once: once(once(z))  # noqa: E731
        run = torch.compile(twice, backend="eager", fullgraph=True) if compiles else twice
        run(x).square().sum().backward()
        optimizer.step()
    torch.testing.assert_close(layers[0].weight, layers[1].weight)


def test_learning_with_a_rate_that_changes() -> None:
    torch.manual_seed(0)
    layers = [ghl.GHLLinear(4, 6, dtype=torch.float64)]
    layers.append(copy.deepcopy(layers[0]))
    x = torch.randn(3, 4, dtype=torch.float64)
    for layer, compiles in zip(layers, (True, False), strict=True):
        learn = lambda lr, layer=layer: layer.learn_(x, lr)  # noqa: E731
        run = torch.compile(learn, backend="eager", fullgraph=True) if compiles else learn
        for lr in (0.1, 0.05, 0.02):
            run(lr)
    torch.testing.assert_close(layers[0].weight, layers[1].weight)


@pytest.mark.parametrize("compiled", [False, True])
@torch._dynamo.config.patch(compiled_autograd=True)
def test_compiled_autograd_is_refused(compiled: bool) -> None:
    """It would add the sums of a gradient that was zeroed, and follow kernels to addresses."""
    layer = ghl.GHLLinear(4, 3)
    run = torch.compile(layer, backend="eager") if compiled else layer
    with pytest.raises(RuntimeError, match="do not train under compiled autograd"):
        run(torch.randn(2, 4))
    with torch.no_grad():
        assert run(torch.randn(2, 4)).shape == (2, 3)


def test_compiled_model_switches_between_training_and_evaluation() -> None:
    model = _model(RULES["kwta, sparse"], "backward")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    (batch,) = small_batches(4, dtype=torch.float32)
    summed_loss(compiled, batch).backward()
    trained = model[0].weight.grad.clone()
    with torch.no_grad():
        torch.testing.assert_close(compiled.eval()(batch[0]), model(batch[0]))
    model.zero_grad()
    model.train()
    summed_loss(compiled, batch).backward()
    torch.testing.assert_close(model[0].weight.grad, trained)


class _Shortcut(nn.Module):
    """The branches of a ResNet's block that halves the image."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.main = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16))
        self.skip = nn.Sequential(nn.Conv2d(8, 16, 1, 2, bias=False), nn.BatchNorm2d(16))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return torch.relu(self.main(x) + self.skip(x))


@pytest.mark.slow
def test_a_gradient_whose_strides_the_compiler_chose() -> None:
    """That of a shortcut's 1 x 1 convolution, which is then changed in place."""
    torch.manual_seed(0)
    model = ghl.convert(_Shortcut(), sums_at="backward")
    x = torch.randn(2, 3, 32, 32)
    gradients = []
    for run in (model, torch.compile(model, fullgraph=True)):
        model.zero_grad()
        run(x).square().sum().backward()
        gradients.append([layer[0].weight.grad.abs() for layer in (model.stem, model.main, model.skip)])
    for compiled, eager in zip(*reversed(gradients), strict=True):
        torch.testing.assert_close(compiled, eager, rtol=0, atol=1e-4)  # of a largest entry of 1


@pytest.mark.slow
@pytest.mark.parametrize("gate_at", ["backward", "step"])
def test_inductor(gate_at: str) -> None:
    _compare(RULES["softmax"], gate_at, "forward", "inductor", dynamic=None, sizes=(4,))
