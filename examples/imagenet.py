"""ImageNet and networks of its size: several processes, bfloat16, channels_last, resuming.

    torchrun --nproc-per-node 8 -m examples.imagenet --root /path/to/imagenet --model resnet50
    python -m examples.imagenet --synthetic --model resnet50 --batch-size 32 --steps 5
    python -m examples.imagenet --synthetic --model resnet1202 --size 32 --classes 10 --steps 5

``--root`` holds train/CLASS/*.JPEG and val/CLASS/*.JPEG. With ``--steps N`` GHL and backprop take N steps
each from equal weights on equal batches, and a table says loss, peak memory and time of both; with
``--out docs/results`` the ``--report`` of fashion_mnist has it, too. A run that was stopped, or that lost a
process, goes on from its last checkpoint when the same command is given again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

import ghl_kernels as ghl
from bench import machine
from examples import curves, data, processes, steps
from examples.batches import Batches, FolderBatches, MemoryBatches, Share, evaluation_batches
from examples.learner import Learner
from examples.models import MODELS
from examples.training import Run, Training
from ghl_kernels.demo.arguments import (
    natural,
    nonnegative_number,
    positive,
    positive_number,
    thread_count,
    torch_seed,
)
from ghl_kernels.demo.ending import exit_code
from ghl_kernels.demo.errors import UserError
from ghl_kernels.demo.output import make_folder
from ghl_kernels.rule import HebbianRule

METHODS = ("ghl", "kwta", "backprop")
# what steps depend on besides the threads
STEPS_DEPEND_ON = (
    "model",
    "size",
    "classes",
    "images",
    "batch_size",
    "method",
    *steps.OWN,
    "lr",
    "momentum",
    "weight_decay",
    "seed",
    "amp",
    "steps",
)
WARMUP = 5
BATCH_NORM_FOLLOWS = ("resnet",)  # keeps u for its own backward: summing A then costs no memory


def main(arguments: list[str] | None = None) -> int:
    """Train, or take some steps; returns the exit code."""
    return exit_code(lambda: run(read_options(arguments)))


def run(options: argparse.Namespace) -> None:
    """What the command line asks for, in this process.

    Raises:
        UserError: what the user can mend.
    """
    if options.threads:
        torch.set_num_threads(options.threads)
    with placed() as (share, device):
        if options.steps:
            compare_steps(options, device)
        else:
            train(options, share, device)


@contextlib.contextmanager
def placed() -> Iterator[tuple[Share, torch.device]]:
    """This process's share of the work, and its device; alone unless torchrun started it."""
    if "WORLD_SIZE" not in os.environ:
        yield Share(), torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return
    with processes.joined() as device:
        yield Share(dist.get_rank(), dist.get_world_size()), device


def make_learner(options: argparse.Namespace, method: str, device: torch.device) -> Learner:
    """The network, converted for the method, with SGD; the rule sees the batch of all processes."""
    torch.manual_seed(options.seed)
    try:
        model = MODELS[options.model](size=options.size, classes=options.classes)
    except ValueError as error:
        raise UserError(f"--model {options.model}: {error}.") from None
    distributed = dist.is_initialized()
    if method != "backprop":
        rule = HebbianRule.kwta(options.k) if method == "kwta" else HebbianRule.ghl(options.temperature)
        sums_at = "backward" if options.model.startswith(BATCH_NORM_FOLLOWS) else "forward"
        try:
            ghl.convert(model, rule, gate_at="step" if distributed else "backward", sums_at=sums_at)
        except ValueError as error:
            raise UserError(f"--k {options.k}: {error}.") from None
    model.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        model.parameters(), options.lr, options.momentum, weight_decay=options.weight_decay
    )
    return Learner(model, [optimizer], amp=options.amp, distributed=distributed)


def make_run(options: argparse.Namespace, share: Share) -> Run:
    """Batches, schedule and folder of a run."""
    batches: Batches
    images, test = read_images(options)
    if isinstance(images, data.ImageFolder):
        batches = FolderBatches(
            images, options.batch_size, options.seed, options.size, options.workers, share
        )
    else:
        batches = MemoryBatches(images, options.batch_size, options.seed, share=share)
    name = f"{options.model}-{options.method}-seed{options.seed}"
    outside = ("out", "root", "workers", "steps", "checkpoint_every", "threads")
    settings = {key: str(value) for key, value in vars(options).items() if key not in outside}
    return Run(
        batches,
        lambda: evaluation_batches(test, options.size, options.workers, share),
        data.IMAGENET_MEAN,
        data.IMAGENET_STD,
        options.epochs,
        options.out / name,
        settings | {"train": images.digest(), "val": test.digest()},
        options.warmup,
        options.checkpoint_every,
        channels_last=True,
        share=share,
        label=name,
    )


def read_images(options: argparse.Namespace) -> tuple[data.Images | data.ImageFolder, ...]:
    """Images to train and to test on.

    Raises:
        UserError: folders that are missing or have other classes than the command line says.
    """
    if options.synthetic:
        shape = (3, options.size, options.size)
        kept = data.synthetic(shape, options.classes, options.images)
        return kept.train, kept.test
    folder, test = data.ImageFolder(options.root / "train"), data.ImageFolder(options.root / "val")
    if folder.classes != test.classes or len(folder.classes) > options.classes:
        raise UserError(
            f"{options.root} has {len(folder.classes)} classes in train and {len(test.classes)} in val; "
            f"they must be the same, and at most --classes {options.classes}."
        )
    return folder, test


