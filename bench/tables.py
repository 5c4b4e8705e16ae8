"""Rows of a benchmark as tables on a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from bench.report import Row, duration


def tables(rows: Sequence[Row]) -> RenderableType:
    """A table for every suite, of the columns that it fills."""
    suites = dict.fromkeys(row.suite for row in rows)
    return Group(*(_table(suite, [row for row in rows if row.suite == suite]) for suite in suites))


def print_rows(console: Console, rows: Sequence[Row]) -> None:
    """Print every row; where the output is no terminal, as wide as the longest line needs."""
    if console.is_terminal:
        console.print(tables(rows))
        return
    wide = Console(file=console.file, width=1000, color_system=None, force_terminal=False)
    with wide.capture() as captured:
        wide.print(tables(rows))
    console.file.write("\n".join(line.rstrip() for line in captured.get().splitlines()) + "\n")


def _table(suite: str, rows: Sequence[Row]) -> Table:
    out = Table(title=suite, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    cells = {heading: [cell(row) for row in rows] for heading, cell in _COLUMNS.items()}
    columns = {heading: column for heading, column in cells.items() if any(map(str, column))}
    for heading in columns:
        out.add_column(
            heading,
            justify="left" if heading in _TEXT else "right",
            no_wrap=heading not in _TEXT,
            overflow="fold",
        )
    for i, row in enumerate(rows):
        ends = i + 1 < len(rows) and rows[i + 1].case != row.case
        out.add_row(*(column[i] for column in columns.values()), end_section=ends)
    return out


def _ratio(row: Row) -> str | Text:
    if row.ratio is None:
        return Text("FAILED", "bold red") if row.error else "-"
    median = row.ratio.median
    if not row.speedup or row.name == row.against:
        return f"{median:.3g}{row.unit}"
    return f"{median:.3g}x faster" if median >= 1.0 else f"{1.0 / median:.3g}x slower"


def _verdict(row: Row) -> Text:
    return {None: Text(""), True: Text("yes", "green"), False: Text("NO", "bold red")}[row.met]


def _number(value: float | None, suffix: str = "") -> str:
    return "" if value is None else f"{value:.3g}{suffix}"


_COLUMNS = {
    "case": lambda row: row.case,
    "what": lambda row: row.name,
    "against": lambda row: row.against,
    "time": lambda row: duration(row.seconds.median) if row.seconds else "",
    "ratio": _ratio,
    "p20 - p80": lambda row: f"{row.ratio.p20:.3g} - {row.ratio.p80:.3g}" if row.ratio else "",
    "bar": lambda row: "" if row.bar is None else str(row.bar),
    "met": _verdict,
    "x floor": lambda row: _number(row.of_floor),
    "FLOP/byte": lambda row: _number(row.intensity),
    "peak": lambda row: _number(row.peak_ratio, "x"),
    "images/s": lambda row: _number(row.images_per_second),
    "note": lambda row: row.error or row.note or "",
}
_TEXT = ("case", "what", "against", "note")
