"""Launching: what reaches the driver is what Triton would have sent, and another kernel where it would."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest
import torch
import triton
import triton.language as tl

from ghl_kernels.backends.triton import launch as module
from ghl_kernels.backends.triton.launch import launch

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]


def test_direct_launches_are_those_of_triton(tmp_path: pathlib.Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, HERE / "launch_directly.py"]
    told = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert told == f"Triton {triton.__version__}: 88 launches, 0 wrong\n"


@triton.jit
def add_kernel(x, count, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    tl.store(x + index, tl.load(x + index, mask=index < count) + 1, mask=index < count)


def test_what_is_kept_of_launches_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: dict[object, object] = {}
    monkeypatch.setattr(module, "_compiled", kept)
    monkeypatch.setattr(module, "_MOST_COMPILED", 3)
    x = torch.zeros(8)
    for count in range(1, 9):
        launch(add_kernel, 1, warps=1, x=x, count=count, BLOCK=8)
        assert 1 <= len(kept) <= 3
    assert x.tolist() == [8, 7, 6, 5, 4, 3, 2, 1]
