"""Timing by interleaved rounds: on a shared machine only ratios taken side by side mean anything.

Every round times each candidate once, and each ratio divides two times of the same round, so that a
slow second of the machine slows both. The order rotates from round to round, so that none is always
first, and no candidate ever runs twice in a row, with its own data still in the caches.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import time
from collections.abc import Callable, Iterator, Sequence

import torch


@dataclasses.dataclass(frozen=True)
class Candidate:
    """What to time: ``run``, and ``reset``, which is called untimed before every run.

    A reset restores the weights: an update applied again and again drives them to denormals, on which
    arithmetic is many times slower.
    """

    name: str
    run: Callable[[], object]
    reset: Callable[[], None] = lambda: None


@dataclasses.dataclass(frozen=True)
class Spread:
    """Median and 20th and 80th percentiles of a sample."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, sample: Sequence[float]) -> Spread:
        """Percentiles by linear interpolation between the sorted values.

        Raises:
            ValueError: the sample is empty.
        """
        if not sample:
            raise ValueError("a spread needs at least one value, got an empty sample")
        quantiles = torch.quantile(
            torch.tensor(sample, dtype=torch.float64), torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
        )
        p20, median, p80 = quantiles.tolist()
        return cls(median, p20, p80)


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one candidate and of the baseline, round by round."""

    name: str
    seconds: tuple[float, ...]
    baseline: tuple[float, ...]

    @property
    def cost(self) -> Spread:
        """Time as a multiple of the baseline's: per-round ratios, below 1 is faster."""
        return Spread.of([own / other for own, other in zip(self.seconds, self.baseline, strict=True)])

    @property
    def speedup(self) -> Spread:
        """The baseline's time as a multiple of this one's: per-round ratios, above 1 is faster."""
        return Spread.of([other / own for own, other in zip(self.seconds, self.baseline, strict=True)])

    @property
    def milliseconds(self) -> Spread:
        return Spread.of([1e3 * seconds for seconds in self.seconds])


def interleave(
    candidates: Sequence[Candidate],
    *,
    rounds: int,
    threads: int,
    warmup: int = 2,
    clock: Callable[[], float] = time.perf_counter,
    on_run: Callable[[], None] = lambda: None,
) -> dict[str, Timing]:
    """Time the candidates in turn; the first is the baseline of all.

    Args:
        candidates: with different names.
        rounds: timed runs of each candidate.
        threads: torch's intra-op threads during the measurement; restored afterwards.
        warmup: untimed runs of each candidate before the first round.
        clock: seconds, read before and after each run.
        on_run: called after every run, warm-up included (a progress bar).

    Returns:
        candidate name -> Timing, in the order given.

    Raises:
        ValueError: no candidate, a repeated name, or rounds, threads or warmup below 1, 1 and 0.
    """
    names = [candidate.name for candidate in candidates]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"candidates need different names and at least one, got {names}")
    if rounds < 1 or threads < 1 or warmup < 0:
        raise ValueError(
            f"rounds and threads must be at least 1 and warmup 0, got {rounds=}, {threads=}, {warmup=}"
        )
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with pinned_threads(threads), _no_garbage_collection():
        for turn in range(-warmup, rounds):
            for candidate in _order(candidates, turn):
                candidate.reset()
                start = clock()
                candidate.run()
                elapsed = clock() - start
                if turn >= 0:
                    seconds[candidate.name].append(elapsed)
                on_run()
    baseline = tuple(seconds[names[0]])
    return {name: Timing(name, tuple(sample), baseline) for name, sample in seconds.items()}


def _order(candidates: Sequence[Candidate], turn: int) -> Sequence[Candidate]:
    if len(candidates) <= 2:  # a rotation of two would repeat one at every turn
        return candidates
    first = turn % len(candidates)
    return (*candidates[first:], *candidates[:first])


@contextlib.contextmanager
def pinned_threads(threads: int) -> Iterator[None]:
    """Fix torch's number of intra-op threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """A collection would fall into whichever run happens to allocate the last straw."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
