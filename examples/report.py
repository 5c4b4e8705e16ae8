"""``docs/results.md`` and its figure, from the results that the examples left."""

from __future__ import annotations

import json
import statistics
import textwrap
from pathlib import Path
from typing import Any

from examples import bars, curves, steps
from examples.bars import Results
from examples.data import short
from examples.methods import METHODS
from ghl_kernels.demo.errors import UserError
from ghl_kernels.demo.output import make_folder

TEXT = """\
# Results

Written by `python -m examples.fashion_mnist --report`; the tables are made of what the commands left.

## Fashion-MNIST

{training_images:,} training and {test_images:,} test images; DeepHebb's shape at an eighth of its width
({widths} filters); batch {batch_size}, epochs {epochs}. {runs} of {wanted} runs are in.
{machines}

```
{command}
python -m examples.fashion_mnist --report
```

The first may be run in pieces (`--only METHOD ...`, `--seeds SEED ...`). The second writes this page of what
the first left, or, with `--out {kept}`, of the runs recorded there.

Every method starts from the same weights, sees the images in the same order and trains the same linear
read-out (Adam, {read_out_lr:g}); its filters have SGD with a cosine schedule. A local rule first trains the
filters, all layers at once, without a backward pass (epochs: {local_epochs}); they are frozen while the
read-out learns. SWTA-FH and HPCA-FH are rules of Lagani et al., FastHebb (formulas B8 and B9 in
[performance.md](performance.md)). Test accuracy in percent after the last epoch, mean of the seeds (lowest
to highest):

{table}

![learning curves](results/fashion-mnist.png)

What GHL is held to, at equal epochs, as mean differences over the seeds that both methods have:

{bars}

The read-out sees several positions of every filter, as DeepHebb's does, and learns from filters that never
moved, too: these are the row "{frozen}".
{scales}{softhebb}"""

SCALES = """
A scale per filter (`normalize="filter"`) gives every filter a step of the same size, the authors' has one for
the layer. The former ends {gap} the latter.
"""

SOFTHEBB = """
The row of SoftHebb is its rule alone: its authors' recipe (the Triangle activation, a learning rate for each
filter that depends on its norm, a schedule and temperatures of their own) was not run. Without it the rule
ends {gap} filters that never moved.
"""

STEPS = """
## Large networks, some steps

```
{commands}
```

From equal weights a method and backprop learn from equal batches, each step in turn. Peak memory is that of
the tensors during a step, above what they held before it. Seconds are those of the processor, summed over
threads (on a GPU, of the clock), the median of the steps between the first and the last. Each ratio is to
backprop in the same run; where backprop took the same steps in several runs it has one row, with its seconds
in each of them. Losses on synthetic images fall because few of them come again and again; they say that
training works, not which method is better.

| network | images | {headings} |
| {rule} |
{rows}

{machines}
The runs are in [{folder}]({folder}).
"""


def write(results: Path, docs: Path) -> Path:
    """Write ``results.md`` and ``results/fashion-mnist.{png,json}`` into ``docs``; returns the first.

    Args:
        results: folder of fashion_mnist's runs, or the JSON in which an earlier report has kept them.
        docs: where to write; what imagenet's ``--steps`` left in ``results/steps`` gets a table, too.

    Raises:
        UserError: no finished run, runs of unequal settings, or a file or folder that cannot be used.
    """
    runs = read(results)
    figures = docs / "results"
    make_folder(figures)
    common = _common_settings(runs)
    count = sum(map(len, runs.values()))
    text = TEXT.format(
        **common | {"widths": ", ".join(map(str, common["widths"]))},
        runs=count,
        wanted=len(METHODS) * len({seed for by_seed in runs.values() for seed in by_seed}),
        machines="\n".join(_machines(_all(runs))),
        command=_command(runs, common),
        kept=figures / "fashion-mnist.json",
        table="\n".join(_table(runs)),
        bars="\n".join(bars.table(runs)),
        frozen=METHODS["frozen"].label,
        scales=_gap(SCALES, runs, "ghl-softmax", "ghl-softmax-layer"),
        softhebb=_gap(SOFTHEBB, runs, "softhebb", "frozen"),
    )
    text += _steps(figures)
    drawn = {METHODS[key].label: [run["rows"] for run in by_seed.values()] for key, by_seed in runs.items()}
    curves.draw(drawn, figures / "fashion-mnist.png", "Fashion-MNIST: mean and range of the seeds")
    (figures / "fashion-mnist.json").write_text(json.dumps(runs, indent=1) + "\n")
    (docs / "results.md").write_text(text)
    return docs / "results.md"


def read(source: Path) -> Results:
    """Finished runs by method and seed, in the order of METHODS; those of ``--search`` are left out.

    Args:
        source: their folder, or the JSON that ``write`` made of them.

    Raises:
        UserError: there is none, or a file is no result.
    """
    if source.is_file():
        found = _kept(source)
    else:
        found = [read_result(path) for path in sorted(source.glob("*/result.json"))]
    runs: Results = {}
    for key in METHODS:
        of_method = [run for run in found if run["settings"]["method"] == key]
        if of_method:
            runs[key] = {run["settings"]["seed"]: run for run in of_method}
    if not runs:
        raise UserError(f"{source} has no finished run; python -m examples.fashion_mnist makes them.")
    return runs


