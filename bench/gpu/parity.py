"""Stage 3: every operation and kind of rule against the float64 reference; repeatability; CUDA graphs.

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
from bench.gpu.poison import poison
from bench.gpu.stage import KERNELS, Stage
from ghl_kernels import reference
from ghl_kernels._geometry import make_geometry
from ghl_kernels.backends import eager
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
    stride: int | tuple[int, ...] = 1
    padding: int | tuple[int, ...] = 0
    dilation: int = 1
    groups: int = 1
    layout: str = "contiguous"  # or "channels_last", or "mixed": x is channels_last, u and dL/du are not

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
        return tuple(g._replace(by_tap=self.layout == "channels_last"))


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
# Of the CUDA backend: what its kernel for sm_90 takes, in more than one stage, tile, cluster and image, and
# the blocks for long rows.
HOPPER = (
    Layer("tall steps", 12, 40, 136, (40, 11), (3, 2), (2, 1), (1, 0), layout="channels_last"),
    Layer("tall steps, u nchw", 12, 40, 136, (40, 11), (3, 2), (2, 1), (1, 0), layout="mixed"),
    Layer("3-d", 6, 40, 136, (9, 10, 9), (3, 2, 2), (2, 1, 1), (1, 0, 1), layout="channels_last"),
    Layer("linear 1700", 2100, 96, 1700),
)
# Of the CUDA backend: every number of elements a lane, and the blocks for long rows in planes.
WIDE = (
    Layer("planes 500", 2, 16, 500, (9, 8), (1, 1)),
    Layer("planes 1000", 2, 16, 1000, (9, 8), (1, 1)),
    Layer("planes 1536", 2, 16, 1536, (9, 8), (1, 1)),
    Layer("planes 1700", 2, 16, 1700, (7, 7), (1, 1)),
    Layer("linear 1536", 100, 16, 1536),
)
SMALL_HOPPER = (
    Layer("tall steps", 2, 40, 136, (9, 6), (3, 2), (2, 1), (1, 0), layout="channels_last"),
    Layer("3-d", 1, 40, 136, (4, 4, 3), (3, 2, 2), (2, 1, 1), (1, 0, 1), layout="channels_last"),
)
TINY_HOPPER = (Layer("3-d", 1, 8, 12, (3, 3, 2), (3, 2, 2), (2, 1, 1), (1, 0, 1), layout="mixed"),)
# Parts of the time that is left: what is not used goes to those that follow. The CUDA kernels are compiled
# and come first; Triton's may have to wait for their compiler.
SHARES = {"cuda": 0.4, "triton": 0.8}
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
    "kwta 30": HebbianRule.kwta(30),
    "two softmax winners": HebbianRule(winners=2),
}
MAIN_RULES = ("softmax", "kwta")
# With so few winners a kernel of the CUDA backend sums A and G of a first layer from their lists.
LIST_RULES = ("binary", "two softmax winners")
WIDE_RULES = ("kwta", "kwta 30")


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
    """The kernels' sweeps and their repeatability, and the other backends' sweeps."""
    # tf32 is the user's choice, and the judge's plain computation does not make it
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    for backend in _backends(this):
        with this.share(SHARES.get(backend, 1.0)), ghl.use_backend(backend):
            if backend in KERNELS:
                with this.share(0.3):
                    _repeat_all(this, backend)
            _sweep_all(this, backend)


def _sweep_all(this: Stage, backend: str) -> None:
    worst: dict[str, float] = {}
    for layer, rule, dtype in this.each(combinations(this, backend), _label, least=3):
        if backend != "cpu" or dtype != "fp16":  # which the native kernels leave to eager
            _sweep(this, backend, layer, rule, dtype, worst)
    this.add("worst", {"backend": backend, **worst})


def _repeat_all(this: Stage, backend: str) -> None:
    layers = SMALL[: 1 if this.dry else None] if this.small else LAYERS
    for layer in this.each(layers, lambda layer: f"repeat {layer.name}", 2):
        label = f"{backend}, repeat {layer.name}"
        this.attempt(label, lambda layer=layer: _repeat(this, backend, layer))


def _backends(this: Stage) -> list[str]:
    """Those that run on the device, the kernels first; the native CPU kernels only where they are built."""
    names: tuple[str, ...] = tuple(SHARES)
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


def combinations(this: Stage, backend: str) -> Iterator[tuple[Layer, str, str]]:
    """(layer, rule, dtype) of the sweep of a backend."""
    if backend == "cuda":
        yield from _of_lists(this.small)
        layers = TINY_HOPPER if this.dry else SMALL_HOPPER if this.small else HOPPER
        yield from itertools.product(layers, ("kwta",) if this.small else MAIN_RULES, ("bf16",))
        yield from itertools.product(() if this.dry else WIDE, WIDE_RULES, ("bf16",))
        yield from itertools.product(() if this.small else (*layers, *WIDE), ("kwta",), ("fp16", "fp32"))
    yield from _of_all(this.small)


def _of_lists(small: bool) -> Iterator[tuple[Layer, str, str]]:
    layers = SMALL if small else LAYERS
    dtypes = ("bf16",) if small else ("bf16", "fp16")
    yield from itertools.product(filter(_is_first, layers), LIST_RULES[: 1 if small else None], dtypes)


def _is_first(layer: Layer) -> bool:
    """Whether it could be a network's first one, of an image in channels_last."""
    return layer.channels == 3 and layer.layout == "channels_last"


