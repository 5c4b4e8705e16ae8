"""A = sum_p y_p x_p^T of k winners two ways: from the winners alone, and by the dense product."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

import ghl_kernels as ghl
from bench.shapes import ConvShape, conv_tensors


@dataclasses.dataclass(frozen=True)
class Correlation:
    """A layer's input, its responses, and both ways to A; the winners keep their responses (k-WTA).

    Attributes:
        u: responses, the units along ``dim``.
        sparse: A from the winners' lists (P, k), with the backend in use.
        dense: A from dense activities of u's shape, with the backend in use.
        expected: A in float64, by the reference.
    """

    name: str
    u: Tensor
    dim: int
    rule: ghl.HebbianRule
    sparse: Callable[[Tensor, Tensor], Tensor]
    dense: Callable[[Tensor], Tensor]
    expected: Callable[[], Tensor]

    @property
    def units(self) -> int:
        return self.u.shape[self.dim]

    def winner_lists(self) -> tuple[Tensor, Tensor]:
        """Winning units (P, k), ascending, and their activities."""
        unit, activity = torch.ops.ghl.winners(self.u, self.dim, *self.rule.competition(self.units))
        return unit, activity

    def activities(self) -> Tensor:
        """Dense y, of u's shape."""
        return ghl.functional.compete(self.u, self.rule, self.dim)


def conv_correlation(shape: ConvShape, fraction: float, memory_format: str = "nchw") -> Correlation:
    """A (N, C, k, k) of a convolution with ceil(fraction * N) winners."""
    x, u, weight = conv_tensors(shape, memory_format)
    rule = _sums_only(fraction)
    geometry = shape.geometry
    return Correlation(
        name=f"conv-{shape}-{memory_format}",
        u=u,
        dim=1,
        rule=rule,
        sparse=lambda unit, activity: torch.ops.ghl.conv_winner_sums(
            x, unit, activity, shape.units, *geometry, "none"
        )[0],
        dense=lambda y: torch.ops.ghl.conv_grad(x, y, *geometry),
        expected=lambda: ghl.reference.conv_delta(
            x.double(), u.double(), weight.double(), rule, **shape.conv, groups=shape.groups
        ),
    )


def linear_correlation(positions: int, features: int, units: int, fraction: float) -> Correlation:
    """A (N, D) of a linear layer with ceil(fraction * N) winners."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(positions, features, generator=generator)
    weight = torch.randn(units, features, generator=generator) / features**0.5
    u = x @ weight.t()
    rule = _sums_only(fraction)
    return Correlation(
        name=f"linear-P{positions}-{features}to{units}",
        u=u,
        dim=1,
        rule=rule,
        sparse=lambda unit, activity: torch.ops.ghl.linear_winner_sums(x, unit, activity, units, "none")[0],
        dense=lambda y: torch.ops.ghl.linear_grad(x, y),
        expected=lambda: ghl.reference.linear_delta(x.double(), u.double(), weight.double(), rule),
    )


def _sums_only(fraction: float) -> ghl.HebbianRule:
    """The rule whose H is A itself."""
    return ghl.HebbianRule(activity="linear", winners=fraction, decay="none", normalize="none", gate="none")
