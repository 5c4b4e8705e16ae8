"""Ways to train a model: what a method does to a model before training, and what one step of it is.

Shared by the benchmarks on a CPU (bench/steps.py) and on a GPU (bench/gpu/steps.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

import ghl_kernels as ghl
from bench.baselines import softhebb, unfold
from bench.work import Work
from ghl_kernels.nn import GHLLayer


@dataclasses.dataclass(frozen=True)
class Method:
    """One way to train.

    Attributes:
        name: as tables show it.
        rule: of the layers that learn by one; None: backpropagation alone.
        prepare: from the torch model, and where its softmax sums are cheapest, to the model that is trained.
        gate_at: "step": the optimizer gets a StepGate.
        compiled: the model runs under torch.compile.
        finish: called between backward and the optimizer's step.
        local: a pass (model, x, lr) that learns with no backward; None: a training step.
        baseline: code of the baseline, None for this package.
        note: what a reader has to know.
        only: the networks that it can train; empty: all.
    """

    name: str
    rule: ghl.HebbianRule | None = None
    prepare: Callable[[nn.Module, str], nn.Module] = lambda model, sums_at: model
    gate_at: str = "backward"
    compiled: bool = False
    finish: Callable[[nn.Module], None] = lambda model: None
    local: Callable[[nn.Module, Tensor, float], object] | None = None
    baseline: str | None = None
    note: str | None = None
    only: tuple[str, ...] = ()

    @property
    def rule_name(self) -> str | None:
        """What methods that compute the same have in common; None for backpropagation."""
        if self.rule is None:
            return None
        winners = self.rule.winners
        return f"winners={winners:g}" if winners else "softhebb" if self.rule.losers == "anti" else "softmax"

    def trains(self, network: str) -> bool:
        """Whether the network is among those it can train."""
        return not self.only or network in self.only


def by_rule(
    name: str,
    rule: ghl.HebbianRule,
    *,
    gate_at: str = "backward",
    sums_at: str | None = None,
    compiled: bool = False,
    only: tuple[str, ...] = (),
) -> Method:
    """A training step of the model that ``ghl.convert`` makes; ``sums_at`` None: where it is cheapest."""

    def prepare(model: nn.Module, cheapest: str) -> nn.Module:
        return ghl.convert(model, rule, gate_at=gate_at, sums_at=sums_at or cheapest)

    return Method(name, rule, prepare, gate_at=gate_at, compiled=compiled, only=only)


def by_learning(name: str, rule: ghl.HebbianRule) -> Method:
    """A pass in which every layer of the converted model calls ``learn_``."""
    return Method(name, rule, lambda model, sums_at: ghl.convert(model, rule), local=learn)


AUTHORS = Method(
    "authors' algorithm (unfold)",
    ghl.HebbianRule.ghl(),
    lambda model, sums_at: unfold.convert(model),
    finish=unfold.gate_,
    baseline="B1",
    note="linear layers by backprop",
)
SOFTHEBB = Method(
    "SoftHebb as shipped",
    ghl.HebbianRule.softhebb(),
    lambda model, sums_at: softhebb.convert(model, as_shipped=True),
    local=softhebb.local_pass,
    baseline="B6",
    note="linear layers do not learn",
)


@torch.no_grad()
def learn(model: nn.Module, x: Tensor, lr: float) -> Tensor:
    """The model's output while each of its GHL layers learns from its own input as the batch goes by."""
    with _learning(model, lr):
        return model(x)


@contextlib.contextmanager
def _learning(model: nn.Module, lr: float) -> Iterator[None]:
    layers = [module for module in model.modules() if isinstance(module, GHLLayer)]
    for layer in layers:
        layer.forward = functools.partial(layer.learn_, lr=lr)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # the class's own shows again


def training_step(
    method: Method,
    model: nn.Module,
    x: Tensor,
    target: Tensor,
    optimizer: Optimizer,
    compiler: str = "inductor",
) -> Callable[[], None]:
    """One step of a prepared model: forward, cross-entropy, backward, ``method.finish``, optimizer.

    Gradients are dropped at the end and not at the beginning, so that between two steps there are none.
    """
    forward = torch.compile(model, backend=compiler, dynamic=False) if method.compiled else model
    if method.gate_at == "step":
        ghl.StepGate(optimizer, model)  # its hooks in the optimizer keep it alive

    def step() -> None:
        F.cross_entropy(forward(x).float(), target).backward()
        method.finish(model)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


@dataclasses.dataclass(frozen=True)
class Pass:
    """One layer's share in a step.

    ``operations`` of one dense pass, 2 P N D; ``bytes`` of x, u and the weight, which every pass reads or
    writes once (dL/du is of u's size, dL/dx of x's, G and A are of the weight's); its units N.
    """

    operations: float
    bytes: float
    units: int
    first: bool  # it needs no gradient of its input


@torch.no_grad()
def dense_passes(model: nn.Module, x: Tensor) -> dict[str, Pass]:
    """The convolutions and linear layers by qualified name, in the order in which they run."""
    found: dict[str, Pass] = {}

    def count(name: str, layer: nn.Module, x: Tensor, u: Tensor) -> None:
        # at every position each unit is a product with one row of the weight
        products = u.numel() * layer.weight[0].numel()
        moved = sum(tensor.numel() * tensor.element_size() for tensor in (x, u, layer.weight))
        found[name] = Pass(2.0 * products, moved, layer.weight.shape[0], first=not found)

    hooks = [
        layer.register_forward_hook(lambda layer, args, u, name=name: count(name, layer, *args, u))
        for name, layer in model.named_modules()
        if isinstance(layer, (nn.Conv2d, nn.Linear))
    ]
    try:
        model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def learning_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of a prepared model that learn by a rule: no longer exactly torch's."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear)) and type(module) not in (nn.Conv2d, nn.Linear)
    }


def needs(method: Method, passes: dict[str, Pass], learning: set[str]) -> Work:
    """Multiplications and additions that a step cannot do without, and bytes that it cannot but move.

    Forward, and unless the method is local weight gradient and input gradient (not of the first layer); for a
    layer that learns by a rule also A, of which k winners need k / N of the products. What lies between the
    layers, and the optimizer's pass over the weights, are not counted.
    """
    moved = total = 0.0
    for name, layer in passes.items():
        count = 1.0 if method.local else 2.0 if layer.first else 3.0
        moved += (count + (name in learning)) * layer.bytes
        if name in learning:
            count += (method.rule.winners_of(layer.units) or layer.units) / layer.units
        total += count * layer.operations
    return Work(moved, total)
