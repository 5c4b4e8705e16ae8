"""Writes docs/performance.md from the documents in bench/results/: ``python -m bench.performance``.

No number on that page is typed by hand. A document is what ``python -m ghl_kernels bench --json`` wrote, or a
folder of tools/gpu_check; quick selections and dry runs are left out.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from bench import figures, intensity, report
from bench.gpu import verdicts
from bench.gpu.kwta import COPY
from bench.gpu.stage import read_json
from bench.interleave import Spread
from bench.machine import ROOT
from bench.page import FIGURES, Measured, render
from bench.report import Row

RESULTS = ROOT / "bench" / "results"
PAGE = ROOT / "docs" / "performance.md"
_STAGES = ("environment", "pair", "kwta", "races", "steps", "scaling")  # of tools/gpu_check
# What runs where nothing is chosen, by stage; competitions are the CUDA kernels' where they are built.
_DEFAULTS = {"pair": ("ghl auto",), "kwta": ("ghl cuda",), "steps": (verdicts.SOFTMAX, verdicts.FEW)}
_AGAINST = {"pair": "the fastest rival", "kwta": "B7c", "steps": "backprop"}


def documents(folder: pathlib.Path = RESULTS) -> list[Measured]:
    """The full runs of the folder, by name."""
    found = []
    for path in sorted(folder.glob("*.json")):
        content = read_json(path)
        if content is None or content.get("format") != report.FORMAT or content["settings"]["quick"]:
            continue
        document = report.Document(path)
        found.append(Measured(path.stem, document.machine, document.settings, document.rows, document.runs))
    return found + [stages for path in sorted(folder.glob("*/pair.json")) if (stages := _stages(path.parent))]


def _stages(folder: pathlib.Path) -> Measured | None:
    """The rows of a folder of tools/gpu_check; None for a dry run."""
    found = {name: read_json(folder / f"{name}.json") for name in _STAGES}
    stages = {name: document for name, document in found.items() if document and not document["dry_run"]}
    if not stages:
        return None
    results = {name: document["results"] for name, document in stages.items()}
    environment = results.get("environment", {})
    package = (environment.get("package") or [{}])[0]
    machine = {
        **package,
        "device": "cuda",
        "gpu": {"name": next(iter(stages.values()))["measured_on"]},
        "ceilings": (environment.get("ceilings") or [{}])[0],
    }
    rows = [
        _stage_row(name, row)
        for name in ("pair", "kwta", "steps")
        for row in results.get(name, {}).get(name, [])
        if row.get("what") != COPY  # that selections are timed beside, and no rival
    ]
    classes = (*(name for name, *_ in intensity.CLASSES), intensity.NO_PRODUCTS)
    for name, sections in (("races", classes), ("scaling", ("rows",))):
        found_rows = [row for section in sections for row in results.get(name, {}).get(section, [])]
        rows += [Row.from_json(row) for row in found_rows]
    return Measured(folder.name, machine, {}, rows, [])


def _stage_row(stage: str, row: dict[str, Any]) -> Row:
    """A row of a stage's document; times are in microseconds there."""
    case = ", ".join(str(row[field]) for field in ("layer", "rule", "case", "network") if field in row)
    name = str(row.get("what") or row.get("method"))
    is_ours = name.startswith(("auto", "configured", "tile", "cuda", "triton", "GHL"))
    name = f"ghl {name}" if is_ours and not name.startswith("GHL") else name
    if row.get("us") is None:
        return Row(suite=stage, case=case, name=name, error=str(row.get("problem", "not timed")))
    seconds = Spread(*(1e-6 * row[field] for field in ("us", "us_p20", "us_p80")))
    factor = row.get("ratio") or row.get("times_faster") or row.get("times_faster_than_topk")
    operations = row["tflops"] * 1e12 * seconds.median if "tflops" in row else None
    return Row(
        suite=stage,
        case=case,
        name=name,
        against=_AGAINST[stage],
        seconds=seconds,
        ratio=Spread(factor, factor, factor) if factor else None,
        speedup=stage != "steps",
        operations=operations,
        bytes=operations / row["flop_per_byte"] if operations else None,
        floor_seconds=row["of_floor"] * seconds.median if row.get("of_floor") else None,
        peak_ratio=row.get("peak_ratio"),
        images_per_second=row.get("images_per_second"),
        auto=name.startswith(_DEFAULTS[stage]),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw the figures of every document and write the page."""
    argparse.ArgumentParser(
        prog="python -m bench.performance",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args(arguments)
    measured = documents()
    for document in measured:
        folder = FIGURES / document.name
        figures.write_all(document.rows, document.machine.get("ceilings", {}), folder)
    PAGE.write_text(render(measured))
    print(f"Wrote {PAGE.relative_to(ROOT)} from {len(measured)} documents.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
