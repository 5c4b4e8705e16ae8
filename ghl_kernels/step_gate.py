"""StepGate: the rule applied just before the optimizer's step, exact however the gradient came about.

A and the moments are sums over the data, as G is; the gate |H| sign(G) is linear in neither. So
under accumulation, several uses of a layer, GradScaler, clipping or DDP the gate must wait until
all sums are complete. Until then they are accumulated as gradients are (_attachment.py).
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator, Mapping, Sequence
from types import FunctionType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ghl_kernels import _check
from ghl_kernels._attachment import Attachment, attached_to, laid_out_as, untraced
from ghl_kernels._processes import Processes, is_sharded
from ghl_kernels.nn import GHLLayer, named_layers

# torch wraps the step of every class of optimizers in a function of this code, which calls the hooks
_AROUND_STEP = cast(FunctionType, Optimizer.profile_hook_step(Optimizer.step)).__code__


class Attachments:
    """The layers with gate_at="step" that one optimizer serves, and their sums over all processes."""

    def __init__(self, optimizer: Optimizer, model: nn.Module, process_group: Any) -> None:
        layers = _layers_held(optimizer, model)
        _check.process_group(process_group)
        if process_group is None:
            process_group = _group_of_wrappers(model, layers)
        self._wrappers = [m for m in model.modules() if isinstance(m, nn.parallel.DistributedDataParallel)]
        self._processes = Processes(model, [layer.weight for _, layer in layers], process_group)
        self._members: list[Attachment]
        if self._processes.is_sharded:
            self._members = _sharded().attach(model, layers, optimizer, self._processes)
            return
        self._members = [Attachment(name, layer, optimizer) for name, layer in layers]
        if self._processes.groups:
            for member in self._members:
                member.share(self._members)

    def __iter__(self) -> Iterator[Attachment]:
        return iter(self._members)

    @untraced
    def sums(self) -> list[tuple[Attachment, list[Tensor]]]:
        """[A, moments] of every layer that has a gradient; all layers are checked before any is returned."""
        self._refuse_lossy_reduction()
        total = self._processes.sums(self._members)
        active = [(a, sums) for a, sums in zip(self._members, total, strict=True) if sums is not None]
        for attachment, sums in active:
            attachment.observe(*sums)
        return active

    def gated(self) -> Iterator[tuple[Attachment, Tensor]]:
        """What the gradient of every layer that has one becomes."""
        if self._processes.is_sharded:
            return _sharded().gated(self.sums(), self._processes)
        return _gated(self.sums())

    def _refuse_lossy_reduction(self) -> None:
        hooks = [hook for wrapper in self._wrappers for hook, _ in wrapper._comm_hooks]
        if not any(getattr(hook, "__name__", "").startswith("fp16_compress") for hook in hooks):
            return
        for member in self._members:
            if member.layer.rule.gate == "none":
                raise RuntimeError(
                    f"weight.grad of {member.name!r}, whose rule has no gate, is a mark that float16 rounds "
                    "to 0, and a communication hook of DistributedDataParallel reduces it in float16; use "
                    "bf16_compress_hook or none"
                )

    def detach(self) -> None:
        """Let go of the layers, which can be attached again, and drop the gradients that wait for a rule."""
        for member in self._members:
            member.detach()
            member.drop_gradient()
        self._members = []


class StepGate:
    """Turns accumulated gradients and Hebbian sums into gated gradients just before the optimizer's step.

        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        gate = ghl.StepGate(optimizer, model)  # once; then train as ever

    It acts on the layers with ``gate_at="step"`` whose weights the optimizer holds. weight.grad is the
    plain gradient G outside the step and the gated one |H| sign(G) (rule without gate: -H) inside it.
    Accumulation over passes, layers used twice, GradScaler, clipping, closures and DDP give the rule
    on all the data since the gradient was last zeroed.

    Args:
        optimizer: any torch optimizer but LBFGS, whose line search asks for gradients of one function.
        model: the model, or its DistributedDataParallel wrapper, whose process group is then used.
        process_group: over which the sums are added up; needed with several processes without DDP. Weights
            that ``fully_shard`` has spread over processes bring theirs.

    Raises:
        TypeError: not an optimizer, a module or a process group.
        ValueError: LBFGS, an optimizer that holds none of the layers' weights, layers that another
            StepGate holds or that share their weights; several processes without a process group, or layers
            that DDP reduces over different ones; weights sharded other than by rows, or sharded with a decay
            that mixes rows (subspace, sanger); layers in a FullyShardedDataParallel.

    At the step, RuntimeError for a weight.grad without sums, or a weight that was changed between
    backward and step: an optimizer never steps on a plain gradient unnoticed.
    """

    def __init__(self, optimizer: Optimizer, model: nn.Module, process_group: Any = None) -> None:
        self._attachments = Attachments(optimizer, model, process_group)
        self._optimizer = optimizer
        self._rescaled: _Rescaled | None = None
        self._gated: list[Attachment] = []  # in a step
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def remove(self) -> None:
        """Detach from the optimizer and the layers, which can then be attached again.

        A weight.grad that waits for the rule, or that a step has left, becomes None: no optimizer is to step
        on a plain gradient.
        """
        for hook in self._hooks:
            hook.remove()
        self._attachments.detach()
        self._hooks = []

    def __repr__(self) -> str:
        names = ", ".join(attachment.name for attachment in self._attachments)
        return f"StepGate({type(self._optimizer).__name__}, layers: {names or 'none'})"

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("a StepGate belongs to one optimizer and model and cannot be copied; make a new one")

    @untraced
    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        closure = kwargs.get("closure") if "closure" in kwargs else (args[1] if len(args) > 1 else None)
        if closure is None:
            # gated already: a subclass of an optimizer in its step calls super().step(), which has hooks too.
            # Not all of them: an earlier step raised, and passes have looked at some
            if not self._gated or not all(attachment.is_gated() for attachment in self._gated):
                self._gate()
            return None

        def gated_closure() -> Any:
            self._restore()
            with torch.enable_grad():
                loss = closure()
            self._gate()
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": gated_closure}
        return (args[0], gated_closure, *args[2:]), kwargs

    @untraced
    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        if _steps_under_way(optimizer) < 2:  # else a super().step() has ended, and the subclass goes on
            self._restore()

    def _restore(self) -> None:
        self._gated = []
        for attachment in self._attachments:
            attachment.restore()
        if self._rescaled is not None:
            self._rescaled.restore()
        self._rescaled = None

    @torch.no_grad()
    def _gate(self) -> None:
        self._restore()
        all_gated = list(self._attachments.gated())
        self._scale(all_gated)
        for attachment, gated in all_gated:
            attachment.swap(gated)
        self._gated = [attachment for attachment, _ in all_gated]

    def _scale(self, all_gated: list[tuple[Attachment, Tensor]]) -> None:
        """What GradScaler leaves to a fused optimizer to divide by."""
        scale = getattr(self._optimizer, "grad_scale", None)
        if scale is None:
            return
        if any(gated.dtype == torch.float16 and gated.numel() for _, gated in all_gated):
            self._rescaled = _Rescaled(self._optimizer, all_gated)
            scale = self._rescaled.scale
        for _, gated in all_gated:  # it lies on one of the model's devices
            gated.mul_(scale.to(gated.device))


class _Rescaled:
    """A smaller scale of a fused optimizer, so that float16 holds gated gradients times it.

    GradScaler finds a scale that suits G. The size of a gated gradient is another, and one scale is for all:
    the other gradients are scaled down with it, until :meth:`restore`.
    """

    def __init__(self, optimizer: Any, all_gated: list[tuple[Attachment, Tensor]]) -> None:
        self._optimizer, self._given = optimizer, optimizer.grad_scale
        self._others: list[tuple[Tensor, Tensor, Tensor]] = []
        halves = [g for _, g in all_gated if g.dtype == torch.float16 and g.numel()]
        largest = torch.stack([g.abs().amax().to(self._given) for g in halves]).amax()
        fits = (torch.finfo(torch.float16).max / largest).log2().floor().exp2()  # powers of two round nothing
        self.scale = torch.where(fits < self._given, fits, self._given)
        gated = {id(attachment.weight) for attachment, _ in all_gated}
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None and id(p) not in gated:
                    plain, p.grad = p.grad, p.grad * (self.scale / self._given).to(p.grad.device)
                    self._others.append((p, plain, p.grad))
        optimizer.grad_scale = self.scale

    def restore(self) -> None:
        """The plain gradients and the scale are those of before."""
        for p, plain, scaled in self._others:
            if p.grad is scaled:
                p.grad = plain
        if getattr(self._optimizer, "grad_scale", None) is self.scale:
            self._optimizer.grad_scale = self._given


def _steps_under_way(optimizer: Optimizer) -> int:
    """How many steps of the optimizer the caller is in, one calling the other.

    The stack is asked, because of a step that raised no hook tells.
    """
    count, frame = 0, sys._getframe().f_back
    while frame is not None:
        count += frame.f_code is _AROUND_STEP and frame.f_locals.get("self") is optimizer
        frame = frame.f_back
    return count


def _gated(active: list[tuple[Attachment, list[Tensor]]]) -> Iterator[tuple[Attachment, Tensor]]:
    """The gated gradient of every layer: all those with a gate by one operation."""
    batch = []
    for attachment, (A, moments) in active:
        plain, arguments = attachment.layer.weight.grad, attachment.rule_arguments(A, moments)
        assert plain is not None
        if attachment.layer.rule.gate == "none":
            yield attachment, laid_out_as(plain, torch.ops.ghl.delta(*arguments).neg_())
        else:
            batch.append((attachment, plain.clone(), *arguments))
    if batch:
        attachments, gated, *rest = zip(*batch, strict=True)
        torch.ops.ghl.gate_all_(gated, *rest)
        yield from zip(attachments, gated, strict=True)


def _layers_held(optimizer: Optimizer, model: nn.Module) -> list[tuple[str, GHLLayer]]:
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    _check.module(model)
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError(
            "StepGate cannot serve LBFGS: its line search needs the gradient of a function, "
            "which a gated gradient is not"
        )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    present = named_layers(model)
    served = {name: layer for name, layer in present.items() if layer.gate_at == "step"}
    _check_flattened(model, served)
    layers = [
        (name, layer)
        for name, layer in served.items()
        if id(layer.weight) in held and layer.weight.requires_grad  # a frozen layer is its torch layer
    ]
    if not layers:
        raise ValueError(_nothing_to_serve(len(served), len(present)))
    _check_shared(model, layers)
    for name, layer in layers:
        _check_attached(repr(_check.label(name)), layer)
    return layers


def _check_attached(shown: str, layer: GHLLayer) -> None:
    """ValueError if a StepGate or GHLSGD holds the layer or its weight, unless its optimizer is gone."""
    for attachment in (layer._attachment, attached_to(layer.weight)):
        if attachment is None:
            continue
        if attachment.owner() is not None:
            gc.collect()  # an optimizer that nobody holds is often part of a cycle
        if (owner := attachment.owner()) is not None:
            holder = "GHLSGD" if isinstance(owner, _ghlsgd()) else "StepGate"
            raise ValueError(f"{shown} is attached to a {holder} already; call its remove() first")
        if attachment.layer._attachment is attachment:
            attachment.detach()


def _check_flattened(model: nn.Module, layers: Mapping[str, GHLLayer]) -> None:
    """ValueError for a layer whose weight an FSDP from before fully_shard has made part of a flat tensor."""
    # by name: to import it takes a while
    wrappers = [m for m in model.modules() if type(m).__name__ == "FullyShardedDataParallel"]
    inside = {module for wrapper in wrappers for module in wrapper.modules()}
    for name, layer in layers.items():
        is_whole = isinstance(layer.weight, nn.Parameter) and not hasattr(layer.weight, "_fsdp_flattened")
        if layer in inside and layer.weight.requires_grad and not is_whole:
            raise ValueError(
                f"{_check.label(name)!r} is in a FullyShardedDataParallel, which flattens weights; shard the "
                "model with torch.distributed.fsdp.fully_shard instead"
            )


def _check_shared(model: nn.Module, layers: Sequence[tuple[str, GHLLayer]]) -> None:
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            owners.setdefault(id(parameter), []).append(f"{name}.{key}".lstrip("."))
    for name, layer in layers:
        sharing = owners.get(id(layer.weight), [])
        if len(sharing) > 1:
            raise ValueError(
                f"the weight of {_check.label(name)!r} is shared ({', '.join(sharing)}): its gradient is of "
                "all of them, and the rule's sums are one layer's; untie the weights"
            )


def _group_of_wrappers(model: nn.Module, layers: Sequence[tuple[str, GHLLayer]]) -> Any:
    """The group over which DDP reduces all these layers' gradients; None where it has no part in them.

    Raises:
        ValueError: it reduces those of some layers and not of others, or over different groups.
    """
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return None
    group_of = {
        id(parameter): wrapper.process_group
        for wrapper in model.modules()
        if isinstance(wrapper, nn.parallel.DistributedDataParallel)
        for parameter in wrapper.parameters()
    }
    groups = [group_of.get(id(layer.weight)) for _, layer in layers if not is_sharded(layer.weight)]
    if group_of and groups and (groups[0] is None or any(group is not groups[0] for group in groups)):
        raise ValueError(
            "DistributedDataParallel does not reduce the gradients of all layers with gate_at='step' over "
            "one process group; make an optimizer and a StepGate for each part of the model, and give the "
            "process_group of a part that has no wrapper"
        )
    return groups[0] if groups else None


def _nothing_to_serve(served: int, present: int) -> str:
    if served:
        count = _check.counted(served, "layer")
        return f"the optimizer holds no trainable weight of the model's {count} with gate_at='step'"
    if present:
        return (
            f"the model has no layer with gate_at='step' but {_check.counted(present, 'GHL layer')} with "
            "gate_at='backward'; pass gate_at='step' to convert, after revert(model) where it is converted"
        )
    return "the model has no GHL layer; pass it to convert with gate_at='step' first"


def _ghlsgd() -> type[Optimizer]:
    from ghl_kernels.sgd import GHLSGD  # which imports this module

    return GHLSGD


def _sharded() -> Any:
    # torch.distributed.tensor takes a while to import: only for those who shard
    from ghl_kernels import _sharded

    return _sharded
