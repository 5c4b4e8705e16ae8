"""How a correlation is cut into tiles and slices: pure functions of shape, dtype and architecture.

Tiles are those that compile without spills and, on sm_90, without serialized wgmma in both Triton 3.6 and
3.7 (tools/aot_check). What a GPU has measured goes first; as long as nothing was, choices are estimates from
counted bytes and operations.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch

from ghl_kernels.backends.gpu.layout import FEW_CHANNELS, VECTOR
from ghl_kernels.backends.gpu.memory import WORKSPACE_BYTES
from ghl_kernels.backends.gpu.precision import allows_tf32
from ghl_kernels.backends.triton import measured
from ghl_kernels.backends.triton.arch import Arch
from ghl_kernels.rule import Competition

# Least steps of the main loop in a slice: the pipeline's start and the tile's stores cost about as much.
_LEAST_STEPS = 8
# Units of a tile that is no larger for its state. One that held 96 units took 4 times as long on an H100 as a
# launch for the state and the product together.
_STATE_HERE_UNITS = 64
_WGMMA_UNITS = 64  # of a tile whose products are by wgmma
_LEAST_CHANNELS = 32  # of a layer that the CUDA backend's kernel for Hopper takes


class Problem(NamedTuple):
    """One correlation; units, columns (taps * channels) and channels are those of one group."""

    units: int
    columns: int
    channels: int
    positions: int
    groups: int
    itemsize: int
    results: int  # 2 for A and G, else 1
    makes_y: bool  # A is among them
    state_here: bool  # the softmax is computed in the kernel
    aligned: bool = True  # the units of u and dL/du are contiguous, in whole 16-byte vectors
    bounded: bool = True  # activities are a softmax, or those of winners
    long: bool = False  # offsets take 64 bits


class Tile(NamedTuple):
    """What one program computes at a time, and how."""

    units: int
    columns: int
    positions: int
    warps: int
    stages: int


class Slices(NamedTuple):
    """The positions, cut: every slice but the last is ``length`` long, a multiple of the tile's."""

    number: int
    length: int


def state_here(
    units: int, columns: int, groups: int, itemsize: int, aligned: bool, competition: Competition
) -> bool:
    """Whether the kernel computes the softmax itself: a tile then holds all units of a position.

    Selecting winners there would put a loop of unknown length into the pipelined one, and NaN in activities
    that are not normalized has to reach units of other tiles: these states have kernels of their own.
    """
    is_softmax = competition.activity == "softmax" and not competition.winners and not competition.anti
    if not is_softmax or groups > 1 or not aligned or itemsize != 2:
        return False
    return units <= (_STATE_HERE_UNITS if columns > 128 else 32)


def tile(problem: Problem, arch: Arch) -> Tile:
    """The tile of a correlation."""
    found = measured.table(arch.name).get(_key(problem))
    return Tile(*found) if found else next(candidates(problem, arch))


def candidates(problem: Problem, arch: Arch) -> Iterator[Tile]:
    """Tiles that compile within the architecture's limits, the first one being the default."""
    if problem.itemsize == 4:
        # the three products of tf32x3 need their operands' rests in registers too, and single addresses a
        # pair's; on sm_100 a second stage makes ptxas aim at fewer registers than there are, and spill
        crowded = arch.name == "sm_100" or (problem.results == 2 and not problem.aligned)
        yield Tile(32, 32, 32, 4, 1 if crowded else 2)
        return
    if arch.has_wgmma:
        yield from _wgmma_candidates(problem)
    elif arch.is_amd:
        yield from _mfma_candidates(problem)
    else:
        yield from _mma_candidates(problem, arch)


