"""The native competition kernel against a float64 oracle, exactly where selection is concerned."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from ghl_kernels._native import cpu_status, load_cpu

if not cpu_status()[0]:
    pytest.skip(cpu_status()[1], allow_module_level=True)

_cpu: Any = load_cpu()

ACTIVITIES = {"softmax": 0, "linear": 1, "relu": 2, "binary": 3}
DTYPES = {torch.float32: 0, torch.bfloat16: 1}
LAYOUTS = ("channels_first", "channels_last", "rows")
GUARD = 12345.0


@dataclass(frozen=True)
class Rule:
    activity: str = "softmax"
    winners: int = 0
    temperature: float = 1.0
    anti: bool = False


@dataclass
class Result:
    y: Tensor  # [B, N, P]
    logsumexp: Tensor | None = None  # [B, P], as the others
    threshold: Tensor | None = None
    cut: Tensor | None = None
    winner_unit: Tensor | None = None  # [B, P, k]
    winner_activity: Tensor | None = None


def as_layout(u: Tensor, layout: str) -> Tensor:
    """The values of u [B, N, P] inside a larger buffer full of guards, in a memory layout."""
    B, N, P = u.shape
    if layout == "channels_first":
        view = torch.full((B + 1, N + 2, P + 3), GUARD, dtype=u.dtype)[:B, 1 : N + 1, 2 : P + 2]
    elif layout == "channels_last":
        view = torch.full((B + 1, P + 2, N + 3), GUARD, dtype=u.dtype)[:B, 1 : P + 1, 2 : N + 2].mT
    else:
        assert B == 1
        view = torch.full((P + 2, N + 5), GUARD, dtype=u.dtype)[1 : P + 1, 3 : N + 3].t()[None]
    return view.copy_(u)


def run(
    u: Tensor,
    rule: Rule,
    layout: str = "channels_first",
    out_dtype: torch.dtype | None = None,
    threads: int = 2,
) -> Result:
    """Every output at once; fails where a guard around a tensor changed."""
    B, N, P = u.shape
    source = as_layout(u, layout)
    y = as_layout(torch.full((B, N, P), GUARD, dtype=out_dtype or u.dtype), layout)
    k = rule.winners
    state = torch.full((3, B * P + 2), GUARD)
    cut = torch.full((B * P + 2,), 777, dtype=torch.int32)
    winner_unit = torch.full((B * P * k + 2,), 777, dtype=torch.int32)
    winner_activity = torch.full((B * P * k + 2,), GUARD)
    assert source._base is not None
    assert y._base is not None
    before = source._base.clone()
    some = {} if k == 0 else {
        "threshold": state[1, 1:].data_ptr(), "cut": cut[1:].data_ptr(),
        "winner_unit": winner_unit[1:].data_ptr(), "winner_activity": winner_activity[1:].data_ptr(),
    }  # fmt: skip
    _cpu.compete(
        u=source.data_ptr(), u_dtype=DTYPES[u.dtype], u_layout=source.stride(),
        batch=B, units=N, positions=P,
        activity=ACTIVITIES[rule.activity], winners=k, temperature=rule.temperature, anti=rule.anti,
        y=y.data_ptr(), y_dtype=DTYPES[y.dtype], y_layout=y.stride(),
        logsumexp=state[0, 1:].data_ptr(), threads=threads, **some,
    )  # fmt: skip
    assert torch.equal(source._base.view(torch.uint8), before.view(torch.uint8)), "the input changed"
    outside = torch.ones_like(y._base, dtype=torch.bool)
    outside.as_strided(y.shape, y.stride(), y.storage_offset()).fill_(False)
    assert (y._base[outside] == GUARD).all(), "y was written outside its bounds"
    for guarded in (state[0], state[1], cut, winner_unit, winner_activity):
        assert guarded[0] == guarded[-1] == (777 if guarded.dtype == torch.int32 else GUARD)
    if k == 0:
        return Result(y, state[0, 1:-1].view(B, P))
    return Result(
        y, state[0, 1:-1].view(B, P), state[1, 1:-1].view(B, P), cut[1:-1].view(B, P),
        winner_unit[1:-1].view(B, P, k), winner_activity[1:-1].view(B, P, k),
    )  # fmt: skip


def winner_mask(u: Tensor, k: int) -> Tensor:
    """Exactly k per position, the lowest units first among equals; a stable descending sort says which."""
    # Adding 0.0 makes 0.0 of -0.0.
    order = torch.sort(u + 0.0, dim=1, descending=True, stable=True).indices[:, :k]
    return torch.zeros_like(u, dtype=torch.bool).scatter_(1, order, True)


def oracle(u: Tensor, rule: Rule) -> Tensor:
    """y in float64."""
    u = u.double()
    mask = winner_mask(u, rule.winners) if rule.winners else torch.ones_like(u, dtype=torch.bool)
    if rule.activity == "softmax":
        y = torch.softmax((u / rule.temperature).masked_fill(~mask, -torch.inf), 1).masked_fill(~mask, 0.0)
    elif rule.activity == "binary":
        y = mask.double()
    else:
        y = torch.where(mask, u.clamp(min=0.0) if rule.activity == "relu" else u, 0.0)
    if rule.anti:
        best = torch.zeros_like(mask).scatter_(1, (u + 0.0).argmax(1, keepdim=True), True)
        y = torch.where(best, y, -y)
    return y.masked_fill(u.isnan().any(1, keepdim=True), torch.nan)


def eager(u: Tensor, rule: Rule) -> Tensor:
    """What PyTorch makes of the same softmax in float32, the yardstick for rounding."""
    mask = winner_mask(u.float(), rule.winners) if rule.winners else torch.ones_like(u, dtype=torch.bool)
    scaled = (u.float() / rule.temperature).masked_fill(~mask, -torch.inf)
    return torch.softmax(scaled, 1).masked_fill(~mask, 0.0)


def assert_close(y: Tensor, u: Tensor, rule: Rule) -> None:
    want = oracle(u, rule)
    assert torch.equal(y.isnan(), want.isnan())
    want, got = want.masked_fill(want.isnan(), 0.0), y.double().masked_fill(y.isnan(), 0.0)
    if rule.activity != "softmax":
        assert torch.equal(got, want.to(y.dtype).double())
        return
    allowed = 2 * (eager(u, rule).to(y.dtype).double() - want.abs()).abs().nan_to_num().max() + 2e-7
    assert (got - want).abs().max() <= allowed


def assert_lists_agree(result: Result, u: Tensor, rule: Rule) -> None:
    """Threshold, cut and lists are those of the oracle's selection, and the lists hold what y holds."""
    k = rule.winners
    ordered = (u.float() + 0.0).sort(1, descending=True).values
    assert torch.equal(result.threshold, ordered[:, k - 1])
    mask = winner_mask(u.double(), k)
    units = mask.transpose(1, 2).nonzero()[:, 2].view(*result.winner_unit.shape)
    assert torch.equal(result.winner_unit.long(), units)
    at_cut = mask & (u.double() == ordered[:, k - 1 : k].double())
    last = torch.where(at_cut, torch.arange(u.shape[1])[:, None], -1).amax(1)
    assert torch.equal(result.cut.long(), last)
    listed = result.y.transpose(1, 2).gather(2, units)
    assert torch.equal(result.winner_activity.to(result.y.dtype), listed)


