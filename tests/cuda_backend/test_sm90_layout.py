"""The arithmetic of the Hopper pair kernel: layouts against CuTe's, patches and segments as defined."""

from __future__ import annotations

import ctypes
import itertools
import math
import random
import subprocess
from pathlib import Path

import pytest
from sm90_build import SOURCES, compile_cpp, cute_headers, layout_library


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return layout_library(tmp_path_factory.mktemp("sm90"))


def test_layouts_and_fragments_are_those_of_cute(tmp_path: Path) -> None:
    # CuTe's host build prints that it has no shared addresses: they are compared by distances
    flags = [*cute_headers(), "-Wno-error", "-w"]
    program = compile_cpp(tmp_path / "cute", "-O1", *flags, SOURCES / "cute.cpp")
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_memory_of_a_block_fits(layout: ctypes.CDLL) -> None:
    assert layout.shared_bytes() <= 227 << 10


class Geometry:
    """A convolution, all triples width first."""

    def __init__(self, rng: random.Random, dimensions: int) -> None:
        def triple(low: int, high: int, unused: int) -> list[int]:
            return [rng.randint(low, high) if i < dimensions else unused for i in range(3)]

        self.kernel = triple(1, 4, 1)
        self.stride = triple(1, 8, 1)
        self.padding = triple(0, 5, 0)
        self.dilation = triple(1, 4, 1)
        reach = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel, strict=True)]
        self.size = [
            max(1, r - 2 * p) + (rng.randint(0, 20) if i < dimensions else 0)
            for i, (r, p) in enumerate(zip(reach, self.padding, strict=True))
        ]
        self.batch = rng.randint(1, 4)
        sizes = zip(self.size, reach, self.stride, self.padding, strict=True)
        self.out = [(n + 2 * p - r) // s + 1 for n, r, s, p in sizes]

    @property
    def positions(self) -> int:
        return self.batch * math.prod(self.out)

    @property
    def fields(self) -> ctypes.Array[ctypes.c_int32]:
        values = [*self.out, *self.kernel, *self.stride, *self.padding, *self.dilation]
        return (ctypes.c_int32 * 15)(*values)

    def defined(self, position: int, tap: int) -> tuple[int, ...] | None:
        """The element of x, (image, depth, height, width), or nothing: padding, or no such position."""
        at = []
        for i in range(3):
            position, out = divmod(position, self.out[i])
            tap, offset = divmod(tap, self.kernel[i])
            at.append(out * self.stride[i] - self.padding[i] + offset * self.dilation[i])
        inside = all(0 <= x < n for x, n in zip(at, self.size, strict=True)) and position < self.batch
        return (position, *reversed(at)) if inside else None


def copied(
    geometry: Geometry, pixels: int, corners: list[int], start: list[int], offsets: list[int]
) -> list[tuple[int, ...] | None]:
    """What an im2col copy of so many pixels brings, as the PTX manual has it.

    From the base in the box by the traversal strides, row after row and image after image; the offsets are
    added to every pixel.
    """
    *pixel, image = start
    brought = []
    for _ in range(pixels):
        at = [p + o for p, o in zip(pixel, offsets, strict=True)]
        inside = all(0 <= x < n for x, n in zip(at, geometry.size, strict=True)) and image < geometry.batch
        brought.append((image, *reversed(at)) if inside else None)
        for i in range(3):
            pixel[i] += geometry.stride[i]
            if pixel[i] < geometry.size[i] + corners[2 * i + 1]:
                break
            pixel[i] = corners[2 * i]
        else:
            image += 1
    return brought


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_copies_bring_the_patches(layout: ctypes.CDLL, dimensions: int) -> None:
    rng = random.Random(dimensions)
    size = layout.stage_positions()
    for _ in range(60):
        geometry = Geometry(rng, dimensions)
        stages = min(12, -(-geometry.positions // size))
        corners, starts = (ctypes.c_int32 * 6)(), (ctypes.c_int32 * (4 * stages))()
        layout.corners(geometry.fields, corners)
        layout.stage_pixels(geometry.fields, stages, starts)
        for stage, tap in itertools.product(range(stages), range(math.prod(geometry.kernel))):
            offsets = (ctypes.c_int32 * 3)()
            layout.tap_offsets(geometry.fields, tap, offsets)
            start = list(starts[4 * stage : 4 * stage + 4])
            brought = copied(geometry, size, list(corners), start, list(offsets))
            assert brought == [geometry.defined(stage * size + i, tap) for i in range(size)], vars(geometry)


def test_clusters_share_the_work(layout: ctypes.CDLL) -> None:
    waves = [check_clusters(layout, random.Random(seed)) for seed in range(200)]
    assert min(waves) == 0
    assert max(waves) > 1


def check_clusters(layout: ctypes.CDLL, rng: random.Random) -> int:
    """Of a random problem; the number of its waves of whole tiles."""
    problem = (
        *(ctypes.c_int64(rng.randint(1, high)) for high in (700, 400, 9, 9000)),
        ctypes.c_bool(rng.random() < 0.5),
        rng.choice([2, 7, 132]),
    )
    numbers = (ctypes.c_int64 * 5)()
    flat = (ctypes.c_int64 * 240000)()
    count = layout.pieces(*problem, numbers, flat)
    cluster, tiles, stages, clusters, waves = numbers
    found = [tuple(flat[6 * i : 6 * i + 6]) for i in range(count)]
    rows = [row[:5] for row in found]
    assert clusters * cluster <= problem[-1]
    # a warp of the producer that has no chunk does not wait, and may not have one again: two laps on, the
    # parity of a barrier says nothing
    for (one, *_, before), (other, *_, chunks) in itertools.pairwise(found):
        assert one != other or chunks <= before
    # every stage of every tile once; each cluster has its pieces in this order
    covered = sorted((tile, stage) for _, tile, begin, end, _ in rows for stage in range(begin, end))
    assert covered == [(tile, stage) for tile in range(tiles) for stage in range(stages)]
    # whole waves first: in each of them neighbours sum neighbouring tiles
    whole = waves * clusters
    assert tiles - whole < (problem[-1] // cluster if waves else tiles + 1)
    assert [row for row in rows if row[1] < whole] == [
        (c, wave * clusters + c, 0, stages, -1) for c in range(clusters) for wave in range(waves)
    ]
    # and what is left in equal parts
    rest = [row for row in rows if row[1] >= whole]
    lengths = [sum(end - begin for c, _, begin, end, _ in rest if c == one) for one in range(clusters)]
    lengths = lengths[: 1 + max((c for c, *_ in rest), default=-1)]
    assert len(set(lengths[:-1])) <= 1
    assert not lengths or 0 < lengths[-1] <= lengths[0]
    # a slot is written once, and every one that is written is added, in the order of segments
    written = [(tile, segment, slot) for segment, tile, _, _, slot in rows if slot >= 0]
    assert len({(segment, slot) for _, segment, slot in written}) == len(written)
    added = (ctypes.c_int64 * 100000)()
    total = layout.parts(*problem, added)
    assert [tuple(added[3 * i : 3 * i + 3]) for i in range(total)] == sorted(written)
    return waves


@pytest.mark.parametrize(
    ("channels", "taps", "columns", "tile"),
    [
        (384, 9, 3584, 256),
        (4096, 1, 4096, 256),
        (96, 9, 896, 224),
        (64, 9, 576, 192),
        (64, 1, 64, 64),
        (128, 1, 128, 128),
        (32, 27, 896, 224),
    ],
)
def test_tiles_leave_few_columns_empty(
    layout: ctypes.CDLL, channels: int, taps: int, columns: int, tile: int
) -> None:
    assert shapes(layout, channels, taps)[0] == (columns, tile)


def shapes(layout: ctypes.CDLL, channels: int, taps: int) -> list[tuple[int, int]]:
    """Columns that are multiplied and those of a tile, of the chosen shape and of all that there are."""
    rows = (ctypes.c_int64 * 40)()
    count = layout.tile_shapes(ctypes.c_int64(channels), ctypes.c_int64(taps), rows)
    return [(rows[2 * i], rows[2 * i + 1]) for i in range(count)]


def test_no_other_tile_multiplies_much_less(layout: ctypes.CDLL) -> None:
    for channels, taps in itertools.product(range(32, 520, 8), (1, 3, 9, 25, 27)):
        (chosen, _), *others = shapes(layout, channels, taps)
        assert chosen >= channels * taps
        assert 0.95 * 0.95 * chosen <= min(columns for columns, _ in others)


def test_partial_sums_have_places_of_their_own(layout: ctypes.CDLL) -> None:
    places = [layout.partial_index(ctypes.c_int64(b), s, c, q, t) for b, s, c, q, t in itertools.product(
        range(2), range(2), range(2), range(32), range(128))]  # fmt: skip
    assert places == list(range(2 * layout.block_workspace() // 16))
