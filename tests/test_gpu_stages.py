"""The stages of tools/gpu_check without a GPU: their documents, their clock, what they choose and compile."""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from bench.gpu import (
    counters,
    cuda_form,
    forms,
    kwta,
    native_probes,
    pair,
    parity,
    races,
    shapes,
    timing,
    verdicts,
)
from bench.gpu import tests as gpu_tests
from bench.gpu.stage import Options, Stage, read_json
from bench.interleave import Spread
from bench.report import Row
from ghl_kernels.backends.cuda.kernels import correlate
from ghl_kernels.backends.triton import config, measured

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture
def stage(tmp_path: pathlib.Path) -> Stage:
    return Stage("some", Options(tmp_path, seconds=60.0, dry_run=True))


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
    late = Stage("late", Options(tmp_path, seconds=5.0, dry_run=True))
    assert list(late.each("ab", str, least=10)) == []
    late.finish()
    assert read_json(tmp_path / "late.json")["not_done"] == ["a: out of time", "b: out of time"]


def test_a_part_of_a_stage_has_a_share_of_its_time(stage: Stage) -> None:
    with stage.share(0.5), stage.share(0.5):
        assert stage.left == pytest.approx(15.0, abs=1)
    assert stage.left == pytest.approx(60.0, abs=1)


def test_a_broken_form_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str | None] = []
    monkeypatch.setattr(correlate, "correlate", lambda *args, form=None: taken.append(form))
    monkeypatch.setenv(cuda_form.VARIABLE, "mma")
    with cuda_form.sound(), cuda_form.forced("automatic"):
        correlate.correlate()
    monkeypatch.delenv(cuda_form.VARIABLE)
    with cuda_form.sound():
        correlate.correlate()
    assert taken == ["mma", None]


def test_outcomes_of_tests_are_rows(stage: Stage) -> None:
    gpu_tests._note(
        stage, "tests/training/test_training_on_a_gpu.py::test_on_a_gpu[low precision] PASSED [ 50%]"
    )
    gpu_tests._note(stage, "tests/test_gpu.py::test_on_a_gpu[forms] FAILED [100%]")
    gpu_tests._note(stage, "2 failed")
    document = read_json(stage.out / "some.json")
    assert document["results"]["tests"] == [
        {"test": "test_training_on_a_gpu.py::test_on_a_gpu[low precision]", "outcome": "passed"},
        {"test": "test_gpu.py::test_on_a_gpu[forms]", "outcome": "failed"},
    ]
    assert stage.errors == ["tests/test_gpu.py::test_on_a_gpu[forms] failed"]


def test_a_form_is_broken_by_more_than_rounding() -> None:
    def ended(*rows: dict[str, Any], complete: bool = True, **fields: Any) -> dict[str, Any]:
        return {"results": {"forms": list(rows)}, "complete": complete, **fields}

    assert not forms._is_broken(ended({"A": 0.1, "G": 3.0}, errors=["G is off"]))
    assert forms._is_broken(ended({"A": 0.1}, {"G": 5.0}))
    assert forms._is_broken(ended({"A": "inf"}))
    # it hangs in a case, or was too slow to begin with one
    assert forms._is_broken(ended({"A": 0.1}, complete=False, doing="3-d"))
    assert not forms._is_broken(ended(complete=False))
    # one case is refused, or nothing works
    assert not forms._is_broken(ended({"A": 0.1}, errors=["refused"]))
    assert forms._is_broken(ended({"A": 0.1}, errors=["refused", "refused"]))
    assert (
        forms._excess(
            torch.tensor([[[torch.nan]]]), torch.ones(1, 1).double(), torch.ones(1, 1, 1).double(), 1.0
        )
        > 1e300
    )


def test_entries_are_used_as_if_they_were_installed() -> None:
    entries = {"intensity:2": 1.0, "64x64x64x64/kind:cuda": True}
    with shapes.used(entries):
        assert measured.intensity("sm_90", 2) == 1.0
        assert measured.verdict("sm_90", "64x64x64x64/kind", "cuda")
    assert measured.intensity("sm_90", 2) != 1.0
    assert measured.verdict("sm_90", "64x64x64x64/kind", "cuda") is None


def test_the_table_says_which_backend_selects_faster() -> None:
    timed = {"cuda y": seconds(1.0), "triton y": seconds(2.0), "cuda state": seconds(3.0)}
    timed |= {"triton state": seconds(2.0), "cuda lists": seconds(1.0), "triton lists": timing.Timed(None)}
    timed |= {"cuda full state": seconds(1.0), "triton full state": seconds(2.0)}
    found = kwta._faster(kwta.SMALL[1], timed)
    assert {key.split("/")[1]: value for key, value in found.items()} == {
        "activities planes 4:cuda": True,
        "state planes 4:cuda": False,
        "full_state planes 4:cuda": True,
    }


