"""The demo's data: idx files good and bad, and what loading makes of them."""

from __future__ import annotations

import gzip
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from idx_files import idx, write_fashion_mnist

from ghl_kernels.demo import data
from ghl_kernels.demo.errors import UserError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_fashion_mnist(tmp_path)
    return tmp_path


def refusal(pattern: str) -> pytest.RaisesExc[UserError]:
    return pytest.raises(UserError, match=pattern)


def test_read_idx_returns_the_elements_plain_and_compressed(tmp_path: Path) -> None:
    images = np.arange(2 * 3 * 5).reshape(2, 3, 5)
    plain, compressed = tmp_path / "images", tmp_path / "images.gz"
    plain.write_bytes(idx(images))
    compressed.write_bytes(gzip.compress(idx(images)))
    np.testing.assert_array_equal(data.read_idx(plain, 3), images)
    np.testing.assert_array_equal(data.read_idx(compressed, 3), images)


GOOD = idx(np.zeros((2, 3, 4)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated: the idx header needs 16 bytes, it has 0"),
        (GOOD[:1], "truncated: the idx header needs 16 bytes, it has 1"),
        (GOOD[:10], "truncated: the idx header needs 16 bytes, it has 10"),
        (GOOD[:-1], "truncated: 2 x 3 x 4 elements need 40 bytes, it has 39"),
        (GOOD + b"\0", "too long: 2 x 3 x 4 elements need 40 bytes, it has 41"),
        (b"PNG, not idx at all", "not an idx file: it starts with 0x504e472c"),
        (GOOD[:2] + b"\x0d" + GOOD[3:], "elements of type 0x0d; only bytes"),
        (idx(np.zeros((4, 6))) + b"\0" * 8, "2 dimensions where 3 are expected"),
        (struct.pack(">HBB3I", 0, 8, 3, 2**32 - 1, 2**32 - 1, 2**32 - 1), "is truncated: 4294967295 x"),
    ],
    ids=["empty", "one-byte", "header", "elements", "long", "not-idx", "type", "dimensions", "huge-sizes"],
)
@pytest.mark.parametrize("compress", [False, True], ids=["plain", "gz"])
def test_read_idx_refuses_a_bad_file(tmp_path: Path, content: bytes, message: str, compress: bool) -> None:
    path = tmp_path / ("images.gz" if compress else "images")
    path.write_bytes(gzip.compress(content) if compress else content)
    with refusal(f"{re.escape(str(path))}.*{message}"):
        data.read_idx(path, 3)