def _wgmma_candidates(problem: Problem) -> Iterator[Tile]:
    """sm_90, 16 bits. Tiles of fewer than _WGMMA_UNITS use mma.sync; narrow tiles with wgmma are serialized.

    In Triton 3.6 so is every tile of 64 units whose y is alone and from strided u, and many with a y that has
    no state to bound it (C7515). Offsets of 64 bits leave two such accumulators too few registers.
    """
    narrow = problem.columns <= 128
    serialized = narrow or not problem.bounded or (problem.results == 1 and not problem.aligned)
    serialized |= problem.long
    if problem.units <= 16:
        yield Tile(16, 64 if narrow else 256, 64, 4 if narrow else 8, 3)
    elif problem.units <= 32 or (problem.makes_y and serialized):
        if problem.aligned:
            yield Tile(32, 128 if narrow else 256, 64, 8, 3)
        else:
            yield Tile(32, 128 if narrow else 256, 32, 8, 2 if narrow else 3)
    elif problem.results == 2:
        yield from (Tile(64, 256, 64, 8, stages) for stages in (4, 3, 2))
        if problem.aligned and not problem.state_here:
            yield Tile(32, 256, 64, 8, 3)
    elif problem.makes_y:
        yield from (Tile(64, 256, 64, 8, stages) for stages in (4, 3))
        if problem.units > 64:
            yield from (Tile(128, 128, 64, 8, stages) for stages in (3, 4))
    else:
        if problem.units > 64 and not narrow and not problem.long:
            yield Tile(128, 256, 64, 8, 3)
        yield Tile(64, 64 if narrow else 256, 64, 4 if narrow else 8, 3)


def _mma_candidates(problem: Problem, arch: Arch) -> Iterator[Tile]:
    """Other NVIDIA architectures, 16 bits."""
    narrow = problem.columns <= 128
    # it holds the accumulators; elsewhere four warps have too few registers for two of them
    in_tensor_memory = arch.name.startswith("sm_10")
    if problem.units <= 32:
        units = 16 if problem.units <= 16 else 32
        yield Tile(units, 64 if narrow else 128, 64 if problem.aligned else 32, 4, 2)
    elif problem.results == 2 or problem.state_here:
        if in_tensor_memory and not narrow:
            yield Tile(64, 256, 32, 8, 3)
        if in_tensor_memory:
            yield Tile(64, 128, 32, 4, 3)
        else:
            yield from (Tile(64, 128, 32, 8, stages) for stages in ((3, 2) if problem.bounded else (2,)))
            if problem.bounded and not problem.state_here and not problem.long:
                yield Tile(64, 128, 64, 8, 2)
    else:
        if problem.units > 64:
            yield Tile(128, 128, 32, 8, 3)
        yield Tile(64, 128, 32, 4 if in_tensor_memory else 8, 3)
        if not in_tensor_memory and problem.makes_y and not problem.long:
            yield Tile(64, 128, 64, 8, 3)


def _mfma_candidates(problem: Problem) -> Iterator[Tile]:
    """AMD, 16 bits; 64 KiB of local memory."""
    if problem.units <= 32:
        yield Tile(32, 64, 64, 4, 2)
    else:
        if problem.results == 1 and problem.units > 64:
            yield Tile(128, 128, 32, 8, 2)
        yield Tile(64, 128, 32, 8, 2)
        if problem.results == 2 and not problem.long:
            yield Tile(64, 64, 64, 4, 2)


def registers(tile: Tile, arch: Arch) -> int | None:
    """What a thread may take. Left alone ptxas aims at more blocks than slices() counts on, and spills.

    None leaves it alone: where wgmma is used, whose accumulators settle the matter, and on AMD.
    """
    return None if arch.has_wgmma and tile.units >= 64 else arch.registers


def within_tap(problem: Problem, tile: Tile) -> bool:
    """Whether every tile of columns lies in one tap."""
    return problem.columns == problem.channels or problem.channels % tile.columns == 0


