"""A = sum_p y_p x_p^T and G = sum_p (dL/du)_p x_p^T in one pass over x, by csrc/cuda/pair*.cu."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ghl_kernels import _native
from ghl_kernels.backends.cuda.kernels import compete
from ghl_kernels.backends.cuda.kernels.arguments import (
    DTYPE,
    addresses,
    competition_arguments,
    patch_arguments,
    place_of,
    queue,
    response_arguments,
    state_arguments,
)
from ghl_kernels.backends.gpu.layout import Patches, Responses, new_sum, sum_strides, three
from ghl_kernels.backends.gpu.memory import workspace
from ghl_kernels.backends.gpu.precision import allows_tf32
from ghl_kernels.backends.gpu.state import State, lift_of
from ghl_kernels.rule import Competition

FORM = {"automatic": 0, "mma": 1, "wgmma": 2, "narrow": 3}
_SOMEWHERE = 256  # an address of data that nobody reads, aligned as torch's is
_ANY = Competition("softmax", 0, 1.0, False)
# Estimated from the rates of matrix units and memory; tf32 has half the rate of 16 bits.
_INTENSITY = 800.0


def takes_tf32(x: Patches) -> bool:
    """Whether float32 is multiplied in one pass of tf32, as torch allows it to its own products on GPUs."""
    return x.tensor.dtype == torch.float32 and x.tensor.is_cuda and allows_tf32(x.dims > 0)


def prefers_library(x: Patches, units: int, *, pair: bool) -> bool:
    """Whether y is to be written and the library's product called, where that is equally accurate.

    Decided by arithmetic intensity, FLOP per byte moved: above the threshold the library's matrix rate
    decides, below it the bytes do. A convolution in 16 bits rounds A to them and is never chosen; float32
    by tf32 alone is, since the library multiplies it without tensor cores otherwise.
    """
    itemsize = x.tensor.element_size()
    if x.dims > 0 if itemsize == 2 else not takes_tf32(x):
        return False
    results, columns = (2 if pair else 1), x.taps * x.channels
    flops = 2.0 * results * x.positions * units * columns
    moved: float = itemsize * x.positions * (x.groups * x.channels + results * units)
    moved += 4.0 * results * units * columns
    return flops / max(moved, 1.0) > (_INTENSITY if itemsize == 2 else _INTENSITY / 2)


def correlate(
    x: Patches,
    u: Responses | None,
    grad: Responses | None,
    state: State | None,
    competition: Competition,
    *,
    channels: int,
    form: str = "automatic",
) -> tuple[Tensor | None, Tensor | None]:
    """A (if u is given) and G (if grad is), float32 (units, channels, taps).

    ``channels`` of a group are wanted; those of x from there on are padding. Fast where the channels of x
    are contiguous, or few. ``state`` None: it is computed, in this kernel where makes_state says so.
    ``form``: the kernel for sm_80 and newer ("mma"), the one for few columns and units ("narrow"), the one
    for sm_90 ("wgmma"), or whichever suits the layer and the device.
    """
    some = u or grad
    assert some is not None
    if u is not None and state is None and not makes_state(x, u, grad, competition, channels, form):
        state = compete.state(u, competition)
    A = new_sum(x, some.units, channels) if u else None
    G = new_sum(x, some.units, channels) if grad else None
    arguments = _arguments(x, u, grad, competition, channels, form)
    lift = lift_of(x.tensor.dtype, competition) if A is not None else 1.0
    _queue(x, some, {**arguments, **state_arguments(state), "lift": lift, "a": A, "g": G})
    if A is not None and lift != 1.0:
        A.mul_(1.0 / lift)
    return A, G


def correlate_winners(x: Patches, unit: Tensor, activity: Tensor, grad: Responses) -> tuple[Tensor, Tensor]:
    """A from the winners' lists (P, k), and G, as correlate; what takes_winners says yes to."""
    A, G = (new_sum(x, grad.units, x.channels) for _ in range(2))
    lists = {"winner_unit": unit.contiguous(), "winner_activity": activity.contiguous()}
    arguments = _arguments(x, None, grad, _ANY, x.channels, "narrow")
    _queue(x, grad, {**arguments, **lists, "winners": unit.shape[1], "a": A, "g": G})
    return A, G


