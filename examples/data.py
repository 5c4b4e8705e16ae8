"""Images from local folders, in the formats in which people have them.

    mnist         four idx files, plain or .gz (MNIST, Fashion-MNIST, KMNIST, EMNIST digits)
    cifar         the "python version" of CIFAR-10 and CIFAR-100
    ImageFolder   train/CLASS/*.jpg and val/CLASS/*.jpg, as ImageNet is kept; decoding needs Pillow
    synthetic     random images of any shape, with a class-dependent tint that can be learned

Nothing is downloaded.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ghl_kernels.demo.data import FASHION_MNIST_ROOT, read_pair
from ghl_kernels.demo.errors import UserError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp"})
CIFAR_SOURCE = "the python version from https://www.cs.toronto.edu/~kriz/cifar.html"


@dataclasses.dataclass(frozen=True)
class Images:
    """Images (count, channels, height, width) of unsigned bytes and labels (count,) in int64."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, kept: slice) -> Images:
        return Images(self.pixels[kept], self.labels[kept])

    def digest(self) -> str:
        """A hash of pixels and labels: tells whether a resumed run has its data again."""
        found = hashlib.sha256(repr(tuple(self.pixels.shape)).encode())
        for values in (self.pixels, self.labels):
            found.update(values.contiguous().numpy().data)
        return found.hexdigest()


def short(value: object) -> object:
    """The first digits of a digest, which tell it from others; another value as it is."""
    is_digest = isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value)
    return value[:12] if is_digest else value


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Images to train and to test on; mean and deviation of the training pixels / 255, by channel."""

    name: str
    train: Images
    test: Images
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def make_dataset(name: str, train: Images, test: Images, classes: int) -> Dataset:
    """A data set with the statistics of its training pixels.

    Raises:
        UserError: no images, a label outside of the classes, or a channel whose pixels are all equal.
    """
    for images in (train, test):
        if not len(images):
            raise UserError(f"{name} has no images.")
        low, high = int(images.labels.min()), int(images.labels.max())
        if low < 0 or high >= classes:
            raise UserError(f"{name} has labels from {low} to {high}; they must be 0 to {classes - 1}.")
    mean, std = _statistics(train.pixels)
    if min(std) == 0.0:
        raise UserError(f"All training pixels of a channel of {name} are equal: there is nothing to learn.")
    return Dataset(name, train, test, classes, mean, std)


def _statistics(pixels: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of pixels / 255 by channel: exact, from how often each of the 256 values occurs."""
    values = torch.arange(256, dtype=torch.float64) / 255
    means, deviations = [], []
    for channel in pixels.unbind(1):
        share = torch.bincount(channel.flatten(), minlength=256).double() / channel.numel()
        mean = share @ values
        means.append(float(mean))
        deviations.append(float((share @ (values - mean).square()).sqrt()))
    return tuple(means), tuple(deviations)


def hold_out(data: Dataset, count: int) -> Dataset:
    """Test on the last ``count`` training images, which then do not train: the way to choose settings.

    Raises:
        ValueError: not from 1 to one less than the training images.
    """
    if not 1 <= count < len(data.train):
        raise ValueError(f"count must be from 1 to {len(data.train) - 1}, got {count}")
    return make_dataset(data.name, data.train[:-count], data.train[-count:], data.classes)


def limit(data: Dataset, train: int | None = None, test: int | None = None) -> Dataset:
    """Only the first so many images."""
    return make_dataset(data.name, data.train[:train], data.test[:test], data.classes)


def mnist(root: Path = FASHION_MNIST_ROOT, name: str = "fashion-mnist") -> Dataset:
    """The files ``{train,t10k}-{images-idx3,labels-idx1}-ubyte``, plain or .gz: one channel, ten classes.

    Raises:
        UserError: no such folder or file, or one that is not what it should be.
    """
    require_folder(
        root,
        "the idx files train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and "
        "t10k-labels-idx1-ubyte, plain or .gz",
        "Debian's dataset-fashion-mnist or https://github.com/zalandoresearch/fashion-mnist",
    )
    parts = []
    for prefix in ("train", "t10k"):
        pixels, labels = read_pair(root, prefix)
        parts.append(Images(torch.from_numpy(pixels.copy()).unsqueeze(1), _labels(labels)))
    return make_dataset(name, *parts, classes=10)


def cifar(root: Path, classes: int = 10) -> Dataset:
    """CIFAR-10 or CIFAR-100: (count, 3, 32, 32).

    Args:
        root: the folder of the batches, or the one in which the archive was unpacked.
        classes: 10, or 100 (the fine labels).

    Raises:
        ValueError: other classes.
        UserError: no such folder or file, or one that is not what it should be.
    """
    if classes not in (10, 100):
        raise ValueError(f"classes must be 10 or 100, got {classes}")
    small = classes == 10
    inner = root / ("cifar-10-batches-py" if small else "cifar-100-python")
    folder = inner if inner.is_dir() else root
    train = [f"data_batch_{i}" for i in range(1, 6)] if small else ["train"]
    test = "test_batch" if small else "test"
    require_folder(folder, ", ".join((*train, test)), CIFAR_SOURCE)
    key = b"labels" if small else b"fine_labels"
    parts = [_read_cifar(folder / file, key) for file in train]
    together = Images(torch.cat([p.pixels for p in parts]), torch.cat([p.labels for p in parts]))
    return make_dataset(f"cifar-{classes}", together, _read_cifar(folder / test, key), classes)


