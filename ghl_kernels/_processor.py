"""What Linux says about the processor."""

from __future__ import annotations

import functools
from pathlib import Path

import torch


@functools.cache
def fields() -> dict[str, str]:
    """The description of the first processor; empty elsewhere than on Linux."""
    try:
        with Path("/proc/cpuinfo").open() as file:
            first = file.read(8192).partition("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def has_slow_products() -> bool:
    """Whether torch's float32 matrix products leave half of the processor's multipliers idle.

    MKL multiplies with AVX-512 on Intel's processors alone.
    """
    vendor = fields().get("vendor_id", "GenuineIntel")
    has_avx512 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return torch.backends.mkl.is_available() and has_avx512 and vendor != "GenuineIntel"
