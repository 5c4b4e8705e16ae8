"""Where the sparse correlation stops paying: ``python -m bench.crossover`` from the repository root.

For each layer shape and fraction k/N of winners, both whole paths from u to A are timed in interleaved
rounds: the winners' lists and the sparse sum against dense k-WTA and the dense sum. The
crossover is where a line fitted to the cost ratio passes 1. It belongs in the table of
ghl_kernels/_dispatch.py, rounded down so that a wrong guess costs little.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

import numpy as np

from bench.correlation import Correlation, conv_correlation, linear_correlation
from bench.interleave import Candidate, interleave, pinned_threads
from bench.parity import assert_close
from bench.shapes import DEEPHEBB, ConvShape
from ghl_kernels.demo.arguments import positive, thread_count

FRACTIONS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)
CONVOLUTIONS = (
    *DEEPHEBB,
    ConvShape(32, 64, 64, 32, 3),
    ConvShape(16, 64, 256, 16, 5),
    ConvShape(32, 256, 256, 8, 3),
    ConvShape(32, 256, 256, 16, 1),
)
LINEAR = ((512, 1024, 1024), (2048, 2304, 4096), (64, 4096, 4096))


def crossover(fractions: Sequence[float], costs: Sequence[float]) -> float:
    """The fraction k/N at which the sparse path costs as much as the dense one.

    The sparse sum takes time in proportion to k beside a fixed part, the dense one does not depend on k: the
    cost ratio (sparse / dense) is fitted by a + b k/N, by least squares of the relative errors, so that small
    ratios count as much as large ones. The crossover is (1 - a) / b; 0 if the sparse path never wins, the
    last fraction if it wins up to there.
    """
    x, y = np.asarray(fractions), np.asarray(costs)
    (a, b), *_ = np.linalg.lstsq(np.stack([1.0 / y, x / y], axis=1), np.ones_like(y), rcond=None)
    most = fractions[-1]
    if a >= 1.0:
        return 0.0
    return float(min((1.0 - a) / b, most)) if b > 0.0 else most


def sparse_cost(case: Correlation, options: argparse.Namespace) -> float:
    """Time of the sparse path from u to A as a multiple of the dense path's."""
    expected = case.expected()
    assert_close("sparse", case.sparse(*case.winner_lists()), expected)
    assert_close("dense", case.dense(case.activities()), expected)
    timings = interleave(
        [
            Candidate("dense", lambda: case.dense(case.activities())),
            Candidate("sparse", lambda: case.sparse(*case.winner_lists())),
        ],
        rounds=options.rounds,
        threads=options.threads,
    )
    return timings["sparse"].cost.median


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    from rich.console import Console  # the rest is used where there may be no rich
    from rich.table import Table

    parser = argparse.ArgumentParser(prog="python -m bench.crossover", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=positive, default=9, help="timed rounds (default 9)")
    parser.add_argument("--threads", type=thread_count, default=2, help="torch threads (default 2)")
    options = parser.parse_args(arguments)
    builders: dict[str, Callable[[float], Correlation]] = {
        **{f"conv {shape}": lambda f, shape=shape: conv_correlation(shape, f) for shape in CONVOLUTIONS},
        **{
            f"linear P={p} {d}->{n}": lambda f, p=p, d=d, n=n: linear_correlation(p, d, n, f)
            for p, d, n in LINEAR
        },
    }
    out = Table(title=f"Sparse path / dense path, {options.threads} threads", title_justify="left")
    out.add_column("layer")
    for fraction in FRACTIONS:
        out.add_column(f"k/N {fraction:g}", justify="right")
    out.add_column("crossover", justify="right")
    with pinned_threads(options.threads):
        for name, build in builders.items():
            costs = [sparse_cost(build(fraction), options) for fraction in FRACTIONS]
            out.add_row(name, *(f"{cost:.2f}x" for cost in costs), f"{crossover(FRACTIONS, costs):.3f}")
    Console(width=None if sys.stdout.isatty() else 150).print(out)


if __name__ == "__main__":
    main()
