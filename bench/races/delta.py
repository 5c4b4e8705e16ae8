"""The whole Hebbian part, u -> H, of a convolution: what a training step pays beside backpropagation.

By rule: the GHL rule (softmax, Oja), SoftHebb (losers negated), k winners, instar and HPCA. A baseline stands
in the race of the rule it computes; SWTA-FH, which is no rule of ours, in that of instar, its nearest.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

import ghl_kernels as ghl
from bench import work
from bench.baselines import conv_trick, hpca, library, softhebb, surrogate, swta, topk, unfold
from bench.baselines._oja import oja
from bench.race import Contender, Race, Target, ours
from bench.shapes import BATCH_10, DEEPHEBB, FASTHEBB, LARGE, ODD, QUICK_CONV, ConvShape, conv_tensors

OTHERS = (DEEPHEBB[1], FASTHEBB[0], ODD[4])  # for the rules beside the default
_NAIVE_LIMIT = 1e8  # numbers that HPCA by the patch may hold


def races(target: Target) -> Iterator[Race]:
    """Every shape by the GHL rule and by k-WTA, some by the others."""
    for shape in QUICK_CONV if target.quick else (*DEEPHEBB, *FASTHEBB, *LARGE, *ODD, BATCH_10):
        yield _race(shape, "softmax", ghl.HebbianRule.ghl(), _softmax(shape), target)
        yield _race(shape, "winners=0.02", ghl.HebbianRule.kwta(0.02), _winners(shape), target)
    if target.kind == "cpu" and not target.quick:
        yield _race(DEEPHEBB[1], "softmax", ghl.HebbianRule.ghl(), _softmax(DEEPHEBB[1]), target, "nhwc")
    for shape in QUICK_CONV[1:] if target.quick else OTHERS:
        yield _race(shape, "softhebb", ghl.HebbianRule.softhebb(), _softhebb(shape), target)
        yield _race(shape, "instar", ghl.HebbianRule.instar(), _instar(shape), target)
        yield _race(shape, "hpca", ghl.HebbianRule.hpca(), _hpca(shape), target)


def _race(
    shape: ConvShape,
    name: str,
    rule: ghl.HebbianRule,
    rivals: list[Contender],
    target: Target,
    layout: str | None = None,
) -> Race:
    conv = shape.conv
    k = rule.winners_of(shape.units)
    return Race(
        suite="delta",
        case=f"{shape} {name} {layout}" if layout else f"{shape} {name}",
        target=target,
        inputs=lambda: conv_tensors(shape, layout or target.memory_format, **target.options),
        expected=lambda x, u, w: ghl.reference.conv_delta(x.double(), u.double(), w.double(), rule, **conv),
        contenders=[
            *rivals,
            *ours(target, lambda x, u, w: ghl.functional.conv_delta(x, u, w, rule, **conv)),
        ],
        reference=rivals[0].name,
        work=work.delta(shape.layer(target.dtype.itemsize), k),
        tolerance=target.tolerance,
        fraction=k / shape.units if k else None,
    )


def _softmax(shape: ConvShape) -> list[Contender]:
    conv = shape.conv
    return [
        Contender("B1", lambda x, u, w: unfold.per_sample_delta(x, u, w, **conv), baseline="B1"),
        Contender("B2", lambda x, u, w: unfold.delta(x, u, w, **conv), baseline="B2"),
        Contender("B3", lambda x, u, w: conv_trick.delta(x, u, w, **conv), baseline="B3"),
        Contender("B4", lambda x, u, w: library.delta(x, u, w, **conv), baseline="B4"),
        Contender(
            "B4c",
            lambda x, u, w: library.compiled_delta()(x, u, w, **conv),
            baseline="B4c",
            compiled=True,
        ),
        _surrogate("oja", conv),
    ]


def _winners(shape: ConvShape) -> list[Contender]:
    conv, rule = shape.conv, ghl.HebbianRule.kwta(0.02)
    k = rule.winners_of(shape.units)

    def dense(x: Tensor, u: Tensor, w: Tensor) -> Tensor:
        return oja(library.correlation(x, topk.kwta_topk(u, k), w, **conv), w)

    def expected(x: Tensor, u: Tensor, w: Tensor) -> Tensor:
        # which of equal responses win, of which 16 bits have many, is topk's choice
        y = topk.kwta_topk(u, k)
        return ghl.reference.conv_delta(x.double(), y.double(), w.double(), rule, **conv)

    return [Contender("B7c + B4", dense, baseline="B7c", expected=expected)]


def _softhebb(shape: ConvShape) -> list[Contender]:
    return [Contender("B6", lambda x, u, w: softhebb.delta(x, u, w, **shape.conv), baseline="B6")]


def _instar(shape: ConvShape) -> list[Contender]:
    conv = shape.conv
    return [
        _surrogate("instar", conv),
        *(
            Contender(
                f"B8 {norms}",
                lambda x, u, w, norms=norms: swta.delta(x, w, patch_norms=norms, **conv),
                baseline="B8",
                expected=lambda x, u, w: swta.delta(x.double(), w.double(), patch_norms="unfold", **conv),
                note="another rule; includes the forward",
                rule="SWTA-FH",
            )
            for norms in ("box", "unfold")
        ),
    ]


def _hpca(shape: ConvShape) -> list[Contender]:
    conv, layer = shape.conv, shape.layer()
    held = layer.positions * layer.weights
    return [
        Contender("B9", lambda x, u, w: hpca.delta(x, u, w, **conv), baseline="B9"),
        Contender(
            "B9 naive",
            lambda x, u, w: hpca.naive_delta(x, u, w, **conv),
            baseline="B9",
            absent="" if held <= _NAIVE_LIMIT else f"it would hold {held:.1g} numbers, three times over",
        ),
    ]


def _surrogate(decay: str, conv: dict[str, tuple[int, int]]) -> Contender:
    return Contender(
        "B5",
        lambda x, u, w: surrogate.delta(x, w, decay=decay, **conv),
        baseline="B5",
        note="includes the forward",
    )
