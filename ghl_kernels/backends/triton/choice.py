"""Kernels of the CUDA backend in the place of Triton's, where they are faster: as a GPU has measured.

Under ``auto`` only: who chose Triton gets Triton. Where A and G are summed is decided in operations.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

from torch import Tensor

from ghl_kernels import _dispatch
from ghl_kernels.backends import cuda
from ghl_kernels.backends.cuda.kernels import compete as cuda_compete
from ghl_kernels.backends.cuda.kernels import depthwise as cuda_depthwise
from ghl_kernels.backends.cuda.kernels import epilogue as cuda_epilogue
from ghl_kernels.backends.cuda.kernels import sparse as cuda_sparse
from ghl_kernels.backends.gpu.jobs import Job
from ghl_kernels.backends.gpu.layout import Patches, Responses
from ghl_kernels.backends.gpu.state import State
from ghl_kernels.backends.triton import measured
from ghl_kernels.backends.triton.arch import of as arch_of
from ghl_kernels.backends.triton.kernels import compete, depthwise, epilogue, sparse
from ghl_kernels.rule import Competition


def may_take_cuda(tensor: Tensor) -> bool:
    """Whether the CUDA backend is allowed to, and can, run an operation on such tensors."""
    return _dispatch.is_automatic() and not cuda.refusal(tensor.device, tensor.dtype)


# Units up to which a warp or less has a position in registers, by the size of an element.
_IN_REGISTERS = {2: 1536, 4: 1024}
# Up to so many several positions share a warp.
_FEW = 128
_LONG = 1024


def _cuda_competes(function: str, units: int, itemsize: int, *, rows: bool) -> bool:
    """Whether the CUDA backend's competition is the faster one where nothing nearby was measured.

    On an H100 it took 0.15 to 0.9 of Triton's time with 384 and 1024 units; with 1536 in rows 0.93 for y,
    0.85 for the state, 0.35 for lists, in NCHW 0.25 for y, but 1.24 for the full state of rows; with 96,
    where several positions share a warp, 0.39 for the state of one winner. Sums of activities have been timed
    with 384 and 1024 only.
    """
    if function == "activity_sums":
        return _FEW < units <= _LONG
    if function == "full_state" and units > _LONG:
        return False
    return units <= _IN_REGISTERS.get(itemsize, 0) and (itemsize == 2 or rows or units > _FEW)


def _faster(
    key: str, tensor: Tensor, ours: ModuleType, cudas: ModuleType, *, on_hopper: bool = False
) -> ModuleType:
    """``on_hopper`` is what holds there for a key of which the table knows nothing."""
    arch = arch_of(tensor.device)
    is_faster = measured.verdict(arch.name, key, "cuda")
    if is_faster is None:
        is_faster = on_hopper and arch.has_wgmma
    return cudas if is_faster and may_take_cuda(tensor) else ours


def _competing(function: str, u: Tensor, units: int, unit_stride: int) -> ModuleType:
    itemsize, rows = u.element_size(), unit_stride == 1
    key = measured.competition_key(function, units, itemsize, rows=rows)
    on_hopper = _cuda_competes(function, units, itemsize, rows=rows)
    return _faster(key, u, compete, cuda_compete, on_hopper=on_hopper)


class Competing:
    """The functions of kernels/compete.py."""

    def activities(self, u: Tensor, dim: int, competition: Competition) -> Tensor:
        module = _competing("activities", u, u.shape[dim], u.stride(dim))
        return module.activities(u, dim, competition)

    def state(self, u: Responses, competition: Competition) -> State:
        return self._module("state", u).state(u, competition)

    def full_state(self, u: Responses, competition: Competition) -> tuple[Tensor, Tensor, Tensor]:
        return self._module("full_state", u).full_state(u, competition)

    def winner_lists(self, u: Responses, competition: Competition) -> tuple[Tensor, Tensor]:
        return self._module("winner_lists", u).winner_lists(u, competition)

    def activity_sums(self, u: Responses, state: State, competition: Competition) -> Tensor:
        return self._module("activity_sums", u).activity_sums(u, state, competition)

    def _module(self, function: str, u: Responses) -> ModuleType:
        return _competing(function, u.tensor, u.units, u.unit_stride)


class Depthwise:
    """The functions of kernels/depthwise.py."""

    def correlate(
        self,
        x: Patches,
        u: Responses,
        grad: Responses | None,
        state: State,
        competition: Competition,
        want_A: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        module = _faster("depthwise", x.tensor, depthwise, cuda_depthwise)
        return module.correlate(x, u, grad, state, competition, want_A)


class Sparse:
    """The functions of kernels/sparse.py.

    On an H100 the CUDA backend took 131 and 242 us for two layers of DeepHebb; Triton's gather alone 305 on
    an average, and the sort before it 35.
    """

    def correlate(
        self, x: Patches, unit: Tensor, activity: Tensor, units: int, sum_activity: bool
    ) -> tuple[Tensor, Tensor | None]:
        module = _faster("sparse", x.tensor, sparse, cuda_sparse, on_hopper=True)
        return module.correlate(x, unit, activity, units, sum_activity)


class Epilogue:
    """The functions of kernels/epilogue.py."""

    def delta(self, jobs: Sequence[Job]) -> None:
        self._module(jobs).delta(jobs)

    def gate_(self, jobs: Sequence[Job]) -> None:
        self._module(jobs).gate_(jobs)

    def learn_(self, jobs: Sequence[Job], lr: float) -> None:
        self._module(jobs).learn_(jobs, lr)

    def _module(self, jobs: Sequence[Job]) -> ModuleType:
        return _faster("epilogue", jobs[0].weight, epilogue, cuda_epilogue) if jobs else epilogue
