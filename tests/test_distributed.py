"""Two processes: StepGate over DDP is one process on the whole batch, and the replicas never part."""

from __future__ import annotations

import copy
import itertools
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from reference_model import small_batches, small_network
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import ghl_kernels as ghl
from ghl_kernels import HebbianRule

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="torch was built without distributed"
)

WORLD = 2
STEPS = 3
RULES = {
    "softmax": HebbianRule.ghl(),
    "kwta": HebbianRule.kwta(1),
    "mean, sanger": HebbianRule(activity="linear", decay="sanger", normalize="mean"),
    "no gate": HebbianRule.softhebb(),
}
# DDP's options, and how many passes a step accumulates, with or without no_sync.
MODES: dict[str, tuple[dict[str, bool], int, bool]] = {
    "plain": ({}, 1, False),
    "bucket views": ({"gradient_as_bucket_view": True}, 1, False),
    "unused parameters": ({"find_unused_parameters": True}, 1, False),
    "static graph": ({"static_graph": True}, 1, False),
    "no_sync": ({}, 2, True),
    "no_sync, bucket views": ({"gradient_as_bucket_view": True}, 2, True),
}
CASES = [
    (rule, mode)
    for rule, mode in itertools.product(RULES, MODES)
    if rule == "softmax" or mode in ("plain", "no_sync")
]


def _network() -> nn.Sequential:
    """Without batch norm, whose statistics are each process's own."""
    torch.manual_seed(0)
    model = small_network()
    return nn.Sequential(*(m for m in model if not isinstance(m, nn.BatchNorm2d))).double()


def _train(model: nn.Module, layers: nn.Module, mode: str, rank: int | None) -> list[Tensor]:
    """Parameters after STEPS steps: one rank's share of every batch, or (None) the whole."""
    _, passes, no_sync = MODES[mode]
    optimizer = torch.optim.SGD(layers.parameters(), lr=0.05, momentum=0.9)
    ghl.StepGate(optimizer, model)
    for step in range(STEPS):
        for index, (x, target) in enumerate(small_batches(*[4 * WORLD] * passes, seed=step)):
            if rank is not None:
                x, target = x[rank::WORLD], target[rank::WORLD]
            waits = no_sync and rank is not None and index < passes - 1
            with model.no_sync() if waits else nullcontext():
                F.cross_entropy(model(x), target).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().clone() for p in layers.parameters()]


def _rank(rank: int, folder: str) -> None:
    """Everything that two processes do, in one start of them; what they found goes to a file."""
    store = torch.distributed.FileStore(f"{folder}/store", WORLD)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    try:
        for rule, mode in CASES:
            model = ghl.convert(_network(), RULES[rule], gate_at="step")
            found[f"{rule}/{mode}"] = _train(
                DistributedDataParallel(model, **MODES[mode][0]), model, mode, rank
            )
        found["given group"] = _given_group(rank)
        found["no group"] = _message_without_group()
        found["idle rank"] = _idle_rank(rank)
        found["warnings"] = _warnings_in_backward_mode()
        found["accumulated and reduced"] = _accumulated_and_reduced(rank)
    finally:
        torch.distributed.destroy_process_group()
    torch.save(found, f"{folder}/{rank}.pt")


def _reduced_by_hand(model: nn.Module) -> None:
    for p in model.parameters():
        if p.grad is not None:
            torch.distributed.all_reduce(p.grad)
            p.grad /= WORLD


def _given_group(rank: int) -> list[Tensor]:
    """Gradients averaged by the user's own loop, without DDP."""
    model = ghl.convert(_network(), RULES["softmax"], gate_at="step")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    ghl.StepGate(optimizer, model, torch.distributed.group.WORLD)
    for step in range(STEPS):
        ((x, target),) = small_batches(4 * WORLD, seed=step)
        optimizer.zero_grad()
        F.cross_entropy(model(x[rank::WORLD]), target[rank::WORLD]).backward()
        _reduced_by_hand(model)
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def _message_without_group() -> str:
    model = ghl.convert(_network(), gate_at="step")
    with pytest.raises(ValueError, match="process_group") as error:
        ghl.StepGate(torch.optim.SGD(model.parameters(), lr=0.1), model)
    assert all(layer._attachment is None for layer in model.modules() if isinstance(layer, ghl.GHLConv2d))
    return str(error.value)


