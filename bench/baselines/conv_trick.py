"""The correlation as a convolution of the input with the activities, batch and channels exchanged.

    A = crop(conv2d(input = x^T (C, B, H, W), kernel = y^T (N, B, OH, OW), stride = d, dilation = s))^T
    H = A - v W with v_n = sum_p y_np u_np, over max |H|

s and d are the layer's stride and dilation. Where (H + 2p - d (k - 1) - 1) mod s >= d the rows that the
layer's own stride never reached give the result more than k taps: they are cropped.

Name: B3, "convolution trick". Source: Journé et al., "Hebbian Deep Learning Without Feedback", ICLR 2023. It
stands for ``HebbianRule.ghl(temperature)``. Its cost is one dense pass, which the library sees as C images of
B channels under N kernels of OH x OW, and y of u's size; no patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.baselines._baseline import Baseline
from bench.baselines._conv import ConvArguments
from bench.baselines._oja import decayed

BASELINE = Baseline(
    "B3",
    "convolution trick",
    "Journé et al., ICLR 2023",
    "A = crop(conv2d(x^T, y^T, stride=d, dilation=s))^T, H = A - (sum y u) W over max |H|",
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
) -> Tensor:
    """A = sum_p y_p x_p^T, of weight's shape."""
    taps = F.conv2d(
        x.transpose(0, 1), y.transpose(0, 1), stride=dilation, padding=padding, dilation=stride
    )  # (C, N, >= kh, >= kw)
    return taps.transpose(0, 1)[..., : weight.shape[2], : weight.shape[3]]


@torch.no_grad()
def delta(
    x: Tensor, u: Tensor, weight: Tensor, temperature: float = 1.0, **conv: Unpack[ConvArguments]
) -> Tensor:
    """H of weight's shape."""
    y = torch.softmax(u / temperature, dim=1)
    return decayed(correlation(x, y, weight, **conv), (y * u).sum((0, 2, 3)), weight)