def test_a_share_is_of_a_copy_in_the_same_rounds() -> None:
    timed = {"cuda y": seconds(2.0), "cuda state": seconds(1.0), "copy": seconds(1.5), "B7c": seconds(20.0)}
    assert kwta._shares("cuda y", timed) == {"of_copy_bandwidth": 0.75, "times_faster_than_topk": 10.0}
    assert kwta._shares("cuda state", timed) == {"of_copy_bandwidth": 0.75, "times_faster_than_topk": 20.0}
    assert kwta._shares("triton y", timed | {"triton y": timing.Timed(None)}) == {}


def test_the_bars_of_selection_are_for_cases_that_are_measured() -> None:
    assert set(verdicts.SELECTIONS.values()) <= set(map(str, kwta.CASES))


def test_every_kernel_of_the_competition_is_watched() -> None:
    sources = (
        ROOT / "csrc/cuda" / name for name in ("compete_rows.cuh", "compete_planes.cuh", "compete_long.cu")
    )
    names = [re.search(r"__global__[^{]*?(\w+_kernel)\(", path.read_text(), re.DOTALL)[1] for path in sources]
    assert names == ["rows_kernel", "planes_kernel", "long_kernel"]
    assert all(re.search(counters.WATCHED.removeprefix("regex:"), name) for name in names)


def test_parity_reaches_every_form_of_the_competition() -> None:
    """Of 16 bits: 12, 16, 32 and 48 elements a lane, and rows of a block; in planes and in rows."""
    limits = (384, 512, 1024, 1536, 1 << 31)
    layers = (*parity.LAYERS, *parity.HOPPER, *parity.WIDE)
    reached = {
        (bool(layer.size) and layer.layout != "channels_last", next(n for n in limits if layer.units <= n))
        for layer in layers
    }
    assert reached >= {(True, limit) for limit in limits}
    assert reached >= {(False, limit) for limit in (384, 1024, 1536, 1 << 31)}


def test_the_table_says_whose_kernels_are_faster_on_the_whole() -> None:
    def row(suite: str, case: str, name: str, time: float) -> Row:
        return Row(suite=suite, case=case, name=f"ghl {name}", seconds=Spread.of([time]))

    rows = [row("sparse", "a", "triton", 2.0), row("sparse", "a", "cuda", 1.0)]
    rows += [row("sparse", "b", "triton", 2.0), row("sparse", "b", "cuda", 3.0)]
    rows += [row("epilogue", "a", "gate triton", 1.0), row("epilogue", "a", "gate cuda", 2.0)]
    rows += [
        row("depthwise", "a", "cuda", 1.0),
        row("pair", "a", "triton", 1.0),
        row("pair", "a", "cuda", 2.0),
    ]
    assert races._faster(rows) == {"sparse:cuda": True, "epilogue:cuda": False}


def seconds(value: float) -> timing.Timed:
    return timing.Timed(Spread.of([value]))


def test_what_is_wrong_is_neither_timed_nor_chosen(stage: Stage) -> None:
    good = (torch.ones(2, 3), torch.full((2, 3), 5.0))
    wrong_G = (good[0], good[1] + torch.eye(2, 3))
    unwritten = (torch.full((2, 3), torch.nan), good[1])
    contenders = {"good": lambda i: good, "wrong": lambda i: wrong_G, "unwritten": lambda i: unwritten}
    job = next(pair.jobs(dry=True))
    errors: dict[str, float] = {}
    assert list(pair._right(stage, job, contenders, good, errors)) == ["good"]
    assert [error.split(": ")[1].split()[0] for error in stage.errors] == ["wrong", "unwritten"]
    assert errors["good"] == 0.0


def test_auto_is_measured_against_the_best_of_the_same_rounds() -> None:
    assert pair._of_best({"auto": 3.0, "cuda": 2.0, "tile": 4.0}) == 1.5
    assert pair._of_best({"cuda": 2.0}) is None
    assert pair._of_best({"auto": 3.0}) is None


def test_the_table_of_shapes_takes_the_fastest() -> None:
    problem = config.Problem(64, 576, 64, 1000, 1, 2, 2, True, True)
    table: dict[str, Any] = {}
    times = {"tile 64 256 64 8 3": 3.0, "tile 32 256 64 8 3": 2.0, "cuda": 1.0, "triton library path": 1.5}
    pair._choose(table, problem, times)
    assert sorted(table.values(), key=str) == [False, True, [32, 256, 64, 8, 3]]
    assert [name.rpartition(":")[2] for name, value in table.items() if value is True] == ["cuda"]


