"""The ``demo`` command: its options, and the run from data to table, figure and JSON."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ghl_kernels import environment
from ghl_kernels.demo.arguments import positive, thread_count

from . import checkout, cost, data, train
from .errors import UserError
from .methods import PRESETS, Settings
from .output import make_folder

if TYPE_CHECKING:
    from .progress import Progress

_DESCRIPTION = """\
Train one small CNN five ways on real images and print one table: backprop, GHL with softmax
competition, GHL with k winners, a purely local rule, and frozen random filters; with test accuracy,
images per second, step time relative to backprop and peak memory of a step.

DIR receives demo-DATA.png (learning curves and first-layer filters) and demo-DATA.json (everything).
"""


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the ``demo`` command to a parser's commands."""
    parser = commands.add_parser(
        "demo",
        help="train one small CNN five ways on real images and compare",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    images = parser.add_argument_group("images")
    images.add_argument(
        "--data",
        choices=sorted(PRESETS),
        default="digits",
        help="digits (the default) come with scikit-learn, fashion-mnist is read from idx files",
    )
    images.add_argument(
        "--root",
        type=Path,
        metavar="DIR",
        help=f"folder of fashion-mnist's four idx files, plain or .gz (default: {data.FASHION_MNIST_ROOT})",
    )
    images.add_argument(
        "--limit",
        type=positive,
        metavar="N",
        help="use only the first N training and the first N test images",
    )
    images.add_argument(
        "--validation",
        action="store_true",
        help="to choose settings: test on the last quarter of the training images, which then do not train",
    )
    training = parser.add_argument_group("training (defaults depend on the images)")
    training.add_argument("--epochs", type=positive, metavar="N", help="passes through the training images")
    training.add_argument("--seeds", type=positive, metavar="N", help="train with seeds 0 to N-1")
    training.add_argument("--batch-size", type=positive, metavar="N", help="images per step")
    training.add_argument(
        "--lr",
        type=_rate,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="initial learning rate of the filters (NAME: backprop, ghl-softmax, ghl-kwta, local) or of "
        "every method's read-out (NAME: read-out); may be repeated",
    )
    training.add_argument(
        "--threads",
        type=thread_count,
        metavar="N",
        help="threads (default: 1 for digits, else torch's choice)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("demo-out"),
        metavar="DIR",
        help="folder for the results (default: demo-out)",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Run the demo.

    Raises:
        UserError: a missing package or data set, a bad file, or a folder that cannot be written.
    """
    if arguments.root is not None and arguments.data == "digits":
        raise UserError("--root is for --data fashion-mnist; the digits come with scikit-learn.")
    with _packages():
        from . import figure, report
        from .progress import Progress
    settings = _settings(arguments)
    images = data.load(arguments.data, arguments.root, arguments.limit, arguments.validation)
    make_folder(arguments.out)
    # the profiler that measures memory would write two lines of its own for every step it sees
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with _threads(arguments.threads or settings.threads):
        made = environment.collect() | checkout.describe()  # of the code that runs: a commit may follow
        started = time.perf_counter()
        seeds = range(arguments.seeds or settings.seeds)
        with Progress(_total(settings, seeds), sys.stderr) as progress:
            runs = _train_all(settings, images, seeds, progress)
            costs = _measure(settings, images, progress)
        seconds = time.perf_counter() - started
        results = report.Results(settings, images, runs, costs, seconds, arguments.validation, made)
        stem = f"demo-{arguments.data}"
        paths = arguments.out / f"{stem}.png", arguments.out / f"{stem}.json"
        try:
            report.write_json(results, paths[1])
            figure.write(results, paths[0])
        except OSError as error:
            raise UserError(f"{arguments.out} cannot be written: {error.strerror or error}.") from None
        finally:  # the files first, as nobody may read this to its end
            report.print_table(results)
    print(f"Wrote {paths[0]} and {paths[1]}.")


def _train_all(
    settings: Settings, images: data.Dataset, seeds: range, progress: Progress
) -> dict[str, dict[int, train.Run]]:
    runs: dict[str, dict[int, train.Run]] = {method.key: {} for method in settings.methods}
    for seed in seeds:
        for method in settings.methods:
            progress.describe(f"{method.label}, seed {seed}")
            done = train.train(method, settings, images, seed, progress.advance)
            runs[method.key][seed] = done
            progress.note(f"{method.label}, seed {seed}: {done.accuracy[-1]:.1f} %")
    return runs


def _measure(settings: Settings, images: data.Dataset, progress: Progress) -> dict[str, cost.Cost]:
    progress.describe("step time and memory")
    rounds = cost.measured_rounds()
    return cost.measure(settings, images, lambda: progress.advance(1 / rounds))


def _total(settings: Settings, seeds: range) -> float:
    return 1 + len(seeds) * sum(train.passes(method, settings) for method in settings.methods)


def _settings(arguments: argparse.Namespace) -> Settings:
    settings = PRESETS[arguments.data]
    changes: dict[str, Any] = {}
    if arguments.epochs:
        share = settings.local_epochs / settings.epochs
        changes |= {"epochs": arguments.epochs, "local_epochs": max(1, round(share * arguments.epochs))}
    if arguments.batch_size:
        changes["batch_size"] = arguments.batch_size
    unknown = [name for name, _ in arguments.lr if name not in settings.learning_rates]
    if unknown:
        allowed = ", ".join(settings.learning_rates)
        raise UserError(f"--lr knows no {unknown[0]!r}; the names are {allowed}.")
    changes["learning_rates"] = {**settings.learning_rates, **dict(arguments.lr)}
    return dataclasses.replace(settings, **changes)


@contextlib.contextmanager
def _packages() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        missing = (error.name or "a package").partition(".")[0]
        raise UserError(f"The demo needs {missing}, which is not installed; pip install {missing}.") from None


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _rate(text: str) -> tuple[str, float]:
    name, _, number = text.partition("=")
    try:
        value = float(number)
    except ValueError:
        value = -1.0
    if not 0.0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, VALUE finite and at least 0, got {text!r}")
    return name, value
