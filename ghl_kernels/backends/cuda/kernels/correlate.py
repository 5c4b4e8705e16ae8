"""A = sum_p y_p x_p^T and G = sum_p (dL/du)_p x_p^T in one pass over x, by csrc/cuda/pair.cu."""

from __future__ import annotations

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
from ghl_kernels.backends.gpu.layout import VECTOR, Patches, Responses
from ghl_kernels.backends.gpu.memory import workspace
from ghl_kernels.backends.gpu.precision import allows_tf32
from ghl_kernels.backends.gpu.state import State
from ghl_kernels.rule import Competition

FORM = {"automatic": 0, "mma": 1, "wgmma": 2}
# Estimated from the rates of matrix units and memory; tf32 has half the rate of 16 bits.
_INTENSITY = 800.0
_STATE_HERE_UNITS = 64  # of the tile that holds all units of a position


def state_here(u: Responses, groups: int, competition: Competition) -> bool:
    """Whether the kernel computes the softmax itself: a tile then holds all units of a position."""
    activity, winners, _, anti = competition
    is_plain_softmax = activity == "softmax" and not winners and not anti
    whole = u.is_aligned and u.units % VECTOR == 0 and u.tensor.data_ptr() % 16 == 0
    return is_plain_softmax and whole and groups == 1 and u.units <= _STATE_HERE_UNITS


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
    are contiguous. ``state`` None: it is computed, in this kernel where state_here says so. ``form``: the
    kernel for sm_80 and newer ("mma"), the one for sm_90 ("wgmma"), or whichever suits the device.
    """
    some = u or grad
    assert some is not None
    device = x.tensor.device
    if u is not None and state is None and not state_here(u, x.groups, competition):
        state = compete.state(u, competition)
    shape = (some.units, channels, x.taps)
    A = torch.empty(shape, dtype=torch.float32, device=device) if u else None
    G = torch.empty(shape, dtype=torch.float32, device=device) if grad else None
    arguments: dict[str, Any] = {
        **patch_arguments(x),
        "dtype": DTYPE[x.tensor.dtype],
        "tf32": takes_tf32(x),
        "units": some.units,
        "result_layout": (channels * x.taps, x.taps, 1),
        "result_channels": channels,
        **response_arguments("u", u),
        **response_arguments("grad", grad),
        **competition_arguments(competition),
        **state_arguments(state),
        "a": A,
        "g": G,
        "form": FORM[form],
    }
    cuda = _native.load_cuda()
    size = cuda.pair_workspace(**addresses(arguments), **place_of(x.tensor))
    columns = x.taps * x.channels
    what = f"the sums of {some.units} units over {columns} inputs at {some.positions} positions"
    scratch = workspace((-(-size // 4),), device, what) if size else None
    queue(cuda.pair, **arguments, workspace=scratch)
    return A, G
