"""The library's weight gradient fed with the activities: what an expert writes in stock PyTorch.

    y = softmax over channels of u / temperature
    A = aten::convolution_backward(grad_output = y, input = x, weight only)
    H = A - <W, A> W, over max |H|

Names: B4, "library weight gradient"; B4c, "the same, compiled": softmax, A and H under torch.compile; B4d,
"one library weight gradient on [y; dL/du]", which has 2N channels and yields A and G at once. Source: the
formulas of arXiv 2601.21367; Oja's decay as <W_n, A_n>, which spares the sum of y u. They stand for
``HebbianRule.ghl(temperature)``. A is one dense pass, A and G together two. y, of u's size, is stored; B4d
stores [y; dL/du], twice that. A leaves the library in x's dtype: in 16 bits it is rounded to it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Unpack

import torch
from torch import Tensor

from bench.baselines._baseline import Baseline
from bench.baselines._conv import ConvArguments, convolution_backward
from bench.baselines._oja import oja

BASELINES = (
    Baseline(
        "B4",
        "library weight gradient",
        "aten::convolution_backward on y",
        "A = sum_p y_p x_p^T, H = A - <W, A> W over max |H|",
    ),
    Baseline(
        "B4c",
        "library weight gradient, compiled",
        "aten::convolution_backward on y under torch.compile",
        "A = sum_p y_p x_p^T, H = A - <W, A> W over max |H|",
    ),
    Baseline(
        "B4d",
        "one library weight gradient on [y; dL/du]",
        "aten::convolution_backward on 2N channels",
        "[A; G] = sum_p [y; dL/du]_p x_p^T",
    ),
)


@torch.no_grad()
def correlation(
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """A = sum_p y_p x_p^T, of weight's shape (N, C / groups, kh, kw) and x's dtype."""
    if weight.dtype != x.dtype:
        weight = torch.empty_like(weight, dtype=x.dtype)  # only its shape and layout are read
    conv = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    return convolution_backward(y, x, weight, (False, True, False), **conv)[1]


@torch.no_grad()
def delta(
    x: Tensor, u: Tensor, weight: Tensor, temperature: float = 1.0, **conv: Unpack[ConvArguments]
) -> Tensor:
    """H of weight's shape."""
    return oja(correlation(x, torch.softmax(u / temperature, dim=1), weight, **conv), weight)


@torch.no_grad()
def pair(
    x: Tensor,
    u: Tensor,
    grad_u: Tensor,
    weight: Tensor,
    temperature: float = 1.0,
    **conv: Unpack[ConvArguments],
) -> tuple[Tensor, Tensor]:
    """(A, G), each of weight's shape, by two weight gradients."""
    y = torch.softmax(u / temperature, dim=1)
    return correlation(x, y, weight, **conv), correlation(x, grad_u, weight, **conv)


@torch.no_grad()
def concatenated_pair(
    x: Tensor,
    u: Tensor,
    grad_u: Tensor,
    weight: Tensor,
    temperature: float = 1.0,
    **conv: Unpack[ConvArguments],
) -> tuple[Tensor, Tensor]:
    """(A, G), each of weight's shape, by one weight gradient with 2N channels."""
    both = torch.cat([torch.softmax(u / temperature, dim=1), grad_u], dim=1)
    units = weight.shape[0]
    doubled = weight.new_empty((2 * units, *weight.shape[1:]))
    A, G = correlation(x, both, doubled, **conv).split(units)
    return A, G


@functools.cache
def compiled_delta() -> Callable[..., Tensor]:
    """``delta`` under torch.compile, one graph for every combination of shapes.

    The first call with new shapes compiles. Dynamo keeps 8 graphs of a function and raises at the ninth, so
    that eager code is never timed as compiled: call torch._dynamo.reset() between many shapes.
    """
    return torch.compile(delta, dynamic=False, fullgraph=True)


@functools.cache
def compiled_pair() -> Callable[..., tuple[Tensor, Tensor]]:
    """``pair`` under torch.compile; what ``compiled_delta`` says holds."""
    return torch.compile(pair, dynamic=False, fullgraph=True)