def test_read_idx_refuses_damaged_compression(tmp_path: Path) -> None:
    path = tmp_path / "images.gz"
    whole = gzip.compress(idx(np.random.default_rng(0).integers(0, 256, (50, 8, 8))))
    path.write_bytes(whole[: len(whole) // 2])
    with refusal("truncated: the compressed data ends"):
        data.read_idx(path, 3)
    path.write_bytes(b"not compressed at all")
    with refusal("is corrupt"):
        data.read_idx(path, 3)
    path.write_bytes(whole[:-8] + bytes(byte ^ 0xFF for byte in whole[-8:-4]) + whole[-4:])
    with refusal("is corrupt: CRC check failed"):
        data.read_idx(path, 3)
    damaged = bytearray(whole)
    damaged[10] ^= 0xFF  # the first byte of the compressed stream
    path.write_bytes(damaged)
    with refusal("is corrupt"):
        data.read_idx(path, 3)


def test_read_idx_refuses_what_cannot_be_read(tmp_path: Path) -> None:
    with refusal("cannot be read: No such file"):
        data.read_idx(tmp_path / "absent", 3)
    with refusal("cannot be read: Is a directory"):
        data.read_idx(tmp_path, 3)


def test_load_standardizes_by_the_training_images(root: Path) -> None:
    loaded = data.load("fashion-mnist", root)
    raw = data.read_idx(root / "train-images-idx3-ubyte", 3).astype(np.float64)
    raw_test = data.read_idx(root / "t10k-images-idx3-ubyte", 3).astype(np.float64)
    assert loaded.train_images.shape == (40, 1, 8, 8)
    assert loaded.train_images.dtype == torch.float32
    assert loaded.test_labels.dtype == torch.int64
    expected = (raw_test - raw.mean()) / raw.std()
    np.testing.assert_allclose(loaded.test_images[:, 0].numpy(), expected, rtol=1e-5, atol=1e-5)
    labels = data.read_idx(root / "train-labels-idx1-ubyte", 1)
    np.testing.assert_array_equal(loaded.train_labels.numpy(), labels)


def test_load_prefers_neither_form_over_a_missing_one(root: Path) -> None:
    plain = root / "train-images-idx3-ubyte"
    expected = data.load("fashion-mnist", root).train_images
    (root / f"{plain.name}.gz").write_bytes(gzip.compress(plain.read_bytes()))
    plain.unlink()
    assert torch.equal(data.load("fashion-mnist", root).train_images, expected)


def test_limit_keeps_the_first_images(root: Path) -> None:
    everything, few = data.load("fashion-mnist", root), data.load("fashion-mnist", root, limit=7)
    assert torch.equal(few.train_labels, everything.train_labels[:7])
    assert torch.equal(few.test_labels, everything.test_labels[:7])
    assert float(few.train_images.mean()) == pytest.approx(0.0, abs=1e-5)
    assert len(data.load("fashion-mnist", root, limit=1000).train_labels) == 40


def test_validation_leaves_the_test_images_alone(root: Path) -> None:
    everything = data.load("fashion-mnist", root)
    held_out = data.load("fashion-mnist", root, validation=True)
    assert torch.equal(held_out.train_labels, everything.train_labels[:30])
    assert torch.equal(held_out.test_labels, everything.train_labels[30:])


def test_digits_are_split_in_the_order_of_the_file() -> None:
    sklearn_datasets = pytest.importorskip("sklearn.datasets")
    target = sklearn_datasets.load_digits().target
    loaded = data.load("digits")
    assert loaded.image_size == "8x8"
    np.testing.assert_array_equal(loaded.train_labels.numpy(), target[:1000])
    np.testing.assert_array_equal(loaded.test_labels.numpy(), target[1000:])


def test_load_refuses_a_wrong_folder(root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    with refusal("does not exist; install Debian's dataset-fashion-mnist or give"):
        data.load("fashion-mnist", root / "absent")
    with refusal("is not a folder"):
        data.load("fashion-mnist", root / "t10k-labels-idx1-ubyte")
    with refusal("has neither train-images-idx3-ubyte nor train-images-idx3-ubyte.gz"):
        data.load("fashion-mnist", tmp_path_factory.mktemp("empty"))


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("train-labels-idx1-ubyte", np.zeros(39), "has 40 images and .* has 39 labels"),
        ("train-labels-idx1-ubyte", np.full(40, 10), "the label 10; labels are 0 to 9"),
        ("train-images-idx3-ubyte", np.ones((40, 9, 8)), "are 9x8, its test images 8x8"),
        ("train-images-idx3-ubyte", np.ones((40, 3, 8)), "images of 3x8; 4x4 is the smallest"),
        ("train-images-idx3-ubyte", np.full((40, 8, 8), 7), r"All training pixels .* are equal \(7\)"),
    ],
    ids=["count", "label", "sizes", "small", "constant"],
)
def test_load_refuses_files_that_do_not_fit(root: Path, name: str, array: np.ndarray, message: str) -> None:
    (root / name).write_bytes(idx(array))
    with refusal(message):
        data.load("fashion-mnist", root)


def test_load_refuses_a_set_without_images(root: Path) -> None:
    (root / "t10k-images-idx3-ubyte").write_bytes(idx(np.zeros((0, 8, 8))))
    (root / "t10k-labels-idx1-ubyte").write_bytes(idx(np.zeros(0)))
    with refusal("has no images"):
        data.load("fashion-mnist", root)
