"""The tail of most baselines: Oja's decay, then the norm over the layer."""

from __future__ import annotations

from torch import Tensor

EPS = 1e-30


def decayed(A: Tensor, decay: Tensor, weight: Tensor) -> Tensor:
    """H = (A - decay W) / (max |A - decay W| + eps) from decay (N,), one number a unit; weight's shape."""
    H = A - decay.view(-1, *[1] * (weight.dim() - 1)) * weight
    return H / (H.abs().max() + EPS)


def oja(A: Tensor, weight: Tensor) -> Tensor:
    """H with Oja's decay <W_n, A_n>, which equals sum_p y_np u_np where u = W x has no bias."""
    return decayed(A, (weight * A).flatten(1).sum(1), weight)
