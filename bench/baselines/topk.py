"""k-WTA by torch.topk and scatter.

    y_j = u_j  if u_j is among the k largest of its position, else 0

Name: B7c, "topk + scatter". Source: the usual k-winners layer (for example Ahmad & Scheinkman, "How Can
We Be So Dense? The Benefits of Using Highly Sparse Representations", 2019) written with stock PyTorch
operations. It stands for the competition of ``HebbianRule.kwta(k)``; which of several equal values wins is
up to topk. Its cost is a selection at every position and three passes over memory of u's size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bench.baselines._baseline import Baseline

BASELINE = Baseline(
    "B7c",
    "topk + scatter",
    "Ahmad & Scheinkman, 2019, in stock operations",
    "y = scatter(topk(u, k))",
)


@torch.no_grad()
def kwta_topk(u: Tensor, k: int, dim: int = 1) -> Tensor:
    """u where it is among the k largest along ``dim``, 0 elsewhere; same shape, dtype and memory format."""
    values, indices = u.topk(k, dim=dim)
    return torch.zeros_like(u).scatter_(dim, indices, values)
