"""Stage 4: A and G in one kernel against the library, by tile; and the table of shapes that ``auto`` uses.

The rivals are the baselines B4, B4c and B4d of bench/baselines/library.py, for a linear layer B12, also
compiled and with float32 results. In bfloat16 a library convolution rounds A (and a library product does by
default), so all but the last compute less than what is asked for.

``--warm`` only compiles the compiled rivals.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import ghl_kernels as ghl
from bench.baselines import library, linear
from bench.gpu import ceilings, stage, tiles
from bench.gpu.layers import LAYERS, SMALL, Layer
from bench.gpu.stage import Stage, available_kernels, write_json
from bench.gpu.timing import Timed, l2_bytes, sets_for, time_all, within
from ghl_kernels.backends.cuda.kernels import correlate as cuda_correlate
from ghl_kernels.backends.triton import arch as architectures
from ghl_kernels.backends.triton import config

RULES = {"softmax": ghl.HebbianRule.ghl(), "k-WTA 2%": ghl.HebbianRule.kwta(0.02)}
# Of A, relative to its largest entry, before anything is timed; the parity stage is the judge.
TOLERANCE = 1e-2
DTYPE = torch.bfloat16


def run(this: Stage) -> None:
    """Every layer: right first, then all tiles and rivals in turn; the table of shapes grows as they go."""
    limits = ceilings.load_or_measure(this)
    this.add("ceilings", limits)
    table: dict[str, Any] = {}
    arch = architectures.of(this.device).name
    with ghl.use_backend("triton"):
        for rule in RULES:
            for layer in this.each(SMALL if this.dry else LAYERS, lambda layer: layer.name, least=8):
                label = f"{layer.name}, {rule}"
                this.attempt(label, lambda layer=layer, rule=rule: _measure(this, layer, rule, limits, table))
                write_json(this.out / "shapes.json", {} if this.dry else {arch: table})


def calls(device: torch.device, dry: bool) -> Iterator[Callable[[], object]]:
    """Every call with every tile: what has to be compiled."""
    for rule in RULES.values():
        for layer in SMALL if dry else LAYERS:
            pair = _pair(layer, rule, [layer.tensors(device, DTYPE)])
            for context in tiles.every_candidate(lambda pair=pair: pair(0)):
                with context:
                    yield lambda pair=pair: pair(0)


def _measure(
    this: Stage, layer: Layer, rule_name: str, limits: dict[str, float], table: dict[str, Any]
) -> None:
    rule = RULES[rule_name]
    moved = layer.moved(DTYPE.itemsize)
    sets = sets_for(moved, l2_bytes(this.device))
    tensors = [layer.tensors(this.device, DTYPE) for _ in range(sets)]
    pair = _pair(layer, rule, tensors)
    with tiles.library(False):
        problem = tiles.problem_of(lambda: pair(0))
    ours = _ours(this, layer, pair, problem)
    rivals = _rivals(this, layer, rule, tensors) if rule_name == "softmax" else {}
    candidates = {**ours, **rivals}
    error = _error(layer, rule, tensors[0], pair(0)[0])
    if not error <= TOLERANCE:
        raise AssertionError(f"A is off by {error:.2e} of its largest entry")
    timed = time_all(candidates, sets=sets, device=this.device)
    floor = ceilings.floor_seconds(limits, "bf16", moved, layer.operations)
    fastest = min(
        (sample.seconds.median for name, sample in timed.items() if name in rivals and sample.seconds),
        default=None,
    )
    for name, sample in timed.items():
        row = {"layer": layer.name, "rule": rule_name, "what": name, "A_error": error, **sample.row()}
        this.add("pair", row | _rates(layer, sample, floor, fastest, moved))
    if problem is not None:
        _choose(table, problem, {name: timed[name] for name in ours})


def _rates(
    layer: Layer, sample: Timed, floor: float | None, rival: float | None, moved: int
) -> dict[str, Any]:
    """What the time means: rate, share of the floor, and times faster than the fastest rival."""
    if sample.seconds is None:
        return {}
    seconds = sample.seconds.median
    return {
        "flop_per_byte": layer.operations / moved,
        "tflops": layer.operations / seconds / 1e12,
        "of_floor": floor / seconds if floor else None,
        "times_faster": rival / seconds if rival else None,
    }


def _pair(
    layer: Layer, rule: ghl.HebbianRule, tensors: list[tuple[Tensor, ...]]
) -> Callable[[int], tuple[Tensor, Tensor, Tensor]]:
    competition = rule.competition(layer.units)
    if layer.size:
        g = layer.geometry
        raw = (g.kernel_size, g.stride, g.padding, g.dilation, g.groups)
        return lambda i: torch.ops.ghl.conv_pair(*tensors[i], *raw, *competition, rule.decay)
    return lambda i: torch.ops.ghl.linear_pair(*tensors[i], *competition, rule.decay)


def _ours(
    this: Stage, layer: Layer, pair: Callable[[int], object], problem: config.Problem | None
) -> dict[str, Callable[[int], object]]:
    """The configured call, every tile, the CUDA kernels, and the library path where it is as accurate."""
    found: dict[str, Callable[[int], object]] = {"configured": pair}
    kernel = functools.partial(tiles.library, False)
    for tile in config.candidates(problem, architectures.of(this.device)) if problem else ():
        name = f"tile {' '.join(map(str, tile))}"
        found[name] = within(pair, kernel, functools.partial(tiles.forced, tile))
    if "cuda" in available_kernels(this):
        for form in ("automatic", "mma"):
            name = "cuda" if form == "automatic" else f"cuda {form}"
            found[name] = within(
                pair, functools.partial(ghl.use_backend, "cuda"), functools.partial(_form, form)
            )
    if not layer.size:
        found["triton library path"] = within(pair, functools.partial(tiles.library, True))
    return found


@contextlib.contextmanager
def _form(form: str) -> Iterator[None]:
    """Every correlation of the CUDA backend inside takes this form of the kernel, never the library."""
    real = cuda_correlate.correlate
    with (
        mock.patch.object(cuda_correlate, "correlate", functools.partial(real, form=form)),
        mock.patch.object(cuda_correlate, "prefers_library", return_value=False),
    ):
        yield


def _rivals(
    this: Stage, layer: Layer, rule: ghl.HebbianRule, tensors: list[tuple[Tensor, ...]]
) -> dict[str, Callable[[int], object]]:
    """What a user could write with library calls: the baselines, and for a product its float32 result."""
    torch._dynamo.reset()  # or the next layer's shapes would be compiled as dynamic ones
    weight = torch.empty(layer.weight_shape, dtype=DTYPE, device=this.device)
    if layer.size:
        g = layer.geometry
        conv = {"stride": g.stride, "padding": g.padding, "dilation": g.dilation}
        weight = weight.contiguous(memory_format=torch.channels_last)
        pairs = {"B4": library.pair, "B4d": library.concatenated_pair}
    else:
        conv, pairs = {}, {"B12": linear.pair}
        if not this.dry:
            pairs["B12 to float32"] = _float32_pair
    options = {"backend": "eager" if this.dry else "inductor", "dynamic": False, "fullgraph": True}
    first = next(iter(pairs))
    pairs[f"{first}, compiled" if first == "B12" else "B4c"] = torch.compile(pairs[first], **options)
    return {
        name: lambda i, pair=pair: pair(*tensors[i], weight, rule.temperature, **conv)
        for name, pair in pairs.items()
    }


@torch.no_grad()
def _float32_pair(
    x: Tensor, u: Tensor, grad_u: Tensor, weight: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """B12 with A and G as they leave the accumulator."""
    y = torch.softmax(u / temperature, dim=1)
    return tuple(torch.mm(rows.t(), x, out_dtype=torch.float32) for rows in (y, grad_u))


def _error(layer: Layer, rule: ghl.HebbianRule, tensors: tuple[Tensor, ...], A: Tensor) -> float:
    """Of A against float32 sums of y in float32, relative to the largest entry."""
    x, u, _ = tensors
    y = ghl.reference.compete(u.float(), rule, 1)
    expected = _float32_sum(layer, x, y)
    return ((A.view_as(expected) - expected).abs().max() / expected.abs().max()).item()


def _float32_sum(layer: Layer, x: Tensor, y: Tensor) -> Tensor:
    """sum_p y_p x_p^T in float32."""
    if not layer.size:
        return y.t() @ x.float()
    g = layer.geometry
    weight = torch.empty(layer.weight_shape, device=x.device)
    return library.correlation(x.float(), y, weight, stride=g.stride, padding=g.padding, dilation=g.dilation)


def warm(out: pathlib.Path) -> int:
    """Run every layer's rivals once, so that the compiled ones are in Inductor's cache."""
    this = Stage("warm-pair", argparse.Namespace(out=out, dry_run=False, small=False, seconds=120.0))
    for layer in this.each(LAYERS, lambda layer: layer.name, least=5):
        tensors = [layer.tensors(this.device, DTYPE)]
        rivals = _rivals(this, layer, RULES["softmax"], tensors)
        this.attempt(layer.name, lambda rivals=rivals: [rival(0) for rival in rivals.values()])
    return this.finish()


def _choose(table: dict[str, Any], problem: config.Problem, timed: dict[str, Timed]) -> None:
    """Enter the fastest tile, and whether the library is faster still."""
    seconds = {name: sample.seconds.median for name, sample in timed.items() if sample.seconds is not None}
    by_tile = {name: value for name, value in seconds.items() if name.startswith("tile ")}
    if not by_tile:
        return
    fastest = min(by_tile, key=by_tile.__getitem__)
    # the rules come in the order of their weight: the first one to need a shape decides it
    table.setdefault(config._key(problem), [int(part) for part in fastest.split()[1:]])
    # these are asked before it is known where the state will be computed
    key = config._key(problem._replace(state_here=False))
    for rival, name in (("triton library path", "library"), ("cuda", "cuda")):
        if rival in seconds:
            table.setdefault(f"{key}:{name}", seconds[rival] < by_tile[fastest])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--warm"]:
        sys.exit(warm(pathlib.Path(sys.argv[2])))
    sys.exit(stage.main("pair", run))
