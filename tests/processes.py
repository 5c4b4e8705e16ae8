"""Start a test's function in several processes that talk over gloo, and bring back what each returned."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from examples.processes import leave

# What a process waits for another before it gives up: far above any wait of a test that passes.
PATIENCE = datetime.timedelta(seconds=120)


def join(rank: int, world: int, store: Path) -> None:
    """Make this process one of ``world`` that meet at the file ``store``."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        store=torch.distributed.FileStore(str(store), world),
        rank=rank,
        world_size=world,
        timeout=PATIENCE,
    )


def run(function: Callable[[int], Any], world: int, folder: Path) -> list[Any]:
    """``function(rank)`` in each of ``world`` processes; what they returned, by rank."""
    torch.multiprocessing.spawn(_process, (world, function, folder), nprocs=world)
    return [torch.load(folder / f"{rank}.pt") for rank in range(world)]


def _process(rank: int, world: int, function: Callable[[int], Any], folder: Path) -> None:
    join(rank, world, folder / "store")
    try:
        found = function(rank)
        torch.distributed.barrier()  # gloo aborts where a process leaves while its threads hear of another
    finally:
        torch.distributed.destroy_process_group()
    torch.save(found, folder / f"{rank}.pt")
    leave()
