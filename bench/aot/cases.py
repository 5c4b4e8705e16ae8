"""Every operation of the Triton backend on representative layers, with nothing but shapes in the tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from ghl_kernels._geometry import Geometry, make_geometry
from ghl_kernels.backends.eager import moments_size, sum_dtype
from ghl_kernels.backends.gpu.layout import VECTOR, patches, responses
from ghl_kernels.backends.gpu.state import State
from ghl_kernels.backends.triton.kernels import correlate, depthwise
from ghl_kernels.rule import Competition

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LAYOUTS = {
    "nchw": {3: torch.contiguous_format, 4: torch.contiguous_format, 5: torch.contiguous_format},
    "nhwc": {3: torch.contiguous_format, 4: torch.channels_last, 5: torch.channels_last_3d},
}


class Layer(NamedTuple):
    """A layer and its input: ``size`` is () for a linear layer, whose batch is its number of positions."""

    name: str
    batch: int
    channels: int
    units: int
    size: tuple[int, ...] = ()
    kernel: tuple[int, ...] = ()
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    groups: int = 1
    layout: str = "nhwc"

    @property
    def geometry(self) -> Geometry:
        return make_geometry(self.kernel, self.stride, self.padding, self.dilation, self.groups)[1]

    @property
    def kind(self) -> str:
        return "conv" if self.size else "linear"

    @property
    def geometries(self) -> tuple[Geometry, ...]:
        """What the operations of a convolution take and those of a linear layer do not."""
        return (self.geometry,) if self.size else ()

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return (self.units, self.channels // self.groups, *self.kernel)

    @property
    def positions(self) -> int:
        return self.batch * (math.prod(self.geometry.out_size(self.size)) if self.size else 1)

    def x(self, dtype: torch.dtype) -> Tensor:
        return self._empty((self.batch, self.channels, *self.size), dtype)

    def u(self, dtype: torch.dtype) -> Tensor:
        size = self.geometry.out_size(self.size) if self.size else ()
        return self._empty((self.batch, self.units, *size), dtype)

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        # memory that nobody writes costs nothing, so sizes may be real ones
        if len(shape) == 2:
            return torch.empty(shape, dtype=dtype)
        return torch.empty(shape, dtype=dtype, memory_format=LAYOUTS[self.layout][len(shape)])


# Inputs of "long" layers have offsets beyond 31 bits.
LINEAR = (
    Layer("linear-4096to4096", 4096, 4096, 4096),
    Layer("rows-65536", 64, 64, 65_536),
    Layer("long-linear", 20_000, 65_536, 64),
    Layer("linear-2304to512", 16384, 2304, 512),
    Layer("linear-784to200", 512, 784, 200),
    Layer("linear-13to17", 33, 13, 17),
    Layer("one-row", 1, 13, 10),
    Layer("one-unit", 5, 13, 1),
)
CONV = (
    Layer("deephebb2", 64, 96, 384, (16, 16), (3, 3), padding=1),
    Layer("deephebb2-nchw", 64, 96, 384, (16, 16), (3, 3), padding=1, layout="nchw"),
    Layer("deephebb3", 64, 384, 1536, (8, 8), (3, 3), padding=1),
    Layer("deephebb3-nchw", 64, 384, 1536, (8, 8), (3, 3), padding=1, layout="nchw"),
    Layer("long-conv", 320, 64, 64, (256, 256), (3, 3), stride=16, padding=1),
    Layer("long-depthwise", 320, 64, 64, (256, 256), (3, 3), stride=16, padding=1, groups=64),
    Layer("thin-3to96-k5", 64, 3, 96, (32, 32), (5, 5), padding=2),
    Layer("thin-3to96-k5-nchw", 64, 3, 96, (32, 32), (5, 5), padding=2, layout="nchw"),
    Layer("stem-3to64-k7", 16, 3, 64, (112, 112), (7, 7), stride=2, padding=3),
    Layer("k3-128", 32, 128, 128, (28, 28), (3, 3), padding=1),
    Layer("k3-512-s2", 32, 512, 512, (14, 14), (3, 3), stride=2, padding=1),
    Layer("k3-dilated", 8, 64, 64, (28, 28), (3, 3), padding=2, dilation=2),
    Layer("pointwise-256to64", 32, 256, 64, (56, 56), (1, 1)),
    Layer("pointwise-64to256-nchw", 32, 64, 256, (56, 56), (1, 1), layout="nchw"),
    Layer("grouped-2", 16, 64, 128, (14, 14), (3, 3), padding=1, groups=2),
    Layer("grouped-32", 16, 128, 128, (14, 14), (3, 3), padding=1, groups=32),
    Layer("depthwise-k3", 16, 96, 96, (28, 28), (3, 3), padding=1, groups=96),
    Layer("depthwise-k3-nchw", 16, 96, 96, (28, 28), (3, 3), padding=1, groups=96, layout="nchw"),
    Layer("depthwise-k7-x2", 8, 64, 128, (28, 28), (7, 7), stride=2, padding=3, groups=64),
    Layer("odd-13to17", 5, 13, 17, (9, 7), (3, 2)),
    Layer("conv1d", 8, 32, 128, (256,), (9,), padding=4),
    Layer("conv3d", 4, 16, 32, (16, 16, 16), (3, 3, 3), padding=1),
    Layer("many-units", 4, 64, 8192, (8, 8), (1, 1)),
)
# On these every kind of competition and decay is compiled, on the others softmax and k winners with Oja's.
FULL = ("deephebb2", "deephebb2-nchw")
# On these every kind of competition too, but nothing that multiplies: their rows do not fit in registers.
IN_PIECES = ("rows-65536", "deephebb3-nchw")
# What the short run compiles.
REDUCED = ("deephebb2", "depthwise-k3")


def competitions(units: int) -> dict[str, Competition]:
    """Every kind of competition, by name."""
    k = min(units, max(2, units // 50))
    return {
        "softmax": Competition("softmax", 0, 1.0, False),
        "kwta": Competition("linear", k, 1.0, False),
        "softmax-anti": Competition("softmax", 0, 0.5, True),
        "softmax-winners": Competition("softmax", k, 1.0, False),
        "softmax-winners-anti": Competition("softmax", k, 1.0, True),
        "linear": Competition("linear", 0, 1.0, False),
        "relu": Competition("relu", 0, 1.0, False),
        "relu-anti": Competition("relu", 0, 1.0, True),
        "binary": Competition("binary", 1, 1.0, False),
    }


class Case(NamedTuple):
    """One call of one operation; ``run`` takes the module of operations and a dtype."""

    name: str
    run: Callable[[ModuleType, torch.dtype], object]


def cases(dtype: str, reduced: bool) -> Iterator[Case]:
    """All calls in a dtype; with ``reduced`` those of few layers and the two main competitions.

    bfloat16 is compiled in full. float16 goes its way, so a few layers show that it does; float32 is right
    with no claim to speed, so the main competitions suffice.
    """
    reduced = reduced or dtype == "fp16"
    for layer in (*LINEAR, *CONV):
        if reduced and layer.name not in REDUCED:
            continue
        every = competitions(layer.units)
        thorough = not reduced and dtype == "bf16"
        full = layer.name in FULL and thorough
        for name, competition in every.items():
            main = name in ("softmax", "kwta")
            if main or full or (layer.name in IN_PIECES and thorough):
                yield from _competition_cases(layer, name, competition)
            if main or full:
                yield from _data_cases(layer, name, competition, ("oja", "instar") if full else ("oja",))
        yield _gradient_case(layer)
        yield from _weight_cases(layer, full)


def choices() -> Iterator[Case]:
    """Calls that together make every choice of the functions in config.py, whatever the architecture.

    These look at the units up to the sizes of a tile, at whether there are more columns than 128, whether
    tiles of them lie within a tap, whether loads are whole, and at the competition.
    """
    for units in (16, 32, 64, 256, 512):
        for layer in _swept(units):
            every = competitions(units)
            for name in ("softmax", "kwta", "linear"):
                yield from _product_cases(layer, name, every[name], "oja")
            yield _gradient_case(layer)


def _swept(units: int) -> Iterator[Layer]:
    """Aligned, with single units to spare, and in planes; linear layers, and convolutions of either width."""
    for aligned in (units, units - 1):
        for features in (64, 1024):
            yield Layer(f"linear-{features}to{aligned}", 4096, features, aligned)
        for layout in ("nhwc", "nchw"):
            for channels in (8, 32, 96, 256):
                name = f"conv-{channels}to{aligned}-{layout}"
                yield Layer(name, 64, channels, aligned, (8, 8), (3, 3), padding=1, layout=layout)


def _competition_cases(layer: Layer, label: str, competition: Competition) -> Iterator[Case]:
    """Competitions by themselves."""
    dim = 1
    about = f"{layer.name} {label}"
    yield Case(f"compete {about}", lambda ops, t: ops.compete(layer.u(t), dim, competition))
    yield Case(
        f"competition_state {about}", lambda ops, t: ops.competition_state(layer.u(t), dim, competition)
    )
    if competition.winners:
        yield Case(f"winners {about}", lambda ops, t: ops.winners(layer.u(t), dim, competition))


def _gradient_case(layer: Layer) -> Case:
    """G alone: no operation asks for it, but the kernels give it."""

    def run(ops: ModuleType, dtype: torch.dtype) -> None:
        # the operations bring x into this form before the kernel sees it: of any rank, unlike channels_last
        per_group = layer.channels // layer.groups
        whole = layer.groups * (per_group + (-per_group % VECTOR if per_group > 1 else 0))
        last = torch.empty((layer.batch, *layer.size, whole), dtype=dtype)
        x = patches(last.movedim(-1, 1), layer.geometry if layer.size else None)
        grad, rule = responses(layer.u(dtype), 1), competitions(layer.units)["softmax"]
        if layer.size and x.channels == 1:
            depthwise.correlate(x, grad, grad, State(None, None, None, None), rule, want_A=False)
        else:
            correlate.correlate(x, None, grad, None, rule)

    return Case(f"gradient {layer.name}", run)


def _data_cases(
    layer: Layer, label: str, competition: Competition, decays: tuple[str, ...]
) -> Iterator[Case]:
    """Operations that multiply by y."""
    for decay in decays:
        yield from _product_cases(layer, label, competition, decay)
    if competition.winners:
        yield Case(
            f"{layer.kind}_winner_sums {layer.name} {label}",
            lambda ops, t: getattr(ops, f"{layer.kind}_winner_sums")(
                layer.x(t), *_lists(layer, competition.winners, t), layer.units, *layer.geometries, "oja"
            ),
        )


def _product_cases(layer: Layer, label: str, competition: Competition, decay: str) -> Iterator[Case]:
    """A alone and the pair."""
    rest = (*layer.geometries, competition, decay)
    about = f"{layer.name} {label} {decay}"
    yield Case(
        f"{layer.kind}_sums {about}",
        lambda ops, t: getattr(ops, f"{layer.kind}_sums")(layer.x(t), layer.u(t), *rest),
    )
    yield Case(
        f"{layer.kind}_pair {about}",
        lambda ops, t: getattr(ops, f"{layer.kind}_pair")(layer.x(t), layer.u(t), layer.u(t), *rest),
    )


def _lists(layer: Layer, winners: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    shape = (layer.positions, winners)
    return torch.empty(shape, dtype=torch.int32), torch.empty(shape, dtype=sum_dtype(dtype))


def _weight_cases(layer: Layer, full: bool) -> Iterator[Case]:
    """Operations from A to H, the gradient or the weight."""
    decays = ("oja", "instar", "none", "subspace", "sanger") if full else ("oja",)
    normalizes = ("layer", "filter", "mean", "none") if full else ("layer",)
    for decay in decays:
        for normalize in normalizes:
            for operation in ("gate_", "learn_", "delta"):
                yield Case(
                    f"{operation} {layer.name} {decay} {normalize}",
                    lambda ops, t, rule=(operation, decay, normalize): _from_sums(ops, layer, t, *rule),
                )


def _from_sums(
    ops: ModuleType, layer: Layer, dtype: torch.dtype, operation: str, decay: str, normalize: str
) -> None:
    weight = torch.empty(layer.weight_shape, dtype=dtype)
    A = torch.empty(layer.weight_shape, dtype=sum_dtype(dtype))
    moments = torch.empty(moments_size(layer.units, layer.groups, decay), dtype=A.dtype)
    rule = (layer.groups, decay, normalize)
    if operation == "gate_":
        ops.gate_(torch.empty_like(weight), A, moments, weight, *rule)
    elif operation == "learn_":
        ops.learn_(weight, A, moments, 0.1, *rule)
    else:
        ops.delta(A, moments, weight, *rule)
