"""y = c(u): softmax and k-winner-take-all over the units of every position."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

import ghl_kernels as ghl
from bench import work
from bench.baselines import boosting, selection, softhebb, topk
from bench.race import Contender, Race, Target, ours
from bench.report import Bar
from bench.shapes import MEMORY_FORMATS

MAPS = ((32, 96, 32, 32), (32, 384, 16, 16), (32, 1536, 8, 8), (8, 53, 13, 13))
ROWS = ((2048, 384), (2048, 4096))
_TIMES_FASTER = Bar(8.0, at_least=True)


class _Case(NamedTuple):
    shape: tuple[int, ...]
    layout: str  # "nchw", "nhwc" or "rows"

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.shape))} {self.layout}"

    def responses(self, target: Target) -> tuple[Tensor]:
        u = torch.randn(self.shape, generator=torch.Generator().manual_seed(0)).to(**target.options)
        return (u.to(memory_format=MEMORY_FORMATS[self.layout]) if len(self.shape) == 4 else u,)


def softmax(target: Target) -> Iterator[Race]:
    """Softmax, and SoftHebb's with the losers negated."""
    soft, anti = ghl.HebbianRule.ghl(), ghl.HebbianRule.softhebb()
    cases = [_Case(MAPS[1], "nchw")] if target.quick else _cases(MAPS, ROWS)
    for case in cases:
        yield _race("softmax", case, target, soft, Contender("torch.softmax", lambda u: torch.softmax(u, 1)))
    for case in [] if target.quick else _cases(MAPS[:2], ()):
        yield _race("softmax", case, target, anti, Contender("B6", softhebb.compete, baseline="B6"))


def kwta(target: Target) -> Iterator[Race]:
    """The k largest keep their responses; and the largest alone is 1."""
    cases = _cases(MAPS[1:2], ()) if target.quick else _cases(MAPS, ROWS)
    for case in cases:
        for k in (8,) if target.quick or case.shape != MAPS[1] else (1, 2, 8, 0.05):
            yield _kwta(case, k, target)
        if case.shape == MAPS[1]:
            yield _judged(case, 8, target)
    for case in [] if target.quick else _cases(MAPS[1:2], ()):
        yield _tied(case, 8, target)
    hard = ghl.HebbianRule.hard_wta()
    for case in [] if target.quick else _cases(MAPS[:2], ()):
        one_hot = Contender("B7a", selection.one_hot_argmax, baseline="B7a")
        yield _race("kwta", case, target, hard, one_hot, tolerance=0.0)


def _judged(case: _Case, k: int, target: Target) -> Race:
    """The bar is for two that take turns: with others between them, caches are what those leave."""
    crowd = _kwta(case, k, target)
    rival = next(contender for contender in crowd.contenders if contender.baseline == "B7c")
    own = next(contender for contender in crowd.contenders if contender.auto)
    return dataclasses.replace(
        crowd,
        case=f"{crowd.case} in turn with B7c alone",
        contenders=[rival, own],
        bars={own.name: _TIMES_FASTER},
    )


def _tied(case: _Case, k: int, target: Target) -> Race:
    """Few different responses, so that the last winner ties with others; topk too keeps exactly k of them."""
    rule = ghl.HebbianRule.kwta(k)
    rival = Contender("B7c", lambda u: topk.kwta_topk(u, k), baseline="B7c", result=_sorted)
    expects = lambda u: _sorted(ghl.reference.compete(u.double(), rule, 1))  # noqa: E731
    race = _race("kwta", case, target, rule, rival, tolerance=0.0, result=_sorted, expects=expects)
    return dataclasses.replace(
        race,
        case=f"{race.case} ties",
        inputs=lambda: tuple(u.mul(4.0).round() for u in case.responses(target)),
    )


def _kwta(case: _Case, k: int | float, target: Target) -> Race:
    rule = ghl.HebbianRule.kwta(k)
    winners = rule.winners_of(case.shape[1])
    # in 16 bits responses tie, and which of them wins is the baseline's own choice
    result = _sorted if target.dtype.itemsize == 2 else lambda y: y
    rivals = [
        Contender("B7c", lambda u: topk.kwta_topk(u, winners), baseline="B7c", result=result),
        Contender("B7b", lambda u: selection.kwta_kthvalue(u, winners), baseline="B7b", result=result),
    ]
    if len(case.shape) == 4:
        layer = boosting.BoostedKWinners2d(case.shape[1], winners, boost=0.0).to(target.device)
        rivals.append(
            Contender("B10", layer, baseline="B10", result=result, note="also follows its duty cycles")
        )
    expects = lambda u: result(ghl.reference.compete(u.double(), rule, 1))  # noqa: E731
    if case.shape == MAPS[1] and k == 8 and target.dtype.itemsize > 2 and not target.quick:
        rivals += _krotov(8)
    return _race("kwta", case, target, rule, *rivals, tolerance=0.0, result=result, expects=expects)


def _krotov(rank: int) -> list[Contender]:
    """By topk and by a sort, with an expected result of their own: they are no rule of ours."""
    strength = 0.5

    def expected(u: Tensor) -> Tensor:
        ranks = u.double().sort(1, descending=True).values
        first, other = (ranks[:, i : i + 1] for i in (0, rank - 1))
        return (u == first).double() - strength * (u == other).double()

    ways = {"B7d": selection.krotov_topk, "B7d by sort": selection.krotov_sort}
    return [
        Contender(
            name,
            lambda u, way=way: way(u, rank, strength),
            baseline="B7d",
            expected=expected,
            note="another rule: 1 and a negative value by rank, no response is kept",
            rule="Krotov",
        )
        for name, way in ways.items()
    ]


def _race(
    suite: str,
    case: _Case,
    target: Target,
    rule: ghl.HebbianRule,
    *rivals: Contender,
    tolerance: float | None = None,
    result: Callable[[Any], Any] = lambda y: y,
    expects: Callable[[Tensor], Tensor] | None = None,
) -> Race:
    contenders = [*rivals, *ours(target, lambda u: ghl.functional.compete(u, rule, 1), result=result)]
    return Race(
        suite=suite,
        case=f"{case}{_brief(rule)}",
        target=target,
        inputs=lambda: case.responses(target),
        expected=expects or (lambda u: ghl.reference.compete(u.double(), rule, 1)),
        contenders=contenders,
        reference=rivals[0].name,
        work=work.compete(case.shape, target.dtype.itemsize),
        tolerance=target.tolerance if tolerance is None else tolerance,
    )


def _brief(rule: ghl.HebbianRule) -> str:
    if rule.activity == "linear":
        return f" k={rule.winners}"
    if rule.activity == "binary":
        return " hard"
    return " losers negated" if rule.losers == "anti" else ""


def _sorted(y: Tensor) -> Tensor:
    return y.double().sort(1).values


def _cases(maps: tuple[tuple[int, ...], ...], rows: tuple[tuple[int, ...], ...]) -> list[_Case]:
    return [
        *(_Case(shape, layout) for shape in maps for layout in MEMORY_FORMATS),
        *(_Case(shape, "rows") for shape in rows),
    ]
