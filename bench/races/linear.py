"""A linear layer: H of softmax and of k winners, and the pair A, G."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

import ghl_kernels as ghl
from bench import work
from bench.baselines import linear, topk
from bench.race import Contender, Race, Target, ours
from bench.shapes import LINEAR, QUICK_LINEAR, LinearShape, linear_tensors

RULE = ghl.HebbianRule.ghl()
WINNERS = ghl.HebbianRule.kwta(0.02)
SUMS = ghl.HebbianRule(decay="none", normalize="none", gate="none")
GRADIENT = ghl.HebbianRule(activity="linear", decay="none", normalize="none", gate="none")


def races(target: Target) -> Iterator[Race]:
    """Against the same formulas in stock operations."""
    for shape in QUICK_LINEAR if target.quick else LINEAR:
        yield _delta(shape, RULE, "softmax", target)
        if shape.units >= 50:
            yield _delta(shape, WINNERS, "winners=0.02", target)
        yield _pair(shape, target)


def _delta(shape: LinearShape, rule: ghl.HebbianRule, name: str, target: Target) -> Race:
    k = rule.winners_of(shape.units)

    def rival(x: Tensor, u: Tensor, weight: Tensor) -> Tensor:
        return linear.kwta_delta(x, u, weight, k) if k else linear.delta(x, u, weight)

    def expected(x: Tensor, u: Tensor, weight: Tensor) -> Tensor:
        return ghl.reference.linear_delta(x.double(), u.double(), weight.double(), rule)

    def rivals_own(x: Tensor, u: Tensor, weight: Tensor) -> Tensor:
        # which of equal responses win, of which 16 bits have many, is topk's choice
        return expected(x, topk.kwta_topk(u, k) if k else u, weight)

    return Race(
        suite="linear",
        case=f"{shape} H {name}",
        target=target,
        inputs=lambda: linear_tensors(shape, **target.options),
        expected=expected,
        contenders=[
            Contender("B12", rival, baseline="B12", expected=rivals_own),
            *ours(target, lambda x, u, w: ghl.functional.linear_delta(x, u, w, rule)),
        ],
        reference="B12",
        work=work.delta(shape.layer(target.dtype.itemsize), k),
        tolerance=target.tolerance,
        fraction=k / shape.units if k else None,
    )


def _pair(shape: LinearShape, target: Target) -> Race:
    competition = RULE.competition(shape.units)

    def inputs() -> tuple[Tensor, ...]:
        x, u, weight = linear_tensors(shape, **target.options)
        return x, u, torch.randn(u.shape, generator=torch.Generator().manual_seed(1)).to(u), weight

    def expected(x: Tensor, u: Tensor, grad_u: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        x, u, grad_u, weight = (tensor.double() for tensor in (x, u, grad_u, weight))
        return (
            ghl.reference.linear_delta(x, u, weight, SUMS),
            ghl.reference.linear_delta(x, grad_u, weight, GRADIENT),
        )

    return Race(
        suite="linear",
        case=f"{shape} A and G",
        target=target,
        inputs=inputs,
        expected=expected,
        contenders=[
            Contender("B12", linear.pair, baseline="B12"),
            *ours(
                target,
                lambda x, u, grad_u, w: torch.ops.ghl.linear_pair(x, u, grad_u, *competition, SUMS.decay),
                result=lambda sums: (sums[0], sums[2]),
            ),
        ],
        reference="B12",
        work=work.pair(shape.layer(target.dtype.itemsize)),
        tolerance=target.tolerance,
    )
