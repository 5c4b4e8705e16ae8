"""Stage 4: A and G in one kernel, and A alone, by tile and against the library; the table of shapes.

What is timed has first been compared with float32 sums, A and G of every contender. ``auto`` is timed last,
with the shapes of the table, beside all that are as exact: verdicts.py has the most that it may lose.
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

import ghl_kernels as ghl
from bench.baselines import library
from bench.gpu import ceilings, cuda_form, shapes, stage, tiles
from bench.gpu.layers import LAYERS, SMALL, Layer
from bench.gpu.poison import poison
from bench.gpu.rivals import AS_EXACT, Tensors, rivals
from bench.gpu.stage import Stage, available_kernels
from bench.gpu.timing import Timed, l2_bytes, sets_for, time_all, within
from ghl_kernels.backends.gpu.layout import FEW_CHANNELS
from ghl_kernels.backends.triton import arch as architectures
from ghl_kernels.backends.triton import config

RULES = {"softmax": ghl.HebbianRule.ghl(), "k-WTA 2%": ghl.HebbianRule.kwta(0.02)}
# Of every entry relative to the largest, and of all by their norm; the parity stage is the judge.
TOLERANCE = 1e-2
DTYPE = torch.bfloat16
PRODUCTS = ("pair", "A")
AUTO = "auto"
LIBRARY_GRAD = "library G"  # beside A by a tile of its own
_CLOSE = 1.1  # times the fastest's time: those that auto is timed beside
Run = Callable[[int], tuple[Tensor, ...]]


class Job(NamedTuple):
    """What is measured together; ``product`` is "pair" (A and G) or "A"."""

    product: str
    rule_name: str
    layer: Layer

    def __str__(self) -> str:
        return f"{self.product} of {self.layer.name}, {self.rule_name}"

    @property
    def rule(self) -> ghl.HebbianRule:
        return RULES[self.rule_name]

    @property
    def can_split(self) -> bool:
        """Whether G may be the library's beside A by a tile."""
        return self.product == "pair" and self.layer.size > 0

    @property
    def operations(self) -> int:
        return self.layer.operations if self.product == "pair" else self.layer.operations // 2

    @property
    def moved(self) -> int:
        both = self.layer.moved(DTYPE.itemsize)
        if self.product == "pair":
            return both
        responses = self.layer.positions * self.layer.units * DTYPE.itemsize
        return both - responses - 4 * self.layer.units * self.layer.columns


def jobs(dry: bool) -> Iterator[Job]:
    """Those with a bar first; a dry run has one of each kind."""
    if dry:
        yield from (Job(product, "softmax", layer) for product, layer in zip(PRODUCTS, SMALL, strict=True))
        yield from (Job(product, "k-WTA 2%", layer) for product, layer in zip(PRODUCTS, SMALL, strict=True))
        return
    for rule, product, layer in itertools.product(RULES, PRODUCTS, LAYERS):
        yield Job(product, rule, layer)


def run(this: Stage) -> None:
    """Every job: right first, then all tiles and rivals in turn; the table of shapes grows as they go."""
    # the rivals by the fastest algorithm; what is compared with by float32
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    limits = ceilings.load_or_measure(this)
    this.add("ceilings", limits)
    table: dict[str, Any] = {}
    with ghl.use_backend("triton"):
        for job in this.each(jobs(this.dry), str, least=5):
            this.attempt(str(job), lambda job=job: _measure(this, job, limits, table))
            shapes.enter(this, table)


def calls(device: torch.device, dry: bool) -> Iterator[Callable[[], object]]:
    """Every call with every tile: what has to be compiled."""
    for job in jobs(dry):
        call = _call(job, [job.layer.tensors(device, DTYPE)])
        for used in (False, True) if job.can_split else (False,):
            with tiles.library_grad(used):
                for context in tiles.every_candidate(lambda call=call: call(0)):
                    with context:
                        yield lambda call=call: call(0)


