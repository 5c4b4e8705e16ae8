"""Train over several processes; the result is that of one process on the whole batch.

    torchrun --nproc-per-node 2 -m examples.ddp                       # synthetic images
    torchrun --nproc-per-node 2 -m examples.ddp --data /path/to/fashion-mnist --shard

Every process takes a share of each batch. Shares may be unequal, as in an epoch's last batch, because
the loss is weighted by samples: the Hebbian sums are sums over samples and need no weight.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import ghl_kernels as ghl
from examples import data, processes
from examples.augment import standardize
from ghl_kernels.demo.arguments import positive, positive_number
from ghl_kernels.demo.ending import exit_code


def network() -> nn.Sequential:
    """Two convolutions and a read-out for images (B, 1, 28, 28) of ten classes."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 32, 5, padding=2, bias=False),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1, bias=False),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(1024, 10),
    )


def images(folder: Path | None, count: int) -> tuple[Tensor, Tensor]:
    """Fashion-MNIST's training images from the folder of its idx files, or noise around ten random images.

    ``count`` is that of the latter.
    """
    if folder is not None:
        found = data.mnist(folder)
        return standardize(found.train.pixels, found.mean, found.std), found.train.labels
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(10, (count,), generator=generator)
    prototypes = torch.randn(10, 1, 28, 28, generator=generator)
    return prototypes[labels] + torch.randn(count, 1, 28, 28, generator=generator), labels


def distributed(model: nn.Module, shard: bool) -> nn.Module:
    """The model over all processes: a whole copy in each, or its weights' rows spread over them."""
    if not shard:
        return DistributedDataParallel(model)
    for layer in model.children():
        if next(layer.parameters(), None) is not None:
            fully_shard(layer)
    return fully_shard(model)


def train(args: argparse.Namespace, device: torch.device) -> None:
    """The epochs of this process."""
    rank, world = dist.get_rank(), dist.get_world_size()
    x, target = images(args.data, args.images)
    # converted first: DDP and FSDP keep the parameters, and the optimizer must hold what they made of them
    model = distributed(ghl.convert(network().to(device), gate_at="step"), args.shard)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9)
    ghl.StepGate(optimizer, model)
    for epoch in range(args.epochs):
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(epoch))  # the same everywhere
        total = torch.zeros((), device=device)
        for batch in order.split(args.batch):
            share = batch[rank::world]
            logits = model(x[share].to(device))
            loss = F.cross_entropy(logits, target[share].to(device), reduction="sum")
            optimizer.zero_grad()
            (loss * world / len(batch)).backward()  # both wrappers average over processes
            optimizer.step()
            total += loss.detach()
        dist.all_reduce(total)
        if rank == 0:
            print(f"epoch {epoch + 1}: mean loss {total.item() / len(x):.4f}", flush=True)


def main() -> int:
    """Join the processes that torchrun started, and train; returns the exit code."""
    return exit_code(run)


def run() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.ddp",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, help="folder of Fashion-MNIST's idx files; default: synthetic")
    parser.add_argument(
        "--shard", action="store_true", help="fully_shard in place of DistributedDataParallel"
    )
    parser.add_argument("--images", type=positive, default=2000, help="synthetic ones (default: %(default)s)")
    parser.add_argument("--epochs", type=positive, default=2, help="(default: %(default)s)")
    parser.add_argument(
        "--batch",
        type=positive,
        default=192,
        help="images in a step, over all processes (default: %(default)s)",
    )
    parser.add_argument("--lr", type=positive_number, default=0.001, help="(default: %(default)s)")
    args = parser.parse_args()
    if "RANK" not in os.environ:
        parser.error("start it by torchrun, for instance: torchrun --nproc-per-node 2 -m examples.ddp")
    with processes.joined() as device:
        train(args, device)


if __name__ == "__main__":
    processes.leave(main())
