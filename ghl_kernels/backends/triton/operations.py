"""The operations of backends/gpu on Triton's kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from ghl_kernels.backends.cuda.operations import OPERATIONS as CUDA_OPERATIONS
from ghl_kernels.backends.gpu.layout import Patches, Responses
from ghl_kernels.backends.gpu.operations import Operations
from ghl_kernels.backends.gpu.state import State
from ghl_kernels.backends.triton import choice, config
from ghl_kernels.backends.triton.arch import of as arch_of
from ghl_kernels.backends.triton.kernels import correlate
from ghl_kernels.rule import Competition


class TritonOperations(Operations):
    """Kernels that Triton compiles for the tensors' device."""

    competing, depthwise = choice.Competing(), choice.Depthwise()
    sparse, epilogue = choice.Sparse(), choice.Epilogue()

    def correlate(
        self,
        x: Patches,
        u: Responses,
        grad_u: Responses | None,
        state: State | None,
        competition: Competition,
        shape: tuple[int, ...],
    ) -> tuple[Tensor, Tensor | None]:
        if self._takes_cuda(x, u, grad_u):
            return CUDA_OPERATIONS.correlate(x, u, grad_u, state, competition, shape)
        if state is None and not correlate.makes_state(x, u, grad_u, competition):
            state = self.competing.state(u, competition)
        A, G = correlate.correlate(x, u, grad_u, state, competition, channels=shape[1])
        assert A is not None
        return A.view(shape), None if G is None else G.view(shape)

    def _takes_cuda(self, x: Patches, u: Responses, grad_u: Responses | None) -> bool:
        problem = _problem(x, u.units, pair=grad_u is not None)
        rows = all(view.unit_stride == 1 for view in (u, grad_u) if view is not None)
        prefers_cuda = config.prefers_cuda(problem, arch_of(x.tensor.device), rows=rows)
        return (prefers_cuda and choice.may_take_cuda(x.tensor)) or self.takes_few_channels(x, u, grad_u)

    def correlate_winners(
        self, x: Patches, unit: Tensor, activity: Tensor, grad_u: Responses
    ) -> tuple[Tensor, Tensor]:
        return CUDA_OPERATIONS.correlate_winners(x, unit, activity, grad_u)

    def takes_winners(self, x: Patches, grad_u: Responses, winners: int) -> bool:
        return choice.may_take_cuda(x.tensor) and CUDA_OPERATIONS.takes_winners(x, grad_u, winners)

    def takes_few_channels(self, x: Patches, u: Responses, grad_u: Responses | None) -> bool:
        problem = _problem(x, u.units, pair=grad_u is not None)
        prefers_cuda = config.prefers_few_channels(problem, arch_of(x.tensor.device))
        may_take = prefers_cuda and choice.may_take_cuda(x.tensor)
        return may_take and CUDA_OPERATIONS.takes_few_channels(x, u, grad_u)

    def takes_library(self, x: Patches, units: int, *, pair: bool) -> bool:
        problem = _problem(x, units, pair=pair)
        return config.prefers_library(problem, arch_of(x.tensor.device), is_conv=x.dims > 0)

    def leaves_grad_to_library(self, x: Patches, u: Responses, grad_u: Responses) -> bool:
        aligned = correlate.unit_vector(u, grad_u, u.units // x.groups) > 1
        problem = _problem(x, u.units, pair=True)._replace(aligned=aligned)
        leaves_G = config.leaves_grad_to_library(problem, arch_of(x.tensor.device))
        return leaves_G and not self._takes_cuda(x, u, grad_u)

    def l2_bytes(self, device: torch.device) -> int:
        return arch_of(device).l2


def _problem(x: Patches, units: int, *, pair: bool) -> config.Problem:
    """The correlation before it is known where its state will be computed."""
    return config.Problem(
        units // x.groups,
        x.taps * x.channels,
        x.channels,
        x.positions,
        x.groups,
        x.tensor.element_size(),
        results=2 if pair else 1,
        makes_y=True,
        state_here=False,
    )


OPERATIONS = TritonOperations()
