"""What this machine can do at best: bytes copied and operations a second, measured with pinned threads.

A ceiling is the best of the rounds: what other processes take away is not the machine's limit.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from bench.interleave import pinned_threads
from bench.machine import last_level_cache

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def measure(threads: int, *, size: int = 2048, rounds: int = 7) -> dict[str, float]:
    """Bytes a second of a copy (read and written both counted), operations a second of a product.

    Products and convolutions are different libraries', and which is nearer to what the processor can do
    depends on its maker.

    Args:
        threads: torch's intra-op threads.
        size: rows and columns of the matrices; an eighth of it is a convolution's channels.
        rounds: timed runs of each.

    Returns:
        "copy", "fp32" and "bf16" -> bytes or operations a second.
    """
    with pinned_threads(threads):
        return {"copy": copy_bandwidth(rounds)} | {
            name: max(product_rate(dtype, size, rounds), convolution_rate(dtype, size // 8, rounds))
            for name, dtype in PRECISIONS.items()
        }


def copy_bandwidth(rounds: int, cache: int | None = None) -> float:
    """Between rotating pairs of buffers that together are four times the last-level cache."""
    total = 4 * (cache or last_level_cache())
    pairs = 4
    count = total // (2 * pairs * 4)
    buffers = [(torch.ones(count), torch.zeros(count)) for _ in range(pairs)]

    def copy_all() -> None:
        for source, target in buffers:
            target.copy_(source)

    return 2 * pairs * count * 4 / _fastest(copy_all, rounds)


def product_rate(dtype: torch.dtype, size: int, rounds: int) -> float:
    """Of a square product of random matrices."""
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    out = torch.empty(size, size, dtype=dtype)
    return 2 * size**3 / _fastest(lambda: torch.mm(a, b, out=out), rounds)


def convolution_rate(dtype: torch.dtype, channels: int, rounds: int) -> float:
    """Of a 3 x 3 convolution, channels_last, as many units as channels."""
    images, side = 8, 16
    x = torch.randn(images, channels, side, side).to(dtype, memory_format=torch.channels_last)
    weight = torch.randn(channels, channels, 3, 3).to(dtype)
    operations = 2 * images * (side - 2) ** 2 * 9 * channels**2
    return operations / _fastest(lambda: torch.nn.functional.conv2d(x, weight), rounds)


def _fastest(run: Callable[[], object], rounds: int) -> float:
    run()
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best
