"""Stage 2: every operation and kind of rule against the float64 reference; repeatability; CUDA graphs.

The judge is the tests': err(result) <= 2 x err(plain PyTorch in float32 on the same inputs) + a floor of a
few roundings. With inputs of 16 bits the plain computation rounds y to them too, as tensor cores need it.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from oracle import EPS32, Judgement, judge_delta
from torch import Tensor

import ghl_kernels as ghl
from bench.gpu import stage
from bench.gpu.stage import KERNELS, Stage
from ghl_kernels import reference
from ghl_kernels._geometry import make_geometry
from ghl_kernels.rule import Competition, HebbianRule

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Layer(NamedTuple):
    """A layer: ``size`` is () for a linear one, whose batch is its number of positions."""

    name: str
    batch: int
    channels: int
    units: int
    size: tuple[int, ...] = ()
    kernel: tuple[int, ...] = ()
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    groups: int = 1
    layout: str = "contiguous"

    @property
    def options(self) -> dict[str, Any]:
        """Of the functions for convolutions; empty for a linear layer."""
        if not self.size:
            return {}
        return {
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "groups": self.groups,
        }

    @property
    def raw(self) -> tuple[Any, ...]:
        """The same as the operations take it."""
        if not self.size:
            return ()
        g = make_geometry(self.kernel, self.stride, self.padding, self.dilation, self.groups)[1]
        return g.kernel_size, g.stride, g.padding, g.dilation, g.groups


LAYERS = (
    Layer("linear", 300, 130, 70),
    Layer("linear odd", 33, 13, 17),
    Layer("linear wide", 64, 40, 600),
    Layer("conv2d nhwc", 4, 40, 72, (9, 8), (3, 3), padding=1, layout="channels_last"),
    Layer("conv2d nchw", 4, 24, 48, (9, 8), (3, 3), padding=1),
    Layer("conv2d strided", 3, 16, 33, (11, 10), (3, 2), 2, 1, layout="channels_last"),
    Layer("conv2d dilated", 2, 8, 20, (11, 10), (3, 3), 1, 2, 2),
    Layer("conv2d thin", 4, 3, 64, (12, 12), (5, 5), padding=2, layout="channels_last"),
    Layer("pointwise", 4, 64, 32, (7, 7), (1, 1), layout="channels_last"),
    Layer("grouped", 3, 32, 48, (8, 8), (3, 3), padding=1, groups=4, layout="channels_last"),
    Layer("depthwise", 3, 24, 24, (9, 9), (3, 3), padding=1, groups=24, layout="channels_last"),
    Layer("depthwise x2 nchw", 3, 8, 16, (9, 9), (5, 5), 2, 2, groups=8),
    Layer("conv1d", 4, 16, 40, (50,), (5,), padding=2),
    Layer("conv3d", 2, 8, 24, (5, 6, 7), (3, 3, 3), padding=1),
)
LAYERS_BY_NAME = {layer.name: layer for layer in LAYERS}
FULL = ("linear", "conv2d nhwc", "conv2d nchw", "depthwise")
SMALL = (
    Layer("linear", 12, 9, 10),
    Layer("conv2d", 1, 3, 8, (4, 3), (3, 3), padding=1, layout="channels_last"),
    Layer("depthwise", 1, 4, 4, (4, 3), (3, 3), padding=1, groups=4),
)
RULES = {
    "softmax": HebbianRule.ghl(),
    "softmax T": HebbianRule.ghl(0.25),
    "kwta": HebbianRule.kwta(3),
    "softmax winners": HebbianRule(winners=5),
    "anti": HebbianRule.softhebb(),
    "relu winners anti": HebbianRule(activity="relu", winners=4, losers="anti"),
    "binary": HebbianRule.hard_wta(),
    "oja": HebbianRule.oja(),
    "instar": HebbianRule.instar(),
    "subspace": HebbianRule(decay="subspace", normalize="filter"),
    "sanger": HebbianRule.hpca(),
    "no decay": HebbianRule(decay="none", normalize="none"),
}
MAIN_RULES = ("softmax", "kwta")


class Check(NamedTuple):
    """One call, and how its result is judged: the worst error as a multiple of what is allowed."""

    name: str
    call: Callable[[], Any]
    judge: Callable[[Any], float]


class Data(NamedTuple):
    """Tensors of one layer; every function of the package and of the reference takes them as they are."""

    x: Tensor
    u: Tensor
    grad_u: Tensor
    weight: Tensor

    def to(self, dtype: torch.dtype) -> Data:
        return Data(*(tensor.to(dtype) for tensor in self))


def run(this: Stage) -> None:
    """The kernels' sweep, their repeatability, and the other backends' sweeps."""
    # tf32 is the user's choice, and the judge's plain computation does not make it
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    backends = _backends(this)
    for backend in backends:
        _sweep_all(this, backend)
        if backend not in KERNELS:
            continue
        with ghl.use_backend(backend):
            for layer in this.each(SMALL if this.small else LAYERS, lambda layer: f"repeat {layer.name}", 2):
                this.attempt(
                    f"{backend}, repeat {layer.name}",
                    lambda layer=layer, backend=backend: _repeat(this, backend, layer),
                )


def _sweep_all(this: Stage, backend: str) -> None:
    worst: dict[str, float] = {}
    with ghl.use_backend(backend):
        for layer, rule, dtype in this.each(combinations(this.small), _label, least=3):
            if backend != "cpu" or dtype != "fp16":  # which the native kernels leave to eager
                _sweep(this, backend, layer, rule, dtype, worst)
    this.add("worst", {"backend": backend, **worst})


def _backends(this: Stage) -> list[str]:
    """Those that run on the device, the kernels first; the native CPU kernels only where they are built."""
    names: tuple[str, ...] = KERNELS
    if this.dry:
        names += ("eager", "cpu")
    elif not this.small:  # under a memory checker only our own kernels are of interest
        names += ("eager",)
    available = {status.name: status for status in ghl.backends()}
    for name in names:
        if not available[name].available:
            this.absent(f"backend {name}", available[name].reason)
    # a missing Triton is an error of the check, a module that nobody built is not
    return [name for name in names if available[name].available or name == "triton"]


def combinations(small: bool) -> Iterator[tuple[Layer, str, str]]:
    """(layer, rule, dtype) of the sweep: every rule on a few layers, the main ones everywhere."""
    if small:
        yield from itertools.product(SMALL, MAIN_RULES, ("fp32", "bf16"))
        return
    yield from itertools.product(LAYERS, MAIN_RULES, DTYPES)
    others = [rule for rule in RULES if rule not in MAIN_RULES]
    yield from itertools.product([LAYERS_BY_NAME[name] for name in FULL], others, ("fp32", "bf16"))


def calls(device: torch.device, small: bool) -> Iterator[Callable[[], Any]]:
    """Every call of the sweep, unjudged: what has to be compiled."""
    for layer, rule, dtype in combinations(small):
        for check in _checks(layer, RULES[rule], DTYPES[dtype], device):
            yield check.call


def _label(combination: tuple[Layer, str, str]) -> str:
    layer, rule, dtype = combination
    return f"{layer.name}, {rule}, {dtype}"


def _sweep(this: Stage, backend: str, layer: Layer, rule: str, dtype: str, worst: dict[str, float]) -> None:
    """All checks of one layer, rule and dtype; only what is worse than allowed gets a row of its own."""
    label = f"{backend}, {layer.name}, {rule}, {dtype}"
    checks = this.attempt(label, lambda: _checks(layer, RULES[rule], DTYPES[dtype], this.device))
    for check in checks or ():
        ratio = this.attempt(f"{label}: {check.name}", lambda check=check: check.judge(check.call()))
        if ratio is None:
            continue
        key = f"{check.name} {dtype}"
        worst[key] = max(worst.get(key, 0.0), ratio)
        if not ratio <= 1.0:
            this.errors.append(f"{label}: {check.name}: {ratio:.3g} times the allowed error")
            this.add("too far", {"case": label, "operation": check.name, "error_over_allowed": ratio})


def _data(layer: Layer, dtype: torch.dtype, device: torch.device) -> Data:
    generator = torch.Generator(device).manual_seed(1)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    x = randn(layer.batch, layer.channels, *layer.size)
    weight = randn(layer.units, layer.channels // layer.groups, *layer.kernel)
    weight = weight / weight[0].numel() ** 0.5
    dims = len(layer.size)
    if dims:
        conv = (torch.conv1d, torch.conv2d, torch.conv3d)[dims - 1]
        u = conv(x, weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)
    else:
        u = x @ weight.t()
    grad_u = randn(*u.shape)
    if layer.layout == "channels_last":
        x, u, grad_u = (t.contiguous(memory_format=torch.channels_last) for t in (x, u, grad_u))
    return Data(x, u, grad_u, weight).to(dtype)


def _checks(layer: Layer, rule: HebbianRule, dtype: torch.dtype, device: torch.device) -> list[Check]:
    data = _data(layer, dtype, device)
    kind, options = ("conv", layer.options) if layer.size else ("linear", {})
    competition = rule.competition(layer.units)
    delta = getattr(reference, f"{kind}_delta")
    # calls are also made only to be recorded: nothing is judged before it is asked for
    judgement = functools.cache(lambda: _judge_delta(delta, data, rule, options))
    pair = getattr(torch.ops.ghl, f"{kind}_pair")
    checks = [
        Check("compete", lambda: ghl.functional.compete(data.u, rule, 1), _judge_activities(data.u, rule)),
        Check(
            f"{kind}_delta",
            lambda: getattr(ghl.functional, f"{kind}_delta")(data.x, data.u, data.weight, rule, **options),
            lambda H: excess(H, judgement()),
        ),
        Check(
            f"{kind}_pair",
            lambda: pair(data.x, data.u, data.grad_u, *layer.raw, *competition, rule.decay),
            _judge_pair(delta, data, rule, options),
        ),
    ]
    if competition.winners:
        checks.append(_winners_check(layer, data, competition, delta, options))
    if rule.gate == "sign":
        arguments = (data.x, data.u, data.grad_u, data.weight, rule)
        gradient = getattr(ghl.functional, f"{kind}_weight_grad")
        checks.append(
            Check(
                f"{kind}_weight_grad",
                lambda: gradient(*arguments, **options),
                # the sign is the pair's to prove; here its size
                lambda grad: excess(grad.abs(), _absolute(judgement(), grad)),
            )
        )
    return checks


def excess(actual: Tensor, judgement: Judgement) -> float:
    """Worst row's error over the error that it is allowed; infinite where NaN differ."""
    if not torch.equal(actual.isnan(), judgement.oracle.isnan()):
        return float("inf")

    def rows(tensor: Tensor) -> Tensor:
        return tensor.reshape(tensor.shape[0], -1).nan_to_num(0.0).amax(1)

    oracle = judgement.oracle.double()
    error = rows((actual.double() - oracle).abs())
    plain = rows((judgement.eager.to(actual.dtype).double() - oracle).abs())
    allowed = 2 * plain + rows(torch.as_tensor(judgement.floor, device=oracle.device).expand_as(oracle))
    return torch.where(error == 0, 0.0, error / allowed).max().item()


