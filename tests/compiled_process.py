"""A process that compiles Triton's kernels for a GPU: that of the tests has Triton as an interpreter."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

TESTS = pathlib.Path(__file__).resolve().parent


def run(*arguments: str | pathlib.Path) -> subprocess.CompletedProcess[str]:
    """Python with these arguments, which finds the sources, the tests and what the caller's path has."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [*environment.get("PYTHONPATH", "").split(os.pathsep), str(TESTS.parent), str(TESTS)]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
