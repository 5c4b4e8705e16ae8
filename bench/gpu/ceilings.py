"""What this machine can do at best: bytes copied and multiplications a second, on random data."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from bench.gpu.stage import Stage, read_json
from bench.gpu.timing import Timed, time_all
from bench.work import floor_seconds

__all__ = ["Place", "floor_seconds", "load_or_measure", "measure"]

COPY_BYTES = 4 << 30
PRECISIONS = {
    "bf16": (torch.bfloat16, False),
    "fp16": (torch.float16, False),
    "tf32": (torch.float32, True),
    "fp32": (torch.float32, False),
}


class Place(NamedTuple):
    """What a measurement needs to know of a stage, where there is none."""

    device: torch.device
    errors: list[str]
    dry: bool = False


def measure(stage: Stage | Place, size: int = 8192) -> dict[str, float]:
    """Bytes a second of a copy (read and written both counted) and operations a second of torch.mm."""
    ceilings = {"copy": copy_bandwidth(stage)}
    for name in PRECISIONS:
        ceilings[name] = matrix_rate(stage, name, size)
    return {name: value for name, value in ceilings.items() if value}


def copy_bandwidth(stage: Stage | Place) -> float:
    """Between two buffers far larger than any cache."""
    count = 1 << 12 if stage.dry else COPY_BYTES
    source = torch.randint(0, 255, (count,), dtype=torch.uint8, device=stage.device)
    target = torch.empty_like(source)
    return _rate(stage, "copy", 2 * count, lambda _: target.copy_(source))


def matrix_rate(stage: Stage | Place, name: str, size: int) -> float:
    """Of a square product."""
    dtype, tf32 = PRECISIONS[name]
    n = 64 if stage.dry else size
    a, b = (torch.randn(n, n, device=stage.device).to(dtype) for _ in range(2))
    with _tf32(tf32):
        return _rate(stage, f"mm {name} {n}", 2 * n**3, lambda _: torch.mm(a, b))


def load_or_measure(stage: Stage) -> dict[str, float]:
    """The ceilings of the environment stage's document, measured here where there is none."""
    found = _recorded(stage.out, stage.dry)
    return found or measure(stage, 4096)


def _recorded(out: pathlib.Path, dry: bool) -> dict[str, float]:
    document = read_json(out / "environment.json")
    if document is None or document.get("dry_run") is not dry:
        return {}
    rows = document["results"].get("ceilings", [])
    return rows[0] if rows else {}


def _rate(stage: Stage | Place, name: str, amount: float, run: Callable[[int], object]) -> float:
    timed: Timed = time_all({name: run}, sets=1, device=stage.device, rounds=7)[name]
    if timed.seconds is None:
        stage.errors.append(f"ceiling {name}: {timed.problem}")
        return 0.0
    return amount / timed.seconds.median


@contextlib.contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
