"""The depthwise correlation against torch's in float64."""

from __future__ import annotations

import itertools
import math
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from oracle import EPS32, assert_as_good, embed, guards_intact
from torch import Tensor

from ghl_kernels._geometry import Geometry
from ghl_kernels.backends import eager
from ghl_kernels.backends.cuda.kernels import depthwise
from ghl_kernels.backends.gpu.layout import patches, responses
from ghl_kernels.backends.gpu.state import State, needs
from ghl_kernels.rule import Competition

pytestmark = pytest.mark.usefixtures("cuda", "poison")

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
LINEAR = COMPETITIONS[3]


class Given(NamedTuple):
    x: Tensor
    u: Tensor
    grad: Tensor
    geometry: Geometry
    competition: Competition


CASES = {
    "1d": ((2, 8, 9), 1, Geometry((3,), (1,), (1,), (1,), 8)),
    "1d blocks of units": ((2, 136, 5), 1, Geometry((2,), (2,), (1,), (2,), 136)),
    "2d": ((2, 5, 4, 5), 1, Geometry((3, 2), (1, 1), (1, 0), (1, 1), 5)),
    "2d vectors": ((2, 12, 6, 5), 1, Geometry((3, 3), (1, 2), (1, 1), (1, 1), 12)),
    "2d two units a channel": ((2, 3, 4, 4), 2, Geometry((2, 3), (2, 1), (0, 2), (1, 2), 3)),
    "2d four units a channel": ((1, 2, 4, 4), 4, Geometry((1, 3), (1, 1), (0, 1), (1, 1), 2)),
    "2d 10 taps": ((1, 8, 6, 7), 1, Geometry((5, 2), (1, 1), (2, 0), (1, 1), 8)),
    "2d 49 taps": ((1, 8, 9, 8), 1, Geometry((7, 7), (1, 1), (3, 3), (1, 1), 8)),
    "2d patches larger than x": ((2, 4, 3, 2), 1, Geometry((3, 3), (1, 1), (4, 4), (2, 2), 4)),
    "3d": ((1, 4, 3, 3, 2), 1, Geometry((2, 1, 3), (1, 2, 1), (1, 0, 1), (1, 1, 1), 4)),
    "point": ((2, 8, 3, 3), 1, Geometry((1, 1), (2, 2), (0, 0), (1, 1), 8)),
    "one channel": ((2, 1, 4, 3), 4, Geometry((2, 2), (1, 1), (0, 0), (1, 1), 1)),
    "slices": ((3, 8, 41, 37), 1, Geometry((3, 3), (1, 1), (1, 1), (1, 1), 8)),
    "slices of a row": ((1, 4, 9000), 1, Geometry((5,), (1,), (2,), (1,), 4)),
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
@pytest.mark.parametrize("name", ["1d", "2d", "2d vectors"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_every_competition(name: str, layout: str, competition: Competition) -> None:
    given = random_case(name, competition, layout=layout)
    assert_right(given, *run(given))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "slice", "step"])
@pytest.mark.parametrize("name", CASES)
def test_geometries_and_layouts(name: str, layout: str) -> None:
    given = random_case(name, LINEAR, layout=layout)
    assert_right(given, *run(given))
    if layout in ("slice", "step"):
        assert all(guards_intact(tensor) for tensor in (given.x, given.u, given.grad))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", ["1d", "2d vectors", "2d two units a channel"])
def test_16_bit_inputs(name: str, layout: str, dtype: torch.dtype) -> None:
    given = random_case(name, COMPETITIONS[2], layout=layout, dtype=dtype)
    assert_right(given, *run(given))


@pytest.mark.parametrize(("pair", "want_A"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", ["1d", "slices"])
def test_each_result_alone_is_that_of_both(name: str, layout: str, pair: bool, want_A: bool) -> None:
    given = random_case(name, layout=layout)
    both = run(given)
    for wanted, one, other in zip((want_A, pair), run(given, pair=pair, want_A=want_A), both, strict=True):
        assert (one is not None) == wanted
        assert one is None or torch.equal(one, other)


@pytest.mark.parametrize("name", ["2d vectors", "2d two units a channel"])
@pytest.mark.parametrize("given_layouts", list(itertools.product(["contiguous", "channels_last"], repeat=3)))
def test_operands_of_different_layouts(name: str, given_layouts: tuple[str, str, str]) -> None:
    given = random_case(name)
    x, u, grad = (embed(t, layout) for t, layout in zip(given[:3], given_layouts, strict=True))
    given = given._replace(x=x, u=u, grad=grad)
    assert_right(given, *run(given))


@pytest.mark.parametrize("operand", [0, 1, 2])
@pytest.mark.parametrize("channels", [slice(0, 12), slice(1, 13), slice(4, 16)])
def test_channels_of_a_larger_tensor(operand: int, channels: slice) -> None:
    """Addresses that are multiples of a vector or not, in tensors whose rows are."""
    given = random_case("2d vectors", layout="channels_last", dtype=torch.bfloat16)
    small = given[operand]
    large = torch.full((small.shape[0], 16, *small.shape[2:]), math.nan, dtype=small.dtype)
    view = large.contiguous(memory_format=torch.channels_last)[:, channels].copy_(small)
    given = Given(*(view if i == operand else part for i, part in enumerate(given)))
    assert_right(given, *run(given))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_cases_have_slices(cuda: ModuleType, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the other tests of slices rest on."""
    sizes: list[int] = []
    query = cuda.depthwise_workspace

    def asked(**arguments: Any) -> int:
        sizes.append(query(**arguments) // (arguments["units"] * 2 * 4))
        return sizes[-1] * arguments["units"] * 2 * 4

    monkeypatch.setattr(cuda, "depthwise_workspace", asked)
    run(random_case("slices", layout=layout))
    run(random_case("slices of a row", layout=layout))
    assert sizes[0] // 9 > 1
    assert sizes[1] // 5 > 1


@pytest.mark.parametrize("competition", COMPETITIONS, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_nan_position_makes_the_sums_nan_and_leaves_the_gradient(
    layout: str, competition: Competition
) -> None:
    given = random_case("1d", competition, layout=layout)
    clean = run(given)
    given.u[1, 3, 2] = math.nan
    A, G = run(given)
    assert A is not None
    assert G is not None
    assert bool(A.isnan().all())
    assert torch.equal(G, clean[1])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_infinite_inputs_reach_the_units_that_saw_them(layout: str) -> None:
    given = random_case("2d vectors", LINEAR, layout=layout)
    given.x[1, 7, 3, 2] = math.inf
    for sums, factor in zip(run(given), (given.u, given.grad), strict=True):
        assert sums is not None
        expected = torch_sums(given.x.double(), factor.double(), given.geometry)
        assert torch.equal(sums.isinf(), expected.isinf())
        assert int(sums.isinf().sum()) in range(1, 10)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "name",
    [pytest.param("2d 10 taps", marks=pytest.mark.races), "2d two units a channel", "slices of a row"],
)
def test_the_same_bits_in_every_order_of_threads(cuda: ModuleType, name: str, layout: str) -> None:
    given = random_case(name, layout=layout)
    expected = run(given)
    for order, number in (("reverse", 0), ("random", 1), ("random", 2)):
        cuda.schedule(order, number)
        assert all(torch.equal(a, b) for a, b in zip(run(given), expected, strict=True))


def test_no_positions() -> None:
    given = random_case("2d")
    empty = given._replace(x=given.x[:0], u=given.u[:0], grad=given.grad[:0])
    A, G = run(empty)
    assert A is not None
    assert G is not None
    assert A.shape == G.shape == (5, 1, 6)
    assert not bool(A.any() or G.any())
    assert run(empty, pair=False)[1] is None


@pytest.mark.parametrize("competition", COMPETITIONS, ids=str)
def test_a_missing_state_is_refused(competition: Competition) -> None:
    given = random_case("1d", competition)
    u = responses(given.u, 1)
    with pytest.raises(RuntimeError, match=r"depthwise correlation of 8 units over 3 taps at 18 positions"):
        depthwise.correlate(
            patches(given.x, given.geometry), u, None, State(None, None, None, None), competition, want_A=True
        )


def test_a_missing_workspace_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(depthwise, "workspace", lambda *_: None)
    with pytest.raises(RuntimeError, match="over 3 taps at 18 positions: no workspace"):
        run(random_case("1d"))


def test_a_spatial_size_beyond_31_bits_is_refused() -> None:
    geometry = Geometry((1,), (1 << 30,), (0,), (1,), 1)
    x, u = torch.zeros(1).expand(1, 1, 1 << 31), torch.zeros(1, 1, 2)
    given = Given(x, u, u, geometry, LINEAR)
    with pytest.raises(RuntimeError, match="beyond"):
        run(given)