def _judge_delta(
    delta: Callable[..., Tensor], data: Data, rule: HebbianRule, options: dict[str, Any]
) -> Judgement:
    judgement = judge_delta(delta, data.x, data.u, data.weight, rule, 1, **options)
    if data.x.dtype == torch.float32:
        return judgement
    y = reference.compete(data.u.float(), rule, 1).to(data.x.dtype).float()
    rounded = delta(data.x.float(), y, data.weight.float(), _of_activities(rule), **options)
    return judgement._replace(eager=rounded)


def _of_activities(rule: HebbianRule) -> HebbianRule:
    """The rule for which u already is y."""
    return dataclasses.replace(rule, activity="linear", winners=None, temperature=1.0, losers="silent")


def _absolute(judgement: Judgement, grad: Tensor) -> Judgement:
    # a gradient of exactly 0 has no sign, and the result is 0 with it
    dead = grad == 0
    return Judgement(
        torch.where(dead, 0.0, judgement.oracle.abs()),
        torch.where(dead, 0.0, judgement.eager.abs()),
        judgement.floor,
    )


def _judge_activities(u: Tensor, rule: HebbianRule) -> Callable[[Tensor], float]:
    def judge(y: Tensor) -> float:
        oracle, eager = reference.compete(u.double(), rule, 1), reference.compete(u.float(), rule, 1)
        roundings = 8.0 + 2.0 * u.abs().max().item() / rule.temperature
        eps = roundings * EPS32 + (torch.finfo(u.dtype).eps if u.dtype != torch.float32 else 0.0)
        rows = (tensor.movedim(1, 0) for tensor in (oracle, eager, eps * oracle.abs()))
        return excess(y.movedim(1, 0), Judgement(*rows))

    return judge


