"""From the stages' documents: one table in plain text, figures where matplotlib is, one archive."""

from __future__ import annotations

import argparse
import math
import pathlib
import sys
import tarfile
from collections.abc import Callable, Sequence
from typing import Any

from bench import intensity
from bench.gpu.stage import DRY_RUN, read_json
from bench.report import Row, duration

STAGES = ("environment", "parity", "limits", "pair", "kwta", "races", "steps", "scaling", "counters")
COUNTERS = {
    "gpu__time_duration.sum": "time",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "DRAM",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "SM",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy",
    "launch__registers_per_thread": "registers",
}
Document = dict[str, Any]


def as_text(documents: dict[str, Document]) -> str:
    """Everything that was measured, stage by stage; what failed and what was not done included."""
    parts = []
    if any(document["dry_run"] for document in documents.values()):
        parts.append(DRY_RUN)
    for name in STAGES:
        document = documents.get(name)
        if document is None:
            parts.append(f"{name}: no document")
            continue
        state = "" if document["complete"] else ", INCOMPLETE"
        parts.append(f"== {name}: {document['measured_on']}, {document['seconds']} s{state}")
        parts.append(_SECTIONS[name](document["results"]))
        parts += [f"ERROR {error}" for error in document["errors"]]
        parts += [f"not done: {what}" for what in document["not_done"]]
    return "\n".join(part for part in parts if part) + "\n"


