"""The table and the verdict that tools/gpu_check ends with, from documents as a GPU leaves them."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

from bench import intensity
from bench.gpu import races, summary, verdicts
from bench.gpu.stage import DRY_RUN, read_json, write_json
from bench.interleave import Spread
from bench.report import Row


def race_row(name: str, seconds: float, operations: float | None = 1000.0) -> Row:
    return Row(suite="s", case="c", name=name, seconds=Spread.of([seconds]), operations=operations, bytes=1.0)


def test_rows_are_classed_by_intensity() -> None:
    assert intensity.class_of(race_row("B4", 1.0)) == "above 800"
    assert intensity.class_of(race_row("B4", 1.0, 184.0)) == "184 to 800"
    assert intensity.class_of(race_row("B4", 1.0, 183.9)) == "below 184"
    assert intensity.class_of(race_row("B4", 1.0, None)) == intensity.NO_PRODUCTS


def test_the_mean_is_of_what_auto_takes_against_the_fastest_rival() -> None:
    auto = dataclasses.replace(race_row("ghl auto", 2.0), auto=True)
    rows = [auto, race_row("ghl cuda", 1.0), race_row("B4", 4.0), race_row("B3", 9.0)]
    assert intensity.mean(rows) == (2.0, 1)
    assert intensity.mean(rows[:2]) is None
    assert races._of_best(rows) == 2.0
    assert races._of_best(rows[1:]) is None


def test_columns_are_aligned() -> None:
    text = summary.columns(("name", "us"), [("a", 1.5), ("long name", None)])
    assert text.splitlines() == ["name        us", "a          1.5", "long name    -"]


def test_a_missing_or_broken_stage_is_named(tmp_path: pathlib.Path) -> None:
    document = {
        "dry_run": False,
        "complete": False,
        "measured_on": "some GPU",
        "seconds": 3,
        "results": {},
        "errors": ["it broke"],
        "not_done": ["the rest"],
    }
    write_json(tmp_path / "kwta.json", document)
    text = summary.as_text({"kwta": read_json(tmp_path / "kwta.json")})
    assert "pair: no document" in text
    assert "== kwta: some GPU, 3 s, INCOMPLETE" in text
    assert "ERROR it broke" in text
    assert "not done: the rest" in text
    assert DRY_RUN not in text


def document(stage: str, **sections: list[dict[str, Any]]) -> dict[str, Any]:
    """As a stage leaves it on a GPU."""
    about = {"stage": stage, "dry_run": False, "complete": True, "measured_on": "some GPU", "seconds": 3}
    return {**about, "results": sections, "errors": [], "not_done": []}


def test_probes_of_instructions_are_tabulated() -> None:
    probes = [
        {"probe": "tl.dot bf16", "works": True, "error": 0.0},
        {"probe": "setmaxnreg", "works": True, "problem": ""},
        {"probe": "wgmma bf16", "works": False, "problem": "element 3 is 1, not 2"},
    ]
    text = summary.as_text({"environment": document("environment", probes=probes)})
    assert "2 probes work" in text
    assert "wgmma bf16  False  element 3 is 1, not 2" in text
    assert "setmaxnreg" not in text


def test_a_section_that_cannot_be_shown_costs_no_other() -> None:
    broken = document("kwta") | {"results": {"kwta": [None]}}
    text = summary.as_text({"kwta": broken, "forms": document("forms", forms=[{"form": "mma", "A": "inf"}])})
    assert "(kwta cannot be shown: AttributeError" in text
    assert "mma       1  inf" in text
    assert text.index("(kwta") < text.index("== verdict")


def test_a_figure_that_cannot_be_drawn_costs_no_other(tmp_path: pathlib.Path) -> None:
    documents = {
        "pair": document("pair", pair=[{"of_floor": 0.5}]),
        "kwta": document("kwta", kwta=[{"case": "c", "what": "cuda y", "of_copy_bandwidth": 0.8}]),
    }
    assert "(pair cannot be shown: KeyError" in summary.figures(documents, tmp_path)
    assert (tmp_path / "kwta.png").exists()


def test_what_was_not_done_is_counted() -> None:
    late = document("parity") | {"not_done": [f"case {i}: out of time" for i in range(100)]}
    text = summary.as_text({"parity": late})
    assert "not done: case 2: out of time\nnot done: and 97 more" in text


def pair_row(what: str, layer: str, intensity: float, **fields: float) -> dict[str, Any]:
    return {"layer": layer, "rule": "softmax", "what": what, "flop_per_byte": intensity, **fields}


def test_every_bar_is_judged() -> None:
    rows = [
        pair_row("cuda", "thin", 100.0, times_faster=1.7, of_floor=0.6),
        pair_row("B4", "thin", 100.0, times_faster=9.0, of_floor=0.9),
        pair_row("cuda", "one", 300.0, times_faster=1.2),
        pair_row("cuda", "other", 300.0, times_faster=1.0),
        pair_row("auto", "other", 300.0, times_faster=1.05, of_best=1.02),
    ]
    few = {"network": "DeepHebb", "method": "GHL winners=0.004, compiled", "ratio": 1.1, "peak_ratio": 1.03}
    judged = verdicts.verdicts({"pair": document("pair", pair=rows), "steps": document("steps", steps=[few])})
    found = {verdict.what: verdict.word for verdict in judged}
    assert found["pair, below 184 FLOP/byte, ours: times faster"] == "met"
    assert found["pair, below 184 FLOP/byte: share of the copy floor"] == "MISSED"
    assert found["pair, 184 to 800 FLOP/byte, CUDA: times faster"] == "MISSED"
    assert found["pair, above 800 FLOP/byte, Triton: times faster"] == "not measured"
    assert found["auto, the pair and A alone: worst time over the best"] == "met"
    assert found["step, DeepHebb, winners=0.004: times compiled backprop"] == "met"
    assert found["memory, DeepHebb, winners=0.004: times backprop's"] == "MISSED"
    assert found["k-WTA, cuda y, rows: share of the bandwidth of a copy of u"] == "not measured"


def test_selection_is_judged_where_its_bars_are() -> None:
    case = verdicts.SELECTIONS["NCHW"]
    rows = [
        {"case": case, "what": "cuda y", "of_copy_bandwidth": 0.85, "times_faster_than_topk": 30.0},
        {"case": case, "what": "cuda state", "of_copy_bandwidth": 0.55},
        {"case": case, "what": "cuda full state", "of_copy_bandwidth": 0.7},
        {"case": "16384x4096 rows k=16 fp32", "what": "cuda y", "of_copy_bandwidth": 0.1},
    ]
    found = {v.what: v.word for v in verdicts.verdicts({"kwta": document("kwta", kwta=rows)})}
    assert found["k-WTA, cuda y, NCHW: share of the bandwidth of a copy of u"] == "met"
    assert found["k-WTA, cuda state, NCHW: share of the bandwidth of a copy of u"] == "MISSED"
    assert found["k-WTA, y, NCHW: times faster than topk and scatter"] == "met"
    assert found["k-WTA, y, rows: times faster than topk and scatter"] == "not measured"
