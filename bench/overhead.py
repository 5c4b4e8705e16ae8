"""What a call costs beyond its arithmetic: a training pass of a tiny layer against the torch layer's.

Forward and backward, with the gradients of input, weight and bias, of layers so small that nearly all of the
time is the interpreter, autograd and launches: call by call, under torch.compile, and as a CUDA graph.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

import ghl_kernels as ghl
from bench.failures import reason
from bench.interleave import pinned_threads
from bench.parity import assert_close
from bench.report import Row, duration
from bench.scaling import Contender, Measured, measure

if TYPE_CHECKING:
    from rich.progress import Progress

SUITE = "overhead"
RULES = {"softmax": ghl.HebbianRule.ghl(), "winners=4": ghl.HebbianRule.kwta(4)}
_CALLS = 100  # in one timed run on a CPU: far above the resolution of the clock
_TORCH = "torch"

Step = Callable[[], tuple[Tensor, ...]]
Wrap = Callable[[nn.Module], Callable[[Tensor], Tensor]]


class Tiny(NamedTuple):
    """A layer and its input; the arithmetic takes about a microsecond."""

    plain: type[nn.Module]
    hebbian: type[nn.Module]
    arguments: tuple[int, ...]
    options: dict[str, Any]
    input: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.plain.__name__}{self.arguments} on {self.input}"

    def layers(self, device: torch.device) -> dict[str, nn.Module]:
        """The torch layer first, then a layer for every rule, all with the same parameters."""
        torch.manual_seed(0)
        plain = self.plain(*self.arguments, **self.options, device=device)
        found = {_TORCH: plain}
        for name, rule in RULES.items():
            layer = self.hebbian(*self.arguments, **self.options, rule=rule, device=device)
            layer.load_state_dict(plain.state_dict())
            found[name] = layer
        return found


LAYERS = (
    Tiny(nn.Linear, ghl.GHLLinear, (16, 32), {}, (4, 16)),
    Tiny(nn.Conv2d, ghl.GHLConv2d, (4, 8, 3), {"padding": 1}, (2, 4, 8, 8)),
)


@dataclasses.dataclass(frozen=True)
class Mode:
    """A way to run a layer.

    Attributes:
        wrap: from a layer to what is called in its place.
        capture: its pass is replayed as a CUDA graph.
        absent: why it is not run here.
    """

    name: str
    wrap: Wrap = lambda layer: layer
    capture: bool = False
    absent: str = ""


def modes(device: torch.device, quick: bool) -> list[Mode]:
    """Eager, compiled and as a CUDA graph, those that cannot run here with the reason."""
    return [
        Mode("eager"),
        Mode(
            "compiled",
            wrap=lambda layer: torch.compile(layer, fullgraph=True, dynamic=False),
            absent="it compiles for seconds; not in the quick selection" if quick else "",
        ),
        Mode("CUDA graph", capture=True, absent="" if device.type == "cuda" else "needs a GPU"),
    ]


def overhead_rows(options: argparse.Namespace, progress: Progress) -> list[Row]:
    """Every tiny layer in every mode.

    Args:
        options: ``rounds``, ``threads`` (int), ``quick`` (bool: nothing is compiled) and ``device``.

    Returns:
        Rows of suite "overhead": seconds of one forward and backward, the ratio to the torch layer's in the
        same mode, and in the note the difference. A mode that cannot run here, or a layer whose gradients are
        not those of its rule, is a row without a ratio.
    """
    rows: list[Row] = []
    with pinned_threads(options.threads):
        for tiny in LAYERS:
            for mode in modes(options.device, options.quick):
                if mode.absent:
                    rows += [_row(tiny, mode, rule, note=f"absent: {mode.absent}") for rule in RULES]
                else:
                    rows += _mode_rows(tiny, mode, options, progress)
    return rows


def _mode_rows(tiny: Tiny, mode: Mode, options: argparse.Namespace, progress: Progress) -> list[Row]:
    try:
        measured = _measure(tiny, mode, options, progress)
    except Exception as error:  # no compiler on this machine, say, or gradients that are not the rule's
        return [_row(tiny, mode, rule, error=reason(error)) for rule in RULES]
    return [_timed(tiny, mode, rule, measured[rule], measured[_TORCH]) for rule in RULES]


def _measure(tiny: Tiny, mode: Mode, options: argparse.Namespace, progress: Progress) -> dict[str, Measured]:
    """The torch layer's pass, then every rule's, all checked."""
    torch._dynamo.reset()  # it keeps a few variants of a forward only, and raises at the next
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tiny.input, generator=generator).to(options.device).requires_grad_()
    layers = tiny.layers(options.device)
    grad_u = torch.randn(layers[_TORCH](x).shape, generator=generator).to(options.device)
    steps = {name: training_pass(layer, mode.wrap(layer), x, grad_u) for name, layer in layers.items()}
    plain = steps[_TORCH]()
    for rule in RULES:
        _check(f"{tiny}, {rule}, {mode.name}", layers[rule], x, grad_u, steps[rule](), plain)
    return measure(
        {name: Contender(lambda _, step=step: step()) for name, step in steps.items()},
        f"{tiny}, {mode.name}",
        options,
        progress,
        calls=_CALLS,
        capture=mode.capture,
    )


def training_pass(layer: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor, grad_u: Tensor) -> Step:
    """A forward by ``call`` and the gradients of input, weight and bias, returned and not accumulated."""
    wanted = (x, *layer.parameters())

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(call(x), wanted, grad_u)

    return step


def _check(
    name: str,
    layer: nn.Module,
    x: Tensor,
    grad_u: Tensor,
    actual: tuple[Tensor, ...],
    plain: tuple[Tensor, ...],
) -> None:
    """Input and bias gradient are the torch layer's, the weight's is the rule's."""
    grad_x, grad_weight, grad_bias = actual
    assert_close(f"{name}: input gradient", grad_x, plain[0])
    assert_close(f"{name}: bias gradient", grad_bias, plain[2])
    with torch.no_grad():
        u = layer(x)
        tensors = [t.detach().double() for t in (x, u, grad_u, layer.weight)]
    if isinstance(layer, nn.Linear):
        expected = ghl.reference.linear_weight_grad(*tensors, layer.rule)
    else:
        conv = {key: getattr(layer, key) for key in ("stride", "padding", "dilation", "groups")}
        expected = ghl.reference.conv_weight_grad(*tensors, layer.rule, **conv)
    # signs of G within its rounding of 0 are not the rule's concern
    assert_close(f"{name}: weight gradient", grad_weight.abs(), expected.abs())


def _timed(tiny: Tiny, mode: Mode, rule: str, own: Measured, plain: Measured) -> Row:
    difference = own.seconds.median - plain.seconds.median
    note = f"{'+' if difference >= 0 else '-'}{duration(abs(difference))} a call"
    fields = {"ratio": own.ratio, "seconds": own.seconds, "against_seconds": plain.seconds}
    return _row(tiny, mode, rule, note=note, **fields)


def _row(tiny: Tiny, mode: Mode, rule: str, **fields: Any) -> Row:
    return Row(
        suite=SUITE,
        name=f"{tiny.hebbian.__name__} {rule}, {mode.name}",
        case=str(tiny),
        against=f"{tiny.plain.__name__}, {mode.name}",
        **fields,
    )
