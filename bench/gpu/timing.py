"""Timing on a GPU: events around replays of a CUDA graph, candidates in turn, buffers that no cache holds.

Each candidate is a function of the number of a buffer set. One graph runs it on every set once, so that by
the time a set comes round again the cache has forgotten it. Rounds rotate through the candidates; medians
and percentiles are over rounds. In a dry run the wall clock takes the place of the events.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import torch

from bench.interleave import Spread

_SAMPLE = 2e-3  # seconds a timed sample should last, far above the resolution of the events
_MOST_SETS = 64


@dataclasses.dataclass(frozen=True)
class Timed:
    """Seconds of one run of a candidate, over the rounds; or why it could not be timed."""

    seconds: Spread | None
    captured: bool = False
    problem: str = ""

    def row(self) -> dict[str, Any]:
        """For a document, in microseconds."""
        if self.seconds is None:
            return {"problem": self.problem}
        times = {name: 1e6 * value for name, value in dataclasses.asdict(self.seconds).items()}
        return {
            "us": times["median"],
            "us_p20": times["p20"],
            "us_p80": times["p80"],
            "captured": self.captured,
        }


def sets_for(bytes_per_set: int, l2: int) -> int:
    """Buffer sets whose total is at least three times the cache."""
    return min(_MOST_SETS, max(1, math.ceil(3 * l2 / max(1, bytes_per_set))))


def l2_bytes(device: torch.device) -> int:
    """Of the last-level cache; 0 in a dry run, which needs no rotation."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0


def within(
    run: Callable[[int], object], *contexts: Callable[[], contextlib.AbstractContextManager[Any]]
) -> Callable[[int], object]:
    """``run`` inside contexts that are made anew for every call."""

    def inside(index: int) -> object:
        with contextlib.ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context())
            return run(index)

    return inside


def time_all(
    candidates: dict[str, Callable[[int], object]],
    *,
    sets: int,
    device: torch.device,
    rounds: int = 15,
    capture: bool = True,
    sample: float = _SAMPLE,
) -> dict[str, Timed]:
    """Time every candidate on every set; one that raises is reported and the others go on.

    Args:
        candidates: functions of the number of a buffer set.
        sets: buffer sets there are.
        device: a CPU makes it a dry run.
        rounds: timed samples of each candidate.
        capture: replay a CUDA graph; without, every run is launched call by call.
        sample: seconds that a timed sample should last at least; its runs follow one another without a wait.
    """
    if device.type == "cpu":
        return {name: _wall_clock(run, sets) for name, run in candidates.items()}
    problems: dict[str, Timed] = {}
    ready: dict[str, _Replay] = {}
    for name, run in candidates.items():
        try:
            ready[name] = _Replay(run, sets, capture, sample)
        except Exception as error:  # an unsupported rival is a finding, not the end
            torch.cuda.synchronize()
            problems[name] = Timed(None, problem=f"{type(error).__name__}: {str(error).strip()[:300]}")
    samples = _rounds(ready, rounds)
    timed = {name: Timed(Spread.of(samples[name]), ready[name].captured) for name in ready}
    return {name: timed.get(name) or problems[name] for name in candidates}


class _Replay:
    """A candidate made ready: warmed up, captured where it can be, and its run counted into a sample."""

    def __init__(self, run: Callable[[int], object], sets: int, capture: bool, sample: float) -> None:
        self.sets = sets
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for index in range(min(sets, 3)):
                run(index)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        self.captured, self.replay = False, lambda: [run(index) for index in range(sets)]
        if capture:
            self._capture(run)
        self.replays = 1
        once = self.sample()
        self.replays = max(1, min(200, round(sample / max(once * sets, 1e-6))))

    def _capture(self, run: Callable[[int], object]) -> None:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph):
                for index in range(self.sets):
                    run(index)
        except Exception:  # it is timed call by call, and the row says so
            # ending a capture that failed raises again, before the stream of the capture is left
            torch.cuda.set_stream(stream)
            torch.cuda.synchronize()
            return
        self.captured, self.replay = True, graph.replay

    def sample(self) -> float:
        """Seconds of one run, by events around several replays."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(self.replays):
            self.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / (self.replays * self.sets)


def _rounds(ready: dict[str, _Replay], rounds: int) -> dict[str, list[float]]:
    samples: dict[str, list[float]] = {name: [] for name in ready}
    names = list(ready)
    for turn in range(-2, rounds):
        first = turn % max(1, len(names))
        for name in (*names[first:], *names[:first]):
            seconds = ready[name].sample()
            if turn >= 0:
                samples[name].append(seconds)
    return samples


def _wall_clock(run: Callable[[int], object], sets: int) -> Timed:
    """One run in a dry run: it shows that the candidate works, nothing more."""
    try:
        start = time.perf_counter()
        run(sets - 1)
        return Timed(Spread.of([time.perf_counter() - start]))
    except Exception as error:  # as above
        return Timed(None, problem=f"{type(error).__name__}: {str(error).strip()[:300]}")