def _queue(x: Patches, some: Responses, arguments: dict[str, Any]) -> None:
    """Queue the kernel, with the memory that it works in."""
    size = _native.load_cuda().pair_workspace(**addresses(arguments), **place_of(x.tensor))
    columns = x.taps * x.channels
    what = f"the sums of {some.units} units over {columns} inputs at {some.positions} positions"
    scratch = workspace((-(-size // 4),), x.tensor.device, what) if size else None
    queue(_native.load_cuda().pair, **arguments, workspace=scratch)


def makes_state(
    x: Patches,
    u: Responses,
    grad: Responses | None,
    competition: Competition,
    channels: int,
    form: str = "automatic",
) -> bool:
    """Whether the kernel computes the softmax itself: a tile then holds all units of a position."""
    arguments = _described(x, u, grad, competition, channels, form)
    return bool(_native.load_cuda().pair_makes_state(**arguments, **place_of(x.tensor)))


def takes_few_columns(x: Patches, u: Responses, grad: Responses | None) -> bool:
    """Whether an automatic choice is the kernel for few columns and units, for which x need not be padded."""
    return _is_narrow(**_described(x, u, grad, _ANY, x.channels, "automatic"), **place_of(x.tensor))


def takes_winners(x: Patches, grad: Responses, winners: int) -> bool:
    """Whether A from so many winners of each position and G are the sums of one kernel."""
    described = _described(x, None, grad, _ANY, x.channels, "automatic")
    described |= {"winners": winners, "a": described["g"]}
    return _is_narrow(**described, **place_of(x.tensor))


def pairs_lists(
    device: torch.device, dtype: torch.dtype, units: int, channels: int, kernel: tuple[int, ...], winners: int
) -> bool:
    """As takes_winners, of a convolution of one group whose x and dL/du will be in channels_last."""
    if dtype not in DTYPE:
        return False
    *_, height, width = size = three(kernel, 1)
    columns = channels * math.prod(size)
    return _is_narrow(
        batch=1,
        channels=channels,
        in_size=size,
        kernel=size,
        dtype=DTYPE[dtype],
        x=_SOMEWHERE,
        x_stride_batch=columns,
        x_stride_channel=1,
        x_stride=(height * width * channels, width * channels, channels),
        units=units,
        grad=_SOMEWHERE,
        grad_layout=(1, units, 0, 1),
        winners=winners,
        a=_SOMEWHERE,
        g=_SOMEWHERE,
        result_layout=(columns, 1, channels),
        result_channels=channels,
        device=device.index or 0,
        stream=0,
    )


def _is_narrow(**described: Any) -> bool:
    return bool(_native.load_cuda().pair_form(**described) == FORM["narrow"])


def _described(
    x: Patches,
    u: Responses | None,
    grad: Responses | None,
    competition: Competition,
    channels: int,
    form: str,
) -> dict[str, Any]:
    """A problem whose results have no place yet: the addresses of x stand for theirs, which are not asked."""
    results = {name: x.tensor for name, view in (("a", u), ("g", grad)) if view is not None}
    return addresses(_arguments(x, u, grad, competition, channels, form) | results)


def _arguments(
    x: Patches,
    u: Responses | None,
    grad: Responses | None,
    competition: Competition,
    channels: int,
    form: str,
) -> dict[str, Any]:
    """Everything but the state, the results and the workspace."""
    some = u or grad
    assert some is not None
    return {
        **patch_arguments(x),
        "dtype": DTYPE[x.tensor.dtype],
        "tf32": takes_tf32(x),
        "units": some.units,
        "result_layout": sum_strides(x, channels),
        "result_channels": channels,
        **response_arguments("u", u),
        **response_arguments("grad", grad),
        **competition_arguments(competition),
        "form": FORM[form],
    }
