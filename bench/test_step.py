"""Training steps and local passes of DeepHebb at B = 8; the suites "step" and "local" interleave them."""

from __future__ import annotations

import pytest

from bench.steps import METHODS, NETWORKS, Workload

BATCH = 8
ROUNDS = 5


@pytest.fixture(scope="module")
def workload() -> Workload:
    return Workload(NETWORKS["DeepHebb"], BATCH)


@pytest.mark.parametrize("name", METHODS)
def test_step(benchmark, workload: Workload, name: str) -> None:
    trainee = workload.prepare(METHODS[name])
    workload.check(trainee)
    benchmark.group = f"DeepHebb B={BATCH} training step"
    benchmark.pedantic(trainee.candidate.run, setup=trainee.candidate.reset, rounds=ROUNDS, warmup_rounds=1)
