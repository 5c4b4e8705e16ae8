"""Folders of images, a folder per class, as ImageNet is kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest


def write_image_folder(root: Path, classes: tuple[str, ...] = ("a", "b"), count: int = 3) -> None:
    """``count`` random images of unequal heights in each class; skips the test without Pillow."""
    image = pytest.importorskip("PIL.Image")
    generator = np.random.default_rng(0)
    for name in classes:
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = generator.integers(0, 256, (20 + i, 30, 3), dtype=np.uint8)
            image.fromarray(pixels).save(root / name / f"{i}.png")
