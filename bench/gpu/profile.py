"""Which kernels a step runs, and how long each of them takes: where the time between two methods goes."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

STEPS = 3
_LONGEST = 160  # characters of a kernel's name
_MOST = 100  # kernels of a step that get a row of their own


def kernels(run: Callable[[int], object], device: torch.device) -> list[dict[str, Any]]:
    """Rows of name, calls and microseconds of one step, the longest first; on a CPU of operators."""
    on_gpu = device.type == "cuda"
    activity, kind = (
        (ProfilerActivity.CUDA, DeviceType.CUDA) if on_gpu else (ProfilerActivity.CPU, DeviceType.CPU)
    )
    with torch.profiler.profile(activities=[activity]) as profiler:
        for step in range(STEPS):
            run(step)
        if on_gpu:
            torch.cuda.synchronize()
    microseconds: collections.Counter[str] = collections.Counter()
    calls: collections.Counter[str] = collections.Counter()
    for event in profiler.events() or ():
        # an annotation spans the kernels inside it
        if event.device_type == kind and not event.is_user_annotation:
            microseconds[event.name] += event.time_range.elapsed_us()
            calls[event.name] += 1
    rows = [
        {"kernel": name[:_LONGEST], "calls": calls[name] / STEPS, "us": total / STEPS}
        for name, total in microseconds.most_common()
    ]
    rest = rows[_MOST:]
    if rest:
        total = {key: sum(row[key] for row in rest) for key in ("calls", "us")}
        rows = [*rows[:_MOST], {"kernel": f"{len(rest)} others", **total}]
    return rows
