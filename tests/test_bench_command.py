"""``python -m ghl_kernels bench``: comparing, drawing, the page of results, the command line."""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import re
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rich.progress import Progress

import ghl_kernels.__main__ as entry
from bench import (
    ceilings,
    command,
    figures,
    intensity,
    machine,
    page,
    performance,
    races,
    report,
    step_threads,
    steps,
    suites,
)
from bench.compare import MARGIN, compare
from bench.gpu import verdicts
from bench.interleave import Spread
from bench.losses import losses, reasons
from bench.race import Contender, Race
from bench.report import Bar, Row
from bench.work import Work
from ghl_kernels.demo.errors import UserError

LIMITS = {"copy": 1e9, "fp32": 1e10, "bf16": 2e10}


def row(name: str = "ghl cpu", median: float = 2.0, **fields: object) -> Row:
    given = {"suite": "delta", "case": "a", "against": "B1", "speedup": True, "stable": True} | fields
    given.setdefault("auto", name == "ghl cpu")
    return Row(name=name, **{"ratio": Spread(median, median, median)} | given)


# --- compare ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("speedup", "now", "fails"),
    [(True, 1.61, False), (True, 1.59, True), (False, 2.49, False), (False, 2.51, True)],
)
def test_compare_fails_beyond_the_margin(speedup: bool, now: float, fails: bool) -> None:
    found = compare([row(median=now, speedup=speedup)], [row(speedup=speedup)], ["delta"], 0.25)
    assert found.failed is fails
    assert found.compared == 1
    if fails:
        assert f"before 2x, allowed at {'least 1.6x' if speedup else 'most 2.5x'}" in found.worse[0]


def test_compare_names_the_new_and_fails_where_one_is_missing() -> None:
    found = compare([row(case="b"), row(case="c")], [row(case="a"), row(case="c")], ["delta"])
    assert found.failed
    assert found.worse == []
    assert found.new == ["delta, b, ghl cpu"]
    assert found.missing == ["delta, a, ghl cpu"]


def test_a_comparison_of_nothing_fails() -> None:
    assert compare([], [], ["delta"]).failed
    assert compare([row(suite="pair")], [row()], ["pair"]).failed
    assert not compare([row()], [row()], ["delta"]).failed


def test_a_suite_that_came_to_nothing_is_missing() -> None:
    assert compare([], [row()], ["delta"]).missing == ["delta, a, ghl cpu"]


def test_the_earlier_run_says_what_is_stable() -> None:
    """On another machine a row may be over too soon to be stable, and is compared all the same."""
    assert compare([row(stable=False)], [row()], ["delta"]).compared == 1


def test_compare_leaves_out_other_suites_and_what_is_not_stable() -> None:
    before = [row(), row(case="b", suite="pair"), row(case="c", stable=False)]
    found = compare([row(), row(case="c", median=0.1, stable=False)], before, ["delta"])
    assert (found.worse, found.new, found.missing, found.compared) == ([], [], [], 1)


def test_compare_fails_where_a_row_failed_or_is_quoted_otherwise() -> None:
    assert "off by" in compare([row(ratio=None, error="off by 1")], [row()], ["delta"]).worse[0]
    assert "against B2" in compare([row(against="B2")], [row()], ["delta"]).worse[0]


def test_compare_refuses_a_margin_of_nothing() -> None:
    with pytest.raises(ValueError, match="margin"):
        compare([], [], [], 0.0)


def test_the_quick_selection_has_something_to_be_compared_with() -> None:
    baseline = report.Document(performance.RESULTS / "quick" / "baseline.json")
    assert baseline.settings["quick"]
    assert any(row.stable and row.ratio for row in baseline.rows)


# --- figures ------------------------------------------------------------------------------------


