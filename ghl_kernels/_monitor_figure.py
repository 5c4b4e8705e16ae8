"""The Monitor's figure: every layer in six panels, however many layers there are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from ghl_kernels._check import label

if TYPE_CHECKING:
    from ghl_kernels.monitor import LayerReading

_NAMED_LAYERS = 8  # more than these would not fit under an axis


def draw(readings: Mapping[str, LayerReading]) -> Figure:
    """Winners on top, weights and updates below; layers in the order of the model."""
    layers = list(readings.values())
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(12, 6.4), dpi=120, layout="constrained")
        FigureCanvasAgg(figure)
        wins, evenness, dead, agreement, size, norms = figure.subplots(2, 3).flat
        _draw_wins(wins, layers)
        _draw_share(evenness, "Evenness of the winners", [layer.evenness for layer in layers])
        _draw_share(dead, "Dead units", [layer.dead_share for layer in layers])
        _draw_share(agreement, "Local direction = task's", [layer.agreement for layer in layers])
        agreement.axhline(0.5, color="#999999", lw=0.8, ls="--")
        _draw_size(size, layers)
        _draw_norms(norms, layers)
        for axes in (evenness, dead, agreement, size, norms):
            _name_layers(axes, list(readings))
    return figure


def _draw_wins(axes: Axes, layers: list[LayerReading]) -> None:
    """Each layer's units from the most frequent winner to the rarest, 1 being an equal share."""
    colors = mpl.colormaps["viridis"](np.linspace(0.0, 0.9, len(layers)))
    for layer, color in zip(layers, colors, strict=True):
        units, total = len(layer.wins), layer.wins.sum()
        if total:
            share = np.sort(layer.wins)[::-1] * (units / total)
            axes.plot((np.arange(units) + 0.5) / units, share, color=color, lw=1.2)
    axes.set_yscale("symlog", linthresh=0.1)
    axes.set_ylim(bottom=0.0)
    axes.axhline(1.0, color="#999999", lw=0.8, ls="--")
    axes.set_title("Wins / equal share, dark: first layer")
    axes.set_xlabel("units, most frequent winner first")
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))


def _draw_share(axes: Axes, title: str, shares: list[float]) -> None:
    axes.plot(shares, color="#0072B2", marker="o", markersize=3)
    axes.set_ylim(-0.03, 1.03)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_title(title)


def _draw_size(axes: Axes, layers: list[LayerReading]) -> None:
    axes.plot([layer.delta_max for layer in layers], color="#D55E00", marker="o", markersize=3)
    axes.plot([layer.delta_ratio for layer in layers], color="#009E73", marker="s", markersize=3)
    axes.set_yscale("log")
    axes.set_title("Size of H")
    axes.legend(["max |H|, not normalized", "|H| / |W|, normalized"], frameon=False)


def _draw_norms(axes: Axes, layers: list[LayerReading]) -> None:
    places = range(len(layers))
    norms = [layer.row_norms if len(layer.row_norms) else np.array([np.nan]) for layer in layers]
    low, middle, high = np.array([np.quantile(of_layer, (0.0, 0.5, 1.0)) for of_layer in norms]).T
    axes.fill_between(places, low, high, color="#0072B2", alpha=0.15, lw=0)
    axes.errorbar(places, middle, (middle - low, high - middle), color="#0072B2", marker="o", markersize=3)
    axes.set_ylim(bottom=0.0)
    axes.set_title("Norms of W's rows: median and range")


def _name_layers(axes: Axes, names: list[str]) -> None:
    axes.set_xlim(-0.5, len(names) - 0.5)
    if len(names) <= _NAMED_LAYERS:
        axes.set_xticks(range(len(names)), [label(name) for name in names], rotation=30, ha="right")
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("layer")
