"""What a training step costs: time against backprop's, and peak memory."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from .data import Dataset
from .memory import peak_bytes
from .methods import Settings
from .train import Learner

_WARM_UP_ROUNDS = 5
_ROUNDS = 100


@dataclasses.dataclass(frozen=True)
class Cost:
    """A training step's cost: the fastest of many, its ratio to backprop's fastest, and its memory."""

    step_seconds: float
    images_per_second: float
    step_time_ratio: float
    peak_bytes: int


def measure(settings: Settings, data: Dataset, on_round: Callable[[], None]) -> dict[str, Cost]:
    """Cost of a training step of each method, by key.

    The purely local method's is the step of its filters, the frozen one's the step of its read-out.

    Every round gives the same batch to each method in turn, starting from another one each time, so that
    all of them meet the machine in the same states. The fastest step counts: on a busy machine longer
    steps are interrupted more often, which shifts even the median of the rounds' ratios.

    Args:
        on_round: called after each of ``measured_rounds()`` rounds.
    """
    learners = {method.key: Learner(method, settings, data.classes, seed=0) for method in settings.methods}
    size = min(settings.batch_size, len(data.train_images))
    batches = [
        (data.train_images[start : start + size], data.train_labels[start : start + size])
        for start in range(0, len(data.train_images) - size + 1, size)
    ]
    seconds: dict[str, list[float]] = {key: [] for key in learners}
    for round_ in range(measured_rounds()):
        for key, elapsed in _time_round(learners, round_, batches[round_ % len(batches)]).items():
            if round_ >= _WARM_UP_ROUNDS:
                seconds[key].append(elapsed)
        on_round()
    return {
        key: _cost(seconds[key], seconds["backprop"], size, _peak(learner, *batches[0]))
        for key, learner in learners.items()
    }


def measured_rounds() -> int:
    """Rounds that `measure` runs."""
    return _WARM_UP_ROUNDS + _ROUNDS


def _time_round(
    learners: Mapping[str, Learner], round_: int, batch: tuple[Tensor, Tensor]
) -> dict[str, float]:
    keys = list(learners)
    first = round_ % len(keys)
    elapsed = {}
    for key in keys[first:] + keys[:first]:
        start = time.perf_counter()
        learners[key].step(*batch)
        elapsed[key] = time.perf_counter() - start
    return elapsed


def _peak(learner: Learner, images: Tensor, labels: Tensor) -> int:
    learner.model.zero_grad()  # the gradients are the step's, not part of what was held before
    return peak_bytes(lambda: learner.step(images, labels))


def _cost(seconds: Sequence[float], backprop: Sequence[float], batch_size: int, peak: int) -> Cost:
    fastest = min(seconds)
    return Cost(fastest, batch_size / fastest, fastest / min(backprop), peak)
