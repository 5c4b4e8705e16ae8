"""What is timed is first compared with the float64 reference, at the size that is timed."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ghl_kernels as ghl

# H is scaled to a largest entry of 1; float32 sums over 32,768 positions leave about 1e-5 of it.
TOLERANCE = 1e-4
# G has gone through every layer, forward and back, and each adds its rounding.
_GRADIENT_TOLERANCE = 1e-3


class ParityError(AssertionError):
    """A candidate computes something else than the rule it stands for; its speed means nothing."""


def assert_close(
    name: str,
    actual: Tensor,
    expected: Tensor,
    tolerance: float = TOLERANCE,
    *,
    rounding: Tensor | float = 0.0,
) -> None:
    """Raise ParityError unless the largest difference is within tolerance of the largest expected entry.

    Args:
        rounding: what each entry may be off besides.
    """
    if actual.shape != expected.shape:
        raise ParityError(f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}")
    scale = expected.abs().max().clamp_min(1e-30)
    errors = (actual.double() - expected.double()).abs() - rounding
    error = (errors.max() / scale).item()
    if not error <= tolerance:  # NaN is not within tolerance
        raise ParityError(f"{name}: off by {error:.2e} of the largest entry, allowed {tolerance:.0e}")


class Updates:
    """H of every layer in a model's first step on a batch, by the reference, for any rule.

    Inputs and responses are recorded in one backprop step of the torch model in training mode. Whatever
    computes the same rule sees the same ones, up to the rounding of its own forward. Kept for one rule at a
    time, because the weights of a large network are large: ask rule by rule.
    """

    def __init__(self, model: nn.Module, x: Tensor, target: Tensor) -> None:
        self._seen: dict[str, tuple[nn.Module, Tensor, Tensor]] = {}
        self._rule: ghl.HebbianRule | None = None
        self._updates: dict[str, Tensor] = {}
        hooks = [
            layer.register_forward_hook(lambda layer, args, u, name=name: self._record(name, layer, *args, u))
            for name, layer in model.named_modules()
            if isinstance(layer, (nn.Conv2d, nn.Linear))
        ]
        try:
            F.cross_entropy(model(x), target).backward()
        finally:
            for hook in hooks:
                hook.remove()
        self._gradients = {name: layer.weight.grad for name, (layer, _, _) in self._seen.items()}
        model.zero_grad(set_to_none=True)

    @property
    def layers(self) -> set[str]:
        """Names of the convolutions and linear layers."""
        return set(self._seen)

    def gradient(self, name: str) -> Tensor:
        """G, the task gradient of the layer's weight."""
        return self._gradients[name]

    def of(self, name: str, rule: ghl.HebbianRule) -> Tensor:
        """H of the layer's weight, of its shape and dtype."""
        if rule != self._rule:
            self._rule, self._updates = rule, {}
        if name not in self._updates:
            self._updates[name] = self._reference(name, rule)
        return self._updates[name]

    def gated(self, name: str, rule: ghl.HebbianRule) -> Tensor:
        """|H| where the task gradient is not 0: the weights of a unit behind a dead ReLU do not move."""
        return self.of(name, rule).abs() * (self._gradients[name] != 0)

    def _record(self, name: str, layer: nn.Module, x: Tensor, u: Tensor) -> None:
        # what follows may change u in place; x has been changed by then
        self._seen[name] = (layer, x.detach().clone(), u.detach().clone())

    def _reference(self, name: str, rule: ghl.HebbianRule) -> Tensor:
        layer, x, u = self._seen[name]
        weight = layer.weight.detach()
        tensors = x.double(), u.double(), weight.double()
        if isinstance(layer, nn.Linear):
            return ghl.reference.linear_delta(*tensors, rule).to(weight.dtype)
        conv = {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "groups")}
        return ghl.reference.conv_delta(*tensors, rule, **conv).to(weight.dtype)


@torch.no_grad()
def check_update(
    run: Callable[[], object],
    layers: Iterable[tuple[str, nn.Module]],
    updates: Updates,
    rule: ghl.HebbianRule,
    lr: float,
    *,
    signed: bool,
) -> None:
    """Run a step that starts where ``updates`` was recorded; every weight has to change by lr H.

    Only the size of the change is compared, unless ``signed``: the gate takes H's sign away, and leaves 0
    where the task gradient is 0.

    Raises:
        ParityError: a layer's weight changed by something else.
    """
    expected = updates.of if signed else updates.gated
    # the weights may be those of the recorded model: the reference needs them as they are before the step
    before = [(name, layer, layer.weight.clone(), expected(name, rule)) for name, layer in layers]
    with torch.enable_grad():
        run()
    for name, layer, weight, H in before:
        change = (layer.weight - weight) / lr
        assert_close(name, change if signed else change.abs(), H)


@torch.no_grad()
def check_descent(run: Callable[[], object], model: nn.Module, updates: Updates, lr: float) -> None:
    """Run a backprop step that starts where ``updates`` was recorded; every weight has to change by -lr G.

    Raises:
        ParityError: a layer's weight changed by something else.
    """
    layers = [(name, layer) for name, layer in model.named_modules() if name in updates.layers]
    before = [(name, layer, layer.weight.clone()) for name, layer in layers]
    with torch.enable_grad():
        run()
    for name, layer, weight in before:
        # lr G is far smaller than the weight, to which the change is rounded
        rounding = torch.finfo(weight.dtype).eps * weight.abs() / lr
        change = (weight - layer.weight) / lr
        assert_close(name, change, updates.gradient(name), _GRADIENT_TOLERANCE, rounding=rounding)
