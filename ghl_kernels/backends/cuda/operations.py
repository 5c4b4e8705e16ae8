"""The operations of backends/gpu on the kernels of csrc/cuda."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ghl_kernels.backends.cuda.kernels import compete, correlate, depthwise, epilogue, sparse
from ghl_kernels.backends.gpu.layout import Patches, Responses
from ghl_kernels.backends.gpu.operations import Operations
from ghl_kernels.backends.gpu.state import State, holds_activities
from ghl_kernels.rule import Competition

_HOST_L2 = 32 << 20


class CudaOperations(Operations):
    """Kernels that nvcc compiled, or a C++ compiler for the host."""

    competing, depthwise, sparse, epilogue = compete, depthwise, sparse, epilogue
    fused_sgd_ = staticmethod(epilogue.fused_sgd_)

    def correlate(
        self,
        x: Patches,
        u: Responses,
        grad_u: Responses | None,
        state: State | None,
        competition: Competition,
        shape: tuple[int, ...],
    ) -> tuple[Tensor, Tensor | None]:
        A, G = correlate.correlate(x, u, grad_u, state, competition, channels=shape[1])
        assert A is not None
        return A.view(shape), None if G is None else G.view(shape)

    def correlate_winners(
        self, x: Patches, unit: Tensor, activity: Tensor, grad_u: Responses
    ) -> tuple[Tensor, Tensor]:
        return correlate.correlate_winners(x, unit, activity, grad_u)

    def takes_winners(self, x: Patches, grad_u: Responses, winners: int) -> bool:
        return holds_activities(x.tensor.dtype) and correlate.takes_winners(x, grad_u, winners)

    def pairs_lists(
        self,
        device: torch.device,
        dtype: torch.dtype,
        units: int,
        channels: int,
        kernel: tuple[int, ...],
        winners: int,
    ) -> bool:
        """Whether conv_winner_pair of a layer in channels_last is one kernel."""
        return holds_activities(dtype) and correlate.pairs_lists(
            device, dtype, units, channels, kernel, winners
        )

    def takes_few_channels(self, x: Patches, u: Responses, grad_u: Responses | None) -> bool:
        return correlate.takes_few_columns(x, u, grad_u)

    def takes_library(self, x: Patches, units: int, *, pair: bool) -> bool:
        return correlate.prefers_library(x, units, pair=pair)

    def l2_bytes(self, device: torch.device) -> int:
        return _HOST_L2 if device.type == "cpu" else _l2_bytes(device)


@functools.cache
def _l2_bytes(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).L2_cache_size)


OPERATIONS = CudaOperations()