def _judge_pair(
    delta: Callable[..., Tensor], data: Data, rule: HebbianRule, options: dict[str, Any]
) -> Callable[[tuple[Tensor, Tensor, Tensor]], float]:
    sums = dataclasses.replace(rule, decay="none", normalize="none", gate="none")

    def judge(result: tuple[Tensor, Tensor, Tensor]) -> float:
        A, _, G = result
        judge_A = _judge_delta(delta, data, sums, options)
        judge_G = _judge_delta(delta, data._replace(u=data.grad_u), _of_activities(sums), options)
        # where the library makes G, it leaves in the dtype of the inputs: one more rounding
        rounded = torch.equal(G, G.to(data.x.dtype).to(G.dtype))
        floor = judge_G.floor + torch.finfo(data.x.dtype).eps * judge_G.oracle.abs() * rounded
        return max(excess(A, judge_A), excess(G, judge_G._replace(floor=floor)))

    return judge


def _winners_check(
    layer: Layer,
    data: Data,
    competition: Competition,
    delta: Callable[..., Tensor],
    options: dict[str, Any],
) -> Check:
    """A from the winners' lists."""
    rule = HebbianRule(
        activity=competition.activity,
        winners=competition.winners,
        temperature=competition.temperature,
        losers="anti" if competition.anti else "silent",
        decay="none",
        normalize="none",
        gate="none",
    )
    kind = "conv" if layer.size else "linear"
    sums = getattr(torch.ops.ghl, f"{kind}_winner_sums")

    def call() -> Tensor:
        unit, activity = torch.ops.ghl.winners(data.u, 1, *competition)
        return sums(data.x, unit, activity, layer.units, *layer.raw, "none")[0]

    def judge(A: Tensor) -> float:
        return excess(A, _judge_delta(delta, data, rule, options))

    return Check(f"{kind}_winner_sums", call, judge)


def _repeat(this: Stage, backend: str, layer: Layer) -> None:
    """The same bits three times, and from a CUDA graph on new data."""
    dtype = torch.bfloat16
    for name in MAIN_RULES[: 1 if this.small else None]:
        for check in _checks(layer, RULES[name], dtype, this.device):
            results = [_flat(check.call()) for _ in range(3)]
            same = all(torch.equal(results[0], other) for other in results[1:])
            captured = None if this.small else torch.equal(_from_graph(check.call), results[0])
            row = {"backend": backend, "case": f"{layer.name}, {name}", "operation": check.name}
            this.add("repeat", {**row, "bitwise": same, "graph_bitwise": captured})
            if not same or captured is False:
                this.errors.append(f"{backend}, {layer.name}, {name}: {check.name} differs from run to run")


def _from_graph(call: Callable[[], Any]) -> Tensor:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = _flat(call())
    result.fill_(float("nan"))
    graph.replay()
    return result


def _flat(result: Any) -> Tensor:
    """All tensors of a result in one, as float64, which holds every value exactly."""
    tensors = result if isinstance(result, tuple) else (result,)
    return torch.cat([tensor.double().flatten() for tensor in tensors])


if __name__ == "__main__":
    sys.exit(stage.main("parity", run))
