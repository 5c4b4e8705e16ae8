"""Scaling and overhead: fits on synthetic costs, sweeps, and all rows at toy sizes. No time is judged."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from rich.progress import Progress

from bench import overhead, scaling, step_threads, steps
from bench.gpu.timing import Timed
from bench.interleave import Spread
from bench.parity import ParityError
from bench.race import Target
from bench.report import Row
from bench.scaling import Contender, Point, fit_power
from bench.shapes import ConvShape, LinearShape
from bench.steps import Network
from examples.models import DeepHebb
from ghl_kernels._dispatch import kind_of_layer

CPU = Target.of(torch.device("cpu"), quick=True)
TOY = Point(ConvShape(4, 4, 16, 4, 3), 4)
BASE = Point(ConvShape(16, 64, 256, 16, 3), 8)
ALL = (*scaling.OPERATIONS, scaling._DENSE)


def options(**changes: object) -> argparse.Namespace:
    return argparse.Namespace(
        **{"rounds": 1, "threads": 1, "quick": True, "device": torch.device("cpu")} | changes
    )


@pytest.mark.parametrize("exponent", [-1.0, 0.0, 0.5, 1.0, 2.0])
def test_fit_recovers_a_power(exponent: float) -> None:
    sizes = [4, 8, 16, 32, 64]
    fit = fit_power(sizes, [3e-5 * size**exponent for size in sizes])
    assert fit.exponent == pytest.approx(exponent, abs=1e-9)
    assert fit.coefficient == pytest.approx(3e-5)
    assert fit.error == pytest.approx(0.0, abs=1e-7)


def test_the_standard_error_is_the_textbooks() -> None:
    sizes, costs = [1.0, 2.0, 4.0, 8.0], [1.0, 2.5, 3.5, 9.0]
    x, y = np.log(sizes), np.log(costs)
    slope = ((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()
    residuals = y - y.mean() - slope * (x - x.mean())
    fit = fit_power(sizes, costs)
    assert fit.exponent == pytest.approx(slope)
    assert fit.error == pytest.approx(math.sqrt((residuals**2).sum() / 2 / ((x - x.mean()) ** 2).sum()))
    spread = fit.spread()
    assert spread.median - spread.p20 == pytest.approx(spread.p80 - spread.median)
    assert spread.p80 == pytest.approx(fit.exponent + 0.8416 * fit.error)


def test_the_standard_error_covers_noise() -> None:
    """Over many noisy sweeps the true exponent lies within two errors about as often as it should."""
    generator = np.random.default_rng(0)
    sizes = 2.0 ** np.arange(12)
    fits = [fit_power(sizes, sizes * np.exp(generator.normal(0, 0.1, sizes.size))) for _ in range(300)]
    covered = np.mean([abs(fit.exponent - 1.0) <= 2 * fit.error for fit in fits])
    assert 0.87 <= covered <= 0.97  # Student's t with 10 degrees of freedom: 0.927


@pytest.mark.parametrize(
    ("sizes", "costs"),
    [
        ([1, 2], [1.0, 2.0]),
        ([2, 2, 2], [1.0, 2.0, 3.0]),
        ([1, 2, 4], [1.0, 2.0]),
        ([1, 2, 4], [1.0, 0.0, 2.0]),
        ([0, 2, 4], [1.0, 1.0, 2.0]),
        ([1, 2, 4], [1.0, math.nan, 2.0]),
    ],
    ids=["two", "one size", "lengths", "zero cost", "zero size", "nan"],
)
def test_fit_refuses(sizes: list[float], costs: list[float]) -> None:
    with pytest.raises(ValueError, match="got"):
        fit_power(sizes, costs)


@pytest.mark.parametrize(
    ("variable", "sizes"),
    [
        ("B", [4, 8, 16, 32, 64]),
        ("N", [64, 128, 256, 512, 1024]),
        ("D", [144, 288, 576, 1152, 2304]),
        ("k", [2, 4, 8, 16, 32]),
    ],
)
def test_a_sweep_changes_one_size(variable: str, sizes: list[int]) -> None:
    points = scaling.sweep(BASE, variable, 5)
    assert [point.size(variable) for point in points] == sizes
    assert points[2] == BASE
    for other in set("BNDk") - {variable}:
        assert {point.size(other) for point in points} == {BASE.size(other)}


@pytest.mark.parametrize(("variable", "points"), [("B", 2), ("B", 11), ("k", 9)])
def test_sweep_refuses(variable: str, points: int) -> None:
    with pytest.raises(ValueError, match="got"):
        scaling.sweep(BASE, variable, points)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("operation", scaling.OPERATIONS, ids=lambda operation: operation.name)
def test_every_sweep_stays_inside_the_layer(operation: scaling.Operation, device: str) -> None:
    for quick, points in ((False, 5), (True, 3)):
        base = scaling._base(operation, Target.of(torch.device(device), quick))
        for variable in operation.variables:
            assert all(point.winners <= point.shape.units for point in scaling.sweep(base, variable, points))


@pytest.mark.parametrize(
    ("most", "counts"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (16, [1, 2, 4, 8, 16])]
)
def test_thread_counts(most: int, counts: list[int]) -> None:
    assert step_threads.thread_counts(most) == counts


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ghl u -> H softmax, dense", {"B": 1, "N": 1, "D": 1}),
        ("ghl u -> H k-WTA, sparse", {"B": 1, "N": 0, "D": 1, "k": 1}),
        ("ghl k-WTA", {"B": 1, "N": 1, "k": 0}),
        ("ghl gate", {"N": 1, "D": 1}),
    ],
)
def test_the_arithmetic_of_every_operation(name: str, expected: dict[str, float]) -> None:
    operation = next(operation for operation in scaling.OPERATIONS if operation.name == name)
    found = {}
    for variable in operation.variables:
        points = scaling.sweep(BASE, variable, 3)
        work = [operation.work(point, 4) for point in points]
        found[variable] = fit_power(
            [point.size(variable) for point in points], [count.operations or count.bytes for count in work]
        ).exponent
    assert found == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("exponent", [4e-16, -4e-16, 0.0])
def test_an_exponent_of_zero_is_printed_as_zero(exponent: float) -> None:
    assert scaling._rounded(exponent) == "0"


@pytest.mark.parametrize("operation", ALL, ids=lambda operation: operation.name)
def test_every_operation_is_the_reference(operation: scaling.Operation) -> None:
    call = operation.build(TOY, CPU)
    torch.testing.assert_close(call.run().double(), call.expected().double(), rtol=1e-4, atol=1e-5)
    first = call.run().clone()
    assert torch.equal(call.run(), first)


@pytest.mark.parametrize("build", [scaling._dense_winners, scaling._sparse_winners, scaling._softmax])
def test_a_linear_layer_is_the_reference(build) -> None:
    call = build(Point(LinearShape(6, 5, 8), 2), CPU)
    torch.testing.assert_close(call.run().double(), call.expected().double(), rtol=1e-4, atol=1e-5)


def test_nothing_wrong_is_timed() -> None:
    def wrong(point: Point, target: Target) -> scaling.Call:
        return scaling._kwta(point, target)._replace(run=lambda: scaling._tensors(point, target)[1])

    operation = dataclasses.replace(scaling.OPERATIONS[2], build=wrong)
    with pytest.raises(ParityError, match="k-WTA"):
        scaling._prepare(operation, TOY, CPU)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_crossovers_are_of_the_kinds_that_the_dispatch_knows(device: str) -> None:
    for kind, shape in scaling.CROSSOVERS[device].items():
        if isinstance(shape, LinearShape):
            assert kind_of_layer(shape.features, None) == kind
        else:
            assert kind_of_layer(shape.channels, shape.geometry) == kind


class TestMeasureOnGpu:
    """The wiring to bench/gpu/timing.py, which needs a GPU itself."""

    @pytest.fixture
    def measured(self, monkeypatch: pytest.MonkeyPatch):
        def run(times: dict[str, Timed], **arguments: object):
            monkeypatch.setattr(
                scaling, "time_all", lambda runs, **_: self.recorded(runs, _["sets"]) or times
            )
            contenders = {
                name: Contender(self.seen.setdefault(name, []).append, sets)
                for name, sets in zip(times, (2, 3), strict=True)
            }
            with Progress(disable=True) as progress:
                return scaling.measure(
                    contenders, "label", options(device=torch.device("cuda")), progress, **arguments
                )

        self.seen: dict[str, list[int]] = {}
        return run

    @staticmethod
    def recorded(runs, sets: int) -> None:
        for run in runs.values():
            for index in range(sets):
                run(index)

    def test_ratios_and_buffer_sets(self, measured) -> None:
        found = measured(
            {"base": Timed(Spread(2.0, 1.0, 4.0), True), "ours": Timed(Spread(3.0, 2.0, 5.0), True)}
        )
        assert self.seen == {"base": [0, 1, 0], "ours": [0, 1, 2]}
        assert found["ours"].seconds == Spread(3.0, 2.0, 5.0)
        assert found["ours"].ratio == Spread(1.5, 0.5, 5.0)

    def test_a_failure_is_not_swallowed(self, measured) -> None:
        fine = Timed(Spread(2.0, 1.0, 4.0), True)
        with pytest.raises(RuntimeError, match="label, ours: out of memory"):
            measured({"base": fine, "ours": Timed(None, problem="out of memory")})
        slow = Timed(Spread(3.0, 2.0, 5.0), captured=False)
        with pytest.raises(RuntimeError, match="captured"):
            measured({"base": fine, "ours": slow})
        assert measured({"base": slow, "ours": fine}, capture=False)["base"].seconds == slow.seconds


@pytest.fixture(scope="module")
def toy_rows() -> list[Row]:
    """Everything that scaling_rows does, on toy layers; the machine is said to have two processors."""
    with pytest.MonkeyPatch.context() as patch:
        toys = [dataclasses.replace(operation, base={"cpu": TOY}) for operation in scaling.OPERATIONS]
        patch.setattr(scaling, "OPERATIONS", toys)
        patch.setattr(scaling, "_base", lambda operation, target: operation.base["cpu"])
        patch.setattr(
            scaling,
            "CROSSOVERS",
            {"cpu": {"conv": ConvShape(2, 16, 40, 5, 3), "linear": LinearShape(8, 8, 40)}},
        )
        patch.setattr(scaling.os, "cpu_count", lambda: 2)
        with Progress(disable=True) as progress:
            return scaling.scaling_rows(options(), progress)


def test_every_sweep_ends_with_its_exponent(toy_rows: list[Row]) -> None:
    verdicts = {
        (row.name, row.against.partition(";")[0][-1]): row for row in toy_rows if "exponent" in row.against
    }
    assert set(verdicts) == {(o.name, variable) for o in scaling.OPERATIONS for variable in o.variables}
    sparse = verdicts["ghl u -> H k-WTA, sparse", "N"]
    assert sparse.case == "N=8 to 32"
    assert sparse.against == "exponent in N; arithmetic says 0"
    points = scaling.series(toy_rows)["N"]["ghl u -> H k-WTA, sparse"]
    assert [size for size, _ in points] == [8, 16, 32]
    fit = fit_power([size for size, _ in points], [row.seconds.median for _, row in points])
    assert sparse.ratio == fit.spread()
    assert points[0][1].ratio == Spread(1.0, 1.0, 1.0)


def test_threads_and_crossover_have_their_rows(toy_rows: list[Row]) -> None:
    panels = scaling.series(toy_rows)
    assert list(panels) == ["B", "N", "D", "k", "threads", "k/N"]
    for line in panels["threads"].values():
        assert [count for count, _ in line] == [1, 2]
        efficiency = line[1][1].ratio.median / 2
        assert f"parallel efficiency {efficiency:.0%}" in line[1][1].note
    (line,) = panels["k/N"].values()  # the quick selection has one kind of layer
    assert [row.fraction for _, row in line] == [fraction for fraction, _ in line] == [0.02, 0.1, 0.4, 0.8]
    found = next(row for row in toy_rows if row.case == "crossover").ratio
    assert 0.0 <= found.p20 <= found.median <= found.p80 <= 0.8


def test_rows_are_told_apart_and_kept(toy_rows: list[Row]) -> None:
    assert len({row.key for row in toy_rows}) == len(toy_rows)
    assert [Row.from_json(json.loads(json.dumps(row.to_json()))) for row in toy_rows] == toy_rows


def test_scaling_refuses_another_device() -> None:
    with pytest.raises(ValueError, match="device must be one of"), Progress(disable=True) as progress:
        scaling.scaling_rows(options(device=torch.device("meta")), progress)


def test_figure(toy_rows: list[Row], tmp_path) -> None:
    scaling.figure(toy_rows, tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="nothing to draw"):
        scaling.figure([row for row in toy_rows if row.case == "crossover"], tmp_path / "none.png")


def test_a_training_step_by_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = Network(lambda: DeepHebb((4, 6, 8), size=8), batch=2, size=8)
    monkeypatch.setitem(steps.NETWORKS, "DeepHebb", tiny)
    monkeypatch.setattr(step_threads.os, "cpu_count", lambda: 2)
    with Progress(disable=True) as progress:
        rows = step_threads.rows(options(), progress)
    assert [row.name for row in rows[::2]] == [f"DeepHebb step, {name}" for name in step_threads.STEPS]
    assert [row.case for row in rows[:2]] == ["threads=1", "threads=2"]
    assert rows[0].ratio == Spread(1.0, 1.0, 1.0)
    assert list(scaling.series(rows)) == ["threads"]


class TestOverhead:
    @pytest.fixture(autouse=True)
    def _few_calls(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(overhead, "_CALLS", 2)

    def rows(self, **changes: object) -> list[Row]:
        with Progress(disable=True) as progress:
            return overhead.overhead_rows(options(**changes), progress)

    def test_quick(self) -> None:
        rows = self.rows()
        assert len({row.key for row in rows}) == len(rows) == 2 * 3 * 2  # layers, modes, rules
        eager = [row for row in rows if row.name.endswith("eager")]
        assert all(row.ratio and row.seconds.median > 0 and row.note.endswith("a call") for row in eager)
        absent = {row.name.rpartition(", ")[2]: row.note for row in rows if row.ratio is None}
        assert absent == {
            "compiled": "absent: it compiles for seconds; not in the quick selection",
            "CUDA graph": "absent: needs a GPU",
        }

    def test_a_mode_that_fails_is_reported_and_the_others_go_on(self, monkeypatch) -> None:
        def no_compiler(layer: torch.nn.Module) -> None:
            raise RuntimeError("no C++ compiler\nat all")

        modes = [overhead.Mode("broken", wrap=no_compiler), overhead.Mode("eager")]
        monkeypatch.setattr(overhead, "modes", lambda device, quick: modes)
        rows = self.rows()
        broken = [row for row in rows if row.name.endswith("broken")]
        assert [row.error for row in broken] == ["RuntimeError: no C++ compiler"] * 4
        assert sum(row.ratio is not None for row in rows) == 4

    @pytest.mark.parametrize("tiny", overhead.LAYERS, ids=str)
    def test_another_rule_is_not_timed(self, tiny: overhead.Tiny) -> None:
        layers = tiny.layers(torch.device("cpu"))
        x = torch.randn(tiny.input, requires_grad=True)
        grad_u = torch.randn_like(layers["torch"](x))
        found = {name: overhead.training_pass(layer, layer, x, grad_u)() for name, layer in layers.items()}
        softmax, plain = layers["softmax"], found["torch"]
        overhead._check("right", softmax, x, grad_u, found["softmax"], plain)
        with pytest.raises(ParityError, match="weight gradient"):
            overhead._check("wrong", softmax, x, grad_u, found["winners=4"], plain)

    def test_all_modes_of_a_gpu(self) -> None:
        modes = overhead.modes(torch.device("cuda"), quick=False)
        assert [(mode.name, mode.capture, mode.absent) for mode in modes] == [
            ("eager", False, ""),
            ("compiled", False, ""),
            ("CUDA graph", True, ""),
        ]

    @pytest.mark.slow
    def test_compiled(self) -> None:
        rows = [row for row in self.rows(quick=False) if row.name.endswith("compiled")]
        assert len(rows) == 4
        assert all(row.ratio is not None for row in rows), [row.error for row in rows]
