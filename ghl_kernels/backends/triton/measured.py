"""What GPUs have measured, from shapes.json: written by tools/gpu_check, and empty until then.

The file holds a table for each architecture, ``{"sm_90": {...}}``. Its entries, all of them optional::

    "<shape>": [64, 256, 64, 8, 3]   the fastest tile: units, columns, positions, warps, stages
    "<shape>:library": true          y written and the library's product are faster than any tile
    "<shape>:library_grad": true     A by a tile and G by the library are faster than any tile for both
    "<shape>:cuda": true             the CUDA backend's kernel is faster than any tile
    "<competition>:cuda": true       so is its kernel for a competition,
    "depthwise:cuda": true           and for all depthwise layers; likewise "sparse:cuda" and "epilogue:cuda"
    "intensity:2": 800.0             FLOP per byte from which the library is taken in 16 bits where no shape
                                     nearby was measured; "intensity:4" for float32

A shape is config._key of a correlation: the pair has 2 for ``results``, A alone 1. For the library and
for CUDA it has the defaults of ``state_here``, ``aligned`` and ``bounded``, as they are asked for before
these are known. A competition is :func:`competition_key`: "384/state planes 2" is the state of 384 units in
NCHW and 16 bits. "activities" is y, "state" what a pair needs, and there are "full_state", "winner_lists" and
"activity_sums".

A tile holds for its own shape, since others might not compile with it. A verdict also holds for shapes of the
same kind with all sizes within a factor of two, of several the nearest one's.
"""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

Table = dict[str, Any]

# Estimated from the rates of matrix units and memory.
_INTENSITY = {2: 800.0, 4: 32.0}
_NEAR = 1.0  # octaves


def table(arch: str) -> Table:
    """The entries of an architecture."""
    return _file().get(arch, {})


@functools.cache
def _file() -> dict[str, Table]:
    return json.loads((Path(__file__).parent / "shapes.json").read_text())


def competition_key(function: str, units: int, itemsize: int, *, rows: bool) -> str:
    """The name of a competition; ``rows``: units are contiguous, as in channels_last."""
    return f"{max(units, 1)}/{function} {'rows' if rows else 'planes'} {itemsize}"


def intensity(arch: str, itemsize: int) -> float:
    """FLOP per byte from which the library's matrix rate decides; below, the bytes do."""
    return float(table(arch).get(f"intensity:{itemsize}", _INTENSITY[itemsize]))


@functools.lru_cache(maxsize=4096)
def verdict(arch: str, key: str, name: str) -> bool | None:
    """What an architecture's table says about a shape; None: nothing."""
    return nearest(table(arch), key, name)


def nearest(entries: Table, key: str, name: str) -> bool | None:
    """The value of "<key>:<name>", or of the entry whose sizes are nearest and whose kind is the same."""
    close = {
        distance: value
        for entry, value in entries.items()
        if entry.endswith(f":{name}") and (distance := _octaves(entry.removesuffix(f":{name}"), key)) <= _NEAR
    }
    return close[min(close)] if close else None


def _octaves(one: str, other: str) -> float:
    """How far apart two shapes are in the size that differs most; infinitely where their kinds differ."""
    (sizes, _, kind), (other_sizes, _, other_kind) = one.rpartition("/"), other.rpartition("/")
    if kind != other_kind:
        return math.inf
    pairs = zip(_numbers(sizes), _numbers(other_sizes), strict=True)
    return max((abs(math.log2(a / b)) for a, b in pairs), default=0.0)


def _numbers(sizes: str) -> list[int]:
    return [int(size) for size in sizes.split("x") if size]
