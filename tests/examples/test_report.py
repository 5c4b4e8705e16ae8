"""examples.report: the bars are judged from the results, and the text says nothing that they do not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from examples import bars, report
from examples.methods import METHODS
from ghl_kernels import environment
from ghl_kernels.demo.errors import UserError

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
    """The report of these runs and of what is in ``folder / "docs" / "results" / "steps"``."""
    for key, by_seed in results(accuracies).items():
        for seed, found in by_seed.items():
            path = folder / "runs" / f"{key}-{seed}" / "result.json"
            path.parent.mkdir(parents=True)
            path.write_text(json.dumps(found))
    return report.write(folder / "runs", folder / "docs").read_text()


def test_the_report_judges_and_compares_the_scales(tmp_path: Path) -> None:
    text = write(tmp_path, PASSING | {"ghl-softmax-layer": (88.0, 89.0)})
    assert "| GHL softmax | PASS (-0.75) | PASS (+2.25 over frozen) |" in text
    assert "The former ends 1.25 points above the latter." in text
    assert "Large networks" not in text
    assert text.count("Made on") == 1


def test_the_report_is_silent_on_what_has_not_run(tmp_path: Path) -> None:
    text = write(tmp_path, {key: PASSING[key] for key in ("backprop", "frozen")})
    assert "scale per filter" not in text
    assert f"{2 * 2} of {2 * len(METHODS)} runs are in" in text


def test_the_report_says_what_of_softhebb_has_not_run(tmp_path: Path) -> None:
    assert "ends 7.50 points below filters that never moved." in write(tmp_path / "a", PASSING)
    assert "Triangle" not in write(tmp_path / "b", {key: PASSING[key] for key in ("backprop", "frozen")})


def test_the_command_is_that_of_the_runs(tmp_path: Path) -> None:
    command = "python -m examples.fashion_mnist --seeds 0 1 --epochs 1 --local-epochs 1 --batch-size 8"
    threads = environment.collect()["threads"]
    assert f"\n{command} --threads {threads}\n" in write(tmp_path, {"backprop": (90.0, 91.0)})
    path = tmp_path / "runs" / "backprop-1" / "result.json"
    found = json.loads(path.read_text())
    found["environment"]["threads"] = threads + 1
    path.write_text(json.dumps(found))
    assert f"\n{command}\n" in report.write(tmp_path / "runs", tmp_path / "docs").read_text()


def test_the_report_repeats_from_what_it_kept(tmp_path: Path) -> None:
    kept = tmp_path / "docs" / "results" / "fashion-mnist.json"
    text, content = write(tmp_path, PASSING), kept.read_bytes()
    assert report.write(kept, tmp_path / "docs").read_text() == text
    assert kept.read_bytes() == content
    kept.write_text("[1]")
    with pytest.raises(UserError, match=r"^\S+ is not the fashion-mnist\.json that a report left\.$"):
        report.write(kept, tmp_path / "docs")


@pytest.mark.parametrize("content", ["", '{"settings": {"met', "[]", '{"settings": {}}'])
def test_a_damaged_result_is_one_line(tmp_path: Path, content: str) -> None:
    write(tmp_path, {"backprop": (90.0, 91.0)})
    path = tmp_path / "runs" / "backprop-1" / "result.json"
    path.write_text(content)
    with pytest.raises(UserError) as caught:
        report.read(tmp_path / "runs")
    assert str(caught.value) == (
        f"{path} is damaged, or no result of examples.fashion_mnist; delete it to run that anew."
    )


def test_a_result_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "backprop-1" / "result.json").mkdir(parents=True)
    with pytest.raises(UserError, match=r"^\S+result\.json cannot be read: Is a directory\.$"):
        report.read(tmp_path)


def test_runs_on_other_images_make_no_table(tmp_path: Path) -> None:
    found = results({"backprop": (90.0, 91.0)})
    found["backprop"][0]["settings"]["train"] = 64 * "0"
    found["backprop"][1]["settings"]["train"] = 64 * "1"
    kept = tmp_path / "kept.json"
    kept.write_text(json.dumps(found))
    with pytest.raises(UserError, match=r'differ in train \("0{12}", "1{12}"\)'):
        report.write(kept, tmp_path / "docs")


def test_the_report_says_which_code_ran() -> None:
    made = {"machine": {"cpu": "A"}, "versions": {"torch": "2", "ghl_kernels": "1"}, "threads": 3}
    commit = {"commit": "0123456789abcdef", "uncommitted_changes": False}
    for more, sentence in (
        ({}, "Made on A, threads: 3, torch 2, ghl_kernels 1."),
        (commit, "Made on A, threads: 3, torch 2, commit 0123456789ab."),
        (
            commit | {"uncommitted_changes": True},
            "Made on A, threads: 3, torch 2, commit 0123456789ab with uncommitted changes.",
        ),
        ({"gpu": {"name": "G"}}, "Made on G, threads: 3, torch 2, ghl_kernels 1."),
        (
            {"machine": {"cpu": "A", "cpu_model": "family 1"}},
            "Made on A (family 1), threads: 3, torch 2, ghl_kernels 1.",
        ),
    ):
        assert report._machine(made | more) == sentence


STEPS = {
    "ghl": {"losses": [3.0, 2.5], "peak_bytes": 3 << 20, "seconds": [9.0, 2.0, 4.0]},
    "kwta": {"losses": [3.0, 2.7], "peak_bytes": 4 << 20, "seconds": [9.0, 6.0]},
    "backprop": {"losses": [3.0, 2.0], "peak_bytes": 2 << 20, "seconds": [9.0, 1.0, 3.0]},
}


def write_steps(
    folder: Path, name: str, method: str, backprop: dict[str, Any] | None = None, **changes: Any
) -> None:
    """A result of imagenet's --steps, for the report in ``folder / "docs"``."""
    settings = {"model": "resnet50", "batch_size": 8, "size": 224, "amp": False, "lr": 0.003}
    settings |= {"synthetic": True, "method": method, "k": 8, "temperature": 1.0} | changes
    methods = {method: STEPS[method], "backprop": STEPS["backprop"] | (backprop or {})}
    content = {"command": f"python {name}", "settings": settings, "methods": methods}
    path = folder / "docs" / "results" / "steps" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content | {"environment": environment.collect()}))


