"""The operations of a backend for GPUs: layouts here, arithmetic in its kernels or, where that is faster and
as exact, torch's.

float32, bfloat16 and float16 in, float32 sums. Nothing here waits for the GPU.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ghl_kernels._geometry import Geometry
from ghl_kernels.backends import eager
from ghl_kernels.backends.gpu.jobs import Job
from ghl_kernels.backends.gpu.layout import FEW_CHANNELS, Patches, Responses, patches, responses
from ghl_kernels.backends.gpu.state import State, lift_of
from ghl_kernels.rule import Competition

# y is written, and read back by the library, in pieces of this part of L2.
_CHUNK_OF_L2 = 0.25
_ALIGNED_CHANNELS = 8  # of 16 bits: one 16-byte load


class Operations(abc.ABC):
    """All operations, from kernels with the same functions, and what the backend decides."""

    # modules, or what has their functions
    competing: Any  # activities, state, full_state, winner_lists, activity_sums
    depthwise: Any  # correlate
    sparse: Any  # correlate
    epilogue: Any  # delta, gate_, learn_

    @abc.abstractmethod
    def correlate(
        self,
        x: Patches,
        u: Responses,
        grad_u: Responses | None,
        state: State | None,
        competition: Competition,
        shape: tuple[int, ...],
    ) -> tuple[Tensor, Tensor | None]:
        """A and G by the fused kernel, contiguous and of the weight's shape; x may have padded channels."""

    @abc.abstractmethod
    def correlate_winners(
        self, x: Patches, unit: Tensor, activity: Tensor, grad_u: Responses
    ) -> tuple[Tensor, Tensor]:
        """As correlate, from lists of winners that takes_winners says yes to."""

    def takes_winners(self, x: Patches, grad_u: Responses, winners: int) -> bool:
        """Whether A, from lists of so many winners, and G are the sums of one kernel; x as it is."""
        return False

    def takes_few_channels(self, x: Patches, u: Responses, grad_u: Responses | None) -> bool:
        """Whether the fused kernel takes an input of few channels as it is, whatever its layout."""
        return False

    @abc.abstractmethod
    def takes_library(self, x: Patches, units: int, *, pair: bool) -> bool:
        """Whether the library's products are faster than the fused kernel and leave A in float32."""

    def leaves_grad_to_library(self, x: Patches, u: Responses, grad_u: Responses) -> bool:
        """Whether a convolution is faster as A by the fused kernel, then G by the library."""
        return False

    @abc.abstractmethod
    def l2_bytes(self, device: torch.device) -> int:
        """Size of the cache that y stays in between being written and being read."""

    def compete(self, u: Tensor, dim: int, competition: Competition) -> Tensor:
        """y = c(u), same shape and dtype as u."""
        return self.competing.activities(u, dim, competition)

    def competition_state(
        self, u: Tensor, dim: int, competition: Competition
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Per position: the k-th largest u, the last unit that wins a tie at it, the winners' logsumexp."""
        shape = [size for i, size in enumerate(u.shape) if i != dim]
        threshold, cut, logsumexp = self.competing.full_state(responses(u, dim), competition)
        return threshold.view(shape), cut.view(shape), logsumexp.view(shape)

    def winners(self, u: Tensor, dim: int, competition: Competition) -> tuple[Tensor, Tensor]:
        """Winning units (int32, ascending) and their activities, (P, k); the first is -1 where u is NaN."""
        return self.competing.winner_lists(responses(u, dim), competition)

    def linear_sums(
        self, x: Tensor, u: Tensor, competition: Competition, decay: str
    ) -> tuple[Tensor, Tensor]:
        """A (N, D) and the moments of y, from x (..., D) and u (..., N)."""
        A, moments, _ = self._linear(x, u, None, competition, decay)
        return A, moments

    def linear_pair(
        self, x: Tensor, u: Tensor, grad_u: Tensor, competition: Competition, decay: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A (N, D), the moments of y and G (N, D), from x (..., D), u and dL/du (..., N)."""
        A, moments, G = self._linear(x, u, grad_u, competition, decay)
        assert G is not None
        return A, moments, G

    def conv_sums(
        self, x: Tensor, u: Tensor, geometry: Geometry, competition: Competition, decay: str
    ) -> tuple[Tensor, Tensor]:
        """A (N, C / groups, *kernel_size) and the moments of y, x (B, C, *size), u (B, N, *out_size)."""
        A, moments, _ = self._conv(x, u, None, geometry, competition, decay)
        return A, moments

    def conv_pair(
        self, x: Tensor, u: Tensor, grad_u: Tensor, geometry: Geometry, competition: Competition, decay: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As conv_sums, and G, from dL/du of u's shape."""
        A, moments, G = self._conv(x, u, grad_u, geometry, competition, decay)
        assert G is not None
        return A, moments, G

    def linear_grad(self, x: Tensor, grad_u: Tensor) -> Tensor:
        """G (N, D), of A's dtype, from x (..., D) and dL/du (..., N): the library's."""
        return eager.linear_grad(x, grad_u)

    def conv_grad(self, x: Tensor, grad_u: Tensor, geometry: Geometry) -> Tensor:
        """G, of A's shape and dtype, from dL/du of u's shape: the library's."""
        return eager.conv_grad(x, grad_u, geometry)

    def linear_winner_sums(
        self, x: Tensor, unit: Tensor, activity: Tensor, units: int, decay: str
    ) -> tuple[Tensor, Tensor]:
        """As linear_sums, from the winners' lists (P, k)."""
        if decay in ("subspace", "sanger") or x.numel() == 0:
            return eager.linear_winner_sums(x, unit, activity, units, decay)
        rows = x.reshape(-1, x.shape[-1])
        return self._winner_sums(rows, patches(rows, None), unit, activity, (units, rows.shape[1]), 1, decay)

    def conv_winner_sums(
        self, x: Tensor, unit: Tensor, activity: Tensor, units: int, geometry: Geometry, decay: str
    ) -> tuple[Tensor, Tensor]:
        """As conv_sums, from the winners' lists (P, k)."""
        if decay in ("subspace", "sanger") or x.numel() == 0:
            return eager.conv_winner_sums(x, unit, activity, units, geometry, decay)
        shape = (units, x.shape[1] // geometry.groups, *geometry.kernel_size)
        x = _channels_last(x)
        return self._winner_sums(x, patches(x, geometry), unit, activity, shape, geometry.groups, decay)

    def conv_winner_pair(
        self,
        x: Tensor,
        unit: Tensor,
        activity: Tensor,
        grad_u: Tensor,
        geometry: Geometry,
        decay: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As conv_pair, from the winners' lists (P, k)."""
        units, groups = grad_u.shape[1], geometry.groups
        raw, grad = patches(x, geometry), responses(grad_u, 1)
        empty = x.numel() == 0 or unit.numel() == 0
        if empty or decay not in ("oja", "none") or not self.takes_winners(raw, grad, unit.shape[1]):
            A, moments = self.conv_winner_sums(x, unit, activity, units, geometry, decay)
            return A, moments, self.conv_grad(x, grad_u, geometry)
        moments = eager.new_moments(units, groups, decay, unit.shape[0], torch.float32, x.device)
        A, G = self.correlate_winners(raw, unit, activity, grad)
        shape = (units, x.shape[1] // groups, *geometry.kernel_size)
        return A.view(shape), moments, G.view(shape)

    def delta(
        self, A: Tensor, moments: Tensor, weight: Tensor, groups: int, decay: str, normalize: str
    ) -> Tensor:
        """H, of weight's shape and A's dtype."""
        H = A.new_empty(A.shape)
        self.epilogue.delta([Job(A, moments, weight, H, groups, decay, normalize)])
        return H

    def gate(
        self,
        grad: Tensor,
        A: Tensor,
        moments: Tensor,
        weight: Tensor,
        groups: int,
        decay: str,
        normalize: str,
    ) -> Tensor:
        """|H| * sign(grad) + (grad - grad), of weight's dtype."""
        gated = torch.empty_like(grad, dtype=weight.dtype)
        self.epilogue.gate_([Job(A, moments, weight, gated, groups, decay, normalize, grad)])
        return gated

    def gate_(
        self,
        grad: Tensor,
        A: Tensor,
        moments: Tensor,
        weight: Tensor,
        groups: int,
        decay: str,
        normalize: str,
    ) -> None:
        """grad <- |H| * sign(grad) + (grad - grad)."""
        self.epilogue.gate_([Job(A, moments, weight, grad, groups, decay, normalize)])

    def gate_all_(self, layers: Sequence[tuple[Any, ...]]) -> None:
        """gate_ of every layer, from its arguments, in two launches for all of one dtype."""
        self.epilogue.gate_(
            [Job(A, moments, weight, grad, *rule) for grad, A, moments, weight, *rule in layers]
        )

    def learn_(
        self, weight: Tensor, A: Tensor, moments: Tensor, lr: float, groups: int, decay: str, normalize: str
    ) -> None:
        """weight <- weight + lr * H."""
        self.epilogue.learn_([Job(A, moments, weight, weight, groups, decay, normalize)], lr)

    # --- linear -------------------------------------------------------------------------------------

    def _linear(
        self, x: Tensor, u: Tensor, grad_u: Tensor | None, competition: Competition, decay: str
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        x, u = x.reshape(-1, x.shape[-1]), u.reshape(-1, u.shape[-1])
        grad_u = None if grad_u is None else grad_u.reshape(u.shape)
        shape = (u.shape[1], x.shape[1])
        moments = eager.new_moments(u.shape[1], 1, decay, u.shape[0], torch.float32, x.device)
        if x.numel() == 0 or u.numel() == 0:
            if u.numel():  # rows without elements
                self._add_moments(moments, None, u, 1, 1, competition, decay)
            zeros = x.new_zeros(shape, dtype=torch.float32)
            return zeros, moments, None if grad_u is None else zeros.clone()
        by_library = self.takes_library(patches(x, None), shape[0], pair=grad_u is not None)
        if by_library and lift_of(x.dtype, competition) == 1.0:
            return self._linear_by_library(x, u, grad_u, competition, decay, moments)
        rows = _padded(_unit_stride(x), 1)
        A, G = self._sums(patches(rows, None), u, grad_u, shape, competition, decay, moments)
        return A, moments, G

    def _linear_by_library(
        self,
        x: Tensor,
        u: Tensor,
        grad_u: Tensor | None,
        competition: Competition,
        decay: str,
        moments: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """By the library's products with float32 results, y written a piece at a time."""
        A: Tensor | None = None
        for rows in self._pieces(u.shape[0], u.shape[1] * u.element_size(), x.device):
            y = self.competing.activities(u[rows], 1, competition)
            A = _add_product(A, y, x[rows])
            self._add_moments(moments, y, u[rows], 1, 1, competition, decay)
        assert A is not None
        return A, moments, None if grad_u is None else _add_product(None, grad_u, x)

    # --- convolutions -------------------------------------------------------------------------------

    def _conv(
        self,
        x: Tensor,
        u: Tensor,
        grad_u: Tensor | None,
        geometry: Geometry,
        competition: Competition,
        decay: str,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        units, groups = u.shape[1], geometry.groups
        shape = (units, x.shape[1] // groups, *geometry.kernel_size)
        positions = u.numel() // max(units, 1)
        moments = eager.new_moments(units, groups, decay, positions, torch.float32, x.device)
        if x.numel() == 0 or u.numel() == 0:
            if u.numel():  # all that x has is padding
                self._add_moments(moments, None, u, 1, groups, competition, decay)
            zeros = x.new_zeros(shape, dtype=torch.float32)
            return zeros, moments, None if grad_u is None else zeros.clone()
        if shape[1] == 1:
            A, G = self._depthwise(x, u, grad_u, geometry, competition, decay, moments)
        elif self.takes_library(patches(x, geometry), units, pair=grad_u is not None):
            return self._conv_by_library(x, u, grad_u, geometry, competition, decay, moments)
        else:
            A, G = self._conv_by_kernel(x, u, grad_u, geometry, shape, competition, decay, moments)
        return A.view(shape), moments, None if G is None else G.view(shape)

    def _conv_by_kernel(
        self,
        x: Tensor,
        u: Tensor,
        grad_u: Tensor | None,
        geometry: Geometry,
        shape: tuple[int, ...],
        competition: Competition,
        decay: str,
        moments: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        taken = self._patches(x, u, grad_u, geometry)
        if grad_u is None or not self.leaves_grad_to_library(taken, responses(u, 1), responses(grad_u, 1)):
            return self._sums(taken, u, grad_u, shape, competition, decay, moments)
        A, _ = self._sums(taken, u, None, shape, competition, decay, moments)
        return A, self.conv_grad(x, grad_u, geometry)

    def _patches(self, x: Tensor, u: Tensor, grad_u: Tensor | None, geometry: Geometry) -> Patches:
        """The patches of x, which is copied where the kernel is faster on other strides or more channels."""
        if x.shape[1] // geometry.groups <= FEW_CHANNELS:
            raw, grad = patches(x, geometry), None if grad_u is None else responses(grad_u, 1)
            if self.takes_few_channels(raw, responses(u, 1), grad):
                return raw
        return patches(_padded(_channels_last(x), geometry.groups), geometry)

    def _conv_by_library(
        self,
        x: Tensor,
        u: Tensor,
        grad_u: Tensor | None,
        geometry: Geometry,
        competition: Competition,
        decay: str,
        moments: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """By the library's weight gradient, y written a piece of the batch at a time; float32 only."""
        shape = (u.shape[1], x.shape[1] // geometry.groups, *geometry.kernel_size)
        A: Tensor | None = None
        for items in self._pieces(x.shape[0], u[0].numel() * u.element_size(), x.device):
            y = self.competing.activities(u[items], 1, competition)
            part = eager.conv_correlate(x[items], y, shape, geometry)
            A = part if A is None else A.add_(part)
            self._add_moments(moments, y, u[items], 1, geometry.groups, competition, decay)
        assert A is not None
        return A, moments, None if grad_u is None else eager.conv_correlate(x, grad_u, shape, geometry)

    def _depthwise(
        self,
        x: Tensor,
        u: Tensor,
        grad_u: Tensor | None,
        geometry: Geometry,
        competition: Competition,
        decay: str,
        moments: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        view = responses(u, 1)
        state = self.competing.state(view, competition)
        self._add_moments(moments, None, u, 1, geometry.groups, competition, decay, state)
        grad = None if grad_u is None else responses(grad_u, 1)
        A, G = self.depthwise.correlate(patches(x, geometry), view, grad, state, competition, want_A=True)
        assert A is not None
        return A, G

    # --- shared -------------------------------------------------------------------------------------

    def _sums(
        self,
        x: Patches,
        u: Tensor,
        grad_u: Tensor | None,
        shape: tuple[int, ...],
        competition: Competition,
        decay: str,
        moments: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        """A and G by the fused kernel; the moments are added to."""
        view = responses(u, 1)
        state = self.competing.state(view, competition) if decay == "instar" else None
        self._add_moments(moments, None, u, 1, x.groups, competition, decay, state)
        grad = None if grad_u is None else responses(grad_u, 1)
        return self.correlate(x, view, grad, state, competition, shape)

    def _add_moments(
        self,
        moments: Tensor,
        y: Tensor | None,
        u: Tensor,
        dim: int,
        groups: int,
        competition: Competition,
        decay: str,
        state: State | None = None,
    ) -> None:
        """Add what the decay needs of y, which is made from u where it was not written or was rounded."""
        if decay == "instar":
            view = responses(u, dim)
            moments[:-1] += self.competing.activity_sums(
                view, state or self.competing.state(view, competition), competition
            )
        elif decay in ("subspace", "sanger"):
            if y is not None and y.dtype == torch.float32:
                eager.add_moments(moments, y.movedim(dim, -1), groups, decay)
                return
            for items in self._pieces(u.shape[0], u[0].numel() * moments.element_size(), u.device):
                y = self.competing.activities(u[items].float(), dim, competition)
                eager.add_moments(moments, y.movedim(dim, -1), groups, decay)

    def _winner_sums(
        self,
        x: Tensor,
        x_patches: Patches,
        unit: Tensor,
        activity: Tensor,
        shape: tuple[int, ...],
        groups: int,
        decay: str,
    ) -> tuple[Tensor, Tensor]:
        moments = eager.new_moments(shape[0], groups, decay, unit.shape[0], torch.float32, x.device)
        if unit.numel() == 0:
            return x.new_zeros(shape, dtype=torch.float32), moments
        A, sums = self.sparse.correlate(x_patches, unit, activity, shape[0], sum_activity=decay == "instar")
        if sums is not None:
            moments[:-1] = sums
        return A.view(shape), moments

    def _pieces(self, items: int, bytes_per_item: int, device: torch.device) -> list[slice]:
        """The batch in pieces whose y stays in L2."""
        step = max(1, int(_CHUNK_OF_L2 * self.l2_bytes(device) / max(1, bytes_per_item)))
        return [slice(start, min(start + step, items)) for start in range(0, items, step)]


def _add_product(total: Tensor | None, rows: Tensor, x: Tensor) -> Tensor:
    """total + rows^T x in float32."""
    if x.dtype == torch.float32 or x.device.type == "cpu":  # only CUDA widens the result of a 16-bit product
        product = rows.float().t(), x.float()
        return torch.mm(*product) if total is None else total.addmm_(*product)
    part = torch.mm(rows.t(), x, out_dtype=torch.float32)
    # addmm would spare a pass, but refuses a total wider than its operands in torch before 2.10
    return part if total is None else total.add_(part)


def _unit_stride(x: Tensor) -> Tensor:
    """Rows with contiguous elements."""
    return x if x.stride(1) == 1 else x.contiguous()


def _channels_last(x: Tensor) -> Tensor:
    """x (B, C, *size) with contiguous channels, a copy where they are not."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.movedim(1, -1).contiguous().movedim(-1, 1)


def _padded(x: Tensor, groups: int) -> Tensor:
    """x (., C, ...) with zeros up to a multiple of 8 channels in a group, so that 16-bit loads are whole."""
    missing = -(x.shape[1] // groups) % _ALIGNED_CHANNELS
    if not missing or x.dtype == torch.float32:
        return x
    last = x.movedim(1, -1)
    padded = F.pad(last.unflatten(-1, (groups, -1)), (0, missing)).flatten(-2)
    return padded.movedim(-1, 1)
