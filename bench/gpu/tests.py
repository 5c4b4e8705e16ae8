"""Stage 11: the tests that need a GPU, where pytest is installed; one row for each as it ends."""

from __future__ import annotations

import importlib.util
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading

import ghl_kernels
from bench.gpu import stage
from bench.gpu.stage import ROOT, Stage

FILES = ("tests/training/test_training_on_a_gpu.py", "tests/test_gpu.py")
_OUTCOME = re.compile(r"^(\S.*?::.*?) (PASSED|FAILED|ERROR|SKIPPED)\b")


def run(this: Stage) -> None:
    """All of them in one process of pytest, which is ended when the time is over."""
    if this.dry or importlib.util.find_spec("pytest") is None:
        this.absent("tests", "a dry run has none" if this.dry else "pytest is not installed")
        return
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--color=no", "-m", "gpu"]
    # pytest puts the sources first, which have no native modules
    native = str(pathlib.Path(ghl_kernels.__file__).parent)
    environment = os.environ | {"COLUMNS": "200", "GHL_NATIVE_DIR": native}
    process = subprocess.Popen(
        [*command, *(str(ROOT / file) for file in FILES)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    late = threading.Timer(max(1.0, this.left), lambda: os.killpg(process.pid, signal.SIGKILL))
    late.start()
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="")
        _note(this, line)
    status = process.wait()
    if late.is_alive():
        late.cancel()
    else:
        this.absent("tests", "out of time")
        return
    if status not in (0, 1):  # 1: failures, which have rows
        this.errors.append(f"pytest ended with status {status}")


def _note(this: Stage, line: str) -> None:
    found = _OUTCOME.match(line)
    if found:
        this.add("tests", {"test": found[1].split("/")[-1], "outcome": found[2].lower()})
        if found[2] in ("FAILED", "ERROR"):
            this.errors.append(f"{found[1]} {found[2].lower()}")


if __name__ == "__main__":
    sys.exit(stage.main("tests", run))
