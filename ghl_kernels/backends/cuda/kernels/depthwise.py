"""A and G of a depthwise convolution: one channel per group, so there is nothing to multiply matrices of."""

from __future__ import annotations

import torch
from torch import Tensor

from ghl_kernels import _native
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
from ghl_kernels.backends.gpu.layout import Patches, Responses
from ghl_kernels.backends.gpu.memory import workspace
from ghl_kernels.backends.gpu.state import State
from ghl_kernels.rule import Competition


def correlate(
    x: Patches, u: Responses, grad: Responses | None, state: State, competition: Competition, want_A: bool
) -> tuple[Tensor | None, Tensor | None]:
    """A (if ``want_A``) and G (if ``grad`` is given), float32 (units, 1, taps), of x with groups = channels.

    Unit n sees channel n // (units / channels). x, u and dL/du may have any strides; channels_last is fast.

    Raises:
        torch.OutOfMemoryError: no memory for the workspace, with its size.
    """
    cuda, device, shape = _native.load_cuda(), x.tensor.device, (u.units, 1, x.taps)
    A = torch.empty(shape, dtype=torch.float32, device=device) if want_A else None
    G = torch.empty(shape, dtype=torch.float32, device=device) if grad else None
    arguments = {
        **patch_arguments(x),
        **state_arguments(state),
        "dtype": DTYPE[x.tensor.dtype],
        "units": u.units,
        **response_arguments("u", u),
        **response_arguments("grad", grad),
        **competition_arguments(competition),
        "a": A,
        "g": G,
        "result_layout": (x.taps, x.taps, 1),
    }
    purpose = f"the sums of {u.units} units over {x.taps} taps at {u.positions} positions"
    size = cuda.depthwise_workspace(**addresses(arguments), **place_of(x.tensor))
    scratch = workspace((size // 4,), device, purpose)
    queue(cuda.depthwise, **arguments, workspace=scratch)
    return A, G
