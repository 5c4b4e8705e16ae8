"""Training steps of DeepHebb at B = 8; ``python -m bench.ratios`` compares them at B = 32, interleaved."""

from __future__ import annotations

import pytest

from bench.steps import METHODS, backprop, images

BATCH = 8
ROUNDS = 5


@pytest.mark.parametrize("name", ["backprop", *METHODS])
def test_step(benchmark, name: str) -> None:
    x, target = images(BATCH)
    candidate = backprop(x, target) if name == "backprop" else METHODS[name].build(name, x, target)
    benchmark.group = f"DeepHebb B={BATCH} training step"
    benchmark.pedantic(candidate.run, setup=candidate.reset, rounds=ROUNDS, warmup_rounds=1)
