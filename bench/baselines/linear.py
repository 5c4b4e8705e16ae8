"""A linear layer in stock operations: activities, then one matrix product.

    y = softmax over units of u / temperature, or u where it is among the k largest
    A = Y^T X,  G = (dL/dU)^T X,  H = A - <W, A> W over max |H|

Name: B12, "linear in stock operations". Source: the formulas of arXiv 2601.21367. It stands for
``HebbianRule.ghl(temperature)`` and ``HebbianRule.kwta(k)`` on a linear layer. A and G cost a dense pass
each, also with k winners; y, of u's size, is stored. A product leaves in its operands' dtype: in 16 bits A
is rounded to it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bench.baselines._baseline import Baseline
from bench.baselines._oja import oja
from bench.baselines.topk import kwta_topk

BASELINE = Baseline(
    "B12",
    "linear in stock operations",
    "torch.softmax or topk, then torch.mm",
    "A = Y^T X, H = A - <W, A> W over max |H|",
)


@torch.no_grad()
def delta(x: Tensor, u: Tensor, weight: Tensor, temperature: float = 1.0) -> Tensor:
    """H (N, D) from x (..., D) and u (..., N)."""
    return oja(_product(torch.softmax(u / temperature, dim=-1), x), weight)


@torch.no_grad()
def pair(
    x: Tensor, u: Tensor, grad_u: Tensor, weight: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(A, G), each (N, D), from x (..., D), u and dL/du (..., N); the weight is not read."""
    return _product(torch.softmax(u / temperature, dim=-1), x), _product(grad_u, x)


@torch.no_grad()
def kwta_delta(x: Tensor, u: Tensor, weight: Tensor, k: int) -> Tensor:
    """H (N, D) of k winners that keep their responses, by topk, scatter and the dense product."""
    return oja(_product(kwta_topk(u, k, dim=-1), x), weight)


def _product(y: Tensor, x: Tensor) -> Tensor:
    """sum_p y_p x_p^T, (N, D)."""
    return y.reshape(-1, y.shape[-1]).t() @ x.reshape(-1, x.shape[-1])
