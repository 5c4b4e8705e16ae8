"""The benchmark harness: its arithmetic on a fake clock, its models. Nothing is timed."""

from __future__ import annotations

import dataclasses
import io
import json

import pytest
import torch
from rich.console import Console

from bench import interleave, parity, report, tables
from bench.crossover import crossover
from bench.crossover import main as measure_crossovers
from bench.interleave import Candidate, Spread, Timing
from bench.report import Bar, Row


class FakeClock:
    """Time that passes only when a candidate says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def takes(self, *seconds: float):
        """A function whose n-th call takes seconds[n]."""
        durations = iter(seconds)

        def run() -> None:
            self.now += next(durations)

        return run


def test_spread_interpolates_percentiles() -> None:
    spread = Spread.of([5.0, 1.0, 3.0, 2.0, 4.0])
    assert (spread.p20, spread.median, spread.p80) == pytest.approx((1.8, 3.0, 4.2))


def test_spread_refuses_an_empty_sample() -> None:
    with pytest.raises(ValueError, match="empty"):
        Spread.of([])


def test_ratios_pair_the_times_of_one_round() -> None:
    timing = Timing("ours", seconds=(2.0, 30.0, 1.0), baseline=(1.0, 10.0, 2.0))
    # The ratio of the medians would be 1; the median of the ratios is 2.
    assert timing.cost.median == 2.0
    assert timing.speedup.median == 0.5


def test_interleave_times_every_candidate_once_a_round_and_drops_the_warmup() -> None:
    clock = FakeClock()
    timings = interleave.interleave(
        [Candidate("base", clock.takes(9.0, 1.0, 2.0)), Candidate("ours", clock.takes(9.0, 4.0, 6.0))],
        rounds=2,
        threads=1,
        warmup=1,
        clock=clock,
    )
    assert list(timings) == ["base", "ours"]
    assert timings["base"].seconds == (1.0, 2.0)
    assert timings["ours"].seconds == (4.0, 6.0)
    assert timings["ours"].cost.median == pytest.approx(3.5)
    assert timings["base"].cost.median == 1.0


def test_interleave_does_not_time_the_reset() -> None:
    clock = FakeClock()
    candidate = Candidate("base", clock.takes(1.0, 1.0), reset=clock.takes(100.0, 100.0))
    timings = interleave.interleave([candidate], rounds=2, threads=1, warmup=0, clock=clock)
    assert timings["base"].seconds == (1.0, 1.0)


@pytest.mark.parametrize(("names", "order"), [("ab", "ababab"), ("abc", "abcbcacab")])
def test_interleave_rotates_the_order_and_never_repeats_a_candidate(names: str, order: str) -> None:
    ran: list[str] = []
    candidates = [Candidate(name, lambda name=name: ran.append(name)) for name in names]
    interleave.interleave(candidates, rounds=3, threads=1, warmup=0)
    assert "".join(ran) == order


def test_interleave_pins_the_threads_and_restores_them() -> None:
    before = torch.get_num_threads()
    wanted = 1 if before > 1 else 2
    seen: list[int] = []
    candidate = Candidate("base", lambda: seen.append(torch.get_num_threads()))
    interleave.interleave([candidate], rounds=1, threads=wanted, warmup=1)
    assert seen == [wanted, wanted]
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("names", "rounds", "threads", "warmup"),
    [([], 1, 1, 0), (["a", "a"], 1, 1, 0), (["a"], 0, 1, 0), (["a"], 1, 0, 0), (["a"], 1, 1, -1)],
)
def test_interleave_refuses(names: list[str], rounds: int, threads: int, warmup: int) -> None:
    with pytest.raises(ValueError, match="got"):
        interleave.interleave(
            [Candidate(name, lambda: None) for name in names], rounds=rounds, threads=threads, warmup=warmup
        )


@pytest.mark.parametrize(
    ("bar", "met", "missed"),
    [(Bar(1.42), 1.42, 1.43), (Bar(8.0, at_least=True), 8.0, 7.99)],
    ids=["most", "least"],
)
def test_bar(bar: Bar, met: float, missed: float) -> None:
    assert bar.met_by(met)
    assert not bar.met_by(missed)


def row(name: str = "ours", median: float = 1.0, **fields: object) -> Row:
    fields = {
        "suite": "step",
        "against": "backprop",
        "ratio": Spread(median, 0.9 * median, 1.1 * median),
    } | fields
    return Row(name=name, **fields)


def test_report_keeps_rows_that_miss_their_bar(tmp_path) -> None:
    rows = [row("fast", bar=Bar(1.42)), row("slow", 2.0, bar=Bar(1.42)), row("rival", 2.3)]
    path = tmp_path / "new" / "out.json"
    report.write_json(path, rows, {"threads": 2}, {"commit": "abc"})
    document = report.Document(path)
    assert document.rows == rows
    assert [kept.met for kept in document.rows] == [True, False, None]
    assert document.settings == {"threads": 2}
    assert document.machine == {"commit": "abc"}


def test_a_row_survives_json_with_every_field() -> None:
    spread = Spread(2.0, 1.0, 3.0)
    values = {"speedup": True, "stable": True, "auto": True, "bar": Bar(8.0, at_least=True)}
    values |= dict.fromkeys(("ratio", "seconds", "against_seconds"), spread)
    values |= dict.fromkeys(("suite", "name", "case", "against", "baseline", "rule", "note", "error"), "text")
    numbers = ("operations", "bytes", "floor_seconds", "peak_ratio", "images_per_second", "fraction")
    full = Row(**values, **dict.fromkeys(numbers, 0.5))
    assert {field.name for field in dataclasses.fields(Row)} == full.to_json().keys()
    assert Row.from_json(json.loads(json.dumps(full.to_json()))) == full


def test_rows_that_cannot_be_told_apart_are_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"twice: .*step, , ours"):
        report.write_json(tmp_path / "out.json", [row(), row(against="other")], {}, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ["[]", "{}", '{"format": 1, "rows": []}', "no json"])
def test_a_document_of_something_else_is_refused(tmp_path, content: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="no benchmark document"):
        report.Document(path)


def test_a_document_with_an_unknown_field_is_refused(tmp_path) -> None:
    path = tmp_path / "other.json"
    report.write_json(path, [row()], {}, {})
    path.write_text(path.read_text().replace('"against"', '"instead"'))
    with pytest.raises(ValueError, match="instead"):
        report.Document(path)


def test_a_failed_row_misses_its_bar() -> None:
    assert row(ratio=None, error="wrong", bar=Bar(1.0)).met is False


def test_floor_and_intensity_of_a_row() -> None:
    timed = row(seconds=Spread(3.0, 2.0, 4.0), floor_seconds=1.5, operations=60.0, bytes=20.0)
    assert timed.of_floor == 2.0
    assert timed.intensity == 3.0
    assert row().of_floor is None
    assert row().intensity is None


def printed(rows: list[Row]) -> str:
    out = io.StringIO()
    tables.print_rows(Console(file=out), rows)
    return out.getvalue()


def test_a_piped_table_cuts_nothing() -> None:
    case, note = "a-very-long-case-name-" * 10, "a very long note " * 20
    text = printed([row(case=case, note=note)])
    assert case in text
    assert note.strip() in text


def test_the_table_says_what_failed_and_what_is_faster() -> None:
    text = printed(
        [
            row("B1", speedup=True, against="B1"),
            row("quick", 4.0, speedup=True, against="B1"),
            row("slow", 0.25, speedup=True, against="B1"),
            row("wrong", ratio=None, error="off by 1"),
            row("exponent", 0.816, suite="scaling"),
        ]
    )
    assert "4x faster" in text
    assert " 0.816 " in text
    assert "4x slower" in text
    assert "FAILED" in text
    assert "off by 1" in text


@pytest.mark.parametrize(
    ("seconds", "text"), [(2.0, "2 s"), (0.0125, "12.5 ms"), (3e-6, "3 us"), (5e-8, "50 ns")]
)
def test_duration(seconds: float, text: str) -> None:
    assert report.duration(seconds) == text


@pytest.mark.parametrize(
    ("fixed", "slope", "expected"),
    [(0.1, 1.0, 0.8), (1.1, 2.0, 0.0), (0.1, 3.0, 0.3), (0.5, 0.0, 0.8)],
    ids=["up to the last", "never", "between", "without a slope"],
)
def test_crossover_is_where_the_fitted_cost_passes_one(fixed: float, slope: float, expected: float) -> None:
    fractions = (0.05, 0.1, 0.4, 0.8)
    assert crossover(fractions, [fixed + slope * x for x in fractions]) == pytest.approx(expected)


def test_the_crossover_is_fitted_to_all_costs() -> None:
    """One cost that is 10% off moves it by less than that."""
    fractions = (0.005, 0.02, 0.1, 0.2, 0.4, 0.8)
    costs = [0.1 + 3.0 * x for x in fractions]
    costs[3] *= 1.1
    assert crossover(fractions, costs) == pytest.approx(0.3, rel=0.05)


@pytest.mark.parametrize("option", ["--rounds", "--threads"])
def test_crossover_refuses_what_cannot_be_measured(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        measure_crossovers([option, "0"])
    assert stopped.value.code == 2
    assert f"argument {option}: must be a whole number" in capsys.readouterr().err


def test_parity_allows_what_it_is_told_and_no_more() -> None:
    expected = torch.tensor([1.0, -0.5, 0.25])
    parity.assert_close("same", expected + 5e-5, expected)
    with pytest.raises(parity.ParityError, match=r"off by 2\.00e-04"):
        parity.assert_close("other", expected + 2e-4, expected)
    parity.assert_close("rounded", expected + 2e-4, expected, rounding=torch.tensor([2e-4, 2e-4, 1.1e-4]))
    with pytest.raises(parity.ParityError):
        parity.assert_close("rounded", expected + 2e-4, expected, rounding=torch.tensor([2e-4, 0.0, 2e-4]))
    with pytest.raises(parity.ParityError):
        parity.assert_close("wrong", expected * float("nan"), expected, rounding=1.0)
