"""The choice of tiles and slices: pure, total, within every architecture's limits."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ghl_kernels.backends.triton import arch, config
from ghl_kernels.backends.triton.config import Problem
from ghl_kernels.rule import Competition

SIZES = (
    1,
    2,
    3,
    7,
    8,
    16,
    17,
    31,
    32,
    33,
    64,
    65,
    96,
    128,
    129,
    256,
    257,
    384,
    512,
    1000,
    1536,
    4096,
    65_536,
)
SOFTMAX = Competition("softmax", 0, 1.0, False)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Any correlation that the kernel may be asked for."""
    units, channels = draw(st.sampled_from(SIZES)), draw(st.sampled_from(SIZES))
    taps = draw(st.sampled_from((1, 3, 4, 9, 25, 27, 49)))
    groups = draw(st.sampled_from((1, 1, 2, 32)))
    itemsize = draw(st.sampled_from((2, 4)))
    makes_y, aligned, long = draw(st.booleans()), draw(st.booleans()), draw(st.booleans())
    return Problem(
        units,
        taps * channels,
        channels,
        draw(st.sampled_from((1, 63, 64, 1000, 50_176, 6_422_528, 2**31 + 7))),
        groups,
        itemsize,
        results=draw(st.sampled_from((1, 2))) if makes_y else 1,
        makes_y=makes_y,
        state_here=makes_y
        and not long
        and config.state_here(units, taps * channels, groups, itemsize, aligned, SOFTMAX)
        and draw(st.booleans()),
        aligned=aligned,
        bounded=draw(st.booleans()),
        long=long,
    )


def operand_bytes(problem: Problem, tile: config.Tile, chip: arch.Arch) -> int:
    """Shared memory of a pipeline with x and the responses of every stage; AMD's has one in registers."""
    a_stage = tile.columns + tile.units * (problem.results if problem.makes_y else 1)
    return (tile.stages - chip.is_amd) * tile.positions * a_stage * problem.itemsize


@given(problem=problems(), chip=st.sampled_from([*arch.KNOWN.values(), *arch.CONSUMER.values()]))
@settings(max_examples=1000)
def test_tiles_fit(problem: Problem, chip: arch.Arch) -> None:
    """Sizes that tl.dot takes; accumulators in registers; operands in shared memory; state complete."""
    for tile in config.candidates(problem, chip):
        assert all(size & (size - 1) == 0 and size >= 16 for size in tile[:3])
        assert operand_bytes(problem, tile, chip) <= chip.shared_memory
        accumulators = problem.results * tile.units * tile.columns / (tile.warps * chip.warp)
        assert accumulators <= 128
        if problem.state_here:
            assert tile.units >= problem.units
    assert config.tile(problem, chip) in list(config.candidates(problem, chip))


@pytest.mark.parametrize(
    ("name", "results", "default", "number"),
    [
        ("sm_80", 2, (64, 128, 32, 8, 3), 3),
        ("sm_80", 1, (128, 128, 32, 8, 3), 3),
        ("sm_90", 2, (64, 256, 64, 8, 4), 4),
        ("sm_90", 1, (64, 256, 64, 8, 4), 4),
        ("sm_100", 2, (64, 256, 32, 8, 3), 2),
        ("gfx942", 2, (64, 128, 32, 8, 2), 2),
    ],
)
def test_there_are_tiles_to_choose_from(
    name: str, results: int, default: tuple[int, ...], number: int
) -> None:
    """What a measurement compares; the default is the first one."""
    problem = Problem(384, 864, 96, 1 << 17, 1, 2, results, makes_y=True, state_here=False)
    tiles = list(config.candidates(problem, arch.KNOWN[name]))
    assert tiles[0] == default
    assert len(set(tiles)) == len(tiles) == number


def test_offsets_of_64_bits_take_tiles_with_fewer_accumulators() -> None:
    """On sm_90, where those of wgmma and 64-bit offsets together spill."""
    chip = arch.KNOWN["sm_90"]
    problem = Problem(384, 864, 96, 1 << 24, 1, 2, 2, makes_y=True, state_here=False)
    assert config.tile(problem, chip).units == 64
    for results, makes_y in ((2, True), (1, True), (1, False)):
        long = problem._replace(results=results, makes_y=makes_y, long=True)
        for tile in config.candidates(long, chip):
            assert results * tile.units * tile.columns / (tile.warps * chip.warp) <= 64


@given(problem=problems(), chip=st.sampled_from(list(arch.KNOWN.values())))
@settings(max_examples=400)
def test_slices_cover_every_position_once(problem: Problem, chip: arch.Arch) -> None:
    """Whole tiles, none of them empty, and the workspace within its bound."""
    tile = config.tile(problem, chip)
    number, length = config.slices(problem, tile, chip)
    assert length % tile.positions == 0
    assert (number - 1) * length < problem.positions <= number * length
    if number > 1:
        assert 4 * number * problem.groups * problem.units * problem.columns <= config.WORKSPACE_BYTES


