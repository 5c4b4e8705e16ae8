"""The processes that torchrun starts: joining them, and leaving."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import NoReturn

import torch
import torch.distributed as dist


@contextlib.contextmanager
def joined() -> Iterator[torch.device]:
    """Be one of the processes that torchrun started (NCCL on GPUs, else gloo); gives this one's device."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def leave(code: int = 0) -> NoReturn:
    """End this process, whose work is done, with an exit code and without ending its interpreter first.

    A thread of gloo's outlives its process group. It may still be letting go of the last tensor, for which it
    needs the interpreter, and aborts the process where that is ending (torch 2.13).
    """
    for stream in filter(None, (sys.stdout, sys.stderr)):  # a shell's >&- leaves None
        stream.flush()
    os._exit(code)
