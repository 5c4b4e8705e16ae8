"""examples.batches and examples.augment: order, shares, resuming in the middle, and what crops contain."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from image_folders import write_image_folder

from examples import augment, data
from examples.batches import FolderBatches, MemoryBatches, Share, evaluation_batches, make_generator
from ghl_kernels.demo.errors import UserError

IMAGES = data.synthetic((3, 8, 8), 4, 50).train


def crop(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return augment.random_crop_and_flip(images, 2, generator)


def test_an_epoch_from_a_step_on_is_the_rest_of_the_epoch() -> None:
    batches = MemoryBatches(IMAGES, 8, seed=3, augment=crop)
    whole, rest = list(batches.epoch(1)), list(batches.epoch(1, 4))
    assert len(whole) == len(batches) == 7
    assert len(rest) == 3
    for (x, y), (x2, y2) in zip(whole[4:], rest, strict=True):
        assert torch.equal(x, x2)
        assert torch.equal(y, y2)
    assert not torch.equal(whole[0][0], next(batches.epoch(2))[0])


def test_processes_share_each_batch() -> None:
    one = list(MemoryBatches(IMAGES, 12, seed=0).epoch(0))
    two = [list(MemoryBatches(IMAGES, 6, seed=0, share=Share(rank, 2)).epoch(0)) for rank in range(2)]
    for (whole, _), (left, _), (right, _) in zip(one[:4], *two, strict=True):
        assert torch.equal(whole, torch.cat([left, right]))
    with pytest.raises(UserError, match="less than a batch"):
        len(MemoryBatches(IMAGES, 26, seed=0, share=Share(0, 2)))


def test_every_image_is_tested_once() -> None:
    shares = [[y for _, y in evaluation_batches(IMAGES, 8, 0, Share(rank, 3))] for rank in range(3)]
    assert sum(len(y) for labels in shares for y in labels) == len(IMAGES)
    assert torch.equal(shares[1][0], IMAGES.labels[1::3])


def test_workers_change_no_bit(tmp_path: Path) -> None:
    write_image_folder(tmp_path)
    folder = data.ImageFolder(tmp_path)
    alone, helped = (list(FolderBatches(folder, 4, 0, 16, workers).epoch(0)) for workers in (0, 1))
    assert [x.shape for x, _ in alone] == [(4, 3, 16, 16), (2, 3, 16, 16)]
    for (x, y), (x2, y2) in zip(alone, helped, strict=True):
        assert torch.equal(x, x2)
        assert torch.equal(y, y2)
    (x, y), *_ = evaluation_batches(folder, 16, 0, Share())
    assert x.shape == (6, 3, 16, 16)
    assert y.tolist() == [0, 0, 0, 1, 1, 1]


def test_a_resumed_epoch_draws_nothing_from_the_default_generator(tmp_path: Path) -> None:
    """A network's dropout would otherwise go on from another number than in the run that was not stopped."""
    write_image_folder(tmp_path)
    before = torch.get_rng_state()
    list(FolderBatches(data.ImageFolder(tmp_path), 4, 0, 16).epoch(0, start=1))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_one_line(tmp_path: Path, workers: int) -> None:
    write_image_folder(tmp_path)
    (tmp_path / "b" / "1.png").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"^\S+1\.png is not an image.*\.$") as caught:
        list(FolderBatches(data.ImageFolder(tmp_path), 4, 0, 16, workers).epoch(0))
    assert "\n" not in str(caught.value)


def test_a_crop_is_a_shifted_image_or_its_mirror() -> None:
    images = IMAGES.pixels
    cropped = augment.random_crop_and_flip(images, 2, make_generator(0))
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
    shifted = [padded[:, :, i : i + 8, j : j + 8] for i in range(5) for j in range(5)]
    candidates = torch.stack([*shifted, *(x.flip(3) for x in shifted)])
    matches = (candidates == cropped).flatten(2).all(2)
    assert matches.any(0).all()
    assert 0.2 < matches[25:].any(0).float().mean() < 0.8


@pytest.mark.parametrize("shape", [(40, 30), (5, 200), (200, 5), (1, 1)])
def test_resized_crops_have_the_size_and_the_range(shape: tuple[int, int]) -> None:
    image = torch.randint(100, 151, (3, *shape), dtype=torch.uint8)
    for i in range(5):
        part = augment.random_resized_crop_and_flip(image, 12, make_generator(i))
        assert part.shape == (3, 12, 12)
        assert part.min() >= 100
        assert part.max() <= 150
    assert augment.center_crop(image, 12).shape == (3, 12, 12)


def test_center_crop_of_a_large_enough_share_is_the_middle() -> None:
    image = torch.arange(12 * 8, dtype=torch.uint8).view(1, 12, 8)
    assert torch.equal(augment.center_crop(image, 8, share=1.0), image[:, 2:10])


def test_standardize() -> None:
    x = augment.standardize(IMAGES.pixels, (0.5, 0.4, 0.3), (0.1, 0.2, 0.3))
    mean, std = torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1), torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)
    torch.testing.assert_close(x, (IMAGES.pixels / 255 - mean) / std)
