"""[A; G] = sum_p [y; dL/du]_p x_p^T with y the softmax of u: the two products of a training step."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

import ghl_kernels as ghl
from bench import work
from bench.baselines import library
from bench.race import Contender, Race, Target, ours
from bench.shapes import BATCH_10, DEEPHEBB, FASTHEBB, LARGE, ODD, QUICK_CONV, ConvShape, conv_tensors

RULE = ghl.HebbianRule.ghl()
SUMS = ghl.HebbianRule(decay="none", normalize="none", gate="none")
GRADIENT = ghl.HebbianRule(activity="linear", decay="none", normalize="none", gate="none")


def races(target: Target) -> Iterator[Race]:
    """Against two library weight gradients, the same compiled, and one with 2N channels."""
    for shape in QUICK_CONV if target.quick else (*DEEPHEBB, *FASTHEBB, *LARGE, *ODD, BATCH_10):
        yield _race(shape, target)


def _inputs(shape: ConvShape, target: Target) -> tuple[Tensor, ...]:
    x, u, weight = conv_tensors(shape, target.memory_format, **target.options)
    grad_u = torch.randn(u.shape, generator=torch.Generator().manual_seed(1)).to(u)
    return x, u, grad_u.contiguous(memory_format=_format(u)), weight


def _format(u: Tensor) -> torch.memory_format:
    nhwc = u.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if nhwc else torch.contiguous_format


def _race(shape: ConvShape, target: Target) -> Race:
    geometry, conv = shape.geometry, shape.conv
    competition = RULE.competition(shape.units)

    def expected(x: Tensor, u: Tensor, grad_u: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        x, u, grad_u, weight = (tensor.double() for tensor in (x, u, grad_u, weight))
        return (
            ghl.reference.conv_delta(x, u, weight, SUMS, **conv),
            ghl.reference.conv_delta(x, grad_u, weight, GRADIENT, **conv),
        )

    def run(x: Tensor, u: Tensor, grad_u: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return torch.ops.ghl.conv_pair(x, u, grad_u, *geometry, *competition, SUMS.decay)

    return Race(
        suite="pair",
        case=str(shape),
        target=target,
        inputs=lambda: _inputs(shape, target),
        expected=expected,
        contenders=[
            Contender("B4 twice", lambda *tensors: library.pair(*tensors, **conv), baseline="B4"),
            Contender("B4c", lambda *t: library.compiled_pair()(*t, **conv), baseline="B4c", compiled=True),
            Contender("B4d", lambda *t: library.concatenated_pair(*t, **conv), baseline="B4d"),
            *ours(target, run, result=lambda sums: (sums[0], sums[2])),
        ],
        reference="B4 twice",
        work=work.pair(shape.layer(target.dtype.itemsize)),
        tolerance=target.tolerance,
    )
