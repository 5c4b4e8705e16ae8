"""The promised ratios beside their bars: ``python -m ghl_kernels bench --suite ratios`` (``make bench``).

step     a training step of DeepHebb against backprop: GHL by rule, and the authors' algorithm
local    a pass with ``learn_`` (no backward) against a backprop step
kwta     k-WTA over channels in turn with torch.topk + scatter, both memory formats
memory   peak memory of a training step against backprop's
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

from rich.progress import Progress

from bench import race, steps
from bench.failures import guarded
from bench.races import compete
from bench.report import Row

NETWORK = "DeepHebb"


def rows(limits: race.Options, ceilings: Mapping[str, float], progress: Progress) -> list[Row]:
    """Every row that has a bar, and the rivals measured in the same rounds."""
    promised = [method for network, method in steps.BARS if network == NETWORK]
    timing = steps.Limits(limits.rounds, limits.threads)
    found = guarded(
        "step",
        NETWORK,
        lambda: steps.step_rows(NETWORK, [*promised, steps.AUTHORS.name], timing, progress, ceilings),
    )
    judged = [one for one in compete.kwta(limits.target) if one.bars]
    task = progress.add_task("kwta", total=len(judged))
    for one in judged:
        found += guarded("kwta", one.case, functools.partial(race.measure, one, limits, ceilings))
        progress.advance(task)
    return found + steps.memory_rows(progress, [case for case in steps.MEMORY if case.bar])
