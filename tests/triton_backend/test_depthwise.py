"""The depthwise correlation against torch's in float64."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import pytest
import torch
from oracle import EPS32, assert_as_good, embed, guards_intact
from torch import Tensor

from ghl_kernels._geometry import Geometry
from ghl_kernels.backends import eager
from ghl_kernels.backends.gpu.layout import patches, responses
from ghl_kernels.backends.gpu.state import State, needs
from ghl_kernels.backends.triton import arch
from ghl_kernels.backends.triton.kernels import depthwise
from ghl_kernels.rule import Competition

COMPETITIONS = [
    Competition(activity, winners, temperature, anti)
    for activity, winners, temperature, anti in (
        ("softmax", 0, 0.7, False),
        ("softmax", 0, 1.0, True),
        ("softmax", 3, 2.0, False),
        ("linear", 0, 1.0, False),
        ("linear", 3, 1.0, True),
        ("relu", 0, 1.0, False),
        ("relu", 2, 1.0, False),
        ("binary", 1, 1.0, False),
    )
]


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several slices, tiles of a slice, blocks of units and blocks of taps, at sizes that are quick here."""
    for name, value in (("TILE", 64), ("MAX_UNITS", 8), ("MAX_TAPS", 4), ("_LEAST_TILES", 1)):
        monkeypatch.setattr(depthwise, name, value)


class Given(NamedTuple):
    x: Tensor
    u: Tensor
    grad: Tensor
    geometry: Geometry
    competition: Competition


CASES = {
    "1d": ((2, 8, 9), 1, Geometry((3,), (1,), (1,), (1,), 8)),
    "1d blocks of units": ((2, 16, 5), 1, Geometry((2,), (2,), (1,), (2,), 16)),
    "2d": ((2, 5, 4, 5), 1, Geometry((3, 2), (1, 1), (1, 0), (1, 1), 5)),
    "2d two units a channel": ((2, 3, 4, 4), 2, Geometry((2, 3), (2, 1), (0, 2), (1, 2), 3)),
    "3d": ((1, 4, 3, 3, 2), 1, Geometry((2, 1, 3), (1, 2, 1), (1, 0, 1), (1, 1, 1), 4)),
    "one channel": ((2, 1, 4, 3), 4, Geometry((2, 2), (1, 1), (0, 0), (1, 1), 1)),
}


def random_case(
    name: str,
    competition: Competition = COMPETITIONS[0],
    *,
    layout: str = "contiguous",
    dtype: torch.dtype = torch.float32,
) -> Given:
    shape, multiplier, geometry = CASES[name]
    out = (shape[0], shape[1] * multiplier, *geometry.out_size(shape[2:]))
    x, u, grad = (embed(torch.randn(size).to(dtype), layout) for size in (shape, out, out))
    return Given(x, u, grad, geometry, competition)


def state_of(u: Tensor, competition: Competition) -> State:
    """In torch's operators."""
    threshold, cut, logsumexp = eager.competition_state(u, 1, competition)
    if not competition.winners:
        threshold = torch.where(threshold.isnan(), math.nan, 0.0)
    fields = (threshold, cut, logsumexp, u.float().argmax(1).int())
    used = zip(fields, needs(competition), strict=True)
    return State(*(field.reshape(-1).contiguous() if need else None for field, need in used))


def run(given: Given, *, pair: bool = True, want_A: bool = True) -> tuple[Tensor | None, Tensor | None]:
    return depthwise.correlate(
        patches(given.x, given.geometry),
        responses(given.u, 1),
        responses(given.grad, 1) if pair else None,
        state_of(given.u, given.competition),
        given.competition,
        want_A,
    )


def torch_sums(x: Tensor, y: Tensor, geometry: Geometry) -> Tensor:
    A = eager.conv_correlate(x.contiguous(), y.contiguous(), (y.shape[1], 1, *geometry.kernel_size), geometry)
    return A.flatten(2)


