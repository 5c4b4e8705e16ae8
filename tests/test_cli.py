"""The command line: help, info, and one sentence and exit code 2 for what the user can mend."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from idx_files import write_fashion_mnist

import ghl_kernels.demo
from ghl_kernels import _native, environment
from ghl_kernels.__main__ import main
from ghl_kernels.demo.ending import exit_code


def one_sentence(capsys: pytest.CaptureFixture[str]) -> str:
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.endswith(".\n")
    assert err.count("\n") == 1
    return err


def test_the_module_runs_as_a_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ghl_kernels", "info"], capture_output=True, text=True, check=True, timeout=120
    )
    assert ghl_kernels.__version__ in done.stdout
    assert "eager" in done.stdout
    assert done.stderr == ""


def test_a_reader_that_has_enough_is_no_error() -> None:
    command = [sys.executable, "-m", "ghl_kernels", "info"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        running.stdout.close()
        _, err = running.communicate(timeout=120)
    assert (running.returncode, err) == (0, "")


@pytest.mark.parametrize(("option", "unbuffered"), [("info", ""), ("info", "1"), ("--help", "")])
def test_a_full_stdout_is_one_line(option: str, unbuffered: str) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("there is no /dev/full")
    with full.open("w") as stdout:
        done = subprocess.run(
            [sys.executable, "-m", "ghl_kernels", option],
            env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
            check=False,
        )
    message = "error: The output cannot be written: No space left on device.\n"
    assert (done.returncode, done.stderr) == (2, message)


def test_ctrl_c_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(environment, "collect", interrupt)
    assert main(["info"]) == 130
    assert capsys.readouterr() == ("", "interrupted\n")


def raising(error: BaseException) -> Callable[[], None]:
    def work() -> None:
        raise error

    return work


def test_an_interruption_says_what_comes_next(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(raising(KeyboardInterrupt("the same command goes on"))) == 130
    assert capsys.readouterr() == ("", "interrupted: the same command goes on\n")


def test_what_the_user_cannot_mend_keeps_its_traceback() -> None:
    for error in (OSError(5, "Input/output error"), ValueError("a"), SystemExit(1)):
        with pytest.raises(type(error)):
            exit_code(raising(error))


def test_a_reader_that_has_enough_of_a_table_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        try:
            raise BrokenPipeError
        except BrokenPipeError:
            raise SystemExit(1)  # noqa: B904 - as rich ends a process

    assert exit_code(work) == 0
    assert capsys.readouterr() == ("", "")


def sanitize(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """tools/sanitize with a cmake that builds nothing and fails."""
    cmake = tmp_path / "cmake"
    cmake.write_text("#!/bin/sh\necho built >&2\nexit 3\n")
    cmake.chmod(0o755)
    # a stand-in, as tools of the environment's Python would come before
    python = tmp_path / "python"
    scripts = f'[ "$1" = -c ] && echo "{tmp_path}" && exit'
    python.write_text(f'#!/bin/sh\n{scripts}\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    tool = Path(__file__).parents[1] / "tools" / "sanitize"
    found = {"PYTHON": str(python), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    return subprocess.run(
        [tool, *arguments], env=os.environ | found, capture_output=True, text=True, timeout=120, check=False
    )


def test_sanitize_builds_nothing_for_help_or_what_pytest_refuses(tmp_path: Path) -> None:
    done = sanitize(tmp_path, "--help")
    assert (done.returncode, done.stdout) == (0, "usage: tools/sanitize [arguments of pytest]\n")
    done = sanitize(tmp_path, "--nonsense")
    assert done.returncode != 0
    assert "unrecognized arguments: --nonsense" in done.stderr
    assert "built" not in done.stderr
    assert "built" in sanitize(tmp_path, "-k", "compete").stderr


@pytest.mark.parametrize(("option", "code"), [("--help", 0), ("-h", 0), ("--nonsense", 2)])
def test_cuda_on_host_builds_nothing_for_help(option: str, code: int) -> None:
    tool = Path(__file__).parents[1] / "tools" / "cuda_on_host"
    done = subprocess.run(
        [tool, option],
        env=os.environ | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    usage = "usage: tools/cuda_on_host [--sanitize | --threads] [arguments of pytest]\n"
    assert (done.returncode, done.stdout, done.stderr) == (code, *((usage, "") if code == 0 else ("", usage)))


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    listed = text.partition("commands:")[2].partition("examples:")[0]
    assert [
        line.split()[0] for line in listed.splitlines() if line.startswith("    ") and line[4] != " "
    ] == [
        "info",
        "demo",
        "bench",
    ]


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("info", ["--json"]),
        (
            "demo",
            [
                "--data",
                "--root",
                "--limit",
                "--validation",
                "--epochs",
                "--seeds",
                "--batch-size",
                "--lr",
                "--threads",
                "--out",
            ],
        ),
    ],
)
def test_help_of_a_command_lists_its_options(
    command: str, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert [option for option in options if f"\n  {option}" not in text] == []


def test_info_says_what_a_bug_report_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["versions"]["ghl_kernels"] == ghl_kernels.__version__
    assert report["versions"]["torch"] == torch.__version__
    assert report["threads"] == torch.get_num_threads()
    assert [tuple(backend.values()) for backend in report["backends"]] == [
        *map(tuple, ghl_kernels.backends())
    ]
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    for backend in ghl_kernels.backends():
        assert backend.name in text
        assert backend.reason in text
    assert report["machine"]["cpu"] in text
    assert report["machine"]["cpu_model"] in text


def test_info_shows_the_native_build(capsys: pytest.CaptureFixture[str]) -> None:
    available, reason = _native.cpu_status()
    if not available:
        pytest.skip(f"native kernels: {reason}")
    module = _native.load_cpu()
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert module.build_info()["compiler"] in text
    assert f"{module.selected_isa()} chosen of" in text


def test_info_says_why_native_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = _native.NativeNotBuilt("ghl_kernels._cpu was not built: no C++ compiler was found")
    monkeypatch.setattr(_native, "_load", lambda name: missing)
    assert main(["info"]) == 0
    assert (
        "not available: ghl_kernels._cpu was not built: no C++ compiler was found" in capsys.readouterr().out
    )
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["native"] == {"available": False, "reason": str(missing)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "required: COMMAND"),
        (["train"], "invalid choice: 'train'"),
        (["demo", "--data", "cifar"], "invalid choice: 'cifar'"),
        (["demo", "--epochs", "0"], "whole number of at least 1, got '0'"),
        (["demo", "--seeds", "two"], "whole number of at least 1, got 'two'"),
        (["demo", "--threads", "1000000"], "whole number from 1 to"),
        (["demo", "--lr", "0.1"], "must be NAME=VALUE"),
        (["demo", "--lr", "backprop=nan"], "finite and at least 0, got 'backprop=nan'"),
    ],
)
def test_a_bad_option_is_exit_code_2(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(options)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def truncate(root: Path) -> None:
    path = root / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])


def remove_labels(root: Path) -> None:
    (root / "t10k-labels-idx1-ubyte").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [(truncate, "is truncated"), (remove_labels, "has neither t10k-labels-idx1-ubyte nor")],
    ids=["truncated", "missing"],
)
def test_a_bad_data_set_is_one_sentence(
    tmp_path: Path, damage: Callable[[Path], None], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_fashion_mnist(tmp_path)
    damage(tmp_path)
    options = ["demo", "--data", "fashion-mnist", "--root", str(tmp_path), "--out", str(tmp_path / "out")]
    assert main(options) == 2
    assert message in one_sentence(capsys)


def test_a_wrong_folder_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    absent = tmp_path / "absent"
    assert main(["demo", "--data", "fashion-mnist", "--root", str(absent)]) == 2
    assert f"{absent} does not exist" in one_sentence(capsys)


def test_digits_take_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--root", str(tmp_path)]) == 2
    assert "--root is for --data fashion-mnist" in one_sentence(capsys)


def test_an_unknown_learning_rate_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--lr", "adam=0.1"]) == 2
    assert "--lr knows no 'adam'; the names are backprop, ghl-softmax" in one_sentence(capsys)


def test_a_folder_that_cannot_be_made_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.write_text("")
    write_fashion_mnist(tmp_path)
    for out in (file, file / "out"):
        options = ["demo", "--data", "fashion-mnist", "--root", str(tmp_path), "--out", str(out)]
        assert main(options) == 2
        assert one_sentence(capsys) == f"error: The folder {out} cannot be made: {file} is a file.\n"


def test_a_folder_that_cannot_be_written_to_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_fashion_mnist(tmp_path)
    options = ["demo", "--data", "fashion-mnist", "--root", str(tmp_path), "--out", "/proc"]  # nor by root
    assert main(options) == 2
    assert "The folder /proc cannot be written to: " in one_sentence(capsys)


@pytest.mark.parametrize(
    ("package", "message"),
    [
        ("sklearn", "come with scikit-learn, which is not installed"),
        ("matplotlib", "needs matplotlib, which is not installed"),
        ("rich", "needs rich, which is not installed"),
    ],
)
def test_a_missing_package_is_one_sentence(
    package: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in ("figure", "progress", "report"):
        monkeypatch.delitem(sys.modules, f"ghl_kernels.demo.{module}", raising=False)
        monkeypatch.delattr(ghl_kernels.demo, module, raising=False)
    for name in [package, *(name for name in sys.modules if name.startswith(f"{package}."))]:
        monkeypatch.setitem(sys.modules, name, None)  # importing it raises ModuleNotFoundError
    assert main(["demo"]) == 2
    assert message in one_sentence(capsys)
