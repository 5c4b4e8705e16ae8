"""From u to A of k winners: lists and a sparse sum, against k-WTA and the dense product, by k / N."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import ghl_kernels as ghl
from bench import work
from bench.baselines import library, scatter, topk
from bench.race import Contender, Race, Target, ours
from bench.shapes import DEEPHEBB, LINEAR, QUICK_CONV, ConvShape, LinearShape, conv_tensors, linear_tensors
from ghl_kernels._dispatch import kind_of_layer, prefers_sparse
from ghl_kernels.rule import Competition

FRACTIONS = (0.005, 0.02, 0.1, 0.3)


def races(target: Target) -> Iterator[Race]:
    """Every shape at every fraction of winners."""
    for shape in QUICK_CONV[:1] if target.quick else DEEPHEBB:
        for fraction in FRACTIONS[1:3] if target.quick else FRACTIONS:
            yield _conv(shape, fraction, target)
    for linear in () if target.quick else (LINEAR[0], LINEAR[3]):
        for fraction in FRACTIONS:
            yield _linear(linear, fraction, target)


def _conv(shape: ConvShape, fraction: float, target: Target) -> Race:
    rule = _sums_only(fraction)
    competition, conv, geometry = rule.competition(shape.units), shape.conv, shape.geometry
    k = competition.winners
    kind = kind_of_layer(shape.channels, geometry)
    is_sparse = prefers_sparse(target.kind, kind, shape.units, k)

    def expected(x: Tensor, u: Tensor, w: Tensor) -> Tensor:
        return ghl.reference.conv_delta(x.double(), u.double(), w.double(), rule, **conv)

    def scattered(x: Tensor, u: Tensor, weight: Tensor) -> Tensor:
        unit, activity = torch.ops.ghl.winners(u, 1, *competition)
        return scatter.correlation(x, unit, activity, weight, **conv)

    def run(x: Tensor, u: Tensor, weight: Tensor) -> Tensor:
        lists = torch.ops.ghl.winners(u, 1, *competition)
        return torch.ops.ghl.conv_winner_sums(x, *lists, shape.units, *geometry, rule.decay)[0]

    return Race(
        suite="sparse",
        case=_case(shape, fraction),
        target=target,
        inputs=lambda: conv_tensors(shape, target.memory_format, **target.options),
        expected=expected,
        contenders=[
            Contender(
                "ghl dense",
                lambda x, u, w: torch.ops.ghl.conv_grad(x, _kwta(u, competition), *geometry),
                note="our k-WTA, then the dense sum",
                auto=not is_sparse,
            ),
            Contender(
                "B7c + B4",
                lambda x, u, w: library.correlation(x, topk.kwta_topk(u, k), w, **conv),
                baseline="B4",
                expected=_with_topk(expected, k),
            ),
            Contender("B11", scattered, baseline="B11", note="from our lists"),
            *ours(target, run, **_auto(is_sparse)),
        ],
        reference="ghl dense",
        work=work.sparse(shape.layer(target.dtype.itemsize), k),
        tolerance=target.tolerance,
        fraction=fraction,
    )


def _linear(shape: LinearShape, fraction: float, target: Target) -> Race:
    rule = _sums_only(fraction)
    competition = rule.competition(shape.units)
    k = competition.winners
    is_sparse = prefers_sparse(target.kind, "linear", shape.units, k)

    def expected(x: Tensor, u: Tensor, w: Tensor) -> Tensor:
        return ghl.reference.linear_delta(x.double(), u.double(), w.double(), rule)

    def run(x: Tensor, u: Tensor, weight: Tensor) -> Tensor:
        lists = torch.ops.ghl.winners(u, 1, *competition)
        return torch.ops.ghl.linear_winner_sums(x, *lists, shape.units, rule.decay)[0]

    return Race(
        suite="sparse",
        case=_case(shape, fraction),
        target=target,
        inputs=lambda: linear_tensors(shape, **target.options),
        expected=expected,
        contenders=[
            Contender(
                "ghl dense",
                lambda x, u, w: torch.ops.ghl.linear_grad(x, _kwta(u, competition)),
                note="our k-WTA, then mm",
                auto=not is_sparse,
            ),
            Contender(
                "B7c + mm",
                lambda x, u, w: topk.kwta_topk(u, k).t() @ x,
                baseline="B12",
                expected=_with_topk(expected, k),
            ),
            *ours(target, run, **_auto(is_sparse)),
        ],
        reference="ghl dense",
        work=work.sparse(shape.layer(target.dtype.itemsize), k),
        tolerance=target.tolerance,
        fraction=fraction,
    )


def _auto(is_sparse: bool) -> dict[str, bool]:
    """Where the dense form is what a layer takes, no backend's sparse sum is."""
    return {} if is_sparse else {"auto": False}


def _with_topk(expected: Callable[..., Tensor], k: int) -> Callable[..., Tensor]:
    """Which of equal responses win, of which 16 bits have many, is topk's choice."""
    return lambda x, u, w: expected(x, topk.kwta_topk(u, k), w)


def _case(shape: ConvShape | LinearShape, fraction: float) -> str:
    return f"{shape} k/N={fraction:g}"


def _kwta(u: Tensor, competition: Competition) -> Tensor:
    return torch.ops.ghl.compete(u, 1, *competition)


def _sums_only(fraction: float) -> ghl.HebbianRule:
    """The rule whose H is A itself."""
    return ghl.HebbianRule(activity="linear", winners=fraction, decay="none", normalize="none", gate="none")
