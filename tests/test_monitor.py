"""Monitor: every statistic against plain float64, and a training step that does not notice it."""

from __future__ import annotations

import copy
import io
import math
import pathlib
import pickle
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from reference_model import ReferenceModel, small_batches, small_network, summed_loss
from rich.console import Console
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import ghl_kernels as ghl
from examples.processes import leave
from ghl_kernels import HebbianRule, LayerReading
from ghl_kernels.nn import GHLLayer

RULES = {
    "softmax": HebbianRule.ghl(),
    "kwta": HebbianRule.kwta(3),
    "softmax, filter": HebbianRule(winners=0.5, normalize="filter"),
    "sanger, mean, no gate": HebbianRule.hpca(),
    "no norm": HebbianRule(decay="none", normalize="none"),
}


def _model(rule: HebbianRule, gate_at: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return ghl.convert(small_network().to(dtype), rule, gate_at=gate_at)


def _layers(model: nn.Module) -> dict[str, GHLLayer]:
    return {name: m for name, m in model.named_modules() if isinstance(m, GHLLayer)}


def _optimizer(model: nn.Module, gate_at: str) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    if gate_at == "step":
        ghl.StepGate(optimizer, model)
    return optimizer


def _train(model: nn.Module, gate_at: str, steps: int, run: nn.Module | None = None) -> None:
    dtype = next(model.parameters()).dtype
    optimizer = _optimizer(model, gate_at)
    for batch in small_batches(*[4] * steps, dtype=dtype):
        optimizer.zero_grad()
        summed_loss(run or model, batch).backward()
        optimizer.step()


class Plain:
    """The statistics of one layer by their definitions, in float64, from what the reference model saw."""

    def __init__(self, layer: GHLLayer) -> None:
        self.rule, self.units = layer.rule, layer.units
        self.wins, self.largest = np.zeros((2, layer.units), dtype=np.int64)
        self.agreeing = self.opposed = 0
        self.delta_max: list[float] = []
        self.delta_ratio: list[float] = []

    def count(self, u: Tensor, dim: int) -> None:
        k = max(1, self.rule.winners_of(self.units))
        for responses in u.movedim(dim, -1).reshape(-1, self.units).tolist():
            ranked = sorted(range(self.units), key=lambda unit: (-responses[unit], unit))
            self.largest[ranked[0]] += 1
            self.wins[ranked[:k]] += 1

    def measure(self, H: Tensor, applied: Tensor, G: Tensor | None, weight: Tensor) -> None:
        self.delta_max.append(H.abs().max().item())
        self.delta_ratio.append((applied.norm() / weight.norm()).item())
        if G is not None:
            self.agreeing += int(((-H).sign() * G.sign() == 1).sum())
            self.opposed += int(((-H).sign() * G.sign() == -1).sum())

    def check(self, reading: LayerReading, tolerance: float) -> None:
        np.testing.assert_array_equal(reading.wins, self.wins)
        np.testing.assert_array_equal(reading.largest, self.largest)
        assert reading.invalid == 0
        assert reading.positions == self.largest.sum()
        assert reading.gates == len(self.delta_max)
        assert (reading.agreeing, reading.opposed) == (self.agreeing, self.opposed)
        assert reading.delta_max == pytest.approx(np.mean(self.delta_max), rel=tolerance)
        assert reading.delta_ratio == pytest.approx(np.mean(self.delta_ratio), rel=tolerance)


def _observe(plain: dict[str, Plain], reference: ReferenceModel) -> None:
    """One step of the reference model, by the definitions."""
    for name, statistics in plain.items():
        layer = reference.model.get_submodule(name)
        is_linear = isinstance(layer, nn.Linear)
        used = [(x, u) for x, u, grads in reference._seen[name] if grads]
        x, u = (torch.cat(parts) for parts in zip(*used, strict=True))
        statistics.count(u, -1 if is_linear else 1)
        options = {} if is_linear else {"stride": layer.stride, "padding": layer.padding}
        if not is_linear:
            options |= {"dilation": layer.dilation, "groups": layer.groups}
        delta = ghl.reference.linear_delta if is_linear else ghl.reference.conv_delta
        weight = layer.weight.detach()
        raw = HebbianRule(
            **{field: getattr(statistics.rule, field) for field in ("activity", "winners", "decay")},
            normalize="none",
        )
        G = layer.weight.grad if statistics.rule.gate == "sign" else None
        H, applied = (delta(x, u, weight, rule, **options) for rule in (raw, statistics.rule))
        statistics.measure(H, applied, G, weight)


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("gate_at", ["backward", "step"])
@pytest.mark.parametrize("rule", RULES)
def test_statistics_are_their_definitions(rule: str, gate_at: str, passes: int) -> None:
    """Steps 0 and 2 of three; in step mode also over two accumulated passes."""
    if passes == 2 and gate_at == "backward":
        passes = 1
    model = _model(RULES[rule], gate_at)
    reference = ReferenceModel(model)
    plain = {name: Plain(layer) for name, layer in _layers(model).items()}
    monitor = ghl.Monitor(model, every=2)
    optimizer = _optimizer(model, gate_at)
    for step in range(3):
        reference.follow(model)
        reference.forget()
        for batch in small_batches(*[4, 3][:passes], seed=step):
            summed_loss(model, batch).backward()
            reference.backward(batch)
        if step % 2 == 0:
            _observe(plain, reference)
        optimizer.step()
        optimizer.zero_grad()
    for name, reading in monitor.read().items():
        plain[name].check(reading, 1e-9)
        norms = model.get_submodule(name).weight.detach().flatten(1).norm(dim=1)
        np.testing.assert_allclose(reading.row_norms, norms.numpy(), rtol=1e-12)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("rule", [HebbianRule.ghl(), HebbianRule.kwta(3)])
def test_float32_on_every_backend(rule: HebbianRule) -> None:
    """Counts are those of the layer's own responses; ties go to the lowest unit; a NaN counts nowhere."""
    torch.manual_seed(0)
    layer = ghl.GHLConv2d(2, 6, 3, rule=rule)
    monitor = ghl.Monitor(layer, every=1)
    with torch.no_grad():
        layer.weight[4] = layer.weight[2]
        layer.bias[4] = layer.bias[2]
    x = torch.randn(3, 2, 6, 6)
    u = layer(x)
    u.square().sum().backward()
    (reading,) = monitor.read().values()
    plain = Plain(layer)
    plain.count(u.detach(), 1)
    np.testing.assert_array_equal(reading.wins, plain.wins)
    np.testing.assert_array_equal(reading.largest, plain.largest)
    assert plain.largest[2] > 0
    assert plain.largest[4] == 0
    assert reading.gates == 1
    monitor.reset()
    x[1, 0, 2, 2] = math.nan
    layer(x)
    (reading,) = monitor.read().values()
    assert reading.invalid == 9
    assert reading.positions == 3 * 16 - 9


@pytest.mark.parametrize("gate_at", ["backward", "step"])
@pytest.mark.parametrize("rule", ["softmax", "kwta", "sanger, mean, no gate"])
def test_a_monitored_model_trains_bit_for_bit(rule: str, gate_at: str) -> None:
    model = _model(RULES[rule], gate_at, torch.float32)
    twin = copy.deepcopy(model)
    with ghl.Monitor(model, every=2) as monitor:
        _train(model, gate_at, 4)
        assert all(reading.gates == 2 for reading in monitor.read().values())
    _train(twin, gate_at, 4)
    for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_ghlsgd_is_observed_too() -> None:
    model = _model(RULES["softmax"], "step")
    twin = copy.deepcopy(model)
    monitors = [ghl.Monitor(model, every=1), ghl.Monitor(twin, every=1)]
    _train(twin, "step", 2)
    optimizer = ghl.GHLSGD(model, lr=0.01)
    for batch in small_batches(4, 4):
        optimizer.zero_grad()
        summed_loss(model, batch).backward()
        optimizer.step()
    for got, want in zip(*(monitor.read().values() for monitor in monitors), strict=True):
        np.testing.assert_array_equal(got.wins, want.wins)
        assert (got.gates, got.agreeing, got.opposed) == (2, want.agreeing, want.opposed)


class NoSynchronization(TorchDispatchMode):
    """Fails on what would make a GPU's host wait: values read, sizes from values, copies between devices."""

    FORBIDDEN = (
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "unique",
        "bincount",
        "equal",
        "is_nonzero",
    )

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._opname
        self.seen.append(name)
        if name in self.FORBIDDEN or (name == "_to_copy" and (kwargs or {}).get("device") is not None):
            raise AssertionError(f"{name} synchronizes")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("gate_at", ["backward", "step"])
def test_no_step_waits_for_the_device(gate_at: str) -> None:
    model = _model(RULES["kwta"], gate_at, torch.float32)
    ghl.Monitor(model, every=2)
    with NoSynchronization() as mode:
        _train(model, gate_at, 3)
    assert mode.seen.count("observe_responses_") == mode.seen.count("observe_rule_") == 2 * 3
    with pytest.raises(AssertionError, match="_local_scalar_dense synchronizes"), NoSynchronization():
        torch.ones(()).item()


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_observing_reads_no_value(rule: HebbianRule) -> None:
    """Fake tensors have none to read, and refuse every size that depends on one."""
    with FakeTensorMode():
        layer = ghl.GHLLinear(7, 6, rule=rule)
        monitor = ghl.Monitor(layer)
        probe = monitor._probes[""]
        x = torch.randn(5, 7)
        u = layer.eval()(x).detach()
        A, moments = torch.ops.ghl.linear_sums(x, u, *rule.competition(6), rule.decay)
        probe.count_winners(probe.histogram, u, -1)
        probe.measure_rule(probe.totals, torch.randn(6, 7), A, moments, layer.weight)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_no_synchronization_on_a_gpu() -> None:
    model = _model(RULES["kwta"], "backward", torch.float32).cuda()
    monitor = ghl.Monitor(model, every=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x, target = (t.cuda() for t in small_batches(4, dtype=torch.float32)[0])
    summed_loss(model, (x, target)).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        summed_loss(model, (x, target)).backward()
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(reading.gates == 2 for reading in monitor.read().values())


def test_opcheck() -> None:
    layer = ghl.GHLConv2d(3, 5, 3)
    monitor = ghl.Monitor(layer, every=1)
    probe, weight = monitor._probes[""], layer.weight.detach()
    torch.library.opcheck(
        torch.ops.ghl.observe_responses_.default,
        (probe.histogram, torch.randn(2, 5, 4, 4), 1, probe.number),
    )
    sums = torch.randn_like(weight), torch.ones(1)
    for G in (torch.randn_like(weight), None):
        torch.library.opcheck(
            torch.ops.ghl.observe_rule_.default, (probe.totals, G, *sums, weight, probe.number)
        )


def test_saved_tensors_that_are_copies() -> None:
    """What backward is given as the weight may be another tensor, with versions of its own."""
    layer = ghl.GHLLinear(5, 4)
    monitor = ghl.Monitor(layer, every=4)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(12):
        optimizer.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone):
            loss = layer(torch.randn(6, 5)).square().sum()
        loss.backward()
        optimizer.step()
    (reading,) = monitor.read().values()
    assert (reading.gates, reading.positions) == (3, 3 * 6)


def test_every_and_reset() -> None:
    """Steps 0, 3 and 6 of eight; after a reset the next step counts as the first."""
    model = _model(RULES["softmax"], "backward")
    monitor = ghl.Monitor(model, every=3)
    _train(model, "backward", 8)
    assert {reading.gates for reading in monitor.read().values()} == {3}
    assert monitor.read()["0"].positions == 3 * 4 * 64
    monitor.reset()
    (reading, *_) = monitor.read().values()
    assert (reading.gates, reading.positions, reading.invalid) == (0, 0, 0)
    assert math.isnan(reading.delta_max)
    assert math.isnan(reading.agreement)
    _train(model, "backward", 3)
    assert {reading.gates for reading in monitor.read().values()} == {1}


def test_positions_bound_what_is_counted() -> None:
    """Whole items, evenly spaced: 3 of 8 images of 16 positions when 40 are asked for; 5 of 20 rows."""
    conv, linear = ghl.GHLConv2d(2, 6, 3), ghl.GHLLinear(7, 6)
    monitor = ghl.Monitor(nn.ModuleDict({"conv": conv, "linear": linear}), every=1, positions=40)
    u = conv(torch.randn(8, 2, 6, 6))
    plain = Plain(conv)
    plain.count(u.detach()[::4], 1)
    linear(torch.randn(2, 50, 7))
    reading = monitor.read()
    np.testing.assert_array_equal(reading["conv"].largest, plain.largest)
    assert reading["linear"].positions == 34


def test_a_layer_used_twice_counts_both_uses() -> None:
    for gate_at, gates in (("backward", 2), ("step", 1)):
        layer = ghl.GHLLinear(6, 6, gate_at=gate_at)
        monitor = ghl.Monitor(layer, every=2)
        optimizer = _optimizer(layer, gate_at)
        for _ in range(2):
            layer(layer(torch.randn(5, 6))).square().sum().backward()
            optimizer.step()
        (reading,) = monitor.read().values()
        assert (reading.positions, reading.gates) == (10, gates)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpointed_layer_counts_once(use_reentrant: bool) -> None:
    layer = ghl.GHLLinear(6, 6)
    monitor = ghl.Monitor(layer, every=1)
    x = torch.randn(5, 6, requires_grad=True)
    checkpoint(layer, x, use_reentrant=use_reentrant).square().sum().backward()
    (reading,) = monitor.read().values()
    assert (reading.positions, reading.gates) == (5, 1)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_all_layers_of_a_checkpoint_count_once(use_reentrant: bool) -> None:
    """But for the last one, what comes after a layer has backward run all of it again."""
    model = nn.Sequential(ghl.GHLLinear(6, 6), nn.ReLU(), ghl.GHLLinear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = ghl.Monitor(model, every=1)
    for steps in (1, 2):
        x = torch.randn(5, 6, requires_grad=True)
        checkpoint(model, x, use_reentrant=use_reentrant).square().sum().backward()
        optimizer.step()
        with torch.no_grad():
            model(x)  # as a batch norm's statistics are made anew
        counts = [(reading.positions, reading.gates) for reading in monitor.read().values()]
        assert counts == [(5 * steps, steps)] * 2


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("first", ["checkpoint", "direct"])
@pytest.mark.parametrize("together", [True, False])
def test_a_layer_used_in_a_checkpoint_and_directly(first: str, use_reentrant: bool, together: bool) -> None:
    layer = ghl.GHLLinear(6, 6)
    monitor = ghl.Monitor(layer, every=1)
    x = torch.randn(5, 6, requires_grad=True)
    uses = [lambda: checkpoint(layer, x, use_reentrant=use_reentrant), lambda: layer(x)]
    outputs = [use() for use in (uses if first == "checkpoint" else uses[::-1])]
    for loss in [sum(u.square().sum() for u in outputs)] if together else [u.square().sum() for u in outputs]:
        loss.backward()
    (reading,) = monitor.read().values()
    assert reading.positions == 10


def test_a_layer_made_in_inference_mode() -> None:
    with torch.inference_mode():
        layer = ghl.GHLLinear(6, 5)
        monitor = ghl.Monitor(layer, every=2)
        for _ in range(4):
            layer.learn_(torch.randn(3, 6), lr=0.1)
    (reading,) = monitor.read().values()
    assert (reading.positions, reading.gates) == (12, 4)  # nobody knows when it changes


def test_layers_made_on_the_meta_device() -> None:
    with torch.device("meta"):
        layer = ghl.GHLLinear(6, 5)
    monitor = ghl.Monitor(layer, every=1)
    layer.to_empty(device="cpu").reset_parameters()
    layer(torch.randn(4, 6)).sum().backward()
    (reading,) = monitor.read().values()
    assert (reading.positions, reading.gates) == (4, 1)


def test_a_layer_without_units_has_no_norms() -> None:
    monitor = ghl.Monitor(ghl.GHLLinear(6, 0))
    scalars = monitor.scalars()
    assert scalars["(model)/dead"] == 0
    assert math.isnan(scalars["(model)/row_norm_min"])
    assert monitor.table().row_count == 1


def test_learn_is_observed() -> None:
    layer = ghl.GHLLinear(6, 5, rule=HebbianRule.softhebb()).double().eval()
    monitor = ghl.Monitor(layer, every=2)
    x = torch.randn(7, 6, dtype=torch.float64)
    plain = Plain(layer)
    for step in range(3):
        weight = layer.weight.detach().clone()
        u = layer.learn_(x, 0.1)
        if step != 1:
            plain.count(u, -1)
            raw = HebbianRule(losers="anti", normalize="none", gate="none")
            H, applied = (ghl.reference.linear_delta(x, u, weight, rule) for rule in (raw, layer.rule))
            plain.measure(H, applied, None, weight)
    plain.check(monitor.read()[""], 1e-12)
    assert math.isnan(monitor.read()[""].agreement)


def test_made_under_inference_mode() -> None:
    model = _model(RULES["softmax"], "backward")
    with torch.inference_mode():
        monitor = ghl.Monitor(model, every=1)
    _train(model, "backward", 2)
    assert all(reading.gates == 2 for reading in monitor.read().values())


def test_moved_under_inference_mode() -> None:
    layer = ghl.GHLLinear(3, 2)
    monitor = ghl.Monitor(layer)
    probe = monitor._probes[""]
    with torch.inference_mode():
        probe.follow(torch.device("meta"))
    assert probe.totals.is_meta
    assert not probe.histogram.is_inference()
    assert not probe.totals.is_inference()


def test_what_does_not_learn_is_not_observed() -> None:
    """Eval mode, no grad mode, a frozen weight."""
    model = _model(RULES["softmax"], "backward")
    model[3].weight.requires_grad_(False)
    monitor = ghl.Monitor(model, every=1)
    (batch,) = small_batches(4)
    with torch.no_grad():
        model(batch[0])
    model.eval()(batch[0])
    assert all(reading.positions == 0 for reading in monitor.read().values())
    summed_loss(model.train(), batch).backward()
    assert [reading.gates for reading in monitor.read().values()] == [1, 0, 1]
    assert monitor.read()["3"].positions == 0


@pytest.mark.parametrize("fused", [False, True], ids=["", "fused"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_grad_scaler(dtype: torch.dtype, fused: bool) -> None:
    """The scale does not reach the statistics; a step that is skipped is not a gate."""
    readings = []
    for init_scale in (1.0, 1024.0):
        model = _model(RULES["kwta"], "step", torch.float32)
        monitor = ghl.Monitor(model, every=1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, fused=fused)
        ghl.StepGate(optimizer, model)
        scaler = torch.amp.GradScaler("cpu", init_scale=init_scale)
        for bad in (False, True, False):
            x, target = small_batches(4, dtype=torch.float32)[0]
            with torch.autocast("cpu", dtype):
                loss = summed_loss(model, (x, target))
            scaler.scale(loss * (math.inf if bad else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert {reading.gates for reading in monitor.read().values()} == {2}
        readings.append(monitor.read()["6"])
    assert readings[0].agreement == pytest.approx(readings[1].agreement, abs=0.05)
    assert readings[0].delta_max == pytest.approx(readings[1].delta_max, rel=0.05)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _compiled_equals_eager(backend: str, gate_at: str, rule: str, *, before: bool) -> None:
    model = _model(RULES[rule], gate_at)
    twin = copy.deepcopy(model)
    eager = ghl.Monitor(twin, every=2)
    _train(twin, gate_at, 4)
    monitor = ghl.Monitor(model, every=2) if before else None
    run = torch.compile(model, fullgraph=True, backend=backend)
    if monitor is None:
        with torch.no_grad():
            run(small_batches(4)[0][0])
        monitor = ghl.Monitor(run, every=2)
    _train(model, gate_at, 4, run)
    for got, want in zip(monitor.read().values(), eager.read().values(), strict=True):
        np.testing.assert_array_equal(got.wins, want.wins)
        np.testing.assert_array_equal(got.largest, want.largest)
        assert (got.gates, got.agreeing, got.opposed) == (2, want.agreeing, want.opposed)
        assert got.delta_max == pytest.approx(want.delta_max, rel=1e-9)
        assert got.delta_ratio == pytest.approx(want.delta_ratio, rel=1e-9)
    monitor.remove()
    summed_loss(run, small_batches(4)[0]).backward()
    assert all(reading.gates == 2 for reading in monitor.read().values())


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    ("gate_at", "rule", "before"),
    [
        ("backward", "softmax", True),
        ("step", "kwta", False),
        pytest.param("backward", "sanger, mean, no gate", True, marks=pytest.mark.slow),
    ],
)
def test_compiled_model(gate_at: str, rule: str, before: bool) -> None:
    """One full graph, observed every second step as in eager mode; removing the monitor compiles anew."""
    _compiled_equals_eager("aot_eager", gate_at, rule, before=before)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("gate_at", ["backward", "step"])
def test_inductor(gate_at: str) -> None:
    _compiled_equals_eager("inductor", gate_at, "softmax", before=True)


def _rank(rank: int, folder: str) -> None:
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    layer = ghl.GHLLinear(6, 5, gate_at="step").double()
    model = nn.parallel.DistributedDataParallel(layer)
    monitor = ghl.Monitor(model, every=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gate = ghl.StepGate(optimizer, model)
    x = torch.arange(48.0, dtype=torch.float64).reshape(8, 6).sin()[rank::2]
    model(x).square().mean().backward()
    optimizer.step()
    gate.remove()
    own, total, again = monitor.read(), monitor.reduce(), monitor.reduce()
    torch.save([next(iter(readings.values())) for readings in (own, total, again)], f"{folder}/{rank}.pt")
    torch.distributed.barrier()  # gloo aborts where a process leaves while its threads hear of another
    torch.distributed.destroy_process_group()
    leave()


@pytest.mark.slow
def test_two_processes(tmp_path: pathlib.Path) -> None:
    """Winners are each process's own and add up; H and G are those of the whole batch on both."""
    torch.multiprocessing.spawn(_rank, args=(str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1)]
    torch.manual_seed(0)
    layer = ghl.GHLLinear(6, 5).double()
    monitor = ghl.Monitor(layer, every=1)
    layer(torch.arange(48.0, dtype=torch.float64).reshape(8, 6).sin()).square().mean().backward()
    (whole,) = monitor.read().values()
    for own, total, again in ranks:
        assert own.positions == 4
        assert total.positions == again.positions == 8
        np.testing.assert_array_equal(total.wins, whole.wins)
        assert (own.gates, total.gates) == (1, 2)
        assert (own.agreeing, own.opposed) == (whole.agreeing, whole.opposed)
        assert total.agreement == whole.agreement
        assert total.delta_max == pytest.approx(whole.delta_max, rel=1e-12)


def test_reduce_over_one_process_is_a_reading() -> None:
    model = _model(RULES["kwta"], "backward")
    monitor = ghl.Monitor(model)
    with pytest.raises(RuntimeError, match="initialized"):
        monitor.reduce()
    _train(model, "backward", 1)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        total = monitor.reduce()
    finally:
        torch.distributed.destroy_process_group()
    for name, reading in monitor.read().items():
        np.testing.assert_array_equal(total[name].wins, reading.wins)
        np.testing.assert_array_equal(total[name].largest, reading.largest)
        assert total[name].delta_ratio == reading.delta_ratio


def _reading(wins: list[int], **changes: Any) -> LayerReading:
    counts = np.array(wins, dtype=np.int64)
    fields = {"wins": counts, "largest": counts, "invalid": 0, "row_norms": np.ones(len(wins)), "gates": 2}
    fields |= {"agreeing": 3, "opposed": 1, "delta_max": 4.0, "delta_ratio": 0.5}
    return LayerReading(**(fields | changes))


def test_derived_numbers() -> None:
    reading = _reading([4, 0, 2, 2])
    assert reading.entropy == pytest.approx(1.5)
    assert reading.evenness == pytest.approx(0.75)
    assert reading.dead.tolist() == [1]
    assert reading.agreement == 0.75
    assert _reading([7, 0]).entropy == 0.0
    assert math.copysign(1.0, _reading([7, 0]).entropy) == 1.0
    assert _reading([9]).evenness == 1.0
    assert math.isnan(_reading([0, 0]).entropy)
    assert math.isnan(_reading([0]).evenness)
    assert math.isnan(_reading([1], agreeing=0, opposed=0).agreement)


def test_scalars_and_table() -> None:
    model = _model(RULES["softmax"], "backward")
    monitor = ghl.Monitor(model)
    _train(model, "backward", 1)
    scalars = monitor.scalars()
    assert all(type(value) is float and math.isfinite(value) for value in scalars.values())
    assert {name.split("/")[0] for name in scalars} == {"0", "3", "6"}
    reading = monitor.read()["3"]
    assert scalars["3/entropy"] == reading.entropy
    assert scalars["3/dead"] == len(reading.dead) / 12
    assert scalars["3/agreement"] == reading.agreement
    assert scalars["3/row_norm_max"] == reading.row_norms.max()
    given = monitor.scalars({"layer": _reading([4, 0, 2, 2])})
    assert given["layer/entropy"] == pytest.approx(1.5)
    lines = _printed(monitor, {"layer": _reading([4, 0, 2, 2]), "new": _reading([0, 0], gates=0)}, width=140)
    assert lines[-2].split() == ["layer", "4", "8", "1", "0.750", "75.0%", "4", "0.5", "1", "-", "1"]
    assert lines[-1].split() == ["new", "2", "0", "-", "-", "75.0%", "-", "-", "1", "-", "1"]


@pytest.mark.parametrize("units", [1, 5])
def test_what_is_not_known_before_any_step(units: int) -> None:
    """Nor after one whose responses were all NaN."""
    layer = ghl.GHLLinear(3, units)
    monitor = ghl.Monitor(layer)
    for invalid in (0, 4):
        assert monitor.read()[""].invalid == invalid
        scalars = {name.split("/")[1]: value for name, value in monitor.scalars().items()}
        for name in ("entropy", "evenness", "dead"):
            assert math.isnan(scalars[name])
        assert math.isfinite(scalars["row_norm_mean"])
        cells = _printed(monitor, monitor.read(), 140)[-1].split()
        assert cells[:5] == ["(model)", str(units), "0", "-", "-"]
        layer(torch.full((4, 3), math.nan))


def _printed(monitor: ghl.Monitor, readings: dict[str, LayerReading], width: int) -> list[str]:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(monitor.table(readings))
    return console.export_text().splitlines()


def test_table_in_80_columns() -> None:
    monitor = ghl.Monitor(ghl.GHLLinear(3, 2))
    wins = [0] * 1204 + [123_456] * 844
    extreme = {"agreeing": 5030, "opposed": 4970, "delta_max": 1.2345e-5, "delta_ratio": 1.2345e5}
    norms = np.linspace(1.2345e-5, 1.2345e3, len(wins))
    readings = {
        "features.12": _reading([4, 0, 2, 2], row_norms=np.array([0.577, 1.234])),
        "layer4.0.downsample.0": _reading(wins, row_norms=norms, **extreme),
    }
    *_, common = _printed(monitor, {"features.12": readings["features.12"]}, 80)
    assert common.startswith("features.12 ")  # on one line, as is the range
    assert common.endswith(" 0.58 - 1.2")
    lines = _printed(monitor, readings, 80)
    assert all(len(line) <= 80 for line in lines)
    assert not any("…" in line for line in lines)
    heading, body = "".join(lines[1:3]), lines[4:]
    for word in ("layer", "units", "positions", "dead", "even-", "ness", "max |H|", "|H|/|W|", "row norm"):
        assert word in heading
    assert "".join(line[:8].strip() for line in body) == "".join(readings)
    for cell in ("2048", "104,196,864", "1204", "50.3%", "1.23e-05", "1.23e+05", "1.2e-05", "1.2e+03"):
        assert any(cell in line for line in body)


def test_model_that_is_the_layer() -> None:
    layer = ghl.GHLLinear(3, 2)
    monitor = ghl.Monitor(layer)
    layer(torch.randn(4, 3)).sum().backward()
    assert {name.split("/")[0] for name in monitor.scalars()} == {"(model)"}
    assert _printed(monitor, monitor.read(), 80)[-1].startswith("(model) ")
    assert repr(monitor) == "Monitor((model))"
    assert list(monitor.read()) == [""]
    with pytest.raises(ValueError, match=r"'\(model\)' is watched"):
        ghl.Monitor(layer)


@pytest.mark.parametrize("layers", [1, 3, 40])
def test_plot(tmp_path: pathlib.Path, layers: int) -> None:
    pytest.importorskip("matplotlib")
    monitor = ghl.Monitor(ghl.GHLLinear(3, 2))
    readings = {f"layer{i}": _reading([4, 0, 2, i]) for i in range(layers)}
    figure = monitor.plot(tmp_path / "monitor.png", readings)
    assert (tmp_path / "monitor.png").read_bytes().startswith(b"\x89PNG")
    wins, _, dead, agreement, *_ = figure.axes
    assert len(wins.lines) == layers + 1
    shown = wins.lines[0].get_ydata()
    np.testing.assert_allclose(shown, np.array([4, 2, 0, 0]) * 4 / 6)
    assert dead.lines[0].get_ydata()[0] == 0.5
    assert agreement.lines[0].get_ydata()[0] == 0.75
    unknown = monitor.plot()  # before the first step there is nothing but norms
    assert len(unknown.axes) == 6
    assert np.isnan(unknown.axes[2].lines[0].get_ydata()[0])
    no_units = monitor.plot(readings={"": _reading([])})
    assert no_units.axes[2].lines[0].get_ydata()[0] == 0.0


def test_removal_and_copies() -> None:
    model = _model(RULES["softmax"], "backward")
    with ghl.Monitor(model, every=1) as monitor:
        with pytest.raises(ValueError, match="'0' is watched by a Monitor already"):
            ghl.Monitor(model)
        with pytest.raises(ValueError, match="watched by a Monitor"):
            ghl.revert(model)
        twin, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        for other in (twin, pickled):
            assert all(layer._probe is None for layer in _layers(other).values())
            _train(other, "backward", 1)
        with pytest.raises(TypeError, match="cannot be copied"):
            copy.deepcopy(monitor)
        assert all(reading.gates == 0 for reading in monitor.read().values())
        _train(model, "backward", 1)
    monitor.remove()
    _train(model, "backward", 1)
    assert all(reading.gates == 1 for reading in monitor.read().values())
    with ghl.Monitor(model) as second:
        monitor.remove()  # must not take the other's place
        _train(model, "backward", 1)
    assert all(reading.gates == 1 for reading in second.read().values())
    assert isinstance(ghl.revert(model)[0], nn.Conv2d)


def test_copy_of_a_layer_with_a_parametrization() -> None:
    """torch copies its attributes one by one."""
    layer = ghl.GHLLinear(3, 2)
    nn.utils.parametrize.register_parametrization(layer, "bias", nn.Identity())
    monitor = ghl.Monitor(layer, every=1)
    twin = copy.deepcopy(layer)
    assert twin._probe is None
    twin(torch.randn(4, 3)).sum().backward()
    assert monitor.read()[""].positions == 0


def test_bad_input() -> None:
    layer = ghl.GHLLinear(3, 2)
    with pytest.raises(ValueError, match="no GHL layer"):
        ghl.Monitor(nn.Linear(3, 2))
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got str"):
        ghl.Monitor("model")
    for name in ("every", "positions"):
        for value in (0, -1):
            with pytest.raises(ValueError, match=f"{name} must be an int >= 1, got {value}"):
                ghl.Monitor(layer, **{name: value})
        for value in (1.5, True, "2"):
            with pytest.raises(TypeError, match=f"{name} must be an int >= 1, got {value!r}"):
                ghl.Monitor(layer, **{name: value})
    assert layer._probe is None
    assert ghl.Monitor(layer, every=np.int64(5), positions=np.int32(7))._probes[""]._every == 5


@pytest.mark.parametrize("readings", [[1], 3, "0", [], {"0": 1}, {"0": {"dead": 0.0}}])
@pytest.mark.parametrize("method", ["scalars", "table", "plot"])
def test_what_is_no_reading(method: str, readings: Any) -> None:
    monitor = ghl.Monitor(ghl.GHLLinear(3, 2))
    if method == "plot":
        pytest.importorskip("matplotlib")
    message = re.escape(f"readings must be what read() or reduce() returned, got {readings!r}")
    with pytest.raises(TypeError, match=message):
        getattr(monitor, method)(readings=readings)
