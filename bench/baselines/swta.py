"""Soft winner-take-all on cosine similarity, each unit averaging the patches it wins.

    cos = u / (|w| |x|)      q = ((cos + 1) / 2)^2      z = softmax over units of q / temperature
    c_np = z_np / sum_p z_np
    H_n = sum_p c_np z_np x_p - (sum_p c_np z_np) W_n

Name: B8, "SWTA-FH". Source: Lagani et al., "FastHebb: Scaling Hebbian Training of Deep Neural Networks to
ImageNet Level", SISAP 2022 (arXiv 2207.03172). It is no HebbianRule: the competition sees the norms of the
patches, and the average is weighted twice. The softmax is the stable one; the published one overflows
for q / temperature above 88. Its cost is two dense passes, forward and sum, beside the norms: by a box
filter over x^2, which needs no patches ("box": the fair fast form, sum by the library's weight gradient), or
from the patches ("unfold": norms and sum from one copy of them, P D numbers).
"""

from __future__ import annotations

from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.baselines._baseline import Baseline
from bench.baselines._conv import ConvArguments, patches
from bench.baselines._oja import EPS
from bench.baselines.library import correlation

BASELINE = Baseline(
    "B8",
    "SWTA-FH",
    "Lagani et al., FastHebb, SISAP 2022 (arXiv 2207.03172)",
    "z = softmax(((cos + 1) / 2)^2 / T), c = z / sum_p z, H = sum c z x - (sum c z) W",
)


@torch.no_grad()
def delta(
    x: Tensor,
    weight: Tensor,
    temperature: float = 0.02,
    patch_norms: str = "box",
    **conv: Unpack[ConvArguments],
) -> Tensor:
    """H of weight's shape, not normalised; the cosine with a patch of zeros is 0.

    Raises:
        ValueError: ``patch_norms`` is neither "box" nor "unfold".
    """
    if patch_norms not in ("box", "unfold"):
        raise ValueError(f"patch_norms must be 'box' or 'unfold', got {patch_norms!r}")
    u = F.conv2d(x, weight, **conv)
    columns = patches(x, weight, **conv) if patch_norms == "unfold" else None
    if columns is None:
        squares = _box(x, weight, **conv)
    else:
        squares = columns.square().sum(1).view(u.shape[0], 1, *u.shape[2:])
    coefficients = _coefficients(u, squares, weight, temperature)
    if columns is None:
        A = correlation(x, coefficients, weight, **conv)
    else:
        A = torch.einsum("bnp,bdp->nd", coefficients.flatten(2), columns).view_as(weight)
    return A - coefficients.sum((0, 2, 3)).view(-1, 1, 1, 1) * weight


def _box(x: Tensor, weight: Tensor, **conv: Unpack[ConvArguments]) -> Tensor:
    """Squared norms of the patches, (B, 1, OH, OW)."""
    ones = x.new_ones((1, 1, *weight.shape[2:]))
    return F.conv2d(x.square().sum(1, keepdim=True), ones, **conv)


def _coefficients(u: Tensor, squares: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """c z, of u's shape."""
    norms = weight.flatten(1).norm(dim=1).view(-1, 1, 1) * squares.clamp_min(0.0).sqrt()
    cosine = u / norms.clamp_min(EPS)
    z = torch.softmax(((cosine + 1) / 2).square() / temperature, dim=1)
    return z.square() / (z.sum((0, 2, 3), keepdim=True) + EPS)