def read_result(path: Path) -> dict[str, Any]:
    """What a finished run of fashion_mnist has left.

    Raises:
        UserError: the file cannot be read, is damaged, or is something else.
    """
    try:
        result: Any = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from None
    except ValueError:
        result = None
    if not isinstance(result, dict) or not result.keys() >= {"settings", "rows", "environment"}:
        raise UserError(
            f"{path} is damaged, or no result of examples.fashion_mnist; delete it to run that anew."
        )
    return result


def _kept(path: Path) -> list[dict[str, Any]]:
    try:
        return _all(json.loads(path.read_text()))
    except (ValueError, AttributeError):
        raise UserError(f"{path} is not the fashion-mnist.json that a report left.") from None


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
    all_settings = [run["settings"] for run in _all(runs)]
    for key in (*keys, "train", "test"):  # digests of the images, which the oldest runs do not have
        values = {json.dumps(short(settings.get(key))) for settings in all_settings}
        if len(values) > 1:
            raise UserError(f"The runs differ in {key} ({', '.join(sorted(values))}): they make no table.")
    return {key: all_settings[0][key] for key in keys}


def _all(runs: Results) -> list[dict[str, Any]]:
    return [run for by_seed in runs.values() for run in by_seed.values()]


def _command(runs: Results, common: dict[str, Any]) -> str:
    """The command that makes the runs; without threads where they had unequal numbers of them."""
    seeds = sorted({seed for by_seed in runs.values() for seed in by_seed})
    words = ["python -m examples.fashion_mnist --seeds", *map(str, seeds)]
    words += [f"--{key.replace('_', '-')} {common[key]}" for key in ("epochs", "local_epochs", "batch_size")]
    threads = {run["environment"]["threads"] for run in _all(runs)}
    if len(threads) == 1:
        words.append(f"--threads {threads.pop()}")
    return " ".join(words)


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


def _gap(text: str, runs: Results, method: str, other: str) -> str:
    """The text with the gap of two methods; "" where they have no seed in common."""
    found = bars.gap(runs, method, other)
    if found is None:
        return ""
    return text.format(gap=f"{abs(found):.2f} points {'above' if found >= 0.0 else 'below'}")


def _steps(figures: Path) -> str:
    """What the runs in ``figures / "steps"`` have to say; "" where there are none."""
    results = steps.read(figures / "steps")
    if not results:
        return ""
    commands = [f"{result['command']} --out {figures}" for result in results]
    return STEPS.format(
        commands="\n".join(map(_wrapped, commands)),
        headings=" | ".join(steps.HEADINGS),
        rule=" | ".join(["---"] * (2 + len(steps.HEADINGS))),
        rows="\n".join(f"| {' | '.join(line)} |" for line in _step_rows(results)),
        machines="\n".join(_machines(results)),
        folder=f"{figures.name}/steps",
    )


def _wrapped(command: str) -> str:
    return " \\\n    ".join(textwrap.wrap(command, 105, break_long_words=False, break_on_hyphens=False))


def _step_rows(results: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """A row for each method of each result, then backprop's: one for all results in which it did the same."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault(_steps_of_backprop(result), []).append(result)
    rows: list[tuple[str, ...]] = []
    for group in groups.values():
        settings = group[0]["settings"]
        cells = [row for result in group for row in steps.cells(result["methods"])]
        beside = [row for row in cells if row[0] == "backprop"]
        seconds = ", ".join(row[4] for row in beside)
        merged = (*beside[0][:4], seconds, beside[0][5])
        own = [row for row in cells if row[0] != "backprop"]
        rows += [(settings["model"], _images(settings), *row) for row in (*own, merged)]
    return rows


def _steps_of_backprop(result: dict[str, Any]) -> str:
    """Equal where backprop took the same steps, on the same machine, and the table says the same of them."""
    others = ("method", *steps.OWN)
    settings = {key: value for key, value in result["settings"].items() if key not in others}
    found, made = result["methods"]["backprop"], result["environment"]
    machine = made["machine"], made.get("gpu"), made["threads"], made["versions"]["torch"]
    return json.dumps([settings, found["losses"], found["peak_bytes"], machine], sort_keys=True)


def _images(settings: dict[str, Any]) -> str:
    kind = "synthetic, " if settings["synthetic"] else ""
    numbers = "bfloat16 autocast" if settings["amp"] else "float32"
    size = settings["size"]
    return f"{settings['batch_size']} of {size} x {size}, {kind}{numbers}, learning rate {settings['lr']:g}"


def _machines(results: list[dict[str, Any]]) -> list[str]:
    """A sentence for each machine, number of threads, version of torch and commit that made the results."""
    return list(dict.fromkeys(_machine(result["environment"]) for result in results))


def _machine(found: dict[str, Any]) -> str:
    machine, versions = found["machine"], found["versions"]
    name = f"{machine['cpu']} ({machine['cpu_model']})" if machine.get("cpu_model") else machine["cpu"]
    if "gpu" in found:
        name = found["gpu"]["name"]
    code = f"ghl_kernels {versions['ghl_kernels']}"
    if commit := found.get("commit"):
        changed = " with uncommitted changes" if found["uncommitted_changes"] else ""
        code = f"commit {commit[:12]}{changed}"
    return f"Made on {name}, threads: {found['threads']}, torch {versions['torch']}, {code}."
