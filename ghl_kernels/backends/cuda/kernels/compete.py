"""The competition and what is derived from it, by the kernels of csrc/cuda/compete*.cu."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ghl_kernels import _native
from ghl_kernels.backends.cuda.kernels.arguments import ACTIVITY, DTYPE, address, state_addresses, stream_of
from ghl_kernels.backends.gpu.layout import Responses, responses
from ghl_kernels.backends.gpu.state import State, needs
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
        "u": u.tensor.data_ptr(),
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
        activities = {
            "y": y.tensor.data_ptr(),
            "y_dtype": DTYPE[y.tensor.dtype],
            "y_layout": _layout(y, inner),
        }
    _native.load_cuda().compete(
        **_arguments(u, inner, competition),
        **activities,
        keeps_infinity=keeps_infinity,
        **{name: address(tensor) for name, tensor in outputs.items()},
        **stream_of(u.tensor),
    )


def state(u: Responses, competition: Competition) -> State:
    """The state of every position, those fields that state.needs names; each (P,)."""
    dtypes = (torch.float32, torch.int32, torch.float32, torch.int32)
    fields = State(
        *(
            u.tensor.new_empty(u.positions, dtype=dtype) if needed else None
            for needed, dtype in zip(needs(competition), dtypes, strict=True)
        )
    )
    _compete(u, competition, **fields._asdict())
    return fields


def full_state(u: Responses, competition: Competition) -> tuple[Tensor, Tensor, Tensor]:
    """(threshold, cut, logsumexp over the winners), each (P,), whatever the activity; 0 winners: all win.

    NaN in u: threshold and logsumexp are NaN, cut is -1.
    """
    threshold = u.tensor.new_empty(u.positions, dtype=torch.float32)
    logsumexp = torch.empty_like(threshold)
    cut = u.tensor.new_empty(u.positions, dtype=torch.int32)
    everything = Competition("softmax", competition.winners or u.units, competition.temperature, False)
    _compete(u, everything, keeps_infinity=True, threshold=threshold, cut=cut, logsumexp=logsumexp)
    return threshold, cut, logsumexp


def activities(u: Tensor, dim: int, competition: Competition, dtype: torch.dtype) -> Tensor:
    """y = c(u) in ``dtype``, u's or float32; shape and layout of u; units along ``dim``."""
    y = torch.empty_like(u, dtype=dtype)
    source, target = responses(u, dim), responses(y, dim)
    if source.inner != target.inner and min(source.inner, target.inner) > 1:
        source = responses(u.contiguous(), dim)
        target = responses(torch.empty(u.shape, dtype=dtype, device=u.device), dim)
    _compete(source, competition, target)
    return y if target.tensor is y else y.copy_(target.tensor)


def winner_lists(u: Responses, competition: Competition) -> tuple[Tensor, Tensor]:
    """(unit int32, activity float32), (P, k): the winners in ascending order; NaN in u: the first is -1."""
    unit = u.tensor.new_empty((u.positions, competition.winners), dtype=torch.int32)
    listed = u.tensor.new_empty(unit.shape, dtype=torch.float32)
    _compete(u, competition, winner_unit=unit, winner_activity=listed)
    return unit, listed


def activity_sums(u: Responses, state: State, competition: Competition) -> Tensor:
    """sum_p y_p, (N,) in float32; the positions are split among blocks and added in a fixed order."""
    cuda = _native.load_cuda()
    arguments = _arguments(u, _items(u), competition)
    total = u.tensor.new_empty(u.units, dtype=torch.float32)
    workspace = u.tensor.new_empty(cuda.activity_sums_workspace(**arguments), dtype=torch.uint8)
    cuda.activity_sums(
        **arguments,
        **state_addresses(state),
        sum=total.data_ptr(),
        workspace=workspace.data_ptr(),
        **stream_of(u.tensor),
    )
    return total
