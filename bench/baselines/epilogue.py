"""From the sums to the step, elementwise operation by elementwise operation.

    v_n = <W_n, A_n>,  H = A - v W,  m = max |H|
    gated = |H| / (m + 1e-30) * sign(G)
    W <- W - lr (gated + weight_decay W)

Name: B13, "gate and step in stock operations". Source: the formulas of arXiv 2601.21367; the step is
torch.optim.SGD's, foreach. It stands for what follows A and G in ``HebbianRule.ghl`` or
``HebbianRule.kwta``: Oja's decay, norm over the layer, sign gate. Its cost is 11 launches a layer and 2 for
the step of all layers: 27 readings and writings of a tensor of the weight's size, where two passes need 6.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bench.baselines._baseline import Baseline
from bench.baselines._oja import oja

BASELINE = Baseline(
    "B13",
    "gate and step in stock operations",
    "torch operators and a foreach SGD",
    "H = A - <W, A> W over max |H|, W -= lr (|H| sign(G) + wd W)",
)


@torch.no_grad()
def gate(grad: Tensor, A: Tensor, weight: Tensor) -> Tensor:
    """The gated gradient |H| * sign(grad), of weight's shape, from finite grad and A of that shape."""
    return oja(A, weight).abs() * grad.sign()


@torch.no_grad()
def step_(
    weights: Sequence[Tensor],
    sums: Sequence[Tensor],
    grads: Sequence[Tensor],
    lr: float,
    weight_decay: float = 0.0,
) -> None:
    """One step of SGD on the gated gradients of several layers; ``weights`` change in place.

    ``sums`` holds A and ``grads`` G of every layer, each of its weight's shape.

    Raises:
        ValueError: lists of different lengths.
    """
    gated = [gate(G, A, weight) for G, A, weight in zip(grads, sums, weights, strict=True)]
    if weight_decay:
        torch._foreach_add_(gated, list(weights), alpha=weight_decay)
    torch._foreach_add_(list(weights), gated, alpha=-lr)
