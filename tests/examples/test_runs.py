"""The training loop and its commands: resuming bit for bit, and what each command leaves."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from idx_files import write_fashion_mnist
from image_folders import write_image_folder
from small_runs import IMAGES, network, run_in

import ghl_kernels as ghl
from examples import cifar, data, fashion_mnist, imagenet, steps
from examples.batches import Batch
from examples.learner import Learner
from examples.methods import METHODS, make_learner
from examples.models import DeepHebb
from examples.training import Training, cosine
from ghl_kernels.demo.errors import UserError


def gradient_learner(gate_at: str) -> Learner:
    model = ghl.convert(network(), gate_at=gate_at)
    return Learner(model, [torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)])


LEARNERS = {
    "backward": lambda: gradient_learner("backward"),
    "step": lambda: gradient_learner("step"),
    "local": lambda: make_learner(METHODS["softhebb"], network(), 1),
    "swta": lambda: make_learner(METHODS["swta-fh"], network(), 1),
}


@pytest.mark.parametrize("name", LEARNERS)
@pytest.mark.parametrize("stops", [[3], [5], [2, 6]])
def test_a_resumed_run_has_the_same_bits(tmp_path: Path, name: str, stops: list[int]) -> None:
    """Stopped in the middle and at the end of an epoch of five steps."""
    whole = Training(learner := LEARNERS[name](), run_in(tmp_path / "whole"))
    rows = whole.fit()
    for stop in stops:
        stopped = Training(LEARNERS[name](), run_in(tmp_path / "stopped"))
        stopped.fit(stop_after=stop)
        stopped.save()
    resumed = Training(again := LEARNERS[name](), run_in(tmp_path / "stopped"))
    assert resumed.step == sum(stops)
    assert resumed.fit() == rows
    assert len(rows) == 2
    for key, value in learner.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[key]), key
    logs = [(tmp_path / folder / "log.csv").read_bytes() for folder in ("whole", "stopped")]
    assert logs[0] == logs[1]


@pytest.mark.parametrize("every", [1, 5])
def test_a_run_killed_while_testing_loses_no_row(tmp_path: Path, every: int) -> None:
    """A checkpoint is due at the last of an epoch's five steps, before the epoch's row is there."""
    rows = Training(LEARNERS["backward"](), run_in(tmp_path / "whole")).fit()

    def killed() -> Iterator[Batch]:
        raise KeyboardInterrupt

    run = run_in(tmp_path / "killed", checkpoint_every=every)
    with pytest.raises(KeyboardInterrupt) as stopped:
        Training(LEARNERS["backward"](), dataclasses.replace(run, test=killed)).fit()
    checkpoint = tmp_path / "killed" / "checkpoint.pt"
    assert str(stopped.value) == (f"the same command goes on from {checkpoint}" if every == 1 else "")
    assert Training(LEARNERS["backward"](), run).fit() == rows


@pytest.mark.parametrize("key", METHODS)
def test_methods_train_what_they_say(key: str) -> None:
    model = DeepHebb((4, 6, 8), size=8, classes=4)
    learner = make_learner(METHODS[key], model, 1)
    before = {name: p.clone() for name, p in model.named_parameters()}
    x, y = IMAGES.train.pixels[:16].float() / 255, IMAGES.train.labels[:16]
    moved = []
    if learner.local_epochs:
        learner.local_step(x, 1.0)
        moved.append({name for name, p in model.named_parameters() if not torch.equal(p, before[name])})
        before = {name: p.clone() for name, p in model.named_parameters()}
    assert math.isfinite(learner.step(x, y, 1.0))
    moved.append({name for name, p in model.named_parameters() if not torch.equal(p, before[name])})
    filters = {f"stages.{i}.1.weight" for i in range(3)}
    read_out = {"classifier.weight", "classifier.bias"}
    how = METHODS[key].how
    expected = {"gradient": [filters | read_out], "frozen": [read_out]}.get(how, [filters, read_out])
    assert moved == expected


def test_channels_last_and_amp_train(tmp_path: Path) -> None:
    model = ghl.convert(network()).to(memory_format=torch.channels_last)
    learner = Learner(model, [torch.optim.SGD(model.parameters(), 0.01)], amp=True)
    rows = Training(learner, run_in(tmp_path, channels_last=True)).fit()
    assert rows[1]["loss"] < rows[0]["loss"]


def test_cosine() -> None:
    assert [cosine(step, 8) for step in (0, 4, 8)] == pytest.approx([1.0, 0.5, 0.0])
    assert [cosine(step, 6, 2) for step in (0, 1, 2)] == pytest.approx([1 / 3, 2 / 3, 1.0])


def test_other_settings_and_divergence_are_refused(tmp_path: Path) -> None:
    Training(LEARNERS["backward"](), run_in(tmp_path)).fit(stop_after=1)
    training = Training(LEARNERS["backward"](), run_in(tmp_path))
    training.save()
    with pytest.raises(UserError, match=r"a=1 \(now 2\)"):
        Training(LEARNERS["backward"](), run_in(tmp_path, settings={"a": 2}))
    model = network()
    diverging = Learner(model, [torch.optim.SGD(model.parameters(), float("inf"))])
    with pytest.raises(UserError, match="lower the learning rate"):
        Training(diverging, run_in(tmp_path / "new")).fit()


@pytest.mark.parametrize("damage", ["empty", "garbage", "truncated", "code", "other"])
def test_a_damaged_checkpoint_is_one_line(tmp_path: Path, damage: str) -> None:
    training = Training(LEARNERS["backward"](), run_in(tmp_path))
    training.save()
    path = tmp_path / "checkpoint.pt"
    if damage in ("code", "other"):
        torch.save({"state": Training if damage == "code" else 1}, path)
    else:
        content = {"empty": b"", "garbage": b"damaged", "truncated": path.read_bytes()[:-100]}
        path.write_bytes(content[damage])
    with pytest.raises(UserError) as caught:
        Training(LEARNERS["backward"](), run_in(tmp_path))
    assert str(caught.value) == (
        f"{path} is damaged, or no checkpoint of these examples; "
        "give another --out, or delete it to start anew."
    )


def test_a_checkpoint_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "checkpoint.pt").mkdir()
    with pytest.raises(UserError, match=r"^\S+checkpoint\.pt cannot be read: Is a directory\.$"):
        Training(LEARNERS["backward"](), run_in(tmp_path))


def assert_refused(
    main: Callable[[list[str]], int],
    command: list[str],
    complaint: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The command ends with exit code 2 and one line that matches."""
    capsys.readouterr()
    assert main(command) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(rf"error: {complaint}\n", err), err