def test_the_table_of_shapes_takes_a_gradient_of_the_library_where_that_is_faster() -> None:
    """With the fastest tile of A; what the CUDA backend has to beat is then both together."""
    problem = config.Problem(64, 576, 64, 1000, 1, 2, 2, True, False)
    tile, apart = "tile 64 256 64 8 3", "library G, A tile 128 128 64 8 {}"
    for faster in (True, False):
        table: dict[str, Any] = {}
        times = {tile: 3.0, apart.format(3): 2.0 if faster else 4.0, apart.format(4): 5.0, "cuda": 2.5}
        pair._choose(table, problem, times)
        assert table[config._key(problem)] == [64, 256, 64, 8, 3]
        assert table[config._key(problem._replace(results=1))] == [128, 128, 64, 8, 3]
        assert table[f"{config._key(problem)}:library_grad"] is faster
        assert table[f"{config._key(problem)}:cuda"] is not faster


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
            def __init__(self) -> None:
                self.calls: list[Any] = []

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

        class Stream:
            def wait_stream(self, other: Any) -> None:
                pass

        self.current = Stream()

        @contextlib.contextmanager
        def graph(target: Graph) -> Iterator[None]:
            fake.recording, before, fake.current = target.calls, fake.current, Stream()
            try:
                yield
                fake.current = before  # as torch has it, only where the capture ends well
            finally:
                fake.recording = None

        for name, value in {
            "CUDAGraph": Graph,
            "Event": Event,
            "graph": graph,
            "Stream": Stream,
            "stream": lambda stream: contextlib.nullcontext(),
            "current_stream": lambda: fake.current,
            "set_stream": lambda stream: setattr(fake, "current", stream),
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
    stream = cuda.current
    timed = timing.time_all(candidates, sets=4, device=torch.device("cuda"), rounds=5)
    assert timed["fast"].seconds.median == pytest.approx(0.5e-3)
    assert timed["slow"].seconds.p80 == pytest.approx(3e-3)
    assert timed["fast"].captured is captures
    assert cuda.current is stream
    assert fast[3:] == [0, 1, 2, 3] * (len(fast[3:]) // 4)  # after three runs to warm up


def test_counters_are_read_from_a_raw_page() -> None:
    page = (
        '==PROF== Connected\n"ID","Kernel Name","dram__bytes.sum"\n"","","Mbyte"\n"0","apply_kernel","1.5"\n'
    )
    assert counters.parse(page) == [
        {"ID": "0", "Kernel Name": "apply_kernel", "dram__bytes.sum": "1.5 Mbyte"}
    ]
    assert counters.parse("==ERROR== no permission\n") == []


PROBES = """
#include <unistd.h>

#include <cstdlib>
extern "C" int probe_count() { return 4; }
extern "C" const char* probe_name(int i) {
  return i == 0 ? "good" : i == 1 ? "wrong" : i == 2 ? "trap" : "hang";
}
extern "C" const char* probe_run(int i) {
  if (i == 2) abort();
  while (i == 3) pause();
  return i == 1 ? "3, not 4" : nullptr;
}
"""


def library(target: pathlib.Path, *arguments: str | pathlib.Path) -> pathlib.Path:
    """Probes compiled for the host."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    options = [
        "-std=c++20",
        "-O1",
        "-shared",
        "-fPIC",
        "-Wno-unknown-pragmas",
        "-fno-strict-aliasing",
        "-x",
        "c++",
    ]
    subprocess.run([compiler, *options, *map(str, arguments), "-o", str(target)], check=True)
    return target


def test_a_probe_that_traps_or_hangs_costs_only_itself(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "probes.cpp").write_text(PROBES)
    library(tmp_path / "probes_sm90.so", tmp_path / "probes.cpp")
    monkeypatch.setattr(native_probes, "SECONDS", 10.0)
    monkeypatch.setattr(native_probes, "build", lambda name, folder, _: folder / f"{name}.so")
    monkeypatch.chdir(ROOT)
    found = dict(native_probes.run("probes_sm90", tmp_path))
    assert found == {"good": "", "wrong": "3, not 4", "trap": "status -6: ", "hang": "no answer in 10 s"}


def test_probes_expect_what_the_kernels_were_tested_with(tmp_path: pathlib.Path) -> None:
    """The probes of sm_80 on the twins of its instructions."""
    sources = (ROOT / "bench/gpu/probes_sm80.cu", ROOT / "csrc/cuda/host/runtime.cpp")
    include = (f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc/include'}")
    probes = native_probes.load(library(tmp_path / "probes.so", "-DGHL_CUDA_ON_HOST", *include, *sources))
    for i in range(probes.probe_count()):
        assert probes.probe_run(i) is None, probes.probe_name(i)


@pytest.mark.slow
@pytest.mark.parametrize("name", native_probes.SOURCES)
def test_probes_compile(tmp_path: pathlib.Path, name: str) -> None:
    if native_probes.nvcc() is None:
        pytest.skip("needs nvcc")
    assert native_probes.build(name, tmp_path).exists()