def assert_right(given: Given, A: Tensor | None, G: Tensor | None) -> None:
    x, u, grad, geometry, competition = given
    y = eager.compete(u.double(), 1, competition)
    y32 = eager.compete(u.float(), 1, competition)
    roundings = 8.0
    if competition.activity == "softmax":
        roundings += 2.0 * u.abs().max().item() / competition.temperature
    for actual, exact, baseline in ((A, y, y32), (G, grad.double(), grad.float())):
        if actual is None:
            continue
        assert actual.is_contiguous()
        assert actual.dtype == torch.float32
        floor = roundings * EPS32 * torch_sums(x.double().abs(), exact.abs(), geometry)
        assert_as_good(
            actual,
            torch_sums(x.float(), baseline, geometry),
            torch_sums(x.double(), exact, geometry),
            floor,
        )


@pytest.mark.parametrize("competition", COMPETITIONS, ids=str)
def test_every_competition(competition: Competition) -> None:
    for layout in ("contiguous", "channels_last"):
        given = random_case("1d", competition, layout=layout)
        assert_right(given, *run(given))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "slice", "step"])
@pytest.mark.parametrize("name", CASES)
def test_geometries_and_layouts(name: str, layout: str) -> None:
    given = random_case(name, COMPETITIONS[4], layout=layout)
    assert_right(given, *run(given))
    if layout in ("slice", "step"):
        assert all(guards_intact(tensor) for tensor in (given.x, given.u, given.grad))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_16_bit_inputs(layout: str, dtype: torch.dtype) -> None:
    given = random_case("1d", COMPETITIONS[2], layout=layout, dtype=dtype)
    assert_right(given, *run(given))


@pytest.mark.parametrize(("pair", "want_A"), [(True, True), (True, False), (False, True)])
def test_each_result_alone_is_that_of_both(pair: bool, want_A: bool) -> None:
    given = random_case("1d", layout="channels_last")
    both = run(given)
    for wanted, one, other in zip((want_A, pair), run(given, pair=pair, want_A=want_A), both, strict=True):
        assert (one is not None) == wanted
        assert one is None or torch.equal(one, other)


@pytest.mark.parametrize("given_layouts", list(itertools.product(["contiguous", "channels_last"], repeat=3)))
def test_operands_of_different_layouts(given_layouts: tuple[str, str, str]) -> None:
    given = random_case("2d two units a channel")
    x, u, grad = (embed(t, layout) for t, layout in zip(given[:3], given_layouts, strict=True))
    given = given._replace(x=x, u=u, grad=grad)
    assert_right(given, *run(given))


def test_real_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for layout in ("contiguous", "channels_last"):
        given = random_case("2d", layout=layout)
        assert_right(given, *run(given))


def test_64_bit_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("1d", "2d", "3d"):
        given = random_case(name)
        narrow = run(given)
        with monkeypatch.context() as patch:
            patch.setattr(depthwise, "is_long", lambda *_: True)
            wide = run(given)
        assert all(torch.equal(a, b) for a, b in zip(narrow, wide, strict=True))


@pytest.mark.parametrize("competition", COMPETITIONS, ids=str)
def test_a_nan_position_makes_its_sums_nan_and_leaves_the_gradient(competition: Competition) -> None:
    given = random_case("1d", competition, layout="channels_last")
    clean = run(given)
    given.u[1, 3, 2] = math.nan
    A, G = run(given)
    assert bool(A.isnan().all())
    assert torch.equal(G, clean[1])


def test_no_positions() -> None:
    given = random_case("2d")
    empty = given._replace(x=given.x[:0], u=given.u[:0], grad=given.grad[:0])
    A, G = run(empty)
    assert A.shape == G.shape == (5, 1, 6)
    assert not bool(A.any() or G.any())
    assert run(empty, pair=False)[1] is None


@pytest.mark.parametrize("units", [1, 7, 64, 2048])
@pytest.mark.parametrize("taps", [1, 9, 25, 49])
@pytest.mark.parametrize("positions", [1, 511, 100_352, 6_422_528])
def test_tiles_cover_everything_in_a_bounded_workspace(
    positions: int, taps: int, units: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    for machine, units_last in itertools.product(arch.KNOWN.values(), (False, True)):
        tile = depthwise.tile_of(positions, units, taps, 2, units_last=units_last, arch=machine)
        assert tile.positions * tile.units == depthwise.TILE
        assert tile.taps <= depthwise.MAX_TAPS
        assert tile.slice_length % tile.positions == 0
        assert (tile.slices - 1) * tile.slice_length < positions <= tile.slices * tile.slice_length
        assert tile.slices == 1 or 8 * tile.slices * units * taps <= depthwise.WORKSPACE_BYTES