def measured_rows() -> list[Row]:
    seconds = Spread(2e-3, 1e-3, 3e-3)
    rows = [
        row(name, factor, case=case, seconds=seconds, operations=2e6, bytes=1e5, floor_seconds=1e-3)
        for case in ("a", "b")
        for name, factor in (("B1", 1.0), ("B4", 1.5), ("ghl cpu", 2.0))
    ]
    rows += [
        row(
            "ghl cpu",
            factor,
            suite="sparse",
            case=f"conv k/N={f}",
            fraction=f,
            against="ghl dense",
            seconds=seconds,
        )
        for f, factor in ((0.01, 5.0), (0.1, 2.0), (0.4, 0.8))
    ]
    return [*rows, row("GHL softmax", suite="memory", speedup=False, peak_ratio=1.1)]


def test_figures_are_drawn_and_the_same_every_time(tmp_path: pathlib.Path) -> None:
    first = figures.write_all(measured_rows(), LIMITS, tmp_path / "one")
    again = figures.write_all(measured_rows(), LIMITS, tmp_path / "two")
    assert [path.name for path in first] == ["speed.svg", "roofline.svg", "crossover.svg", "memory.svg"]
    for one, two in zip(first, again, strict=True):
        assert one.read_bytes() == two.read_bytes()
        assert one.read_text().count("<path") > 5


def test_the_figure_of_growth_is_the_same_every_time(tmp_path: pathlib.Path) -> None:
    rows = [row(suite="scaling", case=f"N={n}", seconds=Spread(n, n, n)) for n in (1, 2, 4)]
    for name in ("one", "two"):
        assert figures.growth(rows, {}, tmp_path / f"{name}.svg")
    one, two = ((tmp_path / f"{name}.svg").read_bytes() for name in ("one", "two"))
    assert b"dc:date" not in one
    assert one == two
    assert figures.growth(rows, {}, tmp_path / "three.png")


def test_no_figure_without_its_rows(tmp_path: pathlib.Path) -> None:
    assert figures.write_all([row(ratio=None, error="wrong")], LIMITS, tmp_path) == []


# --- the page -----------------------------------------------------------------------------------


def run_of(*suites: str, **changes: object) -> dict[str, object]:
    state = {"cpu_mhz": [2000.0, 2100.0], "load_average": [0.25]}
    return {
        "suites": [*suites],
        "date": "2026-01-13T12:00:00+00:00",
        "seconds": 61.0,
        "commit": "abc",
        "uncommitted_changes": False,
        "ceilings": LIMITS,
        "clocks": {"before": state, "after": state},
    } | changes


def document(rows: list[Row], **machine_fields: object) -> performance.Measured:
    described = {
        "machine": {"cpu": "A CPU"},
        "versions": {"torch": "9.9"},
        "ceilings": LIMITS,
    }
    settings = {"threads": 2, "rounds": 25, "suites": ["delta"], "baselines": None, "quick": False}
    return performance.Measured("machine", described | machine_fields, settings, rows, [run_of("delta")])


def contest(ours: float, rival: float, **fields: object) -> list[Row]:
    return [
        row("ghl cpu", seconds=Spread(ours, 0.9 * ours, 1.1 * ours), floor_seconds=0.5, **fields),
        row("B4", seconds=Spread(rival, 0.9 * rival, 1.1 * rival), floor_seconds=0.5, **fields),
    ]


def section(page: str, heading: str) -> str:
    return re.split(r"\n#+ ", page.partition(f" {heading}\n")[2])[0]


def test_the_page_lists_where_a_rival_is_faster_with_the_floors() -> None:
    page = performance.render([document([*contest(1.0, 2.0, case="won"), *contest(3.0, 2.0, case="lost")])])
    losses = section(page, "Where a rival is faster")
    assert "| delta | lost | ghl cpu | B4 | 1.5x | no | 6 | 4 |  |" in losses
    assert "won" not in losses
    assert "| won | ghl cpu | 1 s | 2 |  | B4 2x |" in section(page, "delta")


def test_ours_is_what_auto_runs_and_not_the_fastest_of_both() -> None:
    rows = [*contest(3.0, 2.0), row("ghl eager", seconds=Spread(1.0, 0.9, 1.1))]
    page = performance.render([document(rows)])
    assert "| delta | a | ghl cpu | B4 | 1.5x |" in section(page, "Where a rival is faster")
    assert "| a | ghl cpu | 3 s | 6 | ghl eager 0.333x | B4 0.667x |" in section(page, "delta")


