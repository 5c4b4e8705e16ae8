"""The suites by name: what each measures, a case at a time, so that a failure costs one case alone."""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

from rich.progress import Progress

from bench import overhead, race, races, ratios, scaling, steps
from bench.failures import guarded
from bench.race import Target
from bench.report import Row

QUICK_NETWORKS = ("FastHebb",)
QUICK_METHODS = ("backprop", "GHL softmax", "GHL winners=0.02", "learn_ softmax", "learn_ winners=0.02")
FEWER_ROUNDS = 9  # of the steps of networks that have no bar; one takes a second
FEWER_SECONDS = 75.0  # for all of their rounds: some methods take ten times as long as backprop
_STEPS = ("step", "local")
Measure = Callable[["Run", str], list[Row]]


@dataclasses.dataclass
class Run:
    """One run of the benchmark: its options, the machine's ceilings, and the bar that shows how far it is."""

    options: argparse.Namespace
    ceilings: Mapping[str, float]
    progress: Progress

    def measure(self, suites: Sequence[str]) -> list[Row]:
        """The rows of suites that belong together (``together``)."""
        if set(suites) <= {*_STEPS}:
            return self._steps(suites)
        (suite,) = suites
        return guarded(suite, "", lambda: SUITES[suite](self, suite))

    @property
    def limits(self) -> race.Options:
        """How long and with what the races are measured."""
        options = self.options
        return race.Options(
            rounds=options.rounds,
            threads=options.threads,
            target=Target.of(options.device, options.quick),
            baselines=frozenset(options.baseline) if options.baseline else None,
            seconds=options.seconds,
        )

    def races(self, suite: str) -> list[Row]:
        """The rows of a suite of races."""
        limits = self.limits
        entered = list(races.SUITES[suite](limits.target))
        task = self.progress.add_task(suite, total=len(entered))
        rows = []
        for one in entered:
            self.progress.update(task, description=f"{suite}: {one.case}")
            rows += guarded(suite, one.case, functools.partial(race.measure, one, limits, self.ceilings))
            self.progress.advance(task)
        self.progress.update(task, description=suite)
        return rows

    def scaling(self, suite: str) -> list[Row]:
        """The rows of bench/scaling.py."""
        return scaling.scaling_rows(self.options, self.progress, self.ceilings)

    def overhead(self, suite: str) -> list[Row]:
        """The rows of bench/overhead.py."""
        return overhead.overhead_rows(self.options, self.progress)

    def memory(self, suite: str) -> list[Row]:
        """Peaks, of which a quick run takes those of the small images."""
        cases = [case for case in steps.MEMORY if case.is_small or not self.options.quick]
        return steps.memory_rows(self.progress, cases)

    def ratios(self, suite: str) -> list[Row]:
        """The rows that have bars."""
        return ratios.rows(self.limits, self.ceilings, self.progress)

    def _steps(self, suites: Sequence[str]) -> list[Row]:
        """Training steps and local passes in turn, against the backprop steps of the same rounds."""
        options = self.options
        methods = [
            name
            for name, method in steps.METHODS.items()
            if steps.suite_of(method) in suites and (not options.quick or name in QUICK_METHODS)
        ]
        rows = []
        for network in options.network or (QUICK_NETWORKS if options.quick else steps.NETWORKS):
            judged = network == ratios.NETWORK
            rounds = options.rounds if judged else min(options.rounds, FEWER_ROUNDS)
            limits = steps.Limits(rounds, options.threads, None if judged else FEWER_SECONDS)
            measure = functools.partial(
                steps.step_rows, network, methods, limits, self.progress, self.ceilings
            )
            rows += guarded(suites[0], network, measure)
        return [row for row in rows if row.suite in suites]  # backprop's is of "step"


SUITES: dict[str, Measure] = {
    **dict.fromkeys(races.SUITES, Run.races),
    **dict.fromkeys(_STEPS, lambda run, suite: run.measure((suite,))),
    "memory": Run.memory,
    "scaling": Run.scaling,
    "overhead": Run.overhead,
    "ratios": Run.ratios,
}
CPU_ONLY = (*_STEPS, "memory", "ratios")


def together(suites: Sequence[str]) -> list[tuple[str, ...]]:
    """The suites in groups, one for each measurement: steps and local passes are timed in turn."""
    in_turn = tuple(suite for suite in _STEPS if suite in suites)
    groups = [in_turn if suite in _STEPS else (suite,) for suite in suites]
    return list(dict.fromkeys(groups))
