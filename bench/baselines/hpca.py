"""Hebbian principal components: Sanger's rule on rectified responses.

    r = max(u, 0)
    H = (R X^T - tril(R R^T) W) / P                                  delta
    H_n = mean_p r_np (x_p - sum_{m <= n} r_mp w_m)                  naive_delta, the same number by number

Name: B9, "HPCA-FH". Source: Sanger, "Optimal unsupervised learning in a single-layer linear feedforward
neural network", 1989; reordered by Lagani et al., "FastHebb: Scaling Hebbian Training of Deep Neural Networks
to ImageNet Level", SISAP 2022 (arXiv 2207.03172). It stands for ``HebbianRule.hpca()``; the published factor
1 / sqrt(D) is left to the learning rate. Beside the forward its cost is one dense pass and two products of
2 N^2 P and 2 N^2 D operations, with the patches held twice; the naive form holds P x N x D numbers, three
times over.
"""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor

from bench.baselines._baseline import Baseline
from bench.baselines._conv import ConvArguments, patch_rows, unit_rows

BASELINE = Baseline(
    "B9",
    "HPCA-FH",
    "Sanger, 1989; Lagani et al., FastHebb, SISAP 2022 (arXiv 2207.03172)",
    "R = max(U, 0), H = (R X^T - tril(R R^T) W) / P",
)


@torch.no_grad()
def delta(x: Tensor, u: Tensor, weight: Tensor, **conv: Unpack[ConvArguments]) -> Tensor:
    """H of weight's shape, averaged over the positions."""
    R = torch.relu(unit_rows(u))  # (N, P)
    H = R @ patch_rows(x, weight, **conv) - (R @ R.t()).tril() @ weight.flatten(1)
    return (H / R.shape[1]).view_as(weight)


@torch.no_grad()
def naive_delta(x: Tensor, u: Tensor, weight: Tensor, **conv: Unpack[ConvArguments]) -> Tensor:
    """As ``delta``, with every patch's reconstruction by the units so far: (P, N, D) numbers."""
    r = torch.relu(unit_rows(u)).t().unsqueeze(2)  # (P, N, 1)
    reconstruction = (r * weight.flatten(1)).cumsum(1)
    error = patch_rows(x, weight, **conv).unsqueeze(1) - reconstruction
    return (r * error).mean(0).view_as(weight)