def test_losses_compare_rows_of_one_rule() -> None:
    ours = [row(name, auto=True, rule=name, seconds=Spread(2.0, 2.0, 2.0)) for name in ("GHL a", "GHL b")]
    rival = row("B1", rule="GHL b", seconds=Spread(1.0, 1.0, 1.0))
    assert [(loss.ours.name, loss.factor) for loss in losses([*ours, rival], {})] == [("GHL b", 2.0)]


def test_the_cause_of_a_loss_is_that_of_the_first_pattern_that_fits() -> None:
    causes = {"delta/b*": "first", "delta/*": "second"}
    found = losses([*contest(3.0, 2.0, case="big"), *contest(5.0, 2.0, case="a")], causes)
    assert [(loss.ours.case, loss.cause) for loss in found] == [("a", "second"), ("big", "first")]
    (close,) = losses(contest(2.1, 2.0), {})
    assert close.overlaps
    assert close.cause == "none: the spreads of the rounds overlap"


def test_every_committed_loss_has_a_cause() -> None:
    found = [loss for each in performance.documents() for loss in losses(each.rows, reasons())]
    unexplained = [(loss.ours.suite, loss.ours.case, loss.rival.name) for loss in found if not loss.cause]
    assert not unexplained, "write their causes into bench/reasons.json"


def test_a_mean_is_over_cases_with_a_rival() -> None:
    rows = [*contest(1.0, 2.0), *contest(1.0, 8.0, case="b"), row(case="c", seconds=Spread(1.0, 1.0, 1.0))]
    assert intensity.mean(rows) == pytest.approx((4.0, 2))
    assert intensity.mean(rows[4:]) is None


def test_rows_show_their_floor_and_overhead_has_none() -> None:
    step = row("GHL", suite="step", seconds=Spread(3.0, 3.0, 3.0), floor_seconds=1.5)
    call = row("GHL", suite="overhead", seconds=Spread(3.0, 3.0, 3.0))
    page = performance.render([document([step, call])])
    assert "| 3 s | 2 |" in section(page, "step")
    assert "| 3 s | n/a |" in section(page, "overhead")


def test_a_fitted_number_is_no_ratio() -> None:
    spread = Spread(0.816, 0.766, 0.865)
    fit = row("ghl gate", suite="scaling", case="B=4 to 64", speedup=False, ratio=spread, seconds=None)
    one = dataclasses.replace(fit, case="B=8", seconds=spread)
    text = section(performance.render([document([fit, one])]), "scaling")
    assert "| 0.816 (0.766 to 0.865) |" in text
    assert "| 0.816x (0.766 to 0.865) |" in text


def test_every_figure_has_a_caption_with_its_command(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "FIGURES", tmp_path)
    figures.write_all(measured_rows(), LIMITS, tmp_path / "machine")
    text = section(performance.render([document(measured_rows())]), "Figures")
    assert text.count("![") == text.count("--out figures") == 4
    assert "`python -m ghl_kernels bench --suite delta --threads 2 --rounds 25 --out figures`" in text
    assert page._CAPTIONS.keys() == figures._FIGURES.keys()


def test_the_page_says_when_nothing_is_lost() -> None:
    assert "In no case" in section(
        performance.render([document(contest(1.0, 2.0))]), "Where a rival is faster"
    )


def test_the_page_shows_bars_hardware_and_how_to_reproduce() -> None:
    page = performance.render([document([row("GHL", 1.5, suite="step", speedup=False, bar=Bar(1.42))])])
    assert "<= 1.42x | **no** |" in section(page, "Bars")
    for text in ("A CPU", "torch 9.9", "--suite delta --threads 2 --rounds 25 --json"):
        assert text in page
    assert (
        "| delta | 2026-01-13T12:00:00+00:00 | abc | 61 | 0.25 and 0.25 | 2000 to 2100 | copy 1 GB/s" in page
    )