def test_a_folder_that_cannot_be_used_is_said_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UserError, match=f"{file} is a file"):
        Training(LEARNERS["backward"](), run_in(file / "run"))
    command = ["--synthetic", "--model", "resnet20", "--size", "16", "--classes", "4", "--images", "8"]
    command += ["--batch-size", "8", "--no-amp", "--steps", "2", "--out", str(file)]
    complaint = rf"The folder .* {file} is a file\."
    assert_refused(imagenet.main, command, complaint, capsys)
    report = ["--report", "--out", str(tmp_path), "--docs", str(file)]
    result = {"settings": {"method": "backprop", "seed": 0}, "rows": [], "environment": {}}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "result.json").write_text(json.dumps(result))
    assert_refused(fashion_mnist.main, report, complaint, capsys)


def test_fashion_mnist_in_pieces_and_its_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images, out, docs = tmp_path / "images", tmp_path / "out", tmp_path / "docs"
    images.mkdir()
    write_fashion_mnist(images, train=64, test=20)
    command = ["--root", str(images), "--out", str(out), "--epochs", "1", "--batch-size", "32"]
    for piece in (["--only", "backprop", "--seeds", "0", "1"], ["--only", "frozen", "--seeds", "0"]):
        fashion_mnist.main([*command, *piece])
    result = out / "backprop-seed1" / "result.json"
    written = result.stat().st_mtime_ns
    fashion_mnist.main([*command, "--only", "backprop", "--seeds", "1"])
    assert result.stat().st_mtime_ns == written
    assert not (out / "backprop-seed1" / "checkpoint.pt").exists()
    fashion_mnist.main(["--report", "--out", str(out), "--docs", str(docs)])
    text = (docs / "results.md").read_text()
    runs = [json.loads((out / f"backprop-seed{i}" / "result.json").read_text()) for i in range(2)]
    assert all("commit" in run["environment"] for run in runs)
    mean = sum(run["rows"][-1]["accuracy"] for run in runs) / 2
    assert f"| backprop | {mean:.2f} (" in text
    assert f"3 of {2 * len(METHODS)} runs are in" in text
    assert (docs / "results" / "fashion-mnist.png").read_bytes().startswith(b"\x89PNG")
    other = [*command, "--only", "frozen", "--seeds", "0", "--epochs", "2"]
    assert_refused(fashion_mnist.main, other, ".* other settings; .*", capsys)
    empty = ["--report", "--out", str(tmp_path / "empty"), "--docs", str(docs)]
    assert_refused(fashion_mnist.main, empty, ".* no finished run; .*", capsys)


