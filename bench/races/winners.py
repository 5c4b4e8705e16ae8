"""Lists of the k winners of every position, (P, k): what a sparse sum starts from."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

import ghl_kernels as ghl
from bench import work
from bench.race import Contender, Race, Target, ours
from bench.shapes import MEMORY_FORMATS

MAPS = ((32, 96, 32, 32), (32, 384, 16, 16), (32, 1536, 8, 8))


def races(target: Target) -> Iterator[Race]:
    """Against torch.topk with its results laid out as lists, in the order of the units."""
    for shape in MAPS[1:2] if target.quick else MAPS:
        for layout in ("nchw",) if target.quick else MEMORY_FORMATS:
            yield _race(shape, layout, 8, target)


def topk_lists(u: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Winning units (P, k) in ascending order and their responses, by topk, sort and gather."""
    values, indices = u.topk(k, dim=1)
    unit, order = indices.movedim(1, -1).reshape(-1, k).sort(1)
    return unit.to(torch.int32), values.movedim(1, -1).reshape(-1, k).gather(1, order).float()


def _race(shape: tuple[int, ...], layout: str, k: int, target: Target) -> Race:
    batch, units, *size = shape
    positions = batch * size[0] * size[1]
    rule = ghl.HebbianRule.kwta(k)

    def dense(lists: tuple[Tensor, Tensor]) -> Tensor:
        unit, activity = lists
        return activity.new_zeros(positions, units).scatter_(1, unit.long(), activity)

    def responses() -> tuple[Tensor]:
        u = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(**target.options)
        return (u.to(memory_format=MEMORY_FORMATS[layout]),)

    def activities(y: Tensor) -> Tensor:
        return y.double().sort(1).values

    def expected(u: Tensor) -> Tensor:
        return ghl.reference.compete(u.double(), rule, 1).movedim(1, -1).reshape(-1, units)

    # in 16 bits responses tie, and which of them wins is the baseline's own choice
    rival = Contender(
        "topk lists",
        lambda u: topk_lists(u, k),
        result=lambda lists: activities(dense(lists)),
        expected=lambda u: activities(expected(u)),
    )
    run = lambda u: torch.ops.ghl.winners(u, 1, *rule.competition(units))  # noqa: E731
    return Race(
        suite="winners",
        case=f"{'x'.join(map(str, shape))} {layout} k={k}",
        target=target,
        inputs=responses,
        expected=expected,
        contenders=[rival, *ours(target, run, result=dense)],
        reference="topk lists",
        work=work.winners(positions, units, k, target.dtype.itemsize),
        tolerance=0.0,
        fraction=k / units,
    )
