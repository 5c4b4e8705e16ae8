"""Hypothesis strategies: rules, layers with their inputs, and the arguments of the functions."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from oracle import LAYOUTS, embed
from torch import Tensor, nn

import ghl_kernels as ghl
from ghl_kernels import HebbianRule, _dispatch

# Primes, ones, powers of two and their neighbours: nothing that a tile divides for all of them.
UNITS = (1, 2, 3, 5, 7, 8, 13, 16, 17, 31, 33, 64, 67)
FEATURES = (1, 2, 3, 7, 8, 16, 19, 33, 65)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PADDING_MODES = ("zeros", "reflect", "replicate", "circular")

# How A is summed where units win: as the measured crossover says, or one way for all.
PATHS = ("measured", "sparse", "dense")


@contextlib.contextmanager
def crossover(path: str) -> Iterator[None]:
    """Sum A from the winners alone, or by the dense product, whatever is faster."""
    with pytest.MonkeyPatch.context() as patch:
        if path != "measured":
            limit = 1.0 if path == "sparse" else 0.0
            patch.setattr(_dispatch, "_CROSSOVER", dict.fromkeys(_dispatch._CROSSOVER, limit))
            patch.setattr(_dispatch, "_WORTH_KEEPING", limit)
        yield


@st.composite
def rules(draw: st.DrawFn, units: int, gate: str | None = None) -> HebbianRule:
    """A valid rule for this many units; every value of every field occurs."""
    activity = draw(st.sampled_from(("softmax", "linear", "relu", "binary")))
    counts = st.integers(1, min(units, 5)) | st.integers(1, units)
    fractions = st.floats(0.01, 1.0, exclude_max=True)
    winners = draw(counts | fractions if activity == "binary" else st.none() | counts | fractions)
    k = winners if isinstance(winners, int) else math.ceil(winners * units) if winners else units
    return HebbianRule(
        activity=activity,
        winners=winners,
        temperature=draw(st.sampled_from((1.0, 0.25, 4.0))) if activity == "softmax" else 1.0,
        losers="silent" if k == 1 else draw(st.sampled_from(("silent", "anti"))),
        decay=draw(st.sampled_from(("oja", "instar", "none", "subspace", "sanger"))),
        normalize=draw(st.sampled_from(("layer", "filter", "mean", "none"))),
        gate=gate or draw(st.sampled_from(("sign", "sign", "none"))),
    )


@dataclasses.dataclass(frozen=True)
class LayerCase:
    """A layer, its input and the gradient of its output, by value."""

    kind: str
    arguments: dict[str, Any]  # of the torch layer
    rule: HebbianRule
    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: str
    grad_layout: str
    coarse: bool  # small integers, so that responses tie
    path: str  # of PATHS
    seed: int

    def layers(self, **options: Any) -> tuple[nn.Module, nn.Module]:
        """The torch layer and ours, with the same parameters."""
        torch.manual_seed(self.seed)
        plain = getattr(nn, self.kind)(**self.arguments, dtype=self.dtype)
        if self.coarse:
            with torch.no_grad():
                for parameter in plain.parameters():
                    parameter.copy_(torch.randint(-2, 3, parameter.shape) / 4)
        ours = getattr(ghl, f"GHL{self.kind}")(**self.arguments, dtype=self.dtype, rule=self.rule, **options)
        ours.load_state_dict(plain.state_dict())
        return plain, ours

    def x(self) -> Tensor:
        """The input; call after layers()."""
        x = torch.randint(-2, 3, self.shape).float() if self.coarse else torch.randn(self.shape)
        return embed(x.to(self.dtype), self.layout)

    def grad_u(self, u: Tensor) -> Tensor:
        """A gradient of the output."""
        return embed(torch.randn(u.shape).to(self.dtype), self.grad_layout)


@st.composite
def layer_cases(
    draw: st.DrawFn,
    *,
    kinds: tuple[str, ...] = ("Linear", "Conv1d", "Conv2d", "Conv3d"),
    gate: str | None = None,
) -> LayerCase:
    """Layers of every kind, with every option of theirs, on small shapes."""
    kind = draw(st.sampled_from(kinds))
    bias = draw(st.booleans())
    if kind == "Linear":
        units = draw(st.sampled_from(UNITS))
        features = draw(st.sampled_from(FEATURES))
        leading = draw(st.lists(st.sampled_from((0, 1, 2, 3, 7)), max_size=3))
        arguments: dict[str, Any] = {"in_features": features, "out_features": units, "bias": bias}
        shape = (*leading, features)
    else:
        arguments, shape = draw(_convolutions(int(kind[4])))
        arguments["bias"] = bias
        units = arguments["out_channels"]
    return LayerCase(
        kind,
        arguments,
        draw(rules(units, gate)),
        shape,
        draw(st.sampled_from(DTYPES)),
        draw(st.sampled_from(LAYOUTS)),
        draw(st.sampled_from(LAYOUTS)),
        draw(st.booleans()),
        draw(st.sampled_from(PATHS)),
        draw(st.integers(0, 2**16)),
    )


@st.composite
def _convolutions(draw: st.DrawFn, dims: int) -> tuple[dict[str, Any], tuple[int, ...]]:
    """Arguments of a convolution and an input shape that fits."""
    kernel = tuple(draw(st.integers(1, 3 if dims == 3 else 4)) for _ in range(dims))
    dilation = tuple(draw(st.integers(1, 2)) for _ in range(dims))
    groups = draw(st.sampled_from((1, 1, 2, 3)))
    depthwise = draw(st.booleans()) and groups > 1
    in_per_group = 1 if depthwise else draw(st.sampled_from((1, 2, 3, 5)))
    out_per_group = draw(st.sampled_from((1, 2, 3, 8, 11, 16)))
    mode = draw(st.sampled_from(PADDING_MODES))
    padding = draw(st.sampled_from(("valid", "same", 0, 1, "each")))
    stride: Any = 1 if padding == "same" else draw(st.sampled_from((1, 2, 3)))
    if padding == "each":
        padding = tuple(draw(st.integers(0, 2)) for _ in range(dims))
        stride = tuple(draw(st.integers(1, 3)) for _ in range(dims))
    # large enough for the kernel without padding, and for the padding to be reflected or wrapped
    size = tuple(
        draw(st.sampled_from((0, 1, 2, 4))) + max(d * (k - 1) + 1, 4 if mode != "zeros" else 1)
        for k, d in zip(kernel, dilation, strict=True)
    )
    channels = groups * in_per_group
    batch = draw(st.sampled_from(((), (0,), (1,), (2,), (3,))))
    if not batch or dims == 1 or draw(st.booleans()):
        kernel_size: Any = kernel
    else:
        kernel_size = kernel = (kernel[0],) * dims
        size = tuple(max(s, d * (kernel[0] - 1) + 1) for s, d in zip(size, dilation, strict=True))
        kernel_size = kernel[0]
    arguments = {
        "in_channels": channels,
        "out_channels": groups * out_per_group,
        "kernel_size": kernel_size,
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
        "padding_mode": mode,
    }
    return arguments, (*batch, channels, *size)
