"""The kernels on a GPU, where there is one: two stages of tools/gpu_check on small shapes, compiled."""

from __future__ import annotations

import json
import pathlib

import compiled_process
import pytest
import torch


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("stage", ["forms", "parity"])
def test_on_a_gpu(tmp_path: pathlib.Path, stage: str) -> None:
    arguments = ["-m", f"bench.gpu.{stage}", "--out", tmp_path, "--small", "--seconds", "300"]
    done = compiled_process.run(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads((tmp_path / f"{stage}.json").read_text())
    assert document["complete"]
    assert document["errors"] == []
