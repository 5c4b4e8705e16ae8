"""The plain weight gradient, which every cost is quoted against.

    G = sum_p (dL/du)_p x_p^T          dx = W^T * dL/du, the transposed convolution

Name: B0, "backprop". Source: the framework's own convolution backward. It stands for training without any
Hebbian rule. Its cost is one dense pass for G and one for dx, and no memory but the results.
"""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor

from bench.baselines._baseline import Baseline
from bench.baselines._conv import ConvArguments, convolution_backward

BASELINE = Baseline("B0", "backprop", "aten::convolution_backward", "G = sum_p (dL/du)_p x_p^T")


@torch.no_grad()
def weight_grad(x: Tensor, grad_u: Tensor, weight: Tensor, **conv: Unpack[ConvArguments]) -> Tensor:
    """G, of weight's shape, alone."""
    return convolution_backward(grad_u, x, weight, (False, True, False), **conv)[1]


@torch.no_grad()
def weight_and_input_grad(
    x: Tensor, grad_u: Tensor, weight: Tensor, **conv: Unpack[ConvArguments]
) -> tuple[Tensor, Tensor]:
    """G and dx, of weight's and of x's shape: the whole backward of a layer inside a network."""
    dx, G, _ = convolution_backward(grad_u, x, weight, (True, True, False), **conv)
    return G, dx
