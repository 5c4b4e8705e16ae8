"""A and G of the fused kernel against sums in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import EPS32, LAYOUTS, assert_as_good, embed, guards_intact
from torch import Tensor

from ghl_kernels import reference
from ghl_kernels._geometry import Geometry
from ghl_kernels.backends import eager
from ghl_kernels.backends.gpu.layout import magic, patches, responses
from ghl_kernels.backends.triton import arch, config
from ghl_kernels.backends.triton.kernels import compete, correlate
from ghl_kernels.rule import Competition, HebbianRule

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SOFTMAX = HebbianRule()
RULES = (
    SOFTMAX,
    HebbianRule(temperature=0.5, losers="anti"),
    HebbianRule(winners=3),
    HebbianRule(activity="linear", winners=2, losers="anti"),
    HebbianRule(activity="linear"),
    HebbianRule(activity="relu"),
    HebbianRule(activity="binary", winners=1),
)


def judge(rows: Tensor, x: Tensor, shape: tuple[int, ...], geometry: Geometry | None) -> Tensor:
    """sum_p rows_p x_p^T by torch, in the dtype of its arguments."""
    if geometry is None:
        return rows.t().mm(x)
    return eager.conv_correlate(x, rows, shape, geometry)


def check_sums(x: Tensor, u: Tensor, grad: Tensor, geometry: Geometry | None, rule: HebbianRule) -> None:
    """A and G together, each alone, and with the state left to the kernel."""
    competition = rule.competition(u.shape[1])
    if geometry is None:
        shape: tuple[int, ...] = (u.shape[1], x.shape[1])
    else:
        shape = (u.shape[1], x.shape[1] // geometry.groups, *geometry.kernel_size)
    view, grad_view = responses(u, 1), responses(grad, 1)
    state = compete.state(view, competition)
    A, G = correlate.correlate(patches(x, geometry), view, grad_view, state, competition)
    assert_is(G, grad, x, shape, geometry)
    y = reference.compete(u.double(), rule, 1)
    assert_is(A, y, x, shape, geometry)

    alone, nothing = correlate.correlate(patches(x, geometry), view, None, state, competition)
    assert nothing is None
    assert_is(alone, y, x, shape, geometry)
    nothing, alone = correlate.correlate(patches(x, geometry), None, grad_view, None, competition)
    assert nothing is None
    assert_is(alone, grad, x, shape, geometry)
    both = correlate.correlate(patches(x, geometry), view, grad_view, None, competition)
    assert_is(both[0], y, x, shape, geometry)
    assert_is(both[1], grad, x, shape, geometry)


def assert_is(
    actual: Tensor | None, rows: Tensor, x: Tensor, shape: tuple[int, ...], geometry: Geometry | None
) -> None:
    """As good as float32 sums of the same operands, which the product takes in x's dtype."""
    assert actual is not None
    operands = rows.to(x.dtype)
    oracle = judge(rows.double(), x.double(), shape, geometry)
    eager32 = judge(operands.float(), x.float(), shape, geometry)
    terms = judge(rows.double().abs(), x.double().abs(), shape, geometry)
    # an activity is rounded twice on either side of a tie: in float32, then in x's dtype
    roundings = EPS32 * 8 + (torch.finfo(x.dtype).eps / 2 if x.dtype != torch.float32 else 0.0)
    assert_as_good(actual.view(shape), eager32, oracle, roundings * terms)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_linear(dtype: torch.dtype, rule: HebbianRule) -> None:
    x, u, grad = (torch.randn(70, size).to(dtype) for size in (19, 37, 37))
    check_sums(x, u, grad, None, rule)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("positions", "units", "features"), [(1, 1, 1), (3, 65, 8), (130, 64, 256), (65, 130, 300)]
)
def test_linear_shapes(dtype: torch.dtype, positions: int, units: int, features: int) -> None:
    """Tiles that are full, nearly empty, and several in each direction."""
    x, u, grad = (torch.randn(positions, size).to(dtype) for size in (features, units, units))
    check_sums(x, u, grad, None, SOFTMAX)
    if dtype == torch.bfloat16:
        check_sums(x, u, grad, None, HebbianRule.kwta(1))


