"""A = sum_p y_p x_p^T, dense, with the activities at hand: y = u."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import ghl_kernels as ghl
from bench import work
from bench.baselines import backprop, conv_trick, library
from bench.race import Contender, Race, Target, ours
from bench.shapes import (
    BATCH_10,
    DEEPHEBB,
    FASTHEBB,
    GROUPED,
    LARGE,
    ODD,
    QUICK_CONV,
    ConvShape,
    conv_tensors,
)

RULE = ghl.HebbianRule(activity="linear", decay="none", normalize="none", gate="none")


def races(target: Target) -> Iterator[Race]:
    """Against the library's weight gradient and the convolution trick."""
    for shape in QUICK_CONV if target.quick else (*DEEPHEBB, *FASTHEBB, *LARGE, *ODD, BATCH_10, *GROUPED):
        yield _race(shape, target)
    if target.kind == "cpu" and not target.quick:
        for shape in (DEEPHEBB[1], FASTHEBB[0]):
            yield _race(shape, target, "nhwc")


def _race(shape: ConvShape, target: Target, layout: str | None = None) -> Race:
    geometry, conv = shape.geometry, shape.conv
    grouped = conv | {"groups": shape.groups}
    ungrouped = "" if shape.groups == 1 else "written for groups=1"
    competition = RULE.competition(shape.units)
    return Race(
        suite="correlate",
        case=f"{shape} {layout}" if layout else str(shape),
        target=target,
        inputs=lambda: conv_tensors(shape, layout or target.memory_format, **target.options),
        expected=lambda x, u, w: ghl.reference.conv_delta(
            x.double(), u.double(), w.double(), RULE, **grouped
        ),
        contenders=[
            # with y = u the library's weight gradient is backpropagation's G of dL/du = y
            Contender("B4", lambda x, u, w: library.correlation(x, u, w, **grouped), baseline="B4"),
            Contender(
                "B0",
                lambda x, u, w: backprop.weight_grad(x, u, w, **conv),
                baseline="B0",
                absent=ungrouped,
                note="the weight gradient that a backprop step has anyway",
            ),
            Contender(
                "B3",
                lambda x, u, w: conv_trick.correlation(x, u, w, **conv),
                baseline="B3",
                absent=ungrouped,
            ),
            *ours(
                target, lambda x, u, w: torch.ops.ghl.conv_sums(x, u, *geometry, *competition, RULE.decay)[0]
            ),
        ],
        reference="B4",
        work=work.correlate(shape.layer(target.dtype.itemsize)),
        tolerance=target.tolerance,
    )
