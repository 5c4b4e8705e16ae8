"""Some training steps of several methods, from equal weights on equal batches: loss, peak memory and time."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from examples.augment import standardize
from examples.batches import Batches
from examples.learner import Learner
from examples.training import Run
from ghl_kernels.demo.errors import UserError
from ghl_kernels.demo.memory import peak_bytes

HEADINGS = (
    "method",
    "loss, first to last step (steps)",
    "peak memory, MiB",
    "times backprop's",
    "seconds a step",
    "times backprop's",
)
OWN = {"k": "kwta", "temperature": "ghl"}  # settings of one method
Found = dict[str, Any]


def take(learners: Mapping[str, Learner], run: Run, steps: int) -> dict[str, Found]:
    """By method: losses of the steps, seconds of all but the last, and the most bytes of tensors in the last.

    The methods take each step in turn, so that all of them meet the machine in the same states. Seconds are
    the processor's, summed over threads, so that other programs do not count; on a GPU they are the clock's.
    The last step is watched by a profiler, which takes time of its own.
    """
    found: dict[str, Found] = {method: {"losses": [], "seconds": [], "peak_bytes": 0} for method in learners}
    for learner in learners.values():
        learner.model.train()
    for number in range(steps):
        pixels, labels = _batch(run.batches, number)
        for method, learner in learners.items():
            torch.manual_seed(number)  # dropout, say, draws the same for all
            images = standardize(pixels, run.mean, run.std, learner.device, torch.channels_last)
            _one_step(learner, images, labels.to(learner.device), found[method], last=number == steps - 1)
    return found


def _one_step(
    learner: Learner, images: torch.Tensor, target: torch.Tensor, found: Found, *, last: bool
) -> None:
    def step() -> None:
        found["losses"].append(float(learner.step(images, target, 1.0)))

    clock = time.process_time if learner.device.type == "cpu" else time.perf_counter
    if last:
        found["peak_bytes"] = _peak(step, learner.device)
    else:
        start = clock()
        step()
        found["seconds"].append(clock() - start)
    learner.model.zero_grad()  # gradients are the step's: no part of what the next one finds held


def _batch(batches: Batches, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    return next(iter(batches.epoch(number // len(batches), number % len(batches))))


def _peak(step: Callable[[], None], device: torch.device) -> int:
    """Most bytes of tensors during a step, above what they held before."""
    if device.type == "cpu":
        return peak_bytes(step)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return torch.cuda.max_memory_allocated() - before


def read(folder: Path) -> list[dict[str, Any]]:
    """Every result of imagenet's ``--steps`` in the folder, in the order of their names.

    Raises:
        UserError: a file is something else.
    """
    results = []
    for path in sorted(folder.glob("*.json")):
        try:
            result = json.loads(path.read_text())
        except ValueError:
            result = {}
        if not set(result) >= {"command", "settings", "methods", "environment"}:
            raise UserError(f"{path} is no result of examples.imagenet --steps; make it anew, or delete it.")
        results.append(result)
    return results


def cells(methods: Mapping[str, Found]) -> list[tuple[str, ...]]:
    """A row of texts for each method, as HEADINGS names them; "backprop" is among the methods."""
    beside = methods["backprop"]
    lines: list[tuple[str, ...]] = []
    for method, found in methods.items():
        losses = f"{found['losses'][0]:.3f} to {found['losses'][-1]:.3f} ({len(found['losses'])})"
        peak = found["peak_bytes"]
        memory = f"{peak / 2**20:,.0f}", f"{peak / beside['peak_bytes']:.3f}"
        lines.append((method, losses, *memory, *_times(found.get("seconds"), beside.get("seconds"))))
    return lines


def _times(seconds: list[float] | None, beside: list[float] | None) -> tuple[str, str]:
    """Median and ratio; where there are others, without the first step, which also sets up."""
    if not seconds or not beside:
        return "not timed", ""
    median, other = (statistics.median(several[1:] or several) for several in (seconds, beside))
    return f"{median:.2f}", f"{median / other:.2f}"
