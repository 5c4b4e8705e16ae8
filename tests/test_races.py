"""The races: what they count, that every contender is right, and what becomes of one that is wrong."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import ghl_kernels as ghl
from bench import ceilings, race, work
from bench.baselines import BASELINES
from bench.interleave import Spread
from bench.race import Contender, Options, Race, Target
from bench.races import SUITES, compete, correlate, delta, depthwise, epilogue, linear, pair, sparse, winners
from bench.report import Bar, Row
from bench.shapes import ConvShape, LinearShape, conv_tensors
from bench.work import Layer, Work

CPU = Target.of(torch.device("cpu"))
QUICK = Target.of(torch.device("cpu"), quick=True)
CONVS = (
    ConvShape(2, 3, 50, 7, 3),
    ConvShape(2, 3, 50, 8, 3, stride=2),
    ConvShape(1, 4, 50, 7, 3, dilation=2),
    ConvShape(3, 5, 50, 4, 1),
    ConvShape(2, 3, 50, 9, 7, stride=2, padding=0),
)
NEEDS_CPU = pytest.mark.skipif(
    not next(status for status in ghl.backends() if status.name == "cpu").available,
    reason="no native kernels",
)


# --- work ---------------------------------------------------------------------------------------


def test_work_of_a_small_layer() -> None:
    layer = Layer(positions=10, units=4, columns=6, inputs=30, itemsize=2)
    assert work.correlate(layer) == Work(bytes=(30 + 40) * 2 + 24 * 4, operations=2 * 10 * 4 * 6)
    assert work.pair(layer) == Work(bytes=(30 + 80) * 2 + 2 * 24 * 4, operations=4 * 10 * 4 * 6)
    assert work.delta(layer) == Work(bytes=(30 + 40) * 2 + 2 * 24 * 4, operations=2 * 10 * 4 * 6)
    assert work.delta(layer, k=1).operations == 2 * 10 * 1 * 6
    assert work.sparse(layer, k=2).operations == 2 * 10 * 2 * 6
    assert work.compete((2, 3, 5), 4) == Work(240)
    assert work.winners(10, 4, 2, 4) == Work(10 * (16 + 16))
    assert work.gate(24) == work.step(24) == Work(24 * 16)
    assert work.learn(24) == Work(24 * 12)


def test_work_counts_what_the_tensors_hold() -> None:
    shape = ConvShape(2, 6, 4, 9, 3, stride=2, dilation=2, groups=2)
    x, u, weight = conv_tensors(shape)
    layer = shape.layer()
    assert layer.inputs == x.numel()
    assert layer.responses == u.numel()
    assert layer.weights == weight.numel()


@pytest.mark.parametrize(("moved", "operations", "seconds"), [(100.0, 10.0, 10.0), (10.0, 1000.0, 20.0)])
def test_floor_is_the_larger_of_two_times(moved: float, operations: float, seconds: float) -> None:
    limits = {"copy": 10.0, "fp32": 50.0}
    assert Work(moved, operations).floor_seconds(limits, "fp32") == seconds
    assert Work(moved, operations).floor_seconds({"copy": 10.0}, "fp32") is None
    assert Work(moved, operations).floor_seconds({"fp32": 50.0}, "fp32") is None
    assert Work(moved).floor_seconds({"copy": 10.0}, "fp32") == moved / 10.0


def test_ceilings_are_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "last_level_cache", lambda: 1 << 16)
    found = ceilings.measure(1, size=32, rounds=2)
    assert found.keys() == {"copy", "fp32", "bf16"}
    assert all(rate > 1e6 for rate in found.values())


# --- the selection ------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [CPU, QUICK], ids=["full", "quick"])
@pytest.mark.parametrize("suite", SUITES)
def test_races_are_well_formed(suite: str, target: Target) -> None:
    entered = list(SUITES[suite](target))
    assert entered
    assert len({one.case for one in entered}) == len(entered)
    for one in entered:
        names = [contender.name for contender in one.contenders]
        assert one.suite == suite
        assert one.reference in names
        assert len(set(names)) == len(names)
        in_turn = one.case.endswith("alone")
        assert {c.backend for c in one.contenders if c.backend} == ({"cpu"} if in_turn else {"cpu", "eager"})
        assert sum(c.auto for c in one.contenders) == 1
        assert {c.baseline for c in one.contenders if c.baseline} <= BASELINES.keys()
        assert one.bars.keys() <= set(names)
        assert one.work.bytes > 0


def test_baselines_of_the_races_are_nearly_all() -> None:
    raced = {c.baseline for suite in SUITES.values() for one in suite(CPU) for c in one.contenders}
    assert BASELINES.keys() <= raced


@pytest.mark.parametrize("target", [CPU, QUICK], ids=["full", "quick"])
def test_the_bar_of_kwta_is_for_two_in_turn(target: Target) -> None:
    judged = [one for one in compete.kwta(target) if one.bars]
    assert [one.case.split()[0] for one in judged] == ["32x384x16x16"] * 2
    for one in judged:
        assert [contender.name for contender in one.contenders] == ["B7c", "ghl cpu"]
        assert one.bars == {"ghl cpu": Bar(8.0, at_least=True)}


# --- every contender is right -------------------------------------------------------------------

SMALL: dict[str, Callable[[], Race]] = {
    **{f"correlate {shape}": lambda shape=shape: correlate._race(shape, CPU) for shape in CONVS},
    **{f"pair {shape}": lambda shape=shape: pair._race(shape, CPU) for shape in CONVS},
    **{f"sparse {shape}": lambda shape=shape: sparse._conv(shape, 0.1, CPU) for shape in CONVS},
    **{
        f"delta {name} {shape}": lambda shape=shape, rule=rule, rivals=rivals: delta._race(
            shape, "", rule, rivals(shape), CPU
        )
        for shape in CONVS
        for name, rule, rivals in (
            ("softmax", ghl.HebbianRule.ghl(), delta._softmax),
            ("winners", ghl.HebbianRule.kwta(0.02), delta._winners),
            ("softhebb", ghl.HebbianRule.softhebb(), delta._softhebb),
            ("instar", ghl.HebbianRule.instar(), delta._instar),
            ("hpca", ghl.HebbianRule.hpca(), delta._hpca),
        )
    },
    "sparse linear": lambda: sparse._linear(LinearShape(20, 9, 30), 0.1, CPU),
    "linear softmax": lambda: linear._delta(LinearShape(20, 9, 30), linear.RULE, "", CPU),
    "linear winners": lambda: linear._delta(LinearShape(20, 9, 50), linear.WINNERS, "", CPU),
    "linear pair": lambda: linear._pair(LinearShape(20, 9, 30), CPU),
    "depthwise": lambda: depthwise._race(ConvShape(2, 6, 6, 7, 3, groups=6), CPU),
    "depthwise, two units": lambda: depthwise._race(ConvShape(2, 3, 6, 7, 3, stride=2, groups=3), CPU),
    "winners": lambda: winners._race((2, 30, 3, 4), "nhwc", 3, CPU),
    "softmax": lambda: next(iter(compete.softmax(QUICK))),
    "kwta": lambda: compete._kwta(compete._Case((2, 30, 4, 3), "nhwc"), 3, CPU),
    "kwta ties": lambda: compete._tied(compete._Case((2, 30, 4, 3), "nchw"), 3, CPU),
    "kwta in turn": lambda: compete._judged(compete._Case((2, 30, 4, 3), "nchw"), 3, CPU),
    "correlate grouped": lambda: correlate._race(ConvShape(2, 6, 9, 7, 3, groups=3), CPU),
    "correlate one unit": lambda: correlate._race(ConvShape(2, 6, 1, 7, 3), CPU),
    "correlate nhwc": lambda: correlate._race(CONVS[0], CPU, "nhwc"),
    "kwta rows": lambda: compete._kwta(compete._Case((20, 30), "rows"), 0.05, CPU),
    "gate": lambda: epilogue._gate((6, 3, 3, 3), CPU),
    "learn": lambda: epilogue._learn((6, 3, 3, 3), CPU),
}


@pytest.mark.parametrize("name", SMALL)
def test_every_contender_is_right(name: str) -> None:
    one = SMALL[name]()
    inputs = one.inputs()
    expected = one.expected(*inputs)
    for contender in one.contenders:
        if not contender.absent and not contender.compiled:
            one.check(contender, inputs, expected)


def test_krotov_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compete, "MAPS", ((), (2, 30, 4, 3)))
    one = compete._kwta(compete._Case(compete.MAPS[1], "nhwc"), 8, CPU)
    krotov = [contender for contender in one.contenders if contender.baseline == "B7d"]
    assert [contender.rule for contender in krotov] == ["Krotov", "Krotov"]
    inputs = one.inputs()
    for contender in krotov:
        one.check(contender, inputs, None)


def test_in_the_sparse_races_ours_is_the_form_that_auto_takes() -> None:
    taken = {
        one.case: next(contender.name for contender in one.contenders if contender.auto)
        for one in sparse.races(CPU)
    }
    assert taken["B32-96to384-k3-16x16 k/N=0.005"] == "ghl cpu"
    assert taken["B32-3to96-k5-32x32 k/N=0.3"] == "ghl dense"


def test_the_step_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(epilogue, "SHAPES", ((6, 3, 3, 3), (5, 4)))
    one = epilogue._step(CPU)
    inputs = one.inputs()
    expected = one.expected(*inputs)
    assert not torch.equal(expected[0], inputs[-2].double())
    for contender in one.contenders:
        one.check(contender, inputs, expected)


def test_a_large_dense_form_and_a_naive_one_are_absent_with_a_reason() -> None:
    wide = depthwise._race(ConvShape(8, 384, 384, 56, 7, groups=384), CPU)
    naive = delta._hpca(ConvShape(32, 96, 384, 16, 3))
    assert "384 times" in next(c for c in wide.contenders if c.name == "B15 dense").absent
    assert "numbers" in next(c for c in naive if c.name == "B9 naive").absent


# --- measuring ----------------------------------------------------------------------------------


def doubling(*contenders: Contender, reference: str = "right", **fields: object) -> Race:
    """A race to 2 x."""
    return Race(
        suite="toy",
        case="x",
        target=CPU,
        inputs=lambda: (torch.arange(5.0),),
        expected=lambda x: 2.0 * x.double(),
        contenders=contenders,
        reference=reference,
        work=Work(40.0, 5.0),
        tolerance=1e-6,
        **fields,
    )


def measured(one: Race, **options: object) -> dict[str, Row]:
    limits = Options(**{"rounds": 3, "threads": 1, "target": CPU, "seconds": 1.0} | options)
    return {row.name: row for row in race.measure(one, limits, {"copy": 10.0, "fp32": 1.0})}


RIGHT = Contender("right", lambda x: 2.0 * x, baseline="B1")


def fails(x: Tensor) -> Tensor:
    raise RuntimeError("no such thing\nand more")


def test_a_wrong_contender_is_not_timed() -> None:
    rows = measured(doubling(RIGHT, Contender("wrong", lambda x: 2.0 * x + 1.0), Contender("raises", fails)))
    assert "off by" in rows["wrong"].error
    assert rows["raises"].error == "RuntimeError: no such thing"
    for name in ("wrong", "raises"):
        assert rows[name].ratio is None
        assert rows[name].seconds is None
    assert rows["right"].error is None


def test_ratios_are_to_the_reference_and_rows_have_their_floor() -> None:
    rows = measured(
        doubling(Contender("ours", lambda x: x + x), RIGHT, bars={"ours": Bar(8.0, at_least=True)})
    )
    assert rows["right"].ratio == Spread(1.0, 1.0, 1.0)
    assert rows["ours"].against == "right"
    assert rows["ours"].speedup
    assert rows["ours"].bar == Bar(8.0, at_least=True)
    assert rows["ours"].against_seconds == rows["right"].seconds
    assert rows["ours"].floor_seconds == 5.0
    assert (rows["ours"].bytes, rows["ours"].operations) == (40.0, 5.0)


def test_without_its_reference_a_race_is_quoted_against_the_next() -> None:
    rows = measured(
        doubling(Contender("gone", fails), RIGHT, Contender("ours", lambda x: x + x), reference="gone")
    )
    assert rows["ours"].against == "right"
    assert rows["gone"].error


def test_an_absent_contender_says_why() -> None:
    rows = measured(doubling(RIGHT, Contender("absent", fails, absent="no room")))
    assert rows["absent"].note == "absent: no room"
    assert rows["absent"].error is None
    assert rows["absent"].ratio is None


def test_a_selection_of_baselines_keeps_the_reference_and_ours() -> None:
    one = doubling(
        RIGHT,
        Contender("B2", lambda x: x + x, baseline="B2"),
        Contender("B3", lambda x: x + x, baseline="B3"),
        Contender("ours", lambda x: x + x),
    )
    assert list(measured(one, baselines=frozenset({"B3"}))) == ["right", "B3", "ours"]


def test_compiled_contenders_wait_for_a_full_run_or_a_request() -> None:
    compiled = Contender("B4c", lambda x: x + x, baseline="B4c", compiled=True)
    one = doubling(RIGHT, compiled)
    assert "quick" in measured(one, target=QUICK)["B4c"].note
    assert measured(one, target=QUICK, baselines=frozenset({"B4c"}))["B4c"].ratio
    assert measured(one)["B4c"].ratio


def test_a_contender_in_place_is_checked_on_copies() -> None:
    inputs = (torch.arange(5.0),)
    one = doubling(Contender("right", lambda x: x.mul_(2.0)))
    one.check(one.contenders[0], inputs, 2.0 * inputs[0].double())
    assert torch.equal(inputs[0], torch.arange(5.0))


def test_a_contender_runs_on_its_backend() -> None:
    from ghl_kernels import _dispatch

    seen = []
    contender = Contender("ghl eager", lambda x: seen.append(_dispatch._Choice.name), backend="eager")
    before = _dispatch._Choice.name
    contender(torch.zeros(1))
    assert seen == ["eager"]
    assert _dispatch._Choice.name == before


@NEEDS_CPU
def test_only_the_first_backend_is_stable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(race, "STABLE_SECONDS", 0.0)
    rows = measured(doubling(RIGHT, *race.ours(CPU, lambda x: x + x)))
    assert {name: row.stable for name, row in rows.items()} == {
        "right": False,
        "ghl cpu": True,
        "ghl eager": False,
    }


@NEEDS_CPU
def test_what_is_over_at_once_is_not_stable() -> None:
    assert not any(row.stable for row in measured(doubling(RIGHT, *race.ours(CPU, lambda x: x + x))).values())