def _measure(this: Stage, job: Job, limits: dict[str, float], table: dict[str, Any]) -> None:
    sets = sets_for(job.moved, l2_bytes(this.device))
    tensors = [job.layer.tensors(this.device, DTYPE) for _ in range(sets)]
    call = _call(job, tensors)
    with tiles.library(False):
        problem = tiles.problem_of(lambda: call(0))
    expected = _expected(job, tensors[0])
    errors: dict[str, float] = {}
    ours = _right(this, job, _ours(this, job, call, problem), expected, errors)
    others = rivals(this.device, job.layer, tensors, job.product) if job.rule_name == "softmax" else {}
    timed = time_all({**ours, **others}, sets=sets, device=this.device)
    seconds = _seconds(timed)
    rival = min((seconds[name] for name in others if name in seconds), default=None)
    floor = ceilings.floor_seconds(limits, "bf16", job.moved, job.operations)
    if problem is not None:
        _choose(table, problem, {name: seconds[name] for name in ours if name in seconds})
    auto = _right(this, job, _auto(call, table), expected, errors)
    exact = {name: run for name, run in {**ours, **others}.items() if name in ours or name in AS_EXACT}
    timed |= (beside := _beside(this, auto, exact, seconds, sets))
    for name, sample in timed.items():
        row = {"layer": job.layer.name, "rule": job.rule_name, "what": name, "error": errors.get(name)}
        row |= sample.row() | _rates(job, sample, floor, rival)
        if name == AUTO:
            row["of_best"] = _of_best(_seconds(beside))
        this.add("pair" if job.product == "pair" else "sums", row)


def _call(job: Job, tensors: list[Tensors]) -> Run:
    """(A, G) or (A,) of a set of tensors."""
    kind, raw = "linear", ()
    if job.layer.size:
        g = job.layer.geometry
        kind, raw = "conv", g._replace(by_tap=True)  # as for a weight in channels_last
    arguments = (*raw, *job.rule.competition(job.layer.units), job.rule.decay)
    pair, sums = (getattr(torch.ops.ghl, f"{kind}_{product}") for product in ("pair", "sums"))
    if job.product == "pair":
        return lambda i: pair(*tensors[i], *arguments)[::2]
    return lambda i: sums(*tensors[i][:2], *arguments)[:1]


def _ours(this: Stage, job: Job, call: Run, problem: config.Problem | None) -> dict[str, Run]:
    """The configured call, every tile, the CUDA kernels, and the library path where it is as accurate."""
    found: dict[str, Run] = {"configured": call}

    def add_tiles(prefix: str, asked: config.Problem, context: Callable[[], AbstractContextManager]) -> None:
        for tile in config.candidates(asked, architectures.of(this.device)):
            name = f"{prefix}tile {' '.join(map(str, tile))}"
            found[name] = within(call, context, functools.partial(tiles.forced, tile))

    if problem is not None:
        add_tiles("", problem, functools.partial(tiles.library, False))
    if problem is not None and job.can_split:
        add_tiles(f"{LIBRARY_GRAD}, A ", _alone(problem), functools.partial(tiles.library_grad, True))
    if "cuda" in available_kernels(this):
        backend = functools.partial(ghl.use_backend, "cuda")
        forms = {"cuda": "automatic", "cuda mma": "mma"}
        if job.layer.size and job.layer.channels <= FEW_CHANNELS:
            forms["cuda narrow"] = "narrow"
        for name, form in forms.items():
            found[name] = within(call, backend, functools.partial(cuda_form.forced, form))
    if not job.layer.size:
        found["triton library path"] = within(call, functools.partial(tiles.library, True))
    return found


def _alone(problem: config.Problem) -> config.Problem:
    return problem._replace(results=1)


def _auto(call: Run, table: dict[str, Any]) -> dict[str, Run]:
    automatic = functools.partial(ghl.use_backend, "auto")
    return {AUTO: within(call, automatic, functools.partial(shapes.used, dict(table)))}


def _right(
    this: Stage, job: Job, ours: dict[str, Run], expected: Tensors, errors: dict[str, float]
) -> dict[str, Run]:
    """Those whose sums are the expected ones; the others are errors, and never timed or chosen."""
    right = {}
    for name, call in ours.items():
        poison(this.device)
        error = this.attempt(f"{job}: {name}", lambda call=call: _error(call(0), expected))
        if error is None:
            continue
        errors[name] = error
        if error <= TOLERANCE:
            right[name] = call
        else:
            this.errors.append(f"{job}: {name} is off by {error:.2e}")
    return right


