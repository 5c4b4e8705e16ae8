"""A run over several processes that stops within an epoch ends with the bits of one that never stopped."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from small_runs import network, run_in

import ghl_kernels as ghl
from examples.batches import Share
from examples.learner import Learner
from examples.training import Training
from ghl_kernels.demo.errors import UserError

WORLD, BATCH_SIZE = 2, 6  # of a process: four steps an epoch


def train(folder: Path, rank: int, stop_after: int | None = None) -> dict[str, Any]:
    """The run in ``folder``, from where it is; the weights and running statistics that it leaves."""
    model = ghl.convert(network(), gate_at="step")
    torch.manual_seed(rank)  # each process draws dropout of its own
    learner = Learner(model, [torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)], distributed=True)
    training = Training(learner, run_in(folder, BATCH_SIZE, Share(rank, WORLD)))
    training.fit(stop_after)
    training.save()
    return {key: value.clone() for key, value in model.state_dict().items()}


def whole(folder: Path, rank: int) -> dict[str, Any]:
    return train(folder / "whole", rank)


def resumed(folder: Path, rank: int) -> dict[str, Any]:
    for stop_after in (2, 1, 3):
        train(folder / "stopped", rank, stop_after)
    return train(folder / "stopped", rank)


def in_processes(function: Any, folder: Path) -> list[dict[str, Any]]:
    meeting = folder / function.__name__
    meeting.mkdir()
    return processes.run(functools.partial(function, folder), WORLD, meeting)


def test_stops_within_an_epoch_change_no_bit(tmp_path: Path) -> None:
    expected, found = in_processes(whole, tmp_path), in_processes(resumed, tmp_path)
    logs = [(tmp_path / folder / "log.csv").read_text() for folder in ("whole", "stopped")]
    assert logs[0] == logs[1]
    assert len(logs[0].splitlines()) == 3
    for key, value in expected[0].items():
        for weights in (expected[1], *found):
            assert torch.equal(value, weights[key]), key


def test_another_number_of_processes_is_refused(tmp_path: Path) -> None:
    in_processes(whole, tmp_path)
    model = network()
    with pytest.raises(UserError, match=r"processes=2 \(now 1\)"):
        Training(Learner(model, [torch.optim.SGD(model.parameters(), 0.01)]), run_in(tmp_path / "whole"))
