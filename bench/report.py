"""Rows beside their bars: the table that is printed and the JSON that is kept."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
from collections.abc import Sequence

import torch
from rich.table import Table
from rich.text import Text

from bench.interleave import Spread

ROOT = pathlib.Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class Bar:
    """What a median has to reach."""

    limit: float
    at_least: bool = False

    def met_by(self, median: float) -> bool:
        return median >= self.limit if self.at_least else median <= self.limit

    def __str__(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.limit:g}x"


@dataclasses.dataclass(frozen=True)
class Row:
    """One ratio. ``bar`` is None for a rival: it is shown, not judged."""

    suite: str
    name: str
    against: str
    ratio: Spread
    absolute: str
    bar: Bar | None = None

    @property
    def met(self) -> bool | None:
        return None if self.bar is None else self.bar.met_by(self.ratio.median)


def table(rows: Sequence[Row]) -> Table:
    """Every row, met or not."""
    out = Table(title="Ratios: median of the rounds", title_justify="left")
    for heading in ("suite", "what", "against"):
        out.add_column(heading)
    for heading in ("measured", "ratio", "p20 - p80", "bar", "met"):
        out.add_column(heading, justify="right", no_wrap=True)
    suite = None
    for row in rows:
        if suite not in (None, row.suite):
            out.add_section()
        suite = row.suite
        verdict = {None: Text("-"), True: Text("yes", "green"), False: Text("NO", "bold red")}[row.met]
        out.add_row(
            row.suite,
            row.name,
            row.against,
            row.absolute,
            f"{row.ratio.median:.3f}x",
            f"{row.ratio.p20:.3f} - {row.ratio.p80:.3f}",
            "-" if row.bar is None else str(row.bar),
            verdict,
        )
    return out


def write_json(path: pathlib.Path, rows: Sequence[Row], settings: dict[str, object]) -> None:
    """Write the rows with the machine, the versions, the commit and the settings they were measured with."""
    rows_out = [
        dataclasses.asdict(row) | {"bar": None if row.bar is None else str(row.bar), "met": row.met}
        for row in rows
    ]
    document = {"environment": environment(), "settings": settings, "rows": rows_out}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2) + "\n")


def environment() -> dict[str, object]:
    """The machine, the versions and the commit."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "ghl_kernels": _version("ghl_kernels"),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
    }


def _cpu_model() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    if "model name" not in fields:
        return platform.processor()
    return f"{fields['model name']} (family {fields.get('cpu family')}, model {fields.get('model')})"


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