def _idle_rank(rank: int) -> list[Tensor]:
    """The last process gets an empty share of the batch."""
    model = ghl.convert(_network(), RULES["mean, sanger"], gate_at="step")
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    ghl.StepGate(optimizer, wrapped)
    ((x, target),) = small_batches(4)
    share = slice(0, 4) if rank == 0 else slice(4, 4)
    (WORLD * F.cross_entropy(wrapped(x[share]), target[share], reduction="sum")).backward()
    optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def _warnings_in_backward_mode() -> list[str]:
    model = ghl.convert(_network())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for x, _ in small_batches(2, 2):
            model(x).sum().backward()
    return [str(w.message) for w in caught]


def _accumulated_and_reduced(rank: int) -> dict[str, list[Tensor]]:
    """Two passes that are both reduced: DDP averages the first gradient twice, and the sums stay."""
    results = {}
    for rule in ("mean, sanger", "no gate"):
        model = ghl.convert(_network(), RULES[rule], gate_at="step")
        wrapped = DistributedDataParallel(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        ghl.StepGate(optimizer, wrapped)
        for x, target in small_batches(4 * WORLD, 4 * WORLD):
            F.cross_entropy(wrapped(x[rank::WORLD]), target[rank::WORLD]).backward()
        optimizer.step()
        results[rule] = [p.detach().clone() for p in model.parameters()]
    return results


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of the two processes found."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(_rank, (str(folder),), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


def _alone(rule: str, mode: str) -> list[Tensor]:
    model = ghl.convert(_network(), RULES[rule], gate_at="step")
    return _train(model, model, mode, None)


def _assert_replicas_equal(replicas: list[list[Tensor]]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(*replicas, strict=True))


@pytest.mark.parametrize(("rule", "mode"), CASES)
def test_two_processes_are_one_on_the_whole_batch(ranks: list[dict[str, Any]], rule: str, mode: str) -> None:
    replicas = [found[f"{rule}/{mode}"] for found in ranks]
    _assert_replicas_equal(replicas)
    for ours, alone in zip(replicas[0], _alone(rule, mode), strict=True):
        torch.testing.assert_close(ours, alone, rtol=1e-9, atol=1e-10)


def test_gradients_reduced_without_ddp(ranks: list[dict[str, Any]]) -> None:
    replicas = [found["given group"] for found in ranks]
    _assert_replicas_equal(replicas)
    for ours, alone in zip(replicas[0], _alone("softmax", "plain"), strict=True):
        torch.testing.assert_close(ours, alone, rtol=1e-9, atol=1e-10)


def test_several_processes_without_ddp_need_a_group(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert "2 processes and no DistributedDataParallel" in found["no group"]


def test_process_with_an_empty_share(ranks: list[dict[str, Any]]) -> None:
    replicas = [found["idle rank"] for found in ranks]
    _assert_replicas_equal(replicas)
    model = ghl.convert(_network(), RULES["mean, sanger"], gate_at="step")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    ghl.StepGate(optimizer, model)
    ((x, target),) = small_batches(4)
    F.cross_entropy(model(x), target, reduction="sum").backward()
    optimizer.step()
    for ours, alone in zip(replicas[0], model.parameters(), strict=True):
        torch.testing.assert_close(ours, alone.detach(), rtol=1e-9, atol=1e-10)


def test_backward_mode_warns_once(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        (message,) = found["warnings"]
        assert "StepGate" in message


@pytest.mark.parametrize("rule", ["mean, sanger", "no gate"])
def test_sums_outlive_a_reduction_between_passes(ranks: list[dict[str, Any]], rule: str) -> None:
    replicas = [found["accumulated and reduced"][rule] for found in ranks]
    _assert_replicas_equal(replicas)
    start = _network()
    model = ghl.convert(copy.deepcopy(start), RULES[rule], gate_at="step")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    ghl.StepGate(optimizer, model)
    for x, target in small_batches(4 * WORLD, 4 * WORLD):
        F.cross_entropy(model(x), target).backward()
    optimizer.step()
    layers = [f"{name}.weight" for name, m in model.named_modules() if hasattr(m, "rule")]
    names = [name for name, _ in model.named_parameters()]
    for name in layers:
        i = names.index(name)
        before = start.get_parameter(name).detach()
        ours = (before - replicas[0][i]) / 0.05
        alone = (before - model.get_parameter(name).detach()) / 0.05
        torch.testing.assert_close(ours, alone, rtol=1e-8, atol=1e-9)
