"""Every kernel compiles within its budgets for every architecture, and the check that says so can fail."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent


def check(*arguments: str, paths: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """The check in a process of its own: this one has Triton as an interpreter."""
    environment = os.environ | {"PYTHON": sys.executable, "PYTHONPATH": os.pathsep.join(paths)}
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


def test_every_architecture_keeps_the_budgets() -> None:
    done = check("--reduced", "--dtype", "bf16")
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


def test_an_operation_that_raises_is_a_problem(bad) -> None:
    done, document = bad
    assert any("RuntimeError: no such kernel" in line for line in document["raised"])
    assert "RuntimeError: no such kernel" in done.stdout


def test_a_launch_finds_what_was_compiled_ahead(tmp_path: pathlib.Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, HERE / "launch_after_compiling.py"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "compiled 5 kernels, launches added 0\n"


@pytest.mark.slow
def test_every_layer_and_dtype_keeps_the_budgets() -> None:
    done = check()
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


@pytest.mark.slow
def test_the_oldest_triton_keeps_the_budgets() -> None:
    folder = os.environ.get("GHL_TRITON_36")
    if not folder:
        pytest.skip("GHL_TRITON_36 names no folder with Triton 3.6")
    done = check(paths=(folder,))
    assert "Triton 3.6." in done.stdout, done.stderr[-2000:]
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