def noise(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul_(3).to(dtype)


def winner_counts(units: int) -> list[int]:
    counts = {1, 2, 3, 5, 8, 13, 16, 17, 31, 32, 33, 47, units // 2, units - 1, units}
    return sorted(k for k in counts if 1 <= k <= units)


SHAPES = [(1, 1, 1), (1, 2, 3), (3, 7, 5), (2, 31, 17), (5, 37, 49), (1, 97, 64), (2, 131, 100), (1, 512, 33)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_winner_count_is_exact(
    isa: str, shape: tuple[int, int, int], dtype: torch.dtype, layout: str
) -> None:
    if layout == "rows":
        shape = (1, shape[1], shape[0] * shape[2])
    u = noise(shape, dtype)
    for k in winner_counts(shape[1]):
        rule = Rule("linear", winners=k)
        result = run(u, rule, layout)
        assert_close(result.y, u, rule)
        assert_lists_agree(result, u, rule)


@pytest.mark.parametrize("rule", [
    Rule(activity, winners, temperature, anti)
    for activity, winners, temperature, anti in itertools.product(
        ACTIVITIES, (0, 1, 6, 40), (1.0, 0.2, 7.0), (False, True)
    )
    if not (anti and winners == 1) and not (activity == "binary" and winners == 0)
    and (activity == "softmax" or temperature == 1.0)
], ids=str)  # fmt: skip
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activities(isa: str, rule: Rule, dtype: torch.dtype) -> None:
    u = noise((3, 61, 29), dtype)
    for layout, out_dtype in itertools.product(("channels_first", "channels_last"), DTYPES):
        result = run(u, rule, layout, out_dtype)
        assert_close(result.y, u, rule)
        if rule.winners:
            assert_lists_agree(result, u, rule)


@pytest.mark.parametrize("winners", [0, 5, 40])
@pytest.mark.parametrize("temperature", [1.0, 0.05, 30.0])
def test_logsumexp(isa: str, winners: int, temperature: float) -> None:
    u = noise((2, 83, 21))
    result = run(u, Rule("softmax", winners, temperature))
    mask = winner_mask(u.double(), winners) if winners else torch.ones_like(u, dtype=torch.bool)
    scaled = u.double() / temperature
    want = scaled.masked_fill(~mask, -torch.inf).logsumexp(1)
    eager_error = ((u / temperature).masked_fill(~mask, -torch.inf).logsumexp(1).double() - want).abs().max()
    assert (result.logsumexp.double() - want).abs().max() <= 2 * eager_error + 1e-6


@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
@pytest.mark.parametrize("winners", [0, 999])
def test_many_terms_below_the_rounding_of_the_largest_count(isa: str, winners: int, layout: str) -> None:
    """Each of them added to the largest alone would be lost; together they are 500 roundings."""
    u = torch.full((1, 1000, 18), -16.65)
    u[:, 0] = 0.0
    result = run(u, Rule("softmax", winners), layout)
    want = u.double()[:, : winners or 1000].logsumexp(1)
    assert (result.logsumexp.double() - want).abs().max() <= 1e-6


def awkward_inputs() -> dict[str, Tensor]:
    shape = (2, 75, 19)
    few_values = torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(1)).float()
    zeros = torch.zeros(shape)
    zeros[:, ::3] = -0.0
    signed_zeros = noise(shape).clamp(min=0.0)
    signed_zeros[:, 1::2] *= -1.0
    inf = noise(shape)
    inf[:, ::11] = torch.inf
    inf[:, 5::7] = -torch.inf
    # Negative zeros beside the smallest numbers of both signs.
    denormal = few_values * torch.finfo(torch.float32).smallest_normal / 2**22
    return {
        "constant": torch.full(shape, -1.5), "few values": few_values, "zeros": zeros, "denormal": denormal,
        "relu'd": noise(shape).clamp(min=0.0), "signed zeros": signed_zeros, "inf": inf,
        "all -inf": torch.full(shape, -torch.inf), "all inf": torch.full(shape, torch.inf),
        "ascending": torch.arange(75.0)[:, None].expand(shape),
        "descending": -torch.arange(75.0)[:, None].expand(shape),
        "extremes": few_values * torch.finfo(torch.float32).max / 2,
    }  # fmt: skip


@pytest.mark.parametrize("name", awkward_inputs())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
def test_awkward_values(isa: str, name: str, dtype: torch.dtype, layout: str) -> None:
    u = awkward_inputs()[name].to(dtype)
    for k in (1, 2, 7, 32, 33, 50, 74, 75):
        rule = Rule("linear", winners=k)
        result = run(u, rule, layout)
        assert_close(result.y, u, rule)
        assert_lists_agree(result, u, rule)
        if k > 1:
            rule = Rule("binary", winners=k, anti=True)
            assert_close(run(u, rule, layout).y, u, rule)
    for k in (0, 9, 40):
        rule = Rule("softmax", winners=k)
        assert_close(run(u, rule, layout).y, u, rule)


@pytest.mark.parametrize("activity", ACTIVITIES)
@pytest.mark.parametrize("winners", [0, 3, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_spoils_its_own_position_only(isa: str, activity: str, winners: int, dtype: torch.dtype) -> None:
    if activity == "binary" and winners == 0:
        pytest.skip("binary needs winners")
    u = noise((2, 67, 23), dtype)
    for n in (0, 31, 66):
        u[1, n, 5 + n // 5] = torch.nan
    rule = Rule(activity, winners)
    for layout in ("channels_first", "channels_last"):
        result = run(u, rule, layout)
        assert_close(result.y, u, rule)
        spoiled = u.isnan().any(1)
        assert int(spoiled.sum()) == 3
        assert torch.equal(result.logsumexp.isnan(), spoiled)
        if winners:
            assert torch.equal(result.threshold.isnan(), spoiled)
            assert torch.equal(result.winner_unit[..., 0] == -1, spoiled)
            assert (result.winner_unit[~spoiled] >= 0).all()
            assert torch.equal(result.winner_activity.isnan().all(2), spoiled)


@pytest.mark.parametrize("winners", [0, 4, 50])
@pytest.mark.parametrize("activity", ["softmax", "linear"])
@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
def test_threads_and_neighbors_change_no_bit(isa: str, winners: int, activity: str, layout: str) -> None:
    u = noise((7, 193, 41))
    rule = Rule(activity, winners)
    if activity == "linear" and winners == 0:
        rule = Rule("relu")
    first = run(u, rule, layout, threads=1)
    for threads in (2, 3, 8, 64):
        other = run(u, rule, layout, threads=threads)
        assert torch.equal(first.y, other.y)
        assert torch.equal(first.logsumexp, other.logsumexp)
    sums_in_other_order = activity == "softmax" and winners == 0  # of a row, where the units are adjacent
    if not sums_in_other_order:
        assert torch.equal(first.y, run(u, rule).y)
    alone = torch.cat(
        [run(u[b : b + 1, :, p : p + 1], rule, layout).y for b in (0, 6) for p in (0, 17, 40)], 2
    )
    assert torch.equal(alone, torch.stack([first.y[b, :, p] for b in (0, 6) for p in (0, 17, 40)], 1)[None])


def test_large_temperature_range(isa: str) -> None:
    u = noise((1, 33, 20))
    for temperature in (1e-40, 1e-30, 1e30):
        rule = Rule("softmax", temperature=temperature)
        y = run(u, rule).y
        assert (y.double() - oracle(u, rule)).abs().max() < 1e-6


def test_exp_underflow_keeps_denormals(isa: str) -> None:
    u = torch.linspace(-120, 0, 121).view(1, -1, 1)
    y = run(u, Rule("softmax")).y.double()
    want = oracle(u, Rule("softmax"))
    assert ((y - want).abs() <= 4e-7 * want + 2e-45).all()


def compete(u: Tensor, /, **fields: Any) -> None:
    """A plain call for u [B, N, P] with some fields set."""
    B, N, P = u.shape
    plain = {"u": u.data_ptr(), "u_dtype": 0, "u_layout": u.stride(), "batch": B, "units": N, "positions": P}
    _cpu.compete(**(plain | {"activity": 1, "winners": 2, "threads": 1} | fields))


def test_outputs_may_be_left_out(isa: str) -> None:
    u = noise((1, 40, 50))
    full = run(u, Rule("linear", winners=4))
    threshold = torch.empty(50)
    unit = torch.empty(50, 4, dtype=torch.int32)
    compete(u, winners=4, threshold=threshold.data_ptr())
    compete(u, winners=4, winner_unit=unit.data_ptr())
    assert torch.equal(threshold, full.threshold[0])
    assert torch.equal(unit, full.winner_unit[0])


@pytest.mark.parametrize(("change", "message"), [
    ({"u": 0}, "u is null"),
    ({"u": 2}, "aligned"),
    ({"units": -1}, "negative"),
    ({"winners": 5}, "winners must lie"),
    ({"winners": -1}, "winners must lie"),
    ({"temperature": 0.0}, "temperature"),
    ({"temperature": float("nan")}, "temperature"),
    ({"temperature": float("inf")}, "temperature"),
    ({"threads": 0}, "threads"),
    ({"u_layout": (40, 2, 2)}, "stride 1"),
    ({"winners": 0, "threshold": 64}, "winners > 0"),
])  # fmt: skip
def test_refused_parameters(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        compete(noise((2, 4, 5)), **change)


@pytest.mark.parametrize("change", [{"activity": 4}, {"activity": -1}, {"u_dtype": 2}, {"y_dtype": 9}])
def test_unknown_enumerators(change: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must lie between"):
        compete(noise((2, 4, 5)), **change)


@pytest.mark.parametrize("shape", [(0, 4, 5), (2, 4, 0), (2, 0, 5)])
def test_empty(shape: tuple[int, int, int]) -> None:
    compete(torch.empty(shape), winners=0, u=0)
