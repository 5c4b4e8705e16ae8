"""``pytest bench``: every file is collected, and one small case runs."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest

from bench.machine import ROOT


def pytest_bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "--torch-threads", "1"]
    # pytest-benchmark times nothing where it sees a worker of pytest-xdist
    environment = {name: value for name, value in os.environ.items() if "XDIST" not in name}
    return subprocess.run(
        [*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def test_every_file_is_collected() -> None:
    done = pytest_bench("bench", "--collect-only")
    assert done.returncode == 0, done.stdout + done.stderr
    for path in (ROOT / "bench").glob("test_*.py"):
        assert f"bench/{path.name}::" in done.stdout


@pytest.mark.slow
def test_a_small_case_is_checked_and_timed(tmp_path: pathlib.Path) -> None:
    out = tmp_path / "out.json"
    chosen = "8x53x13x13_nchw and eager"
    done = pytest_bench("bench/test_kwta.py", "-k", chosen, "--benchmark-json", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = json.loads(out.read_text())["benchmarks"]
    assert found["extra_info"]["floor_seconds"] > 0.0
    assert found["stats"]["median"] > 0.0
