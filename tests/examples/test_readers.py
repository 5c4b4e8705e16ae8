"""examples.data: each reader on files written here, and what it says of files that are missing or damaged."""

from __future__ import annotations

import gzip
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from idx_files import idx, write_fashion_mnist
from image_folders import write_image_folder

from examples import data
from ghl_kernels.demo.errors import UserError


def write_cifar(root: Path, classes: int = 10, count: int = 4) -> np.ndarray:
    """Batches of random images as the archives have them; the training images (images, 3072)."""
    generator = np.random.default_rng(0)
    files = [f"data_batch_{i}" for i in range(1, 6)] if classes == 10 else ["train"]
    key = b"labels" if classes == 10 else b"fine_labels"
    root.mkdir(parents=True, exist_ok=True)
    written = []
    for file in (*files, "test_batch" if classes == 10 else "test"):
        written.append(generator.integers(0, 256, (count, 3072), dtype=np.uint8))
        labels = generator.integers(0, classes, count).tolist()
        (root / file).write_bytes(pickle.dumps({b"data": written[-1], key: labels}, protocol=2))
    return np.concatenate(written[:-1])


def test_mnist_plain_and_compressed(tmp_path: Path) -> None:
    write_fashion_mnist(tmp_path)
    plain = data.mnist(tmp_path)
    for path in list(tmp_path.iterdir()):
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    compressed = data.mnist(tmp_path)
    assert plain.train.pixels.shape == (40, 1, 8, 8)
    assert plain.train.pixels.dtype == torch.uint8
    assert torch.equal(plain.train.pixels, compressed.train.pixels)
    assert torch.equal(plain.test.labels, compressed.test.labels)


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("inner", [True, False])
def test_cifar(tmp_path: Path, classes: int, inner: bool) -> None:
    folder = {10: "cifar-10-batches-py", 100: "cifar-100-python"}[classes]
    pixels = write_cifar(tmp_path / folder if inner else tmp_path, classes)
    found = data.cifar(tmp_path, classes)
    assert np.array_equal(found.train.pixels.flatten(1).numpy(), pixels)
    assert (len(found.test), found.classes) == (4, classes)


def test_statistics_are_those_of_the_pixels(tmp_path: Path) -> None:
    pixels = write_cifar(tmp_path).reshape(-1, 3, 1024) / 255.0
    found = data.cifar(tmp_path)
    assert found.mean == pytest.approx(pixels.mean((0, 2)))
    assert found.std == pytest.approx(pixels.std((0, 2)))


def test_image_folder(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    for name in ("zebra", "ant"):
        (tmp_path / name).mkdir()
        image.fromarray(pixels).save(tmp_path / name / "1.png")
    (tmp_path / "ant" / "notes.txt").write_text("no image")
    folder = data.ImageFolder(tmp_path)
    found, label = folder[1]
    assert (folder.classes, len(folder), label) == (["ant", "zebra"], 2, 1)
    assert np.array_equal(found.permute(1, 2, 0).numpy(), pixels)
    (tmp_path / "ant" / "1.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="decode"):
        folder[0]


def test_synthetic_repeats_and_can_be_told_apart() -> None:
    first, second = (data.synthetic((3, 8, 8), 4, 200) for _ in range(2))
    assert torch.equal(first.train.pixels, second.train.pixels)
    assert len(first.test) == 20
    quarters = first.train.pixels.double().unflatten(2, (2, 4)).unflatten(4, (2, 4)).mean((3, 5)).flatten(1)
    means = torch.stack([quarters[first.train.labels == i].mean(0) for i in range(4)])
    assert (torch.cdist(quarters, means).argmin(1) == first.train.labels).float().mean() > 0.9


def test_hold_out_takes_the_last_training_images() -> None:
    whole = data.synthetic((1, 4, 4), 2, 30)
    held = data.hold_out(whole, 10)
    assert torch.equal(held.test.pixels, whole.train.pixels[20:])
    assert len(held.train) == 20
    for count in (0, 30):
        with pytest.raises(ValueError, match="got"):
            data.hold_out(whole, count)


def test_digests_tell_data_apart(tmp_path: Path) -> None:
    images = data.synthetic((1, 4, 4), 2, 30).train
    others = (images[1:], data.Images(255 - images.pixels, images.labels))
    others += (data.Images(images.pixels, 1 - images.labels), data.Images(images.pixels.mT, images.labels))
    assert len({found.digest() for found in (images, *others)}) == 5
    assert images.digest() == data.Images(images.pixels.clone(), images.labels).digest()
    write_image_folder(tmp_path / "here")
    write_image_folder(tmp_path / "there" / "here")
    write_image_folder(tmp_path / "other", count=2)
    here, moved, other = (
        data.ImageFolder(tmp_path / path).digest() for path in ("here", "there/here", "other")
    )
    assert here == moved != other


def test_missing_folders_say_what_is_expected_and_where_it_comes_from(tmp_path: Path) -> None:
    pytest.importorskip("PIL.Image")
    absent = tmp_path / "absent"
    for read, expected in (
        (data.mnist, "train-images-idx3-ubyte.*dataset-fashion-mnist"),
        (data.cifar, "data_batch_1.*cs.toronto.edu"),
        (data.ImageFolder, "folder per class.*image-net"),
    ):
        with pytest.raises(UserError, match=f"does not exist.*{expected}"):
            read(absent)
    with pytest.raises(UserError, match="no images"):
        data.ImageFolder(tmp_path)
    with pytest.raises(ValueError, match="got 20"):
        data.cifar(tmp_path, 20)


class Hostile:
    """A pickle that would run a command when read."""

    def __reduce__(self) -> tuple[object, ...]:
        return print, ("ran",)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"damaged",
        pickle.dumps({b"data": np.zeros((1, 3072), np.uint8)}),
        pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [1]}, 2),
        pickle.dumps({b"data": Hostile(), b"labels": [1]}, 2),
    ],
)
def test_damaged_cifar_batches(tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    write_cifar(tmp_path)
    (tmp_path / "data_batch_3").write_bytes(content)
    with pytest.raises(UserError, match="data_batch_3"):
        data.cifar(tmp_path)
    assert capsys.readouterr().out == ""
    (tmp_path / "data_batch_3").unlink()
    with pytest.raises(UserError, match=r"data_batch_3 cannot be read.*cs\.toronto\.edu"):
        data.cifar(tmp_path)


def test_labels_and_pixels_that_cannot_be_learned(tmp_path: Path) -> None:
    images = data.Images(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.tensor([0, 5]))
    with pytest.raises(UserError, match="labels from 0 to 5"):
        data.make_dataset("x", images, images, 3)
    with pytest.raises(UserError, match="equal"):
        data.make_dataset("x", images, images, 6)
    with pytest.raises(UserError, match="no images"):
        data.make_dataset("x", images[:0], images, 6)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(np.zeros((1, 4, 4))))
    with pytest.raises(UserError, match="train-labels-idx1-ubyte"):
        data.mnist(tmp_path)
