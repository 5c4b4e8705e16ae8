"""The sparse correlation against the dense product in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from oracle import EPS32, assert_as_good, embed, guards_intact
from torch import Tensor

from ghl_kernels._geometry import Geometry
from ghl_kernels.backends import eager
from ghl_kernels.backends.cuda.kernels import sparse
from ghl_kernels.backends.gpu.layout import patches
from ghl_kernels.rule import Competition

SEGMENT = 64  # kShortestSegment
SLICE = 1024  # kSliceLength
BINS = 4096  # kBins

pytestmark = pytest.mark.usefixtures("cuda", "poison")


class Given(NamedTuple):
    """Inputs of one correlation; geometry None is a linear layer."""

    x: Tensor
    unit: Tensor
    activity: Tensor
    units: int
    geometry: Geometry | None


CASES = {
    "linear": ((9, 19), None),
    "linear narrow": ((9, 3), None),
    "linear vectors": ((40, 1104), None),
    "1d stride": ((2, 5, 11), Geometry((3,), (2,), (1,), (1,), 1)),
    "1d groups": ((2, 6, 7), Geometry((2,), (1,), (0,), (3,), 3)),
    "2d": ((2, 3, 4, 5), Geometry((3, 2), (1, 2), (1, 0), (1, 1), 1)),
    "2d many taps": ((2, 4, 9, 8), Geometry((7, 7), (1, 1), (3, 3), (1, 1), 1)),
    "2d many channels": ((1, 19, 3, 3), Geometry((2, 2), (1, 1), (1, 1), (2, 1), 1)),
    "2d vectors": ((1, 32, 3, 3), Geometry((2, 2), (1, 1), (1, 1), (1, 1), 2)),
    "3d": ((1, 4, 3, 4, 3), Geometry((2, 1, 3), (1, 2, 1), (1, 0, 1), (1, 1, 1), 2)),
    "point": ((2, 10, 3, 3), Geometry((1, 1), (1, 1), (0, 0), (1, 1), 1)),
}


def random_case(
    name: str, k: int = 2, *, units: int = 6, dtype: torch.dtype = torch.float32, layout: str = "contiguous"
) -> Given:
    shape, geometry = CASES[name]
    positions = (shape[0], *geometry.out_size(shape[2:])) if geometry else shape[:1]
    u = torch.randn(*positions, units)
    unit, activity = eager.winners(u, u.dim() - 1, Competition("linear", k, 1.0, False))
    return Given(embed(torch.randn(shape).to(dtype), layout), unit, activity, units, geometry)


def random_lists(positions: int, k: int, units: int, features: int = 5) -> Given:
    # distinct in each row
    unit = (torch.randint(0, units, (positions, 1)) + torch.arange(k)) % units
    return Given(torch.randn(positions, features), unit.int(), torch.randn(positions, k), units, None)


def dense(given: Given, dtype: torch.dtype, *, magnitudes: bool = False) -> tuple[Tensor, Tensor]:
    """A as (units, channels, taps) and sum y by the dense product; of absolute values with magnitudes."""
    x, activity = given.x.to(dtype), given.activity.to(dtype)
    if magnitudes:
        x, activity = x.abs(), activity.abs()
    if given.geometry is None:
        A, moments = eager.linear_winner_sums(x, given.unit, activity, given.units, "instar")
    else:
        A, moments = eager.conv_winner_sums(x, given.unit, activity, given.units, given.geometry, "instar")
    return A.reshape(*A.shape[:2], -1), moments[:-1]


def run(given: Given, *, sum_activity: bool = True) -> tuple[Tensor, Tensor | None]:
    return sparse.correlate(
        patches(given.x, given.geometry), given.unit, given.activity, given.units, sum_activity
    )


def assert_right(given: Given) -> None:
    A, sums = run(given)
    assert A.is_contiguous()
    assert A.dtype == torch.float32
    assert sums is not None
    wanted = zip(
        dense(given, torch.float32),
        dense(given, torch.float64),
        dense(given, torch.float64, magnitudes=True),
        strict=True,
    )
    for actual, (baseline, exact, magnitude) in zip((A, sums), wanted, strict=True):
        assert_as_good(actual, baseline, exact, 8 * EPS32 * magnitude.nan_to_num(0.0))


@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("name", CASES)
def test_every_geometry(name: str, k: int) -> None:
    assert_right(random_case(name, k))


@pytest.mark.parametrize("layout", ["channels_last", "slice", "step"])
@pytest.mark.parametrize("name", ["linear", "1d groups", "2d", "2d vectors", "3d"])
def test_layouts_of_x(name: str, layout: str) -> None:
    given = random_case(name, layout=layout)
    assert_right(given)
    if layout != "channels_last":
        assert guards_intact(given.x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", ["linear", "linear vectors", "2d", "2d vectors"])
def test_16_bit_inputs(name: str, layout: str, dtype: torch.dtype) -> None:
    assert_right(random_case(name, dtype=dtype, layout=layout))


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("pitch", [32, 36, 33])
def test_rows_that_are_not_aligned(offset: int, pitch: int) -> None:
    """Rows of 32 elements of 16 bits, at multiples of 64, 72 and 66 bytes, and an element further."""
    buffer = torch.full((20 * pitch + 1,), math.nan, dtype=torch.bfloat16)
    x = buffer[offset : offset + 20 * pitch].view(20, pitch)[:, :32].copy_(torch.randn(20, 32))
    given = random_lists(20, 2, 5)
    assert_right(given._replace(x=x))


@pytest.mark.parametrize(
    "count", [1, 127, 128, 129, SEGMENT - 1, SEGMENT, SEGMENT + 1, 2 * SEGMENT, 9 * SEGMENT + 3]
)
def test_a_unit_that_wins_everywhere(count: int) -> None:
    """At the boundaries of segments; the units without a win get 0."""
    unit = torch.full((count, 1), 2, dtype=torch.int32)
    given = Given(torch.randn(count, 5), unit, torch.randn(count, 1), 4, None)
    assert_right(given)
    A, sums = run(given)
    assert int((A[[0, 1, 3]] == 0).sum()) == 15
    assert sums is not None
    assert int((sums == 0).sum()) == 3


def test_a_hot_unit_of_a_convolution() -> None:
    geometry = Geometry((3, 3), (1, 1), (1, 1), (1, 1), 2)
    x = torch.randn(3, 16, 14, 14).contiguous(memory_format=torch.channels_last)
    unit = torch.randint(0, 3, (3 * 14 * 14, 2), dtype=torch.int32)
    unit[:, 1] = 3
    assert_right(Given(x, unit, torch.randn(unit.shape), 4, geometry))


def test_hot_and_cold_units_side_by_side() -> None:
    """One segment and several, whole and not: neighbors in the workspace."""
    runs = [2 * SEGMENT + 1, 0, 1, SEGMENT, SEGMENT + 1, 0, 3 * SEGMENT]
    unit = torch.cat([torch.full((n,), i, dtype=torch.int32) for i, n in enumerate(runs)])
    order = torch.randperm(len(unit))
    assert_right(Given(torch.randn(len(unit), 7), unit[order, None], torch.randn(len(unit), 1), 7, None))


@pytest.mark.parametrize(
    "entries",
    [SLICE - 1, SLICE, 2 * SLICE, pytest.param(2 * SLICE + 1, marks=pytest.mark.races), 5 * SLICE - 7],
)
def test_the_sort_is_in_slices(entries: int) -> None:
    assert_right(random_lists(entries, 1, 9))


@pytest.mark.parametrize("units", [511, 512, 1025, BINS + 5])
def test_more_units_than_a_block_takes(units: int) -> None:
    """Of the scan over bins, and of the table of counts in shared memory; two slices of both."""
    given = random_lists(4 * units + 11, 1, units, features=1)
    given.unit[5] = units - 1
    assert_right(given)


def test_the_sort_keeps_the_order_of_positions() -> None:
    """In another order they do not give 1: (2^25 + 1) - 2^25 loses it, (2^25 - 2^25) + 1 does not."""
    activity = torch.zeros(8 * 40, 1)
    # all on one way of the gather: every 16th entry of the unit's list
    activity[16], activity[32], activity[48] = 2.0**25, -(2.0**25), 1.0
    unit = torch.zeros(8 * 40, 1, dtype=torch.int32)
    A, _ = run(Given(torch.ones(8 * 40, 1), unit, activity, 2, None))
    assert A[0, 0, 0] == 1.0


@pytest.mark.parametrize("name", ["linear", "2d"])
@pytest.mark.parametrize("position", [0, -1])
def test_a_nan_position_makes_everything_nan(name: str, position: int) -> None:
    given = random_case(name)
    given.unit[position, 0] = -1
    given.activity[position] = math.nan
    A, sums = run(given)
    assert bool(A.isnan().all())
    assert sums is not None
    assert bool(sums.isnan().all())


@pytest.mark.parametrize("unit", [-(1 << 31), -2, 6, 7, (1 << 31) - 1])
def test_a_unit_that_does_not_exist_makes_everything_nan(unit: int) -> None:
    given = random_case("2d")
    given.unit[3, 1] = unit
    A, sums = run(given)
    assert bool(A.isnan().all())
    assert sums is not None
    assert bool(sums.isnan().all())


def test_infinite_inputs_reach_the_units_that_saw_them() -> None:
    given = random_lists(300, 1, 3)
    given.unit[7] = 1
    given.x[7, 2] = math.inf
    A, _ = run(given)
    assert A[1, 2, 0].isinf()
    assert int(A.isfinite().sum()) == A.numel() - 1


SCHEDULES = [("reverse", 0), ("random", 1), ("random", 2)]


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: random_case("2d", 5, units=8), marks=pytest.mark.races),
        lambda: random_case("2d vectors", 3, dtype=torch.bfloat16, layout="channels_last"),
        lambda: random_lists(2 * SLICE + 5, 1, 3),
    ],
)
def test_the_same_bits_in_every_order_of_threads(cuda: ModuleType, make: Callable[[], Given]) -> None:
    given = make()
    expected = run(given)
    for order, number in SCHEDULES:
        cuda.schedule(order, number)
        assert all(torch.equal(a, b) for a, b in zip(run(given), expected, strict=True))


def test_lists_and_activities_of_any_strides() -> None:
    given = random_case("linear", 3)
    unit, activity = (t.t().contiguous().t() for t in (given.unit, given.activity))
    assert torch.equal(run(given)[0], run(given._replace(unit=unit, activity=activity))[0])


def test_sums_only_where_asked_for() -> None:
    given = random_case("linear")
    A, sums = run(given, sum_activity=False)
    assert sums is None
    assert torch.equal(A, run(given)[0])


def test_no_positions() -> None:
    given = Given(torch.randn(0, 5), torch.empty(0, 2, dtype=torch.int32), torch.empty(0, 2), 4, None)
    A, sums = run(given)
    assert A.shape == (4, 5, 1)
    assert not bool(A.any())
    assert sums is not None
    assert not bool(sums.any())


def test_no_columns() -> None:
    given = random_case("linear")
    A, sums = run(given._replace(x=torch.randn(9, 0)))
    assert A.shape == (6, 0, 1)
    assert torch.allclose(sums, dense(given, torch.float32)[1])


def test_no_units() -> None:
    given = Given(torch.randn(3, 5), torch.empty(3, 0, dtype=torch.int32), torch.empty(3, 0), 0, None)
    A, sums = run(given)
    assert A.shape == (0, 5, 1)
    assert sums is not None
    assert sums.shape == (0,)


def test_a_missing_workspace_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse, "workspace", lambda *_: None)
    with pytest.raises(RuntimeError, match="of 6 units of 5 inputs with 18 winners: no workspace"):
        run(random_lists(9, 2, 6))


def test_a_spatial_size_beyond_31_bits_is_refused(cuda: ModuleType) -> None:
    x = torch.zeros(1).expand(1, 1, 1 << 31)
    geometry = Geometry((1,), (1 << 30,), (0,), (1,), 1)
    given = Given(x, torch.zeros(2, 1, dtype=torch.int32), torch.zeros(2, 1), 1, geometry)
    with pytest.raises(RuntimeError, match="sparse correlation of 1 units of 1 inputs with 2 winners"):
        run(given)


@pytest.mark.parametrize("columns", [1, 27, 576, 4608, 65_536])
@pytest.mark.parametrize("entries", [1, 255, 4096, 1_048_576, 1 << 26])
def test_the_workspace_is_bounded(cuda: ModuleType, entries: int, columns: int) -> None:
    """Two rows of segments, 32 MiB of them, 16 bytes an entry, counts of at most 4 bytes an entry."""
    units, ones, zeros = 512, (1, 1, 1), (0, 0, 0)
    size = cuda.sparse_workspace(
        batch=entries,
        channels=columns,
        groups=1,
        in_size=ones,
        out_size=ones,
        kernel=ones,
        stride=ones,
        padding=zeros,
        dilation=ones,
        winner_unit=0,
        winner_activity=0,
        winners=1,
        x=0,
        x_dtype=0,
        x_stride_batch=0,
        x_stride_channel=1,
        x_stride=zeros,
        units=units,
        a_layout=zeros,
        device=0,
        stream=0,
    )
    rows = max(32 << 20, 16 * (columns + 1))
    assert size <= rows + 20 * entries + 8 * 3 * (units + 1) + 5 * 256
