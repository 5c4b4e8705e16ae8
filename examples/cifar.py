"""CIFAR-10 and CIFAR-100 with the authors' hyper-parameters.

    python -m examples.cifar --root /path/to/cifar --model deephebb --method ghl
    python -m examples.cifar --synthetic --limit 512 --epochs 2 --method kwta --k 8

The presets are those of Hua et al., arXiv 2601.21367: SGD without momentum, weight decay after the gate, a
cosine schedule; DeepHebb has a temperature for each convolution. The read-out's learning rate, the
augmentation (crop with padding 4, mirror), the batch and the number of epochs are choices of these examples.
A run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

import ghl_kernels as ghl
from examples import curves, data
from examples.augment import random_crop_and_flip
from examples.batches import ALONE, MemoryBatches, evaluation_batches
from examples.learner import Learner
from examples.models import MODELS
from examples.training import Run, Training
from ghl_kernels.demo.arguments import positive, positive_number, thread_count, torch_seed
from ghl_kernels.demo.ending import exit_code
from ghl_kernels.demo.errors import UserError
from ghl_kernels.nn import GHLLayer
from ghl_kernels.rule import HebbianRule, Normalize


@dataclasses.dataclass(frozen=True)
class Preset:
    """The authors' settings for a network: temperatures by convolution, 1 / t_invert, or one for all."""

    lr: float
    weight_decay: float
    temperatures: Sequence[float] = (1.0,)


PRESETS = {
    "deephebb": Preset(1e-2, 5e-2, (1.0, 1 / 0.65, 1 / 0.25)),
    "fasthebb": Preset(5e-2, 1e-2),
}
SYNTHETIC_IMAGES = 2048


def convert(model: nn.Module, method: str, preset: Preset, k: int, normalize: Normalize = "layer") -> None:
    """Let the convolutions learn by "ghl" or "kwta"; "backprop" leaves the model as it is.

    Raises:
        UserError: a layer has fewer than ``k`` units.
    """
    if method == "backprop":
        return
    activity = "linear" if method == "kwta" else "softmax"
    rule = HebbianRule(activity=activity, winners=k if method == "kwta" else None, normalize=normalize)
    try:
        ghl.convert(model, rule)
    except ValueError as error:
        raise UserError(f"--k {k}: {error}.") from None
    if method == "ghl" and len(preset.temperatures) > 1:
        layers = [m for m in model.modules() if isinstance(m, GHLLayer)]
        for layer, temperature in zip(layers, preset.temperatures, strict=True):
            layer.set_rule(dataclasses.replace(rule, temperature=temperature))


def make_learner(options: argparse.Namespace, classes: int) -> Learner:
    """The network of the preset with SGD for its convolutions and for its read-out."""
    preset = PRESETS[options.model]
    torch.manual_seed(options.seed)
    model = MODELS[options.model](size=32, classes=classes)
    convert(model, options.method, preset, options.k, options.normalize)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    layout = torch.channels_last if options.channels_last else torch.contiguous_format
    model.to(device, memory_format=layout)
    lr = preset.lr if options.lr is None else options.lr
    read_out = list(model.classifier.parameters())
    filters = [p for p in model.parameters() if all(p is not other for other in read_out)]
    groups = [
        {"params": filters, "lr": lr, "weight_decay": preset.weight_decay},
        {"params": read_out, "lr": options.read_out_lr},
    ]
    return Learner(model, [torch.optim.SGD(groups)], amp=options.amp)


def main(arguments: list[str] | None = None) -> int:
    """Train; returns the exit code."""
    return exit_code(lambda: train(parser().parse_args(arguments)))


def train(options: argparse.Namespace) -> None:
    """Train from where the run's checkpoint is; leaves log.csv and curves.png beside it.

    Raises:
        UserError: what the user can mend.
    """
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.synthetic:
        images = data.synthetic((3, 32, 32), options.classes, SYNTHETIC_IMAGES, SYNTHETIC_IMAGES // 8)
    else:
        images = data.cifar(options.root, options.classes)
    images = data.limit(images, options.limit, options.limit)
    name = f"{images.name}-{options.model}-{options.method}-seed{options.seed}"
    folder = options.out / name
    learner = make_learner(options, images.classes)
    batches = MemoryBatches(
        images.train, options.batch_size, options.seed, lambda x, g: random_crop_and_flip(x, 4, g)
    )
    outside = ("out", "root", "threads")
    settings = {key: str(value) for key, value in vars(options).items() if key not in outside}
    run = Run(
        batches,
        lambda: evaluation_batches(images.test, 32, 0, ALONE),
        images.mean,
        images.std,
        options.epochs,
        folder,
        settings | {"train": images.train.digest(), "test": images.test.digest()},
        channels_last=options.channels_last,
        label=name,
    )
    rows = Training(learner, run).fit()
    curves.draw({options.method: [rows]}, folder / "curves.png", name)
    print(f"{name}: {rows[-1]['accuracy']:.2f} % after {len(rows)} epochs; curves and log in {folder}.")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.cifar",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--root", type=Path, help="folder of CIFAR's python batches")
    source.add_argument("--synthetic", action="store_true", help="random images of CIFAR's shape")
    parser.add_argument("--classes", type=int, choices=(10, 100), default=10, help="(default: %(default)s)")
    parser.add_argument("--model", choices=sorted(PRESETS), default="deephebb", help="(default: %(default)s)")
    parser.add_argument(
        "--method", choices=("ghl", "kwta", "backprop"), default="ghl", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--k", type=positive, default=8, help="winners of --method kwta (default: %(default)s)"
    )
    parser.add_argument(
        "--normalize",
        choices=("layer", "filter"),
        default="layer",
        help="scope of the update's scale (default: %(default)s)",
    )
    parser.add_argument("--lr", type=positive_number, help="of the convolutions (default: the preset's)")
    parser.add_argument("--read-out-lr", type=positive_number, default=0.01, help="(default: %(default)s)")
    parser.add_argument("--epochs", type=positive, default=50, help="(default: %(default)s)")
    parser.add_argument("--batch-size", type=positive, default=64, help="(default: %(default)s)")
    parser.add_argument("--seed", type=torch_seed, default=0, help="(default: %(default)s)")
    parser.add_argument("--limit", type=positive, metavar="N", help="only the first N images")
    parser.add_argument("--threads", type=thread_count, metavar="N", help="default: torch's choice")
    parser.add_argument("--amp", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument(
        "--out", type=Path, default=Path("examples/results/cifar"), help="(default: %(default)s)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
