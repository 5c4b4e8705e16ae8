"""tools/gpu_check without a GPU: the dry run of everything, and what happens when a stage goes wrong."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tarfile
import threading
import time
from types import ModuleType
from typing import Any

import pytest

from bench.gpu import cuda_form, summary
from bench.gpu.stage import DRY_RUN, write_json

ROOT = pathlib.Path(__file__).resolve().parent.parent
TOOL = ROOT / "tools" / "gpu_check"
MEASURED = tuple(name for name in summary.STAGES if name not in ("forms", "counters", "tests"))


def load_tool() -> ModuleType:
    """The script as a module."""
    loader = importlib.machinery.SourceFileLoader("gpu_check", str(TOOL))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("gpu_check", loader))
    loader.exec_module(module)
    return module


@pytest.fixture
def check(tmp_path: pathlib.Path) -> Any:
    """One run of the tool, nothing installed."""
    tool = load_tool()
    return tool.Check(tool.parse(["--out", str(tmp_path), "--dry-run"]), tmp_path / "package")


@pytest.mark.slow
def test_dry_run_walks_every_step(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("triton")
    # the native modules' build has tests of its own
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GHL_BUILD_NATIVE": "0"}
    out, kept = tmp_path / "out", tmp_path / "kept"
    command = [sys.executable, TOOL, "--out", out, "--archive-to", kept, "--dry-run"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in summary.STAGES:
        document = json.loads((out / f"{name}.json").read_text())
        assert document["complete"]
        assert document["errors"] == []
        assert document["measured_on"] == DRY_RUN
        assert document["results"] or name not in MEASURED
        assert f"{name}: {DRY_RUN}" in done.stdout
    assert "cannot be shown" not in done.stdout
    assert json.loads((out / "shapes.json").read_text()) == {}
    assert archived(out) >= {f"{name}.json" for name in summary.STAGES}
    assert archived(out) >= {"table.txt", "pair.png", "kwta.png", "steps.png", "scaling.png", "install.log"}
    assert {path.name for path in kept.iterdir()} == set(load_tool().KEPT)


def archived(out: pathlib.Path) -> set[str]:
    """Names of the files in a run's archive."""
    with tarfile.open(out / "gpu_check.tar.gz") as archive:
        return {pathlib.Path(name).name for name in archive.getnames()}


def test_a_stage_that_crashes_costs_only_itself(check: Any) -> None:
    assert not check.call("crash", [sys.executable, "-c", "import os; os.abort()"], 30)
    assert check.call("fine", [sys.executable, "-c", "print('ok')"], 30)
    assert check.problems == ["crash: status -6"]


def test_a_stage_that_hangs_is_ended_with_its_children(check: Any, tmp_path: pathlib.Path) -> None:
    sleep = "import time; time.sleep(60)"
    hang = f"import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', '{sleep}']).pid); {sleep}"
    assert not check.call("hang", [sys.executable, "-u", "-c", hang], 3)
    child = (tmp_path / "hang.log").read_text().strip()
    assert check.problems == [f"hang: out of time: {child}"]
    status = pathlib.Path(f"/proc/{child}/status")
    # a process that was killed may still be there for a moment
    end = time.monotonic() + 10
    while status.exists() and "State:\tZ" not in status.read_text() and time.monotonic() < end:
        time.sleep(0.05)
    assert not status.exists() or "State:\tZ" in status.read_text()


def test_nothing_starts_when_the_budget_is_spent(tmp_path: pathlib.Path) -> None:
    tool = load_tool()
    check = tool.Check(tool.parse(["--out", str(tmp_path), "--budget", "0"]), tmp_path)
    check.installed = True
    tool._measure(check, "kwta", ["kwta"])
    assert check.problems == ["kwta: not started: the budget is spent"]