def columns(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Aligned columns: text to the left, numbers to the right."""
    cells = [[_cell(value) for value in row] for row in rows]
    if not cells:
        return ""
    widths = [max(map(len, column)) for column in zip(headings, *cells, strict=True)]
    numeric = [
        all(isinstance(row[i], (int, float, type(None))) for row in rows) for i in range(len(headings))
    ]
    lines = [
        "  ".join(
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in (list(headings), *cells)
    ]
    return "\n".join(lines)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _environment(results: Document) -> str:
    machine = results.get("machine", [{}])[0]
    lines = [
        f"{name}: {machine.get(name)}" for name in ("python", "system", "versions", "cuda", "nvidia_smi")
    ]
    ceilings = results.get("ceilings", [{}])[0]
    lines += [f"ceiling {name}: {value / 1e12:.4g} T/s" for name, value in ceilings.items()]
    probes = [(row["probe"], row["works"], row["error"]) for row in results.get("probes", [])]
    return "\n".join([*lines, columns(("probe", "works", "error"), probes)])


def _parity(results: Document) -> str:
    worst = [
        (row["backend"], operation, ratio)
        for row in results.get("worst", [])
        for operation, ratio in row.items()
        if operation != "backend"
    ]
    repeats = results.get("repeat", [])
    same = sum(row["bitwise"] for row in repeats)
    captured = [row["graph_bitwise"] for row in repeats if row["graph_bitwise"] is not None]
    return "\n".join(
        [
            columns(("backend", "operation", "error / allowed"), worst),
            f"{same} of {len(repeats)} calls are bitwise the same from run to run",
            f"{sum(captured)} of {len(captured)} are bitwise the same from a CUDA graph",
        ]
    )


def _table(section: str, *fields: str) -> Callable[[Document], str]:
    return lambda results: columns(
        fields, [tuple(row.get(field) for field in fields) for row in results.get(section, [])]
    )


def _pair(results: Document) -> str:
    fields = (
        "layer",
        "rule",
        "what",
        "us",
        "us_p20",
        "us_p80",
        "tflops",
        "of_floor",
        "times_faster",
        "problem",
    )
    faster = [
        row["times_faster"]
        for row in results.get("pair", [])
        if row["what"] == "configured" and row.get("times_faster")
    ]
    mean = math.exp(sum(map(math.log, faster)) / len(faster)) if faster else None
    return "\n".join(
        [
            _table("pair", *fields)(results),
            f"configured against the fastest rival, geometric mean: {_cell(mean)} times faster",
        ]
    )


def rows_of(results: Document, *sections: str) -> list[Row]:
    """Rows in the JSON of bench.report.Row."""
    return [Row.from_json(row) for section in sections for row in results.get(section, [])]


def _races(results: Document) -> str:
    """A line for every case: our fastest backend, its distance from the floor, the rivals; then the means."""
    classes = (*(name for name, *_ in intensity.CLASSES), intensity.NO_PRODUCTS)
    lines, untimed = [], []
    for name in classes:
        rows = rows_of(results, name)
        for case in intensity.by_case(rows):
            ours = intensity.fastest(row for row in case if row.is_ours)
            if ours is None:
                lines.append((name, case[0].suite, case[0].case, "failed", None, None, ""))
                continue
            own = ours.seconds.median
            rivals = (row for row in case if not row.is_ours and row.seconds)
            factors = ", ".join(f"{row.name} {row.seconds.median / own:.3g}x" for row in rivals)
            lines.append((name, ours.suite, ours.case, ours.name, 1e6 * own, ours.of_floor, factors))
        untimed += [
            f"not timed: {row.suite}, {row.case}, {row.name}: {row.error or row.note}"
            for row in rows
            if row.seconds is None
        ]
    means = [
        f"{row['class']}: against the fastest rival, geometric mean of {row['cases']} cases: "
        f"{row['times_faster']:.3g} times faster"
        for row in results.get("means", [])
    ]
    headings = ("FLOP/byte", "suite", "case", "our fastest", "us", "time / floor", "times faster than")
    return "\n".join([columns(headings, lines), *means, *untimed])


def _scaling(results: Document) -> str:
    headings = ("suite", "case", "what", "against", "time", "ratio", "note")
    lines = [
        (
            row.suite,
            row.case,
            row.name,
            row.against,
            duration(row.seconds.median) if row.seconds else "",
            row.ratio.median if row.ratio else None,
            row.error or row.note or "",
        )
        for row in rows_of(results, "rows")
    ]
    return columns(headings, lines)


def _counters(results: Document) -> str:
    names = ("kernel", *COUNTERS.values())
    rows = [
        (row.get("Kernel Name", "?")[:40], *(row.get(metric) for metric in COUNTERS))
        for row in results.get("counters", [])
    ]
    return columns(names, rows)


_SECTIONS: dict[str, Callable[[Document], str]] = {
    "environment": _environment,
    "parity": _parity,
    "limits": lambda results: "\n".join(
        (_table("large", "case", "error")(results), _table("streams", "backend", "ordered")(results))
    ),
    "pair": _pair,
    "kwta": _table(
        "kwta",
        "case",
        "what",
        "us",
        "us_p20",
        "us_p80",
        "of_copy_bandwidth",
        "times_faster_than_topk",
        "problem",
    ),
    "steps": _table(
        "steps",
        "network",
        "method",
        "us",
        "us_p20",
        "us_p80",
        "images_per_second",
        "ratio",
        "bar",
        "peak_ratio",
        "problem",
    ),
    "races": _races,
    "scaling": _scaling,
    "counters": _counters,
}


def figures(documents: dict[str, Document], out: pathlib.Path) -> str:
    """Write one bar chart a stage; "" or why there are none."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return "no figures: matplotlib is not installed"
    for stage, label, value, title in (
        ("pair", ("layer", "what"), "of_floor", "share of the floor reached (1 is the floor)"),
        ("kwta", ("case", "what"), "of_copy_bandwidth", "share of the copy bandwidth"),
        ("steps", ("network", "method"), "ratio", "time as a multiple of backprop's"),
    ):
        document = documents.get(stage, {"results": {}, "dry_run": False})
        rows = [row for row in document["results"].get(stage, []) if isinstance(row.get(value), float)]
        if not rows:
            continue
        figure, axes = pyplot.subplots(figsize=(10, 1.5 + 0.22 * len(rows)))
        axes.barh(
            [", ".join(str(row[field]) for field in label) for row in rows], [row[value] for row in rows]
        )
        axes.invert_yaxis()
        axes.axvline(1.0, color="black", linewidth=0.8)
        axes.set_title(f"{DRY_RUN if document['dry_run'] else document['measured_on']}: {title}", fontsize=9)
        axes.tick_params(labelsize=7)
        figure.tight_layout()
        figure.savefig(out / f"{stage}.png", dpi=110)
        pyplot.close(figure)
    _row_figures(documents, out)
    return ""


def _row_figures(documents: dict[str, Document], out: pathlib.Path) -> None:
    """Those of the benchmark's command: speed against each peer and roofline, growth and crossovers."""
    from bench import figures as command_figures
    from bench import scaling

    limits = documents.get("environment", {"results": {}})["results"].get("ceilings", [{}])[0]
    raced = documents.get("races", {"results": {}})["results"]
    rows = rows_of(raced, *(name for name, *_ in intensity.CLASSES), intensity.NO_PRODUCTS)
    grown = rows_of(documents.get("scaling", {"results": {}})["results"], "rows")
    if rows:
        command_figures.write_all(rows, limits, out / "races")
    if scaling.series(grown):
        scaling.figure(grown, out / "scaling.png")


def main(arguments: Sequence[str] | None = None) -> int:
    """Write table.txt, the figures and the archive, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.summary")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    out: pathlib.Path = parser.parse_args(arguments).out
    found = {name: read_json(out / f"{name}.json") for name in STAGES}
    documents = {name: document for name, document in found.items() if document is not None}
    text = as_text(documents) + figures(documents, out)
    (out / "table.txt").write_text(text)
    archive = out / "gpu_check.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for path in sorted(out.iterdir()):
            if path != archive:
                tar.add(path, arcname=f"gpu_check/{path.name}")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
