"""Batches whose order and augmentation depend on (seed, epoch, position) alone.

So a run that resumes needs to know its position and nothing else, and the number of workers changes no bit.
With several processes each gets its own part of every batch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from examples.augment import center_crop, random_resized_crop_and_flip
from examples.data import ImageFolder, Images
from ghl_kernels.demo.errors import UserError

Augment = Callable[[Tensor, torch.Generator], Tensor]
Batch = tuple[Tensor, Tensor]


class Batches(Protocol):
    """What the training loop needs: images (B, C, H, W) of bytes with labels (B,), from any step on."""

    def __len__(self) -> int:
        """Steps of an epoch."""

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from step ``start`` on."""


@dataclasses.dataclass(frozen=True)
class Share:
    """Process ``rank`` of ``world``."""

    rank: int = 0
    world: int = 1


ALONE = Share()


def make_generator(*key: int) -> torch.Generator:
    """A generator that depends on the numbers, each at least 0, alone."""
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


def steps_of(count: int, batch_size: int, share: Share) -> int:
    """Steps of an epoch: the last batch may be smaller, but with several processes it is left out.

    Raises:
        UserError: several processes and fewer images than one batch of all of them.
    """
    if share.world == 1:
        return math.ceil(count / batch_size)
    if count < batch_size * share.world:
        raise UserError(f"{count} images are less than a batch of {batch_size} for {share.world} processes.")
    return count // (batch_size * share.world)


def epoch_order(count: int, batch_size: int, share: Share, seed: int, epoch: int, start: int) -> list[Tensor]:
    """Indices of this process's part of each batch, from step ``start`` on; ``batch_size`` is a process's."""
    order = torch.randperm(count, generator=make_generator(seed, epoch))
    whole = order.split(batch_size * share.world)[start : steps_of(count, batch_size, share)]
    return [batch[share.rank * batch_size : (share.rank + 1) * batch_size] for batch in whole]


@dataclasses.dataclass(frozen=True)
class MemoryBatches:
    """Batches of images that are held in memory.

    Attributes:
        images: all of them.
        batch_size: of one process.
        seed: of order and augmentation.
        augment: maps images (B, C, H, W) of bytes, given a generator.
        share: which process this is.
    """

    images: Images
    batch_size: int
    seed: int
    augment: Augment | None = None
    share: Share = ALONE

    def __len__(self) -> int:
        return steps_of(len(self.images), self.batch_size, self.share)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from step ``start`` on."""
        order = epoch_order(len(self.images), self.batch_size, self.share, self.seed, epoch, start)
        for step, indices in enumerate(order, start):
            pixels = self.images.pixels[indices]
            if self.augment is not None:
                pixels = self.augment(pixels, make_generator(self.seed, epoch, step, self.share.rank))
            yield pixels, self.images.labels[indices]


@dataclasses.dataclass(frozen=True)
class FolderBatches:
    """Batches of an ImageFolder, decoded and augmented by worker processes; ``size`` pixels a side."""

    folder: ImageFolder
    batch_size: int
    seed: int
    size: int = 224
    workers: int = 0
    share: Share = ALONE

    def __len__(self) -> int:
        return steps_of(len(self.folder), self.batch_size, self.share)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from step ``start`` on."""
        order = epoch_order(len(self.folder), self.batch_size, self.share, self.seed, epoch, start)
        images = _Cropped(self.folder, self.size, (self.seed, epoch))
        yield from _loader(images, [indices.tolist() for indices in order], self.workers)


def evaluation_batches(
    images: Images | ImageFolder, size: int, workers: int, share: Share
) -> Iterator[Batch]:
    """Every world-th image once, in order, in batches of 250; those of a folder cropped to their middle."""
    mine = range(share.rank, len(images), share.world)
    batches = [list(mine[first : first + 250]) for first in range(0, len(mine), 250)]
    if isinstance(images, ImageFolder):
        yield from _loader(_Cropped(images, size, None), batches, workers)
    else:
        yield from ((images.pixels[batch], images.labels[batch]) for batch in batches)


def _loader(images: _Cropped, batches: list[list[int]], workers: int) -> Iterator[Batch]:
    loader = torch.utils.data.DataLoader(
        images,
        batch_sampler=batches,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        # of its own: with every epoch begun, one resumed too, it draws a seed for workers, which use none
        generator=torch.Generator(),
    )
    try:
        yield from loader
    except UserError as error:
        # a worker's comes with the traceback in front of what the user can mend
        raise UserError(str(error).rpartition(f"{UserError.__name__}: ")[2].strip()) from None


@dataclasses.dataclass(frozen=True)
class _Cropped(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Images of one size: a random part, which depends on ``key`` and the image, or the middle (no key)."""

    folder: ImageFolder
    size: int
    key: tuple[int, int] | None

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.folder[index]
        if self.key is None:
            return center_crop(image, self.size), label
        return random_resized_crop_and_flip(image, self.size, make_generator(*self.key, index)), label
