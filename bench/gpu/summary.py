"""From the stages' documents: one table in plain text, the verdict last, and figures where matplotlib is.

Documents may be of any state, of a stage that crashed or of another version: a part that cannot be made says
so in its place and costs no other.
"""

from __future__ import annotations

import argparse
import functools
import pathlib
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from bench import intensity
from bench.gpu.stage import DRY_RUN, read_json
from bench.gpu.verdicts import MOST_LOST, verdicts
from bench.report import Row, duration

STAGES = (
    "warm",
    "environment",
    "forms",
    "parity",
    "pair",
    "kwta",
    "limits",
    "steps",
    "races",
    "scaling",
    "counters",
    "tests",
)
_SHOWN = 3  # of what was not done, and of a stage's errors
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
        parts.append(_guarded(name, _SECTIONS[name], document["results"]))
        parts += _some("ERROR", document["errors"])
        parts += _some("not done:", document["not_done"])
    parts += ["== verdict", _guarded("verdict", _verdict, documents)]
    return "\n".join(part for part in parts if part) + "\n"


def _guarded(what: str, make: Callable[[Any], str], of: Any) -> str:
    try:
        return make(of)
    except Exception as error:  # whatever a document lacks
        last = traceback.extract_tb(error.__traceback__)[-1]
        return f"({what} cannot be shown: {type(error).__name__}: {error}, line {last.lineno})"


def _some(word: str, lines: Sequence[str]) -> list[str]:
    more = [f"{word} and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
    return [f"{word} {line}" for line in lines[:_SHOWN]] + more


def _verdict(documents: dict[str, Document]) -> str:
    rows = [(v.what, v.value, str(v.bar), v.word) for v in verdicts(documents)]
    return columns(("bar", "measured", "wanted", ""), rows)


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
    probes = [
        (row["probe"], row["works"], row.get("problem") or row.get("error"))
        for row in results.get("probes", [])
        if not row["works"]
    ]
    lines.append(f"{len(results.get('probes', [])) - len(probes)} probes work")
    return "\n".join([*lines, columns(("probe", "works", "error"), probes)])


def _warm(results: Document) -> str:
    return "\n".join(
        f"{name}: {_cell(value)}" for row in results.get("kernels", []) for name, value in row.items()
    )


def _forms(results: Document) -> str:
    """Of every form the cases, and the worst error as a multiple of what is allowed."""
    rows = results.get("forms", [])
    worst = [
        (form, sum(row["form"] == form for row in rows), *(_largest(rows, form, sum_) for sum_ in ("A", "G")))
        for form in dict.fromkeys(row["form"] for row in rows)
    ]
    broken = [f"BROKEN: {row['form']}" for row in results.get("broken", [])]
    return "\n".join([columns(("form", "cases", "A: error / allowed", "G: error / allowed"), worst), *broken])


def _largest(rows: Sequence[Document], form: str, name: str) -> float | str | None:
    values = [row[name] for row in rows if row["form"] == form and name in row]
    strange = next((value for value in values if isinstance(value, str)), None)
    return strange or max(values, default=None)


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
    fields = ("layer", "rule", "what", "us", "us_p20", "us_p80", "tflops", "of_floor", "times_faster")
    fields += ("of_best", "problem")
    tables = [
        f"{title}:\n{_table(name, *fields)(results)}"
        for name, title in (("pair", "A and G"), ("sums", "A alone"))
    ]
    return "\n".join(tables)


def _steps(results: Document) -> str:
    """Times, and how long the GPU was busy: where both differ much, a step waits for launches."""
    fields = ("network", "method", "us", "us_p20", "us_p80", "images_per_second", "ratio", "bar")
    fields += ("peak_ratio", "problem")
    busy: dict[tuple[str, str], float] = {}
    for row in results.get("kernels", []):
        key = (row["network"], row["method"])
        busy[key] = busy.get(key, 0.0) + row["us"]
    rows = [
        (*(row.get(field) for field in fields), busy.get((row["network"], row["method"])))
        for row in results.get("steps", [])
    ]
    return columns((*fields, "busy_us"), rows)


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
            timed = (row for row in case if row.is_ours and row.seconds)
            ours = min(timed, key=intensity.seconds, default=None)
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
    lost = [
        f"auto takes {row['of_best']:.3g} times as long as the best: {row['suite']}, {row['case']}"
        for row in results.get("auto", [])
        if not MOST_LOST.met_by(row["of_best"])
    ]
    return "\n".join([columns(headings, lines), *means, *lost, *untimed])


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
    "warm": _warm,
    "environment": _environment,
    "forms": _forms,
    "parity": _parity,
    "limits": lambda results: "\n".join(
        (
            _table("large", "case", "error")(results),
            _table("streams", "backend", "operation", "ordered")(results),
        )
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
    "steps": _steps,
    "races": _races,
    "scaling": _scaling,
    "counters": _counters,
    "tests": _table("tests", "test", "outcome"),
}


def figures(documents: dict[str, Document], out: pathlib.Path) -> str:
    """Write the figures; "" or why there are none, or not all."""
    try:
        import matplotlib

        matplotlib.use("Agg")
    except ImportError:
        return "no figures: matplotlib is not installed\n"
    charts: list[tuple[str, Callable[[Any], str]]] = [
        (stage, functools.partial(_chart, stage=stage, label=label, value=value, title=title, out=out))
        for stage, label, value, title in _CHARTS
    ]
    charts.append(("figures of rows", functools.partial(_row_figures, out=out)))
    said = [_guarded(name, draw, documents) for name, draw in charts]
    return "".join(f"{line}\n" for line in said if line)


_CHARTS = (
    ("pair", ("layer", "what"), "of_floor", "share of the floor reached (1 is the floor)"),
    ("kwta", ("case", "what"), "of_copy_bandwidth", "share of the copy bandwidth"),
    ("steps", ("network", "method"), "ratio", "time as a multiple of backprop's"),
)


def _chart(
    documents: dict[str, Document],
    stage: str,
    label: Sequence[str],
    value: str,
    title: str,
    out: pathlib.Path,
) -> str:
    """One bar for every row of a stage."""
    from matplotlib import pyplot

    document = documents.get(stage, {"results": {}, "dry_run": False})
    rows = [row for row in document["results"].get(stage, []) if isinstance(row.get(value), float)]
    if not rows:
        return ""
    figure, axes = pyplot.subplots(figsize=(10, 1.5 + 0.22 * len(rows)))
    axes.barh([", ".join(str(row[field]) for field in label) for row in rows], [row[value] for row in rows])
    axes.invert_yaxis()
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_title(f"{DRY_RUN if document['dry_run'] else document['measured_on']}: {title}", fontsize=9)
    axes.tick_params(labelsize=7)
    figure.tight_layout()
    figure.savefig(out / f"{stage}.png", dpi=110)
    pyplot.close(figure)
    return ""


def _row_figures(documents: dict[str, Document], out: pathlib.Path) -> str:
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
    return ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Write table.txt, before figures are tried, and the figures."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.summary")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    out: pathlib.Path = parser.parse_args(arguments).out
    found = {name: read_json(out / f"{name}.json") for name in STAGES}
    documents = {name: document for name, document in found.items() if document is not None}
    table, text = out / "table.txt", as_text(documents)
    table.write_text(text)
    if said := figures(documents, out):
        table.write_text(said + text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
