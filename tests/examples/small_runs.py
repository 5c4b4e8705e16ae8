"""A network and a run of two epochs, small enough to repeat in every way of stopping."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from examples import data
from examples.augment import random_crop_and_flip
from examples.batches import ALONE, MemoryBatches, Share, evaluation_batches
from examples.models import DeepHebb
from examples.training import Run

IMAGES = data.synthetic((3, 8, 8), 4, 48, 16)


def network() -> DeepHebb:
    """DeepHebb with a layer that draws from torch's own generator."""
    torch.manual_seed(0)
    model = DeepHebb((4, 6, 8), size=8, classes=4)
    model.stages[2].append(torch.nn.Dropout(0.3))
    return model


def run_in(folder: Path, batch_size: int = 10, share: Share = ALONE, **changes: object) -> Run:
    """Five steps an epoch if alone, the last of them smaller."""
    batches = MemoryBatches(
        IMAGES.train, batch_size, 0, lambda x, g: random_crop_and_flip(x, 1, g), share=share
    )
    run = Run(
        batches,
        lambda: evaluation_batches(IMAGES.test, 8, 0, share),
        IMAGES.mean,
        IMAGES.std,
        2,
        folder,
        {"a": 1},
        share=share,
    )
    return dataclasses.replace(run, **changes)
