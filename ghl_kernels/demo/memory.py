"""Peak memory of a piece of work, from the events of torch's own allocator."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch.profiler import ProfilerActivity, profile


def peak_bytes(step: Callable[[], object]) -> int:
    """Most bytes that tensors held at any moment of ``step()``, above what they held before it.

    The profiler records every allocation and release of torch's CPU allocator; the answer is the
    highest value of their running sum, which starts at 0. So it counts tensors only, is exact, and
    repeats from run to run, unlike the resident set of the process. What was allocated before is not
    seen to go: drop old gradients first. And run a training step or two first: optimizer state that
    the first one allocates and keeps is not part of a step's cost.

    Args:
        step: called once.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    return _highest_running_sum(_allocations(profiler))


def _allocations(profiler: profile) -> Iterable[int]:
    # the profiler's own events() leaves out those that it counts towards an operator
    results: Any = profiler.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


def _highest_running_sum(sizes: Iterable[int]) -> int:
    held = highest = 0
    for size in sizes:
        held += size
        highest = max(highest, held)
    return highest