def test_gpu_rows_are_grouped_by_intensity() -> None:
    rows = [
        found
        for case, intensity in (("low", 100.0), ("middle", 184.0), ("high", 1000.0))
        for found in contest(1.0, 4.0, case=case, operations=intensity, bytes=1.0)
    ]
    page = performance.render([document(rows, device="cuda", gpu={"name": "A GPU"})])
    assert "No CPU has been measured" in page
    assert "A GPU" in page
    for heading, case in (("below 184", "low"), ("184 to 800", "middle"), ("above 800", "high")):
        text = section(page, f"{heading} FLOP per byte")
        assert f"| {case} |" in text
        assert "1 cases: 4 times faster" in text


def test_without_a_gpu_document_the_page_says_so() -> None:
    assert "No GPU has been measured" in performance.render([document([row()])])


def test_stages_of_a_gpu_check_become_rows(tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "check"
    folder.mkdir()
    timed = {"us": 10.0, "us_p20": 9.0, "us_p80": 11.0}
    ours = {"layer": "conv", "rule": "softmax", "what": "configured", "times_faster": 2.0, "of_floor": 0.5}
    pair = [ours | timed | {"tflops": 1.0, "flop_per_byte": 100.0}, {"what": "library", "problem": "no room"}]
    pair.append(ours | timed | {"what": "auto"})
    stage = {"dry_run": False, "measured_on": "A GPU", "results": {"pair": pair}}
    (folder / "pair.json").write_text(json.dumps(stage))
    (found,) = performance.documents(tmp_path)
    assert found.is_gpu
    assert found.machine["gpu"]["name"] == "A GPU"
    configured, failed, auto = found.rows
    assert configured.is_ours
    assert (configured.auto, auto.auto) == (False, True)
    assert configured.intensity == pytest.approx(100.0)
    assert configured.of_floor == pytest.approx(2.0)
    assert failed.error == "no room"
    assert "No GPU" not in performance.render([found])
    (folder / "pair.json").write_text(json.dumps(stage | {"dry_run": True}))
    assert performance.documents(tmp_path) == []


def test_rows_of_a_gpu_check_say_what_they_are_compared_with(tmp_path: pathlib.Path) -> None:
    timed = {"us": 10.0, "us_p20": 9.0, "us_p80": 11.0}
    steps = [
        {"network": "N", "method": method, "us": us, "us_p20": us, "us_p80": us, "ratio": us}
        for method, us in ((verdicts.BACKPROP, 1.0), (verdicts.SOFTMAX, 0.9), (verdicts.FEW, 1.5))
    ]
    stages: dict[str, list[dict[str, Any]]] = {
        "pair": [{"layer": "conv", "what": "auto", "times_faster": 2.0} | timed],
        "kwta": [{"case": "rows", "what": "cuda y", "times_faster_than_topk": 9.0} | timed],
        "steps": steps,
    }
    for name, rows in stages.items():
        stage = {"dry_run": False, "measured_on": "A GPU", "results": {name: rows}}
        (tmp_path / "check").mkdir(exist_ok=True)
        (tmp_path / "check" / f"{name}.json").write_text(json.dumps(stage))
    (found,) = performance.documents(tmp_path)
    against = {row.suite: row.against for row in found.rows}
    assert against == {"pair": "the fastest rival", "kwta": "B7c", "steps": "backprop"}
    assert [loss.ours.name for loss in losses(found.rows, {})] == [verdicts.FEW]


def test_quick_documents_are_left_out(tmp_path: pathlib.Path) -> None:
    for name, quick in (("quick", True), ("full", False)):
        report.write_json(tmp_path / f"{name}.json", [row()], {"quick": quick}, {})
    assert [found.name for found in performance.documents(tmp_path)] == ["full"]


def test_the_committed_page_is_what_the_script_writes() -> None:
    page = performance.PAGE.read_text()
    assert page == performance.render(performance.documents())
    for link in re.findall(r"\]\((performance/[^)]+)\)", page):
        assert (performance.PAGE.parent / link).is_file()


@pytest.mark.parametrize(("argument", "code"), [("--help", 0), ("other", 2)])
def test_an_argument_writes_no_page(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], argument: str, code: int
) -> None:
    monkeypatch.setattr(performance, "documents", lambda: pytest.fail("it writes the page"))
    monkeypatch.setattr(sys, "argv", ["performance", argument])
    with pytest.raises(SystemExit) as stopped:
        performance.main()
    assert stopped.value.code == code
    assert "usage: python -m bench.performance" in "".join(capsys.readouterr())


