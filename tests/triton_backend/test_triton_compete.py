"""The Triton competition against the eager one in float64, exactly where selection is concerned."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from oracle import EPS32, assert_as_good, embed, guards_intact
from strategies import UNITS, rules
from torch import Tensor

from ghl_kernels.backends import eager
from ghl_kernels.backends.gpu.layout import responses
from ghl_kernels.backends.gpu.state import needs
from ghl_kernels.backends.triton.arch import KNOWN, Arch
from ghl_kernels.backends.triton.kernels import compete, select, tiles
from ghl_kernels.backends.triton.launch import recording
from ghl_kernels.rule import Competition

# numpy warns of the infinities and NaN that the interpreter computes with
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# name: (shape but for the units, their dimension, layout of oracle.embed)
LAYOUTS = {
    "rows": ((3,), 1, "contiguous"),
    "planes": ((2, 2, 3), 1, "contiguous"),
    "channels_last": ((1, 2, 2), 1, "channels_last"),
    "row slices": ((3,), 1, "slice"),
    "plane slices": ((2, 2, 2), 1, "slice"),
    "steps": ((2, 2), 2, "step"),
}


def noise(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape) * 3


def coarse(shape: tuple[int, ...]) -> Tensor:
    return torch.randint(-2, 3, shape).float()


def make(
    units: int, layout: str, dtype: torch.dtype, values: Callable[..., Tensor] = noise
) -> tuple[Tensor, int]:
    """u in a layout, and the dimension of its units."""
    others, dim, embedding = LAYOUTS[layout]
    return embed(values((*others[:dim], units, *others[dim:])).to(dtype), embedding), dim


def roundings(u: Tensor, competition: Competition) -> float:
    """Relative error of a softmax that is made from a float32 logsumexp."""
    largest = u.double().nan_to_num(0.0, 0.0, 0.0).abs().max().item() if u.numel() else 0.0
    return EPS32 * (8 + 2 * largest / competition.temperature)


def assert_activities(actual: Tensor, u: Tensor, dim: int, competition: Competition) -> None:
    """y (of u's shape) is that of float64: exact, but for what softmax rounds."""
    oracle = eager.compete(u.double(), dim, competition)
    if competition.activity != "softmax":
        assert torch.equal(actual.isnan(), oracle.isnan())
        assert torch.equal(actual.nan_to_num(0.0), oracle.to(actual.dtype).nan_to_num(0.0))
        return
    relative = roundings(u, competition)
    if actual.dtype != torch.float32:
        relative += torch.finfo(actual.dtype).eps
    floor = relative * oracle.abs().nan_to_num(0.0) + torch.finfo(actual.dtype).smallest_normal * EPS32
    if actual.dtype == torch.float16:
        floor += 2.0**-24
    assert_as_good(actual, eager.compete(u.float(), dim, competition), oracle, floor)
    assert torch.equal(actual == 0, oracle.to(actual.dtype) == 0) or not competition.winners


def check(u: Tensor, dim: int, competition: Competition) -> None:
    """Everything that the module computes for one u."""
    view = responses(u, dim)
    bad = u.isnan().any(dim).flatten()
    threshold, cut, logsumexp = compete.full_state(view, competition)
    oracle = [field.flatten() for field in eager.competition_state(u.double(), dim, competition)]
    plain = eager.competition_state(u.float(), dim, competition)[2].flatten()
    assert_same(threshold, oracle[0])
    assert_same(cut, oracle[1])
    infinite = oracle[2].isinf()
    assert torch.equal(logsumexp[infinite].double(), oracle[2][infinite])
    allowed = roundings(u, competition) * (1 + oracle[2].abs()).nan_to_num(0.0, 0.0, 0.0)
    finite = [field.masked_fill(infinite, 0.0)[:, None] for field in (logsumexp, plain, oracle[2], allowed)]
    assert_as_good(*finite)

    y = compete.activities(u, dim, competition)
    assert y.dtype == u.dtype
    assert y.stride() == torch.empty_like(u).stride()
    assert_activities(y, u, dim, competition)

    state = compete.state(view, competition)
    assert [field is not None for field in state] == list(needs(competition))
    if competition.winners:
        assert_same(state.threshold, oracle[0])
        assert_same(state.cut, oracle[1])
        unit, activity = compete.winner_lists(view, competition)
        expected = eager.winners(u.double(), dim, competition)[0]
        assert torch.equal(unit[~bad], expected[~bad])
        assert (unit[bad, 0] == -1).all()
        assert activity[bad].isnan().all()
        listed = y_rows(y, dim).gather(1, unit.clamp_min(0).long())
        assert torch.equal(activity.to(y.dtype).nan_to_num(7.0), listed.nan_to_num(7.0))
    elif state.threshold is not None:
        assert torch.equal(state.threshold.isnan(), bad)
        assert (state.threshold[~bad] == 0).all()
    if state.first is not None:
        assert torch.equal(state.first[~bad].long(), y_rows(u.double(), dim).argmax(1)[~bad])

    sums = compete.activity_sums(view, state, competition)
    y, plain = (y_rows(eager.compete(v, dim, competition), dim) for v in (u.double(), u.float()))
    floor = (roundings(u, competition) + 8 * EPS32) * y.abs().nan_to_num(0.0).sum(0)
    assert_as_good(sums[:, None], plain.sum(0)[:, None], y.sum(0)[:, None], floor[:, None])


def y_rows(y: Tensor, dim: int) -> Tensor:
    return y.movedim(dim, -1).reshape(-1, y.shape[dim])


def assert_same(actual: Tensor | None, oracle: Tensor) -> None:
    assert actual is not None
    assert torch.equal(actual.isnan(), oracle.isnan())
    assert torch.equal(actual.double().nan_to_num(0.0), oracle.double().nan_to_num(0.0))


@pytest.mark.parametrize("units", [1, 2, 3, 7, 8, 17, 31, 64, 67, 130, 300])
def test_every_size(units: int) -> None:
    counts = sorted({1, min(2, units), max(1, units // 2), units})
    turns = itertools.count(units)
    for k, turn in zip(counts, turns, strict=False):
        u, dim = make(units, list(LAYOUTS)[turn % len(LAYOUTS)], DTYPES[turn % 3])
        check(u, dim, Competition("softmax" if turn % 2 else "linear", k, 1.0, False))


@pytest.mark.parametrize("units", [5, 300])
def test_many_programs(units: int) -> None:
    """Several tiles of positions, in rows and in each of several items."""
    for u in (noise((150 if units < 300 else 5, units)), noise((2, units, 140 if units < 300 else 35))):
        check(u.bfloat16(), 1, Competition("linear", min(units, 4), 1.0, False))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts_and_ties(layout: str, dtype: torch.dtype) -> None:
    u, dim = make(37, layout, dtype, coarse)
    check(u, dim, Competition("linear", 9, 1.0, False))
    if "slice" in layout or layout == "steps":
        assert guards_intact(u)


@pytest.mark.parametrize("competition", [
    Competition(activity, winners, temperature, anti)
    for activity, winners, temperature, anti in itertools.product(
        ("softmax", "linear", "relu", "binary"), (0, 1, 6), (1.0, 0.2), (False, True)
    )
    if not (anti and winners == 1) and not (activity == "binary" and winners == 0)
    and (activity == "softmax" or temperature == 1.0)
], ids=str)  # fmt: skip
def test_activities(competition: Competition) -> None:
    for layout, dtype, values in (("rows", torch.bfloat16, coarse), ("planes", torch.float32, noise)):
        u, dim = make(29, layout, dtype, values)
        check(u, dim, competition)


def awkward_rows() -> Tensor:
    """Rows of 75 units, each awkward in its own way."""
    inf, tiny = float("inf"), torch.finfo(torch.float32).smallest_normal
    rows = torch.randn(16, 75)
    rows[0] = -1.5
    rows[1] = 0.0
    rows[1, ::3] = -0.0
    rows[2] = rows[2].clamp(min=0.0)
    rows[2, 1::2] *= -1.0
    rows[3, ::11], rows[3, 5::7] = inf, -inf
    rows[4] = -inf
    rows[5] = inf
    rows[6] = torch.arange(75.0)
    rows[7] = -torch.arange(75.0)
    rows[8] = torch.randint(-2, 3, (75,)) * tiny
    rows[9, 40:] = -inf
    rows[10, 17] = float("nan")
    rows[11] = float("nan")
    rows[12, 70], rows[12, 3] = float("nan"), inf
    rows[13, 5] = -float("nan")
    rows[14] = torch.randint(-2, 3, (75,)) * 3e4
    return rows


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("competition", [
    Competition("linear", 1, 1.0, False), Competition("binary", 7, 1.0, True),
    Competition("softmax", 33, 0.5, False), Competition("relu", 75, 1.0, True),
    Competition("softmax", 0, 1.0, True), Competition("linear", 0, 1.0, False),
    Competition("relu", 0, 1.0, True),
], ids=str)  # fmt: skip
def test_awkward_values(competition: Competition, dtype: torch.dtype) -> None:
    rows = awkward_rows().to(dtype)
    y = compete.activities(rows, 1, competition)
    for row, actual in zip(rows, y, strict=True):
        assert_activities(actual, row, 0, competition)
    if competition.winners:
        threshold, cut, _ = compete.full_state(responses(rows, 1), competition)
        oracle = eager.competition_state(rows.double(), 1, competition)
        assert_same(threshold, oracle[0])
        assert_same(cut, oracle[1])
        unit, activity = compete.winner_lists(responses(rows, 1), competition)
        bad = rows.isnan().any(1)
        assert torch.equal(unit[~bad], eager.winners(rows.double(), 1, competition)[0][~bad])
        assert torch.equal(unit[:, 0] == -1, bad)
        assert ((unit[:, 1:] >= 0) & (unit[:, 1:] < 75)).all()
        assert activity[bad].isnan().all()


@pytest.mark.parametrize(("layout", "dtype", "values"), [
    ("rows", torch.float32, noise), ("rows", torch.bfloat16, coarse),
    ("planes", torch.float32, coarse), ("planes", torch.bfloat16, noise),
])  # fmt: skip
def test_rows_longer_than_a_tile(
    monkeypatch: pytest.MonkeyPatch, layout: str, dtype: torch.dtype, values: Callable[..., Tensor]
) -> None:
    monkeypatch.setattr(tiles, "_MOST_UNITS", 64)
    monkeypatch.setattr(tiles, "_CHUNK", 64 if layout == "rows" else 64 * 32 // dtype.itemsize)
    u, dim = make(130, layout, dtype, values)
    u.movedim(dim, -1)[(0,) * (u.dim() - 1)][100] = float("nan")
    for competition in (
        Competition("softmax", 5, 0.5, True), Competition("linear", 60, 1.0, False),
        Competition("softmax", 0, 1.0, False),
    ):  # fmt: skip
        check(u, dim, competition)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_very_long_rows(dtype: torch.dtype) -> None:
    u = noise((2, 65_536)).to(dtype)
    assert not tiles.tile_of(tiles.grid(responses(u, 1)), 65_536, 5, KNOWN["sm_90"]).whole
    for k in (5, 30_000):
        competition = Competition("softmax", k, 1.0, False)
        threshold, cut, _ = compete.full_state(responses(u, 1), competition)
        oracle = eager.competition_state(u.double(), 1, competition)
        assert_same(threshold, oracle[0])
        assert_same(cut, oracle[1])
        assert_activities(compete.activities(u, 1, competition), u, 1, competition)


@pytest.fixture
def bisections(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """An element for every tile that had to be bisected."""
    calls: list[None] = []
    original = select.bisect

    def counted(*arguments: Any) -> Any:
        calls.append(None)
        return original(*arguments)

    monkeypatch.setattr(select, "bisect", counted)
    return calls


def crowded() -> Tensor:
    """The k = 8 largest in one group, and dozens of distinct values above the eighth of two of each group."""
    row = torch.linspace(-10.0, -9.0, 256).view(8, 32)
    row[:, :8] = 200.0 - 8 * torch.arange(8.0) - torch.arange(8.0)[:, None]
    return row.flatten()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("negative", [False, True])
def test_bisection_ends_what_raising_does_not(
    bisections: list[None], dtype: torch.dtype, negative: bool
) -> None:
    competition = Competition("linear", 8, 1.0, False)
    easy, hard = noise((1, 256)).to(dtype), crowded().to(dtype)[None]
    if negative:
        hard = -1 / (hard + 11)
    check(easy, 1, competition)
    assert not bisections
    # beside it a row that is done before
    check(torch.cat([easy, hard]), 1, competition)
    assert bisections


def test_bisection_of_a_long_row(monkeypatch: pytest.MonkeyPatch, bisections: list[None]) -> None:
    monkeypatch.setattr(tiles, "_MOST_UNITS", 32)
    monkeypatch.setattr(tiles, "_CHUNK", 32)
    # columns hold the values 32 apart, so the 8 largest are in one column each of two
    u = torch.linspace(-1.0, 0.0, 320).view(10, 32)
    u[:, 0], u[:, 1] = torch.arange(50.0, 60.0), torch.arange(70.0, 80.0)
    check(u.flatten()[None], 1, Competition("linear", 8, 1.0, False))
    assert bisections


@pytest.mark.parametrize("shape", [(0, 5), (2, 5, 0), (0, 3, 4, 4)])
def test_no_positions(shape: tuple[int, ...]) -> None:
    u = torch.empty(shape)
    for competition in (Competition("softmax", 0, 1.0, False), Competition("linear", 2, 1.0, True)):
        assert compete.activities(u, 1, competition).shape == shape
        view = responses(u, 1)
        state = compete.state(view, competition)
        assert all(
            field.shape == (0,)
            for field in (*compete.full_state(view, competition), *state)
            if field is not None
        )
        assert torch.equal(compete.activity_sums(view, state, competition), torch.zeros(shape[1]))
        if competition.winners:
            assert compete.winner_lists(view, competition)[0].shape == (0, 2)


def test_output_that_is_laid_out_otherwise() -> None:
    """u has two runs of positions that y, being dense, has not; and other dimensions than y's merge."""
    competition = Competition("linear", 3, 1.0, False)
    for u in (
        torch.randn(3, 4, 9, 7)[..., :5],
        torch.randn(6, 4, 3, 5)[::2],
        torch.randn(2, 7, 4, 3, 5)[:, :5, :, ::2],
    ):
        for dim in (1, u.dim() - 1):
            y = compete.activities(u, dim, competition)
            assert y.stride() == torch.empty_like(u).stride()
            assert_activities(y, u, dim, competition)


@hypothesis.settings(max_examples=12)
@hypothesis.given(st.data())
def test_any_rule(data: st.DataObject) -> None:
    units = data.draw(st.sampled_from(UNITS))
    layout, dtype = data.draw(st.sampled_from(sorted(LAYOUTS))), data.draw(st.sampled_from(DTYPES))
    u, dim = make(units, layout, dtype, data.draw(st.sampled_from((noise, coarse))))
    check(u, dim, data.draw(rules(units)).competition(units))


def test_launches_can_be_listed() -> None:
    u = torch.randn(2, 24, 4, 4, dtype=torch.bfloat16)
    competition = Competition("softmax", 3, 1.0, True)
    with recording() as launches:
        view = responses(u, 1)
        state = compete.state(view, competition)
        compete.full_state(view, competition)
        compete.activities(u, 1, competition)
        compete.winner_lists(view, competition)
        compete.activity_sums(view, state, competition)
    kernels = [launched.kernel.__name__ for launched in launches]
    assert kernels == ["compete_kernel"] * 4 + ["activity_sums_kernel", "add_splits_kernel"]
    assert all(launched.blocks > 0 for launched in launches)


@pytest.mark.parametrize("gpu", KNOWN.values(), ids=lambda gpu: gpu.name)
@pytest.mark.parametrize("planes", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tiles(gpu: Arch, planes: bool, dtype: torch.dtype) -> None:
    """Of every shape: no more values a lane than planned, and enough groups wherever there are any."""
    for units, inner in itertools.product((*UNITS, 384, 1000, 4096, 70_000), (1, 49, 4096)):
        strides = (units * inner, 1, inner) if planes else (units * inner, units, 1)
        cut = tiles.Grid(torch.empty(0, dtype=dtype), 3, inner, *strides)
        winners = {0, 1, min(units, 9), units // 2, units}
        for k, beside in itertools.product(winners, ({}, {"lists": True})):
            tile = tiles.tile_of(cut, units, k, gpu, **beside)
            held = tile.positions * tile.units * tile.pieces
            # rows in pieces need registers for what is gathered over them
            assert held <= (24 if beside and tile.whole else 48) * gpu.warp * tile.warps
            assert tile.whole == (tile.units * tile.pieces >= units)
            assert tile.units <= units
            assert units <= 1 << tile.unit_bits or not tile.unit_bits
            if tile.bounded:
                assert 2 * k <= tile.units or (tile.pieces == 1 and tile.whole)
            # what ptxas is told it is told for these alone
            told = not gpu.is_amd and not tile.whole
            assert tile.registers == (255 if told else None)


@pytest.mark.parametrize("gpu", KNOWN.values(), ids=lambda gpu: gpu.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_lane_has_units_of_few_rows(gpu: Arch, dtype: torch.dtype) -> None:
    """Of at most four, however few units a load takes: of 16 rows it spilled what it keeps of each."""
    for units, padding in itertools.product((2, 10, 17, 32, 40, 64, 100), (0, 8, 15)):
        stride = units + padding
        tile = tiles.tile_of(tiles.Grid(torch.empty(0, dtype=dtype), 1, 8191, 0, stride, 1), units, 2, gpu)
        loads = max(1, tile.units // (16 // dtype.itemsize)) if stride % 16 == 0 else tile.units
        assert tile.positions * min(loads, gpu.warp) <= 4 * gpu.warp
        assert tile.positions > 1


@pytest.mark.parametrize(
    ("units", "inner", "winners", "lists", "expected"),
    [
        (384, 1, 8, False, (4, 64, 6, True, True, 9, 1, 1, None)),
        (384, 1, 8, True, (2, 64, 6, True, True, 9, 1, 1, None)),
        (384, 256, 8, False, (16, 64, 6, True, True, 9, 2, 4, None)),
        (384, 256, 8, True, (16, 64, 6, True, True, 9, 2, 8, None)),
        (1024, 1, 8, False, (1, 128, 8, True, True, 10, 1, 1, None)),
        (1024, 1, 8, True, (1, 128, 8, True, True, 10, 1, 2, None)),
        (1536, 1, 31, False, (1, 256, 6, True, True, 11, 1, 1, None)),
        (1536, 64, 31, False, (16, 256, 1, False, True, 0, 2, 8, 255)),
        (96, 1, 8, True, (8, 32, 3, True, True, 7, 1, 1, None)),
    ],
)
def test_tiles_of_layers_that_were_measured(
    units: int, inner: int, winners: int, lists: bool, expected: tuple[Any, ...]
) -> None:
    """On an H100 in bfloat16; a change of these is to be measured again."""
    u = torch.empty(1, dtype=torch.bfloat16)
    if inner == 1:
        cut = tiles.Grid(u, 1, 131_072, 131_072 * units, units, 1)
    else:
        cut = tiles.Grid(u, 512, inner, units * inner, 1, inner)
    assert tuple(tiles.tile_of(cut, units, winners, KNOWN["sm_90"], lists=lists)) == expected
