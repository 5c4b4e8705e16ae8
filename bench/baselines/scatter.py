"""The correlation of k winners by scatter: every patch is added to the rows of its own winners.

    A_n = sum over the positions p that n wins of y_np x_p

Name: B11, "sparse scatter". Source: the CUDA code of Liang et al., "Can a Fruit Fly Learn Word Embeddings?",
ICLR 2021, adds the patches of each winner with atomics; here index_add_, which on a GPU is that. It stands
for A of ``HebbianRule.kwta(k)``. Its cost is k / N of a dense pass; it holds the patches twice and, one
winner at a time, their products with the activity, P D numbers.
"""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor

from bench.baselines._baseline import Baseline
from bench.baselines._conv import ConvArguments, patch_rows

BASELINE = Baseline(
    "B11",
    "sparse scatter",
    "Liang et al., ICLR 2021, in stock operations",
    "A[n] += y_np x_p for each winner n of each position p",
)


@torch.no_grad()
def correlation(
    x: Tensor, unit: Tensor, activity: Tensor, weight: Tensor, **conv: Unpack[ConvArguments]
) -> Tensor:
    """A, of weight's shape and activity's dtype.

    Args:
        x: (B, C, H, W).
        unit, activity: winning units (int) and their activities, (P, k) with the positions in the order
            (b, oh, ow), as ``torch.ops.ghl.winners`` returns them for finite u.
        weight: only its shape is read.
    """
    rows = patch_rows(x, weight, **conv)
    A = activity.new_zeros((weight.shape[0], rows.shape[1]))
    for winner in range(unit.shape[1]):
        A.index_add_(0, unit[:, winner], activity[:, winner, None] * rows)
    return A.view(weight.shape)
