"""Figures of a run: speed against each peer, roofline, dense-sparse crossover, memory."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np

from bench import scaling
from bench.report import Row

matplotlib.use("Agg")
# the same figure gives the same file, bit for bit
matplotlib.rcParams["svg.hashsalt"] = "ghl_kernels"
matplotlib.rcParams["font.size"] = 8

from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

_OURS, _RIVALS = "tab:red", plt.get_cmap("tab20").colors


def write_all(rows: Sequence[Row], ceilings: Mapping[str, float], folder: pathlib.Path) -> list[pathlib.Path]:
    """Write every figure that the rows can fill; the paths of those written."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, draw in _FIGURES.items():
        path = folder / f"{name}.svg"
        if draw(rows, ceilings, path):
            written.append(path)
    return written


def speed(rows: Sequence[Row], ceilings: Mapping[str, float], path: pathlib.Path) -> bool:
    """A dot for every contender: how many times faster than the reference, by case."""
    timed = [row for row in rows if row.speedup and row.ratio and row.name != row.against]
    cases = list(dict.fromkeys((row.suite, row.case) for row in timed))
    if not cases:
        return False
    figure, axes = plt.subplots(figsize=(9, 1.6 + 0.19 * len(cases)))
    for name, color in _colors(timed).items():
        own = [row for row in timed if row.name == name]
        axes.plot(
            [row.ratio.median for row in own if row.ratio],
            [cases.index((row.suite, row.case)) for row in own],
            "D" if own[0].is_ours else "o",
            color=color,
            markersize=5,
            label=name,
        )
    axes.set_yticks(range(len(cases)), [f"{suite}: {case}" for suite, case in cases])
    axes.set_ylim(len(cases) - 0.5, -0.5)
    axes.set_xscale("log")
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xlabel("times faster than the case's reference (right is better)")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    return _save(figure, path)


def roofline(rows: Sequence[Row], ceilings: Mapping[str, float], path: pathlib.Path) -> bool:
    """Achieved operations a second over operations per byte, under the two measured ceilings."""
    found = [row for row in rows if row.seconds and row.intensity and row.floor_seconds]
    if not found or "copy" not in ceilings:
        return False
    figure, axes = plt.subplots(figsize=(7, 4.5))
    for name, color in _colors(found).items():
        own = [row for row in found if row.name == name]
        axes.plot(
            [row.intensity for row in own],
            [row.operations / row.seconds.median for row in own if row.operations and row.seconds],
            "D" if own[0].is_ours else "o",
            color=color,
            markersize=4,
            label=name,
        )
    _ceilings(axes, ceilings, [row.intensity for row in found if row.intensity])
    axes.set_xlabel("operations per byte that has to be moved")
    axes.set_ylabel("needed operations a second")
    axes.grid(alpha=0.3, which="both")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    return _save(figure, path)


def _ceilings(axes: Axes, ceilings: Mapping[str, float], intensities: Sequence[float]) -> None:
    span = np.geomspace(min(intensities) / 2, max(intensities) * 2, 200)
    for name, style in (("fp32", "-"), ("bf16", "--")):
        if name in ceilings:
            limit = np.minimum(span * ceilings["copy"], ceilings[name])
            axes.loglog(span, limit, style, color="black", linewidth=1.0, label=f"ceiling, {name}")


def crossover(rows: Sequence[Row], ceilings: Mapping[str, float], path: pathlib.Path) -> bool:
    """Time of the sparse sum over the dense one's, by the share of winners, a line for every shape."""
    timed = [row for row in rows if row.suite == "sparse" and row.ratio and row.against == "ghl dense"]
    first = next((row.name for row in timed if row.is_ours and row.name != row.against), None)
    found = [row for row in timed if row.name == first and row.fraction]
    shapes = list(dict.fromkeys(row.case.rpartition(" ")[0] for row in found))
    if not shapes:
        return False
    figure, axes = plt.subplots(figsize=(6, 4))
    for shape in shapes:
        own = sorted(
            (row.fraction, 1.0 / row.ratio.median)
            for row in found
            if row.case.rpartition(" ")[0] == shape and row.fraction and row.ratio
        )
        axes.loglog([x for x, _ in own], [y for _, y in own], "o-", markersize=4, label=shape)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xlabel("winners / units")
    axes.set_ylabel("time, sparse / dense (below 1 the sparse sum pays)")
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False)
    return _save(figure, path)


def memory(rows: Sequence[Row], ceilings: Mapping[str, float], path: pathlib.Path) -> bool:
    """Peak memory of a training step as a multiple of backprop's."""
    found = [row for row in rows if row.peak_ratio]
    if not found:
        return False
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.2 * len(found)))
    labels = [f"{row.case}: {row.name}" for row in found]
    axes.barh(
        range(len(found)),
        [row.peak_ratio for row in found],
        color=[_OURS if row.is_ours else "tab:gray" for row in found],
    )
    axes.set_yticks(range(len(found)), labels)
    axes.invert_yaxis()
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xlabel("peak memory of a step as a multiple of backprop's")
    return _save(figure, path)


def growth(rows: Sequence[Row], ceilings: Mapping[str, float], path: pathlib.Path) -> bool:
    """Cost against B, N, D, k and threads with the fitted exponents, and the fitted crossovers."""
    if not scaling.series(rows):
        return False
    scaling.figure(rows, path)
    return True


_FIGURES: dict[str, Callable[[Sequence[Row], Mapping[str, float], pathlib.Path], bool]] = {
    "speed": speed,
    "roofline": roofline,
    "crossover": crossover,
    "memory": memory,
    "scaling": growth,
}


def _colors(rows: Sequence[Row]) -> dict[str, Any]:
    """A color for every contender; this package's first backend is red."""
    names = dict.fromkeys(row.name for row in rows)
    first = next((name for name in names if name.startswith("ghl")), None)
    others = [color for color in _RIVALS if color != matplotlib.colors.to_rgb(_OURS)]
    return {
        name: _OURS if name == first else others[i % len(others)]
        for i, name in enumerate(sorted(names, key=lambda name: (not name.startswith("ghl"), name)))
    }


def _save(figure: Any, path: pathlib.Path) -> bool:
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    return True