def test_the_tool_fails_with_a_list_and_an_archive(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, kept = tmp_path / "out", tmp_path / "kept"
    command = ["--out", str(out), "--budget", "0", "--dry-run", "--archive-to", str(kept)]
    assert load_tool().main(command) == 1
    assert "Problems:\ninstall: not started" in capsys.readouterr().out
    assert "table.txt" in archived(out)
    assert {path.name for path in kept.iterdir()} == {"gpu_check.tar.gz", "table.txt"}


def test_without_its_cuda_kernels_the_package_is_measured_all_the_same(
    check: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = load_tool()
    check.dry = False
    called: list[tuple[str, dict[str, str]]] = []

    def call(name: str, command: list[str], seconds: float, **variables: str) -> bool:
        called.append((name, variables))
        check.package.mkdir(parents=True, exist_ok=True)
        return variables["GHL_BUILD_CUDA"] == "0" or check._failed(name, "nvcc says no")

    monkeypatch.setattr(check, "call", call)
    assert tool.install(check)
    assert [(name, variables["GHL_BUILD_CUDA"]) for name, variables in called] == [
        ("install", "1"),
        ("install-without-cuda", "0"),
    ]
    assert check.problems == ["install: nvcc says no"]
    # the next run finds what this one has built, and what was wrong with it
    assert tool.install(check)
    assert len(called) == 2
    assert check.problems == ["install: nvcc says no"] * 2


def test_a_changed_source_is_installed_again(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = load_tool()
    monkeypatch.setattr(tool, "ROOT", tmp_path)
    monkeypatch.setattr(tool, "SOURCES", ("setup.py", "csrc"))
    (tmp_path / "csrc").mkdir()
    (tmp_path / "setup.py").write_text("1")
    (tmp_path / "csrc" / "a.cu").write_text("2")
    before = tool._fingerprint({})
    assert tool._fingerprint({}) == before
    assert tool._fingerprint({"GHL_BUILD_CUDA": "0"}) != before
    (tmp_path / "csrc" / "a.cu").write_text("3")
    assert tool._fingerprint({}) != before


def test_a_run_shows_nothing_of_the_one_before(tmp_path: pathlib.Path) -> None:
    tool, out = load_tool(), tmp_path / "out"
    tool._empty(out)
    (out / "kwta.json").write_text("{}")
    tool._empty(tool.parse(["--out", str(out)]).out)
    assert [path.name for path in out.iterdir()] == [tool.RUN]


def test_a_folder_of_somebody_else_is_left_alone(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(SystemExit):
        load_tool().main(["--out", str(tmp_path)])
    assert "holds something else than an earlier run" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").exists()


@pytest.mark.parametrize("options", [[], ["--sanitize"]])
def test_without_a_gpu_nothing_is_begun(
    options: list[str],
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tool, out = load_tool(), tmp_path / "out"
    monkeypatch.setattr(tool, "_sees_gpu", lambda: False)
    assert tool.main(["--out", str(out), *options]) == 2
    message = "error: torch sees no GPU; --dry-run walks through every step without one.\n"
    assert capsys.readouterr() == ("", message)
    assert not out.exists()


def test_measured_shapes_are_those_of_the_stages_that_follow(check: Any) -> None:
    tool = load_tool()
    installed = check.package / tool.SHAPES
    installed.parent.mkdir(parents=True)
    installed.write_text(json.dumps({"sm_80": {"a": 1}, "sm_90": {"b": 2, "c": 3}}))
    write_json(check.out / "shapes.json", {"sm_90": {"c": 4}})
    tool.learn(check, "pair")
    assert json.loads(installed.read_text()) == {"sm_80": {"a": 1}, "sm_90": {"b": 2, "c": 4}}


def test_a_form_that_does_not_work_is_used_no_more(check: Any) -> None:
    write_json(check.out / "forms.json", {"results": {"broken": [{"form": "wgmma"}]}})
    load_tool().learn(check, "forms")
    assert check._environment()[cuda_form.VARIABLE] == "mma"
    assert len(check.problems) == 1


def test_what_stages_need_is_compiled_while_the_package_is_built(
    check: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = load_tool()
    check.dry = False
    began: list[tuple[str, tuple[str, ...]]] = []
    warming = threading.Event()

    def measure(name: str, seconds: float, *options: str) -> None:
        began.append((name, options))
        warming.set()

    def install(check: Any) -> bool:
        return warming.wait(20)

    monkeypatch.setattr(check, "measure", measure)
    monkeypatch.setattr(tool, "install", install)
    tool.run(check, ["warm", "pair", "steps"])
    assert began == [("warm", ("--stages", "warm,pair,steps")), ("pair", ()), ("steps", ())]


def test_without_a_package_no_stage_begins(check: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = load_tool()
    check.dry = False
    began = []
    monkeypatch.setattr(check, "measure", lambda name, seconds, *options: began.append(name))
    monkeypatch.setattr(tool, "install", lambda check: False)
    tool.run(check, ["kwta"])
    assert began == ["warm"]


def test_before_the_package_is_built_its_sources_are_run(check: Any) -> None:
    assert str(check.package) not in check._environment()["PYTHONPATH"]
    check.installed = True
    assert check._environment()["PYTHONPATH"].startswith(str(check.package))


def test_a_warm_up_that_takes_too_long_is_no_failure(check: Any) -> None:
    assert not check.call("warm", [sys.executable, "-c", "import time; time.sleep(60)"], 1)
    assert check.problems == []


def test_a_memory_checker_watches_our_kernels(check: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = load_tool()
    called: dict[str, list[str]] = {}
    monkeypatch.setattr(tool.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(check, "call", lambda name, command, *_, **__: called.update({name: command}))
    tool.sanitize(check, ("racecheck", "initcheck"))
    # everything is compiled before the checker starts
    assert list(called)[:2] == list(tool.SANITIZED)
    assert called["sanitize-racecheck-forms"].count("--kernel-name") == len(tool.OUR_KERNELS)
    assert "--kernel-name" not in called["sanitize-initcheck-parity"]
    assert all("--small" in command for command in called.values())
    assert tool.parse(["--sanitize"]).sanitize == "all"
    assert tool.parse(["--sanitize", "memcheck"]).sanitize == "memcheck"


def test_unknown_stages_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load_tool().parse(["--only", "kwta,speed"])
    assert "unknown stages ['speed']" in capsys.readouterr().err


def test_stages_run_in_their_order() -> None:
    assert load_tool().parse(["--only", "steps,environment"]).only == ["environment", "steps"]


def test_stages_share_the_time_that_is_left(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = load_tool()
    check = tool.Check(tool.parse(["--out", str(tmp_path)]), tmp_path)
    told: dict[str, float] = {}
    monkeypatch.setattr(check, "measure", lambda name, seconds, *options: told.update({name: seconds}))
    monkeypatch.setattr(tool, "install", lambda check: True)
    tool.run(check, list(tool.STAGES))
    # a stage that ends at once leaves its time to the others, and the last one has it all
    assert list(told) == list(tool.STAGES)
    assert all(seconds < tool.BUDGET for seconds in told.values())
    available = tool.BUDGET - tool.GRACE - tool.SUMMARY_SECONDS
    assert told["tests"] == pytest.approx(available, abs=5)
    share = tool.STAGES["warm"] / sum(tool.STAGES.values())
    assert told["warm"] == pytest.approx(share * available, abs=5)
