"""Writes docs/performance.md from the documents in bench/results/: ``python -m bench.performance``.

No number on that page is typed by hand. A document is what ``python -m ghl_kernels bench --json`` wrote, or a
folder of tools/gpu_check; quick selections and dry runs are left out.
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from bench import figures, intensity, report, scaling
from bench.baselines import BASELINES
from bench.gpu.stage import read_json
from bench.interleave import Spread
from bench.machine import ROOT
from bench.races import SUITES as RACES
from bench.report import Row, duration

RESULTS = ROOT / "bench" / "results"
PAGE = ROOT / "docs" / "performance.md"
FIGURES = ROOT / "docs" / "performance"
_STAGES = ("environment", "pair", "kwta", "races", "steps", "scaling")  # of tools/gpu_check
_INTRODUCTION = """\
# Performance

Written by `python -m bench.performance` from the documents in `bench/results/`; no number here is typed by
hand. A ratio is the median of interleaved rounds of one run (`bench/interleave.py`), printed only for results
that were compared with the float64 reference in the same run. The floor of an operation is
max(bytes / copy bandwidth, operations / matrix rate) of that machine, measured in the same run, with every
tensor moved once (`bench/work.py`).
"""


class Measured(NamedTuple):
    """One document: where it came from, the machine, the settings, the rows."""

    name: str
    machine: dict[str, Any]
    settings: dict[str, Any]
    rows: list[Row]

    @property
    def is_gpu(self) -> bool:
        return self.machine.get("device") == "cuda"


def documents(folder: pathlib.Path = RESULTS) -> list[Measured]:
    """The full runs of the folder, by name."""
    found = []
    for path in sorted(folder.glob("*.json")):
        content = read_json(path)
        if content is None or content.get("format") != report.FORMAT or content["settings"]["quick"]:
            continue
        document = report.Document(path)
        found.append(Measured(path.stem, document.machine, document.settings, document.rows))
    return found + [stages for path in sorted(folder.glob("*/pair.json")) if (stages := _stages(path.parent))]


def render(measured: Sequence[Measured]) -> str:
    """The page."""
    cpu = [document for document in measured if not document.is_gpu]
    gpu = [document for document in measured if document.is_gpu]
    parts = [_INTRODUCTION, "## On a CPU\n"]
    parts += [_cpu(document) for document in cpu] or ["No CPU has been measured yet.\n"]
    parts.append("## On a GPU\n")
    parts += [_gpu(document) for document in gpu] or ["No GPU has been measured yet: there is no document.\n"]
    parts += ["## The baselines\n", _baselines()]
    return "\n".join(parts)


def _cpu(document: Measured) -> str:
    parts = [
        f"### {document.name}\n",
        _machine(document),
        _reproduce(document),
        "#### Bars\n",
        _bars(document.rows),
        "#### Where a rival is faster\n",
        _losses(document.rows),
        _figures(document),
    ]
    for suite in dict.fromkeys(row.suite for row in document.rows):
        rows = [row for row in document.rows if row.suite == suite]
        table = _race_table(rows) if suite in RACES else _row_table(rows)
        parts += [f"#### {suite}\n", table]
    return "\n".join(parts)


def _gpu(document: Measured) -> str:
    """The operations by class of arithmetic intensity, with the geometric mean of each, then the rest."""
    parts = [f"### {document.name}\n", _machine(document), _reproduce(document)]
    for label, *_ in intensity.CLASSES:
        rows = [row for row in document.rows if intensity.class_of(row) == label]
        if rows:
            parts += [f"#### {label} FLOP per byte\n", _mean(rows), _race_table(rows)]
    rest = [row for row in document.rows if row.intensity is None]
    parts += ["#### Where a rival is faster\n", _losses(document.rows)]
    parts += ["#### Steps and selections\n", _row_table(rest)] if rest else []
    return "\n".join(parts)


def _machine(document: Measured) -> str:
    machine, clocks = document.machine, document.machine.get("clocks", {})
    gpu = machine.get("gpu", {}).get("name")
    changed = " with uncommitted changes" if machine.get("uncommitted_changes") else ""
    mhz = [value for when in ("before", "after") for value in clocks.get(when, {}).get("cpu_mhz", [])]
    load = [clocks[when]["load_average"][0] for when in clocks if clocks[when].get("load_average")]
    limits = ", ".join(
        f"{name} {value / 1e9:.4g} {'GB/s' if name == 'copy' else 'GFLOP/s'}"
        for name, value in machine.get("ceilings", {}).items()
    )
    versions = ", ".join(
        f"{name} {version}" for name, version in machine.get("versions", {}).items() if version
    )
    facts = (
        ("hardware", gpu or machine["machine"]["cpu"]),
        ("threads", document.settings.get("threads")),
        ("instruction set", machine.get("instruction_set")),
        ("ceilings, measured", limits),
        ("clocks before and after, MHz", f"{min(mhz):.0f} to {max(mhz):.0f}" if mhz else None),
        ("load average before and after", " and ".join(f"{value:.2f}" for value in load)),
        ("rounds, at most", document.settings.get("rounds")),
        ("versions", versions),
        ("commit", f"{machine['commit']}{changed}" if machine.get("commit") else None),
    )
    return _table(("", ""), [(name, value) for name, value in facts if value])


def _reproduce(document: Measured) -> str:
    settings = document.settings
    if "suites" not in settings:
        return "To reproduce: `tools/gpu_check`.\n"
    options = [f"--threads {settings['threads']}", f"--rounds {settings['rounds']}"]
    options += ["--device cuda"] if document.is_gpu else []
    options += [f"--baseline {' '.join(settings['baselines'])}"] if settings["baselines"] else []
    return (
        f"To reproduce: `python -m ghl_kernels bench {' '.join(options)} --json bench/results/"
        f"{document.name}.json --out figures`; one table with `--suite` and its heading.\n"
    )


def _bars(rows: Sequence[Row]) -> str:
    judged = [row for row in rows if row.bar is not None]
    if not judged:
        return "No row of this run has a bar.\n"
    lines = [
        (row.suite, row.case, row.name, row.against, _ratio(row), row.bar, "yes" if row.met else "**no**")
        for row in judged
    ]
    return _table(("suite", "case", "what", "against", "ratio (p20 to p80)", "bar", "met"), lines)


def _losses(rows: Sequence[Row]) -> str:
    """Every case in which a rival's median is below that of our best backend."""
    lines = []
    for case in intensity.by_case(rows):
        ours = intensity.fastest(row for row in case if row.is_ours)
        rival = intensity.fastest(
            row for row in case if not row.is_ours and not row.name.startswith("backprop")
        )
        if ours is None or rival is None or _seconds(rival) >= _seconds(ours):
            continue
        assert ours.seconds is not None
        assert rival.seconds is not None
        factor = _seconds(ours) / _seconds(rival)
        overlap = "yes" if rival.seconds.p80 >= ours.seconds.p20 else "no"
        floors = [_floor(row) for row in (ours, rival)]
        lines.append((ours.suite, ours.case, ours.name, rival.name, f"{factor:.3g}x", overlap, *floors))
    if not lines:
        return "In no case of this run.\n"
    lines.sort(key=lambda line: -float(line[4].rstrip("x")))
    headings = (
        "suite",
        "case",
        "ours",
        "rival",
        "slower by",
        "spreads overlap",
        "ours / floor",
        "rival / floor",
    )
    return _table(headings, lines)


