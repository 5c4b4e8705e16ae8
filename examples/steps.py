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
from ghl_kernels import environment
from ghl_kernels.demo.memory import peak_bytes

HEADINGS = (
    "method",
    "loss, first to last step (steps)",
    "peak memory, MiB",
    "times backprop's",
    "seconds a step",
    "times backprop's",
)
Found = dict[str, Any]


def take(learner: Learner, run: Run, steps: int) -> Found:
    """Losses of the steps, seconds of all but the last, and the most bytes of tensors in the last.

    Seconds are the processor's, summed over threads, so that other programs do not count; on a GPU they
    are the clock's. The last step is watched by a profiler, which takes time of its own.
    """
    learner.model.train()
    device = learner.device
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    losses: list[float] = []
    seconds: list[float] = []
    peak = 0
    for number in range(steps):
        pixels, labels = _batch(run.batches, number)
        images = standardize(pixels, run.mean, run.std, device, torch.channels_last)
        target = labels.to(device)
        learner.model.zero_grad()  # the gradients are the step's, not part of what was held before

        def step(images: torch.Tensor = images, target: torch.Tensor = target) -> None:
            losses.append(float(learner.step(images, target, 1.0)))

        if number == steps - 1:
            peak = _peak(step, device)
        else:
            start = clock()
            step()
            seconds.append(clock() - start)
    return {"losses": losses, "seconds": seconds, "peak_bytes": peak}


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


def save(path: Path, settings: Mapping[str, Any], methods: Mapping[str, Found]) -> None:
    """Keep as JSON what ``read`` and ``cells`` take."""
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {"settings": dict(settings), "methods": dict(methods), "environment": environment.collect()}
    path.write_text(json.dumps(result, indent=1) + "\n")


def read(folder: Path) -> list[dict[str, Any]]:
    """Every result in the folder, in the order of their names."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


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
