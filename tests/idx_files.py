"""Writers of small idx files, the format of Fashion-MNIST."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np


def idx(array: np.ndarray) -> bytes:
    """An idx file of unsigned bytes."""
    return (
        struct.pack(f">HBB{array.ndim}I", 0, 0x08, array.ndim, *array.shape)
        + array.astype(np.uint8).tobytes()
    )


def write_fashion_mnist(root: Path, train: int = 40, test: int = 20, size: int = 8) -> None:
    """Four plain idx files of random images."""
    generator = np.random.default_rng(0)
    for prefix, count in (("train", train), ("t10k", test)):
        images = generator.integers(0, 256, (count, size, size))
        (root / f"{prefix}-images-idx3-ubyte").write_bytes(idx(images))
        (root / f"{prefix}-labels-idx1-ubyte").write_bytes(idx(generator.integers(0, 10, count)))
