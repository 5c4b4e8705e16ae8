"""A and G of csrc/cuda/pair*.cu against sums in float64."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import EPS32, LAYOUTS, assert_as_good, embed, guards_intact
from torch import Tensor

import ghl_kernels as ghl
from bench.gpu import parity
from ghl_kernels import _dispatch, _tape, reference
from ghl_kernels._geometry import Geometry
from ghl_kernels.backends import eager
from ghl_kernels.backends.cuda.kernels import correlate
from ghl_kernels.backends.cuda.kernels.arguments import addresses, place_of
from ghl_kernels.backends.gpu.layout import Patches, patches, responses
from ghl_kernels.backends.gpu.state import State, needs
from ghl_kernels.rule import Competition, HebbianRule

pytestmark = pytest.mark.usefixtures("cuda")

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
H200 = {"multiprocessors": 132, "shared_limit": 227 << 10}
LARGEST_BLOCKS = {"A100": 163 << 10, "L40": 99 << 10, "H200": 227 << 10}


def state_of(u: Tensor, competition: Competition) -> State:
    """The state of every position by torch, only those fields that the activity needs."""
    threshold, cut, logsumexp = (field.flatten() for field in eager.competition_state(u, 1, competition))
    rows = u.float().movedim(1, -1).reshape(-1, u.shape[1])
    if not competition.winners:
        threshold = torch.where(rows.isnan().any(1), float("nan"), 0.0)
    fields = (threshold, cut, logsumexp, rows.argmax(1).to(torch.int32))
    chosen = [
        field.contiguous() if needed else None
        for field, needed in zip(fields, needs(competition), strict=True)
    ]
    return State(*chosen)


def judge(rows: Tensor, x: Tensor, shape: tuple[int, ...], geometry: Geometry | None) -> Tensor:
    """sum_p rows_p x_p^T by torch, in the dtype of its arguments."""
    return rows.t().mm(x) if geometry is None else eager.conv_correlate(x, rows, shape, geometry)


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


def sums(
    x: Tensor,
    u: Tensor | None,
    grad: Tensor | None,
    geometry: Geometry | None,
    state: State | None,
    competition: Competition,
    form: str = "mma",
) -> tuple[Tensor | None, Tensor | None]:
    view = patches(x, geometry)
    return correlate.correlate(
        view,
        None if u is None else responses(u, 1),
        None if grad is None else responses(grad, 1),
        state,
        competition,
        channels=view.channels,
        form=form,
    )


def makes_state(
    x: Tensor, u: Tensor, geometry: Geometry | None, competition: Competition, form: str = "mma"
) -> bool:
    view = patches(x, geometry)
    return correlate.makes_state(view, responses(u, 1), None, competition, view.channels, form)


def check_sums(
    x: Tensor, u: Tensor, grad: Tensor, geometry: Geometry | None, rule: HebbianRule, form: str = "mma"
) -> None:
    """A and G together, and each alone."""
    competition = rule.competition(u.shape[1])
    if geometry is None:
        shape: tuple[int, ...] = (u.shape[1], x.shape[1])
    else:
        shape = (u.shape[1], x.shape[1] // geometry.groups, *geometry.kernel_size)
    state = state_of(u, competition)
    y = reference.compete(u.double(), rule, 1)
    A, G = sums(x, u, grad, geometry, state, competition, form)
    assert_is(A, y, x, shape, geometry)
    assert_is(G, grad, x, shape, geometry)
    A_alone, nothing = sums(x, u, None, geometry, state, competition, form)
    assert nothing is None
    assert_is(A_alone, y, x, shape, geometry)
    nothing, G_alone = sums(x, None, grad, geometry, None, competition, form)
    assert nothing is None
    assert_is(G_alone, grad, x, shape, geometry)
    if makes_state(x, u, geometry, competition, form):
        assert_is(sums(x, u, None, geometry, None, competition, form)[0], y, x, shape, geometry)


def equal(results: tuple[Tensor | None, ...], others: tuple[Tensor | None, ...]) -> bool:
    """Bit for bit."""
    return all(
        torch.equal(a, b) for a, b in zip(results, others, strict=True) if a is not None and b is not None
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_linear(dtype: torch.dtype, rule: HebbianRule) -> None:
    x, u, grad = (torch.randn(70, size).to(dtype) for size in (19, 37, 37))
    check_sums(x, u, grad, None, rule)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("positions", "units", "features"),
    [(1, 1, 1), (3, 65, 8), (64, 64, 64), (33, 130, 72), (40, 16, 136), (20, 72, 300)],
)
def test_linear_shapes(dtype: torch.dtype, positions: int, units: int, features: int) -> None:
    """Tiles that are full, nearly empty, narrow, wide, and several in each direction."""
    x, u, grad = (torch.randn(positions, size).to(dtype) for size in (features, units, units))
    check_sums(x, u, grad, None, SOFTMAX)
    check_sums(x, u, grad, None, HebbianRule(activity="linear", winners=1))


GEOMETRIES = [
    (3, 5, (7,), Geometry((3,), (1,), (1,), (1,), 1)),
    (8, 5, (9,), Geometry((2,), (2,), (0,), (3,), 1)),
    (16, 24, (5, 6), Geometry((3, 3), (1, 1), (1, 1), (1, 1), 1)),
    (3, 7, (6, 5), Geometry((3, 2), (2, 1), (1, 0), (1, 2), 1)),
    (32, 33, (4, 4), Geometry((1, 1), (1, 1), (0, 0), (1, 1), 1)),
    (6, 8, (5, 5), Geometry((2, 2), (1, 1), (2, 2), (1, 1), 2)),
    (48, 24, (4, 3), Geometry((3, 3), (1, 1), (1, 1), (1, 1), 3)),
    (2, 4, (3, 4, 5), Geometry((2, 3, 2), (1, 2, 1), (1, 0, 1), (2, 1, 1), 1)),
    (128, 17, (3, 3), Geometry((2, 2), (1, 1), (0, 0), (1, 1), 1)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", GEOMETRIES, ids=lambda case: "x".join(map(str, case[3].kernel_size)))
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_conv(dtype: torch.dtype, case: tuple[Any, ...], layout: str) -> None:
    """Stride, padding, dilation and groups in 1-d to 3-d; u and dL/du in either layout."""
    channels, units, size, geometry = case
    x = torch.randn(2, channels, *size).to(dtype).movedim(1, -1).contiguous().movedim(-1, 1)
    u = torch.randn(2, units, *geometry.out_size(size)).to(dtype)
    grad = torch.randn(u.shape).to(dtype)
    if layout == "channels_last":
        u = u.movedim(1, -1).contiguous().movedim(-1, 1)
    check_sums(x, u, grad, geometry, SOFTMAX)
    check_sums(x, u, grad, geometry, HebbianRule(activity="linear", winners=2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_vectors_along_positions(dtype: torch.dtype) -> None:
    """u as (N, C, H, W) of 8 k positions an item, and as a transposed matrix: 16-byte loads of positions."""
    geometry = Geometry((1, 1), (1, 1), (0, 0), (1, 1), 1)
    x = torch.randn(3, 8, 4, 10).to(dtype)
    u, grad = torch.randn(3, 40, 4, 10).to(dtype), torch.randn(3, 40, 4, 10).to(dtype)
    check_sums(x, u, grad, geometry, SOFTMAX)
    check_sums(x, u, grad, geometry, HebbianRule(winners=3, losers="anti"))
    x, u, grad = torch.randn(72, 16).to(dtype), torch.randn(9, 72).to(dtype), torch.randn(9, 72).to(dtype)
    check_sums(x, u.t(), grad.t(), None, HebbianRule(activity="relu"))


@given(
    positions=st.integers(1, 70),
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


@pytest.mark.races
@pytest.mark.parametrize("features", [24, 136], ids=["narrow", "wide"])
def test_a_ring_that_is_filled_more_than_once(features: int) -> None:
    x, u, grad = (torch.randn(200, size).bfloat16() for size in (features, 40, 40))
    competition = SOFTMAX.competition(40)
    A, G = sums(x, u, grad, None, state_of(u, competition), competition)
    assert_is(A, reference.compete(u.double(), SOFTMAX, 1), x, (40, features), None)
    assert_is(G, grad, x, (40, features), None)


def test_padded_channels_are_dropped() -> None:
    """Channels of x from ``channels`` on are not in the results, whatever they hold."""
    geometry = Geometry((2, 2), (1, 1), (0, 0), (1, 1), 2)
    x = torch.randn(2, 16, 4, 4).contiguous(memory_format=torch.channels_last)
    grad = torch.randn(2, 6, 3, 3)
    whole = sums(x, None, grad, geometry, None, SOFTMAX.competition(6))[1]
    view = patches(x, geometry)
    _, G = correlate.correlate(
        view, None, responses(grad, 1), None, SOFTMAX.competition(6), channels=5, form="mma"
    )
    assert whole is not None
    assert G is not None
    assert torch.equal(G, whole[:, :5])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_parts(cuda: ModuleType, dtype: torch.dtype) -> None:
    """Several parts of the positions, the last one short, give the same sums; bit for bit in any order."""
    x, u, grad = (torch.randn(1100, size).to(dtype) for size in (24, 40, 40))
    plan = cuda.pair_plan(
        units=40,
        columns=24,
        positions=1100,
        results=2,
        itemsize=x.element_size(),
        multiprocessors=4,
        shared_limit=164 << 10,
    )
    assert plan["parts"] > 2
    check_sums(x, u, grad, None, SOFTMAX)
    state = state_of(u, SOFTMAX.competition(40))
    runs = []
    for order in ("forward", "reverse", "random"):
        cuda.schedule(order, 7)
        runs.append(sums(x, u, grad, None, state, SOFTMAX.competition(40)))
    assert equal(runs[0], runs[1])
    assert equal(runs[0], runs[2])


def test_whole_and_split_tiles(cuda: ModuleType) -> None:
    """More tiles than the device takes at once: those of the last wave are cut into parts, the others not."""
    units, columns, positions = 13 * 64 - 3, 24, 520
    plan = cuda.pair_plan(
        units=units,
        columns=columns,
        positions=positions,
        results=2,
        itemsize=2,
        multiprocessors=4,
        shared_limit=164 << 10,
    )
    assert plan["whole_tiles"] == 12
    assert plan["split_tiles"] == 1
    assert plan["parts"] > 1
    x, u, grad = (torch.randn(positions, size).bfloat16() for size in (columns, units, units))
    competition = Competition("relu", 0, 1.0, False)
    A, G = sums(x, u, grad, None, state_of(u, competition), competition)
    assert_is(A, u.relu(), x, (units, columns), None)
    assert_is(G, grad, x, (units, columns), None)


@pytest.mark.parametrize("order", ["reverse", "random"])
def test_any_order_of_threads(cuda: ModuleType, order: str) -> None:
    """Bitwise the same whichever thread runs first: there is no race that a schedule shows."""
    geometry = Geometry((3, 3), (1, 1), (1, 1), (1, 1), 1)
    x = torch.randn(2, 8, 6, 8).bfloat16().contiguous(memory_format=torch.channels_last)
    u, grad = torch.randn(2, 24, 6, 8).bfloat16(), torch.randn(2, 24, 6, 8).bfloat16()
    u = u.contiguous(memory_format=torch.channels_last)
    for rule in (SOFTMAX, HebbianRule(winners=3, losers="anti")):
        state = state_of(u, rule.competition(24))
        cuda.schedule("forward")
        expected = sums(x, u, grad, geometry, state, rule.competition(24))
        cuda.schedule(order, 3)
        actual = sums(x, u, grad, geometry, state, rule.competition(24))
        assert equal(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nan_reaches_what_it_must(dtype: torch.dtype) -> None:
    """A NaN in u makes all of A NaN and leaves G; in x its column; in dL/du its row of G."""
    x, u, grad = torch.randn(9, 5).to(dtype), torch.randn(9, 8).to(dtype), torch.randn(9, 8).to(dtype)
    u[3, 1], grad[2, 0] = float("nan"), float("nan")
    for rule in RULES:
        competition = rule.competition(8)
        A, G = sums(x, u, grad, None, state_of(u, competition), competition)
        assert A is not None
        assert A.isnan().all()
        assert G is not None
        assert torch.equal(G.isnan().flatten(1).all(1), torch.arange(8) == 0)
        assert not G[1:].isnan().any()
    A, _ = sums(x, u, None, None, None, SOFTMAX.competition(8))
    assert A is not None
    assert A.isnan().all()
    x[1, 2] = float("nan")
    _, G = sums(x, None, grad.nan_to_num(), None, None, SOFTMAX.competition(8))
    assert G is not None
    assert G[:, 2].isnan().all()
    assert G.isnan().sum() == 8


def test_infinities_are_not_hidden() -> None:
    """An infinite dL/du makes its row not finite, and no other."""
    x, grad = torch.randn(40, 16), torch.randn(40, 8)
    grad[7, 3] = float("inf")
    for dtype in DTYPES:
        _, G = sums(x.to(dtype), None, grad.to(dtype), None, None, SOFTMAX.competition(8))
        assert G is not None
        assert torch.equal(~G.isfinite().flatten(1).any(1), torch.arange(8) == 3)


def test_no_positions_make_zeros() -> None:
    """Empty batches give A = G = 0."""
    geometry = Geometry((3, 3), (1, 1), (1, 1), (1, 1), 1)
    x, u = torch.empty(0, 8, 5, 5), torch.empty(0, 4, 5, 5)
    A, G = sums(x, u, u, geometry, State(None, None, None, None), SOFTMAX.competition(4))
    assert A is not None
    assert G is not None
    assert torch.equal(A, torch.zeros(4, 8, 9))
    assert torch.equal(G, torch.zeros(4, 8, 9))


def test_tf32_takes_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch allows tf32, products have its 10 bits of mantissa; where not, those of float32."""
    x, grad = torch.randn(50, 24), torch.randn(50, 16)
    oracle = grad.double().t().mm(x.double())
    errors = {}
    for allowed in (False, True):
        monkeypatch.setattr(correlate, "takes_tf32", lambda _, allowed=allowed: allowed)
        _, G = sums(x, None, grad, None, None, SOFTMAX.competition(16))
        assert G is not None
        errors[allowed] = ((G.view_as(oracle) - oracle).abs().max() / oracle.abs().max()).item()
    assert errors[False] < 1e-6
    assert 1e-6 < errors[True] < 2e-3


