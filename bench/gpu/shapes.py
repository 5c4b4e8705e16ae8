"""shapes.json of a run: what its stages have measured, in the form of the Triton backend's measured.py."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

from bench.gpu.stage import Stage, read_json, write_json
from ghl_kernels._tape import bypassed
from ghl_kernels.backends.triton import arch as architectures
from ghl_kernels.backends.triton import measured

Table = dict[str, Any]


def enter(this: Stage, entries: Table) -> None:
    """Add entries for this device; a dry run has measured nothing, and adds none."""
    path, name = this.out / "shapes.json", architectures.of(this.device).name
    known = read_json(path) or {}
    if not this.dry:
        known[name] = known.get(name, {}) | entries
    write_json(path, known)


@contextlib.contextmanager
def used(entries: Table) -> Iterator[None]:
    """Every choice inside is made as with these entries installed."""
    installed = measured.table
    measured.verdict.cache_clear()
    with bypassed(), mock.patch.object(measured, "table", lambda arch: installed(arch) | entries):
        yield
    measured.verdict.cache_clear()
