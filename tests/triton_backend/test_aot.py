"""Every kernel compiles within its budgets for every architecture, and the check that says so can fail."""

from __future__ import annotations

import itertools
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch

from bench.aot.cases import cases, choices
from bench.gpu import tiles
from ghl_kernels.backends.triton import config
from ghl_kernels.backends.triton.arch import CONSUMER, KNOWN, Arch, assume
from ghl_kernels.backends.triton.launch import recording
from ghl_kernels.backends.triton.operations import OPERATIONS
from ghl_kernels.rule import Competition

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent


def check(*arguments: str, paths: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """The check in a process of its own: this one has Triton as an interpreter."""
    # without CUDA kernels on the host, which would be taken in the place of Triton's
    environment = {name: value for name, value in os.environ.items() if name != "GHL_NATIVE_DIR"}
    environment |= {"PYTHON": sys.executable, "PYTHONPATH": os.pathsep.join(paths)}
    command = [ROOT / "tools" / "aot_check", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """What the check prints and writes when the operations are bad_kernels'."""
    file = tmp_path_factory.mktemp("aot") / "found.json"
    options = ("--operations", "bad_kernels", "--case", "deephebb2 ", "--reduced", "--json", str(file))
    done = check(*options, "--arch", "sm_90", "gfx942", "--dtype", "bf16", paths=(str(HERE),))
    return done, json.loads(file.read_text())


def problems(bad: tuple[Any, dict[str, Any]], kernel: str, arch: str, constants: str = "") -> list[str]:
    """Of one bad kernel; all of them are printed, and the check fails."""
    done, document = bad
    assert done.returncode == 1
    rows = [row for row in document["kernels"] if (row["kernel"], row["arch"]) == (kernel, arch)]
    (row,) = (row for row in rows if constants in row["constants"])
    for problem in row["problems"]:
        assert problem in done.stdout
    return row["problems"]


@pytest.mark.parametrize(
    "archs",
    [
        pytest.param(("sm_90",), id="sm_90"),
        pytest.param(("sm_80", "sm_100", "gfx942"), id="others", marks=pytest.mark.slow),
    ],
)
def test_architectures_keep_the_budgets(archs: tuple[str, ...]) -> None:
    done = check("--reduced", "--dtype", "bf16", "--arch", *archs)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    for kernel in ("compete", "correlate", "depthwise", "reduce", "apply", "gather"):
        assert f"{kernel}_kernel" in done.stdout


def test_serialized_wgmma_is_the_problem_where_there_is_wgmma(bad) -> None:
    (problem,) = problems(bad, "product_kernel", "sm_90", "STAGES=3")
    assert problem.startswith("serialized wgmma (C751")
    assert not any("wgmma" in problem for problem in problems(bad, "product_kernel", "gfx942", "STAGES=3"))


@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
def test_spills_are_the_problem(bad, arch: str) -> None:
    (problem,) = problems(bad, "long_row_kernel", arch)
    assert problem.startswith("spills ")


@pytest.mark.parametrize(("arch", "limit"), [("sm_90", 232448), ("gfx942", 65536)])
def test_too_much_shared_memory_is_a_problem(bad, arch: str, limit: int) -> None:
    found = problems(bad, "product_kernel", arch, "STAGES=12")
    assert any(f"of shared memory, the limit is {limit}" in problem for problem in found)


def test_a_number_of_compilers_below_one_is_refused() -> None:
    done = check("--jobs", "0")
    assert done.returncode == 2
    assert "argument --jobs: must be a whole number of at least 1, got '0'" in done.stderr


def test_an_operation_that_raises_is_a_problem(bad) -> None:
    done, document = bad
    assert any("RuntimeError: no such kernel" in line for line in document["raised"])
    assert "RuntimeError: no such kernel" in done.stdout


def launches_after_compiling(cache: pathlib.Path, *paths: str) -> str:
    """What launch_after_compiling.py prints, with these folders before the installed packages."""
    removed = ("TRITON_INTERPRET", "GHL_NATIVE_DIR")
    environment = {name: value for name, value in os.environ.items() if name not in removed}
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": os.pathsep.join((*paths, str(ROOT)))}
    command = [sys.executable, HERE / "launch_after_compiling.py"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


@pytest.fixture
def triton_36() -> str:
    """The folder with Triton 3.6, the oldest one that is supported."""
    folder = os.environ.get("GHL_TRITON_36")
    if not folder:
        pytest.skip("GHL_TRITON_36 names no folder with Triton 3.6")
    return folder


def test_a_launch_finds_what_was_compiled_ahead(tmp_path: pathlib.Path) -> None:
    assert "compiled 6 kernels, launches added 0\n" in launches_after_compiling(tmp_path)


@pytest.mark.slow
def test_a_launch_finds_what_the_oldest_triton_compiled_ahead(tmp_path: pathlib.Path, triton_36: str) -> None:
    told = launches_after_compiling(tmp_path, triton_36)
    assert told == "Triton 3.6.0: compiled 6 kernels, launches added 0\n"


@pytest.mark.slow
def test_every_layer_and_dtype_keeps_the_budgets() -> None:
    done = check()
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


@pytest.mark.slow
def test_the_oldest_triton_keeps_the_budgets(triton_36: str) -> None:
    done = check(paths=(triton_36,))
    assert "Triton 3.6." in done.stdout, done.stderr[-2000:]
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("arch", [*KNOWN, *CONSUMER])
def test_every_choice_of_a_tile_keeps_the_budgets(arch: str) -> None:
    done = check("--choices", "--dtype", "bf16", "--arch", arch)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


@pytest.mark.parametrize("layer", ["linear-13to17", "conv1d", "deephebb2-nchw", "odd-13to17", "conv3d"])
def test_gradients_are_of_x_as_the_operations_bring_it(layer: str) -> None:
    """Whole loads of channels, whatever the rank and the layout: no kernel is given x in planes."""
    (case,) = (case for case in cases("bf16", reduced=False) if case.name == f"gradient {layer}")
    with assume(KNOWN["sm_90"]), recording() as launches:
        case.run(OPERATIONS, torch.bfloat16)
    assert [launched.arguments["VECTOR"] for launched in launches if "VECTOR" in launched.arguments] == [8]


@pytest.mark.slow
@pytest.mark.parametrize("arch", KNOWN)
def test_the_choices_are_all_that_the_configuration_makes(arch: str) -> None:
    """Tiles, and what of a problem the kernel is compiled for, as the swept function pairs them."""
    chip = KNOWN[arch]
    posed: set[config.Problem] = set()

    def noted(problem: config.Problem, _: Arch) -> config.Tile:
        posed.add(problem)
        return next(config.candidates(problem, chip))

    with mock.patch.object(config, "tile", noted), tiles.library(False), assume(chip), recording():
        for case in choices():
            case.run(OPERATIONS, torch.bfloat16)
    compiled = {choice for problem in posed for choice in _choices(problem, chip)}
    assert compiled >= {choice for problem in _problems() for choice in _choices(problem, chip)}


def _choices(problem: config.Problem, chip: Arch) -> set[tuple[Any, ...]]:
    about = (problem.results, problem.makes_y, problem.state_here, problem.aligned, problem.bounded)
    return {(tile, config.within_tap(problem, tile), *about) for tile in config.candidates(problem, chip)}


def _problems() -> Iterator[config.Problem]:
    """All that differ in what the configuration looks at, and that the operations can pose, in 16 bits."""
    softmax = Competition("softmax", 0, 1.0, False)
    sizes = (1, 8, 16, 17, 24, 32, 33, 64, 65, 128, 200, 256, 257, 512, 4096)
    columns = [(channels * taps, channels) for channels in (8, 64, 96, 128, 256, 1024) for taps in (1, 9)]
    for units, (width, channels), bounded, aligned in itertools.product(sizes, columns, *[(True, False)] * 2):
        if aligned and units % 8:
            continue
        here = bounded and config.state_here(units, width, 1, 2, aligned, softmax)
        for results, makes_y in ((2, True), (1, True), (1, False)):
            yield config.Problem(
                units,
                width,
                channels,
                4096,
                1,
                2,
                results,
                makes_y,
                here and makes_y,
                aligned,
                bounded or not makes_y,
            )
