"""examples.ddp as torchrun starts it, whole copies and sharded: both learn what one process does."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from idx_files import write_fashion_mnist

from examples import ddp


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


def test_a_wrong_folder_is_one_line() -> None:
    command = [sys.executable, "-m", "examples.ddp", "--data", "/absent"]
    # as torchrun starts it, which would add a traceback of its own
    started = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    done = subprocess.run(
        command, env=os.environ | started, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 2
    assert re.search(r"^error: /absent does not exist; expected there: .*\n\Z", done.stderr, re.MULTILINE)
    assert "--root" not in done.stderr
    assert "Traceback" not in done.stderr


def test_a_rate_below_zero_is_one_line() -> None:
    command = [sys.executable, "-m", "examples.ddp", "--lr", "-1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert "argument --lr: must be a finite number above 0, got '-1'" in done.stderr


def test_images_are_standardized(tmp_path: Path) -> None:
    write_fashion_mnist(tmp_path)
    x, target = ddp.images(tmp_path, 0)
    assert x.shape == (40, 1, 8, 8)
    assert target.shape == (40,)
    assert float(x.mean()) == pytest.approx(0.0, abs=1e-5)
    assert float(x.std(correction=0)) == pytest.approx(1.0, abs=1e-5)


def test_without_torchrun_it_says_how_to_start_it() -> None:
    command = [sys.executable, "-m", "examples.ddp"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert "torchrun --nproc-per-node 2 -m examples.ddp" in done.stderr
