"""StepGate: the rule applied just before the optimizer's step, exact however the gradient came about.

A and the moments are sums over the data, as G is; the gate |H| sign(G) is linear in neither. So
under accumulation, several uses of a layer, GradScaler, clipping or DDP the gate must wait until
all sums are complete. Here the sums travel as gradients: every layer gets two hidden leaves without
storage, its autograd function returns A and the moments as their gradients, and autograd itself
accumulates them whenever, and only when, it accumulates weight.grad.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ghl_kernels.backends.eager import moments_size, sum_dtype
from ghl_kernels.nn import GHLLayer


class Attachment:
    """One layer's part in a StepGate: the leaves that receive its sums, and when those start afresh."""

    def __init__(self, name: str, layer: GHLLayer) -> None:
        self.name = name
        self.layer = layer
        self._A, self._moments = self._new_leaves()
        weight = layer.weight
        self._handles = [
            weight.register_hook(self._begin_pass),
            weight.register_post_accumulate_grad_hook(self._end_pass),
        ]
        self._pass: int | None = None
        self._gradient: tuple[weakref.ref[Tensor], int] | None = None  # weight.grad as the last pass left it
        self._weight_version: int | None = None
        self._swapped: tuple[Tensor, Tensor] | None = None  # plain and gated, while weight.grad is gated
        self._accumulated = [0, 0]  # passes that added to weight.grad and to the sums
        layer._attachment = self

    def leaves(self) -> tuple[Tensor, Tensor]:
        """Where the sums go in the next backward pass."""
        weight = self.layer.weight
        if self._A.device != weight.device or self._A.dtype != sum_dtype(weight.dtype):
            self._A, self._moments = self._new_leaves()
        elif weight.grad is None and not torch.compiler.is_compiling():
            self._drop()  # now rather than in backward: a copy of the weights less at the peak
        return self._A, self._moments

    def sums(self) -> list[Tensor] | None:
        """The accumulated [A, moments] that belong to weight.grad, or None where there is no gradient.

        Raises:
            RuntimeError: a gradient without sums, or a weight that changed since they were made.
        """
        weight = self.layer.weight
        if weight.grad is None:
            self._drop()
            return None
        if self._A.grad is None or self._moments.grad is None or self._accumulated[0] != self._accumulated[1]:
            raise RuntimeError(
                f"weight.grad of {self.name!r} has no Hebbian sums: all or part of it was not made by a "
                "backward pass through this layer in training mode, and the optimizer must not step on it"
            )
        if self._weight_version != weight._version:
            raise RuntimeError(
                f"the weight of {self.name!r} was changed between backward and the optimizer's step; "
                "its sums belong to the old weight. Zero the gradients after changing a weight"
            )
        return [self._A.grad, self._moments.grad]

    def empty_sums(self) -> list[Tensor]:
        """Zeros of the shapes of the sums: this process's share when it had no gradient."""
        return [
            torch.zeros_like(leaf, memory_format=torch.contiguous_format) for leaf in (self._A, self._moments)
        ]

    def rule_arguments(self, A: Tensor, moments: Tensor) -> tuple[Any, ...]:
        """What ghl::delta takes."""
        layer, rule = self.layer, self.layer.rule
        return A, moments, layer.weight.detach(), layer.filter_groups, rule.decay, rule.normalize

    def swap(self, gated: Tensor) -> None:
        """Let weight.grad be the gated gradient, until :meth:`restore`."""
        plain = self.layer.weight.grad
        assert plain is not None
        self._swapped, self.layer.weight.grad = (plain, gated), gated

    def restore(self) -> None:
        """Put the plain gradient back, so that accumulation without zeroing goes on from it."""
        if self._swapped is None:
            return
        (plain, gated), self._swapped = self._swapped, None
        weight = self.layer.weight
        if weight.grad is gated:  # else it was zeroed or replaced after a step that raised
            weight.grad = plain
            self.follow_weight()

    def follow_weight(self) -> None:
        """Take the weight as it is now: the step itself has changed it."""
        self._weight_version = self.layer.weight._version

    def detach(self) -> None:
        """Undo the attachment."""
        self.restore()
        for handle in self._handles + self._leaf_handles:
            handle.remove()
        del self.layer._attachment

    def _new_leaves(self) -> tuple[Tensor, Tensor]:
        layer = self.layer
        zero = torch.zeros(1, dtype=sum_dtype(layer.weight.dtype), device=layer.weight.device)
        size = moments_size(layer.units, layer.filter_groups, layer.rule.decay)
        # Parameters, because a compiler takes their shapes as constants; unregistered and without storage
        A, moments = nn.Parameter(zero.expand(layer.weight.shape)), nn.Parameter(zero.expand(size))
        self._leaf_handles = [leaf.register_hook(self._begin_pass) for leaf in (A, moments)]
        self._leaf_handles.append(A.register_post_accumulate_grad_hook(self._count_sums))
        return A, moments

    def _drop(self) -> None:
        self._A.grad = self._moments.grad = None
        self._accumulated = [0, 0]

    def _count_sums(self, _: Tensor) -> None:
        self._accumulated[1] += 1

    @torch.no_grad()
    def _begin_pass(self, _: Tensor) -> None:
        """Before a backward pass adds to weight.grad or the sums: start afresh where weight.grad does."""
        current = torch._C._current_graph_task_id()
        if current == self._pass:
            return
        self._pass = current
        weight = self.layer.weight
        if self._swapped is not None:  # the optimizer raised in its step
            plain, gated = self._swapped
            self._swapped = torch.where((gated != 0).any(), plain, 0.0), gated
            self.restore()
        grad = weight.grad
        if grad is None:
            self._drop()
            self._weight_version = weight._version
        elif self._A.grad is not None:
            # zeroed in place, or not: told apart without a synchronization
            dead = (grad == 0).all()
            for leaf in (self._A, self._moments):
                if leaf.grad is not None:
                    leaf.grad.masked_fill_(dead, 0.0)
            if not self._is_as_left(grad):
                self._weight_version = weight._version
                self._accumulated = [0, 0]

    def _end_pass(self, weight: Tensor) -> None:
        assert weight.grad is not None
        self._gradient = (weakref.ref(weight.grad), weight.grad._version)
        self._accumulated[0] += 1

    def _is_as_left(self, grad: Tensor) -> bool:
        return (
            self._gradient is not None and self._gradient[0]() is grad and self._gradient[1] == grad._version
        )


