"""tools/gpu_check without a GPU: the dry run of everything, and what happens when a stage goes wrong."""

from __future__ import annotations

import argparse
import contextlib
import importlib.machinery
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

from bench import intensity
from bench.gpu import counters, summary, timing
from bench.gpu.stage import DRY_RUN, Stage, read_json, write_json
from bench.interleave import Spread
from bench.report import Row

ROOT = pathlib.Path(__file__).resolve().parent.parent
TOOL = ROOT / "tools" / "gpu_check"
MEASURED = ("environment", "parity", "limits", "pair", "kwta", "races", "steps", "scaling", "counters")


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


@pytest.fixture
def stage(tmp_path: pathlib.Path) -> Stage:
    return Stage("some", argparse.Namespace(out=tmp_path, dry_run=True, small=True, seconds=60.0))


def test_dry_run_walks_every_step(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("triton")
    # the native modules' build has tests of its own
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GHL_BUILD_NATIVE": "0"}
    command = [sys.executable, TOOL, "--out", tmp_path, "--dry-run"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in MEASURED:
        document = json.loads((tmp_path / f"{name}.json").read_text())
        assert document["complete"]
        assert document["errors"] == []
        assert document["measured_on"] == DRY_RUN
        assert document["results"] or name == "counters"
        assert f"{name}: {DRY_RUN}" in done.stdout
    assert json.loads((tmp_path / "shapes.json").read_text()) == {}
    with tarfile.open(tmp_path / "gpu_check.tar.gz") as archive:
        names = {pathlib.Path(name).name for name in archive.getnames()}
    assert {f"{name}.json" for name in MEASURED} <= names
    assert {"table.txt", "pair.png", "kwta.png", "steps.png", "scaling.png", "install.log"} <= names


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
    tool.run_stages(check, ["kwta"])
    assert check.problems == ["kwta: not started: the budget is spent"]


def test_the_tool_fails_with_a_list(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert load_tool().main(["--out", str(tmp_path), "--budget", "0"]) == 1
    assert "Problems:\ninstall: not started" in capsys.readouterr().out


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
    monkeypatch.setattr(check, "call", lambda name, command, seconds: told.update({name: seconds}))
    tool.run_stages(check, list(tool.STAGES))
    # a stage that ends at once leaves its time to the others, and the last one has it all
    assert list(told) == list(tool.STAGES)
    assert all(seconds < tool.BUDGET for seconds in told.values())
    assert told["counters"] == pytest.approx(tool.BUDGET - tool.SUMMARY_SECONDS, abs=5)
    assert told["warm"] == pytest.approx(
        tool.STAGES["warm"] / sum(tool.STAGES.values()) * (tool.BUDGET - tool.GRACE - tool.SUMMARY_SECONDS)
        + tool.GRACE,
        abs=5,
    )


def test_what_is_measured_needs_neither_rich_nor_matplotlib() -> None:
    pytest.importorskip("triton")
    script = (
        "import sys; sys.modules.update(rich=None, matplotlib=None); import bench.gpu.warm, bench.gpu.summary"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def race_row(name: str, seconds: float, operations: float | None = 1000.0) -> Row:
    return Row(suite="s", case="c", name=name, seconds=Spread.of([seconds]), operations=operations, bytes=1.0)


def test_rows_are_classed_by_intensity() -> None:
    assert intensity.class_of(race_row("B4", 1.0)) == "above 800"
    assert intensity.class_of(race_row("B4", 1.0, 184.0)) == "184 to 800"
    assert intensity.class_of(race_row("B4", 1.0, 183.9)) == "below 184"
    assert intensity.class_of(race_row("B4", 1.0, None)) == intensity.NO_PRODUCTS


def test_the_mean_is_of_our_fastest_against_the_fastest_rival() -> None:
    rows = [race_row("ghl triton", 2.0), race_row("ghl cuda", 1.0), race_row("B4", 4.0), race_row("B3", 9.0)]
    assert intensity.mean(rows) == (4.0, 1)
    assert intensity.mean(rows[:2]) is None


def test_results_are_on_disk_before_the_stage_ends(stage: Stage, tmp_path: pathlib.Path) -> None:
    stage.add("section", {"value": float("nan")})
    document = read_json(tmp_path / "some.json")
    assert document["results"] == {"section": [{"value": "nan"}]}
    assert not document["complete"]


def test_an_error_is_recorded_and_the_stage_goes_on(stage: Stage, tmp_path: pathlib.Path) -> None:
    assert stage.attempt("bad", lambda: 1 // 0) is None
    assert stage.attempt("good", lambda: 1) == 1
    assert stage.finish() == 1
    (error,) = read_json(tmp_path / "some.json")["errors"]
    assert error.startswith("bad: ZeroDivisionError: ")


def test_items_without_time_left_are_recorded(tmp_path: pathlib.Path) -> None:
    late = Stage("late", argparse.Namespace(out=tmp_path, dry_run=True, small=True, seconds=5.0))
    assert list(late.each("ab", str, least=10)) == []
    late.finish()
    assert read_json(tmp_path / "late.json")["not_done"] == ["a: out of time", "b: out of time"]


def test_buffer_sets_exceed_the_cache() -> None:
    assert timing.sets_for(bytes_per_set=10, l2=100) == 30
    assert timing.sets_for(bytes_per_set=1000, l2=100) == 1
    assert timing.sets_for(bytes_per_set=1, l2=1 << 30) == 64


def test_a_candidate_that_raises_leaves_the_others() -> None:
    def bad(_: int) -> None:
        raise ValueError("not here")

    timed = timing.time_all({"bad": bad, "good": lambda _: None}, sets=1, device=torch.device("cpu"))
    assert timed["bad"].row() == {"problem": "ValueError: not here"}
    assert timed["good"].seconds is not None


class FakeCuda:
    """As much of torch.cuda as the timing needs, on a clock that moves when a candidate runs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0  # milliseconds
        self.captures = True
        self.recording: list[Any] | None = None
        fake = self

        class Graph:
            calls: list[Any]

            def replay(self) -> None:
                for call in self.calls:
                    call()

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = fake.now

            def synchronize(self) -> None:
                pass

            def elapsed_time(self, end: Any) -> float:
                return end.at - self.at

        @contextlib.contextmanager
        def graph(target: Graph) -> Iterator[None]:
            fake.recording = target.calls = []
            try:
                yield
            finally:
                fake.recording = None

        class Stream:
            def wait_stream(self, other: Any) -> None:
                pass

        for name, value in {
            "CUDAGraph": Graph,
            "Event": Event,
            "graph": graph,
            "Stream": Stream,
            "stream": lambda stream: contextlib.nullcontext(),
            "current_stream": Stream,
            "synchronize": lambda: None,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def candidate(self, milliseconds: float, calls: list[int]) -> Any:
        """A function that takes this long and notes the buffer set of every run."""

        def work(index: int) -> None:
            self.now += milliseconds
            calls.append(index)

        def run(index: int) -> None:
            if self.recording is not None:
                if not self.captures:
                    raise RuntimeError("operation not permitted when stream is capturing")
                self.recording.append(lambda: work(index))
            else:
                work(index)

        return run


@pytest.mark.parametrize("captures", [True, False])
def test_events_time_one_run_over_rotating_buffers(monkeypatch: pytest.MonkeyPatch, captures: bool) -> None:
    cuda = FakeCuda(monkeypatch)
    cuda.captures = captures
    fast: list[int] = []
    candidates = {"fast": cuda.candidate(0.5, fast), "slow": cuda.candidate(3.0, [])}
    timed = timing.time_all(candidates, sets=4, device=torch.device("cuda"), rounds=5)
    assert timed["fast"].seconds.median == pytest.approx(0.5e-3)
    assert timed["slow"].seconds.p80 == pytest.approx(3e-3)
    assert timed["fast"].captured is captures
    assert fast[3:] == [0, 1, 2, 3] * (len(fast[3:]) // 4)  # after three runs to warm up


def test_counters_are_read_from_a_raw_page() -> None:
    page = (
        '==PROF== Connected\n"ID","Kernel Name","dram__bytes.sum"\n"","","Mbyte"\n"0","apply_kernel","1.5"\n'
    )
    assert counters.parse(page) == [
        {"ID": "0", "Kernel Name": "apply_kernel", "dram__bytes.sum": "1.5 Mbyte"}
    ]
    assert counters.parse("==ERROR== no permission\n") == []


def test_columns_are_aligned() -> None:
    text = summary.columns(("name", "us"), [("a", 1.5), ("long name", None)])
    assert text.splitlines() == ["name        us", "a          1.5", "long name    -"]


def test_a_missing_or_broken_stage_is_named(tmp_path: pathlib.Path) -> None:
    document = {
        "dry_run": False,
        "complete": False,
        "measured_on": "some GPU",
        "seconds": 3,
        "results": {},
        "errors": ["it broke"],
        "not_done": ["the rest"],
    }
    write_json(tmp_path / "kwta.json", document)
    text = summary.as_text({"kwta": read_json(tmp_path / "kwta.json")})
    assert "pair: no document" in text
    assert "== kwta: some GPU, 3 s, INCOMPLETE" in text
    assert "ERROR it broke" in text
    assert "not done: the rest" in text
    assert DRY_RUN not in text
