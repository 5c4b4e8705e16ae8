"""The five ways to train, and the settings chosen for each data set.

Learning rates, weight decay, temperatures and the local rule were chosen on training images held out for
it, never on the test images: for digits on 250 images with ``--validation`` and five seeds, for
fashion-mnist on 2000 after three epochs of 6000, with one seed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

from ghl_kernels.rule import HebbianRule

How = Literal["gradient", "local", "frozen"]


@dataclasses.dataclass(frozen=True)
class Method:
    """How the convolutions learn: by the gradient (gated, if there is a rule), by the rule alone, or not."""

    key: str
    label: str
    how: How
    rule: HebbianRule | None = None


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that decides a run, apart from the seed and the images."""

    seeds: int
    epochs: int
    local_epochs: int  # in which the purely local method learns its filters, before the read-out's epochs
    batch_size: int
    filters: tuple[int, int]
    kernel_size: int  # of the first convolution
    pool: int
    methods: tuple[Method, ...]
    learning_rates: Mapping[str, float]  # of the convolutions by method, and "read-out" for all methods
    weight_decay: Mapping[str, float]  # of the convolutions by method; it is added after the gate
    threads: int | None = None  # None: torch's choice
    read_out_momentum: float = 0.9


def _methods(temperature: float, winners: int, local: HebbianRule) -> tuple[Method, ...]:
    return (
        Method("backprop", "backprop", "gradient"),
        Method("ghl-softmax", "GHL softmax", "gradient", HebbianRule.ghl(temperature)),
        Method("ghl-kwta", f"GHL k-WTA, k={winners}", "gradient", HebbianRule.kwta(winners)),
        Method("local", "purely local", "local", local),
        Method("frozen", "frozen random", "frozen"),
    )


PRESETS: Mapping[str, Settings] = {
    "digits": Settings(
        threads=1,  # a step on 8x8 images is too short to be worth sharing
        seeds=3,
        epochs=30,
        local_epochs=8,
        batch_size=50,
        filters=(16, 32),
        kernel_size=3,
        pool=2,
        methods=_methods(temperature=1.0, winners=4, local=HebbianRule.hard_wta()),
        learning_rates={
            "backprop": 0.5,
            "ghl-softmax": 0.05,
            "ghl-kwta": 0.05,
            "local": 0.1,
            "read-out": 0.1,
        },
        weight_decay={"ghl-kwta": 0.01},
    ),
    "fashion-mnist": Settings(
        seeds=1,
        epochs=3,
        local_epochs=1,
        batch_size=64,
        filters=(16, 64),
        kernel_size=5,
        pool=4,
        methods=_methods(temperature=2.0, winners=4, local=HebbianRule.hard_wta()),
        learning_rates={
            "backprop": 0.5,
            "ghl-softmax": 0.01,
            "ghl-kwta": 0.01,
            "local": 0.1,
            "read-out": 0.1,
        },
        weight_decay={"ghl-softmax": 0.01, "ghl-kwta": 0.01},
    ),
}
