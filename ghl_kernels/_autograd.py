"""The two autograd functions behind the layers.

``LayerFunction`` is the torch layer with one more result: in backward the Hebbian sums (A and the
moments) leave it as the gradients of two extra inputs. Where those inputs come from decides when
the rule is applied: ``GateFunction``, an identity on the weight whose backward turns (G, A, moments)
into the gated gradient, or the leaves of a StepGate, where autograd adds the sums up over passes.

Nothing is mutated in backward but the gradient that this file itself produced, so accumulation,
checkpointing, torch.autograd.grad and compilation keep their meaning.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ghl_kernels import _dispatch
from ghl_kernels._geometry import Geometry, is_by_tap
from ghl_kernels.backends.eager import sum_dtype
from ghl_kernels.rule import Competition, HebbianRule

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class Plan(NamedTuple):
    """Everything about a layer's pass that is no tensor."""

    geometry: Geometry | None  # None for linear
    units: int
    competition: Competition
    decay: str
    needs_grad: bool  # G is computed (the rule has a gate)
    at_step: bool
    is_sparse: bool  # A is summed from the winners alone, where it is summed alone
    keeps: str  # what backward needs beside x: "winners", "sums" or "u"
    is_pair: bool  # A and G are summed together, in backward
    is_grad_ours: bool  # G of float32 is summed by an operation of ours; not a convolution's with a bias


def make_plan(
    geometry: Geometry | None,
    weight: Tensor,
    rule: HebbianRule,
    *,
    at_step: bool = False,
    sums_at: str = "forward",
    dtype: torch.dtype | None = None,
) -> Plan:
    """The plan of a layer. Made outside LayerFunction, inside which a compiler cannot read the crossovers.

    Few winners are smaller than u and mostly than the sums, and are kept for backward in their place.
    ``dtype`` is that of x, where it is not the weight's.
    """
    units, channels = weight.shape[:2]
    competition = rule.competition(units)
    kind = _dispatch.kind_of_layer(channels, geometry)
    choice = weight.device.type, kind, units, competition.winners
    # second moments of y are a dense product in any case
    can_be_sparse = rule.decay in ("oja", "none", "instar")
    is_sparse = bool(can_be_sparse and _dispatch.prefers_sparse(*choice))
    needs_grad = rule.gate == "sign"
    given = weight, geometry, competition.winners, dtype or weight.dtype
    pairs_lists = needs_grad and rule.decay in ("oja", "none") and _dispatch.pairs_winners(*given)
    if pairs_lists or (is_sparse and _dispatch.keeps_winners(*choice)):
        keeps = "winners"
    else:
        keeps = "sums" if sums_at == "forward" else "u"
    pairs_u = needs_grad and keeps == "u" and not is_sparse
    is_pair = pairs_lists or (pairs_u and _dispatch.computes_pairs(weight.device.type))
    group_units = units // (1 if geometry is None else geometry.groups)
    has_kernel = _dispatch.sums_grads(weight.device.type, kind, group_units, weight.numel())
    is_grad_ours = needs_grad and not is_pair and has_kernel
    if geometry is not None:
        # the gate then reads all in one order; where no pass adds to the sums, which a leaf keeps contiguous
        follows = needs_grad and not at_step and _dispatch.computes_pairs(weight.device.type)
        # neither _replace() nor a slice, which the compiler of torch 2.8 does not take
        kernel_size, stride, padding, dilation, groups, _ = geometry
        geometry = Geometry(
            kernel_size, stride, padding, dilation, groups, by_tap=follows and is_by_tap(weight)
        )
    return Plan(
        geometry, units, competition, rule.decay, needs_grad, at_step, is_sparse, keeps, is_pair, is_grad_ours
    )


