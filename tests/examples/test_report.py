"""examples.report: the bars are judged from the results, and the text says nothing that they do not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from examples import bars, report
from examples.methods import METHODS
from ghl_kernels import environment

PASSING = {
    "backprop": (90.0, 91.0),
    "ghl-softmax": (89.5, 90.0),
    "ghl-kwta-4": (88.0, 91.1),
    "softhebb": (80.0, 80.0),
    "swta-fh": (84.0, 84.0),
    "hpca-fh": (85.0, 86.0),
    "frozen": (87.0, 88.0),
}


def results(accuracies: dict[str, tuple[float, ...]]) -> bars.Results:
    """Runs that ended at these accuracies, by seed."""
    return {
        key: {seed: run(key, seed, accuracy) for seed, accuracy in enumerate(by_seed)}
        for key, by_seed in accuracies.items()
    }


def run(key: str, seed: int, accuracy: float) -> dict[str, Any]:
    settings = {
        "method": key,
        "lr": 0.01,
        "momentum": 0.0,
        "read_out_lr": 0.001,
        "seed": seed,
        "epochs": 1,
        "local_epochs": 1,
        "batch_size": 8,
        "widths": [1, 2, 3],
        "data": "fashion-mnist",
        "training_images": 60000,
        "test_images": 10000,
    }
    rows = [{"epoch": 1, "loss": 0.5, "accuracy": accuracy}]
    return {"settings": settings, "rows": rows, "environment": environment.collect()}


def judged(accuracies: dict[str, tuple[float, ...]]) -> dict[str, tuple[str, str]]:
    """The two verdicts by label."""
    lines = (line.strip("| ").split(" | ") for line in bars.table(results(accuracies))[2:])
    return {label: (near, above) for label, near, above in lines}


def test_bars_that_hold() -> None:
    assert judged(PASSING) == {
        "GHL softmax": ("PASS (-0.75)", "PASS (+2.25 over frozen)"),
        "GHL k-WTA, k = 4": ("PASS (-0.95)", "PASS (+2.05 over frozen)"),
    }


@pytest.mark.parametrize(
    ("change", "near", "above"),
    [
        ({"ghl-softmax": (89.4, 89.5)}, "FAIL (-1.05)", "PASS (+1.95 over frozen)"),
        ({"ghl-softmax": (89.2, 89.8)}, "PASS (-1.00)", "PASS (+2.00 over frozen)"),
        ({"swta-fh": (95.0, 85.0)}, "PASS (-0.75)", "FAIL (-0.25 over SWTA-FH, local)"),
        ({"frozen": ()}, "PASS (-0.75)", "open (+4.25 over HPCA-FH, local; not run: frozen)"),
        ({"frozen": (), "softhebb": (99.0,)}, "PASS (-0.75)", "FAIL (-9.50 over SoftHebb, local)"),
        ({"backprop": ()}, "open: backprop has not run", "PASS (+2.25 over frozen)"),
        # the first seed alone has run: the second is left out of backprop's mean, too
        ({"ghl-softmax": (89.5,)}, "PASS (-0.50)", "PASS (+2.50 over frozen)"),
    ],
)
def test_bars_that_do_not_hold_or_are_open(
    change: dict[str, tuple[float, ...]], near: str, above: str
) -> None:
    assert judged(PASSING | change)["GHL softmax"] == (near, above)


def write(folder: Path, accuracies: dict[str, tuple[float, ...]]) -> str:
    """The report of these runs and of what is in ``folder / "steps"``."""
    for key, by_seed in results(accuracies).items():
        for seed, found in by_seed.items():
            path = folder / "runs" / f"{key}-{seed}" / "result.json"
            path.parent.mkdir(parents=True)
            path.write_text(json.dumps(found))
    return report.write(folder / "runs", folder / "docs", folder / "steps").read_text()


def test_the_report_judges_and_compares_the_scales(tmp_path: Path) -> None:
    text = write(tmp_path, PASSING | {"ghl-softmax-layer": (88.0, 89.0)})
    assert "| GHL softmax | PASS (-0.75) | PASS (+2.25 over frozen) |" in text
    assert "The former ends +1.25 points from the latter." in text
    assert "Large networks" not in text
    assert text.count("Made on") == 1


def test_the_report_is_silent_on_what_has_not_run(tmp_path: Path) -> None:
    text = write(tmp_path, {key: PASSING[key] for key in ("backprop", "frozen")})
    assert "scale per filter" not in text
    assert f"{2 * 2} of {2 * len(METHODS)} runs are in" in text


def test_the_table_of_steps_has_ratios_and_seconds_where_they_were_taken(tmp_path: Path) -> None:
    settings = {"model": "resnet50", "batch_size": 8, "size": 224, "amp": False, "lr": 0.003}
    timed = {
        "ghl": {"losses": [3.0, 2.5], "peak_bytes": 3 << 20, "seconds": [9.0, 2.0, 4.0]},
        "backprop": {"losses": [3.0, 2.0], "peak_bytes": 2 << 20, "seconds": [9.0, 1.0, 3.0]},
    }
    untimed = {method: {**found, "seconds": []} for method, found in timed.items()}
    (tmp_path / "steps").mkdir()
    for name, methods in (("a", timed), ("b", untimed)):
        content = {"settings": settings, "methods": methods, "environment": environment.collect()}
        (tmp_path / "steps" / f"{name}.json").write_text(json.dumps(content))
    text = write(tmp_path, {"backprop": (90.0,)})
    start = "| resnet50 | 8 of 224 x 224, float32, learning rate 0.003 |"
    assert f"{start} ghl | 3.000 to 2.500 (2) | 3 | 1.500 | 3.00 | 1.50 |" in text
    assert f"{start} backprop | 3.000 to 2.000 (2) | 2 | 1.000 | 2.00 | 1.00 |" in text
    assert f"{start} ghl | 3.000 to 2.500 (2) | 3 | 1.500 | not timed |  |" in text