def _error(sums: Tensors, expected: Tensors) -> float:
    """The worst of each sum's largest error over its largest entry, and its error's norm over its own."""
    worst = 0.0
    for one, wanted in zip(sums, expected, strict=True):
        difference = one.reshape(wanted.shape).float() - wanted
        largest = difference.abs().max() / wanted.abs().max()
        # a maximum hides NaN from min() and max(), a sum does not
        worst = max(worst, (largest + difference.norm() / wanted.norm()).nan_to_num(float("inf")).item())
    return worst


def _expected(job: Job, tensors: Tensors) -> Tensors:
    """float32 sums of y, computed in float32, and of dL/du."""
    x, u, grad_u = tensors
    y = ghl.reference.compete(u.float(), job.rule, 1)
    lefts = (y, grad_u.float())[: 2 if job.product == "pair" else 1]
    return tuple(_float32_sum(job.layer, x, left) for left in lefts)


def _float32_sum(layer: Layer, x: Tensor, left: Tensor) -> Tensor:
    if not layer.size:
        return left.t() @ x.float()
    g = layer.geometry
    weight = torch.empty(layer.weight_shape, device=x.device)
    conv = {"stride": g.stride, "padding": g.padding, "dilation": g.dilation}
    # made once: to find the fastest algorithm would take longer than the product
    torch.backends.cudnn.benchmark = False
    try:
        return library.correlation(x.float(), left, weight, **conv)
    finally:
        torch.backends.cudnn.benchmark = True


def _seconds(timed: dict[str, Timed]) -> dict[str, float]:
    return {name: sample.seconds.median for name, sample in timed.items() if sample.seconds is not None}


def _beside(
    this: Stage, auto: dict[str, Run], exact: dict[str, Run], seconds: dict[str, float], sets: int
) -> dict[str, Timed]:
    """auto, in turn with those that come near the fastest: 3% is less than two runs differ by."""
    known = {name: seconds[name] for name in exact if name in seconds}
    if not auto or not known:
        return {}
    limit = _CLOSE * min(known.values())
    near = {name: exact[name] for name, value in known.items() if value <= limit}
    return time_all({**auto, **near}, sets=sets, device=this.device)


def _of_best(seconds: dict[str, float]) -> float | None:
    others = [value for name, value in seconds.items() if name != AUTO]
    return seconds[AUTO] / min(others) if AUTO in seconds and others else None


def _rates(job: Job, sample: Timed, floor: float | None, rival: float | None) -> dict[str, Any]:
    """What the time means: rate, share of the floor, and times faster than the fastest rival."""
    if sample.seconds is None:
        return {}
    seconds = sample.seconds.median
    return {
        "flop_per_byte": job.operations / job.moved,
        "tflops": job.operations / seconds / 1e12,
        "of_floor": floor / seconds if floor else None,
        "times_faster": rival / seconds if rival else None,
    }


def _choose(table: dict[str, Any], problem: config.Problem, seconds: dict[str, float]) -> None:
    """Enter the fastest tile, and whether the CUDA kernel or the library is faster still."""
    fastest = _fastest(seconds, "tile ")
    if not fastest:
        return
    # the rules come in the order of their weight: the first one to need a shape decides it
    table.setdefault(config._key(problem), [int(part) for part in fastest.split()[1:]])
    # these are asked before it is known where the state will be computed, and from what
    key = config._key(problem._replace(state_here=False, aligned=True, bounded=True))
    kernels = {"tile": seconds[fastest]}
    if apart := _fastest(seconds, LIBRARY_GRAD):
        table.setdefault(config._key(_alone(problem)), [int(part) for part in apart.split()[4:]])
        table.setdefault(f"{key}:library_grad", seconds[apart] < kernels["tile"])
        kernels["tile"] = min(kernels["tile"], seconds[apart])
    if "cuda" in seconds:
        table.setdefault(f"{key}:cuda", seconds["cuda"] < kernels["tile"])
        kernels["cuda"] = seconds["cuda"]
    if "triton library path" in seconds:
        table.setdefault(f"{key}:library", seconds["triton library path"] < min(kernels.values()))


def _fastest(seconds: dict[str, float], prefix: str) -> str | None:
    return min((name for name in seconds if name.startswith(prefix)), key=seconds.__getitem__, default=None)


if __name__ == "__main__":
    sys.exit(stage.main("pair", run))
