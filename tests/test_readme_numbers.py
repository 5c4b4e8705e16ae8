"""README's table of measured ratios is the recorded run that it names."""

from __future__ import annotations

import pathlib
import re

import pytest

from bench import report
from bench.machine import ROOT
from bench.report import Row

README = (ROOT / "README.md").read_text()
SECTION = README.partition("## Measured\n")[2].partition("\n## ")[0]
TABLE = SECTION.partition("| what | ratio | bar |\n| --- | --- | --- |\n")[2].partition("\n\n")[0]
DOCUMENT = re.search(r"\]\((bench/results/[^)]+\.json)\)", SECTION)

# First words of a line of the table -> suite, beginning of the case, name.
ROWS = {
    "training step, GHL softmax": ("step", "DeepHebb B=32", "GHL softmax"),
    "training step, GHL winners=0.02": ("step", "DeepHebb B=32", "GHL winners=0.02"),
    "training step, the authors": ("step", "DeepHebb B=32", "authors' algorithm (unfold)"),
    "`learn_` softmax": ("local", "DeepHebb B=32", "learn_ softmax"),
    "`learn_` winners=0.02": ("local", "DeepHebb B=32", "learn_ winners=0.02"),
    "k-WTA on (32, 384, 16, 16), k=8, NCHW": ("kwta", "32x384x16x16 nchw k=8", "ghl cpu"),
    "the same, channels_last": ("kwta", "32x384x16x16 nhwc k=8", "ghl cpu"),
    "peak memory of a step, DeepHebb B=64, softmax": ("memory", "DeepHebb B=64", "GHL softmax"),
    "the same, winners=0.02": ("memory", "DeepHebb B=64", "GHL winners=0.02"),
    "the same, the authors": ("memory", "DeepHebb B=64", "authors' algorithm (unfold)"),
    "peak memory, ResNet-20 B=64": ("memory", "ResNet-20 B=64", "GHL softmax"),
}


@pytest.fixture(scope="module")
def recorded() -> list[Row]:
    assert DOCUMENT, "the section names no document"
    return report.Document(pathlib.Path(ROOT / DOCUMENT[1])).rows


@pytest.mark.parametrize("line", TABLE.splitlines())
def test_a_ratio_is_the_recorded_one(line: str, recorded: list[Row]) -> None:
    what, ratio, bar = (cell.strip() for cell in line.strip("|").split("|"))
    suite, case, name = next(key for words, key in ROWS.items() if what.startswith(words))
    found = [row for row in recorded if (row.suite, row.name) == (suite, name) and row.case.startswith(case)]
    row = next((row for row in found if row.bar), found[0])
    assert row.ratio
    digits = len(ratio.rstrip("x").partition(".")[2])
    assert ratio == f"{row.ratio.median:.{digits}f}x"
    if bar:
        assert row.bar
        assert float(re.findall(r"[\d.]+", bar)[0]) == row.bar.limit
        assert ("missed" in bar) is not row.met


def test_the_table_was_found() -> None:
    assert len(TABLE.splitlines()) == len(ROWS)
