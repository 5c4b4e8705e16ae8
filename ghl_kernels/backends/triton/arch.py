"""What the configuration of a kernel has to know about the GPU it runs on."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch


class Arch(NamedTuple):
    """One architecture; sizes in bytes."""

    name: str  # "sm_90", "gfx942"
    multiprocessors: int
    shared_memory: int  # that one block may ask for
    l2: int
    warp: int  # lanes
    has_wgmma: bool  # tensor cores fed from shared memory by a warpgroup

    @property
    def is_amd(self) -> bool:
        return self.name.startswith("gfx")

    @property
    def registers(self) -> int | None:
        """All that a thread can have, to tell a compiler that would rather spill than run fewer blocks."""
        return None if self.is_amd else 255


# Those the kernels are compiled for in the tests; multiprocessors and L2 of A100, H200, B200 and MI300X.
KNOWN = {
    arch.name: arch
    for arch in (
        Arch("sm_80", 108, 166_912, 40 << 20, 32, False),
        Arch("sm_90", 132, 232_448, 50 << 20, 32, True),
        Arch("sm_100", 148, 232_448, 126 << 20, 32, False),
        Arch("gfx942", 304, 65_536, 4 << 20, 64, False),
    )
}
_SMALL_SHARED_MEMORY = 101_376
# Parts of the same generations with less shared memory, RTX 3090, 4090 and 5090: compiled for on demand only.
CONSUMER = {
    arch.name: arch
    for arch in (
        Arch("sm_86", 82, _SMALL_SHARED_MEMORY, 6 << 20, 32, False),
        Arch("sm_89", 128, _SMALL_SHARED_MEMORY, 72 << 20, 32, False),
        Arch("sm_120", 170, _SMALL_SHARED_MEMORY, 96 << 20, 32, False),
    )
}
# A CPU, where the interpreter runs program after program at a cost of each: wide "warps" make few of them.
_INTERPRETER = KNOWN["sm_90"]._replace(warp=1024)

_assumed: Arch | None = None


@contextlib.contextmanager
def assume(arch: Arch) -> Iterator[None]:
    """Configure every kernel for this architecture, to list or compile what another machine would run."""
    global _assumed
    previous, _assumed = _assumed, arch
    try:
        yield
    finally:
        _assumed = previous


def of(device: torch.device) -> Arch:
    """The architecture of a device."""
    if _assumed is not None:
        return _assumed
    if device.type == "cpu":
        return _INTERPRETER
    return _of_index(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _of_index(index: int) -> Arch:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        name = properties.gcnArchName.split(":")[0]
    else:
        name = f"sm_{properties.major}{properties.minor}"
    known = KNOWN.get(name)
    shared = getattr(properties, "shared_memory_per_block_optin", None)
    return Arch(
        name,
        properties.multi_processor_count,
        shared or (known.shared_memory if known else _SMALL_SHARED_MEMORY),
        getattr(properties, "L2_cache_size", 0) or (known.l2 if known else 4 << 20),
        getattr(properties, "warp_size", 32),
        name == "sm_90",
    )
