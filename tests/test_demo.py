"""The demo from end to end on few images, and the parts that its numbers rest on."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from idx_files import write_fashion_mnist

import ghl_kernels as ghl
from ghl_kernels.__main__ import main
from ghl_kernels.demo import checkout, command, cost, data, train
from ghl_kernels.demo.memory import peak_bytes
from ghl_kernels.demo.methods import PRESETS, Method, Settings
from ghl_kernels.demo.progress import Progress

pytestmark = pytest.mark.usefixtures("one_thread")

image = pytest.importorskip("matplotlib.image")

METHODS = ["backprop", "ghl-softmax", "ghl-kwta", "local", "frozen"]

LABELS = tuple(method.label for method in PRESETS["digits"].methods)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> data.Dataset:
    root = tmp_path_factory.mktemp("images")
    write_fashion_mnist(root, train=90, test=30)
    return data.load("fashion-mnist", root)


SETTINGS = dataclasses.replace(PRESETS["digits"], epochs=2, local_epochs=1, batch_size=20)


def method(key: str, settings: Settings = SETTINGS) -> Method:
    return next(method for method in settings.methods if method.key == key)


def test_demo_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    out = tmp_path / "new" / "folder"
    assert main(["demo", "--epochs", "1", "--seeds", "1", "--limit", "200", "--out", str(out)]) == 0
    printed = capsys.readouterr()
    rows = [line for line in printed.out.splitlines() if line.strip().startswith(LABELS)]
    assert [row.strip().startswith(label) for row, label in zip(rows, LABELS, strict=True)] == [True] * 5
    assert all(len(row.replace(method, "").split()) == 4 for row, method in zip(rows, LABELS, strict=True))
    assert printed.err.count("\n") == 5  # no terminal: a line per finished run

    results = json.loads((out / "demo-digits.json").read_text())
    assert list(results["methods"]) == METHODS
    assert results["seeds"] == [0]
    assert results["data"]["training_images"] == 200
    assert results["environment"]["versions"]["torch"] == torch.__version__
    assert results["environment"]["versions"]["ghl_kernels"] == ghl.__version__
    assert results["environment"].items() >= checkout.describe().items()
    for found in results["methods"].values():
        assert found["curves"]["0"] == [found["accuracy"]["mean"]]
        assert found["cost"]["peak_bytes"] > 0
    assert results["methods"]["backprop"]["cost"]["step_time_ratio"] == 1.0

    picture = image.imread(out / "demo-digits.png")
    assert picture.shape[0] > 300
    assert picture.std() > 0.05


def demo_in(folder: Path) -> int:
    """The demo on few small images, as short as it gets."""
    write_fashion_mnist(folder)
    options = ["--root", str(folder), "--epochs", "1", "--seeds", "1", "--threads", "1", "--out", str(folder)]
    return main(["demo", "--data", "fashion-mnist", *options])


def test_the_files_are_written_before_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ghl_kernels.demo import report

    def closed(results: report.Results) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(report, "print_table", closed)
    assert demo_in(tmp_path) == 0
    assert json.loads((tmp_path / "demo-fashion-mnist.json").read_text())["seeds"] == [0]
    assert (tmp_path / "demo-fashion-mnist.png").is_file()


def test_the_table_is_printed_where_a_file_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "demo-fashion-mnist.json").mkdir()
    assert demo_in(tmp_path) == 2
    printed = capsys.readouterr()
    assert all(label in printed.out for label in LABELS)
    assert printed.err.endswith(f"error: {tmp_path} cannot be written: Is a directory.\n")


@pytest.fixture
def commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Of a checkout at ``tmp_path`` with one file, which stands in for this one."""
    if not shutil.which("git"):
        pytest.skip("there is no git")
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(checkout, "ROOT", tmp_path.resolve())

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-c", "user.name=a", "-c", "user.email=a", *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()

    git("init")
    git("add", "file")
    git("commit", "-m", "a")
    return git("rev-parse", "HEAD")


