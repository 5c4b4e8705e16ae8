"""The training loop of all examples: schedule, progress, log, checkpoints, resuming."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from examples import checkpoint
from examples.augment import standardize
from examples.batches import ALONE, Batch, Batches, Share
from examples.learner import Learner
from ghl_kernels.demo.errors import UserError
from ghl_kernels.demo.output import make_folder
from ghl_kernels.demo.progress import Progress

Row = dict[str, float]


def cosine(step: int, steps: int, warmup: int = 0) -> float:
    """Share of the learning rate at a step: a line up over ``warmup`` steps, then half a cosine down to 0."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything that the loop needs besides the learner.

    Attributes:
        batches: to train on.
        test: makes the batches to test on.
        mean, std: of the pixels / 255, by channel.
        epochs: of the gradient; a learner's local epochs come before.
        folder: receives ``log.csv`` and ``checkpoint.pt``.
        settings: what decides the run; a checkpoint of other settings is refused.
        warmup: epochs in which the learning rate rises.
        checkpoint_every: steps from one checkpoint to the next, besides the one after each epoch.
        channels_last: memory format of the images.
        share: which process this is; the first one logs and saves.
        label: shown beside the bar.
    """

    batches: Batches
    test: Callable[[], Iterable[Batch]]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    epochs: int
    folder: Path
    settings: dict[str, Any]
    warmup: int = 0
    checkpoint_every: int | None = None
    channels_last: bool = False
    share: Share = ALONE
    label: str = ""


class Training:
    """A run under way.

    ``step`` counts the steps taken, ``rows`` holds epoch, loss (mean over the steps of the epoch, as they
    saw it) and test accuracy in percent of every finished epoch. With a checkpoint in the run's folder
    both, the weights, the optimizers and the random numbers are those of the checkpoint.

    Raises:
        UserError: the folder cannot be used, or its checkpoint is of another run.
    """

    def __init__(self, learner: Learner, run: Run) -> None:
        self.learner, self.run = learner, run
        self.step = 0
        self.rows: list[Row] = []
        self._loss = torch.zeros((), dtype=torch.float64, device=learner.device)
        if run.share.rank == 0:  # the only one that writes
            make_folder(run.folder)
        self._path = run.folder / "checkpoint.pt"
        state = checkpoint.load(self._path, run.settings, run.share)
        if state is not None:
            learner.load_state_dict(state["learner"])
            self.step, self.rows = state["step"], state["rows"]
            self._loss.copy_(state["loss"])

    @property
    def epochs(self) -> int:
        """Local ones and those of the gradient."""
        return self.learner.local_epochs + self.run.epochs

    def fit(self, stop_after: int | None = None) -> list[Row]:
        """Train from where the run is to its end, or for ``stop_after`` more steps; returns ``rows``.

        Raises:
            UserError: the loss is no longer finite.
            KeyboardInterrupt: Ctrl-C; the message names the checkpoint, if there is one.
        """
        try:
            return self._fit(stop_after)
        except KeyboardInterrupt:
            if not self._path.exists():
                raise
            raise KeyboardInterrupt(f"the same command goes on from {self._path}") from None

    def _fit(self, stop_after: int | None) -> list[Row]:
        steps = len(self.run.batches)
        last = self.epochs * steps if stop_after is None else self.step + stop_after
        stream = sys.stderr if self.run.share.rank == 0 else io.StringIO()
        with Progress(self.epochs * steps, stream) as progress:
            progress.advance(self.step)
            for epoch in range(self.step // steps, self.epochs):
                self._describe(progress, epoch)
                self._train(epoch, last, progress)
                if self.step < (epoch + 1) * steps:
                    break
                self._end_epoch(epoch, progress)
        return self.rows

    def _train(self, epoch: int, last: int, progress: Progress) -> None:
        """The rest of an epoch, up to step ``last``."""
        self.learner.model.train()
        for batch in self.run.batches.epoch(epoch, self.step % len(self.run.batches)):
            if self.step == last:
                return
            self._one_step(*self._place(batch))
            progress.advance()
            every = self.run.checkpoint_every
            # the last step's checkpoint is _end_epoch's: without the epoch's row it would be lost on resuming
            if every and self.step % every == 0 and self.step % len(self.run.batches):
                self.save()

    def _one_step(self, images: Tensor, labels: Tensor) -> None:
        steps, learner = len(self.run.batches), self.learner
        local = learner.local_epochs * steps
        if self.step < local:
            learner.local_step(images, cosine(self.step, local))
        else:
            share = cosine(self.step - local, self.run.epochs * steps, self.run.warmup * steps)
            self._loss += learner.step(images, labels, share)
        self.step += 1

    def _place(self, batch: Batch) -> Batch:
        pixels, labels = batch
        layout = torch.channels_last if self.run.channels_last else torch.contiguous_format
        device = self.learner.device
        images = standardize(pixels, self.run.mean, self.run.std, device, layout)
        return images, labels.to(device, non_blocking=True)

    def _end_epoch(self, epoch: int, progress: Progress) -> None:
        if epoch >= self.learner.local_epochs:
            loss = self._mean_loss()
            accuracy = self.accuracy()
            number = epoch - self.learner.local_epochs + 1
            self.rows.append({"epoch": number, "loss": loss, "accuracy": accuracy})
            progress.note(f"{self.run.label} epoch {number}: loss {loss:.3f}, accuracy {accuracy:.2f} %")
            self._loss.zero_()
        if self.run.share.rank == 0:
            write_log(self.run.folder / "log.csv", self.rows)
        self.save()

    def _mean_loss(self) -> float:
        loss = float(_sum_over_processes(self._loss, self.run.share))
        loss /= len(self.run.batches) * self.run.share.world
        if not math.isfinite(loss):
            raise UserError(
                f"{self.run.label}: the loss is {loss} after step {self.step}; lower the learning rate."
            )
        return loss

    def accuracy(self) -> float:
        """Percent of the test images whose largest logit is the label's; the model ends in eval mode."""
        model, share = self.learner.model.eval(), self.run.share
        if share.world > 1:  # the last step left each process with running statistics of its own
            for buffer in model.buffers():
                torch.distributed.broadcast(buffer, 0)
        counts = torch.zeros(2, dtype=torch.int64, device=self.learner.device)
        for batch in self.run.test():
            images, labels = self._place(batch)
            counts[0] += self.learner.correct(images, labels)
            counts[1] += len(labels)
        right, total = _sum_over_processes(counts, share).tolist()
        return 100.0 * right / total

    def save(self) -> None:
        """Write the checkpoint; every process has to call it.

        Weights and optimizers are the same in all processes. Running statistics of batch norm differ, but
        every forward pass of DistributedDataParallel starts from the first process's.
        """
        state = {"learner": self.learner.state_dict(), "step": self.step, "rows": self.rows}
        # a sum over processes, continued in one of them, would round otherwise than one never interrupted
        own = {"loss": self._loss.cpu()}
        checkpoint.save(self._path, state, own, self.run.settings, self.run.share)

    def _describe(self, progress: Progress, epoch: int) -> None:
        local = self.learner.local_epochs
        number = f"local epoch {epoch + 1}" if epoch < local else f"epoch {epoch - local + 1}"
        progress.describe(f"{self.run.label} {number}")


def _sum_over_processes(values: Tensor, share: Share) -> Tensor:
    if share.world > 1:
        torch.distributed.all_reduce(values)
    return values


def write_log(path: Path, rows: list[Row]) -> None:
    """A CSV of the rows: written anew each time, so that a resumed run has no line twice."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["epoch", "loss", "accuracy"])
        writer.writeheader()
        writer.writerows(rows)
