"""The page of results: a document's rows as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from bench import intensity
from bench.baselines import BASELINES
from bench.losses import losses, reasons
from bench.machine import ROOT
from bench.races import SUITES as RACES
from bench.report import Row, duration

FIGURES = ROOT / "docs" / "performance"
_INTRODUCTION = """\
# Performance

Written by `python -m bench.performance` from the documents in `bench/results/`; no measured number is typed
by hand. A "ratio" is the median of the ratios of the rounds of one run, in each of which everything compared
is timed once, in turn (`bench/interleave.py`); "times faster than" and "slower by" divide medians of times of
the same rounds. Speed is printed only of what was compared with the float64 reference in the same run. The
floor of an operation is max(bytes / copy bandwidth, operations / matrix rate) of that machine, measured in
the same run (a CPU's matrix rate is the better of a library's product and a library's convolution), with
every tensor moved once and the operations of the definition (`bench/work.py`): a form that multiplies less,
as that of 3 x 3 convolutions on a CPU, may go below it. The floor of a training step counts its convolutions
and linear layers. "Ours" is what runs where no backend is chosen; the others stand beside it. Only the causes
of losses are written by hand (`bench/reasons.json`). Of the folders that `tools/gpu_check` has left, those
with its stage `pair` are shown.
"""
# What a figure shows, and of which suites.
_CAPTIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "speed": ("Every contender: how many times faster than the reference of its race", tuple(RACES)),
    "roofline": ("Operations a second under the two ceilings", tuple(RACES)),
    "crossover": ("From u to A of k winners: the sparse sum's time over the dense one's", ("sparse",)),
    "memory": ("Peak memory of a step over that of backprop", ("step", "local", "memory")),
    "scaling": ("Cost against B, N, D, k and threads, with fitted exponents, and crossovers", ("scaling",)),
}


class Measured(NamedTuple):
    """One document: where it came from, the machine, the settings, the rows, the runs."""

    name: str
    machine: dict[str, Any]
    settings: dict[str, Any]
    rows: list[Row]
    runs: list[dict[str, Any]]

    @property
    def is_gpu(self) -> bool:
        return self.machine.get("device") == "cuda"


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
        _runs(document),
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
    return "\n".join(part for part in parts if part)


def _gpu(document: Measured) -> str:
    """The operations by class of arithmetic intensity, with the geometric mean of each, then the rest."""
    parts = [f"### {document.name}\n", _machine(document), _reproduce(document)]
    raced = [row for row in document.rows if row.suite in RACES and row.intensity is not None]
    for label, *_ in intensity.CLASSES:
        rows = [row for row in raced if intensity.class_of(row) == label]
        if rows:
            parts += [f"#### {label} FLOP per byte\n", _mean(rows), _race_table(rows)]
    rest = [row for row in document.rows if row not in raced]
    parts += ["#### Where a rival is faster\n", _losses(document.rows)]
    parts += ["#### Steps and selections\n", _row_table(rest)] if rest else []
    return "\n".join(parts)


def _machine(document: Measured) -> str:
    """What holds for all runs of the document."""
    machine = document.machine
    versions = ", ".join(
        f"{name} {version}" for name, version in machine.get("versions", {}).items() if version
    )
    facts = (
        ("hardware", machine.get("gpu", {}).get("name") or _processor(machine["machine"])),
        ("threads", document.settings.get("threads")),
        ("instruction set", machine.get("instruction_set")),
        ("ceilings, measured", _ceilings(machine)),
        ("rounds, at most", document.settings.get("rounds")),
        ("versions", versions),
        ("commit", None if document.runs else machine.get("commit")),
    )
    return _table(("", ""), [(name, value) for name, value in facts if value])


def _processor(machine: dict[str, Any]) -> str:
    return ", ".join(machine[key] for key in ("cpu", "cpu_model") if machine.get(key))


def _ceilings(described: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} {value / 1e9:.4g} {'GB/s' if name == 'copy' else 'GFLOP/s'}"
        for name, value in described.get("ceilings", {}).items()
    )


def _runs(document: Measured) -> str:
    """When and in which state of the machine the suites were measured."""
    lines = []
    for run in document.runs:
        clocks = run["clocks"].values()
        mhz = [value for state in clocks for value in state["cpu_mhz"]]
        load = [state["load_average"][0] for state in clocks if state["load_average"]]
        changed = " with uncommitted changes" if run["uncommitted_changes"] else ""
        lines.append(
            (
                ", ".join(run["suites"]),
                run["date"],
                f"{run['commit']}{changed}",
                f"{run['seconds']:.0f}",
                " and ".join(f"{value:.2f}" for value in load),
                f"{min(mhz):.0f} to {max(mhz):.0f}" if mhz else "",
                _ceilings(run),
            )
        )
    headings = ("suites", "date", "commit", "seconds", "load before and after", "clocks, MHz", "ceilings")
    return _table(headings, lines) if lines else ""


def _command(document: Measured, suites: Sequence[str]) -> str:
    settings = document.settings
    options = [f"--suite {' '.join(suites)}", f"--threads {settings['threads']}"]
    options += [f"--rounds {settings['rounds']}"]
    options += ["--device cuda"] if document.is_gpu else []
    options += [f"--baseline {' '.join(settings['baselines'])}"] if settings["baselines"] else []
    options += [f"--network {' '.join(settings['networks'])}"] if settings.get("networks") else []
    return f"python -m ghl_kernels bench {' '.join(options)}"


def _reproduce(document: Measured) -> str:
    if "suites" not in document.settings:
        return "To reproduce: `tools/gpu_check`.\n"
    command = _command(document, document.settings["suites"])
    return (
        f"To reproduce: `{command} --json bench/results/{document.name}.json`; suites may be recorded one by "
        "one, with `--update`. Then `python -m bench.performance`.\n"
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
    """Every case in which a rival's median is below ours, for the same rule."""
    lines = [
        (
            ours.suite,
            ours.case,
            ours.name,
            rival.name,
            f"{factor:.3g}x",
            "yes" if overlaps else "no",
            _floor(ours),
            _floor(rival),
            cause,
        )
        for ours, rival, factor, overlaps, cause in losses(rows, reasons())
    ]
    if not lines:
        return "In no case of this run.\n"
    spread = ("slower by", "spreads overlap")
    headings = ("suite", "case", "ours", "rival", *spread, "ours / floor", "rival / floor", "cause")
    return _table(headings, lines)


def _race_table(rows: Sequence[Row]) -> str:
    """A line for every case: what we run by default, its distance from the floor, our other ways, rivals."""
    lines = []
    for case in intensity.by_case(rows):
        timed = sorted((row for row in case if row.seconds), key=intensity.seconds)
        ours = next((row for row in timed if row.auto), None)
        if ours is None:
            lines.append((case[0].case, "failed", "", "", "", ""))
            continue
        time = intensity.seconds(ours)
        factors = {
            own: ", ".join(
                f"{row.name} {intensity.seconds(row) / time:.3g}x"
                for row in timed
                if row.is_ours == own and row != ours
            )
            for own in (True, False)
        }
        lines.append((ours.case, ours.name, duration(time), _floor(ours), factors[True], factors[False]))
    missing = {f"{row.name}: {row.error or row.note}" for row in rows if row.ratio is None}
    headings = ("case", "ours", "time", "time / floor", "times faster than our", "times faster than")
    return _table(headings, lines) + "".join(f"\nNot timed: {text}\n" for text in sorted(missing))


def _row_table(rows: Sequence[Row]) -> str:
    """Every row as it was measured."""
    columns: dict[str, Callable[[Row], str]] = {
        "case": lambda row: row.case,
        "what": lambda row: row.name,
        "against": lambda row: row.against,
        "time": lambda row: duration(row.seconds.median) if row.seconds else "",
        "time / floor": lambda row: _floor(row) or ("n/a" if row.suite == "overhead" else ""),
        "ratio (p20 to p80)": _ratio,
        "peak memory": lambda row: f"{row.peak_ratio:.3f}x" if row.peak_ratio else "",
        "images/s": lambda row: f"{row.images_per_second:.4g}" if row.images_per_second else "",
        "note": lambda row: row.error or row.note or "",
    }
    filled = {name: cell for name, cell in columns.items() if any(cell(row) for row in rows)}
    return _table(tuple(filled), [tuple(cell(row) for cell in filled.values()) for row in rows])


def _figures(document: Measured) -> str:
    """Each with what it shows and the command that draws it."""
    folder = FIGURES / document.name
    parts = ["#### Figures\n"]
    for path in sorted(folder.glob("*.svg")):
        text, of = _CAPTIONS[path.stem]
        suites = [suite for suite in document.settings["suites"] if suite in of]
        parts.append(
            f"![{path.stem}](performance/{document.name}/{path.name})\n\n"
            f"{text}: `{_command(document, suites)} --out figures`.\n"
        )
    return "\n".join(parts) if parts[1:] else ""


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


def _floor(row: Row) -> str:
    return "" if row.of_floor is None else f"{row.of_floor:.3g}"


def _ratio(row: Row) -> str:
    if row.ratio is None:
        return "failed" if row.error else ""
    faster = " faster" if row.speedup else ""
    return f"{row.ratio.median:.3f}{row.unit}{faster} ({row.ratio.p20:.3f} to {row.ratio.p80:.3f})"


def _table(headings: Sequence[str], lines: Sequence[Sequence[object]]) -> str:
    cells = [headings, ["---"] * len(headings), *lines]
    return "".join(
        f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in line)} |\n" for line in cells
    )