def step_rows(text: str) -> list[str]:
    """The lines of the table of steps, without network and images where these are the usual ones."""
    start = "| resnet50 | 8 of 224 x 224, synthetic, float32, learning rate 0.003 "
    return [line.removeprefix(start) for line in text.splitlines() if line.startswith("| resnet50")]


def test_backprop_has_one_row_for_runs_that_agree(tmp_path: Path) -> None:
    write_steps(tmp_path, "a", "ghl")
    write_steps(tmp_path, "b", "kwta", {"seconds": [9.0, 4.0]}, k=3, temperature=2.0)
    text = write(tmp_path, {"backprop": (90.0,)})
    assert step_rows(text) == [
        "| ghl | 3.000 to 2.500 (2) | 3 | 1.500 | 3.00 | 1.50 |",
        "| kwta | 3.000 to 2.700 (2) | 4 | 2.000 | 6.00 | 1.50 |",
        "| backprop | 3.000 to 2.000 (2) | 2 | 1.000 | 2.00, 4.00 | 1.00 |",
    ]
    results = tmp_path / "docs" / "results"
    assert f"```\npython a --out {results}\npython b --out {results}\n```" in text.replace(" \\\n    ", " ")


@pytest.mark.parametrize(
    ("backprop", "changes"),
    [({}, {"lr": 0.1}), ({}, {"seed": 1}), ({"losses": [3.0, 2.1]}, {}), ({"peak_bytes": 1}, {})],
)
def test_backprop_has_a_row_of_each_run_that_differs(
    tmp_path: Path, backprop: dict[str, Any], changes: dict[str, Any]
) -> None:
    write_steps(tmp_path, "a", "ghl")
    write_steps(tmp_path, "b", "kwta", backprop, **changes)
    rows = step_rows(write(tmp_path, {"backprop": (90.0,)}))
    found = [method for row in rows for method in STEPS if f"| {method} |" in row]
    assert found == ["ghl", "backprop", "kwta", "backprop"]


def test_steps_of_real_images_that_were_not_timed(tmp_path: Path) -> None:
    write_steps(tmp_path, "a", "ghl", {"seconds": []}, synthetic=False)
    start = "| resnet50 | 8 of 224 x 224, float32, learning rate 0.003 |"
    assert step_rows(write(tmp_path, {"backprop": (90.0,)})) == [
        f"{start} ghl | 3.000 to 2.500 (2) | 3 | 1.500 | not timed |  |",
        f"{start} backprop | 3.000 to 2.000 (2) | 2 | 1.000 | not timed |  |",
    ]


@pytest.mark.parametrize("content", ["damaged", "[]", '{"settings": {}, "methods": {}, "environment": {}}'])
def test_a_file_among_the_steps_that_is_no_result_is_one_line(tmp_path: Path, content: str) -> None:
    write_steps(tmp_path, "a", "ghl")
    (tmp_path / "docs" / "results" / "steps" / "b.json").write_text(content)
    with pytest.raises(UserError, match=r"^\S+b\.json is no result of examples\.imagenet --steps; .*\.$"):
        write(tmp_path, {"backprop": (90.0,)})
