"""The state of a competition, from which a kernel that has u makes y = c(u) without reading it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ghl_kernels.rule import Competition


class State(NamedTuple):
    """What is known of each position, float32 or int32 of shape (P,); None where the activity needs it not.

    A position whose u holds a NaN has NaN in threshold and in logsumexp.
    """

    threshold: Tensor | None  # k-th largest u; without winners NaN or 0, the mark of a bad position
    cut: Tensor | None  # last unit that wins a tie at the threshold
    logsumexp: Tensor | None  # of u / temperature over the winners
    first: Tensor | None  # unit of the largest u, lowest index of equals


def holds_activities(dtype: torch.dtype) -> bool:
    """Whether a kernel that rounds them to ``dtype`` loses no small ones."""
    return dtype != torch.float16


def lift_of(dtype: torch.dtype, competition: Competition) -> float:
    """What a kernel that rounds y to ``dtype`` should multiply it by before, and divide A by.

    float16 holds no activity of a softmax below 3e-8, and few bits of those below 6e-5, which may be all that
    a unit has. A power of two, so that nothing else is rounded.
    """
    return 1.0 if holds_activities(dtype) or competition.activity != "softmax" else 2.0**14


def needs(competition: Competition) -> tuple[bool, bool, bool, bool]:
    """Which fields of the State an activity is made from."""
    selects, softmax = competition.winners > 0, competition.activity == "softmax"
    return selects or not softmax, selects, softmax, competition.anti
