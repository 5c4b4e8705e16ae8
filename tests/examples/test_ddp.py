"""examples.ddp as torchrun starts it, whole copies and sharded: both learn what one process does."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest


def losses(processes: int, *arguments: str) -> list[float]:
    """Mean losses of the epochs; the shares of the last step, of eleven images, are unequal."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes), "-m", "examples.ddp", *arguments]
    command += ["--images", "131", "--batch", "40", "--epochs", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return [float(loss) for loss in re.findall(r"^epoch \d+: mean loss (\S+)$", done.stdout, re.MULTILINE)]


def test_two_processes_learn_what_one_does_sharded_or_not() -> None:
    alone = losses(1)
    assert len(alone) == 2
    assert alone[1] < alone[0]
    # a gradient that is all but zero may round to another sign
    assert losses(2) == pytest.approx(alone, rel=1e-3)
    assert losses(2, "--shard") == pytest.approx(alone, rel=1e-3)


def test_without_torchrun_it_says_how_to_start_it() -> None:
    command = [sys.executable, "-m", "examples.ddp"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert "torchrun --nproc-per-node 2 -m examples.ddp" in done.stderr
