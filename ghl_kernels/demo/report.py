"""The demo's results as a table and as JSON."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import rich.box
import rich.console
import rich.table

from .cost import Cost
from .data import Dataset
from .methods import Settings
from .train import Run

_NOTES = (
    "Accuracy after the last epoch: mean of the seeds (lowest to highest).",
    "Cost of the fastest of many steps: of the filters for purely local, of the read-out for frozen random.",
    "Peak memory of tensors above what was held before the step.",
)


@dataclasses.dataclass(frozen=True)
class Results:
    """All that a demo run found; ``runs`` by method and seed, ``costs`` by method; on what it ran."""

    settings: Settings
    data: Dataset
    runs: Mapping[str, Mapping[int, Run]]
    costs: Mapping[str, Cost]
    seconds: float
    validation: bool
    environment: Mapping[str, Any]

    def final_accuracies(self, key: str) -> list[float]:
        """Accuracy after the last epoch, a value per seed."""
        return [run.accuracy[-1] for run in self.runs[key].values()]

    @property
    def seeds(self) -> list[int]:
        """The seeds that were run."""
        return list(next(iter(self.runs.values())))


def print_table(results: Results) -> None:
    """Print the table to stdout, wide enough for its content where stdout is no terminal."""
    console = rich.console.Console()
    if not console.is_terminal:
        console = rich.console.Console(width=120)
    console.print(_table(results))
    for line in _NOTES:
        console.print(line, style="dim", highlight=False)


def _table(results: Results) -> rich.table.Table:
    data, settings = results.data, results.settings
    test = "validation" if results.validation else "test"
    table = rich.table.Table(
        title=f"{data.name}: {len(data.train_images)} training and {len(data.test_images)} {test} images of "
        f"{data.image_size}; epochs: {settings.epochs}, batch: {settings.batch_size}, "
        f"seeds: {len(results.seeds)}; {results.seconds:.0f} s",
        title_justify="left",
        box=rich.box.SIMPLE_HEAD,
    )
    table.add_column("method")
    for heading in ("accuracy, %", "images/s", "step time / backprop's", "peak memory, KiB"):
        table.add_column(heading, justify="right")
    for method in settings.methods:
        cost = results.costs[method.key]
        table.add_row(
            method.label,
            _mean_and_spread(results.final_accuracies(method.key)),
            f"{cost.images_per_second:,.0f}",
            f"{cost.step_time_ratio:.2f}",
            f"{cost.peak_bytes / 1024:,.0f}",
        )
    return table


def _mean_and_spread(values: list[float]) -> str:
    mean = f"{statistics.fmean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.1f} to {max(values):.1f})"


def write_json(results: Results, path: Path) -> None:
    """Write the results with everything that is needed to repeat them."""
    path.write_text(json.dumps(_as_json(results), indent=1) + "\n")


def _as_json(results: Results) -> dict[str, Any]:
    data = results.data
    return {
        "data": {
            "name": data.name,
            "training_images": len(data.train_images),
            "test_images": len(data.test_images),
            "validation": results.validation,
            "image_size": data.image_size,
        },
        "seeds": results.seeds,
        "seconds": round(results.seconds, 1),
        "methods": {method.key: _method_as_json(results, method.key) for method in results.settings.methods},
        "settings": dataclasses.asdict(results.settings),
        "environment": dict(results.environment),
    }


def _method_as_json(results: Results, key: str) -> dict[str, Any]:
    accuracies = results.final_accuracies(key)
    return {
        "accuracy": {
            "mean": statistics.fmean(accuracies),
            "lowest": min(accuracies),
            "highest": max(accuracies),
        },
        "curves": {str(seed): run.accuracy for seed, run in results.runs[key].items()},
        "cost": dataclasses.asdict(results.costs[key]),
    }
