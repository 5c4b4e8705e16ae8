"""Training one network by one method."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import ghl_kernels as ghl

from .data import Dataset
from .methods import Method, Settings
from .model import build

_EVALUATION_BATCH = 1000


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run left: test accuracy in percent after each epoch, and the first layer's filters."""

    accuracy: list[float]
    filters_before: Tensor
    filters_after: Tensor


class Learner:
    """A network, its optimizer and the training steps of a method."""

    def __init__(self, method: Method, settings: Settings, classes: int, seed: int) -> None:
        self.method, self.settings = method, settings
        self.model = build(settings.filters, settings.kernel_size, settings.pool, classes, seed)
        self.model.train()
        if method.rule is not None:
            ghl.convert(self.model, method.rule)
        self._filter_lr = settings.learning_rates.get(method.key, 0.0)
        self._optimizer = self._make_optimizer()

    def _make_optimizer(self) -> torch.optim.SGD:
        settings, key = self.settings, self.method.key
        groups = [
            {
                "params": list(self.model.read_out.parameters()),
                "lr": settings.learning_rates["read-out"],
                "momentum": settings.read_out_momentum,
            }
        ]
        if self.method.how == "gradient":
            groups.append(
                {
                    "params": self.model.convolutions(),
                    "lr": self._filter_lr,
                    "weight_decay": settings.weight_decay.get(key, 0.0),
                }
            )
        return torch.optim.SGD(groups)

    def descend(self, images: Tensor, labels: Tensor) -> None:
        """A training step with a backward pass: of the whole network, or of the read-out alone."""
        # without filters to train there is nothing to differentiate before the read-out
        with torch.set_grad_enabled(self.method.how == "gradient"):
            features = self.model.features(images)
        self._optimizer.zero_grad()
        F.cross_entropy(self.model.read_out(features), labels).backward()
        self._optimizer.step()

    @torch.no_grad()
    def learn_filters(self, images: Tensor, share: float = 1.0) -> None:
        """A purely local step: each convolution in turn learns from its input, at a share of its rate."""
        lr, x = share * self._filter_lr, images
        for module in self.model.features:
            x = module.learn_(x, lr) if isinstance(module, ghl.GHLConv2d) else module(x)

    def step(self, images: Tensor, labels: Tensor) -> None:
        """The step that trains the filters, or the read-out's where none are trained."""
        if self.method.how == "local":
            self.learn_filters(images)
        else:
            self.descend(images, labels)

    def set_rates(self, share: float) -> None:
        """Set the learning rates of `descend` to this share of the initial ones."""
        for group in self._optimizer.param_groups:
            group["lr"] = share * group.setdefault("initial_lr", group["lr"])

    @torch.no_grad()
    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """Percent of images whose largest logit is the label's."""
        self.model.eval()
        pairs = zip(images.split(_EVALUATION_BATCH), labels.split(_EVALUATION_BATCH), strict=True)
        right = sum(int((self.model(x).argmax(1) == y).sum()) for x, y in pairs)
        self.model.train()
        return 100.0 * right / len(labels)


def train(method: Method, settings: Settings, data: Dataset, seed: int, on_epoch: Callable[[], None]) -> Run:
    """Train a network from its initial weights.

    ``seed`` decides the initial weights and the order of the images, for every method alike, so a run
    repeats bit for bit on the same machine.

    Args:
        on_epoch: called after each of ``passes(method, settings)`` passes through the training images.
    """
    learner = Learner(method, settings, data.classes, seed)
    before = learner.model.first_filters()
    if method.how == "local":
        for epoch in _epochs(settings.local_epochs, settings.batch_size, data, seed):
            for batch, share in epoch:
                learner.learn_filters(data.train_images[batch], share)
            on_epoch()
    curve = []
    for epoch in _epochs(settings.epochs, settings.batch_size, data, seed):
        for batch, share in epoch:
            learner.set_rates(share)
            learner.descend(data.train_images[batch], data.train_labels[batch])
        curve.append(learner.accuracy(data.test_images, data.test_labels))
        on_epoch()
    return Run(curve, before, learner.model.first_filters())


def passes(method: Method, settings: Settings) -> int:
    """How often `train` goes through the training images."""
    return settings.epochs + (settings.local_epochs if method.how == "local" else 0)


def _epochs(count: int, batch_size: int, data: Dataset, seed: int) -> Iterator[list[tuple[Tensor, float]]]:
    """The batches of each epoch, as indices, and their share of the learning rate: a cosine from 1 to 0."""
    order = torch.Generator().manual_seed(seed)
    images = len(data.train_images)
    steps = count * math.ceil(images / batch_size)
    shares = iter(0.5 * (1.0 + math.cos(math.pi * step / steps)) for step in range(steps))
    for _ in range(count):
        batches = torch.randperm(images, generator=order).split(batch_size)
        yield [(batch, next(shares)) for batch in batches]