def sums(x: Tensor, u: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """A and the moments of one pass."""
    if plan.is_sparse:
        return winner_sums(x, *winners(u, plan), plan)
    if plan.geometry is None:
        return torch.ops.ghl.linear_sums(x, u, *plan.competition, plan.decay)
    return torch.ops.ghl.conv_sums(x, u, *plan.geometry, *plan.competition, plan.decay)


def pair(x: Tensor, u: Tensor, grad_u: Tensor, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """A, the moments and G of one pass."""
    if plan.geometry is None:
        return torch.ops.ghl.linear_pair(x, u, grad_u, *plan.competition, plan.decay)
    return torch.ops.ghl.conv_pair(x, u, grad_u, *plan.geometry, *plan.competition, plan.decay)


def winner_pair(
    x: Tensor, unit: Tensor, activity: Tensor, grad_u: Tensor, plan: Plan
) -> tuple[Tensor, Tensor, Tensor]:
    """As pair, from the winners' lists."""
    assert plan.geometry is not None
    return torch.ops.ghl.conv_winner_pair(x, unit, activity, grad_u, *plan.geometry, plan.decay)


def winners(u: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """The winners' lists of one pass."""
    return torch.ops.ghl.winners(u, -1 if plan.geometry is None else 1, *plan.competition)


def winner_sums(x: Tensor, unit: Tensor, activity: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """A and the moments from the winners' lists."""
    if plan.geometry is None:
        return torch.ops.ghl.linear_winner_sums(x, unit, activity, plan.units, plan.decay)
    return torch.ops.ghl.conv_winner_sums(x, unit, activity, plan.units, *plan.geometry, plan.decay)


def linear_grad(x: Tensor, grad_u: Tensor, plan: Plan) -> Tensor:
    """G (N, D), from rows x (P, D) and dL/du (P, N)."""
    if _is_grad_ours(x, grad_u, plan):
        return torch.ops.ghl.linear_grad(x, grad_u)
    return grad_u.t().mm(x)


def _is_grad_ours(x: Tensor, grad_u: Tensor, plan: Plan) -> bool:
    """In 16 bits the library has instructions that our kernels do without."""
    return plan.is_grad_ours and x.dtype == grad_u.dtype == torch.float32


# The same strides, those of dimensions of size 1 too, from which the library takes the order of its result;
# view_as makes them anew.
_alias = torch.ops.aten.alias.default


_LOSES_HOOKS = torch.__version__ < "2.10"  # by version, not by letter


def saveable(weight: Tensor) -> Tensor:
    """The weight as functions may save it and keep its hooks.

    torch before 2.10 forgets a leaf's hooks where an autograd function reads the leaf from what a checkpoint,
    or any other saved_tensors_hooks, has saved.
    """
    return _alias(weight) if _LOSES_HOOKS and not torch.compiler.is_compiling() else weight


class _Final(torch.autograd.Function):
    """Identity on the first tensors, which raises where anything is differentiated through them.

    torch's once_differentiable does not notice what functorch differentiates, nor that a gradient which
    depends on the weights alone has a derivative.
    """

    generate_vmap_rule = True  # jacrev differentiates once, by vmap

    @staticmethod
    def forward(count: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if tensor is None else _alias(tensor) for tensor in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            "a layer that trains by a Hebbian rule has no second derivatives: its gradients are no "
            "differentiable function of anything; detach() them, or take such derivatives in eval mode"
        )


def _final(results: tuple[Tensor | None, ...], *sources: Tensor | None) -> tuple[Tensor | None, ...]:
    """The results of a backward pass, made from ``sources``; through them nothing can be differentiated."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return results
    return _Final.apply(len(results), *results, *sources)


def _saved(ctx: Any, changed: str) -> tuple[Tensor, ...]:
    """The saved tensors, once a pass: checkpointing gives each of them to one asking.

    ``changed``: what torch's message has in it where it refuses a weight that was changed meanwhile. Of an
    output of GateFunction it would say that a view was modified, and advise to do that out of place.

    Raises:
        RuntimeError: a tensor that was changed since the forward pass.
    """
    try:
        return ctx.saved_tensors
    except RuntimeError as error:
        if changed not in str(error):
            raise
        raise RuntimeError(
            "the weight was changed between forward and backward, by learn_ or an optimizer; run backward "
            "before either of them, or the forward pass again after it"
        ) from None


def apply(function: type[torch.autograd.Function], *args: Any) -> Any:
    """``function.apply(*args)``, without what only functorch needs: to bind arguments to a signature.

    In Python that takes longer than a small kernel.
    """
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    return super(torch.autograd.Function, function).apply(*args)  # type: ignore[misc]


class LayerFunction(torch.autograd.Function):
    """u = layer(x); backward returns A and the moments as the gradients of two extra inputs.

    Forward's second and third outputs are what ``Plan.keeps`` says, for setup_context alone.
    """

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, moments: Tensor, plan: Plan
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        w = weight.to(x.dtype)
        if plan.geometry is None:
            # with leading dimensions it is a view, which nothing could change in place
            u = F.linear(x, w, bias).detach()
        else:
            g = plan.geometry
            u = _CONV[len(g.kernel_size)](x, w, bias, g.stride, g.padding, g.dilation, g.groups)
        keeps = plan.keeps
        if keeps == "u":
            return u, None, None
        kept = winners(u, plan) if keeps == "winners" else sums(x, u, plan)
        return u, *kept

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        x, weight, bias, _, _, plan = inputs
        u, *kept = output
        ctx.plan = plan
        ctx.set_materialize_grads(False)  # else zeros of A's size for the outputs that are only kept
        ctx.has_bias = bias is not None
        if plan.geometry is None:
            # Bits depend on the order of products and sums, which torch takes from the strides of x: mm's
            # gradient keeps a column-major layout, and only a contiguous x is flattened before the bias is
            # added. Asked here, because a compiler does not know strides in backward.
            rows = x.reshape(-1, x.shape[-1])
            ctx.column_major = rows.stride() == (1, rows.shape[0])
            ctx.flattened = x.dim() < 3 or x.is_contiguous()
        if kept[0] is None:
            ctx.save_for_backward(x, weight, u)
        else:
            ctx.mark_non_differentiable(*kept)
            ctx.save_for_backward(x, weight, *kept)

    @staticmethod
    def backward(ctx: Any, grad_u: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_u is None:
            return (None,) * 6
        saved = _saved(ctx, "of GateFunction")
        with torch.no_grad():
            results = LayerFunction._backward(ctx, grad_u, *saved)
        return *_final(results, grad_u, *saved), None

    @staticmethod
    def _backward(ctx: Any, grad_u: Tensor, x: Tensor, weight: Tensor, *kept: Tensor) -> tuple[Any, ...]:
        plan: Plan = ctx.plan
        keeps = plan.keeps
        if plan.is_pair and keeps == "winners":
            A, moments, G = winner_pair(x, kept[0], kept[1], grad_u, plan)
        elif plan.is_pair:
            A, moments, G = pair(x, kept[0], grad_u, plan)
        elif keeps == "u":  # before the library's gradients: y and they are never held together
            A, moments = sums(x, kept[0], plan)
        grad_x, grad_weight, grad_bias = _layer_backward(ctx, grad_u, x, weight.to(x.dtype), plan)
        if plan.is_pair:
            grad_weight = G
        elif keeps == "winners":  # after them: A is not held while the library works
            A, moments = winner_sums(x, kept[0], kept[1], plan)
        elif keeps == "sums":
            # a leaf keeps its first gradient as its own; a retained graph must not see it grow
            A, moments = (t.clone() for t in kept) if plan.at_step else kept
        if not plan.needs_grad:
            # StepGate recognizes a pass by a weight.grad other than 0: what loss scaling, clipping and DDP
            # divide this mark by leaves it above that, and no norm of gradients feels it
            mark = max(1e-18, torch.finfo(weight.dtype).tiny)
            grad_weight = torch.full_like(weight, mark) if plan.at_step else None
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
            if plan.at_step:
                # makes a bad A visible to whoever looks for inf or NaN in the gradient (GradScaler)
                grad_weight = grad_weight + ((A - A).sum() + (moments - moments).sum()).to(grad_weight.dtype)
        return grad_x, grad_weight, grad_bias, A, moments


def _layer_backward(
    ctx: Any, grad_u: Tensor, x: Tensor, weight: Tensor, plan: Plan
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The torch layer's gradients, by the calls that autograd itself makes for it, and G as the plan says."""
    needs_x, _, needs_bias = ctx.needs_input_grad[:3]
    if plan.geometry is None:
        rows, inputs = grad_u.reshape(-1, weight.shape[0]), x.reshape(-1, x.shape[-1])
        grad_x = grad_bias = None
        if needs_x:
            grad_x = weight.t().mm(rows.t()).t() if ctx.column_major else rows.mm(weight)
            grad_x = grad_x.reshape(x.shape)
        grad_weight = linear_grad(inputs, rows, plan) if plan.needs_grad and not plan.is_pair else None
        if needs_bias:
            grad_bias = rows.sum(0) if ctx.flattened else grad_u.sum(tuple(range(x.dim() - 1)))
        return grad_x, grad_weight, grad_bias
    g = plan.geometry
    is_ours = _is_grad_ours(x, grad_u, plan) and not needs_bias
    # CPU libraries sum the bias gradient inside the weight pass: asking for it alone may change its bits
    on_cpu = grad_u.device.type == "cpu"
    needs_weight = (plan.needs_grad and not plan.is_pair and not is_ours) or (needs_bias and on_cpu)
    grad_x = grad_weight = grad_bias = None
    if needs_x or needs_weight or needs_bias:
        grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
            grad_u,
            x,
            weight,
            [weight.shape[0]] if ctx.has_bias else None,
            g.stride,
            g.padding,
            g.dilation,
            False,
            [0] * len(g.kernel_size),
            g.groups,
            [needs_x, needs_weight, needs_bias],
        )
    if is_ours:
        grad_weight = torch.ops.ghl.conv_grad(x, grad_u, *g)
    return grad_x, grad_weight, grad_bias


class GateFunction(torch.autograd.Function):
    """The weight, whose backward applies the rule to what its outputs received.

    It comes in ``dtype``, if that is not None, so that G need not be widened before it is gated. Besides it
    there are two storage-free tensors for LayerFunction's extra inputs. With the totals and the number of a
    probe, that probe is shown what the rule is applied to.
    """

    @staticmethod
    def forward(
        weight: Tensor,
        dtype: torch.dtype | None,
        moments_size: int,
        groups: int,
        decay: str,
        normalize: str,
        gate: str,
        totals: Tensor | None,
        probe: int | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        zero = weight.new_zeros((), dtype=sum_dtype(weight.dtype))
        given = _alias(weight) if dtype is None else weight.to(dtype)
        return given, zero.expand(weight.shape), zero.expand(moments_size)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        weight, _, _, *ctx.rule, ctx.totals, ctx.probe = inputs  # not saved: the totals are to be changed
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(weight)

    @staticmethod
    def backward(
        ctx: Any, G: Tensor | None, A: Tensor | None, moments: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if A is None or moments is None:  # no gradient arrived at the layer's output
            return (None,) * 9
        (weight,) = _saved(ctx, "modified by an inplace operation")
        with torch.no_grad():
            gated = GateFunction._backward(ctx, G, A, moments, weight)
        return *_final((gated,), G, A, moments, weight), *(None,) * 8

    @staticmethod
    def _backward(ctx: Any, G: Tensor | None, A: Tensor, moments: Tensor, weight: Tensor) -> Tensor | None:
        groups, decay, normalize, gate = ctx.rule
        if ctx.totals is not None:
            torch.ops.ghl.observe_rule_(ctx.totals, G, A, moments, weight, ctx.probe)
        if gate == "none":
            H = torch.ops.ghl.delta(A, moments, weight, groups, decay, normalize)
            return H.neg_().to(weight.dtype)
        if G is not None and G.dtype != weight.dtype:
            return torch.ops.ghl.gate(G, A, moments, weight, groups, decay, normalize)
        if G is not None and G.requires_grad:  # a view, see _final
            G = G.clone()
        # in place: LayerFunction made G for this one edge
        torch.ops.ghl.gate_(G, A, moments, weight, groups, decay, normalize)
        return G