def column_blocks(problem: Problem, tile: Tile) -> int:
    """Tiles along the columns of one group."""
    return -(-problem.columns // tile.columns)


@functools.lru_cache(maxsize=4096)
def slices(problem: Problem, tile: Tile, arch: Arch) -> Slices:
    """The split over positions whose programs fill the chip in the fewest, fullest waves.

    The cost of a split is its waves times the steps of a program, the fixed part included; the workspace
    of one result stays within WORKSPACE_BYTES where more than one slice is made.
    """
    steps = -(-problem.positions // tile.positions)
    tiles = -(-problem.units // tile.units) * column_blocks(problem, tile) * problem.groups
    resident = arch.multiprocessors * (1 if tile.warps >= 8 else 2)
    slice_bytes = 4 * problem.groups * problem.units * problem.columns
    most = max(1, min(steps // _LEAST_STEPS, WORKSPACE_BYTES // max(1, slice_bytes), 4 * resident))

    def cost(number: int) -> float:
        waves = -(-(tiles * number) // resident)
        # a slice costs a pass over its part of the workspace, which counts as a fraction of a step
        return waves * (-(-steps // number) + _LEAST_STEPS) + number / 16

    length = -(-steps // min(range(1, most + 1), key=cost))
    return Slices(-(-steps // length), length * tile.positions)


def prefers_library(problem: Problem, arch: Arch, *, is_conv: bool) -> bool:
    """Whether y is to be written and the library's product called, where that is equally accurate.

    Decided by arithmetic intensity, FLOP per byte moved: above the threshold the library's matrix rate
    decides, below it the bytes do. A convolution in 16 bits rounds A to them and is never chosen, nor is
    any product of 16 bits on AMD, whose float32 results are wrong in some of the torches that are supported.
    """
    if problem.itemsize == 2 and (is_conv or arch.is_amd):
        return False
    known = measured.verdict(arch.name, _key(problem), "library")
    if known is not None:
        return known
    return _intensity(problem) > measured.intensity(arch.name, problem.itemsize)


def leaves_grad_to_library(problem: Problem, arch: Arch) -> bool:
    """Whether a convolution in 16 bits is faster as A by a tile of its own, then G by the library.

    The library may round G, not A. At 2600 FLOP per byte the pair's tile reached 298 TFLOP/s on an H100,
    the library's weight gradient about 520: A's tile has to reach 210 for this to be the faster way, which
    no tile without wgmma does.
    """
    if problem.itemsize != 2 or problem.results != 2:
        return False
    known = measured.verdict(arch.name, _key(problem), "library_grad")
    if known is not None:
        return known
    if not arch.has_wgmma or _intensity(problem) <= measured.intensity(arch.name, problem.itemsize):
        return False
    return tile(problem._replace(results=1), arch).units >= _WGMMA_UNITS


def _intensity(problem: Problem) -> float:
    """FLOP per byte moved."""
    width, rows = problem.groups * problem.units, problem.groups * problem.channels
    flops = 2.0 * problem.results * problem.positions * width * problem.columns
    moved: float = problem.itemsize * problem.positions * (rows + problem.results * width)
    moved += 4.0 * problem.results * width * problem.columns
    return flops / max(moved, 1.0)


def prefers_cuda(problem: Problem, arch: Arch, *, rows: bool) -> bool:
    """Whether the CUDA backend's kernel is faster than any tile here.

    By what was measured at shapes like this one. At others where its kernel for Hopper takes the layer: on an
    H100 it was 1.4 and 1.6 times as fast as the best tile. ``rows``: units are contiguous in u and dL/du, as
    that kernel needs them.
    """
    known = measured.verdict(arch.name, _key(problem), "cuda")
    return _suits_hopper(problem, arch, rows=rows) if known is None else known


def prefers_few_channels(problem: Problem, arch: Arch) -> bool:
    """Whether the CUDA backend's kernel for the first layers of networks is faster than any tile here.

    On an H100 it took half the time of the best tile, which holds neither all units of a position nor a
    number of columns near that of the layer.
    """
    return arch.has_wgmma and problem.itemsize == 2 and problem.channels <= FEW_CHANNELS


def _suits_hopper(problem: Problem, arch: Arch, *, rows: bool) -> bool:
    """As pair_sm90_maps.h has it: 16 bits, whole vectors, and channels enough for a chunk."""
    vectors = problem.units % VECTOR == 0 and problem.channels % VECTOR == 0
    many = problem.channels >= _LEAST_CHANNELS
    return arch.has_wgmma and rows and problem.itemsize == 2 and problem.groups == 1 and vectors and many


def precision(dtype: torch.dtype, *, is_conv: bool, arch: Arch) -> str:
    """How tl.dot multiplies float32: in one pass of tf32 where torch allows that to its own products."""
    if dtype != torch.float32 or arch.is_amd:
        return "ieee"
    return "tf32" if allows_tf32(is_conv) else "tf32x3"


def _key(problem: Problem) -> str:
    """Name of a correlation in the table of what was measured, the positions as a power of two."""
    sizes = *problem[:3], 1 << problem.positions.bit_length()
    return f"{'x'.join(map(str, sizes))}/{' '.join(str(int(field)) for field in problem[4:])}"
