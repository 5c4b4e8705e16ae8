"""Every operation of the ``ghl::`` namespace on one page: schema, guard, fake.

Registered by ``Library.define`` and ``impl``, whose call costs a third of ``custom_op``'s. What
that style leaves to us is done here: bodies run under no_grad, in-place operations bump the
version counter, and every operation has a fake with the guards of the real one.

Names: A is the correlation sum_p y_p x_p^T; the moments are what the decay needs of y beside A
(instar: sum_p y_p; subspace and sanger: sum_p y_p y_p^T per group; else nothing), then the number
of positions P; G is the weight gradient sum_p (dL/du)_p x_p^T. All are sums over the data, in float32
(float64 for float64 inputs).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, get_args

import torch
from torch import Tensor
from torch._C._dynamo.eval_frame import get_eval_frame_callback as _traced_by
from torch._compile import _disable_dynamo

from ghl_kernels import _check, _dispatch, _probe, _tape
from ghl_kernels._geometry import Geometry, is_by_tap
from ghl_kernels.backends import eager
from ghl_kernels.backends.eager import SGDOptions, Stepped, moments_size, sum_dtype
from ghl_kernels.rule import Activity, Competition, Decay, Gate, Normalize

_LIB = torch.library.Library("ghl", "DEF")
_COMPETITION = "str activity, int winners, float temperature, bool anti"
_CONV = (
    "SymInt[] kernel_size, SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups, bool by_tap"
)
_RULE = "SymInt groups, str decay, str normalize"


def _op(schema: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as the real implementation of an operation on every device."""
    name = schema.split("(")[0]
    # What is changed in place may have any strides. A compiler that holds it to those of its plan copies it
    # into itself, and fails (Inductor, torch 2.13, the gradient of a 1 x 1 convolution).
    _LIB.define(schema, tags=(torch.Tag.flexible_layout,) if "!" in schema else ())
    # gate_ allocates all that it needs before it writes, so that it can be begun again without memory
    is_taped = "!" not in schema or name == "gate_"

    def register(body: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(body)
        def implementation(first: Tensor | list[Tensor], *args: Any) -> Any:
            if torch.is_grad_enabled():  # a layer has turned it off, and doing so costs as much as this call
                with torch.no_grad():
                    return implementation(first, *args)
            tensor = first if isinstance(first, Tensor) else first[0]
            device = tensor.device
            if torch.is_autocast_enabled(device.type):
                # the sums are float32 by definition; autocast would run their products in 16 bits. Only its
                # switch is turned: the context manager costs as much as some of the operations
                torch.set_autocast_enabled(device.type, False)
                try:
                    return implementation(first, *args)
                finally:
                    torch.set_autocast_enabled(device.type, True)
            settings = _dispatch.tape_settings(device, tensor.dtype) if is_taped else None
            if settings is None:
                return body(first, *args)
            return _tape.run(name, settings, body, (first, *args))

        # every device, of which those without kernels of ours have the eager backend
        _LIB.impl(name, _untraced(implementation), "CompositeExplicitAutograd")
        if "!" in schema or name == "gate":  # of the others vmap calls one after the other
            for key in ("FuncTorchBatched", "Batched"):  # of vmap, and of is_grads_batched
                _LIB.impl(name, functools.partial(_refuse_vmap, name), key)
        # no gradient flows; without this torch hangs a node on the results that warns in backward
        _LIB.impl(name, torch.library.fallthrough_kernel, "Autograd")
        return body

    return register


def _untraced(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """The implementation, hidden from torch.compile where an eager call would show it its frames.

    Dynamo traces every frame in its scope that is no part of a graph, as in the backward pass of a compiled
    function. It lets go of a tensor once only its address is needed, and a kernel would then write into
    memory that is no longer its own.
    """
    disabled = _disable_dynamo(implementation)

    @functools.wraps(implementation)
    def call(*args: Any) -> Any:
        # the former is True where this frame is traced, the latter where it is not, but others would be
        if torch.compiler.is_dynamo_compiling() or _traced_by() is not None:
            return disabled(*args)
        return implementation(*args)

    return call


def _refuse_vmap(name: str, *_: Any) -> None:
    raise RuntimeError(
        f"torch.func.vmap, jacrev and is_grads_batched cannot map over ghl::{name}, "
        "whose rule is not linear; take the gradients of a GHL layer's weight one at a time"
    )


def _fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return torch.library.register_fake(f"ghl::{name}", lib=_LIB)


# --- y = c(u) -----------------------------------------------------------------------------------


@_op(f"compete(Tensor u, int dim, {_COMPETITION}) -> Tensor")
def _compete(u: Tensor, dim: int, activity: str, winners: int, temperature: float, anti: bool) -> Tensor:
    _guard_competition(u, dim, winners)
    competition = _competition(activity, winners, temperature, anti)
    return _dispatch.select(u.device, u.dtype).compete(u, dim % u.dim(), competition)


@_fake("compete")
def _(u: Tensor, dim: int, activity: str, winners: int, temperature: float, anti: bool) -> Tensor:
    _guard_competition(u, dim, winners)
    return torch.empty_like(u)


@_op(
    f"competition_state(Tensor u, int dim, {_COMPETITION})"
    " -> (Tensor threshold, Tensor cut, Tensor logsumexp)"
)
def _competition_state(
    u: Tensor, dim: int, activity: str, winners: int, temperature: float, anti: bool
) -> tuple[Tensor, Tensor, Tensor]:
    _guard_competition(u, dim, winners)
    competition = _competition(activity, winners, temperature, anti)
    return _dispatch.select(u.device, u.dtype).competition_state(u, dim % u.dim(), competition)


@_fake("competition_state")
def _(
    u: Tensor, dim: int, activity: str, winners: int, temperature: float, anti: bool
) -> tuple[Tensor, Tensor, Tensor]:
    _guard_competition(u, dim, winners)
    shape = [size for i, size in enumerate(u.shape) if i != dim % u.dim()]
    real = u.new_empty(shape, dtype=sum_dtype(u.dtype))
    return real, u.new_empty(shape, dtype=torch.int32), torch.empty_like(real)


@_op(f"winners(Tensor u, int dim, {_COMPETITION}) -> (Tensor unit, Tensor activity)")
def _winners(
    u: Tensor, dim: int, activity: str, winners: int, temperature: float, anti: bool
) -> tuple[Tensor, Tensor]:
    _guard_winner_lists(u, dim, winners)
    competition = _competition(activity, winners, temperature, anti)
    return _dispatch.select(u.device, u.dtype).winners(u, dim % u.dim(), competition)


@_fake("winners")
def _(
    u: Tensor, dim: int, activity: str, winners: int, temperature: float, anti: bool
) -> tuple[Tensor, Tensor]:
    _guard_winner_lists(u, dim, winners)
    shape = (u.numel() // max(u.shape[dim], 1), winners)
    return u.new_empty(shape, dtype=torch.int32), u.new_empty(shape, dtype=sum_dtype(u.dtype))


# --- A and the moments of y ---------------------------------------------------------------------


@_op(f"linear_sums(Tensor x, Tensor u, {_COMPETITION}, str decay) -> (Tensor A, Tensor moments)")
def _linear_sums(
    x: Tensor, u: Tensor, activity: str, winners: int, temperature: float, anti: bool, decay: str
) -> tuple[Tensor, Tensor]:
    _guard_linear(x, u, winners)
    _check.choice("decay", decay, get_args(Decay))
    competition = _competition(activity, winners, temperature, anti)
    return _dispatch.select(x.device, x.dtype).linear_sums(x, u, competition, decay)


@_fake("linear_sums")
def _(
    x: Tensor, u: Tensor, activity: str, winners: int, temperature: float, anti: bool, decay: str
) -> tuple[Tensor, Tensor]:
    _guard_linear(x, u, winners)
    return _empty_sums(x, (u.shape[-1], x.shape[-1]), 1, decay)


@_op(f"conv_sums(Tensor x, Tensor u, {_CONV}, {_COMPETITION}, str decay) -> (Tensor A, Tensor moments)")
def _conv_sums(
    x: Tensor,
    u: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    by_tap: bool,
    activity: str,
    winners: int,
    temperature: float,
    anti: bool,
    decay: str,
) -> tuple[Tensor, Tensor]:
    geometry = _geometry(kernel_size, stride, padding, dilation, groups, by_tap)
    _guard_conv(x, u, geometry, winners)
    _check.choice("decay", decay, get_args(Decay))
    competition = _competition(activity, winners, temperature, anti)
    A, moments = _dispatch.select(x.device, x.dtype).conv_sums(x, u, geometry, competition, decay)
    return _ordered(A, by_tap), moments


@_fake("conv_sums")
def _(
    x: Tensor,
    u: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    by_tap: bool,
    activity: str,
    winners: int,
    temperature: float,
    anti: bool,
    decay: str,
) -> tuple[Tensor, Tensor]:
    _guard_conv(x, u, _geometry(kernel_size, stride, padding, dilation, groups, by_tap), winners)
    return _empty_sums(x, (u.shape[1], x.shape[1] // groups, *kernel_size), groups, decay, by_tap)


@_op(
    f"linear_pair(Tensor x, Tensor u, Tensor grad_u, {_COMPETITION}, str decay)"
    " -> (Tensor A, Tensor moments, Tensor G)"
)
def _linear_pair(
    x: Tensor,
    u: Tensor,
    grad_u: Tensor,
    activity: str,
    winners: int,
    temperature: float,
    anti: bool,
    decay: str,
) -> tuple[Tensor, Tensor, Tensor]:
    _guard_linear(x, u, winners)
    _guard_grad(u, grad_u)
    _check.choice("decay", decay, get_args(Decay))
    competition = _competition(activity, winners, temperature, anti)
    return _dispatch.select(x.device, x.dtype).linear_pair(x, u, grad_u, competition, decay)


@_fake("linear_pair")
def _(
    x: Tensor,
    u: Tensor,
    grad_u: Tensor,
    activity: str,
    winners: int,
    temperature: float,
    anti: bool,
    decay: str,
) -> tuple[Tensor, Tensor, Tensor]:
    _guard_linear(x, u, winners)
    _guard_grad(u, grad_u)
    A, moments = _empty_sums(x, (u.shape[-1], x.shape[-1]), 1, decay)
    return A, moments, torch.empty_like(A)


@_op(
    f"conv_pair(Tensor x, Tensor u, Tensor grad_u, {_CONV}, {_COMPETITION}, str decay)"
    " -> (Tensor A, Tensor moments, Tensor G)"
)
def _conv_pair(
    x: Tensor,
    u: Tensor,
    grad_u: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    by_tap: bool,
    activity: str,
    winners: int,
    temperature: float,
    anti: bool,
    decay: str,
) -> tuple[Tensor, Tensor, Tensor]:
    geometry = _geometry(kernel_size, stride, padding, dilation, groups, by_tap)
    _guard_conv(x, u, geometry, winners)
    _guard_grad(u, grad_u)
    _check.choice("decay", decay, get_args(Decay))
    competition = _competition(activity, winners, temperature, anti)
    A, moments, G = _dispatch.select(x.device, x.dtype).conv_pair(x, u, grad_u, geometry, competition, decay)
    return _ordered(A, by_tap), moments, _ordered(G, by_tap)


@_fake("conv_pair")
def _(
    x: Tensor,
    u: Tensor,
    grad_u: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    by_tap: bool,
    activity: str,
    winners: int,
    temperature: float,
    anti: bool,
    decay: str,
) -> tuple[Tensor, Tensor, Tensor]:
    _guard_conv(x, u, _geometry(kernel_size, stride, padding, dilation, groups, by_tap), winners)
    _guard_grad(u, grad_u)
    A, moments = _empty_sums(x, (u.shape[1], x.shape[1] // groups, *kernel_size), groups, decay, by_tap)
    return A, moments, torch.empty_like(A)


@_op("linear_grad(Tensor x, Tensor grad_u) -> Tensor")
def _linear_grad(x: Tensor, grad_u: Tensor) -> Tensor:
    _guard_linear(x, grad_u, 0)
    return _dispatch.select(x.device, x.dtype).linear_grad(x, grad_u)


@_fake("linear_grad")
def _(x: Tensor, grad_u: Tensor) -> Tensor:
    _guard_linear(x, grad_u, 0)
    return x.new_empty((grad_u.shape[-1], x.shape[-1]), dtype=sum_dtype(x.dtype))


@_op(f"conv_grad(Tensor x, Tensor grad_u, {_CONV}) -> Tensor")
def _conv_grad(
    x: Tensor,
    grad_u: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    by_tap: bool,
) -> Tensor:
    geometry = _geometry(kernel_size, stride, padding, dilation, groups, by_tap)
    _guard_conv(x, grad_u, geometry, 0)
    return _ordered(_dispatch.select(x.device, x.dtype).conv_grad(x, grad_u, geometry), by_tap)


@_fake("conv_grad")
def _(
    x: Tensor,
    grad_u: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    by_tap: bool,
) -> Tensor:
    _guard_conv(x, grad_u, _geometry(kernel_size, stride, padding, dilation, groups, by_tap), 0)
    return _new_sum(x, (grad_u.shape[1], x.shape[1] // groups, *kernel_size), by_tap)


@_op(
    "linear_winner_sums(Tensor x, Tensor unit, Tensor activity, SymInt units, str decay)"
    " -> (Tensor A, Tensor moments)"
)
def _linear_winner_sums(
    x: Tensor, unit: Tensor, activity: Tensor, units: int, decay: str
) -> tuple[Tensor, Tensor]:
    _guard_lists(x, unit, activity, x.numel() // max(x.shape[-1], 1))
    return _dispatch.select(x.device, x.dtype).linear_winner_sums(x, unit, activity, units, decay)


@_fake("linear_winner_sums")
def _(x: Tensor, unit: Tensor, activity: Tensor, units: int, decay: str) -> tuple[Tensor, Tensor]:
    return _empty_sums(x, (units, x.shape[-1]), 1, decay)


@_op(
    f"conv_winner_sums(Tensor x, Tensor unit, Tensor activity, SymInt units, {_CONV}, str decay)"
    " -> (Tensor A, Tensor moments)"
)
def _conv_winner_sums(
    x: Tensor,
    unit: Tensor,
    activity: Tensor,
    units: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    by_tap: bool,
    decay: str,
) -> tuple[Tensor, Tensor]:
    geometry = _geometry(kernel_size, stride, padding, dilation, groups, by_tap)
    _check.conv_input(x, geometry)
    positions = x.shape[0]
    for size in geometry.out_size(x.shape[2:]):
        positions *= size
    _guard_lists(x, unit, activity, positions)
    backend = _dispatch.select(x.device, x.dtype)
    A, moments = backend.conv_winner_sums(x, unit, activity, units, geometry, decay)
    return _ordered(A, by_tap), moments


@_fake("conv_winner_sums")
def _(
    x: Tensor,
    unit: Tensor,
    activity: Tensor,
    units: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    by_tap: bool,
    decay: str,
) -> tuple[Tensor, Tensor]:
    _check.conv_input(x, _geometry(kernel_size, stride, padding, dilation, groups, by_tap))
    return _empty_sums(x, (units, x.shape[1] // groups, *kernel_size), groups, decay, by_tap)


@_op(
    f"conv_winner_pair(Tensor x, Tensor unit, Tensor activity, Tensor grad_u, {_CONV}, str decay)"
    " -> (Tensor A, Tensor moments, Tensor G)"
)
def _conv_winner_pair(
    x: Tensor,
    unit: Tensor,
    activity: Tensor,
    grad_u: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    by_tap: bool,
    decay: str,
) -> tuple[Tensor, Tensor, Tensor]:
    geometry = _geometry(kernel_size, stride, padding, dilation, groups, by_tap)
    _guard_conv(x, grad_u, geometry, 0)
    _check.choice("decay", decay, get_args(Decay))
    _guard_lists(x, unit, activity, grad_u.numel() // max(grad_u.shape[1], 1))
    backend = _dispatch.select(x.device, x.dtype)
    A, moments, G = backend.conv_winner_pair(x, unit, activity, grad_u, geometry, decay)
    return _ordered(A, by_tap), moments, _ordered(G, by_tap)


@_fake("conv_winner_pair")
def _(
    x: Tensor,
    unit: Tensor,
    activity: Tensor,
    grad_u: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    by_tap: bool,
    decay: str,
) -> tuple[Tensor, Tensor, Tensor]:
    _guard_conv(x, grad_u, _geometry(kernel_size, stride, padding, dilation, groups, by_tap), 0)
    shape = (grad_u.shape[1], x.shape[1] // groups, *kernel_size)
    A, moments = _empty_sums(x, shape, groups, decay, by_tap)
    return A, moments, torch.empty_like(A)


# --- H, the gate, and learning in place ---------------------------------------------------------


@_op(f"delta(Tensor A, Tensor moments, Tensor weight, {_RULE}) -> Tensor")
def _delta(A: Tensor, moments: Tensor, weight: Tensor, groups: int, decay: str, normalize: str) -> Tensor:
    _guard_sums(A, moments, weight, groups, decay, normalize)
    return _dispatch.select(weight.device, weight.dtype).delta(A, moments, weight, groups, decay, normalize)


@_fake("delta")
def _(A: Tensor, moments: Tensor, weight: Tensor, groups: int, decay: str, normalize: str) -> Tensor:
    _check.shape("A", A, weight.shape)
    return weight.new_empty(weight.shape, dtype=A.dtype)


@_op(f"gate(Tensor grad, Tensor A, Tensor moments, Tensor weight, {_RULE}) -> Tensor")
def _gate(
    grad: Tensor, A: Tensor, moments: Tensor, weight: Tensor, groups: int, decay: str, normalize: str
) -> Tensor:
    _guard_gate(grad, A, moments, weight, groups, decay, normalize)
    return _dispatch.select(weight.device, weight.dtype).gate(
        grad, A, moments, weight, groups, decay, normalize
    )


@_fake("gate")
def _(
    grad: Tensor, A: Tensor, moments: Tensor, weight: Tensor, groups: int, decay: str, normalize: str
) -> Tensor:
    _check.shape("grad", grad, weight.shape)
    return torch.empty_like(grad, dtype=weight.dtype)


@_op(f"gate_(Tensor(a!) grad, Tensor A, Tensor moments, Tensor weight, {_RULE}) -> ()")
def _gate_(
    grad: Tensor, A: Tensor, moments: Tensor, weight: Tensor, groups: int, decay: str, normalize: str
) -> None:
    _guard_gate(grad, A, moments, weight, groups, decay, normalize)
    _check.writable("grad", grad)
    _dispatch.select(weight.device, weight.dtype).gate_(grad, A, moments, weight, groups, decay, normalize)
    torch.autograd.graph.increment_version(grad)
    _tape.note(torch.autograd.graph.increment_version, (grad,))


@_fake("gate_")
def _(
    grad: Tensor, A: Tensor, moments: Tensor, weight: Tensor, groups: int, decay: str, normalize: str
) -> None:
    _check.shape("grad", grad, weight.shape)


@_op(
    "gate_all_(Tensor(a!)[] grads, Tensor[] A, Tensor[] moments, Tensor[] weights,"
    " SymInt[] groups, str[] decays, str[] normalizes) -> ()"
)
def _gate_all_(
    grads: Sequence[Tensor],
    A: Sequence[Tensor],
    moments: Sequence[Tensor],
    weights: Sequence[Tensor],
    groups: Sequence[int],
    decays: Sequence[str],
    normalizes: Sequence[str],
) -> None:
    layers = list(zip(grads, A, moments, weights, groups, decays, normalizes, strict=True))
    by_backend: dict[ModuleType, list[tuple[Any, ...]]] = {}
    for grad, *sums in layers:
        _guard_gate(grad, *sums)
        _check.writable("grad", grad)
        weight = sums[2]
        by_backend.setdefault(_dispatch.select(weight.device, weight.dtype), []).append((grad, *sums))
    for module, members in by_backend.items():
        module.gate_all_(members)
    torch.autograd.graph.increment_version(grads)


@_fake("gate_all_")
def _(
    grads: Sequence[Tensor],
    A: Sequence[Tensor],
    moments: Sequence[Tensor],
    weights: Sequence[Tensor],
    groups: Sequence[int],
    decays: Sequence[str],
    normalizes: Sequence[str],
) -> None:
    for grad, weight in zip(grads, weights, strict=True):
        _check.shape("grad", grad, weight.shape)


@_op(f"learn_(Tensor(a!) weight, Tensor A, Tensor moments, float lr, {_RULE}) -> ()")
def _learn_(
    weight: Tensor, A: Tensor, moments: Tensor, lr: float, groups: int, decay: str, normalize: str
) -> None:
    _guard_sums(A, moments, weight, groups, decay, normalize)
    _check.writable("weight", weight)
    _dispatch.select(weight.device, weight.dtype).learn_(weight, A, moments, lr, groups, decay, normalize)
    torch.autograd.graph.increment_version(weight)


@_fake("learn_")
def _(weight: Tensor, A: Tensor, moments: Tensor, lr: float, groups: int, decay: str, normalize: str) -> None:
    _check.shape("A", A, weight.shape)


@_op(
    "gated_sgd_(Tensor(a!)[] weights, Tensor(b!)[] momentum_buffers, Tensor[] grads, Tensor[] A,"
    " Tensor[] moments, bool[] begins, SymInt[] groups, str[] decays, str[] normalizes, str[] gates,"
    " float lr, float momentum, float dampening, float weight_decay, bool nesterov, bool maximize) -> ()"
)
def _gated_sgd_(
    weights: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    grads: Sequence[Tensor],
    A: Sequence[Tensor],
    moments: Sequence[Tensor],
    begins: Sequence[bool],
    groups: Sequence[int],
    decays: Sequence[str],
    normalizes: Sequence[str],
    gates: Sequence[str],
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
) -> None:
    buffers: Sequence[Tensor | None] = momentum_buffers if momentum != 0 else [None] * len(weights)
    rules = groups, decays, normalizes, gates
    by_backend: dict[ModuleType, list[Stepped]] = {}
    for fields in zip(weights, grads, A, moments, buffers, begins, *rules, strict=True):
        layer = Stepped(*fields)
        _guard_step(layer)
        module = _dispatch.select_with("fused_sgd_", layer.weight.device, layer.weight.dtype)
        by_backend.setdefault(module, []).append(layer)
    options = SGDOptions(lr, momentum, dampening, weight_decay, nesterov, maximize)
    for module, members in by_backend.items():
        if hasattr(module, "fused_sgd_"):
            module.fused_sgd_(members, options)
        else:
            eager.gated_sgd_(members, options, module)
    torch.autograd.graph.increment_version([*weights, *momentum_buffers])


@_fake("gated_sgd_")
def _(
    weights: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    grads: Sequence[Tensor],
    A: Sequence[Tensor],
    moments: Sequence[Tensor],
    begins: Sequence[bool],
    groups: Sequence[int],
    decays: Sequence[str],
    normalizes: Sequence[str],
    gates: Sequence[str],
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
) -> None:
    for weight, grad in zip(weights, grads, strict=True):
        _check.shape("grad", grad, weight.shape)


# --- observation --------------------------------------------------------------------------------
# The changed tensors are those of a Monitor's probe, which does the summing.


@_op("observe_responses_(Tensor(a!) histogram, Tensor u, int dim, int probe) -> ()")
def _observe_responses_(histogram: Tensor, u: Tensor, dim: int, probe: int) -> None:
    found = _probe.find(probe)
    if found is not None and found.is_due():
        found.count_winners(histogram, u, dim)


@_fake("observe_responses_")
def _(histogram: Tensor, u: Tensor, dim: int, probe: int) -> None:
    _check.shape("histogram", histogram, (2, u.shape[dim] + 1))


@_op("observe_rule_(Tensor(a!) totals, Tensor? G, Tensor A, Tensor moments, Tensor weight, int probe) -> ()")
def _observe_rule_(
    totals: Tensor, G: Tensor | None, A: Tensor, moments: Tensor, weight: Tensor, probe: int
) -> None:
    found = _probe.find(probe)
    if found is not None and found.is_observing():
        found.measure_rule(totals, G, A, moments, weight)


@_fake("observe_rule_")
def _(totals: Tensor, G: Tensor | None, A: Tensor, moments: Tensor, weight: Tensor, probe: int) -> None:
    _check.shape("A", A, weight.shape)


# --- guards -------------------------------------------------------------------------------------


def _geometry(
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    by_tap: bool,
) -> Geometry:
    return Geometry(tuple(kernel_size), tuple(stride), tuple(padding), tuple(dilation), groups, by_tap)


def _competition(activity: str, winners: int, temperature: float, anti: bool) -> Competition:
    _check.choice("activity", activity, get_args(Activity))
    return Competition(activity, winners, temperature, anti)


def _guard_competition(u: Tensor, dim: int, winners: int) -> None:
    _check.floats(u=u)
    _check.winners(winners, u.shape[_check.dimension(u, dim)])


def _guard_winner_lists(u: Tensor, dim: int, winners: int) -> None:
    _guard_competition(u, dim, winners)
    if winners < 1:
        raise ValueError("lists of winners need winners >= 1, got a competition among all units")


def _guard_linear(x: Tensor, u: Tensor, winners: int) -> None:
    _check.floats(x=x, u=u)
    _check.same_dtype(x=x, u=u)
    _check.linear(x, u)
    _check.winners(winners, u.shape[-1])


def _guard_conv(x: Tensor, u: Tensor, geometry: Geometry, winners: int) -> None:
    _check.floats(x=x, u=u)
    _check.same_dtype(x=x, u=u)
    _check.conv(x, u, geometry)
    _check.winners(winners, u.shape[1])


def _guard_grad(u: Tensor, grad_u: Tensor) -> None:
    _check.floats(u=u, grad_u=grad_u)
    _check.same_dtype(u=u, grad_u=grad_u)
    _check.shape("grad_u", grad_u, u.shape)


def _guard_lists(x: Tensor, unit: Tensor, activity: Tensor, positions: int) -> None:
    _check.floats(x=x, activity=activity)
    if unit.dtype != torch.int32 or activity.dtype != sum_dtype(x.dtype):
        raise TypeError(
            f"winners must be int32 units and {sum_dtype(x.dtype)} activities, "
            f"got {unit.dtype} and {activity.dtype}"
        )
    if unit.shape != activity.shape or unit.dim() != 2 or unit.shape[0] != positions:
        raise ValueError(
            f"winners must be two ({positions}, k) tensors, got {tuple(unit.shape)}, {tuple(activity.shape)}"
        )


def _guard_sums(A: Tensor, moments: Tensor, weight: Tensor, groups: int, decay: str, normalize: str) -> None:
    _check.choice("decay", decay, get_args(Decay))
    _check.choice("normalize", normalize, get_args(Normalize))
    _check.floats(A=A, moments=moments, weight=weight)
    _check.shape("A", A, weight.shape)
    _check.shape("moments", moments, (moments_size(weight.shape[0], groups, decay),))
    if A.dtype != moments.dtype or A.dtype != sum_dtype(weight.dtype):
        raise TypeError(
            f"A and the moments must be {sum_dtype(weight.dtype)} for a {weight.dtype} weight, "
            f"got {A.dtype} and {moments.dtype}"
        )


def _guard_gate(
    grad: Tensor, A: Tensor, moments: Tensor, weight: Tensor, groups: int, decay: str, normalize: str
) -> None:
    _guard_sums(A, moments, weight, groups, decay, normalize)
    _check.shape("grad", grad, weight.shape)
    _check.floats(grad=grad, weight=weight)
    if grad.dtype == torch.float64 != A.dtype:
        raise TypeError(f"grad must be no wider than the sums, which are {A.dtype}, got {grad.dtype}")


def _guard_step(layer: Stepped) -> None:
    weight, buffer = layer.weight, layer.momentum_buffer
    _guard_sums(layer.A, layer.moments, weight, layer.groups, layer.decay, layer.normalize)
    _check.choice("gate", layer.gate, get_args(Gate))
    _check.writable("weight", weight)
    for name, tensor in (("grad", layer.grad), ("momentum_buffer", buffer)):
        if tensor is not None:
            _check.shape(name, tensor, weight.shape)
            _check.floats(**{name: tensor, "weight": weight})
            _check.same_dtype(**{name: tensor, "weight": weight})
    if buffer is not None:
        _check.writable("momentum_buffer", buffer)


def _empty_sums(
    x: Tensor, shape: Sequence[int], groups: int, decay: str, by_tap: bool = False
) -> tuple[Tensor, Tensor]:
    moments = x.new_empty(moments_size(shape[0], groups, decay), dtype=sum_dtype(x.dtype))
    return _new_sum(x, shape, by_tap), moments


def _new_sum(x: Tensor, shape: Sequence[int], by_tap: bool) -> Tensor:
    units, channels, *kernel = shape
    stored = (units, *kernel, channels) if by_tap else shape
    made = x.new_empty(stored, dtype=sum_dtype(x.dtype))
    return made.movedim(-1, 1) if by_tap else made


def _ordered(total: Tensor, by_tap: bool) -> Tensor:
    """As the fake has it; a copy where the backend has no choice of its results' order."""
    if not by_tap:
        return total.contiguous()
    return total if is_by_tap(total) else total.movedim(1, -1).contiguous().movedim(-1, 1)
