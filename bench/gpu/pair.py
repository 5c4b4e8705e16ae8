"""Stage 3: A and G in one kernel against the library, by tile; and the table of shapes that ``auto`` uses.

The rivals: the library's weight gradient twice, on dL/du and on y from a compiled softmax; and once, on
[y; dL/du] side by side, where dL/du is taken to lie there already. In bfloat16 a library convolution rounds A
(and a library product does by default), so these rivals compute less than what is asked for; the rows say so.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import ghl_kernels as ghl
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
        found["library path"] = within(pair, functools.partial(tiles.library, True))
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
    """What a user could write with library calls."""
    torch._dynamo.reset()  # or the next layer's shapes would be compiled as dynamic ones
    options = {"backend": "eager" if this.dry else "inductor", "dynamic": False}

    def activities(u: Tensor) -> Tensor:
        return torch.softmax(u.float() / rule.temperature, 1).to(u.dtype)

    softmax = torch.compile(activities, **options)
    write = torch.compile(lambda out, u: out.copy_(activities(u)), **options)
    both = [_side_by_side(layer, grad_u) for _, _, grad_u in tensors]

    def twice(i: int, product: Callable[[Layer, Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        x, u, grad_u = tensors[i]
        return product(layer, x, softmax(u)), product(layer, x, grad_u)

    def once(i: int, product: Callable[[Layer, Tensor, Tensor], Tensor]) -> Tensor:
        x, u, _ = tensors[i]
        write(both[i].narrow(1, 0, layer.units), u)
        return product(layer, x, both[i])

    found: dict[str, Callable[[int], object]] = {
        "library twice (A rounded)": lambda i: twice(i, _library),
        "library once (A rounded)": lambda i: once(i, _library),
    }
    if not layer.size and not this.dry:
        found["library twice, float32"] = lambda i: twice(i, _library_float32)
        found["library once, float32"] = lambda i: once(i, _library_float32)
    return found


def _side_by_side(layer: Layer, grad_u: Tensor) -> Tensor:
    """[y; dL/du] with room for y."""
    shape = (grad_u.shape[0], 2 * layer.units, *grad_u.shape[2:])
    both = torch.empty(shape, dtype=grad_u.dtype, device=grad_u.device)
    if layer.size:
        both = both.contiguous(memory_format=torch.channels_last)
    both.narrow(1, layer.units, layer.units).copy_(grad_u)
    return both


def _library(layer: Layer, x: Tensor, y: Tensor) -> Tensor:
    """sum_p y_p x_p^T in x's dtype."""
    if not layer.size:
        return torch.mm(y.t(), x)
    g = layer.geometry
    weight = x.new_empty((y.shape[1], *layer.weight_shape[1:])).contiguous(memory_format=torch.channels_last)
    return torch.ops.aten.convolution_backward(
        y, x, weight, None, g.stride, g.padding, g.dilation, False, [0, 0], 1, [False, True, False]
    )[1]


def _library_float32(layer: Layer, x: Tensor, y: Tensor) -> Tensor:
    return torch.mm(y.t(), x, out_dtype=torch.float32)


def _error(layer: Layer, rule: ghl.HebbianRule, tensors: tuple[Tensor, ...], A: Tensor) -> float:
    """Of A against float32 sums of y in float32, relative to the largest entry."""
    x, u, _ = tensors
    y = ghl.reference.compete(u.float(), rule, 1)
    expected = _library(layer, x.float(), y)
    return ((A.view_as(expected) - expected).abs().max() / expected.abs().max()).item()


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
    for rival, name in (("library path", "library"), ("cuda", "cuda")):
        if rival in seconds:
            table.setdefault(f"{key}:{name}", seconds[rival] < by_tile[fastest])


if __name__ == "__main__":
    sys.exit(stage.main("pair", run))