def _race_table(rows: Sequence[Row]) -> str:
    """A line for every case: our fastest backend, its distance from the floor, and the rivals."""
    lines = []
    for case in intensity.by_case(rows):
        ours = intensity.fastest(row for row in case if row.is_ours)
        if ours is None:
            lines.append((case[0].case, "failed", "", "", ""))
            continue
        rivals = sorted((row for row in case if not row.is_ours and row.seconds), key=_seconds)
        factors = ", ".join(f"{row.name} {_seconds(row) / _seconds(ours):.3g}x" for row in rivals)
        lines.append((ours.case, ours.name, duration(_seconds(ours)), _floor(ours), factors))
    missing = {f"{row.name}: {row.error or row.note}" for row in rows if row.ratio is None}
    table = _table(("case", "our fastest", "time", "time / floor", "times faster than"), lines)
    return table + "".join(f"\nNot timed: {text}\n" for text in sorted(missing))


def _row_table(rows: Sequence[Row]) -> str:
    """Every row as it was measured."""
    columns: dict[str, Callable[[Row], str]] = {
        "case": lambda row: row.case,
        "what": lambda row: row.name,
        "against": lambda row: row.against,
        "time": lambda row: duration(row.seconds.median) if row.seconds else "",
        "ratio (p20 to p80)": _ratio,
        "peak memory": lambda row: f"{row.peak_ratio:.3f}x" if row.peak_ratio else "",
        "images/s": lambda row: f"{row.images_per_second:.4g}" if row.images_per_second else "",
        "note": lambda row: row.error or row.note or "",
    }
    filled = {name: cell for name, cell in columns.items() if any(cell(row) for row in rows)}
    return _table(tuple(filled), [tuple(cell(row) for cell in filled.values()) for row in rows])