class _ArrayUnpickler(pickle.Unpickler):
    """Reads arrays, strings and containers, and refuses everything that a pickle could run besides."""

    _RECONSTRUCT = np.empty(0).__reduce__()[0]

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return self._RECONSTRUCT
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def _read_cifar(path: Path, key: bytes) -> Images:
    try:
        batch = _ArrayUnpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()
        pixels = np.asarray(batch[b"data"])
        labels = np.asarray(batch[key])
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}); get {CIFAR_SOURCE}.") from None
    # a damaged pickle raises nearly anything
    except Exception as error:
        raise UserError(f"{path} is not a CIFAR batch with {key.decode()}: {error!r}.") from None
    if pixels.dtype != np.uint8 or pixels.shape != (len(labels), 3072):
        raise UserError(
            f"{path} has images of {pixels.dtype} in shape {pixels.shape} and {len(labels)} labels; expected "
            "bytes in shape (labels, 3072)."
        )
    return Images(torch.from_numpy(pixels.copy()).view(-1, 3, 32, 32), _labels(labels))


def _labels(labels: np.ndarray) -> Tensor:
    return torch.from_numpy(labels.astype(np.int64))


def synthetic(
    shape: tuple[int, int, int], classes: int, train: int, test: int | None = None, seed: int = 0
) -> Dataset:
    """Noise with a tint by class: (count, *shape), shape (channels, height, width).

    It is no data set to compare methods on. It has the shapes of a real one, and a loss that falls when
    training works.

    Args:
        shape: channels, height, width.
        classes: label i has its own sign pattern over the channels and the four quarters of the image.
        train, test: images; ``test`` is a tenth of ``train``, at least one, when not given.
        seed: of images and labels.
    """
    generator = torch.Generator().manual_seed(seed)
    tints = torch.randint(0, 2, (classes, shape[0], 2, 2), generator=generator, dtype=torch.uint8)
    parts = []
    for count in (train, max(1, train // 10) if test is None else test):
        labels = torch.randint(0, classes, (count,), generator=generator)
        pixels = torch.randint(0, 192, (count, *shape), dtype=torch.uint8, generator=generator)
        rows, columns = (torch.arange(size) * 2 // size for size in shape[1:])
        parts.append(Images(pixels.add_(64 * tints[labels][:, :, rows][:, :, :, columns]), labels))
    return make_dataset("synthetic", *parts, classes=classes)


class ImageFolder(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Images below ``root/CLASS/``, decoded when asked for: (3, height, width) of bytes, and the class.

    Classes are the sorted names of the folders, and the images of a class are sorted by name.

    Raises:
        UserError: Pillow is missing, there is no such folder, or no image below it; when an image is read,
            a file that does not decode.
    """

    def __init__(self, root: Path) -> None:
        _import_pillow()
        require_folder(root, "a folder per class with its images", "https://image-net.org/download.php")
        self.root = root
        self.classes = sorted(path.name for path in root.iterdir() if path.is_dir())
        self.samples = [
            (path, label)
            for label, name in enumerate(self.classes)
            for path in sorted((root / name).rglob("*"))
            if path.suffix.lower() in SUFFIXES
        ]
        if not self.samples:
            raise UserError(f"{root} has no images ({', '.join(sorted(SUFFIXES))}) in folders of classes.")

    def __len__(self) -> int:
        return len(self.samples)

    def digest(self) -> str:
        """A hash of the images' names below the root: the same where the folder was moved, or mounted."""
        prefix = len(str(self.root))
        names = "\n".join(str(path)[prefix:] for path, _ in self.samples)
        return hashlib.sha256(names.encode(errors="surrogateescape")).hexdigest()

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.samples[index]
        try:
            with _import_pillow().open(path) as image:
                pixels = np.array(image.convert("RGB"))
        except OSError as error:
            raise UserError(f"{path} is not an image that Pillow can decode: {error}.") from None
        return torch.from_numpy(pixels).permute(2, 0, 1), label


def _import_pillow() -> Any:
    try:
        from PIL import Image
    except ModuleNotFoundError:
        raise UserError(
            "Reading image files needs Pillow, which is not installed; pip install pillow."
        ) from None
    return Image


def require_folder(root: Path, files: str, source: str) -> None:
    """UserError unless ``root`` is a folder; says what belongs into it and where to get that."""
    if not root.is_dir():
        state = "is not a folder" if root.exists() else "does not exist"
        raise UserError(f"{root} {state}; expected there: {files}. Get them from {source}.")
