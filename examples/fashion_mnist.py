"""Backprop, GHL and local rules on Fashion-MNIST: one network, all images, several seeds.

    python -m examples.fashion_mnist                          # what is missing of the whole table
    python -m examples.fashion_mnist --only backprop ghl-softmax --seeds 0 1
    python -m examples.fashion_mnist --report                 # docs/results.md from what is there
    python -m examples.fashion_mnist --report --out docs/results/fashion-mnist.json  # from what it kept
    python -m examples.fashion_mnist --search ghl-softmax     # learning rates, on held-out training images

Every method and seed is a run of its own, in a folder with its log and its checkpoint until its result is
written. A run that was stopped goes on where it was, a finished one is not repeated; so the table can be
made in pieces, by several processes if each has its own ``--only`` or ``--seeds``.

The network has DeepHebb's shape at an eighth of its width.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench import machine
from examples import data, report
from examples.batches import ALONE, MemoryBatches, evaluation_batches
from examples.methods import METHODS, READ_OUT_LR, Method, make_learner
from examples.models import DeepHebb
from examples.training import Row, Run, Training
from ghl_kernels.demo.arguments import positive, thread_count, torch_seed
from ghl_kernels.demo.ending import exit_code
from ghl_kernels.demo.errors import UserError
from ghl_kernels.demo.output import replacing

WIDTHS = (12, 48, 192)
SEARCH_TRAIN, SEARCH_HELD_OUT = 10_000, 10_000


def main(arguments: list[str] | None = None) -> int:
    """Run what the command line asks for; returns the exit code."""
    return exit_code(lambda: run(_parser().parse_args(arguments)))


def run(options: argparse.Namespace) -> None:
    """What the command line asks for.

    Raises:
        UserError: what the user can mend.
    """
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.report:
        print(f"Wrote {report.write(options.out, options.docs)}.")
    elif options.search:
        _search(options)
    else:
        images = data.limit(data.mnist(options.root), options.limit, options.limit)
        for seed in options.seeds:
            for key in options.only:
                run_one(METHODS[key], seed, images, options)


def run_one(method: Method, seed: int, images: data.Dataset, options: argparse.Namespace) -> list[Row]:
    """Train a method with a seed, unless its result is there already; returns a row per epoch."""
    folder = options.out / f"{method.key}-seed{seed}"
    settings = _settings(method, seed, images, options)
    path = folder / "result.json"
    if path.exists():
        return _finished(path, settings)
    made = machine.describe(torch.device("cpu"))  # of the code that runs: a commit may follow
    batches = MemoryBatches(images.train, options.batch_size, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        size = images.train.pixels.shape[-1]
        model = DeepHebb(WIDTHS, size=size, classes=images.classes, channels=images.train.pixels.shape[1])
    model.to(memory_format=torch.channels_last)  # poolings of one thread take half the time
    run = Run(
        batches,
        lambda: evaluation_batches(images.test, size, 0, ALONE),
        images.mean,
        images.std,
        options.epochs,
        folder,
        settings,
        channels_last=True,
        label=f"{method.label}, seed {seed}",
    )
    rows = Training(make_learner(method, model, options.local_epochs), run).fit()
    result = {"settings": settings, "rows": rows, "environment": made}
    with replacing(path) as unfinished:
        unfinished.write_text(json.dumps(result, indent=1) + "\n")
    (folder / "checkpoint.pt").unlink()
    return rows


def _settings(method: Method, seed: int, images: data.Dataset, options: argparse.Namespace) -> dict[str, Any]:
    """Everything that decides a run, as JSON types."""
    return {
        "method": method.key,
        "rule": str(method.rule),
        "lr": method.lr,
        "momentum": method.momentum,
        "weight_decay": method.weight_decay,
        "read_out_lr": READ_OUT_LR,
        "seed": seed,
        "epochs": options.epochs,
        "local_epochs": options.local_epochs,
        "batch_size": options.batch_size,
        "widths": list(WIDTHS),
        "data": images.name,
        "training_images": len(images.train),
        "test_images": len(images.test),
        "train": images.train.digest(),
        "test": images.test.digest(),
    }


def _finished(path: Path, settings: dict[str, Any]) -> list[Row]:
    result = report.read_result(path)
    if result["settings"] != settings:
        raise UserError(f"{path} is the result of other settings; give another --out, or delete it.")
    rows: list[Row] = result["rows"]
    return rows


def _search(options: argparse.Namespace) -> None:
    """Accuracy on held-out training images for each method's candidate rates; test images are not read."""
    whole = data.mnist(options.root)
    if len(whole.train) <= SEARCH_HELD_OUT:
        raise UserError(
            f"--search holds out {SEARCH_HELD_OUT} training images and needs more than these; "
            f"{options.root} has {len(whole.train)}."
        )
    images = data.limit(data.hold_out(whole, SEARCH_HELD_OUT), options.limit or SEARCH_TRAIN)
    table = Table("method", "learning rate", "held-out accuracy, %")
    for key in options.search:
        for lr in METHODS[key].lrs:
            method = dataclasses.replace(METHODS[key], key=f"search-{key}-{lr:g}", lr=lr)
            rows = run_one(method, options.seeds[0], images, options)
            table.add_row(METHODS[key].label, f"{lr:g}", f"{rows[-1]['accuracy']:.2f}")
    Console().print(table)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m examples.fashion_mnist",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = list(METHODS)
    parser.add_argument(
        "--only",
        nargs="+",
        choices=names,
        default=names,
        metavar="METHOD",
        help=f"of {', '.join(names)} (default: all)",
    )
    parser.add_argument(
        "--seeds", nargs="+", type=torch_seed, default=[0, 1, 2], metavar="SEED", help="default: 0 1 2"
    )
    parser.add_argument("--epochs", type=positive, default=5, help="of the gradient (default: %(default)s)")
    parser.add_argument(
        "--local-epochs", type=positive, default=1, help="of the local rules (default: %(default)s)"
    )
    parser.add_argument("--batch-size", type=positive, default=64, help="(default: %(default)s)")
    parser.add_argument("--limit", type=positive, metavar="N", help="only the first N images")
    parser.add_argument("--threads", type=thread_count, metavar="N", help="default: torch's choice")
    parser.add_argument(
        "--root",
        type=Path,
        default=data.FASHION_MNIST_ROOT,
        help="folder of the idx files (default: %(default)s)",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("examples/results/fashion-mnist"), help="(default: %(default)s)"
    )
    parser.add_argument("--search", nargs="+", choices=names, metavar="METHOD", help="try learning rates")
    parser.add_argument(
        "--report",
        action="store_true",
        help="write tables and figure of the runs in --out, which may also be the JSON that a report left, "
        "and of what imagenet --steps left in DOCS/results/steps",
    )
    parser.add_argument(
        "--docs",
        type=Path,
        default=Path("docs"),
        help="where --report writes results.md (default: %(default)s)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
