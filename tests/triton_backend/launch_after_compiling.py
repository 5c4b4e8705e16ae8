"""Compiles some launches ahead of time, then has Triton launch them on a device that is not there.

Run by test_aot.py in a process without the interpreter: Triton's own lookup of its cache is what is tested.
"""

from __future__ import annotations

import os
import pathlib

import torch
import triton
from absent_device import Device
from triton.runtime import driver

from bench.aot.compilation import compile_, specialize
from ghl_kernels.backends.triton.arch import KNOWN, assume
from ghl_kernels.backends.triton.launch import recording
from ghl_kernels.backends.triton.operations import OPERATIONS
from ghl_kernels.rule import Competition

ARCH = KNOWN["sm_90"]


def entries() -> set[str]:
    return {path.name for path in pathlib.Path(os.environ["TRITON_CACHE_DIR"]).iterdir()}


driver.set_active(Device())
with assume(ARCH), recording() as launches:
    u, x = torch.empty(64, 96, dtype=torch.bfloat16), torch.empty(64, 128, dtype=torch.bfloat16)
    OPERATIONS.linear_pair(x, u, u, Competition("softmax", 0, 1.0, False), "oja")
    OPERATIONS.compete(u, 1, Competition("linear", 3, 1.0, False))
    A = torch.empty(96, 128)
    OPERATIONS.gate_(A.clone(), A, torch.empty(1), A, 1, "oja", "layer")
for launch in launches:
    compile_(specialize(launch, ARCH))
before = entries()
for launch in launches:
    launch.kernel.warmup(**launch.arguments, **launch.options, grid=(launch.blocks,))
print(
    f"Triton {triton.__version__}: compiled {len(before)} kernels, launches added {len(entries() - before)}"
)