@pytest.fixture
def short_run(tmp_path: Path) -> list[str]:
    """A run of fashion_mnist on few images in ``tmp_path / "images"``."""
    (tmp_path / "images").mkdir()
    write_fashion_mnist(tmp_path / "images", train=16, test=8)
    command = ["--root", str(tmp_path / "images"), "--out", str(tmp_path / "out"), "--epochs", "1"]
    return [*command, "--batch-size", "16", "--only", "frozen", "--seeds", "0"]


@pytest.mark.parametrize("part", ["train", "t10k"])
def test_fashion_mnist_takes_no_result_of_other_images(
    tmp_path: Path, short_run: list[str], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fashion_mnist.main(short_run) == 0
    folder = tmp_path / "out" / "frozen-seed0"
    assert [path.name for path in folder.iterdir() if path.name.startswith("result")] == ["result.json"]
    images = tmp_path / "images" / f"{part}-images-idx3-ubyte"
    content = bytearray(images.read_bytes())
    content[-1] ^= 1
    images.write_bytes(content)
    assert_refused(fashion_mnist.main, short_run, ".* is the result of other settings; .*", capsys)


def test_fashion_mnist_goes_on_with_its_images_alone(
    tmp_path: Path,
    short_run: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupt(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fashion_mnist, "replacing", interrupt)
    assert fashion_mnist.main(short_run) == 130
    assert capsys.readouterr().err.endswith("\ninterrupted\n")
    write_fashion_mnist(tmp_path / "images", train=16, test=9)
    assert_refused(fashion_mnist.main, short_run, ".* is of a run with test='[0-9a-f]{12}' .*", capsys)


def test_fashion_mnist_says_that_a_result_is_damaged(
    tmp_path: Path, short_run: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out" / "frozen-seed0").mkdir(parents=True)
    (tmp_path / "out" / "frozen-seed0" / "result.json").write_text('{"settings": {"met')
    assert_refused(fashion_mnist.main, short_run, ".*result.json is damaged, .*", capsys)


def test_a_search_needs_images_to_hold_out(short_run: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    complaint = r"--search holds out 10000 training images and needs more than these; \S+ has 16\."
    assert_refused(fashion_mnist.main, [*short_run, "--search", "frozen"], complaint, capsys)


def test_a_report_whose_reader_has_enough_is_no_error(tmp_path: Path) -> None:
    """Of the recorded runs, which have no digests of their images."""
    kept = Path(__file__).parents[2] / "docs" / "results" / "fashion-mnist.json"
    command = [sys.executable, "-m", "examples.fashion_mnist", "--report", "--out", str(kept)]
    with subprocess.Popen(
        [*command, "--docs", str(tmp_path)],
        cwd=kept.parents[2],
        env=os.environ | {"PYTHONUNBUFFERED": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as running:
        running.stdout.close()
        _, err = running.communicate(timeout=120)
    assert (running.returncode, err) == (0, "")
    assert (tmp_path / "results" / "fashion-mnist.json").read_bytes() == kept.read_bytes()


@pytest.mark.parametrize("method", ["ghl", "kwta"])
def test_cifar_presets(method: str) -> None:
    model = DeepHebb((8, 9, 10), size=8)
    cifar.convert(model, method, cifar.PRESETS["deephebb"], k=3)
    temperatures = [stage[1].rule.temperature for stage in model.stages]
    winners = [stage[1].rule.winners for stage in model.stages]
    assert temperatures == pytest.approx([1, 1 / 0.65, 4] if method == "ghl" else [1, 1, 1])
    assert winners == ([None] * 3 if method == "ghl" else [3] * 3)


def test_cifar_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--synthetic", "--model", "fasthebb", "--limit", "16", "--batch-size", "8", "--epochs", "1"]
    cifar.main([*command, "--out", str(tmp_path)])
    folder = tmp_path / "synthetic-fasthebb-ghl-seed0"
    with (folder / "log.csv").open() as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["1"]
    assert (folder / "curves.png").is_file()
    images = data.limit(data.synthetic((3, 32, 32), 10, 2048, 256), 16, 16)
    assert torch.load(folder / "checkpoint.pt")["settings"]["train"] == images.train.digest()
    assert_refused(cifar.main, ["--root", str(tmp_path / "absent")], ".* does not exist; .*", capsys)


def test_an_interrupted_command_says_where_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cifar, "SYNTHETIC_IMAGES", 16)
    monkeypatch.setattr(Learner, "step", interrupt)
    command = ["--synthetic", "--model", "fasthebb", "--batch-size", "8", "--epochs", "2"]
    command += ["--out", str(tmp_path)]
    assert cifar.main(command) == 130
    assert capsys.readouterr().err == "interrupted\n"
    checkpoint = tmp_path / "synthetic-fasthebb-ghl-seed0" / "checkpoint.pt"
    monkeypatch.undo()
    monkeypatch.setattr(cifar, "SYNTHETIC_IMAGES", 16)
    monkeypatch.setattr(Training, "_describe", lambda self, *_: interrupt() if self.rows else None)
    assert cifar.main(command) == 130
    assert capsys.readouterr().err.endswith(f"interrupted: the same command goes on from {checkpoint}\n")


@pytest.mark.parametrize("main", [cifar.main, imagenet.main])
def test_more_winners_than_units_is_one_line(
    tmp_path: Path, main: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--synthetic", "--classes", "10", "--method", "kwta", "--k", "999", "--out", str(tmp_path)]
    assert_refused(main, command, r"--k 999: .* got 999 of \d+.*\.", capsys)


def test_one_value_per_channel_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--synthetic", "--model", "resnet20", "--size", "1", "--images", "2", "--batch-size", "1"]
    command += ["--classes", "2", "--steps", "1", "--out", str(tmp_path)]
    complaint = r"a batch of one image of 1 x 1 leaves batch norm one value per channel; .*\."
    assert_refused(imagenet.main, command, complaint, capsys)


@pytest.mark.parametrize("parser", [cifar.parser, fashion_mnist._parser, imagenet.parser])
def test_help_shows_every_default(parser: Callable[[], argparse.ArgumentParser]) -> None:
    actions = [action for action in parser()._actions if action.nargs != 0 and action.dest != "amp"]
    assert [action.dest for action in actions if action.default and "default: " not in str(action.help)] == []


@pytest.mark.parametrize(
    ("main", "option", "value", "complaint"),
    [
        (cifar.main, "--lr", "0", "must be a finite number above 0, got '0'"),
        (cifar.main, "--lr", "-1", "must be a finite number above 0, got '-1'"),
        (cifar.main, "--read-out-lr", "inf", "must be a finite number above 0, got 'inf'"),
        (imagenet.main, "--lr", "-1", "must be a finite number above 0, got '-1'"),
        (imagenet.main, "--lr", "fast", "must be a finite number above 0, got 'fast'"),
        (imagenet.main, "--temperature", "0", "must be a finite number above 0, got '0'"),
        (imagenet.main, "--momentum", "-1", "must be a finite number of at least 0, got '-1'"),
        (imagenet.main, "--weight-decay", "nan", "must be a finite number of at least 0, got 'nan'"),
        (cifar.main, "--seed", str(2**64), f"must be a whole number from 0 to {2**64 - 1}, got '{2**64}'"),
        (imagenet.main, "--seed", str(2**64), f"must be a whole number from 0 to {2**64 - 1}, got"),
        (cifar.main, "--threads", "1000000", "must be a whole number from 1 to"),
        (imagenet.main, "--threads", "1000000", "must be a whole number from 1 to"),
    ],
)
def test_a_number_out_of_range_is_one_line(
    main: Callable[[list[str]], None],
    option: str,
    value: str,
    complaint: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        main(["--synthetic", option, value])
    assert f"argument {option}: {complaint}" in capsys.readouterr().err


@pytest.mark.parametrize(("option", "value"), [("--seeds", str(2**64)), ("--threads", "1000000")])
def test_fashion_mnist_refuses_more_than_torch_takes(
    tmp_path: Path, option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        fashion_mnist.main(["--root", str(tmp_path), option, value])
    assert f"argument {option}: must be a whole number from " in capsys.readouterr().err


def test_the_largest_seed_trains(tmp_path: Path) -> None:
    command = ["--synthetic", "--model", "fasthebb", "--limit", "8", "--batch-size", "8", "--epochs", "1"]
    assert cifar.main([*command, "--seed", str(2**64 - 1), "--out", str(tmp_path)]) == 0


def test_numbers_of_zero_are_allowed_where_they_mean_something() -> None:
    options = imagenet.read_options(["--synthetic", "--momentum", "0", "--weight-decay", "0"])
    assert (options.momentum, options.weight_decay) == (0.0, 0.0)


@pytest.mark.parametrize(("given", "lr"), [([], 0.05), (["--lr", "0.25"], 0.25)])
def test_cifar_takes_the_rate_of_its_preset_unless_one_is_given(given: list[str], lr: float) -> None:
    options = cifar.parser().parse_args(["--synthetic", "--model", "fasthebb", *given])
    assert cifar.make_learner(options, 10).optimizers[0].param_groups[0]["lr"] == lr


def test_imagenet_steps_beside_backprop(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--synthetic", "--model", "resnet20", "--size", "32", "--classes", "4", "--images", "16"]
    imagenet.main([*command, "--batch-size", "16", "--steps", "4", "--no-amp", "--out", str(tmp_path)])
    kept = json.loads((tmp_path / "steps" / "resnet20-ghl.json").read_text())
    assert {"commit", "threads", "machine", "versions"} <= kept["environment"].keys()
    result = kept["methods"]
    assert result["ghl"]["losses"][0] == result["backprop"]["losses"][0]
    assert result["ghl"]["losses"][-1] < result["ghl"]["losses"][0]
    assert result["ghl"]["peak_bytes"] > 0
    assert len(result["ghl"]["seconds"]) == 3  # the last step is not timed
    assert min(result["ghl"]["seconds"]) > 0.0
    assert "backprop" in capsys.readouterr().out


@pytest.mark.parametrize(
    "given",
    [
        ["--synthetic", "--method", "kwta", "--k", "1", "--no-amp", "--images", "1", "--steps", "2"],
        ["--root", "DIR", "--model", "vit", "--temperature", "0.3", "--momentum", "0.9", "--steps", "1"],
    ],
)
def test_the_command_that_is_kept_takes_the_same_steps(given: list[str]) -> None:
    options = imagenet.read_options(given)
    command = shlex.split(imagenet.steps_command(options))
    assert command[:3] == ["python", "-m", "examples.imagenet"]
    again = imagenet.read_options(command[3:])
    assert vars(again) | {"threads": None} == vars(options)
    assert again.threads == torch.get_num_threads()


def test_methods_take_their_steps_in_turn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    taken = []
    learners = {name: LEARNERS["backward"]() for name in ("one", "other")}
    for name, learner in learners.items():

        def step(*arguments: object, name: str = name, step: Callable[..., Any] = learner.step) -> Any:
            taken.append(name)
            return step(*arguments)

        monkeypatch.setattr(learner, "step", step)
    found = steps.take(learners, run_in(tmp_path), 3)
    assert taken == ["one", "other"] * 3
    assert found["one"]["losses"] == found["other"]["losses"]
    assert [len(found["one"][key]) for key in ("losses", "seconds")] == [3, 2]


def test_a_number_of_threads_is_taken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = []
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    command = ["--synthetic", "--model", "vit", "--size", "225", "--threads", "3"]
    assert_refused(imagenet.main, command, "--model vit: .*", capsys)
    assert_refused(cifar.main, ["--root", "/absent", "--threads", "4"], "/absent does not exist; .*", capsys)
    assert given == [3, 4]


def test_imagenet_warms_up_within_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    for epochs, warmup in (("1", 0), ("4", 2), ("90", 5)):
        assert imagenet.read_options(["--synthetic", "--epochs", epochs]).warmup == warmup
    for values, complaint in ((["1", "1"], "never be reached"), (["-1", "90"], "at least 0, got '-1'")):
        with pytest.raises(SystemExit):
            imagenet.main(["--synthetic", "--warmup", values[0], "--epochs", values[1]])
        assert complaint in capsys.readouterr().err


def test_imagenet_refuses_to_resume_on_other_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--model", "resnet20", "--size", "16", "--classes", "2", "--batch-size", "2", "--epochs", "1"]
    command += ["--workers", "0", "--no-amp", "--out", str(tmp_path / "out"), "--root"]
    for count, root in enumerate(("one", "two"), start=2):
        for part in ("train", "val"):
            write_image_folder(tmp_path / root / part, count=count)
    imagenet.main([*command, str(tmp_path / "one")])
    (tmp_path / "one").rename(tmp_path / "moved")
    imagenet.main([*command, str(tmp_path / "moved")])
    digest = "'[0-9a-f]{12}'"
    complaint = rf".* is of a run with train={digest} \(now {digest}\), val=.*"
    assert_refused(imagenet.main, [*command, str(tmp_path / "two")], complaint, capsys)


def test_imagenet_says_what_size_a_network_takes(capsys: pytest.CaptureFixture[str]) -> None:
    complaint = "--model vit: size must be .* got size=225.*"
    assert_refused(imagenet.main, ["--synthetic", "--model", "vit", "--size", "225"], complaint, capsys)


@pytest.mark.slow
def test_imagenet_over_two_processes_resumes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "examples.imagenet", "--synthetic", "--model", "resnet20", "--size", "16"]
    command += ["--classes", "4", "--images", "16", "--batch-size", "4", "--epochs", "1", "--warmup", "0"]
    command += ["--no-amp", "--out", str(tmp_path)]
    for _ in range(2):  # the second finds a finished run
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
    with (tmp_path / "resnet20-ghl-seed0" / "log.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 1