def test_steps_by_threads_are_a_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = []

    def rows(options: argparse.Namespace, progress: Progress) -> list[Row]:
        given.append(options.rounds)
        return [row("GHL softmax", suite="scaling", case="threads=2", against="threads=1")]

    monkeypatch.setattr(step_threads, "rows", rows)
    step_threads.main(["--rounds", "2"])
    assert given == [2]
    assert re.search(r"threads=2 .*GHL softmax", capsys.readouterr().out)
    with pytest.raises(SystemExit):
        step_threads.main(["other"])


# --- the command --------------------------------------------------------------------------------


def toy(target: object) -> list[Race]:
    """One race with a right, a wrong and an absent rival."""
    return [
        Race(
            suite="softmax",
            case="toy",
            target=target,
            inputs=lambda: (torch.arange(5.0),),
            expected=lambda x: 2.0 * x.double(),
            contenders=[
                Contender("B1", lambda x: 2.0 * x, baseline="B1"),
                Contender("B2", lambda x: 3.0 * x, baseline="B2"),
                Contender("B3", lambda x: x, absent="no room"),
                Contender("ghl eager", lambda x: x + x, backend="eager"),
            ],
            reference="B1",
            work=Work(40.0, 5.0),
            tolerance=1e-6,
        )
    ]