def test_missing_state_is_computed(cuda: ModuleType) -> None:
    """state None, where one tile does not hold all units: the competition's kernel makes it."""
    if not hasattr(cuda, "compete"):
        pytest.skip("the family compete is not in this build")
    for rule in (SOFTMAX, HebbianRule(winners=5)):
        x, u = torch.randn(40, 16).bfloat16(), torch.randn(40, 72).bfloat16()
        assert not makes_state(x, u, None, rule.competition(72))
        A, _ = sums(x, u, None, None, None, rule.competition(72))
        assert_is(A, reference.compete(u.double(), rule, 1), x, (72, 16), None)


def test_failures_name_the_shape(cuda: ModuleType) -> None:
    """A launcher that cannot run says what it was asked for."""
    arguments: dict[str, Any] = {"batch": 9, "channels": 8, "dtype": 1, "x": 16, "x_stride_batch": 8}
    arguments |= {"x_stride_channel": 1, "units": 72, "result_layout": (8, 1, 1), "result_channels": 8}
    arguments |= {"a": 16, "device": 0, "stream": 0}
    shape = "A of 72 units over 1 taps of 8 channels in 1 groups at 9 positions, bfloat16"
    with pytest.raises(RuntimeError, match=f"{shape}: a result without its input"):
        cuda.pair(**arguments)
    arguments |= {"u": 16, "u_layout": (1, 72, 0, 1)}
    with pytest.raises(RuntimeError, match=f"{shape}: the state that its activity needs is missing"):
        cuda.pair(**arguments)
    with pytest.raises(RuntimeError, match=f"{shape}: the wgmma form does not take this shape"):
        cuda.pair(**arguments, form=2)
    with pytest.raises(RuntimeError, match=f"{shape}: only activities that are rounded to float16"):
        cuda.pair(**arguments, lift=2.0)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_state_with_a_part_missing_is_refused(rule: HebbianRule) -> None:
    """Zeros in its place would give wrong sums without a word."""
    x, u = torch.randn(30, 8), torch.randn(30, 72)
    competition = rule.competition(72)
    state = state_of(u, competition)
    for name, needed in zip(State._fields, needs(competition), strict=True):
        if needed:
            with pytest.raises(RuntimeError, match=r"positions, float32: the state that .* is missing"):
                sums(x, u, None, None, state._replace(**{name: None}), competition)


