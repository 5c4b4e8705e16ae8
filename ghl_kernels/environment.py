"""What this installation is and runs on: the text of ``info`` and a part of every result file."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

import torch

import ghl_kernels
from ghl_kernels import _native, _processor


def collect() -> dict[str, Any]:
    """Versions, machine, threads, native build and backends, as JSON types."""
    return {
        "versions": _versions(),
        "machine": {
            "cpu": _cpu_name(),
            "cpu_model": _cpu_model(),
            "platform": f"{platform.system()} {platform.machine()}",
            "processors": _usable_processors(),
        },
        "threads": torch.get_num_threads(),
        "native": _native_build(),
        "cuda": _cuda_build(),
        "backends": [
            {"name": name, "available": available, "reason": reason}
            for name, available, reason in ghl_kernels.backends()
        ],
    }


def as_text(environment: dict[str, Any]) -> str:
    """The report for people."""
    machine, native = environment["machine"], environment["native"]
    rows = [(name, version or "not installed") for name, version in environment["versions"].items()]
    rows += [
        ("CPU", ", ".join(filter(None, (machine["cpu"], machine["cpu_model"])))),
        ("platform", machine["platform"]),
        ("threads", f"{environment['threads']} of {machine['processors']} processors"),
    ]
    if native["available"]:
        rows += [
            ("compiler", native["compiler"]),
            ("flags", native["flags"]),
            ("instruction sets", f"{native['selected_isa']} chosen of {', '.join(native['isas'])}"),
        ]
    else:
        rows.append(("native", f"not available: {native['reason']}"))
    cuda = environment["cuda"]
    rows.append(
        ("CUDA module", f"{cuda['compiler']}, {cuda['architectures']}" if cuda["built"] else cuda["reason"])
    )
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value}" for name, value in rows]
    lines += ["", "Backends"]
    for backend in environment["backends"]:
        state = "available" if backend["available"] else "not available"
        lines.append(f"  {backend['name']:<{width - 2}}  {state}: {backend['reason']}")
    return "\n".join(lines)


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {
        "ghl_kernels": ghl_kernels.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # its metadata need not say which build it is
    }
    for package in ("triton", "numpy"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def _native_build() -> dict[str, Any]:
    available, reason = _native.cpu_status()
    if not available:
        return {"available": False, "reason": reason}
    module = _native.load_cpu()
    return {"available": True, **module.build_info(), "selected_isa": module.selected_isa()}


def _cuda_build() -> dict[str, Any]:
    """How the CUDA module was built; whether there is a GPU for it is the backend's to say."""
    if problem := _native.cuda_problem():
        return {"built": False, "reason": problem}
    return {"built": True, **_native.load_cuda().build_info()}


def _cpu_name() -> str:
    return _processor.fields().get("model name") or platform.processor() or platform.machine()


def _cpu_model() -> str:
    """Tells generations apart that call themselves the same; "" where Linux on x86 does not say it."""
    fields = _processor.fields()
    names = {"family": "cpu family", "model": "model"}
    return ", ".join(f"{name} {fields[key]}" for name, key in names.items() if key in fields)


def _usable_processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