@pytest.fixture
def _toy_races(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(races.SUITES, "softmax", toy)
    monkeypatch.setitem(
        races.SUITES, "kwta", lambda target: [dataclasses.replace(one, suite="kwta") for one in toy(target)]
    )
    monkeypatch.setattr(ceilings, "measure", lambda threads, **_: LIMITS)


def bench(*arguments: str, suite: str = "softmax") -> int:
    return entry.main(["bench", "--quick", "--suite", *suite.split(), "--threads", "1", *arguments])


@pytest.mark.usefixtures("_toy_races")
def test_a_run_prints_keeps_and_draws(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.json"
    assert bench("--json", str(path), "--out", str(tmp_path)) == 0
    printed = capsys.readouterr().out
    for text in ("toy", "FAILED", "absent: no room", "Ceilings: copy 1 GB/s", "commit"):
        assert text in printed
    kept = report.Document(path)
    assert [found.name for found in kept.rows] == ["B1", "B2", "B3", "ghl eager"]
    assert kept.settings == {
        "quick": True,
        "suites": ["softmax"],
        "baselines": None,
        "networks": None,
        "rounds": 5,
        "threads": 1,
    }
    assert kept.machine["ceilings"] == LIMITS
    assert {"machine", "versions", "commit", "native", "device"} <= kept.machine.keys()
    (one,) = kept.runs
    assert one.keys() == run_of().keys()
    assert one["suites"] == ["softmax"]
    assert one["clocks"].keys() == {"before", "after"}
    assert (tmp_path / "speed.svg").is_file()


@pytest.mark.usefixtures("_toy_races")
@pytest.mark.parametrize(("before", "code"), [(1e-6, 0), (1e6, 1)])
def test_a_run_fails_where_a_ratio_got_worse(tmp_path: pathlib.Path, before: float, code: int) -> None:
    path = tmp_path / "before.json"
    old = row("ghl eager", before, suite="softmax", case="toy")
    report.write_json(path, [old], {}, {})
    assert bench("--compare", str(path)) == code


@pytest.mark.usefixtures("_toy_races")
def test_a_run_fails_where_a_backend_of_ours_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(target: object) -> list[Race]:
        (one,) = toy(target)
        one.contenders[-1] = Contender("ghl eager", lambda x: x, backend="eager")
        return [one]

    monkeypatch.setitem(races.SUITES, "softmax", wrong)
    assert bench() == 1


def breaks(target: object) -> list[Race]:
    (one,) = toy(target)

    def inputs() -> tuple[torch.Tensor, ...]:
        raise MemoryError("no room\nat all")

    return [dataclasses.replace(one, inputs=inputs), dataclasses.replace(one, case="other")]


def vanishes(target: object) -> list[Race]:
    raise KeyError("no such shape")


@pytest.mark.usefixtures("_toy_races")
@pytest.mark.parametrize(
    ("broken", "error", "rows"), [(breaks, "MemoryError: no room", 5), (vanishes, "KeyError", 1)]
)
def test_what_fails_costs_its_own_rows_alone(
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    broken: Callable[[object], list[Race]],
    error: str,
    rows: int,
) -> None:
    monkeypatch.setitem(races.SUITES, "softmax", broken)
    path = tmp_path / "out.json"
    assert bench("--json", str(path), suite="softmax kwta") == 1
    found = report.Document(path).rows
    assert found[0].name == "everything"
    assert error in found[0].error
    assert [row.suite for row in found] == ["softmax"] * rows + ["kwta"] * 4


@pytest.mark.usefixtures("_toy_races")
def test_a_run_that_is_broken_off_keeps_the_suites_before(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(target: object) -> list[Race]:
        raise KeyboardInterrupt

    monkeypatch.setitem(races.SUITES, "kwta", interrupted)
    path = tmp_path / "out.json"
    assert bench("--json", str(path), suite="softmax kwta") == 130
    assert capsys.readouterr().err.endswith("interrupted\n")
    kept = report.Document(path)
    assert {row.suite for row in kept.rows} == {"softmax"}
    assert kept.settings["suites"] == ["softmax"]


@pytest.fixture
def _nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        pytest.fail("this came too late")

    monkeypatch.setattr(ceilings, "measure", fail)


@pytest.mark.usefixtures("_nothing_is_measured")
@pytest.mark.parametrize("option", ["--json", "--out"])
@pytest.mark.parametrize("place", ["below a file", "of another kind", "not to be written"])
def test_what_cannot_be_written_is_said_before_the_measurement(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], option: str, place: str
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    other = "folder" if option == "--json" else "file"
    path = {
        "below a file": tmp_path / "file" / "new" / "out",
        "of another kind": tmp_path / other,
        "not to be written": pathlib.Path("/proc/out"),  # nor by root
    }[place]
    assert bench(option, str(path)) == 2
    assert re.fullmatch(rf"error: {path} cannot be written: [^.]+\.\n", capsys.readouterr().err)
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "file", tmp_path / "folder"]


def test_trying_to_write_leaves_nothing(tmp_path: pathlib.Path) -> None:
    new = tmp_path / "new"
    command._require_writable(command.parse(["--json", str(new / "a.json"), "--out", str(new / "b")]))
    assert not any(tmp_path.iterdir())


@pytest.mark.usefixtures("_toy_races")
def test_an_update_replaces_its_suites_and_keeps_the_others(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "out.json"
    assert bench("--json", str(path), suite="kwta") == 0
    assert bench("--json", str(path), "--update") == 0
    once = report.Document(path)
    assert [row.suite for row in once.rows] == ["softmax"] * 4 + ["kwta"] * 4
    assert once.settings["suites"] == ["softmax", "kwta"]
    assert [one["suites"] for one in once.runs] == [["kwta"], ["softmax"]]
    assert bench("--json", str(path), "--update", suite="kwta") == 0
    again = report.Document(path)
    assert [row.suite for row in again.rows] == ["softmax"] * 4 + ["kwta"] * 4
    assert [one["suites"] for one in again.runs] == [["softmax"], ["kwta"]]
    assert again.rows[:4] == once.rows[:4]
    assert again.runs[0] == once.runs[1]


@pytest.mark.usefixtures("_toy_races")
@pytest.mark.parametrize(
    ("what", "name", "value"), [("settings", "threads", 64), ("machine", "machine", {"cpu": "another"})]
)
def test_an_update_of_another_machine_or_setting_is_refused(
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
    what: str,
    name: str,
    value: object,
) -> None:
    path = tmp_path / "out.json"
    assert bench("--json", str(path)) == 0
    other = json.loads(path.read_text())
    other[what][name] = value
    path.write_text(json.dumps(other))
    request.getfixturevalue("_nothing_is_measured")
    assert bench("--json", str(path), "--update", suite="kwta") == 2
    assert f"{what}, {name}: now" in capsys.readouterr().err
    assert json.loads(path.read_text()) == other


@pytest.mark.parametrize(
    "arguments",
    [
        ["--update"],
        ["--suite", "ratios", "kwta", "--json", "x"],
        ["--suite", "ratios", "--json", "x", "--update"],
    ],
)
def test_options_that_do_not_go_together_are_refused(arguments: list[str]) -> None:
    with pytest.raises(UserError):
        command.parse(arguments)


def test_steps_and_local_passes_are_measured_together() -> None:
    assert suites.together(["kwta", "local", "memory", "step"]) == [("kwta",), ("step", "local"), ("memory",)]
    assert suites.together(["local"]) == [("local",)]


@pytest.mark.parametrize(
    ("arguments", "measured"),
    [([], {*steps.NETWORKS}), (["--network", "FastHebb", "ResNet-20"], {"FastHebb", "ResNet-20"})],
)
def test_networks_are_selected(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], measured: set[str]
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(steps, "step_rows", lambda network, *_: asked.append(network) or [])
    options = command.parse(["--suite", "step", *arguments])
    suites.Run(options, {}, Progress()).measure(["step"])
    assert {*asked} == measured


@pytest.mark.usefixtures("_toy_races")
def test_a_selected_baseline_runs_alone(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "out.json"
    assert bench("--baseline", "B2", "--json", str(path)) == 0
    assert "B1" in [found.name for found in report.Document(path).rows]  # the reference
    assert report.Document(path).settings["baselines"] == ["B2"]


@pytest.mark.parametrize("content", [None, "{}", "no json"])
def test_a_file_that_is_no_document_is_one_sentence(
    content: str | None, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "before.json"
    if content is not None:
        path.write_text(content)
    assert bench("--compare", str(path)) == 2
    assert re.fullmatch(r"error: .*before\.json.*\.\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    "arguments",
    [["--suite", "other"], ["--baseline", "B99"], ["--rounds", "0"], ["--threads", "x"], ["--margin", "-1"]],
)
def test_wrong_options_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        command.parse(arguments)
    assert stopped.value.code == 2


def test_defaults() -> None:
    options = command.parse([])
    assert set(options.suite) == {*races.SUITES, "step", "local", "memory", "scaling", "overhead"}
    assert (options.rounds, options.margin, options.quick) == (25, MARGIN, False)
    assert options.threads == torch.get_num_threads()
    quick = command.parse(["--quick"])
    assert quick.rounds == 5
    assert set(options.suite) - set(quick.suite) == {"overhead"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_the_users_to_mend() -> None:
    with pytest.raises(UserError, match="GPU"):
        command.parse(["--device", "cuda"])


def test_outside_a_checkout_the_command_says_where_to_go(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(entry, "__file__", str(tmp_path / "site-packages" / "ghl_kernels" / "__main__.py"))
    assert entry.main(["bench", "--quick"]) == 2
    assert re.fullmatch(r"error: .*checkout.*\.\n", capsys.readouterr().err)


def test_machine() -> None:
    found = machine.describe(torch.device("cpu"))
    assert json.loads(json.dumps(found)) == found
    assert found["device"] == "cpu"
    assert found["last_level_cache"] >= 1 << 15
    assert machine.clocks().keys() == {"cpu_mhz", "load_average"}
