"""Random layers for the epilogue kernels of both GPU backends, what is expected of them, and how closely."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from oracle import EPS32
from torch import Tensor

from ghl_kernels.backends import eager
from ghl_kernels.backends.gpu.jobs import Job

DECAYS = ("none", "oja", "instar", "subspace", "sanger")
NORMS = ("layer", "filter", "mean", "none")
OPERATIONS = ("delta", "gate", "learn")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RATE = 0.37
_POSITIONS = 37


def random_job(
    operation: str,
    shape: Sequence[int],
    decay: str = "oja",
    normalize: str = "layer",
    *,
    dtype: torch.dtype = torch.float32,
    groups: int = 1,
) -> Job:
    """A layer of 37 positions; the first two elements of a gradient are zeros of both signs."""
    weight = (torch.randn(*shape) / math.sqrt(max(math.prod(shape[1:]), 1))).to(dtype)
    A = torch.randn(*shape)
    moments = eager.new_moments(shape[0], groups, decay, _POSITIONS, torch.float32, A.device)
    moments[:-1] = torch.randn(moments.numel() - 1)
    out = torch.full(tuple(shape), math.nan)
    if operation == "gate":
        out = torch.randn(*shape).to(dtype)
        out.view(-1)[:2] = torch.tensor([0.0, -0.0])[: out.numel()]
    elif operation == "learn":
        out = weight
    return Job(A, moments, weight, out, groups, decay, normalize)


def expected(operation: str, job: Job, dtype: torch.dtype) -> Tensor:
    """What the operation leaves in out, in torch's operators of the given dtype."""
    A, moments, weight, out = (t.to(dtype) for t in (job.A, job.moments, job.weight, job.out))
    H = eager.delta(A, moments, weight, job.groups, job.decay, job.normalize)
    if operation == "delta":
        return H
    return H.abs() * out.sign() + (out - out) if operation == "gate" else weight + RATE * H


def floor_of(operation: str, job: Job) -> Tensor:
    """Eight roundings of all that is added up, over the scale, which is rounded too."""
    A, moments, W = (t.double().abs() for t in (job.A, job.moments, job.weight))
    rows, W = A.flatten(1), W.flatten(1)
    decayed = {
        "none": lambda: torch.zeros_like(W),
        "oja": lambda: (W * rows).sum(1, keepdim=True) * W,
        "instar": lambda: moments[:-1].unsqueeze(1) * W,
    }.get(job.decay, lambda: eager.mixing(moments, W, job.groups, job.decay))()
    floor = 8 * EPS32 * (rows + decayed)
    exact = [t.double() for t in (job.A, job.moments, job.weight)]
    H = eager.delta(*exact, job.groups, job.decay, "none").flatten(1)
    if job.normalize == "mean":
        floor = floor / _POSITIONS
    elif job.normalize != "none":
        dims = (0, 1) if job.normalize == "layer" else (1,)
        scale = H.abs().amax(dims, keepdim=True) + eager.EPS
        floor = floor / scale + H.abs() / scale * (floor / scale).amax(dims, keepdim=True)
    floor = floor.view(job.weight.shape)
    return RATE * floor + EPS32 * job.weight.double().abs() if operation == "learn" else floor