class Attachments:
    """The layers with gate_at="step" that one optimizer serves, and their sums over all processes."""

    def __init__(self, optimizer: Optimizer, model: nn.Module, process_group: Any) -> None:
        layers = _layers_held(optimizer, model)
        self._group = _process_group(model, process_group)
        self._members = [Attachment(name, layer) for name, layer in layers]

    def __iter__(self) -> Iterator[Attachment]:
        return iter(self._members)

    def sums(self) -> list[tuple[Attachment, list[Tensor]]]:
        """[A, moments] of every layer that has a gradient; all layers are checked before any is returned."""
        total = self._reduced([member.sums() for member in self._members])
        return [(a, sums) for a, sums in zip(self._members, total, strict=True) if sums is not None]

    def detach(self) -> None:
        """Let go of the layers, which can then be attached again."""
        for member in self._members:
            member.detach()
        self._members = []

    def _reduced(self, local: list[list[Tensor] | None]) -> list[list[Tensor] | None]:
        """The sums over all processes, by one flat all-reduce per dtype; copies, so local sums stay local."""
        if self._group is None:
            return local
        filled = [s or a.empty_sums() for s, a in zip(local, self._members, strict=True)]
        reduced: list[list[Tensor] | None] = [None] * len(local)
        for dtype in sorted({sums[0].dtype for sums in filled}, key=str):
            members = [i for i, sums in enumerate(filled) if sums[0].dtype == dtype]
            flat = torch.cat([t.flatten() for i in members for t in filled[i]])
            torch.distributed.all_reduce(flat, group=self._group)
            parts = iter(flat.split([t.numel() for i in members for t in filled[i]]))
            for i in members:
                total = [next(parts).view(t.shape) for t in filled[i]]
                reduced[i] = None if local[i] is None else total
        return reduced


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
        process_group: over which the sums are added up; needed with several processes without DDP.

    Raises:
        TypeError: not an optimizer or a module.
        ValueError: LBFGS, an optimizer that holds none of the layers' weights, layers that another
            StepGate holds, or several processes without a process group.

    At the step, RuntimeError for a weight.grad without sums, or a weight that was changed between
    backward and step: an optimizer never steps on a plain gradient unnoticed.
    """

    def __init__(self, optimizer: Optimizer, model: nn.Module, process_group: Any = None) -> None:
        self._attachments = Attachments(optimizer, model, process_group)
        self._optimizer = optimizer
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def remove(self) -> None:
        """Detach from the optimizer and the layers, which can then be attached again."""
        for hook in self._hooks:
            hook.remove()
        self._attachments.detach()
        self._hooks = []

    def __repr__(self) -> str:
        names = ", ".join(attachment.name for attachment in self._attachments)
        return f"StepGate({type(self._optimizer).__name__}, layers: {names or 'none'})"

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("a StepGate belongs to one optimizer and model and cannot be copied; make a new one")

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        closure = kwargs.get("closure") if "closure" in kwargs else (args[1] if len(args) > 1 else None)
        if closure is None:
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

    def _after_step(self, *_: Any) -> None:
        self._restore()

    def _restore(self) -> None:
        for attachment in self._attachments:
            attachment.restore()

    @torch.no_grad()
    def _gate(self) -> None:
        self._restore()
        scale = getattr(self._optimizer, "grad_scale", None)
        for attachment, gated in _gated(self._attachments.sums()):
            attachment.swap(gated if scale is None else gated.mul_(scale))  # fused optimizers divide by it


def _gated(active: list[tuple[Attachment, list[Tensor]]]) -> Iterator[tuple[Attachment, Tensor]]:
    """The gated gradient of every layer: all those with a gate by one operation."""
    batch = []
    for attachment, (A, moments) in active:
        plain, arguments = attachment.layer.weight.grad, attachment.rule_arguments(A, moments)
        assert plain is not None
        if attachment.layer.rule.gate == "none":
            yield attachment, torch.ops.ghl.delta(*arguments).neg_().to(plain.dtype)
        else:
            batch.append((attachment, plain.clone(), *arguments))
    if batch:
        attachments, gated, *rest = zip(*batch, strict=True)
        torch.ops.ghl.gate_all_(gated, *rest)
        yield from zip(attachments, gated, strict=True)


def _layers_held(optimizer: Optimizer, model: nn.Module) -> list[tuple[str, GHLLayer]]:
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError(
            "StepGate cannot serve LBFGS: its line search needs the gradient of a function, "
            "which a gated gradient is not"
        )
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    layers = [
        (name, layer)
        for name, layer in _step_layers(model)
        if id(layer.weight) in held and layer.weight.requires_grad  # a frozen layer is its torch layer
    ]
    if not layers:
        count = len(list(_step_layers(model)))
        raise ValueError(
            f"the optimizer holds no trainable weight of the model's {count} layers with gate_at='step'"
        )
    for name, layer in layers:
        if layer._attachment is not None:
            raise ValueError(f"{name!r} is attached to a StepGate already; call its remove() first")
    return layers


def _step_layers(model: nn.Module) -> Iterator[tuple[str, GHLLayer]]:
    for name, module in model.named_modules():
        if isinstance(module, GHLLayer) and module.gate_at == "step":
            yield name, module


def _process_group(model: nn.Module, given: Any) -> Any:
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return given
    if given is not None:
        return given
    for module in model.modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            return module.process_group
    if distributed.get_world_size() > 1:
        raise ValueError(
            f"{distributed.get_world_size()} processes and no DistributedDataParallel model: "
            "give the process_group over which gradients are reduced"
        )
    return None