def _figures(document: Measured) -> str:
    folder = FIGURES / document.name
    if not folder.is_dir():
        return ""
    images = [
        f"![{path.stem}](performance/{document.name}/{path.name})" for path in sorted(folder.glob("*.svg"))
    ]
    return "\n".join(["#### Figures\n", *images, ""])


def _mean(rows: Sequence[Row]) -> str:
    """Of our fastest against the fastest rival, over the cases."""
    mean = intensity.mean(rows)
    if mean is None:
        return "No case has both a contender of ours and a rival.\n"
    return (
        f"Against the fastest rival, geometric mean of {mean.cases} cases: {mean.times_faster:.3g} times "
        "faster.\n"
    )


def _baselines() -> str:
    return _table(("code", "name", "source", "formula"), [tuple(baseline) for baseline in BASELINES.values()])


def _seconds(row: Row) -> float:
    assert row.seconds is not None
    return row.seconds.median


def _floor(row: Row) -> str:
    return "" if row.of_floor is None else f"{row.of_floor:.3g}"


def _ratio(row: Row) -> str:
    if row.ratio is None:
        return "failed" if row.error else ""
    faster = " faster" if row.speedup else ""
    return f"{row.ratio.median:.3f}x{faster} ({row.ratio.p20:.3f} to {row.ratio.p80:.3f})"


def _table(headings: Sequence[str], lines: Sequence[Sequence[object]]) -> str:
    cells = [headings, ["---"] * len(headings), *lines]
    return "".join(
        f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in line)} |\n" for line in cells
    )


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
    ]
    classes = (*(name for name, *_ in intensity.CLASSES), intensity.NO_PRODUCTS)
    for name, sections in (("races", classes), ("scaling", ("rows",))):
        found_rows = [row for section in sections for row in results.get(name, {}).get(section, [])]
        rows += [Row.from_json(row) for row in found_rows]
    return Measured(folder.name, machine, {}, rows)


def _stage_row(stage: str, row: dict[str, Any]) -> Row:
    """A row of a stage's document; times are in microseconds there."""
    case = ", ".join(str(row[field]) for field in ("layer", "rule", "case", "network") if field in row)
    name = str(row.get("what") or row.get("method"))
    is_ours = name.startswith(("configured", "tile", "cuda", "triton", "GHL"))
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
        against="backprop" if stage == "steps" else "the fastest rival",
        seconds=seconds,
        ratio=Spread(factor, factor, factor) if factor else None,
        speedup=stage != "steps",
        operations=operations,
        bytes=operations / row["flop_per_byte"] if operations else None,
        floor_seconds=row["of_floor"] * seconds.median if row.get("of_floor") else None,
        peak_ratio=row.get("peak_ratio"),
        images_per_second=row.get("images_per_second"),
    )


def main() -> int:
    """Draw the figures of every document and write the page."""
    measured = documents()
    for document in measured:
        folder = FIGURES / document.name
        figures.write_all(document.rows, document.machine.get("ceilings", {}), folder)
        if any(row.suite == scaling.SUITE for row in document.rows):
            scaling.figure(document.rows, folder / "scaling.svg")
    PAGE.write_text(render(measured))
    print(f"Wrote {PAGE.relative_to(ROOT)} from {len(measured)} documents.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
