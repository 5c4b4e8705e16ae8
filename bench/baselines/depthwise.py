"""The correlation of a depthwise convolution: grouped, and as the diagonal of a dense one.

    A_n = sum_p y_np x_gp^T                       g = n // (N / C), the one channel that unit n reads

Name: B15, "depthwise". Source: the library's weight gradient with groups = C; the dense form after Nimmo &
Mondragon, "Advancing the biological plausibility and efficacy of Hebbian convolutional neural networks",
Neural Networks 190 (2025). It stands for A of any rule on a layer with groups = C. The grouped form costs
one pass over x and y; the dense one C times the arithmetic, and N x C x kh x kw numbers of which N x kh x kw
are kept.
"""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor

from bench.baselines import library
from bench.baselines._baseline import Baseline
from bench.baselines._conv import ConvArguments

BASELINE = Baseline(
    "B15",
    "depthwise",
    "aten::convolution_backward with groups; dense form after Nimmo & Mondragon, 2025",
    "A_n = sum_p y_np x_gp^T, grouped or as the diagonal of the dense C x C result",
)


@torch.no_grad()
def correlation(x: Tensor, y: Tensor, weight: Tensor, **conv: Unpack[ConvArguments]) -> Tensor:
    """A, of weight's shape (N, 1, kh, kw), by the library's grouped weight gradient."""
    _check_depthwise(x, weight)
    return library.correlation(x, y, weight, groups=x.shape[1], **conv)


@torch.no_grad()
def dense_diagonal(x: Tensor, y: Tensor, weight: Tensor, **conv: Unpack[ConvArguments]) -> Tensor:
    """A, of weight's shape (N, 1, kh, kw), as the diagonal of the dense (N, C, kh, kw) result."""
    _check_depthwise(x, weight)
    units, channels = weight.shape[0], x.shape[1]
    dense = library.correlation(x, y, weight.new_empty((units, channels, *weight.shape[2:])), **conv)
    unit = torch.arange(units, device=x.device)
    return dense[unit, unit // (units // channels)].unsqueeze(1)


def _check_depthwise(x: Tensor, weight: Tensor) -> None:
    if weight.shape[1] != 1 or weight.shape[0] % x.shape[1]:
        raise ValueError(
            f"a depthwise weight is (a multiple of {x.shape[1]} channels, 1, kh, kw), "
            f"got {tuple(weight.shape)}"
        )
