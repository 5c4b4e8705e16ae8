"""The CUDA competition, its kernels run on the host, against eager in float64: exact in what is selected."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable
from types import ModuleType

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from oracle import EPS32, assert_as_good, embed, guards_intact
from strategies import rules
from torch import Tensor

from ghl_kernels.backends import eager
from ghl_kernels.backends.cuda.kernels.arguments import addresses, stream_of
from ghl_kernels.backends.gpu.layout import responses
from ghl_kernels.backends.gpu.state import needs
from ghl_kernels.rule import Competition

# not by "from", which gives the operation of that name
compete = importlib.import_module("ghl_kernels.backends.cuda.kernels.compete")

pytestmark = pytest.mark.usefixtures("cuda", "poison")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# name: (shape but for the units, their dimension, layout of oracle.embed)
LAYOUTS = {
    "rows": ((3,), 1, "contiguous"),
    "planes": ((2, 2, 3), 1, "contiguous"),
    "wide planes": ((2, 40), 1, "contiguous"),
    "channels_last": ((2, 2, 2), 1, "channels_last"),
    "row slices": ((3,), 1, "slice"),
    "plane slices": ((2, 2, 2), 1, "slice"),
    "steps": ((2, 2), 2, "step"),
}


def noise(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape) * 3


def coarse(shape: tuple[int, ...]) -> Tensor:
    """Ties everywhere."""
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


def by_position(y: Tensor, dim: int) -> Tensor:
    return y.movedim(dim, -1).reshape(-1, y.shape[dim])


def assert_same(actual: Tensor | None, oracle: Tensor) -> None:
    assert actual is not None
    assert torch.equal(actual.isnan(), oracle.isnan())
    assert torch.equal(actual.double().nan_to_num(0.0), oracle.double().nan_to_num(0.0))


def assert_activities(actual: Tensor, u: Tensor, dim: int, competition: Competition) -> None:
    """y (of u's shape) is that of float64: exact, but for what softmax rounds."""
    oracle = eager.compete(u.double(), dim, competition)
    if competition.activity != "softmax":
        assert_same(actual, oracle.to(actual.dtype))
        return
    relative = roundings(u, competition)
    if actual.dtype != torch.float32:
        relative += torch.finfo(actual.dtype).eps
    floor = relative * oracle.abs().nan_to_num(0.0) + torch.finfo(actual.dtype).smallest_normal * EPS32
    if actual.dtype == torch.float16:
        floor += 2.0**-24
    assert_as_good(actual, eager.compete(u.float(), dim, competition), oracle, floor)
    assert torch.equal(actual == 0, oracle.to(actual.dtype) == 0) or not competition.winners


def assert_full_state(u: Tensor, dim: int, competition: Competition) -> None:
    threshold, cut, logsumexp = compete.full_state(responses(u, dim), competition)
    oracle = [field.flatten() for field in eager.competition_state(u.double(), dim, competition)]
    assert_same(threshold, oracle[0])
    assert_same(cut, oracle[1])
    infinite = oracle[2].isinf()
    assert torch.equal(logsumexp[infinite].double(), oracle[2][infinite])
    plain = eager.competition_state(u.float(), dim, competition)[2].flatten()
    allowed = roundings(u, competition) * (1 + oracle[2].abs()).nan_to_num(0.0, 0.0, 0.0)
    finite = [field.masked_fill(infinite, 0.0)[:, None] for field in (logsumexp, plain, oracle[2], allowed)]
    assert_as_good(*finite)


def assert_state(u: Tensor, dim: int, competition: Competition) -> None:
    """The state has what the competition needs, and the lists are the winners and their activities."""
    view, bad = responses(u, dim), u.isnan().any(dim).flatten()
    threshold, cut, _, first = state = compete.state(view, competition)
    assert [field is not None for field in state] == list(needs(competition))
    if competition.winners:
        oracle = eager.competition_state(u.double(), dim, competition)
        assert_same(threshold, oracle[0].flatten())
        assert_same(cut, oracle[1].flatten())
        unit, activity = compete.winner_lists(view, competition)
        assert torch.equal(unit[~bad], eager.winners(u.double(), dim, competition)[0][~bad])
        assert torch.equal(unit[:, 0] == -1, bad)
        assert ((unit[:, 1:] >= 0) & (unit[:, 1:] < u.shape[dim])).all()
        y = by_position(compete.activities(u, dim, competition), dim)
        listed = y.gather(1, unit.clamp_min(0).long())
        assert torch.equal(activity.to(y.dtype).nan_to_num(7.0), listed.nan_to_num(7.0))
        assert activity[bad].isnan().all()
    elif threshold is not None:
        assert torch.equal(threshold.isnan(), bad)
        assert (threshold[~bad] == 0).all()
    if first is not None:
        assert torch.equal(first[~bad].long(), by_position(u.double(), dim).argmax(1)[~bad])


def assert_sums(u: Tensor, dim: int, competition: Competition) -> None:
    view = responses(u, dim)
    sums = compete.activity_sums(view, compete.state(view, competition), competition)
    y, plain = (by_position(eager.compete(v, dim, competition), dim) for v in (u.double(), u.float()))
    floor = (roundings(u, competition) + 8 * EPS32) * y.abs().nan_to_num(0.0).sum(0)
    assert_as_good(sums[:, None], plain.sum(0)[:, None], y.sum(0)[:, None], floor[:, None])


def check(u: Tensor, dim: int, competition: Competition) -> None:
    """Everything that the module computes for one u."""
    assert_full_state(u, dim, competition)
    y = compete.activities(u, dim, competition)
    assert y.dtype == u.dtype
    assert y.stride() == torch.empty_like(u).stride()
    assert_activities(y, u, dim, competition)
    assert_state(u, dim, competition)
    assert_sums(u, dim, competition)


UNITS = (1, 2, 3, 7, 8, 31, 32, 33, 67, 128, 256, 300, 512, 513, 1000, 1024, 1025, 1280, 1536, 1537)


@pytest.mark.parametrize("units", UNITS)
def test_every_size(units: int) -> None:
    counts = sorted({max(1, min(k, units)) for k in (1, 2, 8, 31, 40, units // 2, units)})
    turns = itertools.count(units)
    for k, turn in zip(counts, turns, strict=False):
        u, dim = make(units, list(LAYOUTS)[turn % len(LAYOUTS)], DTYPES[turn % 3])
        check(u, dim, Competition("softmax" if turn % 2 else "linear", k, 1.0, False))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("units", [37, 150, 1100, 1600])
def test_layouts_and_ties(layout: str, dtype: torch.dtype, units: int) -> None:
    u, dim = make(units, layout, dtype, coarse)
    check(u, dim, Competition("linear", 9, 1.0, False))
    if "slice" in layout or layout == "steps":
        assert guards_intact(u)


@pytest.mark.races
@pytest.mark.parametrize("layout", ["rows", "planes"])
@pytest.mark.parametrize("units", [70, 200, 1100, 1600])
def test_each_kernel(units: int, layout: str) -> None:
    u, dim = make(units, layout, torch.bfloat16, coarse)
    check(u, dim, Competition("softmax", 9, 0.5, True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 5, 16, 17, 27, 32, 33, 500])
def test_lowest_of_equals(dtype: torch.dtype, k: int) -> None:
    """All equal, and equal to the threshold but for some above it, in rows, planes and long rows."""
    for units, equal in itertools.product((520, 1500, 2000), (0.0, -1.5, float("-inf"))):
        u = torch.full((3, units), equal)
        u[1:, 100 : 100 + k // 2] = 2.0
        u[2, ::7] -= 1.0
        for layout in (u, u.t().contiguous().t()):
            check(layout.to(dtype), 1, Competition("binary", k, 1.0, False))


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
        for units in (29, 150, 1030, 1700):
            u, dim = make(units, layout, dtype, values)
            check(u, dim, competition)


def awkward_rows(units: int) -> Tensor:
    """Rows that are awkward each in its own way."""
    inf, tiny = float("inf"), torch.finfo(torch.float32).smallest_normal
    rows = torch.randn(17, units)
    rows[0] = -1.5
    rows[1] = 0.0
    rows[1, ::3] = -0.0
    rows[2] = rows[2].clamp(min=0.0)
    rows[2, 1::2] *= -1.0
    rows[3, ::11], rows[3, 5::7] = inf, -inf
    rows[4] = -inf
    rows[5] = inf
    rows[6] = torch.arange(float(units)) / 8
    rows[7] = -torch.arange(float(units)) / 8
    rows[8] = torch.randint(-2, 3, (units,)) * tiny
    rows[9, 40:] = -inf
    rows[10, 17] = float("nan")
    rows[11] = float("nan")
    rows[12, units - 5], rows[12, 3] = float("nan"), inf
    rows[13, 5] = -float("nan")
    rows[14] = torch.randint(-2, 3, (units,)) * 3e4
    rows[15, 20] = inf
    rows[16] = torch.randn(units) * tiny / 64
    return rows


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("units", [75, 150, 1040, 1540])
@pytest.mark.parametrize("competition", [
    Competition("linear", 1, 1.0, False), Competition("binary", 7, 1.0, True),
    Competition("softmax", 33, 0.5, False), Competition("relu", 75, 1.0, True),
    Competition("softmax", 0, 1.0, True), Competition("linear", 0, 1.0, False),
    Competition("softmax", 0, 1.0, False),
], ids=str)  # fmt: skip
def test_awkward_values(competition: Competition, units: int, dtype: torch.dtype) -> None:
    rows = awkward_rows(units).to(dtype)
    for u in (rows, rows.t().contiguous().t()):
        y = compete.activities(u, 1, competition)
        for row, actual in zip(rows, y, strict=True):
            assert_activities(actual, row, 0, competition)
        assert_state(u, 1, competition)
        threshold, cut, _ = compete.full_state(responses(u, 1), competition)
        oracle = eager.competition_state(rows.double(), 1, competition)
        assert_same(threshold, oracle[0])
        assert_same(cut, oracle[1])


def crowded(units: int, k: int) -> Tensor:
    """The k largest beside each other, and as many distinct values above what most groups reach."""
    row = torch.linspace(-10.0, -9.0, units)
    row[: 4 * k] = torch.linspace(100.0, 20.0, 4 * k)
    return row


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize(("units", "k"), [
    (96, 20), (160, 20), (512, 30), (1024, 8), (1024, 120), (1536, 31), (1400, 200), (3000, 20), (6000, 40),
    (6000, 400),
])  # fmt: skip
def test_survivors_that_are_too_many(units: int, k: int, negative: bool, dtype: torch.dtype) -> None:
    row = crowded(units, k)
    row = -1 / (row + 11) if negative else row
    # too many for the list of one warp, and of one only
    beside = noise((units,))
    beside[:300] += 50
    u = torch.stack([row, row.flip(0), beside]).to(dtype)
    competition = Competition("linear", k, 1.0, False)
    for layout in (u, u.t().contiguous().t()):
        assert_full_state(layout, 1, competition)
        assert_activities(compete.activities(layout, 1, competition), u, 1, competition)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("units", [128, 384, 520, 768, 1024, 1280, 1536])
def test_winners_of_whole_runs(units: int, dtype: torch.dtype) -> None:
    """Winners copied 8 and 16 bytes at a time: with ties, a NaN, many survivors in a lane or in all."""
    u = torch.randn(32, units)
    u[1::4] = coarse((8, units))
    u[2::4] = (u[2::4] * 4).round() / 4
    u[3] = -u[3].abs()
    u[7, units - 3] = float("nan")
    u[11, 8:13] += 20.0
    u[15, 0::128] += 20.0
    u = u.to(dtype)
    for layout, k in itertools.product((u, u.t().contiguous().t()), (1, 8, 20, 28, 32)):
        competition = Competition("linear", k, 1.0, False)
        assert_activities(compete.activities(layout, 1, competition), layout, 1, competition)
        assert_state(layout, 1, competition)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("units", [48, 200, 384, 1000, 1536])
def test_as_many_winners_as_a_warp_has_lanes(units: int, dtype: torch.dtype) -> None:
    """Bounds from lanes and from their halves: of all, of every second unit, of the first half."""
    u = noise((3 * 32, units))
    u[::3, ::2] += 50.0
    u[1::3, : units // 2] += 50.0
    u = u.to(dtype)
    for layout, k in itertools.product((u, u.t().contiguous().t()), (26, 27, 30, 31, 32, 33)):
        competition = Competition("linear", k, 1.0, False)
        assert_activities(compete.activities(layout, 1, competition), layout, 1, competition)
        assert_state(layout, 1, competition)


FEW_UNITS = (1, 2, 7, 8, 9, 16, 31, 32, 33, 64, 65, 95, 96, 97, 127, 128)


def few(units: int) -> Tensor:
    """13 rows, no multiple of a warp's, in which those that need many steps and few are beside each other."""
    rows = noise((13, units))
    rows[1] = 0.0
    rows[1, ::2] = -0.0
    rows[2] = coarse((units,))
    rows[3] = -1.5
    rows[4, units // 2] = float("nan")
    rows[5] = float("-inf")
    rows[6, ::3], rows[6, 1::3] = float("inf"), float("-inf")
    rows[7] = rows[7].clamp(min=0.0)
    rows[8] = torch.arange(float(units)) / 8
    rows[9] = float("nan")
    rows[10] = (rows[10] * 4).round() / 4
    return rows


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("units", FEW_UNITS)
def test_few_units_and_every_number_of_winners(units: int, dtype: torch.dtype) -> None:
    rows = few(units).to(dtype)
    planes = torch.stack([rows[:-1], rows[1:]]).transpose(1, 2).contiguous()
    for u, k in itertools.product((rows, planes), range(1, units + 1)):
        competition = Competition("linear", k, 1.0, False)
        assert_state(u, 1, competition)
        assert_activities(compete.activities(u, 1, competition), u, 1, competition)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["as they are", "odd step", "odd start", "planes", "odd planes"])
@pytest.mark.parametrize("units", FEW_UNITS)
def test_few_units_of_every_rule(units: int, layout: str, dtype: torch.dtype) -> None:
    rows = few(units).to(dtype)
    if layout == "odd step":
        rows = torch.cat([rows, rows[:, :1]], 1)[:, :units]
    elif layout == "odd start":
        rows = torch.cat([rows.flatten()[:1], rows.flatten()])[1:].view(rows.shape)
    elif "planes" in layout:
        rows = rows[: 13 if layout == "odd planes" else 12].t().contiguous().t()
    few_win, half_win = min(3, units), (units + 1) // 2
    for competition in (
        Competition("softmax", 0, 0.5, True),
        Competition("softmax", half_win, 1.0, False),
        Competition("relu", few_win, 1.0, few_win > 1),
        Competition("linear", 0, 1.0, False),
        Competition("binary", half_win, 1.0, False),
    ):
        for row, actual in zip(rows, compete.activities(rows, 1, competition), strict=True):
            assert_activities(actual, row, 0, competition)
        assert_state(rows, 1, competition)
    threshold, cut, _ = compete.full_state(responses(rows, 1), Competition("softmax", few_win, 1.0, False))
    oracle = eager.competition_state(rows.double(), 1, Competition("softmax", few_win, 1.0, False))
    assert_same(threshold, oracle[0])
    assert_same(cut, oracle[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_very_long_rows(dtype: torch.dtype) -> None:
    """In shared memory in a 16-bit dtype, else read again; selected from a list, or by digits."""
    u = noise((2, 65_536)).to(dtype)
    for k in (5, 250, 30_000):
        competition = Competition("softmax", k, 1.0, k == 5)
        assert_full_state(u, 1, competition)
        assert_activities(compete.activities(u, 1, competition), u, 1, competition)
    assert_state(u, 1, Competition("linear", 250, 1.0, False))


def test_many_positions() -> None:
    """More than the blocks take at once, in items that end within a tile."""
    for u in (
        noise((4300, 24)),
        noise((1100, 150)),
        noise((3, 24, 138)),
        noise((3, 150, 137)),
        noise((2, 1030, 50)),
        noise((2, 1700, 50)),
    ):
        check(u.bfloat16(), 1, Competition("linear", 4, 1.0, False))


@pytest.mark.parametrize("order", ["reverse", "random"])
def test_any_schedule_gives_the_same(cuda: ModuleType, order: str) -> None:
    def everything() -> list[Tensor]:
        results = []
        for units, layout in itertools.product((70, 200, 1200, 1700), ("rows", "planes")):
            torch.manual_seed(units)
            u, dim = make(units, layout, torch.bfloat16)
            for competition in (Competition("softmax", 12, 0.5, True), Competition("softmax", 0, 1.0, False)):
                view = responses(u, dim)
                state = compete.state(view, competition)
                results += [field for field in state if field is not None]
                results += [compete.activities(u, dim, competition)]
                results += [compete.activity_sums(view, state, competition)]
                results += compete.winner_lists(view, competition) if competition.winners else ()
        return results

    expected = everything()
    cuda.schedule(order, 3)
    assert all(torch.equal(a, b) for a, b in zip(everything(), expected, strict=True))


@pytest.mark.parametrize("shape", [(0, 5), (2, 5, 0), (0, 3, 4, 4)])
def test_no_positions(shape: tuple[int, ...]) -> None:
    u = torch.empty(shape)
    for competition in (Competition("softmax", 0, 1.0, False), Competition("linear", 2, 1.0, True)):
        assert compete.activities(u, 1, competition).shape == shape
        view = responses(u, 1)
        state = compete.state(view, competition)
        fields = (*compete.full_state(view, competition), *state)
        assert all(field.shape == (0,) for field in fields if field is not None)
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


@hypothesis.settings(max_examples=25)
@hypothesis.given(st.data())
def test_any_rule(data: st.DataObject) -> None:
    units = data.draw(st.sampled_from((5, 8, 40, 129, 600, 1300)))
    layout, dtype = data.draw(st.sampled_from(sorted(LAYOUTS))), data.draw(st.sampled_from(DTYPES))
    u, dim = make(units, layout, dtype, data.draw(st.sampled_from((noise, coarse))))
    check(u, dim, data.draw(rules(units)).competition(units))


def test_refusals_name_operation_and_shape(cuda: ModuleType) -> None:
    u = torch.zeros(3, 5)
    arguments = addresses(compete._arguments(responses(u, 1), 3, Competition("linear", 2, 1.0, False)))
    with pytest.raises(RuntimeError, match=r"competition of \(1, 5, 3\), 9 winners: winners must lie"):
        cuda.compete(**{**arguments, "winners": 9}, **stream_of(u))
    with pytest.raises(ValueError, match="u_dtype must lie between 0 and 2"):
        cuda.compete(**{**arguments, "u_dtype": 3}, **stream_of(u))
