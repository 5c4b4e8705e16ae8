"""The demo's figure: learning curves, and the first layer's filters before and after."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from .report import Results

# Okabe and Ito's palette, told apart by the color-blind; backprop, the yardstick, is black.
_COLORS = {
    "backprop": "#000000",
    "ghl-softmax": "#0072B2",
    "ghl-kwta": "#009E73",
    "local": "#D55E00",
    "frozen": "#999999",
}
_FILTER_COLORS = "RdBu_r"
_FILTERS_A_ROW = 4
_GAP = 1  # blank pixels between filters


def write(results: Results, path: Path) -> None:
    """Write the figure as PNG.

    Raises:
        OSError: the file cannot be written.
    """
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(12, 4.6), dpi=120, layout=ConstrainedLayoutEngine(wspace=0.08, hspace=0.06))
        FigureCanvasAgg(figure)
        curves, filters = figure.subfigures(1, 2, width_ratios=[1.1, 1], squeeze=False)[0]
        _draw_curves(curves.subplots(), results)
        _draw_filters(list(filters.subplots(2, 3).flat), results)
        filters.suptitle(f"First-layer filters, seed {results.seeds[0]}", fontsize=10)
        figure.savefig(path)


def _draw_curves(axes: Axes, results: Results) -> None:
    epochs = np.arange(1, results.settings.epochs + 1)
    floor = 100.0
    for method in results.settings.methods:
        curves = np.array([run.accuracy for run in results.runs[method.key].values()])
        mean, color = curves.mean(axis=0), _COLORS[method.key]
        label = f"{method.label}: {mean[-1]:.1f} %"
        axes.plot(epochs, mean, color=color, marker="o", markersize=2.5, label=label)
        axes.fill_between(epochs, curves.min(axis=0), curves.max(axis=0), color=color, alpha=0.12, lw=0)
        floor = min(floor, mean[len(mean) // 4 :].min())
    # the first epochs are far below all that follows and would press it into a line
    axes.set_ylim(max(0.0, 10.0 * math.floor((floor - 2.0) / 10.0)), 100.5)
    axes.set_xlabel("epoch")
    axes.set_ylabel(f"{'validation' if results.validation else 'test'} accuracy, %")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25, linewidth=0.5)
    seeds = len(results.seeds)
    spread = f"mean and range of {seeds} seeds" if seeds > 1 else "one seed"
    axes.set_title(f"{results.data.name}, {results.data.image_size}: {spread}", fontsize=10)
    axes.legend(loc="lower right", frameon=False)


def _draw_filters(panels: list[Axes], results: Results) -> None:
    seed = results.seeds[0]
    pictures = [("before, all five", results.runs["backprop"][seed].filters_before, "#000000")]
    pictures += [
        (f"after {method.label}", results.runs[method.key][seed].filters_after, _COLORS[method.key])
        for method in results.settings.methods
    ]
    for axes, (title, filters, color) in zip(panels, pictures, strict=True):
        axes.imshow(_mosaic(filters), cmap=_FILTER_COLORS, vmin=-1, vmax=1, interpolation="nearest")
        axes.set_axis_off()
        axes.set_title(title, color=color, fontsize=9)


def _mosaic(filters: Tensor) -> npt.NDArray[np.float64]:
    """Filters (count, size, size) in rows of four, each scaled to its largest magnitude."""
    count, size, _ = filters.shape
    pitch, rows, columns = size + _GAP, math.ceil(count / _FILTERS_A_ROW), min(count, _FILTERS_A_ROW)
    mosaic = np.full((rows * pitch - _GAP, columns * pitch - _GAP), np.nan)
    for index, single in enumerate(filters.double().numpy()):
        top, left = pitch * (index // _FILTERS_A_ROW), pitch * (index % _FILTERS_A_ROW)
        mosaic[top : top + size, left : left + size] = single / max(np.abs(single).max(), 1e-30)
    return mosaic
