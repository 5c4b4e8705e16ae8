"""The bars for GPUs, each beside what was measured: a line is met, missed, or was not measured.

What has to be reached, where and in terms of what is said here alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from bench.intensity import CLASSES
from bench.report import Bar

Document = dict[str, Any]
Rows = list[dict[str, Any]]
BELOW, BETWEEN, ABOVE = (name for name, *_ in CLASSES)
MOST_LOST = Bar(1.03)  # by auto, to the best of those that are as exact
# Rows and channels, by layout; the other cases of the stage are shown and not judged.
SELECTIONS = {
    "rows": "65536x1024 rows k=8 bf16",
    "channels_last": "512x384x16x16 nhwc k=8 bf16",
    "NCHW": "512x384x16x16 nchw k=8 bf16",
}
SOFTMAX, FEW = "GHL softmax, sums_at=backward, compiled", "GHL winners=0.004, compiled"
BACKPROP = "backprop, compiled"


class Verdict(NamedTuple):
    """One bar, and the value that has to reach it; None: it was not measured."""

    what: str
    value: float | None
    bar: Bar

    @property
    def word(self) -> str:
        if self.value is None:
            return "not measured"
        return "met" if self.bar.met_by(self.value) else "MISSED"


def verdicts(documents: dict[str, Document]) -> list[Verdict]:
    """All bars for GPUs, the measured ones and the others."""

    def rows(stage: str, section: str) -> Rows:
        return [
            row
            for row in documents.get(stage, {"results": {}})["results"].get(section, [])
            if isinstance(row, dict)
        ]

    return [
        *_pair(rows("pair", "pair")),
        *_auto(rows("pair", "pair") + rows("pair", "sums"), rows("races", "auto")),
        *_selection(rows("kwta", "kwta")),
        *_steps(rows("steps", "steps")),
        *_memory(rows("steps", "steps")),
    ]


def _pair(rows: Rows) -> Iterator[Verdict]:
    """By class of intensity, softmax: the worst layer of the class, each by the best of a backend's forms."""
    rows = [row for row in rows if row["rule"] == "softmax"]
    of_triton = ("configured", "tile", "library G")
    any_of_ours = (*of_triton, "cuda", "triton", "auto")
    bars: tuple[tuple[str, str, tuple[str, ...], float], ...] = (
        (BELOW, "ours", any_of_ours, 1.6),
        (BETWEEN, "CUDA", ("cuda",), 1.1),
        (ABOVE, "CUDA", ("cuda",), 0.95),
        (ABOVE, "Triton", of_triton, 0.7),
    )
    for name, whose, prefixes, limit in bars:
        least = _worst(_by_layer(rows, name), prefixes, "times_faster")
        yield Verdict(f"pair, {name} FLOP/byte, {whose}: times faster", least, Bar(limit, at_least=True))
    floor = _worst(_by_layer(rows, BELOW), any_of_ours, "of_floor")
    yield Verdict(f"pair, {BELOW} FLOP/byte: share of the copy floor", floor, Bar(0.7, at_least=True))
    best = [_best(layer, any_of_ours, "times_faster") for layer in _by_layer(rows)]
    known = [value for value in best if value]
    mean = math.exp(sum(map(math.log, known)) / len(known)) if known else None
    yield Verdict("pair, all layers: geometric mean of times faster", mean, Bar(1.2, at_least=True))


def _by_layer(rows: Rows, class_name: str | None = None) -> list[Rows]:
    layers: dict[str, Rows] = {}
    for row in rows:
        if "flop_per_byte" in row and class_name in (None, _class_of(row["flop_per_byte"])):
            layers.setdefault(row["layer"], []).append(row)
    return list(layers.values())


def _class_of(intensity: float) -> str:
    return next(name for name, low, high in CLASSES if low <= intensity < high)


def _best(rows: Rows, prefixes: tuple[str, ...], field: str) -> float | None:
    return max(
        (row[field] for row in rows if row["what"].startswith(prefixes) and row.get(field)), default=None
    )


