"""Training-step benchmark on tiny networks: each method is right, counted and reported, or refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from rich.progress import Progress

import ghl_kernels as ghl
from bench import steps
from bench.parity import ParityError
from bench.steps import METHODS, Network, Workload
from bench.training import by_rule, dense_passes, learn, learning_layers, needs
from examples.models import VGG, BasicBlock, DeepHebb, ResNet
from ghl_kernels.nn import GHLLayer

TINY = {
    "DeepHebb": Network(lambda: DeepHebb((4, 6, 8), size=8), batch=4, size=8),
    "VGG": Network(lambda: VGG((1, 1, 1, 1, 1), 4, 16, 32, 10, bias=False), batch=2),
    "ResNet": Network(
        lambda: ResNet(BasicBlock, (1, 1), 4, 10, stem="small"), batch=4, size=8, sums_at="backward"
    ),
}
EAGER = [name for name, method in METHODS.items() if not method.compiled]


@pytest.mark.parametrize("network", TINY)
@pytest.mark.parametrize("name", EAGER)
def test_every_method_takes_the_step_of_its_rule(network: str, name: str) -> None:
    workload = Workload(TINY[network])
    workload.check(workload.prepare(METHODS[name]))


@pytest.mark.parametrize("name", ["GHL softmax", "learn_ softmax"])
def test_a_method_that_takes_another_step_is_refused(name: str) -> None:
    workload = Workload(TINY["DeepHebb"])
    wrong = dataclasses.replace(METHODS[name], rule=ghl.HebbianRule.ghl(0.1))
    with pytest.raises(ParityError, match="off by"):
        workload.check(workload.prepare(wrong))


def test_methods_start_from_the_same_weights_and_leave_no_gradients() -> None:
    workload = Workload(TINY["ResNet"])
    first, second = (workload.prepare(METHODS[name]) for name in ("backprop", "GHL softmax"))
    first.candidate.reset()
    before = {name: tensor.clone() for name, tensor in first.model.state_dict().items()}
    first.candidate.run()
    assert not torch.equal(first.model.stem[0].weight, before["stem.0.weight"])
    second.candidate.reset()
    first.candidate.reset()
    for trainee in (first, second):
        for name, tensor in trainee.model.state_dict().items():
            assert torch.equal(tensor, before[name])
        assert all(parameter.grad is None for parameter in trainee.model.parameters())


def test_learn_leaves_the_layers_as_they_were() -> None:
    model = ghl.convert(DeepHebb((4, 6, 8), size=8))
    x = torch.randn(2, 3, 8, 8)
    before = [stage[1].weight.clone() for stage in model.stages]
    learn(model, x, 0.1)
    assert all(not torch.equal(stage[1].weight, old) for stage, old in zip(model.stages, before, strict=True))
    layers = [module for module in model.modules() if isinstance(module, GHLLayer)]
    assert all("forward" not in vars(layer) for layer in layers)


def test_operations_are_those_of_the_passes() -> None:
    model = DeepHebb((4, 6, 8), size=8)
    passes = dense_passes(model, torch.randn(2, 3, 8, 8))
    forward = [2 * 2 * 64 * 4 * 75, 2 * 2 * 16 * 6 * 36, 2 * 2 * 4 * 8 * 54, 2 * 2 * 10 * 8]
    assert [layer.operations for layer in passes.values()] == forward
    convolutions = sum(forward[:3])
    learning = set(learning_layers(ghl.convert(model)))
    backprop = needs(METHODS["backprop"], passes, set()).operations
    assert backprop == 3 * sum(forward) - forward[0]
    assert needs(METHODS["GHL softmax"], passes, learning).operations == backprop + convolutions
    assert needs(METHODS["learn_ softmax"], passes, learning).operations == sum(forward) + convolutions
    one = by_rule("one winner", ghl.HebbianRule.kwta(1))
    sparse = forward[0] / 4 + forward[1] / 6 + forward[2] / 8
    assert needs(one, passes, learning).operations == pytest.approx(backprop + sparse)


def test_bytes_are_those_of_the_layers_tensors() -> None:
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, bias=False), torch.nn.ReLU(), torch.nn.Conv2d(4, 5, 1)
    )
    passes = dense_passes(model, torch.randn(2, 3, 6, 6))
    first, second = (2 * 3 * 36 + 2 * 4 * 16 + 108) * 4, (2 * 4 * 16 + 2 * 5 * 16 + 20) * 4
    assert needs(METHODS["backprop"], passes, set()).bytes == 2 * first + 3 * second
    assert needs(METHODS["GHL softmax"], passes, {"0"}).bytes == 3 * first + 3 * second
    assert needs(METHODS["learn_ softmax"], passes, {"0"}).bytes == 2 * first + second


def test_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(steps.NETWORKS, "tiny", TINY["DeepHebb"])
    wrong = dataclasses.replace(METHODS["GHL winners=0.02"], rule=ghl.HebbianRule.ghl())
    monkeypatch.setitem(steps.METHODS, "GHL winners=0.02", wrong)
    monkeypatch.setenv("CXX", "no-such-compiler")
    asked = ["GHL softmax, compiled", "GHL softmax", "GHL winners=0.02", "SoftHebb as shipped"]
    with Progress(disable=True) as progress:
        limits = steps.Limits(2, 1)
        found = steps.step_rows("tiny", asked, limits, progress, {"copy": 1e9, "fp32": 1e9})
    rows = {row.name: row for row in found}
    assert set(rows) == {"backprop", *asked}
    assert "no-such-compiler" in rows["GHL softmax, compiled"].note
    assert "ParityError" in rows["GHL winners=0.02"].error
    assert rows["GHL winners=0.02"].ratio is None
    assert rows["backprop"].ratio.median == 1.0
    assert rows["backprop"].peak_ratio == 1.0
    ours = rows["GHL softmax"]
    assert ours.suite == "step"
    assert rows["SoftHebb as shipped"].suite == "local"
    assert ours.images_per_second == pytest.approx(4 / ours.seconds.median)
    assert ours.floor_seconds == pytest.approx(ours.operations / 1e9)
    assert ours.operations > rows["backprop"].operations
    assert [row.name for row in found if row.auto] == ["GHL softmax", "GHL winners=0.02"]
    assert (ours.rule, rows["SoftHebb as shipped"].rule, rows["backprop"].rule) == (
        "softmax",
        "softhebb",
        None,
    )


def test_learn_meets_its_rival_by_the_same_rule() -> None:
    ours, rival = METHODS["learn_ softhebb"], METHODS["SoftHebb as shipped"]
    assert ours.rule == rival.rule
    assert ours.rule_name == rival.rule_name == "softhebb"


def test_a_backprop_step_that_is_another_is_refused() -> None:
    workload = Workload(TINY["DeepHebb"])
    trainee = workload.prepare(METHODS["backprop"])
    workload.check(trainee)

    def run_twice() -> None:
        trainee.candidate.run()
        trainee.candidate.run()

    twice = trainee._replace(candidate=dataclasses.replace(trainee.candidate, run=run_twice))
    with pytest.raises(ParityError, match="off by"):
        workload.check(twice)


@pytest.mark.parametrize(("seconds", "rounds"), [(None, 9), (1e-9, 3)])
def test_rounds_are_as_many_as_there_is_time_for(seconds: float | None, rounds: int) -> None:
    workload = Workload(TINY["DeepHebb"])
    with Progress(disable=True) as progress:
        limits = steps.Limits(9, 1, seconds)
        timings = steps._time([workload.prepare(METHODS["backprop"])], limits, "", progress)
    assert len(timings["backprop"].seconds) == rounds


def test_memory_that_cannot_be_measured_costs_its_row_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(model: torch.nn.Module, sums_at: str) -> torch.nn.Module:
        raise MemoryError("no room")

    monkeypatch.setitem(steps.NETWORKS, "tiny", TINY["DeepHebb"])
    broken = dataclasses.replace(METHODS["GHL softmax"], prepare=fails)
    monkeypatch.setitem(steps.METHODS, "GHL softmax", broken)
    cases = [steps.MemoryCase("tiny", 2, name) for name in ("GHL softmax", "GHL winners=0.02")]
    with Progress(disable=True) as progress:
        failed, found = steps.memory_rows(progress, cases)
    assert failed.error == "MemoryError: no room"
    assert found.ratio.median == found.peak_ratio > 0.0


@pytest.mark.parametrize(("network", "method"), [("AlexNet", "backprop"), ("DeepHebb", "evolution")])
def test_unknown_names_are_refused(network: str, method: str) -> None:
    with Progress(disable=True) as progress, pytest.raises(ValueError, match="got"):
        steps.step_rows(network, [method], steps.Limits(1, 1), progress)
