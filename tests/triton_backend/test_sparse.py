"""The sparse correlation against the dense product in float64."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from oracle import EPS32, assert_as_good, embed, guards_intact
from torch import Tensor

from ghl_kernels._geometry import Geometry
from ghl_kernels.backends import eager
from ghl_kernels.backends.gpu.layout import patches
from ghl_kernels.backends.triton.kernels import sparse
from ghl_kernels.backends.triton.launch import recording
from ghl_kernels.rule import Competition


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several segments, pieces of a segment and blocks of columns, at sizes that are quick here."""
    for name, value in (
        *(("SEGMENT", 8), ("ENTRIES", 4), ("COLUMNS", 16)),
        *(("SEARCHED", 4), ("SCANNED", 4), ("TOGETHER", 2)),
    ):
        monkeypatch.setattr(sparse, name, value)


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
    "1d stride": ((2, 5, 11), Geometry((3,), (2,), (1,), (1,), 1)),
    "1d groups": ((2, 6, 7), Geometry((2,), (1,), (0,), (3,), 3)),
    "2d": ((2, 3, 4, 5), Geometry((3, 2), (1, 2), (1, 0), (1, 1), 1)),
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
@pytest.mark.parametrize("name", ["linear", "2d", "2d vectors"])
def test_16_bit_inputs(name: str, dtype: torch.dtype) -> None:
    assert_right(random_case(name, dtype=dtype, layout="channels_last" if name != "linear" else "contiguous"))


@pytest.mark.parametrize("name", ["linear", "2d", "3d"])
def test_64_bit_offsets(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = random_case(name)
    narrow, _ = run(given)
    monkeypatch.setattr(sparse, "is_long", lambda *_: True)
    wide, _ = run(given)
    assert torch.equal(narrow, wide)


@pytest.mark.parametrize("name", ["linear", "2d"])
def test_real_tiles(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert_right(random_case(name))


@pytest.mark.parametrize("count", [1, 7, 8, 9, 16, 17, 32])
def test_a_unit_that_wins_everywhere(count: int) -> None:
    """At the boundaries of segments of 8; the units without a win get 0."""
    x, unit = torch.randn(count, 5), torch.full((count, 1), 2, dtype=torch.int32)
    given = Given(x, unit, torch.randn(count, 1), 4, None)
    assert_right(given)
    A, _ = run(given)
    assert int((A[[0, 1, 3]] == 0).sum()) == 15


def test_hot_and_cold_units_side_by_side() -> None:
    """Runs of 17, 0, 1, 8, 9, 0, 24 entries: one segment and several, neighbors in the workspace."""
    runs = [17, 0, 1, 8, 9, 0, 24]
    unit = torch.cat([torch.full((n,), i, dtype=torch.int32) for i, n in enumerate(runs)])
    order = torch.randperm(len(unit))
    assert_right(Given(torch.randn(len(unit), 7), unit[order, None], torch.randn(len(unit), 1), 7, None))


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


def test_the_same_bits_every_time() -> None:
    given = random_case("2d", 5, units=8)
    one, other = run(given), run(given)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_lists_and_activities_of_any_strides() -> None:
    given = random_case("linear", 3)
    unit, activity = (t.t().contiguous().t() for t in (given.unit, given.activity))
    assert torch.equal(run(given)[0], run(given._replace(unit=unit, activity=activity))[0])


def test_sums_only_where_asked_for() -> None:
    given = random_case("linear")
    A, sums = run(given, sum_activity=False)
    assert sums is None
    assert torch.equal(A, run(given)[0])


def test_no_positions_and_no_columns() -> None:
    given = Given(torch.randn(0, 5), torch.empty(0, 2, dtype=torch.int32), torch.empty(0, 2), 4, None)
    A, sums = run(given)
    assert A.shape == (4, 5, 1)
    assert not bool(A.any())
    assert sums is not None
    assert not bool(sums.any())
    given = random_case("linear")
    A, sums = run(given._replace(x=torch.randn(9, 0)))
    assert A.shape == (6, 0, 1)
    assert torch.allclose(sums, dense(given, torch.float32)[1])


def test_undefined_winners_do_not_stop_a_recording() -> None:
    """Under recording() the lists were never written."""
    for value in (torch.iinfo(torch.int32).max, torch.iinfo(torch.int32).min, -1, 0):
        given = random_case("2d")
        given.unit.fill_(value)
        with recording() as launches:
            run(given)
        assert [one.kernel for one in launches] == [
            *(sparse.starts_kernel, sparse.ends_kernel, sparse.owners_kernel),
            *(sparse.gather_kernel, sparse.combine_kernel),
        ]


def test_units_that_take_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were more of them than sorted keys of 16 bits can tell apart."""
    given = random_case("linear", 3)
    narrow = run(given)
    monkeypatch.setattr(sparse, "_INT16", given.units - 1)
    assert all(torch.equal(*pair) for pair in zip(run(given), narrow, strict=True))


@pytest.mark.parametrize("columns", [1, 27, 576, 4608, 65_536, 1 << 24])
@pytest.mark.parametrize("entries", [1, 255, 4096, 1_048_576, 3 << 30])
def test_the_workspace_is_bounded(entries: int, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    length = sparse.segment_length(entries, columns)
    rows = sparse.workspace_rows(entries, length)
    assert length >= sparse.SEGMENT
    assert rows <= 4 or 4 * rows * (columns + 1) <= sparse.WORKSPACE_BYTES


def test_segments_never_share_a_row_of_the_workspace() -> None:
    """The kernel's formula, over random runs of entries."""
    for length in (1, 4, 7):
        runs = torch.randint(0, 4 * length, (200,)).tolist()
        rows, first = [], 0
        for run_length in runs:
            segments = math.ceil(run_length / length)
            if segments > 1:
                rows += [(first // length + s) * 2 + (s == segments - 1) for s in range(segments)]
            first += run_length
        assert len(rows) == len(set(rows))
        assert max(rows) < sparse.workspace_rows(sum(runs), length)
