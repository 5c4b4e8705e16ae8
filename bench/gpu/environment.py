"""Stage 1: what this machine is, what it can do at best, and whether every feature that is used works."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch

from bench import machine
from bench.gpu import ceilings, native_probes, stage
from bench.gpu.stage import Stage
from ghl_kernels import environment

PACKAGES = ("torch", "triton", "numpy", "pybind11", "cmake", "ninja", "matplotlib", "rich")
TOOLS = ("nvidia-smi", "nvcc", "ncu", "compute-sanitizer", "c++", "cmake", "ninja")
EXACT, SUMMED, TF32 = 0.0, 1e-5, 2e-3  # how far a probe may be from float64


def run(this: Stage) -> None:
    """Versions, device, probes, ceilings."""
    this.add("machine", _machine(this))
    this.add("package", environment.collect())
    for name, (probe, limit) in _probes(this.device).items():
        error = this.attempt(f"probe {name}", probe)
        if error is not None:
            this.add("probes", {"probe": name, "works": error <= limit, "error": error})
            if not error <= limit:
                this.errors.append(f"probe {name}: off by {error:.2e}, at which it does not work")
    for name in native_probes.SOURCES:
        this.attempt(name, lambda name=name: _probe_instructions(this, name))
    this.add("ceilings", ceilings.measure(this))


def _machine(this: Stage) -> dict[str, Any]:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    found: dict[str, Any] = {
        "python": sys.version.split()[0],
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "cudnn": torch.backends.cudnn.version(),
        "tools": {name: shutil.which(name) is not None for name in TOOLS},
        "nvidia_smi": _nvidia_smi(),
    }
    if not this.dry:
        found["gpu"] = machine.gpu(this.device)
    return found


def _nvidia_smi() -> str:
    fields = "name,driver_version,memory.total,clocks.max.sm,clocks.max.mem,power.limit"
    try:
        return subprocess.run(
            ["nvidia-smi", f"--query-gpu={fields}", "--format=csv"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "absent or without an answer"


def _probes(device: torch.device) -> dict[str, tuple[Callable[[], float], float]]:
    """What to try, and the largest error at which it works; an exception is an error of the stage."""
    from bench.gpu import probes

    found: dict[str, tuple[Callable[[], float], float]] = {
        "Triton runs": (lambda: probes.add(device), 1e-6),
        "tl.dot bf16": (lambda: probes.dot(device, torch.bfloat16, "ieee"), SUMMED),
        "tl.dot fp16": (lambda: probes.dot(device, torch.float16, "ieee"), SUMMED),
        "tl.dot fp32 ieee": (lambda: probes.dot(device, torch.float32, "ieee"), SUMMED),
        "tl.dot fp32 tf32x3": (lambda: probes.dot(device, torch.float32, "tf32x3"), SUMMED),
        "tl.dot fp32 tf32": (lambda: probes.dot(device, torch.float32, "tf32"), TF32),
        "torch.compile": (lambda: _compiled_softmax(device), 1e-6),
    }
    if device.type == "cuda":
        found["mm of bf16 to float32"] = (lambda: probes.mm_float32(device), SUMMED)
        found["CUDA graph"] = (lambda: _replayed(device), EXACT)
    return found


def _probe_instructions(this: Stage, name: str) -> None:
    """Every instruction that the CUDA backend uses by name, each in a kernel of its own."""
    if this.dry:
        this.absent(name, "a dry run has none")
        return
    major, minor = torch.cuda.get_device_capability()
    if name == "probes_sm90" and (major, minor) != (9, 0):
        this.absent(name, f"this GPU is sm_{major}{minor}")
        return
    with this.share(0.4):
        found = list(native_probes.run(name, this.cache, this.left))
    for probe, problem in found:
        this.add("probes", {"probe": probe, "works": not problem, "problem": problem})
        if problem:
            this.errors.append(f"probe {probe}: {problem}")


def _compiled_softmax(device: torch.device) -> float:
    # in a dry run there may be no C++ compiler to compile with, and nothing to be learnt from one
    backend = "inductor" if device.type == "cuda" else "eager"
    u = torch.randn(8, 64, device=device)
    y = torch.compile(lambda u: torch.softmax(u, 1), backend=backend)(u)
    return (y.double() - torch.softmax(u.double(), 1)).abs().max().item()


def _replayed(device: torch.device) -> float:
    x = torch.randn(1000, device=device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = x * 2
    x.copy_(torch.randn_like(x))
    graph.replay()
    return (y - x * 2).abs().max().item()


if __name__ == "__main__":
    sys.exit(stage.main("environment", run))