def _worst(layers: Iterable[Rows], prefixes: tuple[str, ...], field: str) -> float | None:
    """Of the best of each layer; None where a layer has none."""
    best = [_best(rows, prefixes, field) for rows in layers]
    return min((value for value in best if value is not None), default=None) if None not in best else None


def _auto(products: Rows, races: Rows) -> Iterator[Verdict]:
    for name, rows in (("the pair and A alone", products), ("races", races)):
        lost = [row["of_best"] for row in rows if row.get("of_best")]
        yield Verdict(f"auto, {name}: worst time over the best", max(lost, default=None), MOST_LOST)


def _selection(rows: Rows) -> Iterator[Verdict]:
    """k-WTA: y, and the state that a pair needs, beside a copy of u in the same rounds."""
    found = {(row["case"], row["what"]): row for row in rows}

    def of(case: str, what: str, field: str) -> float | None:
        return found.get((case, what), {}).get(field)

    for backend, what, limit in (("cuda", "y", 0.8), ("cuda", "state", 0.6), ("triton", "y", 0.5)):
        for layout, case in SELECTIONS.items():
            share = of(case, f"{backend} {what}", "of_copy_bandwidth")
            label = f"k-WTA, {backend} {what}, {layout}: share of the bandwidth of a copy of u"
            yield Verdict(label, share, Bar(limit, at_least=True))
    for layout, case in SELECTIONS.items():
        ours = [of(case, f"{backend} y", "times_faster_than_topk") for backend in ("cuda", "triton")]
        most = max((times for times in ours if times), default=None)
        label = f"k-WTA, y, {layout}: times faster than topk and scatter"
        yield Verdict(label, most, Bar(8.0, at_least=True))


def _steps(rows: Rows) -> Iterator[Verdict]:
    ratio = _field(rows, "ratio")
    times = _field(rows, "us")
    for network, limit in (("DeepHebb", 1.28), ("VGG-16", 1.27), ("ResNet-50", 1.13)):
        softmax, few = ratio(network, SOFTMAX), ratio(network, FEW)
        yield Verdict(f"step, {network}, softmax: times compiled backprop", softmax, Bar(limit))
        yield Verdict(f"step, {network}, winners=0.004: times compiled backprop", few, Bar(1.12))
        slower = few / softmax if few and softmax else None
        yield Verdict(f"step, {network}, winners=0.004: times softmax", slower, Bar(1.0))
        for method, most in (("learn_ softmax", 0.75), ("learn_ winners=0.004", 0.50)):
            yield Verdict(f"{method}, {network}: times a backprop step", ratio(network, method), Bar(most))
    for network in dict.fromkeys(row["network"] for row in rows if row["method"].startswith("authors")):
        own = times(network, "GHL softmax, sums_at=forward")
        theirs = times(network, "authors' algorithm (unfold)")
        faster = theirs / own if own and theirs else None
        yield Verdict(f"step, {network}: times faster than the authors'", faster, Bar(4.0, at_least=True))


def _memory(rows: Rows) -> Iterator[Verdict]:
    """Peaks as multiples of backprop's; with softmax where batch norm keeps u, and on DeepHebb."""
    peak = _field(rows, "peak_ratio")
    for network in ("DeepHebb", "VGG-16", "ResNet-50"):
        yield Verdict(f"memory, {network}, winners=0.004: times backprop's", peak(network, FEW), Bar(1.02))
    yield Verdict("memory, ResNet-50, softmax: times backprop's", peak("ResNet-50", SOFTMAX), Bar(1.02))
    yield Verdict("memory, DeepHebb, softmax: times backprop's", peak("DeepHebb", SOFTMAX), Bar(1.15))


def _field(rows: Rows, field: str) -> Callable[[str, str], float | None]:
    found = {(row["network"], row["method"]): row.get(field) for row in rows}
    return lambda network, method: found.get((network, method))
