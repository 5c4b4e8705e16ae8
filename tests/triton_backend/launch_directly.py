"""Launches a kernel many times on a device that is not there, by launch() and by Triton itself.

Run by test_launch.py in a process without the interpreter. A launch is what reaches the driver: the compiled
kernel, its grid and its arguments.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from absent_device import Device
from triton.runtime import driver

from ghl_kernels.backends.triton.launch import launch

launched: list[tuple[Any, ...]] = []


class Utils:
    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232_448}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[Any, ...]:
        return None, kernel, 32, 0, 1024


class Launcher:
    def __init__(self, source: Any, metadata: Any) -> None:
        pass

    def __call__(self, x: int, y: int, z: int, stream: int, function: bytes, *rest: Any) -> None:
        arguments = [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in rest[4:]]
        metadata, _, *hooks = rest[:4]  # without what profilers are told, an object of each launch
        launched.append((function, x, y, z, stream, metadata, *hooks, *arguments))


class LaunchingDevice(Device):
    """One whose launches are noted."""

    utils, launcher_cls = Utils(), Launcher


@triton.jit(do_not_specialize=["plain"])
def kernel(x_ptr, y_ptr, size, plain, rate, FLAG: tl.constexpr, BLOCK: tl.constexpr):
    """Loads and stores that depend on what the arguments are specialized on."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + index, mask=index < size, other=0.0)
    if y_ptr is not None:
        tl.store(y_ptr + index, x * rate + plain + FLAG, mask=index < size)


driver.set_active(LaunchingDevice())
x = torch.empty(256)
base: dict[str, Any] = {
    "x_ptr": x, "y_ptr": x.clone(), "size": 160, "plain": 3, "rate": 0.5, "FLAG": True, "BLOCK": 128
}  # fmt: skip
changes: list[dict[str, Any]] = [
    *({}, {"rate": 0.25}, {"x_ptr": x[1:]}, {"x_ptr": x.half()}, {"y_ptr": None}, {"size": 161}, {"size": 1}),
    *({"size": 1 << 40}, {"plain": 16}, {"FLAG": False}, {"BLOCK": 64}),
]
wrong = 0
for change in changes * 2:
    arguments = base | change
    for warps, registers in ((4, None), (1, 64)):
        options = {"num_warps": warps, "num_stages": 1, "enable_fp_fusion": True}
        options |= {} if registers is None else {"maxnreg": registers}
        launch(kernel, 5, warps=warps, registers=registers, **dict(reversed(arguments.items())))
        kernel[(5,)](**arguments, **options)
        ours, tritons = launched[-2:]
        wrong += ours != tritons
print(f"Triton {triton.__version__}: {len(launched)} launches, {wrong} wrong")