def repeated(layer: Layer, small: bool) -> tuple[str, ...]:
    """The rules by which a layer's repeatability is checked."""
    rules = MAIN_RULES[:1] if small else (*MAIN_RULES, "instar")  # whose moments are made and added to
    return rules + LIST_RULES[: 1 if small else None] if _is_first(layer) else rules


def _of_all(small: bool) -> Iterator[tuple[Layer, str, str]]:
    """Every rule on a few layers, the main ones everywhere."""
    if small:
        yield from itertools.product(SMALL, MAIN_RULES, ("fp32", "bf16"))
        return
    yield from itertools.product(LAYERS, MAIN_RULES, DTYPES)
    others = [rule for rule in RULES if rule not in (*MAIN_RULES, *WIDE_RULES)]
    yield from itertools.product([LAYERS_BY_NAME[name] for name in FULL], others, ("fp32", "bf16"))


def calls(device: torch.device, small: bool) -> Iterator[Callable[[], Any]]:
    """Every call of Triton's sweep, unjudged: what has to be compiled."""
    for layer, rule, dtype in _of_all(small):
        for check in _checks(layer, RULES[rule], _data(layer, DTYPES[dtype], device)):
            yield check.call


def _label(combination: tuple[Layer, str, str]) -> str:
    layer, rule, dtype = combination
    return f"{layer.name}, {rule}, {dtype}"


def _sweep(this: Stage, backend: str, layer: Layer, rule: str, dtype: str, worst: dict[str, float]) -> None:
    """All checks of one layer, rule and dtype; only what is worse than allowed gets a row of its own."""
    label = f"{backend}, {layer.name}, {rule}, {dtype}"
    data = _data(layer, DTYPES[dtype], this.device)
    # a judge on the GPU would run under the memory checker too
    judge = torch.device("cpu") if this.small else this.device
    checks = this.attempt(label, lambda: _checks(layer, RULES[rule], data, judge))
    for check in checks or ():
        poison(this.device)
        ratio = this.attempt(
            f"{label}: {check.name}", lambda check=check: check.judge(_brought(check.call(), judge))
        )
        if ratio is None:
            continue
        key = f"{check.name} {dtype}"
        worst[key] = max(worst.get(key, 0.0), ratio)
        if not ratio <= 1.0:
            this.errors.append(f"{label}: {check.name}: {ratio:.3g} times the allowed error")
            this.add("too far", {"case": label, "operation": check.name, "error_over_allowed": ratio})


def _brought(result: Any, device: torch.device) -> Any:
    return tuple(t.to(device) for t in result) if isinstance(result, tuple) else result.to(device)


