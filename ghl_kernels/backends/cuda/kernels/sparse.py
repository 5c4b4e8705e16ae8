"""A from the winners' lists: every unit adds up the patches that it won, at k / N of the dense product."""

from __future__ import annotations

import torch
from torch import Tensor

from ghl_kernels import _native
from ghl_kernels.backends.cuda.kernels.arguments import DTYPE, addresses, patch_arguments, place_of, queue
from ghl_kernels.backends.gpu.layout import Patches, new_sum
from ghl_kernels.backends.gpu.memory import workspace


def correlate(
    x: Patches, unit: Tensor, activity: Tensor, units: int, sum_activity: bool
) -> tuple[Tensor, Tensor | None]:
    """A (units, channels per group, taps), the sum of y_pn patch_p over the positions p that n won; sum y_pn.

    ``unit`` (P, k) int32 and ``activity`` (P, k) float32 are the winners' lists; a unit sees the channels of
    its group. A first unit of -1 marks a position whose u is NaN, and makes everything NaN, as in a dense
    product; so does a unit that does not exist. Both results are float32 and contiguous; the second is None
    unless ``sum_activity``.

    Raises:
        torch.OutOfMemoryError: no memory for the workspace, with its size.
    """
    cuda, device = _native.load_cuda(), activity.device
    A = new_sum(x, units, x.channels)
    sums = torch.empty(units, dtype=torch.float32, device=device) if sum_activity else None
    unit, activity = unit.contiguous(), activity.contiguous()
    arguments = {
        **patch_arguments(x),
        "winner_unit": unit,
        "winner_activity": activity,
        "winners": unit.shape[1],
        "x_dtype": DTYPE[x.tensor.dtype],
        "units": units,
        "a": A,
        "a_layout": A.stride(),
        "activity_sum": sums,
    }
    purpose = f"the sums of {units} units of {x.channels * x.taps} inputs over {unit.numel()} winners"
    floats = -(-cuda.sparse_workspace(**addresses(arguments), **place_of(activity)) // 4)
    scratch = workspace((floats,), device, purpose)
    queue(cuda.sparse, **arguments, workspace=scratch)
    return A, sums
