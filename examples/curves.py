"""Learning curves as PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from examples.training import Row

PANELS = {"loss": "training loss", "accuracy": "test accuracy, %"}
# Okabe and Ito's palette, told apart by the color-blind; the first, for the yardstick, is black.
COLORS = ("#000000", "#0072B2", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#D55E00")


def draw(runs: Mapping[str, Sequence[Sequence[Row]]], path: Path, title: str) -> None:
    """Loss and accuracy by epoch: a line per label, the mean of its runs, in a band from lowest to highest.

    Args:
        runs: by label, the rows of each of its runs; of runs of unequal length the common part is drawn.
        path: the file; its folder is made.
        title: of the figure.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(11, 4.2), dpi=120, layout="constrained")
        FigureCanvasAgg(figure)
        for axes, (column, name) in zip(figure.subplots(1, 2), PANELS.items(), strict=True):
            _draw_panel(axes, runs, column)
            axes.set_ylabel(name)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center", frameon=False)
        figure.suptitle(title, fontsize=10)
        figure.savefig(path)


def _draw_panel(axes: Axes, runs: Mapping[str, Sequence[Sequence[Row]]], column: str) -> None:
    for index, (label, several) in enumerate(runs.items()):
        length = min(map(len, several))
        values = np.array([[row[column] for row in rows[:length]] for rows in several])
        epochs = [row["epoch"] for row in several[0][:length]]
        # after the last color, begin again with broken lines
        style = {"color": COLORS[index % len(COLORS)], "ls": "-" if index < len(COLORS) else "--"}
        axes.plot(epochs, values.mean(0), marker="o", markersize=2.5, label=label, **style)
        axes.fill_between(epochs, values.min(0), values.max(0), color=style["color"], alpha=0.12, lw=0)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25, linewidth=0.5)