def _data(layer: Layer, dtype: torch.dtype, device: torch.device, seed: int = 1) -> Data:
    """Made on the CPU: the same numbers everywhere, and no generator that a failed capture could spoil."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    x = randn(layer.batch, layer.channels, *layer.size)
    weight = randn(layer.units, layer.channels // layer.groups, *layer.kernel)
    weight = weight / weight[0].numel() ** 0.5
    dims = len(layer.size)
    if dims:
        conv = (torch.conv1d, torch.conv2d, torch.conv3d)[dims - 1]
        u = conv(x, weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)
    else:
        u = x @ weight.t()
    data = Data(x, u, randn(*u.shape), weight).to(dtype)
    if layer.layout != "contiguous":
        last = torch.channels_last if dims == 2 else torch.channels_last_3d
        data = data._replace(x=data.x.contiguous(memory_format=last))
        if layer.layout == "channels_last":
            u, grad_u = (t.contiguous(memory_format=last) for t in (data.u, data.grad_u))
            data = data._replace(u=u, grad_u=grad_u)
    return Data(*(tensor.to(device) for tensor in data))


def _checks(layer: Layer, rule: HebbianRule, data: Data, judge: torch.device | None = None) -> list[Check]:
    """Every operation on the data; results are judged where the judge is, None: where they are."""
    judged = data if judge is None else Data(*(tensor.to(judge) for tensor in data))
    kind, options = ("conv", layer.options) if layer.size else ("linear", {})
    competition = rule.competition(layer.units)
    delta = getattr(reference, f"{kind}_delta")
    # calls are also made only to be recorded: nothing is judged before it is asked for
    judgement = functools.cache(lambda: _judge_delta(delta, judged, rule, options))
    pair = getattr(torch.ops.ghl, f"{kind}_pair")
    checks = [
        Check("compete", lambda: ghl.functional.compete(data.u, rule, 1), _judge_activities(judged.u, rule)),
        Check(
            "competition_state",
            lambda: torch.ops.ghl.competition_state(data.u, 1, *competition),
            _judge_state(judged.u, competition),
        ),
        Check(
            f"{kind}_delta",
            lambda: getattr(ghl.functional, f"{kind}_delta")(data.x, data.u, data.weight, rule, **options),
            lambda H: excess(H, judgement()),
        ),
        Check(
            f"{kind}_pair",
            lambda: pair(data.x, data.u, data.grad_u, *layer.raw, *competition, rule.decay),
            _judge_pair(delta, judged, rule, options),
        ),
    ]
    if competition.winners:
        checks += _winners_checks(layer, data, judged, competition, delta)
    if rule.gate == "sign":
        checks += _gate_checks(layer, data, rule, judgement)
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


def _gate_checks(
    layer: Layer, data: Data, rule: HebbianRule, judgement: Callable[[], Judgement]
) -> list[Check]:
    """The gate by itself: of a gradient that is narrower than a float32 weight, and of two layers at once."""
    kind = "conv" if layer.size else "linear"
    last = layer.groups, rule.decay, rule.normalize

    def sums() -> tuple[Tensor, Tensor]:
        operation = getattr(torch.ops.ghl, f"{kind}_sums")
        A, moments = operation(data.x, data.u, *layer.raw, *rule.competition(layer.units), rule.decay)
        return A, moments

    def narrow() -> Tensor:
        return torch.ops.ghl.gate(-data.weight, *sums(), data.weight.float(), *last)

    def both() -> Tensor:
        A, moments = sums()
        grads = [-data.weight, data.weight.clone()]
        options = ([option] * 2 for option in last)
        torch.ops.ghl.gate_all_(grads, [A] * 2, [moments] * 2, [data.weight] * 2, *options)
        return torch.cat(grads)

    def judge(signs: tuple[int, ...]) -> Callable[[Tensor], float]:
        def of(gated: Tensor) -> float:
            weight = data.weight.to(gated.device)
            expected = torch.cat([weight.sign() * sign for sign in signs])
            if not torch.equal(gated.sign(), torch.where(gated == 0, 0.0, expected)):
                return float("inf")
            return max(excess(part, _absolute(judgement(), part)) for part in gated.abs().chunk(len(signs)))

        return of

    return [Check("gate", narrow, judge((-1,))), Check("gate_all_", both, judge((-1, 1)))]


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


def _judge_state(u: Tensor, competition: Competition) -> Callable[[tuple[Tensor, Tensor, Tensor]], float]:
    def judge(result: tuple[Tensor, Tensor, Tensor]) -> float:
        oracle, plain = (eager.competition_state(v, 1, competition) for v in (u.double(), u.float()))
        if not all(torch.equal(a.double(), b.double()) for a, b in zip(result[:2], oracle[:2], strict=True)):
            return float("inf")
        eps = _roundings(u, competition.temperature) * EPS32
        logsumexp = Judgement(oracle[2], plain[2], eps * (1 + oracle[2].abs()))
        return excess(result[2].reshape(-1, 1), Judgement(*(field.reshape(-1, 1) for field in logsumexp)))

    return judge


def _roundings(u: Tensor, temperature: float) -> float:
    """Of a softmax that is made from a logsumexp."""
    return 8.0 + 2.0 * u.abs().max().item() / temperature


def _judge_activities(u: Tensor, rule: HebbianRule) -> Callable[[Tensor], float]:
    def judge(y: Tensor) -> float:
        oracle, plain = reference.compete(u.double(), rule, 1), reference.compete(u.float(), rule, 1)
        rounding = torch.finfo(u.dtype).eps if u.dtype != torch.float32 else 0.0
        eps = _roundings(u, rule.temperature) * EPS32 + rounding
        rows = (tensor.movedim(1, 0) for tensor in (oracle, plain, eps * oracle.abs()))
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


def _winners_checks(
    layer: Layer,
    data: Data,
    judged: Data,
    competition: Competition,
    delta: Callable[..., Tensor],
) -> list[Check]:
    """A from the winners' lists, and together with G."""
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

    def lists() -> tuple[Tensor, Tensor]:
        return torch.ops.ghl.winners(data.u, 1, *competition)

    def call() -> Tensor:
        return sums(data.x, *lists(), layer.units, *layer.raw, "none")[0]

    def call_pair() -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.ghl.conv_winner_pair(data.x, *lists(), data.grad_u, *layer.raw, "none")

    def judge(A: Tensor) -> float:
        return excess(A, _judge_delta(delta, judged, rule, layer.options))

    checks = [Check(f"{kind}_winner_sums", call, judge)]
    if layer.size:
        judge_pair = _judge_pair(delta, judged, rule, layer.options)
        checks.append(Check("conv_winner_pair", call_pair, judge_pair))
    return checks


