"""StepGate over DDP in two and four processes is one process on the whole batch; the replicas never part."""

from __future__ import annotations

import copy
import datetime
import itertools
import os
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from reference_model import small_batches, small_network
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

import ghl_kernels as ghl
from examples.processes import leave
from ghl_kernels import HebbianRule
from ghl_kernels.nn import GHLLayer

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="torch was built without distributed"
)

WORLD = 2
STEPS = 10
LR = 0.0625
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
    world = torch.distributed.get_world_size() if rank is not None else 1
    optimizer = torch.optim.SGD(layers.parameters(), lr=0.05, momentum=0.9)
    ghl.StepGate(optimizer, model)
    for step in range(STEPS):
        for index, (x, target) in enumerate(small_batches(*[8] * passes, seed=step)):
            x, target = x[rank or 0 :: world], target[rank or 0 :: world]
            waits = no_sync and rank is not None and index < passes - 1
            with model.no_sync() if waits else nullcontext():
                F.cross_entropy(model(x), target).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().clone() for p in layers.parameters()]


def _rank(rank: int) -> dict[str, Any]:
    """Everything that two processes do, in one start of them."""
    found: dict[str, Any] = {}
    for rule, mode in CASES:
        model = ghl.convert(_network(), RULES[rule], gate_at="step")
        found[f"{rule}/{mode}"] = _train(DistributedDataParallel(model, **MODES[mode][0]), model, mode, rank)
    found["given group"] = _given_group(rank)
    found["no group"] = _message_without_group()
    found["idle rank"] = _idle_rank(rank)
    found["warnings"] = _warnings_in_backward_mode()
    found["warnings of learn_"] = _warnings_of_learning_in_place()
    found["accumulated and reduced"] = _accumulated_and_reduced(rank)
    found["unequal shares"] = _unequal_shares(rank)
    found["frozen"] = _frozen(rank)
    found["fused"] = _fused(rank)
    found["branches"] = {case: _branches(rank, *case) for case in BRANCHES}
    found["passes"] = {case: _passes(rank, *case) for case in PASSES}
    found["gradient without sums"] = _message_for_gradient_without_sums()
    found["gradient in eval mode"] = [_message_for_gradient_in_eval_mode(*case) for case in EVAL]
    found["wrappers"] = {case: _message_for_wrappers(*case) for case in WRAPPED}
    found["a group each"] = _a_group_each(rank)
    found["float16 hook"] = _messages_for_hooks()
    found["float32"] = {rule: _float32(rank, rule) for rule in ("softmax", "kwta", "no gate")}
    found["join"] = _message_of_join(rank)  # last: it leaves the group in disorder
    return found


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
        ((x, target),) = small_batches(8, seed=step)
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


