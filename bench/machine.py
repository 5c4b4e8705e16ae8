"""The machine of a measurement: hardware, versions, commit, and how busy and how fast it was."""

from __future__ import annotations

import os
import pathlib
import subprocess
from typing import Any

import torch

from ghl_kernels import environment

ROOT = pathlib.Path(__file__).resolve().parent.parent


def describe(device: torch.device) -> dict[str, Any]:
    """What ``python -m ghl_kernels info --json`` says, the commit, and the accelerator if there is one."""
    found = environment.collect() | {
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "last_level_cache": last_level_cache(),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "device": device.type,
    }
    if device.type == "cuda":
        found["gpu"] = gpu(device)
    return found


def gpu(device: torch.device) -> dict[str, Any]:
    """Name, compute capability and sizes in bytes of a GPU."""
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory": properties.total_memory,
        "l2": properties.L2_cache_size,
        "shared_memory": getattr(properties, "shared_memory_per_block_optin", None),
    }


def clocks() -> dict[str, Any]:
    """Current clock of every processor in MHz and the load averages: what a noisy run is judged by."""
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    mhz = [float(line.partition(":")[2]) for line in text.splitlines() if line.startswith("cpu MHz")]
    return {"cpu_mhz": mhz, "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else []}


def last_level_cache() -> int:
    """Bytes of the largest cache of the first processor; 32 MiB where the system does not tell."""
    sizes = []
    for path in pathlib.Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:], 1)
        sizes.append(int(text.rstrip("KMG")) * unit)
    return max(sizes, default=32 << 20)


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