GEOMETRIES = [
    (3, 5, (7,), Geometry((3,), (1,), (1,), (1,), 1)),
    (8, 5, (9,), Geometry((2,), (2,), (0,), (3,), 1)),
    (16, 24, (5, 6), Geometry((3, 3), (1, 1), (1, 1), (1, 1), 1)),
    (3, 7, (6, 5), Geometry((3, 2), (2, 1), (1, 0), (1, 2), 1)),
    (32, 33, (4, 4), Geometry((1, 1), (1, 1), (0, 0), (1, 1), 1)),
    (6, 8, (5, 5), Geometry((2, 2), (1, 1), (2, 2), (1, 1), 2)),
    (48, 18, (4, 3), Geometry((3, 3), (1, 1), (1, 1), (1, 1), 3)),
    (2, 4, (3, 4, 5), Geometry((2, 3, 2), (1, 2, 1), (1, 0, 1), (2, 1, 1), 1)),
    (128, 17, (3, 3), Geometry((2, 2), (1, 1), (0, 0), (1, 1), 1)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", GEOMETRIES, ids=lambda case: "x".join(map(str, case[3].kernel_size)))
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_conv(dtype: torch.dtype, case: tuple[Any, ...], layout: str) -> None:
    """Stride, padding, dilation and groups in 1-d to 3-d; u and dL/du in either layout, each with a rule."""
    channels, units, size, geometry = case
    x = torch.randn(2, channels, *size).to(dtype).movedim(1, -1).contiguous().movedim(-1, 1)
    u = torch.randn(2, units, *geometry.out_size(size)).to(dtype)
    grad = torch.randn(u.shape).to(dtype)
    if layout == "channels_last":
        u = u.movedim(1, -1).contiguous().movedim(-1, 1)
    check_sums(x, u, grad, geometry, SOFTMAX if layout == "contiguous" else HebbianRule.kwta(2))


@given(
    positions=st.integers(1, 80),
    units=st.integers(1, 70),
    features=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    rule=st.sampled_from(RULES),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 3),
    seed=st.integers(0, 99),
)
@settings(max_examples=25)
def test_layouts(
    positions: int,
    units: int,
    features: int,
    dtype: torch.dtype,
    rule: HebbianRule,
    layouts: tuple[str, ...],
    seed: int,
) -> None:
    """Inputs that are slices of larger buffers of NaN: an element read outside would show."""
    torch.manual_seed(seed)
    if (isinstance(rule.winners, int) and rule.winners > units) or (rule.losers == "anti" and units == 1):
        return
    x, u, grad = (
        embed(torch.randn(positions, size).to(dtype), layout)
        for size, layout in zip((features, units, units), layouts, strict=True)
    )
    check_sums(x, u, grad, None, rule)
    assert all(guards_intact(t) for t in (x, u, grad) if t._base is not None and t._base.isnan().any())


def test_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several slices of the positions, the last one short, give the same sums; bit for bit every time."""
    monkeypatch.setattr(config, "_LEAST_STEPS", 1)
    config.slices.cache_clear()
    x, u, grad = torch.randn(300, 24), torch.randn(300, 40), torch.randn(300, 40)
    problem = config.Problem(40, 24, 24, 300, 1, 4, 2, makes_y=True, state_here=False)
    chip = arch.KNOWN["sm_90"]
    assert config.slices(problem, config.tile(problem, chip), chip).number > 2
    check_sums(x, u, grad, None, SOFTMAX)
    state = compete.state(responses(u, 1), SOFTMAX.competition(40))
    runs = [
        correlate.correlate(
            patches(x, None), responses(u, 1), responses(grad, 1), state, SOFTMAX.competition(40)
        )
        for _ in range(2)
    ]
    config.slices.cache_clear()
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


@pytest.mark.parametrize("dims", [0, 2])
def test_long_offsets(monkeypatch: pytest.MonkeyPatch, dims: int) -> None:
    """The 64-bit form of the kernel, which only sizes beyond memory here would choose."""
    monkeypatch.setattr(correlate, "is_long", lambda *_: True)
    if dims:
        geometry = Geometry((3, 3), (1, 2), (1, 1), (1, 1), 2)
        x = torch.randn(2, 6, 5, 4).contiguous(memory_format=torch.channels_last)
        u = torch.randn(2, 4, *geometry.out_size((5, 4)))
        check_sums(x, u, torch.randn(u.shape), geometry, SOFTMAX)
    else:
        x, u = torch.randn(40, 9), torch.randn(40, 7)
        check_sums(x, u, torch.randn(u.shape), None, SOFTMAX)


def test_nan_reaches_what_it_must() -> None:
    """A NaN in u makes all of A NaN and leaves G; in x its column; in dL/du its row of G."""
    x, u, grad = torch.randn(9, 5), torch.randn(9, 4), torch.randn(9, 4)
    u[3, 1], grad[2, 0] = float("nan"), float("nan")
    for rule in RULES:
        competition = rule.competition(4)
        state = compete.state(responses(u, 1), competition)
        A, G = correlate.correlate(patches(x, None), responses(u, 1), responses(grad, 1), state, competition)
        assert A is not None
        assert A.isnan().all()
        assert G is not None
        G = G.flatten(1)
        assert torch.equal(G.isnan().all(1), torch.tensor([True, False, False, False]))
        assert not G[1:].isnan().any()
    A, _ = correlate.correlate(patches(x, None), responses(u, 1), None, None, SOFTMAX.competition(4))
    assert A is not None
    assert A.isnan().all()
    x[1, 2] = float("nan")
    _, G = correlate.correlate(
        patches(x, None), None, responses(grad.nan_to_num(), 1), None, SOFTMAX.competition(4)
    )
    assert G is not None
    assert G[:, 2].isnan().all()
    assert G.isnan().sum() == 4


@given(st.integers(1, 2**31 - 1), st.integers(0, 2**31 - 1), st.integers(0, 3))
@settings(max_examples=200)
def test_magic_divides(divisor: int, n: int, kind: int) -> None:
    """The multiplier and shift give the floor for every dividend, multiples and their neighbors included."""
    if kind:
        n = min(max(n // divisor * divisor + kind - 2, 0), 2**31 - 1)
    multiplier, shift = magic(divisor) & 0xFFFFFFFF, (magic(divisor) >> 32) - 1
    assert ((n << 1) * multiplier >> 32) >> shift == n // divisor


def test_too_little_memory_says_for_what(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the bytes and the layer's shape."""

    def full(*_: Any, **__: Any) -> Tensor:
        raise torch.OutOfMemoryError("full")

    state = compete.state(responses(torch.randn(5, 70), 1), Competition("linear", 3, 1.0, False))
    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(torch.OutOfMemoryError, match=r"workspace of \d+ MiB .* 70 units over 12 inputs at 5"):
        correlate.correlate(
            patches(torch.randn(5, 12), None),
            responses(torch.randn(5, 70), 1),
            None,
            state,
            Competition("linear", 3, 1.0, False),
        )
