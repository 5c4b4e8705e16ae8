"""A of a depthwise convolution (groups = C), with the activities at hand: y = u."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

import ghl_kernels as ghl
from bench import work
from bench.baselines import depthwise
from bench.race import Contender, Race, Target, ours
from bench.shapes import DEPTHWISE, QUICK_DEPTHWISE, ConvShape, conv_tensors

RULE = ghl.HebbianRule(activity="linear", decay="none", normalize="none", gate="none")
_DENSE_LIMIT = 2e10  # operations of the dense form, beyond which it is only a matter of waiting


def races(target: Target) -> Iterator[Race]:
    """Against the library's grouped weight gradient and the diagonal of the dense one."""
    for shape in QUICK_DEPTHWISE if target.quick else DEPTHWISE:
        yield _race(shape, target)


def _race(shape: ConvShape, target: Target) -> Race:
    geometry, conv = shape.geometry, shape.conv
    competition = RULE.competition(shape.units)
    needed = work.correlate(shape.layer(target.dtype.itemsize))
    dense = needed.operations * shape.groups
    limit = _DENSE_LIMIT if target.device.type == "cpu" else 100 * _DENSE_LIMIT

    def expected(x: Tensor, u: Tensor, weight: Tensor) -> Tensor:
        x, u, weight = x.double(), u.double(), weight.double()
        return ghl.reference.conv_delta(x, u, weight, RULE, **conv, groups=shape.groups)

    return Race(
        suite="depthwise",
        case=str(shape),
        target=target,
        inputs=lambda: conv_tensors(shape, target.memory_format, **target.options),
        expected=expected,
        contenders=[
            Contender("B15", lambda x, u, w: depthwise.correlation(x, u, w, **conv), baseline="B15"),
            Contender(
                "B15 dense",
                lambda x, u, w: depthwise.dense_diagonal(x, u, w, **conv),
                baseline="B15",
                absent=""
                if dense <= limit
                else f"{dense:.1g} operations, {shape.groups} times what is needed",
            ),
            *ours(
                target, lambda x, u, w: torch.ops.ghl.conv_sums(x, u, *geometry, *competition, RULE.decay)[0]
            ),
        ],
        reference="B15",
        work=needed,
        tolerance=target.tolerance,
    )
