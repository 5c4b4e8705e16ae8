"""What is asked of a competition, and where its results go; ``run`` is a backend's kernel."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from ghl_kernels.backends.gpu.layout import Responses, responses
from ghl_kernels.backends.gpu.state import State, needs
from ghl_kernels.rule import Competition


class Run(Protocol):
    """Writes y, and those outputs that are given: the fields of State, winner_unit, winner_activity.

    A NaN in u marks its position, with NaN in threshold and logsumexp. A logsumexp of +inf, where softmax is
    NaN, becomes NaN too unless the kernel ``keeps_infinity``.
    """

    def __call__(
        self,
        u: Responses,
        competition: Competition,
        y: Responses | None = None,
        keeps_infinity: bool = False,
        **outputs: Any,
    ) -> None: ...


def state(run: Run, u: Responses, competition: Competition) -> State:
    """The state of every position, those fields that state.needs names; each (P,)."""
    dtypes = (torch.float32, torch.int32, torch.float32, torch.int32)
    fields = State(
        *(
            u.tensor.new_empty(u.positions, dtype=dtype) if needed else None
            for needed, dtype in zip(needs(competition), dtypes, strict=True)
        )
    )
    run(u, competition, **fields._asdict())
    return fields


def full_state(run: Run, u: Responses, competition: Competition) -> tuple[Tensor, Tensor, Tensor]:
    """(threshold, cut, logsumexp over the winners), each (P,), whatever the activity; 0 winners: all win.

    NaN in u: threshold and logsumexp are NaN, cut is -1.
    """
    threshold = u.tensor.new_empty(u.positions, dtype=torch.float32)
    logsumexp = torch.empty_like(threshold)
    cut = u.tensor.new_empty(u.positions, dtype=torch.int32)
    everything = Competition("softmax", competition.winners or u.units, competition.temperature, False)
    run(u, everything, keeps_infinity=True, threshold=threshold, cut=cut, logsumexp=logsumexp)
    return threshold, cut, logsumexp


def activities(run: Run, u: Tensor, dim: int, competition: Competition) -> Tensor:
    """y = c(u), of u's dtype, shape and layout; units along ``dim``."""
    y = torch.empty_like(u)
    source, target = responses(u, dim), responses(y, dim)
    if source.inner != target.inner and min(source.inner, target.inner) > 1:
        source = responses(u.contiguous(), dim)
        target = responses(torch.empty(u.shape, dtype=u.dtype, device=u.device), dim)
    run(source, competition, target)
    return y if target.tensor is y else y.copy_(target.tensor)


def winner_lists(run: Run, u: Responses, competition: Competition) -> tuple[Tensor, Tensor]:
    """(unit int32, activity float32), (P, k): the winners in ascending order; NaN in u: the first is -1."""
    unit = u.tensor.new_empty((u.positions, competition.winners), dtype=torch.int32)
    listed = u.tensor.new_empty(unit.shape, dtype=torch.float32)
    run(u, competition, winner_unit=unit, winner_activity=listed)
    return unit, listed