def _warnings_of_learning_in_place() -> list[str]:
    layer = ghl.GHLLinear(4, 3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            layer.learn_(torch.randn(2, 4), 0.1)
    return [str(w.message) for w in caught]


def _accumulated_and_reduced(rank: int) -> dict[str, list[Tensor]]:
    """Two passes that are both reduced: DDP averages the first gradient twice, and the sums stay."""
    results = {}
    for rule in ("mean, sanger", "no gate"):
        model = ghl.convert(_network(), RULES[rule], gate_at="step")
        wrapped = DistributedDataParallel(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        ghl.StepGate(optimizer, wrapped)
        for x, target in small_batches(8, 8):
            F.cross_entropy(wrapped(x[rank::WORLD]), target[rank::WORLD]).backward()
        optimizer.step()
        results[rule] = [p.detach().clone() for p in model.parameters()]
    return results


def _step(
    model: nn.Module, optimizer: Optimizer, seed: int, rank: int | None, dtype: torch.dtype = torch.float64
) -> None:
    """A training step on one rank's share of a batch of 8, or (None) on the whole."""
    ((x, target),) = small_batches(8, dtype=dtype, seed=seed)
    optimizer.zero_grad()
    share = slice(None) if rank is None else slice(rank, None, torch.distributed.get_world_size())
    F.cross_entropy(model(x[share]), target[share]).backward()
    optimizer.step()


def _shares(rank: int | None, size: int) -> slice:
    """A rank's share of a batch of 7 or 2 items: at most 5 and the rest, or 2 each; later ones get none."""
    if rank is None:
        return slice(0, size)
    share = 5 if torch.distributed.get_world_size() == 2 else 2
    return slice(min(size, rank * share), min(size, (rank + 1) * share))


def _unequal_shares(rank: int | None) -> list[Tensor]:
    """The last batch of an epoch is short; the loss is the mean over the samples of all processes."""
    model: nn.Module = ghl.convert(_network(), RULES["mean, sanger"], gate_at="step")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    wrapped = model if rank is None else DistributedDataParallel(model)
    ghl.StepGate(optimizer, wrapped)
    for step, size in enumerate([7, 7, 2] * 3 + [7]):
        ((x, target),) = small_batches(size, seed=step)
        share = _shares(rank, size)
        optimizer.zero_grad()
        loss = F.cross_entropy(wrapped(x[share]), target[share], reduction="sum")
        world = 1 if rank is None else torch.distributed.get_world_size()
        (loss * world / size).backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def _frozen(rank: int | None) -> list[Tensor]:
    """One layer is frozen from the start, another after some steps."""
    model = ghl.convert(_network(), RULES["softmax"], gate_at="step")
    model[0].requires_grad_(False)
    wrapped = model if rank is None else DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    ghl.StepGate(optimizer, wrapped)
    for step in range(4):
        if step == 2:
            model[2].requires_grad_(False)
            wrapped = model if rank is None else DistributedDataParallel(model)
        _step(wrapped, optimizer, step, rank)
    return [p.detach().clone() for p in model.parameters()]


def _fused(rank: int | None) -> list[Tensor]:
    """GHLSGD in place of SGD with a StepGate."""
    model = ghl.convert(_network(), RULES["softmax"], gate_at="step")
    wrapped = model if rank is None else DistributedDataParallel(model)
    optimizer = ghl.GHLSGD(wrapped, lr=0.05, momentum=0.9)
    for step in range(STEPS):
        _step(wrapped, optimizer, step, rank)
    return [p.detach().clone() for p in model.parameters()]


class _Branching(nn.Module):
    """Samples go through one of two layers, as their first number says."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.branches = nn.ModuleList(nn.Linear(6, 4, bias=False) for _ in range(2))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        taken = x[:, 0] > 0
        parts = [self.branches[i](x[taken == bool(i)]) for i in range(2) if (taken == bool(i)).any()]
        return self.head(torch.cat(parts).tanh())


# Which branches each process takes in each step; gradients zeroed to None; DDP's gradients are bucket views.
TAKEN = [[(0, 1), (0, 1)], [(0,), (1,)], [(1,), (0, 1)], [(0,), (0,)], [(1,), (0,)], [(0, 1), (0, 1)]]
BRANCHES = list(itertools.product((True, False), (True, False)))


def _branches(rank: int | None, set_to_none: bool, bucket_view: bool, world: int = WORLD) -> list[Tensor]:
    """In some steps a process, or all of them, does not use a layer."""
    model: nn.Module = ghl.convert(_Branching().double(), RULES["softmax"], exclude=["head"], gate_at="step")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    wrapped = model
    if rank is not None:
        wrapped = DistributedDataParallel(
            model, find_unused_parameters=True, gradient_as_bucket_view=bucket_view
        )
    ghl.StepGate(optimizer, wrapped)
    for step, pair in enumerate(TAKEN):
        taken = pair * (world // WORLD)
        size = 4 * len(taken)
        x = torch.randn(size, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        for i, mine in enumerate(taken):  # the share of process i takes exactly its branches
            signs = torch.tensor([(1.0 if b else -1.0) for b in mine]).repeat(4)[:4]
            x[4 * i : 4 * i + 4, 0] = x[4 * i : 4 * i + 4, 0].abs() * signs
        share = x if rank is None else x[4 * rank : 4 * rank + 4]
        loss = wrapped(share).square().mean()
        optimizer.zero_grad(
            set_to_none
        )  # between forward and backward, where a hook of DDP would be too early
        loss.backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


class _Branches(nn.Module):
    """Layers that are called by number."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.branches = nn.ModuleList(nn.Linear(6, 4, bias=False) for _ in range(2))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor, taken: tuple[int, ...]) -> Tensor:
        return self.head(sum(self.branches[i](x) for i in taken).tanh())


# Which branches the two processes take in each pass, all of which are reduced, and whether a step follows or
# the gradients are zeroed without one.
SCHEDULE: list[tuple[list[tuple[tuple[int, ...], tuple[int, ...]]], bool]] = [
    ([((0, 1), (0, 1))], True),
    ([((0,), (1,)), ((0, 1), (0, 1))], True),
    ([((0, 1), (0, 1))], False),
    ([((0,), (1,))], True),
    ([((0, 1), (0,)), ((1,), (0, 1))], False),
    ([((1,), (0,)), ((1,), (0, 1)), ((0,), (0,))], True),
    ([((0, 1), (0, 1))], False),
    ([((0,), (0,))], True),
    ([((0, 1), (0, 1))], False),
    ([], True),
]
PASSES = list(itertools.product(("softmax", "no gate"), (True, False), (True, False)))


def _passes(rank: int | None, rule: str, set_to_none: bool, bucket_view: bool) -> list[Tensor]:
    """The passes of a step are reduced one by one, and some are discarded."""
    model: nn.Module = ghl.convert(_Branches().double(), RULES[rule], exclude=["head"], gate_at="step")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    wrapped = model
    if rank is not None:
        wrapped = DistributedDataParallel(
            model, find_unused_parameters=True, gradient_as_bucket_view=bucket_view
        )
    ghl.StepGate(optimizer, wrapped)
    for step, (passes, is_step) in enumerate(SCHEDULE):
        for index, taken in enumerate(passes):
            generator = torch.Generator().manual_seed(100 * step + index)
            x = torch.randn(WORLD, 5, 6, generator=generator, dtype=torch.float64)
            for mine in range(WORLD) if rank is None else [rank]:
                loss = wrapped(x[mine], taken[mine]).square().mean()
                (loss / WORLD if rank is None else loss).backward()
        if is_step:
            optimizer.step()
        optimizer.zero_grad(set_to_none)
    return [p.detach().clone() for p in model.parameters()]


# Whether the pass in eval mode comes first, and whether what came before it was zeroed in place.
EVAL = list(itertools.product((True, False), (True, False)))


def _message_for_gradient_in_eval_mode(is_first: bool, in_place: bool) -> str:
    model = DistributedDataParallel(ghl.convert(_network(), gate_at="step"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    ghl.StepGate(optimizer, model)
    batches = small_batches(2, 2, 2)
    F.cross_entropy(model(batches[0][0]), batches[0][1]).backward()
    optimizer.step()
    optimizer.zero_grad(not in_place)
    for i, (x, target) in enumerate(batches[1:]):
        model.train(i == is_first)
        F.cross_entropy(model(x), target).backward()
    with pytest.raises(RuntimeError) as error:
        optimizer.step()
    return str(error.value)


# Which layers a wrapper reduces, and whether the second has a process group of its own.
WRAPPED = [((0,), False), ((0, 1), True), ((0, 1), False)]


def _wrapped_parts(wrapped: tuple[int, ...], has_own_group: bool) -> tuple[nn.Sequential, Any]:
    own = torch.distributed.new_group() if has_own_group else None
    model = nn.Sequential(*(ghl.GHLLinear(6, 6, gate_at="step", dtype=torch.float64) for _ in range(2)))
    for i in wrapped:
        model[i] = DistributedDataParallel(model[i], process_group=own if i == 1 else None)
    return model, own


def _message_for_wrappers(wrapped: tuple[int, ...], has_own_group: bool) -> str | None:
    model, _ = _wrapped_parts(wrapped, has_own_group)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    try:
        ghl.StepGate(optimizer, model)
    except ValueError as error:
        return str(error)
    return None


def _a_group_each(rank: int) -> bool:
    """The gate of one part reduces over that part's group, wherever else in the model a wrapper is."""
    model, own = _wrapped_parts((0, 1), True)
    optimizer = torch.optim.SGD(model[1].parameters(), lr=0.05)
    return ghl.StepGate(optimizer, model)._attachments._processes.groups == [own]


def _messages_for_hooks() -> list[str]:
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks as hooks

    messages = []
    for hook in (hooks.fp16_compress_hook, hooks.fp16_compress_wrapper(hooks.allreduce_hook)):
        model = DistributedDataParallel(ghl.convert(_network(), RULES["no gate"], gate_at="step"))
        model.register_comm_hook(None, hook)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        ghl.StepGate(optimizer, model)
        ((x, target),) = small_batches(2)
        F.cross_entropy(model(x), target).backward()
        with pytest.raises(RuntimeError) as error:
            optimizer.step()
        messages.append(str(error.value))
        for layer in model.modules():
            if isinstance(layer, GHLLayer):
                layer.set_rule(RULES["softmax"])
        optimizer.zero_grad()
        F.cross_entropy(model(x), target).backward()
        optimizer.step()
    return messages


def _message_for_gradient_without_sums() -> str:
    model = ghl.convert(_network(), gate_at="step")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    ghl.StepGate(optimizer, DistributedDataParallel(model))
    before = model[0].weight.detach().clone()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError) as error:
        optimizer.step()
    assert torch.equal(model[0].weight, before)
    return str(error.value)


def _float32(rank: int, rule: str) -> list[list[list[Tensor]]]:
    """Ten steps in single precision: the parameters before and after each."""
    model = ghl.convert(_network().float(), RULES[rule], gate_at="step")
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    ghl.StepGate(optimizer, wrapped)
    seen = []
    for step in range(STEPS):
        before = [p.detach().clone() for p in model.parameters()]
        _step(wrapped, optimizer, step, rank, torch.float32)
        seen.append([before, [p.detach().clone() for p in model.parameters()]])
    return seen


def _message_of_join(rank: int) -> str:
    model = DistributedDataParallel(ghl.convert(_network(), gate_at="step"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    ghl.StepGate(optimizer, model)

    def train() -> None:
        with model.join():
            for x, target in small_batches(2, 2)[: 2 - rank]:
                F.cross_entropy(model(x), target).backward()
                optimizer.step()

    with pytest.raises(RuntimeError) as error:
        train()
    return str(error.value)


def _with_one_that_fails(rank: int, folder: Path) -> None:
    """Two groups in turn: one process of the first hangs in its second step, and of the second dies in it."""
    processes.join(rank, WORLD, folder / "store")
    failures: dict[str, Any] = {"hangs": lambda: time.sleep(7), "dies": lambda: os._exit(0)}
    for how, fail in failures.items():
        group = torch.distributed.new_group(timeout=datetime.timedelta(seconds=4))
        model = ghl.convert(_network(), RULES["softmax"], gate_at="step")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        ghl.StepGate(optimizer, model, group)
        batches = small_batches(8, 8)
        _backward(model, batches[0], rank)
        optimizer.step()
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.zero_grad()
        _backward(model, batches[1], rank)
        plain = [p.grad.clone() for p in model.parameters()]
        start = time.monotonic()
        if rank == 1:
            fail()
        else:
            with pytest.raises(RuntimeError):
                optimizer.step()
            assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
            assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), plain, strict=True))
            torch.save(time.monotonic() - start, folder / f"{how}.pt")
    leave()


def _backward(model: nn.Module, batch: tuple[Tensor, Tensor], rank: int) -> None:
    x, target = batch
    F.cross_entropy(model(x[rank::WORLD]), target[rank::WORLD]).backward()
    _reduced_by_hand(model)


def test_process_that_hangs_or_dies_ends_the_others(tmp_path: Path) -> None:
    context = torch.multiprocessing.get_context("spawn")
    ranks = [context.Process(target=_with_one_that_fails, args=(rank, tmp_path)) for rank in range(WORLD)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    assert [process.exitcode for process in ranks] == [0, 0]
    assert torch.load(tmp_path / "hangs.pt") < 10
    assert torch.load(tmp_path / "dies.pt") < 10


FOUR: dict[str, Callable[[int | None], list[Tensor]]] = {
    "unequal shares": _unequal_shares,
    "frozen": _frozen,
    "unused": lambda rank: _branches(rank, True, False, world=4),
    "unused, bucket views": lambda rank: _branches(rank, False, True, world=4),
}


def _four(rank: int) -> dict[str, list[Tensor]]:
    found = {case: train(rank) for case, train in FOUR.items()}
    for rule, mode in itertools.product(RULES, ("plain", "no_sync")):
        model = ghl.convert(_network(), RULES[rule], gate_at="step")
        found[f"{rule}/{mode}"] = _train(DistributedDataParallel(model), model, mode, rank)
    return found


@pytest.mark.slow
def test_four_processes(tmp_path: Path) -> None:
    found = processes.run(_four, 4, tmp_path)
    for case in found[0]:
        alone = FOUR[case](None) if case in FOUR else _alone(*case.split("/"))
        for replica in found:
            assert all(torch.equal(a, b) for a, b in zip(replica[case], found[0][case], strict=True))
            for ours, whole in zip(replica[case], alone, strict=True):
                torch.testing.assert_close(ours, whole, rtol=1e-9, atol=1e-10)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of the two processes found."""
    return processes.run(_rank, WORLD, tmp_path_factory.mktemp("ranks"))


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


def test_learning_in_place_warns_once(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        (message,) = found["warnings of learn_"]
        assert "the replicas part" in message


@pytest.mark.parametrize("rule", ["mean, sanger", "no gate"])
def test_sums_outlive_a_reduction_between_passes(ranks: list[dict[str, Any]], rule: str) -> None:
    replicas = [found["accumulated and reduced"][rule] for found in ranks]
    _assert_replicas_equal(replicas)
    start = _network()
    model = ghl.convert(copy.deepcopy(start), RULES[rule], gate_at="step")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    ghl.StepGate(optimizer, model)
    for x, target in small_batches(8, 8):
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


@pytest.mark.parametrize("case", ["unequal shares", "frozen", "fused"])
def test_two_processes_are_one(ranks: list[dict[str, Any]], case: str) -> None:
    alone = {"unequal shares": _unequal_shares, "frozen": _frozen, "fused": _fused}[case](None)
    replicas = [found[case] for found in ranks]
    _assert_replicas_equal(replicas)
    for ours, whole in zip(replicas[0], alone, strict=True):
        torch.testing.assert_close(ours, whole, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("rule", ["softmax", "kwta", "no gate"])
def test_ten_steps_in_float32_differ_by_rounding(ranks: list[dict[str, Any]], rule: str) -> None:
    """Each step from where the replicas were; a sign counts where G is above its rounding."""
    replicas = [found["float32"][rule] for found in ranks]
    model = ghl.convert(_network().float(), RULES[rule], gate_at="step")
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    ghl.StepGate(optimizer, model)
    gated = [f"{name}.weight" for name, m in model.named_modules() if hasattr(m, "rule")]
    for step, steps in enumerate(zip(*replicas, strict=True)):
        for i in range(2):
            _assert_replicas_equal([moments[i] for moments in steps])
        start, end = steps[0]
        for p, before in zip(model.parameters(), start, strict=True):
            p.data.copy_(before)
        _step(model, optimizer, step, None, torch.float32)
        for (name, alone), ours, before in zip(model.named_parameters(), end, start, strict=True):
            mine, theirs, G = (ours - before) / LR, (alone.detach() - before) / LR, alone.grad
            sure = G.abs() > 1e-4 * G.abs().max()
            if name in gated and RULES[rule].gate == "sign":
                assert sure.double().mean() > 0.9
                torch.testing.assert_close(mine.abs(), theirs.abs(), rtol=0, atol=2e-5)
                mine, theirs = mine[sure], theirs[sure]
            torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-5)


@pytest.mark.parametrize("case", BRANCHES)
def test_layers_that_a_process_does_not_use(ranks: list[dict[str, Any]], case: tuple[bool, bool]) -> None:
    replicas = [found["branches"][case] for found in ranks]
    _assert_replicas_equal(replicas)
    for ours, alone in zip(replicas[0], _branches(None, *case), strict=True):
        torch.testing.assert_close(ours, alone, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("case", PASSES)
def test_passes_that_a_process_or_a_step_leaves_out(
    ranks: list[dict[str, Any]], case: tuple[str, bool, bool]
) -> None:
    """Gradients of other processes come where this one's were zeroed, in whatever way."""
    replicas = [found["passes"][case] for found in ranks]
    _assert_replicas_equal(replicas)
    for ours, alone in zip(replicas[0], _passes(None, *case), strict=True):
        torch.testing.assert_close(ours, alone, rtol=1e-9, atol=1e-10)


def test_gradient_partly_of_a_pass_in_eval_mode(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        for message in found["gradient in eval mode"]:
            assert "has no Hebbian sums" in message


def test_layers_that_are_not_reduced_over_one_group(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        outside, apart, together = (found["wrappers"][case] for case in WRAPPED)
        for message in (outside, apart):
            assert "does not reduce the gradients of all layers with gate_at='step' over one" in message
        assert together is None
        assert found["a group each"]


def test_reduction_that_rounds_marks_to_zero(ranks: list[dict[str, Any]]) -> None:
    """Rules with a gate need none."""
    for found in ranks:
        for message in found["float16 hook"]:
            assert "is a mark that float16 rounds to 0" in message


def test_gradient_that_no_process_has_sums_for(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert "no Hebbian sums in any process" in found["gradient without sums"]


def test_join_is_refused(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert "DistributedDataParallel.join" in found["join"]
