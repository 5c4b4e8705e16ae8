"""The kernels on a GPU, where there is one: two stages of tools/gpu_check on small shapes, compiled."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("stage", ["forms", "parity"])
def test_on_a_gpu(tmp_path: pathlib.Path, stage: str) -> None:
    """A process of its own: this one has Triton as an interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [*environment.get("PYTHONPATH", "").split(os.pathsep), str(ROOT), str(ROOT / "tests")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    command = [sys.executable, "-m", f"bench.gpu.{stage}", "--out", tmp_path, "--small", "--seconds", "300"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads((tmp_path / f"{stage}.json").read_text())
    assert document["complete"]
    assert document["errors"] == []
