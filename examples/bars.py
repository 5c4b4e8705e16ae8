"""What the Fashion-MNIST table is held to, judged from its results."""

from __future__ import annotations

import statistics
from typing import Any

from examples.methods import METHODS

Results = dict[str, dict[int, dict[str, Any]]]  # by method and seed

POINTS = 1.0  # how far below backprop GHL may end
LOCAL_RULES = ("softhebb", "swta-fh", "hpca-fh", "frozen")
JUDGED = tuple(key for key in METHODS if key.startswith("ghl"))


def table(runs: Results) -> list[str]:
    """A line of Markdown for each GHL method that has run, below the headings."""
    lines = [
        f"| method | at most {POINTS} point below backprop | above every local rule |",
        "| --- | --- | --- |",
    ]
    for key in JUDGED:
        if key in runs:
            lines.append(f"| {METHODS[key].label} | {_near(runs, key)} | {_above(runs, key)} |")
    return lines


def gap(runs: Results, method: str, other: str) -> float | None:
    """Mean difference of the accuracies after the last epoch over the seeds of both; None without any."""
    both = runs.get(method, {}).keys() & runs.get(other, {}).keys()
    if not both:
        return None
    mean = statistics.fmean(_final(runs[method][seed]) - _final(runs[other][seed]) for seed in sorted(both))
    return round(mean, 9)  # accuracies are hundredths, and a bar that is met exactly is met


def _final(run: dict[str, Any]) -> float:
    accuracy: float = run["rows"][-1]["accuracy"]
    return accuracy


def _near(runs: Results, key: str) -> str:
    found = gap(runs, key, "backprop")
    if found is None:
        return "open: backprop has not run"
    return f"{'PASS' if found >= -POINTS else 'FAIL'} ({found:+.2f})"


def _above(runs: Results, key: str) -> str:
    """FAIL as soon as one rule is not below, PASS when all have run."""
    gaps = {other: gap(runs, key, other) for other in LOCAL_RULES}
    known = {other: found for other, found in gaps.items() if found is not None}
    if not known:
        return "open: none has run"
    best = min(known, key=lambda other: known[other])
    text = f"{known[best]:+.2f} over {METHODS[best].label}"
    if known[best] <= 0.0:
        return f"FAIL ({text})"
    missing = [METHODS[other].label for other in LOCAL_RULES if other not in known]
    return f"open ({text}; not run: {'; '.join(missing)})" if missing else f"PASS ({text})"
