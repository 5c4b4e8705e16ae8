"""Models in threads of one process and in a forked child learn what they would learn alone."""

from __future__ import annotations

import multiprocessing
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection

import pytest
import torch
from beside_reference import RULE, BesideReference
from reference_model import small_batches, small_network, summed_loss
from torch import Tensor, nn

import ghl_kernels as ghl

STEPS = 8
SECONDS = 60.0


@pytest.fixture
def eager_switching() -> Iterator[None]:
    """Threads take turns a hundred times as often as usual."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(interval / 100)
    yield
    sys.setswitchinterval(interval)


def _together(*jobs: Callable[[], object]) -> None:
    """Run the jobs at the same time; raise what one of them raised."""
    start, errors = threading.Barrier(len(jobs)), []

    def run(job: Callable[[], object]) -> None:
        torch.set_num_threads(1)
        start.wait(SECONDS)
        try:
            job()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(job,), daemon=True) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert not any(thread.is_alive() for thread in threads), "deadlock"
    if errors:
        raise errors[0]


@pytest.mark.usefixtures("eager_switching")
def test_two_models_in_two_threads_follow_the_rule() -> None:
    runs = [BesideReference("backward"), BesideReference("step")]
    _together(*(lambda run=run: run.train(STEPS) for run in runs))


def _model(gate_at: str) -> nn.Module:
    torch.manual_seed(0)
    return ghl.convert(small_network(), RULE, gate_at=gate_at)


def _train(model: nn.Module, seed: int) -> list[Tensor]:
    """Float32, so that native kernels run; the gate is made here, while other threads train."""
    fused = seed % 2 and model[0].gate_at == "step"
    optimizer = ghl.GHLSGD(model, lr=0.05) if fused else torch.optim.SGD(model.parameters(), lr=0.05)
    if model[0].gate_at == "step" and not fused:
        ghl.StepGate(optimizer, model)
    for step in range(STEPS):
        (batch,) = small_batches(5, dtype=torch.float32, seed=100 * seed + step)
        optimizer.zero_grad()
        summed_loss(model, batch).backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.usefixtures("eager_switching")
def test_threads_change_no_bit() -> None:
    modes = ["backward", "step", "step"]
    alone = [_train(_model(mode), seed) for seed, mode in enumerate(modes)]
    together: dict[int, list[Tensor]] = {}
    models = [_model(mode) for mode in modes]

    def job(seed: int) -> None:
        together[seed] = _train(models[seed], seed)

    _together(*(lambda seed=seed: job(seed) for seed in range(len(modes))))
    for seed, parameters in enumerate(alone):
        assert all(torch.equal(a, b) for a, b in zip(parameters, together[seed], strict=True))


def _in_child(model: nn.Module, pipe: Connection) -> None:
    torch.set_num_threads(1)  # torch's own operators need that after a fork
    pipe.send([p.numpy() for p in _train(model, 1)])


@pytest.mark.skipif(not hasattr(multiprocessing, "get_context") or sys.platform == "win32", reason="no fork")
@pytest.mark.parametrize("gate_at", ["backward", "step"])
def test_forked_child_trains(gate_at: str) -> None:
    """The parent has run kernels and backward passes, in threads, before it forks, and goes on after it."""
    parent, child = (_model(gate_at) for _ in range(2))
    torch.set_num_threads(2)
    _train(_model(gate_at), 0)
    torch.set_num_threads(1)
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_in_child, args=(child, sender), daemon=True)
    process.start()
    try:
        want = _train(parent, 1)
        assert receiver.poll(SECONDS), "the child has not finished"
        got = [torch.from_numpy(array) for array in receiver.recv()]
    finally:
        process.kill()
        process.join()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
