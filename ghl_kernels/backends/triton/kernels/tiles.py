"""How the responses are cut into programs: pure functions of shape, dtype and architecture."""

from __future__ import annotations

from typing import NamedTuple

import triton
from torch import Tensor

from ghl_kernels.backends.gpu.layout import Responses
from ghl_kernels.backends.triton.arch import Arch

# Values of u that a lane holds, in float32: enough loads in flight, and registers left to compute with.
_PER_LANE = 32
_MOST_WARPS = 8  # with more a lane has too few registers
_MOST_UNITS = 8192  # of a row in registers
_CHUNK = 4096  # values at a time of longer rows
_VECTOR = 16  # bytes of one load
_SECTOR = 32  # bytes that memory moves at least


class Grid(NamedTuple):
    """Responses cut into items of ``inner`` positions each, so that a tile's positions have one stride."""

    tensor: Tensor
    items: int
    inner: int
    batch_stride: int
    position_stride: int
    unit_stride: int

    def strides(self, prefix: str = "") -> dict[str, int]:
        names = ("batch_stride", "position_stride", "unit_stride")
        return {f"{prefix}{name}": getattr(self, name) for name in names}

    @property
    def planes(self) -> bool:
        """Positions are contiguous, or at least closer together than units."""
        return self.position_stride < self.unit_stride and self.inner > 1

    @property
    def vectors(self) -> bool:
        """One load can put several units into a lane; Triton knows so from factors of 16."""
        strides = self.batch_stride, self.position_stride, self.tensor.data_ptr()
        return self.unit_stride == 1 and not any(stride % 16 for stride in strides)


def grid(u: Responses, inner: int = 0) -> Grid:
    """inner: to cut one run of positions into items as another tensor's are cut."""
    if u.inner > 1:
        return Grid(
            u.tensor, u.positions // u.inner, u.inner, u.batch_stride, u.position_stride, u.unit_stride
        )
    inner = inner or max(u.positions, 1)
    return Grid(u.tensor, u.positions // inner, inner, inner * u.batch_stride, u.batch_stride, u.unit_stride)


# For some tiles ptxas would rather spill than run fewer blocks at a time. It is told to take all registers
# for those alone: told so for others it spills where it otherwise does not.
_REGISTERS = 255


class Tile(NamedTuple):
    """How the competition is cut into programs."""

    positions: int
    units: int
    whole: bool  # a tile holds all units of its positions
    group: int  # of units whose maxima bound the k-th largest; 0: k is too large for that
    strided: bool  # a group's units lie far apart, since neighbours are not in one thread
    warps: int
    registers: int | None  # a thread may take; None: the compiler weighs them against occupancy


def tile_of(cut: Grid, units: int, winners: int, gpu: Arch) -> Tile:
    """The tile for a tensor of ``units`` units, of which ``winners`` win (0: none are chosen).

    Where positions are contiguous a tile takes at least a sector of memory of them. Else a row lies within
    one warp where it fits, so that no reduction has to wait for other warps.
    """
    itemsize = cut.tensor.dtype.itemsize
    # with more values in the 64 lanes of AMD's waves LLVM's register allocation crashes for some kernels
    warp_values = _PER_LANE * gpu.warp // (2 if gpu.is_amd else 1)
    padded = triton.next_power_of_2(units)
    most, chunk = _MOST_UNITS, _CHUNK
    if cut.planes:
        sector = _SECTOR // itemsize
        positions = max(warp_values // padded, sector, min(2 * sector, _MOST_UNITS // padded))
        most, chunk = most // sector, _CHUNK // sector
    else:
        # a lane should not have the state of many rows
        positions = max(1, warp_values // max(padded, 64)) * (1 if padded > 64 else 4 if cut.vectors else 2)
    # compiled for these the same tile needs more registers, and spills
    is_tight = gpu.name.startswith("sm_10")
    if is_tight:
        most, positions = most // 2, max(1, positions // 2) if cut.planes else positions
    whole = padded <= most
    width = padded if whole else chunk
    positions = min(positions, triton.next_power_of_2(cut.inner))
    # long rows need registers for what is gathered over the chunks
    values = warp_values if whole and not (is_tight and cut.planes) else warp_values // 2
    if padded <= 64 and not cut.planes:
        values = warp_values * padded // 64
    strided = not cut.vectors
    warps = max(1, min(_MOST_WARPS, positions * width // values))
    group = _group(units, width, winners, whole, 8 if strided else _VECTOR // itemsize, strided)
    spills = (strided and gpu.has_wgmma) or not whole
    registers = _REGISTERS if spills and not gpu.is_amd else None
    return Tile(positions, width, whole, group, strided, warps, registers)


def _group(units: int, width: int, winners: int, whole: bool, largest: int, strided: bool) -> int:
    """Units in a group, a power of two such that there are twice as many groups as winners, or 0."""
    for group in (8, 4, 2):
        groups = width if not whole else min(units, width // group) if strided else -(-units // group)
        if group <= min(largest, width) and groups >= 2 * winners:
            return group
    return 0
