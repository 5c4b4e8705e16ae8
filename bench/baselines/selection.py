"""Winners by argmax, by a threshold and by rank, in stock PyTorch operations.

    B7a   y = 1 at argmax u, else 0
    B7b   y_j = u_j where u_j >= the k-th largest of its position, else 0
    B7d   y = 1 at rank 1, -strength at rank r, else 0          by topk(r), or by a full sort

Names: B7a, "one-hot argmax"; B7b, "kthvalue mask"; B7d, "Krotov ranks". Sources: hard winner-take-all and
k-winners layers as usually written; Krotov & Hopfield, "Unsupervised learning by competing hidden units",
PNAS 2019. B7a stands for the competition of ``HebbianRule.hard_wta()``, B7b for that of
``HebbianRule.kwta(k)`` where no value ties with the k-th largest (all that tie win); B7d is no HebbianRule.
The cost is a selection at every position, for the sort O(N log N) with values and indices of u's size,
and two to three passes over memory of u's size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bench.baselines._baseline import Baseline

_KROTOV = "Krotov & Hopfield, PNAS 2019"

BASELINES = (
    Baseline("B7a", "one-hot argmax", "hard winner-take-all in stock operations", "y = onehot(argmax u)"),
    Baseline("B7b", "kthvalue mask", "k-winners in stock operations", "y = u where u >= kthvalue(N - k + 1)"),
    Baseline("B7d", "Krotov ranks", _KROTOV, "y = 1 at rank 1, -strength at rank r, else 0"),
)


@torch.no_grad()
def one_hot_argmax(u: Tensor, dim: int = 1) -> Tensor:
    """1 at the largest u along ``dim`` (ties to the lowest index), 0 elsewhere; of u's shape and dtype."""
    return torch.zeros_like(u).scatter_(dim, u.argmax(dim, keepdim=True), 1.0)


@torch.no_grad()
def kwta_kthvalue(u: Tensor, k: int, dim: int = 1) -> Tensor:
    """u where it is at least the k-th largest along ``dim``, 0 elsewhere: more than k where values tie."""
    units = u.shape[dim]
    if not 1 <= k <= units:
        raise ValueError(f"k must be between 1 and the {units} units, got {k}")
    threshold = u.kthvalue(units - k + 1, dim, keepdim=True).values
    return torch.where(u >= threshold, u, 0.0)


@torch.no_grad()
def krotov_topk(u: Tensor, rank: int, strength: float, dim: int = 1) -> Tensor:
    """1 at the largest u along ``dim``, -strength at the ``rank``-th largest, 0 elsewhere; by topk(rank)."""
    _check_rank(u, rank, dim)
    return _ranks(u, u.topk(rank, dim).indices, rank, strength, dim)


@torch.no_grad()
def krotov_sort(u: Tensor, rank: int, strength: float, dim: int = 1) -> Tensor:
    """As ``krotov_topk``, by a full sort along ``dim``."""
    _check_rank(u, rank, dim)
    return _ranks(u, u.sort(dim, descending=True).indices, rank, strength, dim)


def _ranks(u: Tensor, order: Tensor, rank: int, strength: float, dim: int) -> Tensor:
    first, other = order.narrow(dim, 0, 1), order.narrow(dim, rank - 1, 1)
    return torch.zeros_like(u).scatter_(dim, first, 1.0).scatter_(dim, other, -strength)


def _check_rank(u: Tensor, rank: int, dim: int) -> None:
    if not 2 <= rank <= u.shape[dim]:
        raise ValueError(f"rank must be between 2 and the {u.shape[dim]} units, got {rank}")
