"""Training on a GPU: low precision, fused and capturable optimizers, a whole step in a CUDA graph."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import gpu_jobs
import pytest
import torch

TESTS = pathlib.Path(__file__).resolve().parents[1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("job", gpu_jobs.JOBS)
def test_on_a_gpu(job: str) -> None:
    """A process of its own: this one has Triton as an interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [*environment.get("PYTHONPATH", "").split(os.pathsep), str(TESTS), str(TESTS.parent)]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    command = [sys.executable, pathlib.Path(gpu_jobs.__file__), job]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode == gpu_jobs.NO_KERNELS:
        pytest.skip(f"no CUDA kernels: {done.stdout}")
    assert done.returncode == 0, done.stdout + done.stderr