def test_parts_without_a_workspace_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(correlate, "workspace", lambda *_: None)
    grad = torch.randn(4096, 16)
    with pytest.raises(RuntimeError, match="at 4096 positions, float32: no workspace"):
        sums(torch.randn(4096, 8), None, grad, None, None, SOFTMAX.competition(16))


# A workspace of which a page can be read only where a warp has units: the second 64 rows of every tile of 128
# by 256 floats. Prints the number of parts.
UNWRITTEN = """
import ctypes, mmap, torch
from ghl_kernels.backends.cuda.kernels import correlate
from ghl_kernels.backends.gpu.layout import patches, responses

TILE = 128 * 256 * 4

def guarded(shape, device, what):
    memory = mmap.mmap(-1, shape[0] * 4)
    words = torch.frombuffer(memory, dtype=torch.float32)
    for tile in range(0, len(memory), TILE):
        start = ctypes.c_void_p(words.data_ptr() + tile + TILE // 2)
        assert ctypes.CDLL(None).mprotect(start, ctypes.c_size_t(TILE // 2), 0) == 0
    print(len(memory) // TILE, flush=True)
    return words

correlate.workspace = guarded
x, grad = torch.randn(3000, 256), torch.randn(3000, 40)
competition = __import__("ghl_kernels").HebbianRule().competition(40)
_, G = correlate.correlate(patches(x, None), None, responses(grad, 1), None, competition, channels=256)
torch.testing.assert_close(G[..., 0], grad.t() @ x, rtol=1e-3, atol=1e-3)
"""