def _repeat(this: Stage, backend: str, layer: Layer) -> None:
    """The same bits three times; and from a CUDA graph that finds new data in its tensors."""
    dtype = torch.bfloat16
    data, others = (_data(layer, dtype, this.device, seed) for seed in (1, 2))
    for name in repeated(layer, this.small):
        for check in _checks(layer, RULES[name], data):
            results = [_flat(check.call()) for _ in range(3)]
            same = all(torch.equal(results[0], other) for other in results[1:])
            captured = None if this.small else _replays(check.call, data, others)
            row = {"backend": backend, "case": f"{layer.name}, {name}", "operation": check.name}
            this.add("repeat", {**row, "bitwise": same, "graph_bitwise": captured})
            if not same or captured is False:
                this.errors.append(f"{backend}, {layer.name}, {name}: {check.name} differs from run to run")


def _replays(call: Callable[[], Any], data: Data, others: Data) -> bool:
    """Whether a graph of the call computes with what is in the tensors when it is replayed."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = _flat(call())
    kept = Data(*(tensor.clone() for tensor in data))
    _overwrite(data, others)
    result.fill_(float("nan"))
    graph.replay()
    same = torch.equal(result, _flat(call()))
    _overwrite(data, kept)
    return same


def _overwrite(data: Data, others: Data) -> None:
    for tensor, other in zip(data, others, strict=True):
        tensor.copy_(other)


def _flat(result: Any) -> Tensor:
    """All tensors of a result in one, as float64, which holds every value exactly."""
    tensors = result if isinstance(result, tuple) else (result,)
    return torch.cat([tensor.double().flatten() for tensor in tensors])


if __name__ == "__main__":
    sys.exit(stage.main("parity", run))
