"""``docs/results.md`` and its figure, from the results that the examples left."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from examples import curves
from examples.methods import METHODS
from ghl_kernels.demo.errors import UserError

Results = dict[str, dict[int, dict[str, Any]]]

TEXT = """\
# Results

Written by `python -m examples.fashion_mnist --report`; the tables are made of what the commands left.

## Fashion-MNIST

{training_images:,} training and {test_images:,} test images; DeepHebb's shape at an eighth of its width
({widths} filters); batch {batch_size}, epochs {epochs}. {runs} of {wanted} runs are in.

```
python -m examples.fashion_mnist            # in pieces: --only METHOD ... --seeds SEED ...
python -m examples.fashion_mnist --report
```

Every method starts from the same weights, sees the images in the same order and trains the same linear
read-out (Adam, {read_out_lr:g}); its filters have SGD with a cosine schedule. A local rule first trains the
filters, all layers at once, without a backward pass (epochs: {local_epochs}); they are frozen while the
read-out learns. Test accuracy in percent after the last epoch, mean of the seeds (lowest to highest):

{table}

![learning curves](results/fashion-mnist.png)

The read-out sees 3 x 3 positions of every filter, as DeepHebb's does, which helps random filters: the
demo's network, with one number per filter, tells methods further apart.

A scale per filter (`normalize="filter"`) gives every filter a step of the same size; with the authors' scale,
one for the layer, most filters move little. The table has both.
"""

STEPS = """
## Large networks, some steps on synthetic images

`python -m examples.imagenet --synthetic --steps N --model MODEL`: equal weights and batches. Peak memory is
that of the tensors during a step, above what they held before it.

| network | images | method | loss, first to last step (steps) | peak memory, MiB |
| --- | --- | --- | --- | --- |
{rows}
"""


def write(results: Path, docs: Path, steps: Path) -> Path:
    """Write ``results.md`` and ``results/fashion-mnist.{png,json}`` into ``docs``; returns the first.

    Args:
        results: folder of fashion_mnist's runs.
        docs: where to write.
        steps: folder of imagenet's ``--steps`` results; left out where it does not exist.

    Raises:
        UserError: no finished run, or runs of unequal settings.
    """
    runs = read(results)
    common = _common_settings(runs)
    count = sum(map(len, runs.values()))
    text = TEXT.format(
        **common | {"widths": ", ".join(map(str, common["widths"]))},
        runs=count,
        wanted=len(METHODS) * len({seed for by_seed in runs.values() for seed in by_seed}),
        table="\n".join(_table(runs)),
    )
    if steps.is_dir():
        text += STEPS.format(rows="\n".join(_step_rows(steps)))
    figures = docs / "results"
    drawn = {METHODS[key].label: [run["rows"] for run in by_seed.values()] for key, by_seed in runs.items()}
    curves.draw(drawn, figures / "fashion-mnist.png", "Fashion-MNIST: mean and range of the seeds")
    (figures / "fashion-mnist.json").write_text(json.dumps(runs, indent=1) + "\n")
    (docs / "results.md").write_text(text)
    return docs / "results.md"


def read(folder: Path) -> Results:
    """Finished runs by method and seed, in the order of METHODS; those of ``--search`` are left out."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*/result.json"))]
    runs: Results = {}
    for key in METHODS:
        of_method = [run for run in found if run["settings"]["method"] == key]
        if of_method:
            runs[key] = {run["settings"]["seed"]: run for run in of_method}
    if not runs:
        raise UserError(f"{folder} has no finished run; python -m examples.fashion_mnist makes them.")
    return runs


def _common_settings(runs: Results) -> dict[str, Any]:
    keys = (
        "data",
        "training_images",
        "test_images",
        "widths",
        "batch_size",
        "epochs",
        "local_epochs",
        "read_out_lr",
    )
    all_settings = [run["settings"] for by_seed in runs.values() for run in by_seed.values()]
    for key in keys:
        values = {json.dumps(settings[key]) for settings in all_settings}
        if len(values) > 1:
            raise UserError(f"The runs differ in {key} ({', '.join(sorted(values))}): they make no table.")
    return {key: all_settings[0][key] for key in keys}


def _table(runs: Results) -> list[str]:
    final = {key: [run["rows"][-1]["accuracy"] for run in by_seed.values()] for key, by_seed in runs.items()}
    lines = [
        "| method | accuracy | minus backprop's | seeds | learning rate of the filters |",
        "| --- | --- | --- | --- | --- |",
    ]
    for key, values in final.items():
        gap = "not run"
        if "backprop" in final:
            gap = f"{statistics.fmean(values) - statistics.fmean(final['backprop']):+.2f}"
        settings = next(iter(runs[key].values()))["settings"]
        rate = f"{settings['lr']:g}" + (
            f", momentum {settings['momentum']:g}" if settings["momentum"] else ""
        )
        spread = f"{statistics.fmean(values):.2f} ({min(values):.2f} to {max(values):.2f})"
        lines.append(f"| {METHODS[key].label} | {spread} | {gap} | {len(values)} | {rate} |")
    return lines


def _step_rows(folder: Path) -> list[str]:
    lines = []
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text())
        shape = "{} of {} x {}".format(result["batch_size"], result["size"], result["size"])
        for method, run in result["methods"].items():
            losses = f"{run['losses'][0]:.3f} to {run['losses'][-1]:.3f} ({len(run['losses'])})"
            peak = run["peak_bytes"] / 2**20
            lines.append(f"| {result['model']} | {shape} | {method} | {losses} | {peak:,.0f} |")
    return lines
