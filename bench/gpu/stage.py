"""What every stage shares: its options, its deadline, and a document that is on disk after every result."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import pathlib
import subprocess
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch

import ghl_kernels as ghl
from bench.gpu import cuda_form
from ghl_kernels.demo.output import replacing

ROOT = pathlib.Path(__file__).resolve().parents[2]
KERNELS = ("triton", "cuda")
T = TypeVar("T")
DRY_RUN = "DRY RUN ON A CPU: these numbers say nothing about a GPU"
_CLOCKS = "clocks.sm,clocks.mem,temperature.gpu,power.draw,utilization.gpu,pstate"


class Options(NamedTuple):
    """Of a stage's command line.

    Attributes:
        out: folder of the documents.
        cache: folder of what later stages find built; None: ``out``.
        stages: those that will follow this one; empty: all.
        small: the dry run's shapes.
    """

    out: pathlib.Path
    seconds: float = 120.0
    cache: pathlib.Path | None = None
    stages: tuple[str, ...] = ()
    small: bool = False
    dry_run: bool = False


class Stage:
    """One stage of the check.

    Every result is written to ``<out>/<name>.json`` the moment it is there, so that a crash or a time-out
    costs only what had not been measured. What fails is recorded with its reason and the stage goes on,
    unless the GPU itself no longer answers.
    """

    def __init__(self, name: str, options: Options) -> None:
        self.out = options.out
        self.cache = options.cache or options.out
        self.later = frozenset(options.stages)
        self.dry = options.dry_run
        self.small = options.dry_run or options.small
        self.device = torch.device("cpu" if self.dry else "cuda")
        self._start = time.monotonic()
        self._seconds = options.seconds
        self._path = self.out / f"{name}.json"
        self.errors: list[str] = []
        self._document: dict[str, Any] = {
            "stage": name,
            "measured_on": DRY_RUN if self.dry else torch.cuda.get_device_name(),
            "dry_run": self.dry,
            "complete": False,
            "clocks_before": clocks(),
            "results": {},
            "not_done": [],
            "errors": self.errors,
        }
        self._write()

    @property
    def left(self) -> float:
        """Seconds until the stage should be done."""
        return self._seconds - (time.monotonic() - self._start)

    @contextlib.contextmanager
    def share(self, part: float) -> Iterator[None]:
        """Inside, no more than this part of the time that is left may be used."""
        before = self._seconds
        self._seconds -= (1 - part) * max(0.0, self.left)
        try:
            yield
        finally:
            self._seconds = before

    def add(self, section: str, *rows: dict[str, Any]) -> None:
        """Append rows to a section and write the document."""
        self._document["results"].setdefault(section, []).extend(rows)
        self._write()

    def each(self, items: Iterable[T], name: Callable[[T], str], least: float = 0.0) -> Iterator[T]:
        """The items while more than ``least`` seconds are left; the others are recorded as not done."""
        for item in items:
            if self.left < least:
                self._document["not_done"].append(f"{name(item)}: out of time")
                continue
            yield item

    def begin(self, what: str) -> None:
        """Have it in the document what this process is busy with, should it not come back."""
        self._document["doing"] = what
        self._write()

    def attempt(self, what: str, action: Callable[[], T]) -> T | None:
        """The action's result, or None after recording why there is none.

        Raises:
            RuntimeError: the GPU does not answer any more.
        """
        print(what, flush=True)  # the log's last line names what a hanging GPU was busy with
        try:
            return action()
        except Exception as error:  # a stage reports, whatever happened
            last = traceback.extract_tb(error.__traceback__)[-1]
            reason = (str(error).strip().splitlines() or [""])[0][:400]
            where = f"{pathlib.Path(last.filename).name}:{last.lineno}"
            self.errors.append(f"{what}: {type(error).__name__}: {reason} ({where})")
            self._write()
            if not self.dry:
                torch.cuda.synchronize()
            return None

    def absent(self, what: str, reason: str) -> None:
        """Record what this machine cannot do; that is no error."""
        self._document["not_done"].append(f"{what}: {reason}")
        self._write()

    def finish(self) -> int:
        """Write the last of the document; the exit status."""
        self._document["complete"] = True
        self._document["clocks_after"] = clocks()
        self._write()
        return 1 if self.errors else 0

    def _write(self) -> None:
        self._document["seconds"] = round(time.monotonic() - self._start, 1)
        write_json(self._path, self._document)


def available_kernels(this: Stage) -> list[str]:
    """The backends of fused kernels that run here; one that is not there is recorded with its reason."""
    found = []
    for status in ghl.backends():
        if status.name not in KERNELS:
            continue
        if status.available:
            found.append(status.name)
        else:
            this.absent(f"backend {status.name}", status.reason)
    return found


def main(name: str, run: Callable[[Stage], None], arguments: Sequence[str] | None = None) -> int:
    """Parse a stage's options and run it."""
    parser = argparse.ArgumentParser(prog=f"python -m bench.gpu.{name}")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of the documents")
    parser.add_argument("--seconds", type=float, default=60.0, help="time for the stage")
    parser.add_argument("--cache", type=pathlib.Path, help="folder of what later stages find built")
    parser.add_argument(
        "--stages",
        type=lambda text: tuple(text.split(",")),
        default=(),
        help="those that will follow this one; default: all",
    )
    parser.add_argument("--small", action="store_true", help="the dry run's shapes")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU, in the interpreter")
    options = Options(**vars(parser.parse_args(arguments)))
    options.out.mkdir(parents=True, exist_ok=True)
    if options.dry_run:
        _interpret_bfloat16()
    torch.manual_seed(0)
    stage = Stage(name, options)
    with cuda_form.sound():
        stage.attempt(name, lambda: run(stage))
    return stage.finish()


def _interpret_bfloat16() -> None:
    """The tests' repair of bfloat16 in Triton's interpreter, where both are at hand."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        import triton_bf16

        triton_bf16.install()


def write_json(path: pathlib.Path, document: object) -> None:
    """Write strict JSON in one step: a reader sees the old document or the new one."""
    with replacing(path) as unfinished:
        unfinished.write_text(json.dumps(_plain(document), indent=1, allow_nan=False) + "\n")


def read_json(path: pathlib.Path) -> dict[str, Any] | None:
    """The document, or None where there is none to be read."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _plain(value: Any) -> Any:
    """JSON knows neither NaN nor infinity; they become their names."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def clocks() -> dict[str, str] | str:
    """What nvidia-smi says of clocks, temperature and power now; only read, never set."""
    command = ["nvidia-smi", f"--query-gpu={_CLOCKS}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "nvidia-smi is absent or does not answer"
    first = done.stdout.strip().splitlines()[0] if done.stdout.strip() else ""
    return dict(zip(_CLOCKS.split(","), (part.strip() for part in first.split(",")), strict=False))