def train(options: argparse.Namespace, share: Share, device: torch.device) -> None:
    """Train from where the run's checkpoint is; leaves log.csv and curves.png beside it."""
    run = make_run(options, share)
    rows = Training(make_learner(options, options.method, device), run).fit()
    if share.rank == 0:
        curves.draw({options.method: [rows]}, run.folder / "curves.png", run.label)
        print(f"{run.label}: {rows[-1]['accuracy']:.2f} % after {len(rows)} epochs; see {run.folder}.")


def compare_steps(options: argparse.Namespace, device: torch.device) -> None:
    """Keep losses, peak memory and seconds of ``--method`` and of backprop as JSON, and print them.

    Raises:
        UserError: under torchrun with several processes, or a folder that cannot be used.
    """
    if dist.is_initialized() and dist.get_world_size() > 1:
        raise UserError("--steps compares methods in one process; leave torchrun away.")
    run = make_run(options, Share())
    folder = options.out / "steps"
    make_folder(folder)
    methods = dict.fromkeys((options.method, "backprop"))
    learners = {method: make_learner(options, method, device) for method in methods}
    result = {
        "command": steps_command(options),
        "settings": {key: getattr(options, key) for key in ("synthetic", *STEPS_DEPEND_ON)},
        "environment": machine.describe(device),  # before the steps: a commit may follow
    }
    found = steps.take(learners, run, options.steps)
    path = folder / f"{options.model}-{options.method}.json"
    path.write_text(json.dumps(result | {"methods": found}, indent=1) + "\n")
    table = Table(*steps.HEADINGS)
    for row in steps.cells(found):
        table.add_row(*row)
    Console().print(table)  # the file first: nobody may read this to its end


def steps_command(options: argparse.Namespace) -> str:
    """The command that takes these steps again: every option that they depend on, whatever the defaults."""
    words = ["python -m examples.imagenet", "--synthetic" if options.synthetic else "--root DIR"]
    for key in STEPS_DEPEND_ON:
        if steps.OWN.get(key, options.method) == options.method:
            name, value = key.replace("_", "-"), getattr(options, key)
            if isinstance(value, bool):
                words.append(f"--{name}" if value else f"--no-{name}")
            else:
                words.append(f"--{name} {value}")
    return " ".join([*words, f"--threads {torch.get_num_threads()}"])


def read_options(arguments: list[str] | None) -> argparse.Namespace:
    """The command line, with a warm-up that ends before the run does."""
    command_line = parser()
    options = command_line.parse_args(arguments)
    if options.warmup is None:
        options.warmup = min(WARMUP, options.epochs // 2)
    if options.warmup >= options.epochs:
        command_line.error(
            f"--warmup {options.warmup} must be below --epochs {options.epochs}: "
            "the learning rate would never be reached"
        )
    return options


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.imagenet",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--root", type=Path, help="folder of train/ and val/")
    source.add_argument("--synthetic", action="store_true", help="random images of the real shape")
    parser.add_argument("--images", type=positive, default=256, help="synthetic ones (default: %(default)s)")
    parser.add_argument("--model", choices=sorted(MODELS), default="resnet50", help="(default: %(default)s)")
    parser.add_argument("--size", type=positive, default=224, help="pixels a side (default: %(default)s)")
    parser.add_argument("--classes", type=positive, default=1000, help="(default: %(default)s)")
    parser.add_argument("--method", choices=METHODS, default="ghl", help="(default: %(default)s)")
    parser.add_argument(
        "--k", type=positive, default=8, help="winners of --method kwta (default: %(default)s)"
    )
    parser.add_argument(
        "--temperature", type=positive_number, default=1.0, help="of --method ghl (default: %(default)s)"
    )
    parser.add_argument("--lr", type=positive_number, default=0.01, help="(default: %(default)s)")
    parser.add_argument("--momentum", type=nonnegative_number, default=0.0, help="(default: %(default)s)")
    parser.add_argument(
        "--weight-decay", type=nonnegative_number, default=1e-4, help="(default: %(default)s)"
    )
    parser.add_argument("--epochs", type=positive, default=90, help="(default: %(default)s)")
    parser.add_argument(
        "--warmup",
        type=natural,
        metavar="EPOCHS",
        help=f"in which the rate rises (default: {WARMUP}, at most half of --epochs)",
    )
    parser.add_argument(
        "--batch-size", type=positive, default=32, help="of each process (default: %(default)s)"
    )
    parser.add_argument(
        "--workers",
        type=natural,
        default=4,
        help="that decode images, of each process (default: %(default)s)",
    )
    parser.add_argument("--seed", type=torch_seed, default=0, help="(default: %(default)s)")
    parser.add_argument(
        "--amp", action=argparse.BooleanOptionalAction, default=True, help="bfloat16 (on unless --no-amp)"
    )
    parser.add_argument("--steps", type=positive, help="only compare so many steps with backprop's")
    parser.add_argument("--threads", type=thread_count, help="of each process (default: torch's choice)")
    parser.add_argument(
        "--checkpoint-every", type=positive, default=1000, metavar="STEPS", help="(default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, default=Path("examples/results"), help="(default: %(default)s)")
    return parser


if __name__ == "__main__":
    processes.leave(main())
