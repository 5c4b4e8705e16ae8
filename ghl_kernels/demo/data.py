"""Real images for the demo: scikit-learn's digits, or Fashion-MNIST from idx files on disk.

Nothing is downloaded. The idx format (http://yann.lecun.com/exdb/mnist/) is a big-endian header, two
zero bytes, the element type, the number of dimensions and one 32-bit size each, followed by the elements.
"""

from __future__ import annotations

import dataclasses
import gzip
import math
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from .errors import UserError

FASHION_MNIST_ROOT = Path("/usr/share/datasets/fashion-mnist")  # where Debian's dataset-fashion-mnist puts it

_UNSIGNED_BYTE = 0x08
_CLASSES = 10
_DIGITS_TRAINING_IMAGES = 1000
_VALIDATION_SHARE = 0.25


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Standardized images (count, 1, height, width) in float32 and labels (count,) in int64."""

    name: str
    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    classes: int = _CLASSES

    @property
    def image_size(self) -> str:
        """Height and width, as "28x28"."""
        return "x".join(map(str, self.train_images.shape[2:]))


@dataclasses.dataclass(frozen=True)
class _Raw:
    train_images: npt.NDArray[np.float32]
    train_labels: npt.NDArray[np.int64]
    test_images: npt.NDArray[np.float32]
    test_labels: npt.NDArray[np.int64]


def load(name: str, root: Path | None = None, limit: int | None = None, validation: bool = False) -> Dataset:
    """Read a data set and standardize it by the mean and deviation of its training pixels.

    Args:
        name: ``"digits"`` (1797 images of 8x8; the first 1000 train, the other 797 test) or
            ``"fashion-mnist"`` (28x28; 60,000 train, 10,000 test).
        root: folder with the four idx files, plain or ``.gz``; fashion-mnist only.
        limit: keep only the first so many training and test images.
        validation: test on the last quarter of the training images, which then do not train, and
            leave the test images alone. This is how the presets were chosen.

    Raises:
        UserError: a missing package, folder or file, or a file that is not what it should be.
    """
    raw = _read_digits() if name == "digits" else _read_fashion_mnist(root or FASHION_MNIST_ROOT)
    if validation:
        raw = _hold_out_training_images(raw)
    kept = slice(limit)
    mean, deviation = float(raw.train_images[kept].mean()), float(raw.train_images[kept].std())
    if deviation == 0.0:
        raise UserError(f"All training pixels of {name} are equal ({mean:g}), so there is nothing to learn.")
    return Dataset(
        name,
        _standardize(raw.train_images[kept], mean, deviation),
        torch.from_numpy(raw.train_labels[kept]),
        _standardize(raw.test_images[kept], mean, deviation),
        torch.from_numpy(raw.test_labels[kept]),
    )


def read_idx(path: Path, dimensions: int) -> npt.NDArray[np.uint8]:
    """Read an idx file of unsigned bytes, plain or gzip-compressed, of so many dimensions.

    Raises:
        UserError: the file cannot be read or decompressed, is not idx, has another element type or
            number of dimensions, or is longer or shorter than its header says.
    """
    content = _read_bytes(path)
    header = 4 + 4 * dimensions
    if content[:2] != b"\x00\x00"[: len(content)]:
        raise UserError(f"{path} is not an idx file: it starts with 0x{content[:4].hex()}, not with 0x0000.")
    if len(content) < header:
        raise UserError(f"{path} is truncated: the idx header needs {header} bytes, it has {len(content)}.")
    if content[2] != _UNSIGNED_BYTE:
        raise UserError(f"{path} holds elements of type 0x{content[2]:02x}; only bytes (0x08) are expected.")
    if content[3] != dimensions:
        raise UserError(f"{path} has {content[3]} dimensions where {dimensions} are expected.")
    shape = tuple(int(size) for size in np.frombuffer(content, ">u4", dimensions, offset=4))
    expected = header + math.prod(shape)
    if len(content) != expected:
        state = "truncated" if len(content) < expected else "too long"
        elements = " x ".join(map(str, shape))
        raise UserError(
            f"{path} is {state}: {elements} elements need {expected} bytes, it has {len(content)}."
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _read_bytes(path: Path) -> bytes:
    try:
        if path.suffix == ".gz":
            with gzip.open(path) as file:
                return file.read()
        return path.read_bytes()
    except EOFError:
        raise UserError(f"{path} is truncated: the compressed data ends before its end mark.") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path} is corrupt: {error}.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from None


def read_pair(root: Path, prefix: str) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Images (count, height, width) and labels (count,) of ``PREFIX-images-idx3-ubyte`` and its partner.

    Raises:
        UserError: a file is missing or not what it should be, or the two do not belong together.
    """
    images_path = _find(root, f"{prefix}-images-idx3-ubyte")
    labels_path = _find(root, f"{prefix}-labels-idx1-ubyte")
    images, labels = read_idx(images_path, 3), read_idx(labels_path, 1)
    if len(images) != len(labels):
        raise UserError(f"{images_path} has {len(images)} images and {labels_path} has {len(labels)} labels.")
    if not len(images):
        raise UserError(f"{images_path} has no images.")
    if min(images.shape[1:]) < 4:
        raise UserError(f"{images_path} has images of {_size(images)}; 4x4 is the smallest allowed.")
    if labels.max() >= _CLASSES:
        raise UserError(f"{labels_path} has the label {labels.max()}; labels are 0 to {_CLASSES - 1}.")
    return images, labels


def _size(images: npt.NDArray[np.uint8]) -> str:
    return "x".join(map(str, images.shape[1:]))


def _find(root: Path, stem: str) -> Path:
    candidates = (root / stem, root / f"{stem}.gz")
    for path in candidates:
        if path.is_file():
            return path
    raise UserError(f"{root} has neither {candidates[0].name} nor {candidates[1].name}.")


def _read_fashion_mnist(root: Path) -> _Raw:
    if not root.is_dir():
        state = "is not a folder" if root.exists() else "does not exist"
        raise UserError(
            f"{root} {state}; install Debian's dataset-fashion-mnist or give the idx files' folder by --root."
        )
    train_images, train_labels = read_pair(root, "train")
    test_images, test_labels = read_pair(root, "t10k")
    if train_images.shape[1:] != test_images.shape[1:]:
        raise UserError(
            f"The training images of {root} are {_size(train_images)}, its test images {_size(test_images)}."
        )
    return _Raw(
        train_images.astype(np.float32),
        train_labels.astype(np.int64),
        test_images.astype(np.float32),
        test_labels.astype(np.int64),
    )


def _read_digits() -> _Raw:
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError:
        raise UserError(
            "The digits come with scikit-learn, which is not installed; pip install scikit-learn, "
            "or use --data fashion-mnist."
        ) from None
    digits = load_digits()
    images = digits.images.astype(np.float32)
    labels = digits.target.astype(np.int64)
    cut = _DIGITS_TRAINING_IMAGES
    return _Raw(images[:cut], labels[:cut], images[cut:], labels[cut:])


def _hold_out_training_images(raw: _Raw) -> _Raw:
    cut = len(raw.train_images) - max(1, round(len(raw.train_images) * _VALIDATION_SHARE))
    images, labels = raw.train_images, raw.train_labels
    return _Raw(images[:cut], labels[:cut], images[cut:], labels[cut:])


def _standardize(images: npt.NDArray[np.float32], mean: float, deviation: float) -> torch.Tensor:
    return torch.from_numpy((images - np.float32(mean)) / np.float32(deviation)).unsqueeze(1)
