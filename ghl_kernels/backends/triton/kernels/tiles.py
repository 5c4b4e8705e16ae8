"""How the responses are cut into programs: pure functions of shape, dtype and architecture."""

from __future__ import annotations

from typing import NamedTuple

import triton
from torch import Tensor

from ghl_kernels.backends.gpu.layout import Responses
from ghl_kernels.backends.triton.arch import Arch

# Values of u that a lane holds: enough loads in flight, and registers left to compute with.
_PER_LANE = 48
_MOST_WARPS = 8  # with more a lane has too few registers
_MOST_UNITS = 8192  # of a row in registers
_CHUNK = 4096  # values at a time of longer rows
_SECTOR = 32  # bytes that memory moves at least
_MOST_PIECES = 8  # of a row: units whose maximum bounds the k-th largest
_LEAST_UNITS = 32  # of a piece, where units are contiguous
_MOST_ROWS = 4  # of which a lane has units: each has a mask, an address and a state of its own
_LOAD = 16  # bytes that a lane takes at a time, where they are aligned
_FACTOR = 16  # of a stride, for the compiler to know about: it is told of no other


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


def grid(u: Responses, inner: int = 0) -> Grid:
    """inner: to cut one run of positions into items as another tensor's are cut."""
    if u.inner > 1:
        return Grid(
            u.tensor, u.positions // u.inner, u.inner, u.batch_stride, u.position_stride, u.unit_stride
        )
    inner = inner or max(u.positions, 1)
    return Grid(u.tensor, u.positions // inner, inner, inner * u.batch_stride, u.batch_stride, u.unit_stride)


class Tile(NamedTuple):
    """How the competition is cut into programs."""

    positions: int
    units: int  # of a piece
    pieces: int
    whole: bool  # the pieces are all units of the positions
    bounded: bool  # there are enough groups, a unit of every piece, to bound the k-th largest by their maxima
    unit_bits: int  # beside a value of 16 bits, so that no two are equal; 0: values are compared as they are
    vector: int  # positions that a lane holds beside each other
    warps: int
    registers: int | None = None  # a thread may take; None: the compiler weighs them against occupancy


def tile_of(cut: Grid, units: int, winners: int, gpu: Arch, *, lists: bool = False) -> Tile:
    """The tile for a tensor of ``units`` units, of which ``winners`` win (0: none are chosen).

    Where positions are contiguous a tile takes at least a sector of memory of them. Else a row lies within
    one warp where it fits, so that no reduction has to wait for other warps. ``lists``: the ranks of
    winners among others need registers too.
    """
    itemsize = cut.tensor.dtype.itemsize
    lane = min(_lane_values(itemsize, gpu), _PER_LANE // (2 if lists else 1))
    inner = triton.next_power_of_2(cut.inner)
    sector = min(_SECTOR // itemsize, inner) if cut.planes else 1
    width, pieces = _pieces(units, winners, 1 if cut.planes else _LEAST_UNITS)
    whole = width * pieces * sector <= min(_MOST_WARPS * gpu.warp * lane, _MOST_UNITS)
    if not whole:
        width, pieces = min(_CHUNK // sector, _below(units)), 1
        # registers for what is gathered over them
        lane //= 2
    held = width * pieces
    positions = max(sector, min(_below(gpu.warp * lane // held) if held <= gpu.warp * lane else 1, inner))
    if not cut.planes:
        positions = min(positions, gpu.warp, _MOST_ROWS * _rows_at_once(cut, width, gpu))
    positions = max(positions, _least_positions(width, gpu))
    warps = max(1, min(_MOST_WARPS, triton.next_power_of_2(-(-positions * held // (gpu.warp * lane)))))
    groups = units if pieces == 1 and whole else width // 2
    return Tile(
        positions,
        width,
        pieces,
        whole,
        bounded=winners <= groups,
        unit_bits=(units - 1).bit_length() if whole and itemsize == 2 else 0,
        vector=min(2, positions) if cut.planes else 1,
        warps=warps,
        # told so for others ptxas spills, or runs fewer blocks, where it otherwise does not
        registers=None if whole else gpu.registers,
    )


def _least_positions(width: int, gpu: Arch) -> int:
    """On AMD GPUs a tile of one position or one unit does not compile where it is less than a wave."""
    if not gpu.is_amd or width >= gpu.warp:
        return 1
    return gpu.warp if width == 1 else 2


def _lane_values(itemsize: int, gpu: Arch) -> int:
    """Values that a lane may hold."""
    if gpu.is_amd:
        # with more in the 64 lanes of a wave LLVM's register allocation crashes for some kernels
        return _PER_LANE // 2
    return _PER_LANE if itemsize == 2 and not gpu.name.startswith("sm_10") else 32


def _rows_at_once(cut: Grid, width: int, gpu: Arch) -> int:
    """Rows across which a warp lies: in every one of them there are lanes for ``width`` units."""
    is_aligned = cut.unit_stride == 1 and not (cut.batch_stride % _FACTOR or cut.position_stride % _FACTOR)
    vector = _LOAD // cut.tensor.dtype.itemsize if is_aligned else 1
    return max(1, gpu.warp // max(1, width // vector))


def _pieces(units: int, winners: int, least: int) -> tuple[int, int]:
    """(units of a piece, a power of two that is no more than there are units; pieces)."""
    width = min(least, _below(units))
    while -(-units // width) > _MOST_PIECES or (width < 2 * winners and 2 * width <= units):
        width *= 2
    return width, -(-units // width)


def _below(size: int) -> int:
    """The largest power of two up to size."""
    return 1 << max(size, 1).bit_length() - 1