def test_the_sum_of_the_parts_reads_only_what_was_written() -> None:
    done = subprocess.run([sys.executable, "-c", UNWRITTEN], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 1


def test_too_little_memory_says_for_what(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the bytes and the layer's shape."""
    x, u = torch.randn(1100, 24), torch.randn(1100, 40)
    state = state_of(u, SOFTMAX.competition(40))
    empty = torch.empty

    def full(*size: Any, **options: Any) -> Tensor:
        if len(size[0]) == 1:
            raise torch.OutOfMemoryError("full")
        return empty(*size, **options)

    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(torch.OutOfMemoryError, match=r"workspace of \d+ MiB .* 40 units over 24 inputs"):
        sums(x, u, None, None, state, SOFTMAX.competition(40))


@pytest.mark.parametrize("shared_limit", LARGEST_BLOCKS.values(), ids=LARGEST_BLOCKS.keys())
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("columns", [27, 128, 129, 576, 36864])
def test_plan_fits_the_device(cuda: ModuleType, shared_limit: int, itemsize: int, columns: int) -> None:
    """The ring of tiles fits shared memory, three narrow blocks to a multiprocessor."""
    plan = cuda.pair_plan(
        units=96,
        columns=columns,
        positions=10**6,
        results=2,
        itemsize=itemsize,
        multiprocessors=108,
        shared_limit=shared_limit,
    )
    assert 3 <= plan["stages"] <= 5
    assert plan["shared"] <= shared_limit
    assert plan["wide"] == (columns > 128)


@pytest.mark.parametrize("results", [1, 2])
@pytest.mark.parametrize(
    ("units", "columns", "positions"),
    [(64, 576, 200704), (96, 2400, 131072), (256, 64, 802816), (512, 4608, 25088), (4096, 4096, 8192)],
)
def test_plan_fills_the_device(
    cuda: ModuleType, units: int, columns: int, positions: int, results: int
) -> None:
    """Parts cover the positions, their workspace stays within 32 MiB, and little of the device waits."""
    plan = cuda.pair_plan(
        units=units, columns=columns, positions=positions, results=results, itemsize=2, **H200
    )
    parts, part_steps, steps = plan["parts"], plan["part_steps"], positions // 32
    assert parts * part_steps >= steps > (parts - 1) * part_steps
    assert plan["workspace"] <= 32 << 20
    resident = 132 * plan["resident"]
    waves = plan["whole_tiles"] / resident
    if plan["split_tiles"]:
        waves = -(-plan["whole_tiles"] // resident) - (-plan["split_tiles"] * parts // resident) / parts
    work = (plan["whole_tiles"] + plan["split_tiles"]) / resident
    assert work > 0.8 * waves


# --- the form for few columns and few units --------------------------------------------------------------


def image(
    units: int, channels: int, size: tuple[int, ...], geometry: Geometry, dtype: torch.dtype, batch: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    """x, u and dL/du of a convolution; responses have their units last, in rows that are multiples of 8."""
    x = torch.randn(batch, channels, *size).to(dtype).movedim(1, -1).contiguous().movedim(-1, 1)
    rows = -(-units // 8) * 8
    u, grad = (
        torch.full((batch, *geometry.out_size(size), rows), float("nan"), dtype=dtype) for _ in range(2)
    )
    for tensor in (u, grad):
        tensor[..., :units] = torch.randn(*tensor.shape[:-1], units)
    return x, u[..., :units].movedim(-1, 1), grad[..., :units].movedim(-1, 1)


DEEPHEBB = Geometry((5, 5), (1, 1), (2, 2), (1, 1), 1)
FEW_COLUMNS = [
    (3, 96, (6, 7), DEEPHEBB),
    (3, 64, (13, 12), Geometry((7, 7), (2, 2), (3, 3), (1, 1), 1)),
    (3, 64, (6, 9), Geometry((3, 3), (1, 1), (1, 1), (1, 1), 1)),
    (1, 5, (7, 7), Geometry((5, 5), (1, 1), (0, 0), (1, 1), 1)),
    (4, 128, (6, 5), Geometry((5, 8), (1, 1), (2, 4), (1, 1), 1)),
    (3, 1, (4, 9), Geometry((3, 2), (2, 1), (1, 0), (1, 2), 1)),
    (2, 16, (90,), Geometry((20,), (3,), (10,), (1,), 1)),
    (2, 33, (3, 4, 5), Geometry((2, 3, 2), (1, 2, 1), (1, 0, 1), (2, 1, 1), 1)),
    (3, 100, (5, 5), DEEPHEBB),
    # the dilation of a kernel of size 1 means nothing
    (3, 8, (6, 9), Geometry((1, 5), (1, 1), (1, 2), (2**32, 1), 1)),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", FEW_COLUMNS, ids=lambda case: f"{case[1]} of {case[0]}")
def test_few_columns(dtype: torch.dtype, case: tuple[Any, ...]) -> None:
    """From 1 to 128 units and from 1 to 4 channels in 1-d to 3-d, alone and as a pair."""
    channels, units, size, geometry = case
    x, u, grad = image(units, channels, size, geometry, dtype)
    check_sums(x, u, grad, geometry, SOFTMAX, "narrow")
    check_sums(x, u, grad, geometry, HebbianRule(activity="linear", winners=1), "narrow")


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("units", [40, 104])
def test_few_columns_of_every_rule(rule: HebbianRule, units: int) -> None:
    x, u, grad = image(units, 3, (5, 9), DEEPHEBB, torch.bfloat16)
    check_sums(x, u, grad, DEEPHEBB, rule, "narrow")


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_few_columns_of_any_layout(channels: int) -> None:
    """x in NCHW, as every third pixel of a larger tensor of NaN, and with channels that are padding."""
    x, u, grad = image(20, channels, (5, 6), DEEPHEBB, torch.bfloat16, batch=3)
    wide = torch.full((3, channels + 1, 5, 18), float("nan"), dtype=x.dtype)
    wide[:, :channels, :, ::3] = x
    for same in (x.contiguous(), wide[:, :channels, :, ::3]):
        check_sums(same, u, grad, DEEPHEBB, SOFTMAX, "narrow")
    padded = torch.cat((x, x.new_full((3, 8 - channels, 5, 6), float("nan"))), 1)
    view = patches(padded.contiguous(memory_format=torch.channels_last), DEEPHEBB)
    competition = SOFTMAX.competition(20)
    A, G = correlate.correlate(
        view, responses(u, 1), responses(grad, 1), None, competition, channels=channels, form="narrow"
    )
    for result, other in zip((A, G), sums(x, u, grad, DEEPHEBB, None, competition, "narrow"), strict=True):
        assert result is not None
        assert other is not None
        assert torch.equal(result, other)


@pytest.mark.races
@pytest.mark.parametrize(("units", "kernel"), [(96, 5), (16, 3), (72, 1)])
def test_few_columns_of_many_positions(cuda: ModuleType, units: int, kernel: int) -> None:
    """Blocks that fill the ring more than once, one with a short last step; the same in any order."""
    geometry = Geometry((kernel, kernel), (1, 1), (kernel // 2,) * 2, (1, 1), 1)
    x, u, grad = image(units, 3, (15, 17), geometry, torch.bfloat16, batch=9)
    plan = cuda.narrow_plan(
        units=units,
        taps=kernel**2,
        channels=3,
        positions=u[:, 0].numel(),
        results=2,
        multiprocessors=4,
        shared_limit=164 << 10,
    )
    steps = -(-u[:, 0].numel() // 64)
    assert 1 < plan["blocks"] <= steps / 4 + 1
    check_sums(x, u, grad, geometry, SOFTMAX, "narrow")
    competition = HebbianRule(winners=3).competition(units)
    state = state_of(u, competition)
    runs = []
    for order in ("forward", "reverse", "random"):
        cuda.schedule(order, 7)
        runs.append(sums(x, u, grad, geometry, state, competition, "narrow"))
    assert equal(runs[0], runs[1])
    assert equal(runs[0], runs[2])


def test_few_columns_do_not_hide_nan() -> None:
    """A NaN in u makes the activities of its position NaN, one in dL/du its row, one in x its patches."""
    x, u, grad = image(24, 3, (6, 6), DEEPHEBB, torch.bfloat16)
    u[0, 7, 2, 2], grad[0, 9, 3, 3] = float("nan"), float("inf")
    for rule in RULES:
        competition = rule.competition(24)
        A, G = sums(x, u, grad, DEEPHEBB, state_of(u, competition), competition, "narrow")
        assert A is not None
        assert A.isnan().all()
        assert G is not None
        assert torch.equal((~G.isfinite()).flatten(1).any(1), torch.arange(24) == 9)
    A, _ = sums(x, u, None, DEEPHEBB, None, SOFTMAX.competition(24), "narrow")
    assert A is not None
    assert A.isnan().all()
    x[1, 2, 0, 0] = float("nan")
    _, G = sums(x, None, grad.nan_to_num(posinf=0.0), DEEPHEBB, None, SOFTMAX.competition(24), "narrow")
    assert G is not None
    # the corner of x lies under the taps of no further row and column than the padding
    bad = torch.zeros(3, 5, 5, dtype=torch.bool)
    bad[2, :3, :3] = True
    assert torch.equal(G.isnan().all(0), bad.flatten(1))
    assert torch.equal(G.isnan().any(0), bad.flatten(1))


@pytest.mark.parametrize("size", [1e5, 1e7, 1e9, 1e10, 1e20, 3e38])
@pytest.mark.parametrize("lowest", [-1.0, 1.0])
def test_softmax_of_large_responses(size: float, lowest: float) -> None:
    """u / temperature in the range of float32, where its product with log2(e) may not be; equal ones, too."""
    x, u, _ = image(16, 3, (4, 4), DEEPHEBB, torch.bfloat16)
    u[:] = size * torch.linspace(lowest, 1, 16)[:, None, None].bfloat16()
    A, _ = sums(x, u, None, DEEPHEBB, None, SOFTMAX.competition(16), "narrow")
    assert_is(A, reference.compete(u.double(), SOFTMAX, 1), x, (16, 3, 5, 5), DEEPHEBB)


def test_few_columns_of_no_result_are_asked_about(cuda: ModuleType) -> None:
    x, u, _ = image(96, 3, (6, 7), DEEPHEBB, torch.bfloat16)
    problem = patches(x, DEEPHEBB), responses(u, 1), None, SOFTMAX.competition(96), 3, "automatic"
    asked = {**addresses(correlate._arguments(*problem)), "a": 0, "g": 0, **place_of(x)}
    assert cuda.pair_form(**asked) != correlate.FORM["narrow"]


def test_few_columns_are_taken_automatically(cuda: ModuleType) -> None:
    """The first layer of a network, by the form that needs no padding and computes the softmax itself."""
    x, u, grad = image(96, 3, (6, 7), DEEPHEBB, torch.bfloat16)
    competition = SOFTMAX.competition(96)
    assert correlate.takes_few_columns(patches(x, DEEPHEBB), responses(u, 1), responses(grad, 1))
    assert makes_state(x, u, DEEPHEBB, competition, "automatic")
    assert not makes_state(x, u, DEEPHEBB, competition, "mma")
    automatic = sums(x, u, grad, DEEPHEBB, None, competition, "automatic")
    assert equal(automatic, sums(x, u, grad, DEEPHEBB, None, competition, "narrow"))


# --- the same from lists of winners ----------------------------------------------------------------------


def pair_of_lists(
    x: Tensor, u: Tensor, grad: Tensor, geometry: Geometry, competition: Competition
) -> tuple[Tensor, Tensor]:
    unit, activity = eager.winners(u, 1, competition)
    return correlate.correlate_winners(patches(x, geometry), unit, activity, responses(grad, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("winners", [1, 2])
@pytest.mark.parametrize("case", FEW_COLUMNS, ids=lambda case: f"{case[1]} of {case[0]}")
def test_pair_of_lists(dtype: torch.dtype, winners: int, case: tuple[Any, ...]) -> None:
    channels, units, size, geometry = case
    x, u, grad = image(units, channels, size, geometry, dtype)
    for activity in ("linear", "softmax"):
        rule = HebbianRule(activity=activity, winners=min(winners, units))
        A, G = pair_of_lists(x, u, grad, geometry, rule.competition(units))
        shape = (units, channels, *geometry.kernel_size)
        assert_is(A, reference.compete(u.double(), rule, 1), x, shape, geometry)
        assert_is(G, grad, x, shape, geometry)


@pytest.mark.races
@pytest.mark.parametrize("winners", [1, 2])
def test_pair_of_lists_of_many_positions(cuda: ModuleType, winners: int) -> None:
    x, u, grad = image(96, 3, (15, 17), DEEPHEBB, torch.bfloat16, batch=9)
    rule = HebbianRule.kwta(winners)
    competition = rule.competition(96)
    runs = []
    for order in ("forward", "reverse", "random"):
        cuda.schedule(order, 7)
        runs.append(pair_of_lists(x, u, grad, DEEPHEBB, competition))
    assert equal(runs[0], runs[1])
    assert equal(runs[0], runs[2])
    # what is made of lists is what is made of u
    assert equal(runs[0], sums(x, u, grad, DEEPHEBB, state_of(u, competition), competition, "narrow"))
    assert_is(runs[0][0], reference.compete(u.double(), rule, 1), x, (96, 3, 5, 5), DEEPHEBB)


def test_pair_of_lists_does_not_hide_nan() -> None:
    """Nor a unit that does not exist."""
    x, u, grad = image(20, 3, (6, 6), DEEPHEBB, torch.bfloat16)
    competition = HebbianRule.kwta(2).competition(20)
    unit, activity = eager.winners(u, 1, competition)
    for entry in ((0, 0), (3, 1)):
        for absent in (-1, 20, 25):
            wrong = unit.clone()
            wrong[entry] = absent
            A, G = correlate.correlate_winners(patches(x, DEEPHEBB), wrong, activity, responses(grad, 1))
            assert A.isnan().all()
            assert G.isfinite().all()
    u[0, 7, 2, 2], grad[0, 9, 3, 3] = float("nan"), float("inf")
    A, G = pair_of_lists(x, u, grad, DEEPHEBB, competition)
    assert A.isnan().all()
    assert torch.equal((~G.isfinite()).flatten(1).any(1), torch.arange(20) == 9)


def test_lists_that_no_kernel_takes(cuda: ModuleType) -> None:
    x, _, grad = image(96, 3, (6, 7), DEEPHEBB, torch.bfloat16)
    view, rows = patches(x, DEEPHEBB), responses(grad, 1)
    assert [correlate.takes_winners(view, rows, winners) for winners in (1, 2, 3)] == [True, True, False]
    assert not correlate.takes_winners(patches(x.float(), DEEPHEBB), responses(grad.float(), 1), 1)
    assert not correlate.takes_winners(view, responses(grad.contiguous(), 1), 1)
    unit, activity = torch.zeros(84, 3, dtype=torch.int32), torch.zeros(84, 3)
    arguments = correlate._arguments(view, None, rows, SOFTMAX.competition(96), 3, "automatic")
    arguments |= {"winner_unit": unit, "winner_activity": activity, "winners": 3}
    with pytest.raises(RuntimeError, match="lists of winners are for the narrow form"):
        correlate._queue(view, rows, {**arguments, "a": torch.zeros(96, 75), "g": torch.zeros(96, 75)})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(1,), (1, 1), (1, 6), (1, 1, 1)])
def test_an_input_of_one_place_and_padding(dtype: torch.dtype, size: tuple[int, ...]) -> None:
    """Places beyond a dimension of size 1, whose stride may be any, are aligned as those in x are."""
    dims = len(size)
    ones, kernel = (1,) * dims, (3,) * dims
    geometry = Geometry(kernel, ones, ones, ones, 1)
    x, u, grad = (torch.randn(4, count, *size).to(dtype) for count in (32, 70, 70))
    state = state_of(u, SOFTMAX.competition(70))
    A, G = sums(x, u, grad, geometry, state, SOFTMAX.competition(70))
    assert_is(A, reference.compete(u.double(), SOFTMAX, 1), x, (70, 32, *kernel), geometry)
    assert_is(G, grad, x, (70, 32, *kernel), geometry)


LISTED = {
    "most units and columns": (128, 4, (5, 8), True),
    "more units": (136, 3, (3, 3), False),
    "rows that are not aligned": (100, 3, (5, 5), False),
    "more columns": (128, 4, (5, 9), False),
    "a long kernel": (128, 4, (40,), False),
    "the longest kernel": (40, 2, (30,), True),
    "3-d": (40, 2, (5, 5, 3), True),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("units", "channels", "kernel", "expected"), LISTED.values(), ids=LISTED)
def test_lists_are_kept_where_a_kernel_takes_them(
    units: int, channels: int, kernel: tuple[int, ...], expected: bool, dtype: torch.dtype
) -> None:
    """The plan is made before there are responses whose layout could be asked for."""
    dims = len(kernel)
    geometry = Geometry(kernel, (1,) * dims, (0,) * dims, (1,) * dims, 1)
    x = torch.zeros(2, *(size + 2 for size in kernel), channels, dtype=dtype).movedim(-1, 1)
    grad = torch.zeros(2, *geometry.out_size(x.shape[2:]), units, dtype=dtype).movedim(-1, 1)
    weight = torch.zeros(units, *kernel, channels).movedim(-1, 1)
    for winners in (1, 2, 3):
        takes = correlate.takes_winners(patches(x, geometry), responses(grad, 1), winners)
        assert takes == (expected and dtype == torch.bfloat16 and winners <= 2)
        with ghl.use_backend("cuda"):
            is_kept = _dispatch.pairs_winners(weight, geometry, winners, dtype)
        assert is_kept == (takes and winners <= 0.03 * units)


@pytest.mark.parametrize("small", [False, True])
def test_the_gpu_check_reaches_the_pair_of_lists(cuda: ModuleType, small: bool) -> None:
    stage = SimpleNamespace(dry=False, small=small)
    cases = [(layer, parity.RULES[rule], dtype) for layer, rule, dtype in parity.combinations(stage, "cuda")]
    cases += [
        (layer, parity.RULES[rule], "bf16")
        for layer in (parity.SMALL if small else parity.LAYERS)
        for rule in parity.repeated(layer, small)
    ]
    reached = []
    for layer, rule, dtype in cases:
        winners = rule.competition(layer.units).winners
        if not 0 < winners <= 2 or not layer.size:
            continue
        data = parity._data(layer, parity.DTYPES[dtype], torch.device("cpu"))
        view = patches(data.x, Geometry(*layer.raw))
        if correlate.takes_winners(view, responses(data.grad_u, 1), winners):
            reached.append((winners, dtype))
    assert set(reached) == (
        {(1, "bf16")} if small else {(k, dtype) for k in (1, 2) for dtype in ("bf16", "fp16")}
    )
    # swept, and repeated
    assert reached.count((1, "bf16")) == 2


@pytest.mark.parametrize("winners", [1, 2, 3])
@pytest.mark.parametrize("decay", ["oja", "instar"])
@pytest.mark.parametrize("gate_at", ["backward", "step"])
def test_a_first_layer_keeps_lists(
    monkeypatch: pytest.MonkeyPatch, winners: int, decay: Any, gate_at: Any
) -> None:
    """Where they are short, and its gradient is that of the layer that keeps its sums."""
    torch.manual_seed(0)
    layer = ghl.GHLConv2d(3, 72, 5, padding=2, rule=HebbianRule.kwta(winners, decay=decay), gate_at=gate_at)
    layer = layer.bfloat16().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    if gate_at == "step":
        ghl.StepGate(optimizer, layer)
    last = {"memory_format": torch.channels_last}
    x, e = (torch.randn(2, units, 9, 8).bfloat16().contiguous(**last) for units in (3, 72))
    calls: list[Tensor] = []
    summed = correlate.correlate_winners

    def count(x: Patches, unit: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        calls.append(unit)
        return summed(x, unit, *others)

    monkeypatch.setattr(correlate, "correlate_winners", count)
    found = []
    for backend in ("cuda", "eager"):
        with ghl.use_backend(backend), _tape.bypassed():
            optimizer.zero_grad()
            layer(x).backward(e)
            optimizer.step()
            found.append(layer.weight.grad.float())
    assert len(calls) == (winners < 3 and decay == "oja")
    # a gradient that is all but zero may have another sign; in step mode it is G, of about 12, which a
    # processor without products of 16 bits rounds on the way
    torch.testing.assert_close(
        found[0].abs(), found[1].abs(), rtol=0.02, atol=0.06 if gate_at == "step" else 0.01
    )
    assert (found[0].sign() == found[1].sign()).float().mean() > 0.99


REFUSED = {
    "float32": lambda x, u: (x.float(), u.float()),
    "units that are not contiguous": lambda x, u: (x, u.contiguous()),
    "rows that are not aligned": lambda x, u: (x, u[:, :92].contiguous(memory_format=torch.channels_last)),
    "many channels": lambda x, u: (x.repeat(1, 2, 1, 1), u),
    "many units": lambda x, u: (x, u.repeat(1, 2, 1, 1).contiguous(memory_format=torch.channels_last)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_few_columns_refuse(name: str) -> None:
    x, u, _ = image(96, 3, (6, 7), DEEPHEBB, torch.bfloat16)
    x, u = REFUSED[name](x, u)
    assert not correlate.takes_few_columns(patches(x, DEEPHEBB), responses(u, 1), None)
    with pytest.raises(RuntimeError, match="the narrow form does not take this shape on this device"):
        sums(x, None, u, DEEPHEBB, None, SOFTMAX.competition(u.shape[1]), "narrow")


@pytest.mark.parametrize("shared_limit", LARGEST_BLOCKS.values(), ids=LARGEST_BLOCKS.keys())
@pytest.mark.parametrize("results", [1, 2])
@pytest.mark.parametrize("units", [1, 16, 33, 64, 65, 96, 97, 128])
@pytest.mark.parametrize(("taps", "channels"), [(1, 1), (9, 3), (25, 3), (49, 3), (40, 4)])
def test_plan_of_few_columns(
    cuda: ModuleType, shared_limit: int, results: int, units: int, taps: int, channels: int
) -> None:
    """The tile holds all units and columns, in blocks that the device has room for."""
    plan = cuda.narrow_plan(
        units=units,
        taps=taps,
        channels=channels,
        positions=1 << 19,
        results=results,
        multiprocessors=132,
        shared_limit=shared_limit,
    )
    assert plan["half"] >= units
    assert plan["rows"] == results * plan["half"]
    assert plan["columns"] >= taps * channels
    assert plan["threads"] in (128, 256, 512)
    # larger tiles are refused where a block has less than an A100's
    assert plan["shared"] <= max(shared_limit, LARGEST_BLOCKS["A100"])
    assert plan["blocks"] >= 132
    assert plan["blocks"] * plan["threads"] <= 132 * 512
    assert plan["workspace"] <= 48 << 20


def test_layers_of_few_channels_are_not_padded(cuda: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend's operations give x to the form as it is, here in NCHW."""
    from ghl_kernels.backends.cuda.operations import OPERATIONS

    x, u, grad = image(96, 3, (6, 7), DEEPHEBB, torch.bfloat16)
    seen = []
    real = correlate.correlate

    def correlate_(view: Any, *args: Any, **options: Any) -> Any:
        seen.append((view.tensor.data_ptr(), args[2]))
        return real(view, *args, **options)

    monkeypatch.setattr(correlate, "correlate", correlate_)
    x = x.contiguous()
    A, _, G = OPERATIONS.conv_pair(x, u, grad, DEEPHEBB, SOFTMAX.competition(96), "none")
    assert seen == [(x.data_ptr(), None)]
    assert_is(A, reference.compete(u.double(), SOFTMAX, 1), x, (96, 3, 5, 5), DEEPHEBB)
    assert_is(G, grad, x, (96, 3, 5, 5), DEEPHEBB)
