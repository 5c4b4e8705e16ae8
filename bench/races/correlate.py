"""A = sum_p y_p x_p^T, dense, with the activities at hand: y = u."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import ghl_kernels as ghl
from bench import work
from bench.baselines import conv_trick, library
from bench.race import Contender, Race, Target, ours
from bench.shapes import DEEPHEBB, FASTHEBB, LARGE, ODD, QUICK_CONV, ConvShape, conv_tensors

RULE = ghl.HebbianRule(activity="linear", decay="none", normalize="none", gate="none")


def races(target: Target) -> Iterator[Race]:
    """Against the library's weight gradient and the convolution trick."""
    for shape in QUICK_CONV if target.quick else (*DEEPHEBB, *FASTHEBB, *LARGE, *ODD):
        yield _race(shape, target)


def _race(shape: ConvShape, target: Target) -> Race:
    geometry, conv = shape.geometry, shape.conv
    competition = RULE.competition(shape.units)
    return Race(
        suite="correlate",
        case=str(shape),
        target=target,
        inputs=lambda: conv_tensors(shape, target.memory_format, **target.options),
        expected=lambda x, u, w: ghl.reference.conv_delta(x.double(), u.double(), w.double(), RULE, **conv),
        contenders=[
            Contender("B4", lambda x, u, w: library.correlation(x, u, w, **conv), baseline="B4"),
            Contender("B3", lambda x, u, w: conv_trick.correlation(x, u, w, **conv), baseline="B3"),
            *ours(
                target, lambda x, u, w: torch.ops.ghl.conv_sums(x, u, *geometry, *competition, RULE.decay)[0]
            ),
        ],
        reference="B4",
        work=work.correlate(shape.layer(target.dtype.itemsize)),
        tolerance=target.tolerance,
    )
