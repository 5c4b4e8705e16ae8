"""k-WTA by torch.topk and scatter.

    y_j = u_j  if u_j is among the k largest of its position, else 0

Name: B7c, "topk + scatter". Source: the usual k-winners layer (for example Ahmad & Scheinkman, "How Can
We Be So Dense? The Benefits of Using Highly Sparse Representations", 2019) written with stock PyTorch
operations. Which of several equal values wins is up to topk.
"""

from __future__ import annotations

import torch
from torch import Tensor


def kwta_topk(u: Tensor, k: int, dim: int = 1) -> Tensor:
    """u where it is among the k largest along ``dim``, 0 elsewhere; same shape, dtype and memory format."""
    values, indices = u.topk(k, dim=dim)
    return torch.zeros_like(u).scatter_(dim, indices, values)
