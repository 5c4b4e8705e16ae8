"""The correlation A of k winners: from the winners alone, against the library's dense weight gradient.

Where the first passes the second as k/N grows is the crossover (bench/crossover.py).
"""

from __future__ import annotations

import pytest
import torch

import ghl_kernels as ghl
from bench.correlation import Correlation, conv_correlation, linear_correlation
from bench.parity import assert_close
from bench.shapes import DEEPHEBB

FRACTIONS = (0.005, 0.02, 0.1, 0.3)
LINEAR = ((2048, 2304, 4096), (512, 1024, 1024))
CASES = {
    **{
        f"conv-{shape}": lambda fraction, shape=shape: conv_correlation(shape, fraction) for shape in DEEPHEBB
    },
    **{
        f"linear-P{positions}-{features}to{units}": (
            lambda fraction, sizes=(positions, features, units): linear_correlation(*sizes, fraction)
        )
        for positions, features, units in LINEAR
    },
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest, fraction: float) -> Correlation:
    return CASES[request.param](fraction)


@pytest.mark.parametrize("fraction", FRACTIONS, ids=lambda f: f"k{f:g}N")
class TestCorrelate:
    def test_sparse(self, benchmark, backend: str, case: Correlation, fraction: float) -> None:
        unit, activity = case.winner_lists()
        assert_close("sparse", case.sparse(unit, activity), case.expected())
        benchmark.group = f"A {case.name} k/N={fraction}"
        benchmark(case.sparse, unit, activity)

    def test_library_dense(self, benchmark, case: Correlation, fraction: float) -> None:
        y = case.activities()
        assert_close("dense", case.dense(y), case.expected())
        benchmark.group = f"A {case.name} k/N={fraction}"
        benchmark(case.dense, y)


@pytest.mark.parametrize("fraction", [0.02], ids=lambda f: f"k{f:g}N")
def test_winner_lists(benchmark, backend: str, case: Correlation, fraction: float) -> None:
    unit, activity = case.winner_lists()
    y = torch.zeros(unit.shape[0], case.units).scatter_(1, unit.long(), activity)
    expected = ghl.reference.compete(case.u, case.rule, case.dim).movedim(case.dim, -1).reshape(y.shape)
    assert torch.equal(y, expected)
    benchmark.group = f"winners {case.name} k/N={fraction}"
    benchmark(case.winner_lists)