def test_the_commit_of_a_checkout(tmp_path: Path, commit: str) -> None:
    (tmp_path / "new").write_text("")
    assert checkout.describe() == {"commit": commit, "uncommitted_changes": False}
    (tmp_path / "file").write_text("changed")
    assert checkout.describe() == {"commit": commit, "uncommitted_changes": True}


@pytest.mark.parametrize("case", ["within another checkout", "no checkout", "no git"])
def test_no_commit_where_the_package_has_none(
    case: str, tmp_path: Path, commit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if case == "within another checkout":
        (tmp_path / "site-packages").mkdir()
        monkeypatch.setattr(checkout, "ROOT", checkout.ROOT / "site-packages")
    elif case == "no checkout":
        shutil.rmtree(tmp_path / ".git")
    else:
        monkeypatch.setenv("PATH", "")
    assert checkout.describe() == {"commit": None, "uncommitted_changes": None}


def test_options_reach_the_settings(tmp_path: Path) -> None:
    write_fashion_mnist(tmp_path)
    options = ["--epochs", "1", "--seeds", "2", "--batch-size", "8", "--threads", "1", "--validation"]
    options += [
        "--lr",
        "backprop=0.5",
        "--lr",
        "read-out=0.25",
        "--root",
        str(tmp_path),
        "--out",
        str(tmp_path),
    ]
    assert main(["demo", "--data", "fashion-mnist", *options]) == 0
    results = json.loads((tmp_path / "demo-fashion-mnist.json").read_text())
    assert results["seeds"] == [0, 1]
    assert results["settings"]["epochs"] == 1
    assert results["settings"]["batch_size"] == 8
    assert results["settings"]["learning_rates"]["backprop"] == 0.5
    assert results["settings"]["learning_rates"]["read-out"] == 0.25
    assert results["environment"]["threads"] == 1
    assert results["data"]["validation"] is True
    assert results["data"]["training_images"] == 30
    accuracy = results["methods"]["frozen"]["accuracy"]
    assert accuracy["lowest"] <= accuracy["mean"] <= accuracy["highest"]


def test_the_number_of_threads_is_put_back() -> None:
    with command._threads(2):
        assert torch.get_num_threads() == 2
    assert torch.get_num_threads() == 1
    with command._threads(None):
        assert torch.get_num_threads() == 1


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    shown = Terminal()
    with Progress(total=2, stream=shown) as progress:
        progress.describe("backprop, seed 0")
        progress.advance()
        progress.note("backprop, seed 0: 97.0 %")
    assert "backprop, seed 0" in shown.getvalue()
    assert "50%" in shown.getvalue()
    assert "97.0 %" not in shown.getvalue()


def test_progress_elsewhere_is_a_line_per_note() -> None:
    shown = io.StringIO()
    with Progress(total=2, stream=shown) as progress:
        progress.describe("backprop, seed 0")
        progress.advance()
        progress.note("backprop, seed 0: 97.0 %")
    assert shown.getvalue() == "backprop, seed 0: 97.0 %\n"


@pytest.mark.parametrize("key", METHODS)
def test_a_seed_repeats_bit_for_bit(key: str, images: data.Dataset) -> None:
    runs = [train.train(method(key), SETTINGS, images, 3, lambda: None) for _ in range(2)]
    torch.manual_seed(99)  # nothing depends on torch's own generator
    runs.append(train.train(method(key), SETTINGS, images, 3, lambda: None))
    assert runs[0].accuracy == runs[1].accuracy == runs[2].accuracy
    assert torch.equal(runs[0].filters_after, runs[1].filters_after)
    assert torch.equal(runs[0].filters_after, runs[2].filters_after)


def test_methods_share_the_initial_weights_and_end_apart(images: data.Dataset) -> None:
    runs = {key: train.train(method(key), SETTINGS, images, 0, lambda: None) for key in METHODS}
    other = train.train(method("frozen"), SETTINGS, images, 1, lambda: None)
    before = runs["backprop"].filters_before
    assert all(torch.equal(run.filters_before, before) for run in runs.values())
    assert not torch.equal(other.filters_before, before)
    assert torch.equal(runs["frozen"].filters_after, before)
    learned = [runs[key].filters_after for key in METHODS if key != "frozen"]
    for i, filters in enumerate(learned):
        assert not torch.equal(filters, before)
        assert not any(torch.equal(filters, others) for others in learned[:i])


def test_training_reports_every_pass(images: data.Dataset) -> None:
    for key in METHODS:
        passes = []
        run = train.train(method(key), SETTINGS, images, 0, lambda passes=passes: passes.append(1))
        assert len(passes) == train.passes(method(key), SETTINGS)
        assert len(run.accuracy) == SETTINGS.epochs


def test_only_the_convolutions_are_converted() -> None:
    learner = train.Learner(method("ghl-kwta"), SETTINGS, classes=10, seed=0)
    converted = [
        type(module).__name__ for module in learner.model.modules() if isinstance(module, ghl.nn.GHLLayer)
    ]
    assert converted == ["GHLConv2d", "GHLConv2d"]
    assert type(learner.model.read_out) is torch.nn.Linear


def test_a_local_step_leaves_the_read_out_and_needs_no_gradient(images: data.Dataset) -> None:
    learner = train.Learner(method("local"), SETTINGS, classes=10, seed=0)
    before = {name: value.clone() for name, value in learner.model.named_parameters()}
    learner.step(images.train_images[:20], images.train_labels[:20])
    changed = {
        name for name, value in learner.model.named_parameters() if not torch.equal(value, before[name])
    }
    assert changed == {"features.0.weight", "features.4.weight"}
    assert all(parameter.grad is None for parameter in learner.model.parameters())


def test_accuracy_is_a_percentage_of_the_images(images: data.Dataset) -> None:
    learner = train.Learner(method("frozen"), SETTINGS, classes=10, seed=0)
    learner.model.eval()
    guessed = learner.model(images.test_images).argmax(1)
    labels = guessed.clone()
    labels[:12] = (labels[:12] + 1) % 10
    assert learner.accuracy(images.test_images, labels) == pytest.approx(60.0)
    assert learner.model.training


def test_peak_bytes_of_known_allocations() -> None:
    kept = []

    def step() -> None:
        first = torch.empty(1000)
        second = torch.empty(500)
        del first
        kept.append(torch.empty(100))
        del second

    assert peak_bytes(step) == 4 * 1500
    assert peak_bytes(lambda: None) == 0


def test_peak_bytes_counts_the_gradients_of_a_step() -> None:
    layer = torch.nn.Linear(300, 200, bias=False)
    x = torch.ones(1, 300)
    assert peak_bytes(lambda: layer(x).sum().backward()) >= 4 * 300 * 200
    layer.zero_grad()
    with torch.no_grad():
        assert peak_bytes(lambda: layer(x)) < 4 * 300 * 200


def test_costs_are_of_one_step(images: data.Dataset) -> None:
    rounds = []
    costs = cost.measure(SETTINGS, images, lambda: rounds.append(1))
    assert len(rounds) == cost.measured_rounds()
    assert list(costs) == METHODS
    assert costs["backprop"].step_time_ratio == 1.0
    for found in costs.values():
        assert found.images_per_second == pytest.approx(SETTINGS.batch_size / found.step_seconds)
    # a frozen step holds no activations for a backward pass
    assert costs["frozen"].peak_bytes < costs["backprop"].peak_bytes


def test_a_batch_larger_than_the_data_is_the_data(images: data.Dataset) -> None:
    settings = dataclasses.replace(SETTINGS, batch_size=1000)
    found = cost.measure(settings, images, lambda: None)["backprop"]
    assert found.images_per_second == pytest.approx(90 / found.step_seconds)


@pytest.mark.parametrize("preset", PRESETS.values(), ids=list(PRESETS))
def test_presets_are_complete(preset: Settings) -> None:
    assert [method.key for method in preset.methods] == METHODS
    assert set(preset.learning_rates) == {*METHODS, "read-out"} - {"frozen"}
    assert np.all(np.array(list(preset.learning_rates.values())) > 0)
