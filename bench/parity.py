"""What is timed is first compared with the float64 reference, at the size that is timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ghl_kernels as ghl
from bench.models import DeepHebb

# H is scaled to a largest entry of 1; float32 sums over 32,768 positions leave about 1e-5 of it.
TOLERANCE = 1e-4


class ParityError(AssertionError):
    """A candidate computes something else than the rule it stands for; its speed means nothing."""


def assert_close(name: str, actual: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    """Raise ParityError unless the largest difference is within tolerance of the largest expected entry."""
    if actual.shape != expected.shape:
        raise ParityError(f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}")
    scale = expected.abs().max().clamp_min(1e-30)
    error = ((actual.double() - expected.double()).abs().max() / scale).item()
    if not error <= tolerance:  # NaN is not within tolerance
        raise ParityError(f"{name}: off by {error:.2e} of the largest entry, allowed {tolerance:.0e}")


def check_step(
    name: str,
    model: DeepHebb,
    x: Tensor,
    target: Tensor,
    rule: ghl.HebbianRule,
    finish: Callable[[nn.Module], None] = lambda model: None,
) -> None:
    """|weight.grad| of every convolution after one training step is |H| of the rule.

    ``finish(model)`` is called between backward and the comparison.
    """
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}
    hooks = [
        conv.register_forward_hook(
            lambda conv, args, u: seen.update({conv: (args[0].detach(), u.detach().clone())})
        )
        for conv in convolutions(model)
    ]
    model.zero_grad()
    F.cross_entropy(model(x), target).backward()
    finish(model)
    for hook in hooks:
        hook.remove()
    for i, conv in enumerate(convolutions(model)):
        layer_input, u = seen[conv]
        H = _reference_delta(conv, layer_input, u, conv.weight.detach(), rule)
        assert_close(f"{name}, convolution {i + 1}", conv.weight.grad.abs(), H.abs())
    model.zero_grad()


@torch.no_grad()
def check_learn(name: str, model: DeepHebb, x: Tensor, rule: ghl.HebbianRule, lr: float = 0.5) -> None:
    """The weight change of every convolution in one local pass is lr * H; weights are restored."""
    for i, stage in enumerate(model.stages):
        norm, conv, activation, pool = stage
        before = conv.weight.clone()
        x = norm(x)
        u = conv.learn_(x, lr)
        H = _reference_delta(conv, x, u, before, rule)
        assert_close(f"{name}, convolution {i + 1}", (conv.weight - before) / lr, H)
        conv.weight.copy_(before)
        x = pool(activation(u))


def convolutions(model: nn.Module) -> Iterator[nn.Conv2d]:
    return (module for module in model.modules() if isinstance(module, nn.Conv2d))


def _reference_delta(conv: nn.Conv2d, x: Tensor, u: Tensor, weight: Tensor, rule: ghl.HebbianRule) -> Tensor:
    return ghl.reference.conv_delta(
        x.double(),
        u.double(),
        weight.double(),
        rule,
        stride=conv.stride,
        padding=conv.padding,
        dilation=conv.dilation,
        groups=conv.groups,
    )
