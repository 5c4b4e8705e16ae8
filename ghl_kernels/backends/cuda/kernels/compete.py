"""The competition and what is derived from it, by the kernels of csrc/cuda/compete*.cu."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ghl_kernels import _native
from ghl_kernels.backends.cuda.kernels.arguments import ACTIVITY, DTYPE, addresses, queue, state_arguments
from ghl_kernels.backends.gpu import competition
from ghl_kernels.backends.gpu.layout import Responses
from ghl_kernels.backends.gpu.state import State
from ghl_kernels.rule import Competition


def _layout(view: Responses, inner: int) -> tuple[int, int, int]:
    """Strides of (batch item, unit, position) where an item has ``inner`` positions."""
    if view.inner > 1:
        return view.batch_stride, view.unit_stride, view.position_stride
    # one stride serves all positions
    return inner * view.batch_stride, view.unit_stride, view.batch_stride


def _arguments(u: Responses, inner: int, competition: Competition) -> dict[str, Any]:
    """u cut into items of ``inner`` positions, and the rule."""
    return {
        "u": u.tensor,
        "u_dtype": DTYPE[u.tensor.dtype],
        "u_layout": _layout(u, inner),
        "batch": u.positions // max(inner, 1),
        "units": u.units,
        "positions": inner,
        "activity": ACTIVITY[competition.activity],
        "winners": competition.winners,
        "temperature": competition.temperature,
        "anti": competition.anti,
    }


def _items(*views: Responses) -> int:
    """Positions of an item that suits all views: at most one number above 1 may stand in them."""
    return max((view.inner for view in views if view.inner > 1), default=views[0].positions)


def _compete(
    u: Responses,
    competition: Competition,
    y: Responses | None = None,
    keeps_infinity: bool = False,
    **outputs: Tensor | None,
) -> None:
    """Write y and those outputs of the kernel, tensors by name, that are given."""
    inner = _items(u, y) if y else _items(u)
    activities: dict[str, Any] = {}
    if y is not None:
        activities = {"y": y.tensor, "y_layout": _layout(y, inner)}
    queue(
        _native.load_cuda().compete,
        **_arguments(u, inner, competition),
        **activities,
        keeps_infinity=keeps_infinity,
        **outputs,
    )


state = functools.partial(competition.state, _compete)
full_state = functools.partial(competition.full_state, _compete)
activities = functools.partial(competition.activities, _compete)
winner_lists = functools.partial(competition.winner_lists, _compete)


def activity_sums(u: Responses, state: State, competition: Competition) -> Tensor:
    """sum_p y_p, (N,) in float32; the positions are split among blocks and added in a fixed order."""
    cuda = _native.load_cuda()
    arguments = _arguments(u, _items(u), competition)
    total = u.tensor.new_empty(u.units, dtype=torch.float32)
    workspace = u.tensor.new_empty(cuda.activity_sums_workspace(**addresses(arguments)), dtype=torch.uint8)
    queue(cuda.activity_sums, **arguments, **state_arguments(state), sum=total, workspace=workspace)
    return total
