"""Stage 5: k-winner-take-all against the four ways to write it and against a copy of the same u.

The share of the copy's bandwidth counts u where it alone is read, u and y where both are moved; the copy is
timed in turn with what is measured by it.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import ghl_kernels as ghl
from bench.baselines import selection, topk
from bench.gpu import shapes, stage
from bench.gpu.poison import poison
from bench.gpu.stage import Stage, available_kernels
from bench.gpu.timing import Timed, l2_bytes, sets_for, time_all, within
from ghl_kernels.backends.gpu.layout import responses
from ghl_kernels.backends.triton import measured
from ghl_kernels.rule import Competition

# By the name in the table: the kernels' function. "state" is what a pair needs, "full state" all of it.
FUNCTIONS = {"y": "activities", "state": "state", "full state": "full_state", "lists": "winner_lists"}
COPY = "copy"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Case(NamedTuple):
    """Responses of ``units`` along dimension 1, and how many of them win."""

    shape: tuple[int, ...]
    layout: str  # "rows", "nhwc" or "nchw"
    winners: int
    dtype: str

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.shape))} {self.layout} k={self.winners} {self.dtype}"

    def responses(self, device: torch.device, seed: int = 0) -> Tensor:
        # not the default generator, which a failed capture leaves unusable
        generator = torch.Generator(device).manual_seed(seed)
        u = torch.randn(self.shape, generator=generator, device=device).to(DTYPES[self.dtype])
        return u.to(memory_format=torch.channels_last) if self.layout == "nhwc" else u


CASES = (
    *(Case((512, 384, 16, 16), layout, 8, "bf16") for layout in ("nhwc", "nchw")),
    *(Case((512, 1536, 8, 8), layout, 31, "bf16") for layout in ("nhwc", "nchw")),
    Case((65536, 1024), "rows", 8, "bf16"),
    Case((512, 96, 32, 32), "nhwc", 1, "bf16"),
    Case((16384, 4096), "rows", 16, "bf16"),
    Case((2048, 32768), "rows", 128, "bf16"),
    *(Case((512, 384, 16, 16), layout, 8, "fp32") for layout in ("nhwc", "nchw")),
    Case((16384, 4096), "rows", 16, "fp32"),
)
SMALL = (
    Case((2, 16, 3, 3), "nhwc", 3, "bf16"),
    Case((2, 16, 3, 3), "nchw", 3, "fp32"),
    Case((5, 40), "rows", 4, "bf16"),
)


def run(this: Stage) -> None:
    """Every case, checked exactly before it is timed."""
    backends = available_kernels(this)
    for case in this.each(SMALL if this.dry else CASES, str, least=4):
        this.attempt(str(case), lambda case=case: _measure(this, case, backends))


def calls(device: torch.device, dry: bool) -> Iterator[Callable[[], object]]:
    """What has to be compiled."""
    for case in SMALL if dry else CASES:
        u = case.responses(device)
        competition = Competition("linear", case.winners, 1.0, False)
        for operation in _operations([u], competition, "triton").values():
            yield lambda operation=operation: operation(0)


def _operations(
    u: list[Tensor], competition: Competition, backend: str
) -> dict[str, Callable[[int], object]]:
    """By their names in FUNCTIONS."""
    # the operators have no other name for the state of a pair
    kernels = importlib.import_module(f"ghl_kernels.backends.{backend}.kernels.compete")
    return {
        "y": lambda i: torch.ops.ghl.compete(u[i], 1, *competition),
        "state": lambda i: kernels.state(responses(u[i], 1), competition),
        "full state": lambda i: torch.ops.ghl.competition_state(u[i], 1, *competition),
        "lists": lambda i: torch.ops.ghl.winners(u[i], 1, *competition),
    }


def _on(backend: str, operation: Callable[[int], object]) -> Callable[[int], object]:
    return within(operation, functools.partial(ghl.use_backend, backend))


def _measure(this: Stage, case: Case, backends: Sequence[str]) -> None:
    competition = Competition("linear", case.winners, 1.0, False)
    one = case.responses(this.device)
    # of what is read alone: a state writes next to nothing that could drive u out of the cache
    sets = sets_for(one.numel() * one.element_size(), l2_bytes(this.device))
    u = [one, *(case.responses(this.device, seed) for seed in range(1, sets))]
    expected = _reference(one, competition)
    candidates: dict[str, Callable[[int], object]] = {}
    for backend in backends:
        operations = {
            f"{backend} {what}": _on(backend, run)
            for what, run in _operations(u, competition, backend).items()
        }
        poison(this.device)
        if torch.equal(operations[f"{backend} y"](0), expected):
            candidates |= operations
        else:
            this.errors.append(f"{case}: the winners of {backend} are not those of the reference")
    candidates |= _rivals(u, case.winners)
    candidates[COPY] = lambda i: torch.empty_like(u[i]).copy_(u[i])
    timed = time_all(candidates, sets=sets, device=this.device)
    shapes.enter(this, _faster(case, timed))
    for what, sample in timed.items():
        row = {"case": str(case), "layout": case.layout, "what": what, **sample.row()}
        this.add("kwta", row | _shares(what, timed))


def _shares(what: str, timed: dict[str, Timed]) -> dict[str, float | None]:
    """The part of the copy's bandwidth that is reached, and how many times faster than topk it is."""
    own, copy, rival = (timed[name].seconds for name in (what, COPY, "B7c"))
    if own is None:
        return {}
    moved = 0.5 if what.endswith((" state", " lists")) else 1.0  # of what the copy moves
    return {
        "of_copy_bandwidth": moved * copy.median / own.median if copy else None,
        "times_faster_than_topk": rival.median / own.median if rival else None,
    }


def _faster(case: Case, timed: dict[str, Timed]) -> dict[str, bool]:
    """Whether the CUDA backend's kernel beats Triton's, for the functions that an operation calls."""
    found = {}
    for what, function in FUNCTIONS.items():
        seconds = [timed[name].seconds for name in (f"cuda {what}", f"triton {what}") if name in timed]
        if len(seconds) < 2 or None in seconds:
            continue
        cuda, triton = (spread.median for spread in seconds if spread is not None)
        itemsize, rows = DTYPES[case.dtype].itemsize, case.layout != "nchw"
        key = measured.competition_key(function, case.shape[1], itemsize, rows=rows)
        found[f"{key}:cuda"] = cuda < triton
    return found


def _rivals(u: list[Tensor], k: int) -> dict[str, Callable[[int], object]]:
    """All four ways; B7a and B7d select by another rule, 1 winner, and the first and the k-th."""
    return {
        "B7a": lambda i: selection.one_hot_argmax(u[i]),
        "B7b": lambda i: selection.kwta_kthvalue(u[i], k),
        "B7c": lambda i: topk.kwta_topk(u[i], k),
        "B7d topk": lambda i: selection.krotov_topk(u[i], k, 0.4),
        "B7d sort": lambda i: selection.krotov_sort(u[i], k, 0.4),
    }


def _reference(u: Tensor, competition: Competition) -> Tensor:
    with ghl.use_backend("eager"):
        return torch.ops.ghl.compete(u, 1, *competition)


if __name__ == "__main__":
    sys.exit(stage.main("kwta", run))
