"""``docs/results.md`` and its figure, from the results that the examples left."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from examples import bars, curves, steps
from examples.bars import Results
from examples.methods import METHODS
from ghl_kernels.demo.errors import UserError

TEXT = """\
# Results

Written by `python -m examples.fashion_mnist --report`; the tables are made of what the commands left.

## Fashion-MNIST

{training_images:,} training and {test_images:,} test images; DeepHebb's shape at an eighth of its width
({widths} filters); batch {batch_size}, epochs {epochs}. {runs} of {wanted} runs are in.
{machines}

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

What GHL is held to, at equal epochs, as mean differences over the seeds that both methods have:

{bars}

The read-out sees several positions of every filter, as DeepHebb's does, and learns from filters that never
moved, too: these are the row "{frozen}".
{scales}"""

SCALES = """
A scale per filter (`normalize="filter"`) gives every filter a step of the same size, the authors' has one for
the layer. The former ends {gap:+.2f} points from the latter.
"""

STEPS = """
## Large networks, some steps on synthetic images

`python -m examples.imagenet --synthetic --steps N --model MODEL`: equal weights and batches. Peak memory is
that of the tensors during a step, above what they held before it. Seconds are those of the processor, summed
over threads (on a GPU, of the clock), the median of the steps between the first and the last. Losses fall
because few images come again and again; they say that training works, not which method is better.

| network | images | {headings} |
| {rule} |
{rows}

{machines}
"""


def write(results: Path, docs: Path, steps_folder: Path) -> Path:
    """Write ``results.md`` and ``results/fashion-mnist.{png,json}`` into ``docs``; returns the first.

    Args:
        results: folder of fashion_mnist's runs.
        docs: where to write.
        steps_folder: of imagenet's ``--steps`` results; their table is left out where there are none.

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
        machines=_machines([run for by_seed in runs.values() for run in by_seed.values()]),
        table="\n".join(_table(runs)),
        bars="\n".join(bars.table(runs)),
        frozen=METHODS["frozen"].label,
        scales=_scales(runs),
    )
    text += _steps(steps_folder)
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
        gap = bars.gap(runs, key, "backprop")
        beside = "not run" if gap is None else f"{gap:+.2f}"
        settings = next(iter(runs[key].values()))["settings"]
        rate = f"{settings['lr']:g}" + (
            f", momentum {settings['momentum']:g}" if settings["momentum"] else ""
        )
        spread = f"{statistics.fmean(values):.2f} ({min(values):.2f} to {max(values):.2f})"
        lines.append(f"| {METHODS[key].label} | {spread} | {beside} | {len(values)} | {rate} |")
    return lines


def _scales(runs: Results) -> str:
    found = bars.gap(runs, "ghl-softmax", "ghl-softmax-layer")
    return "" if found is None else SCALES.format(gap=found)


def _steps(folder: Path) -> str:
    results = steps.read(folder)
    if not results:
        return ""
    lines = []
    for result in results:
        images = _images(result["settings"])
        lines += [(result["settings"]["model"], images, *cells) for cells in steps.cells(result["methods"])]
    return STEPS.format(
        headings=" | ".join(steps.HEADINGS),
        rule=" | ".join(["---"] * (2 + len(steps.HEADINGS))),
        rows="\n".join(f"| {' | '.join(line)} |" for line in lines),
        machines=_machines(results),
    )


def _images(settings: dict[str, Any]) -> str:
    numbers = "bfloat16 autocast" if settings["amp"] else "float32"
    size = settings["size"]
    return f"{settings['batch_size']} of {size} x {size}, {numbers}, learning rate {settings['lr']:g}"


def _machines(results: list[dict[str, Any]]) -> str:
    """A sentence for each machine, number of threads and version of torch that made the results."""
    return "\n".join(dict.fromkeys(_machine(result["environment"]) for result in results))


def _machine(found: dict[str, Any]) -> str:
    cpu, torch = found["machine"]["cpu"], found["versions"]["torch"]
    return f"Made on {cpu}, threads: {found['threads']}, torch {torch}."