def test_slices_fill_the_chip() -> None:
    """Few tiles and many positions: the split brings the last wave near to full."""
    chip = arch.KNOWN["sm_90"]
    for units, columns, positions in (
        (96, 200, 524_288),
        (384, 864, 131_072),
        (64, 576, 200_704),
        (512, 4608, 6272),
    ):
        problem = Problem(units, columns, columns, positions, 1, 2, 2, makes_y=True, state_here=False)
        tile = config.tile(problem, chip)
        number, length = config.slices(problem, tile, chip)
        tiles = -(-units // tile.units) * config.column_blocks(problem, tile)
        waves = math.ceil(tiles * number / chip.multiprocessors)
        ideal = tiles * positions / chip.multiprocessors
        assert waves * length <= 1.25 * ideal + 16 * tile.positions


@pytest.mark.parametrize("chip", arch.KNOWN.values(), ids=arch.KNOWN)
def test_the_state_is_computed_in_the_kernel_only_where_a_tile_holds_it(chip: arch.Arch) -> None:
    """Softmax among all units of one group, in 16-bit vectors, and no more of them than a tile has."""
    for units, columns in itertools.product(SIZES, SIZES):
        if config.state_here(units, columns, 1, 2, True, SOFTMAX):
            assert units <= 64
        assert not config.state_here(units, columns, 1, 2, False, SOFTMAX)
        assert not config.state_here(units, columns, 1, 4, True, SOFTMAX)
        assert not config.state_here(units, columns, 2, 2, True, SOFTMAX)
        assert not config.state_here(units, columns, 1, 2, True, SOFTMAX._replace(winners=1))
        assert not config.state_here(units, columns, 1, 2, True, SOFTMAX._replace(anti=True))
        assert not config.state_here(units, columns, 1, 2, True, SOFTMAX._replace(activity="linear"))


def test_the_library_is_taken_only_where_it_is_as_accurate() -> None:
    """Never for a 16-bit convolution, nor for 16 bits on AMD; by arithmetic intensity elsewhere."""
    chip = arch.KNOWN["sm_90"]

    def taken(units: int, features: int, itemsize: int, *, is_conv: bool) -> bool:
        problem = Problem(units, features, features, 1 << 16, 1, itemsize, 2, makes_y=True, state_here=False)
        return config.prefers_library(problem, chip, is_conv=is_conv)

    assert taken(4096, 4096, 2, is_conv=False)
    assert not taken(4096, 4096, 2, is_conv=True)
    assert not taken(64, 64, 2, is_conv=False)
    assert taken(512, 512, 4, is_conv=True)
    assert not taken(8, 8, 4, is_conv=True)
    chip = arch.KNOWN["gfx942"]
    assert not taken(4096, 4096, 2, is_conv=False)
    assert taken(512, 512, 4, is_conv=False)


def test_the_library_makes_the_gradient_where_a_tile_for_both_is_slow() -> None:
    """In convolutions of many operations per byte, in 16 bits, on the architecture where it was measured."""
    deephebb3 = Problem(1536, 3456, 384, 1 << 15, 1, 2, 2, makes_y=True, state_here=False)
    deephebb2 = Problem(384, 864, 96, 1 << 17, 1, 2, 2, makes_y=True, state_here=False)
    chip = arch.KNOWN["sm_90"]
    assert config.leaves_grad_to_library(deephebb3, chip)
    assert not config.leaves_grad_to_library(deephebb2, chip)
    assert not config.leaves_grad_to_library(deephebb3._replace(itemsize=4), chip)
    assert not config.leaves_grad_to_library(deephebb3._replace(results=1), chip)
    # A alone from u in NCHW has no tile with wgmma
    assert not config.leaves_grad_to_library(deephebb3._replace(aligned=False), chip)
    for other in ("sm_80", "sm_100", "gfx942"):
        assert not config.leaves_grad_to_library(deephebb3, arch.KNOWN[other])


def test_precision_follows_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 products take one pass of tf32 only where torch's own would."""
    chip = arch.KNOWN["sm_90"]
    assert config.precision(torch.bfloat16, is_conv=False, arch=chip) == "ieee"
    assert config.precision(torch.float32, is_conv=True, arch=arch.KNOWN["gfx942"]) == "ieee"
    for allowed, expected in ((True, "tf32"), (False, "tf32x3")):
        with torch.backends.cudnn.flags(allow_tf32=allowed):
            assert config.precision(torch.float32, is_conv=True, arch=chip) == expected
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = allowed
        assert config.precision(torch.float32, is_conv=False, arch=chip) == expected
        torch.backends.cuda.matmul.allow_tf32 = before


def test_first_layers_are_the_cuda_backends_on_hopper() -> None:
    """Few channels of 16 bits, as they are and not padded."""
    problem = Problem(96, 75, 3, 1 << 19, 1, 2, 2, makes_y=True, state_here=False)
    assert config.prefers_few_channels(problem, arch.KNOWN["sm_90"])
    assert not config.prefers_few_channels(problem, arch.KNOWN["sm_80"])
    for change in ({"itemsize": 4}, {"channels": 8, "columns": 200}):
        assert not config.prefers_few_channels(problem._replace(**change), arch.KNOWN["sm_90"])
