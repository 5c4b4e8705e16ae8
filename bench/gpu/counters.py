"""Stage 10: what the hardware counts while our kernels run, by Nsight Compute where it works.

``--target`` is the program that it watches. The clocks are left as they are (``--clock-control none``).
"""

from __future__ import annotations

import csv
import io
import os
import shutil
import subprocess
import sys
from typing import Any

import torch

import ghl_kernels as ghl
from bench.gpu import stage
from bench.gpu.layers import LAYERS, SMALL
from bench.gpu.stage import KERNELS, Stage

WATCHED = "regex:(correlate|compete|rows_kernel|planes_kernel|long_kernel|apply|pair)"
SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "ComputeWorkloadAnalysis", "Occupancy", "LaunchStats")
LAYER = next(layer for layer in LAYERS if layer.name == "DeepHebb conv2")
RULE = ghl.HebbianRule.kwta(8)


def target(device: torch.device, dry: bool) -> None:
    """One pair, a k-WTA in both layouts and one gate on every backend of kernels."""
    layer = SMALL[0] if dry else LAYER
    x, u, grad_u = layer.tensors(device, torch.bfloat16)
    weight = torch.randn(layer.weight_shape, device=device)
    options = {"padding": layer.kernel // 2}
    for backend in (status.name for status in ghl.backends() if status.name in KERNELS and status.available):
        with ghl.use_backend(backend):
            activities = [ghl.functional.compete(one, RULE, 1) for one in (u, u.contiguous())]
            grad = ghl.functional.conv_weight_grad(
                x, u, grad_u, weight.bfloat16(), ghl.HebbianRule.ghl(), **options
            )
        if not all(torch.isfinite(result).all() for result in (*activities, grad)):
            raise AssertionError(f"the watched kernels of {backend} computed something that is not finite")


def run(this: Stage) -> None:
    """The counters, or why there are none."""
    this.attempt("the watched program", lambda: target(this.device, this.dry))
    if this.dry or shutil.which("ncu") is None:
        this.absent("counters", "a dry run has none" if this.dry else "ncu is not on the PATH")
        return
    rows = this.attempt("ncu", lambda: _profile(this.left))
    for row in rows or ():
        this.add("counters", row)


def _profile(seconds: float) -> list[dict[str, Any]]:
    """One row a kernel: every metric of the sections, under Nsight Compute's names."""
    sections = [part for section in SECTIONS for part in ("--section", section)]
    command = ["ncu", "--clock-control", "none", "--csv", "--page", "raw", "--target-processes", "all"]
    command += ["--kernel-name", WATCHED, "--launch-count", "24", *sections]
    command += [sys.executable, "-m", "bench.gpu.counters", "--target"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=max(5.0, seconds), env=dict(os.environ), check=False
    )
    rows = parse(done.stdout)
    if not rows:
        said = (done.stdout + done.stderr).strip().splitlines()
        raise RuntimeError(f"ncu gave no counters, status {done.returncode}: {' / '.join(said[-3:])}")
    return rows


def parse(text: str) -> list[dict[str, Any]]:
    """The rows of a raw page: metric -> "value unit", numbers without a unit as numbers."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return []
    names, units, *rows = list(csv.reader(io.StringIO("\n".join(lines[start:]))))
    found = []
    for row in rows:
        values = {
            name: f"{value} {unit}".strip()
            for name, unit, value in zip(names, units, row, strict=False)
            if value
        }
        found.append(values)
    return found


if __name__ == "__main__":
    if sys.argv[1:] == ["--target"]:
        target(torch.device("cuda"), dry=False)
    else:
        sys.exit(stage.main("counters", run))
