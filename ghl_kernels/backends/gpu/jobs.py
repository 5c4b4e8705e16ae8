"""Layers whose sums become H, a gated gradient or a learned weight, as the kernels take them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ghl_kernels.backends import eager


class Job(NamedTuple):
    """One layer.

    A is float32 of weight's shape, moments are those of eager.new_moments in float32, weight is float32,
    bfloat16 or float16 of any strides. ``out``, of weight's shape and any strides, is what is written: H
    (float32), the gated gradient, or the weight in place. ``grad``, of any floating dtype and any strides, is
    what a gate takes the signs of; None: ``out``, in place.
    """

    A: Tensor
    moments: Tensor
    weight: Tensor
    out: Tensor
    groups: int
    decay: str
    normalize: str
    grad: Tensor | None = None

    @property
    def signs(self) -> Tensor:
        """What a gate takes the signs of."""
        return self.out if self.grad is None else self.grad


def run(jobs: Sequence[Job], launch: Callable[[list[Job]], None]) -> None:
    """Launch the prepared jobs, all of one device and of the same dtypes (weight, out, grad) at a time."""
    groups: dict[tuple[torch.device, torch.dtype, torch.dtype, torch.dtype], list[Job]] = {}
    for job in jobs:
        if job.out.numel():
            groups.setdefault((job.out.device, job.weight.dtype, job.out.dtype, job.signs.dtype), []).append(
                job
            )
    for group in groups.values():
        prepared = [_prepare(job) for job in group]
        launch(prepared)
        for job, ready in zip(group, prepared, strict=True):
            if ready.out is not job.out:
                job.out.copy_(ready.out)


def _prepare(job: Job) -> Job:
    """The job with its mixing term subtracted and the elements of all rows in out's order, without gaps."""
    A, decay = job.A, job.decay
    if decay in ("subspace", "sanger"):
        A = A - eager.mixing(job.moments, job.weight.flatten(1).to(A.dtype), job.groups, decay).view(A.shape)
        decay = "none"
    out = job.out if _is_dense(_within_row(job.out)) else job.out.contiguous()
    return Job(
        ordered_as(out, A),
        job.moments.contiguous(),
        ordered_as(out, job.weight),
        out,
        job.groups,
        decay,
        job.normalize,
        None if job.grad is None else ordered_as(out, job.grad),
    )


def _within_row(tensor: Tensor) -> tuple[tuple[int, int], ...]:
    """(stride, size) of the dimensions that a row has."""
    return _of_row(tensor.stride(), tensor.shape)


@functools.lru_cache(maxsize=4096)
def _of_row(strides: tuple[int, ...], shape: torch.Size) -> tuple[tuple[int, int], ...]:
    return tuple((stride, size) for stride, size in zip(strides[1:], shape[1:], strict=True) if size > 1)


@functools.lru_cache(maxsize=4096)
def _is_dense(row: tuple[tuple[int, int], ...]) -> bool:
    expected = 1
    for stride, size in sorted(row):
        if stride != expected:
            return False
        expected *= size
    return True


def ordered_as(model: Tensor, tensor: Tensor) -> Tensor:
    """The tensor itself where its rows are laid out as the model's, otherwise a copy that is."""
    if _within_row(tensor) == _within_row(model):
        return tensor
    strides = (math.prod(model.shape[1:]), *model.stride()[1:])
    return torch.empty_strided(model.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
