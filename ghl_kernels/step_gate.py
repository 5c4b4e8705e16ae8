"""StepGate: the rule applied just before the optimizer's step, exact however the gradient came about.

A and the moments are sums over the data, as G is; the gate |H| sign(G) is linear in neither. So
under accumulation, several uses of a layer, GradScaler, clipping or DDP the gate must wait until
all sums are complete. Here the sums travel as gradients: every layer gets two hidden leaves without
storage, its autograd function returns A and the moments as their gradients, and autograd itself
accumulates them whenever, and only when, it accumulates weight.grad.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ghl_kernels._processes import Processes
from ghl_kernels.backends.eager import moments_size, sum_dtype
from ghl_kernels.nn import GHLLayer


class _Seen(NamedTuple):
    """A tensor at one moment: whether it is the same and unchanged can be asked later, on the host."""

    tensor: weakref.ref[Tensor]
    version: int

    @classmethod
    def now(cls, tensor: Tensor) -> _Seen:
        return cls(weakref.ref(tensor), tensor._version)

    def still_is(self, tensor: Tensor) -> bool:
        return self.tensor() is tensor and self.version == tensor._version


# by the id of the weight, which its attachment keeps alive
_attached: dict[int, weakref.ref[Attachment]] = {}


def _register(attachment: Attachment) -> None:
    key = id(attachment.weight)

    def forget(reference: weakref.ref[Attachment]) -> None:
        if _attached.get(key) is reference:  # the weight may have a new attachment by now
            del _attached[key]

    _attached[key] = weakref.ref(attachment, forget)


def _held_by(optimizer: Optimizer) -> Iterator[Attachment]:
    if not _attached:
        return
    # no other tensors: a backward pass in another thread changes their gradients while they are looked at
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            reference = _attached.get(id(parameter))
            attachment = None if reference is None else reference()
            if attachment is not None:
                yield attachment


def _watch_foreign_step(optimizer: Optimizer, *_: Any) -> None:
    for attachment in _held_by(optimizer):
        attachment.watch_step_of(optimizer)


def _forbid_foreign_step(optimizer: Optimizer, *_: Any) -> None:
    for attachment in _held_by(optimizer):
        attachment.forbid_step_of(optimizer)


# on all optimizers: the one that no StepGate serves, and that would step on plain gradients, has no other
register_optimizer_step_pre_hook(_watch_foreign_step)
register_optimizer_step_post_hook(_forbid_foreign_step)


def _weakly(method: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
    """A hook that does not keep the method's object: torch holds it where no garbage collector looks."""
    reference = weakref.WeakMethod(method)

    def hook(tensor: Tensor) -> None:
        bound = reference()
        if bound is not None:
            bound(tensor)

    return hook


class Attachment:
    """One layer's part in a StepGate: the leaves that receive its sums, and when those start afresh."""

    def __init__(self, name: str, layer: GHLLayer, optimizer: Optimizer) -> None:
        self.name = name
        self.layer = layer
        self._owner = weakref.ref(optimizer)
        self._A, self._moments = self._new_leaves()
        self.weight = weight = layer.weight  # the parameter that the optimizer holds
        self._handles = [
            weight.register_hook(self._begin_pass),
            weight.register_post_accumulate_grad_hook(_weakly(self._end_pass)),
        ]
        self._pass: int | None = None
        self._gradient: _Seen | None = None  # weight.grad as the last pass left it
        self._was_alive: Tensor | None = None  # whether that was other than 0, where it may be asked
        self._fresh_starts = 0  # passes in a row that found no weight.grad
        self._stepped: _Seen | None = None  # weight.grad as the last step left it, until the next pass
        self._weight_version: int | None = None
        self._swapped: tuple[Tensor, Tensor] | None = None  # plain and gated, while weight.grad is gated
        self._accumulated = [0, 0]  # passes that added to weight.grad and to the sums
        self._doubt: Tensor | bool = False  # parts of weight.grad may have no sums, or another weight's
        self._is_idle = False  # no pass of this process has a part in weight.grad
        self._watched: Tensor | None = None  # the weight before the step of an optimizer that is not ours
        layer._attachment = self
        _register(self)

    def leaves(self) -> tuple[Tensor, Tensor]:
        """Where the sums go in the next backward pass.

        Raises:
            RuntimeError: the layer's weight is another tensor than the one that was attached.
        """
        weight = self.layer.weight
        if not self._is_attached(weight):  # its gradient would be plain, wherever it goes
            raise RuntimeError(
                f"the weight of {self.name!r} is not the parameter that its StepGate is attached to: "
                "functional_call with other weights needs gate_at='backward'; a layer whose parameter was "
                "replaced (load_state_dict with assign=True) needs a new optimizer and StepGate"
            )
        if self._A.device != weight.device or self._A.dtype != sum_dtype(weight.dtype):
            self._A, self._moments = self._new_leaves()
        elif self.weight.grad is None and not torch.compiler.is_compiling():
            self._drop()  # now rather than in backward: a copy of the weights less at the peak
        return self._A, self._moments

    def sums(self, *, shared: bool = False) -> list[Tensor] | None:
        """The accumulated [A, moments] that belong to weight.grad, or None where there is no gradient.

        Zeros where the gradient is ``shared`` and all of it came from other processes.

        Raises:
            RuntimeError: a gradient without sums, or a weight that changed since they were made.
        """
        weight = self.weight
        if weight.grad is None:
            self._drop()
            return None
        self._is_idle = shared and self._has_no_part(weight.grad)
        if self._is_idle:
            self._drop()
            return self.empty_sums()
        differs = self._accumulated[0] != self._accumulated[1] or self._is_replaced()
        if self._A.grad is None or self._moments.grad is None or differs:
            raise RuntimeError(
                f"weight.grad of {self.name!r} has no Hebbian sums: all or part of it was not made by a "
                "backward pass through this layer in training mode, and the optimizer must not step on it"
            )
        if self._weight_version != weight._version:
            raise RuntimeError(
                f"the weight of {self.name!r} was changed between backward and the optimizer's step; "
                "its sums belong to the old weight. Zero the gradients after changing a weight"
            )
        if self._doubt is not False and self._doubt:  # waits for the device, where there is a reason to ask
            raise RuntimeError(
                f"part of weight.grad of {self.name!r} has no Hebbian sums, or those of an earlier weight: a "
                "pass that was not in training mode, or a change of the weight, came between the accumulated "
                "passes. Zero the gradients after either"
            )
        self._doubt = False
        return [self._A.grad, self._moments.grad]

    def empty_sums(self) -> list[Tensor]:
        """Zeros of the shapes of the sums: this process's share when it had no part in the gradient."""
        return [
            torch.zeros_like(leaf, memory_format=torch.contiguous_format) for leaf in (self._A, self._moments)
        ]

    def check_shared(self, total: list[Tensor]) -> None:
        """RuntimeError if weight.grad came from other processes, and they have no sums for it either."""
        grad = self.weight.grad
        if grad is not None and self._is_idle and total[1][-1] == 0 and grad.any():
            raise RuntimeError(
                f"weight.grad of {self.name!r} has no Hebbian sums in any process: no backward pass through "
                "this layer in training mode has made it, and the optimizer must not step on it"
            )

    def rule_arguments(self, A: Tensor, moments: Tensor) -> tuple[Any, ...]:
        """What ghl::delta takes."""
        layer, rule = self.layer, self.layer.rule
        return A, moments, layer.weight.detach(), layer.filter_groups, rule.decay, rule.normalize

    def observe(self, A: Tensor, moments: Tensor) -> None:
        """Show the layer's probe, if there is one, what the rule is about to be applied to."""
        layer, probe = self.layer, self.layer._probe
        if probe is not None:
            G = layer.weight.grad if layer.rule.gate == "sign" else None
            # GradScaler leaves it to fused optimizers to skip a step, on the device
            is_skipped = getattr(self._owner(), "found_inf", None)
            probe.observe_rule(G, A, moments, layer.weight.detach(), is_skipped)

    def watch_step_of(self, optimizer: Optimizer) -> None:
        """Before a step of an optimizer that holds the weight: keep it, as ``data`` may be changed unseen."""
        is_own = optimizer is self._owner() or self._swapped is not None
        self._watched = None if is_own or not self._is_pending() else self._local(self.weight).clone()

    def forbid_step_of(self, optimizer: Optimizer) -> None:
        """After a step of an optimizer that holds the weight: RuntimeError if it took the plain gradient."""
        before, self._watched = self._watched, None
        if optimizer is self._owner() or self._swapped is not None or not self._is_pending():
            return
        is_changed = self._weight_version != self.weight._version
        if is_changed or (before is not None and not torch.equal(before, self._local(self.weight))):
            raise RuntimeError(
                f"the weight of {self.name!r} was stepped on its plain gradient by an optimizer that its "
                "StepGate does not serve; call the gate's remove() and make one for the optimizer that steps"
            )

    def is_gated(self) -> bool:
        """Whether weight.grad is the gated gradient."""
        return self._swapped is not None and self.weight.grad is self._swapped[1]

    def swap(self, gated: Tensor) -> None:
        """Let weight.grad be the gated gradient, until :meth:`restore`."""
        plain = self.weight.grad
        assert plain is not None
        self._swapped, self.weight.grad = (plain, gated), gated

    def restore(self) -> None:
        """Put the plain gradient back, so that accumulation without zeroing goes on from it."""
        if self._swapped is None:
            return
        (plain, gated), self._swapped = self._swapped, None
        weight = self.weight
        if weight.grad is gated:  # else it was zeroed or replaced after a step that raised
            weight.grad = plain
            self.follow_weight()

    def follow_weight(self) -> None:
        """Take the weight as it is now: the step itself has changed it."""
        self._weight_version = self.weight._version
        if self.weight.grad is not None:
            self._stepped = _Seen.now(self.weight.grad)

    def detach(self) -> None:
        """Undo the attachment."""
        self.restore()
        for handle in self._handles + self._leaf_handles:
            handle.remove()
        _attached.pop(id(self.weight), None)
        del self.layer._attachment

    def _new_leaves(self) -> tuple[Tensor, Tensor]:
        layer = self.layer
        zero = torch.zeros(1, dtype=sum_dtype(layer.weight.dtype), device=layer.weight.device)
        size = moments_size(layer.units, layer.filter_groups, layer.rule.decay)
        # Parameters, because a compiler takes their shapes as constants; unregistered and without storage
        A, moments = nn.Parameter(zero.expand(layer.weight.shape)), nn.Parameter(zero.expand(size))
        self._leaf_handles = [leaf.register_hook(self._begin_pass) for leaf in (A, moments)]
        self._leaf_handles.append(A.register_post_accumulate_grad_hook(_weakly(self._count_sums)))
        return A, moments

    def _is_attached(self, weight: Tensor) -> bool:
        """Whether what the layer computes with in a forward pass is this attachment's weight."""
        return weight is self.weight

    def _has_no_part(self, grad: Tensor) -> bool:
        """Whether no pass of this process has added to weight.grad since it was zeroed: DDP brought it."""
        stale = self._stepped is not None and not self._stepped.still_is(grad)
        return stale or not any(self._accumulated)

    def _is_pending(self) -> bool:
        """Whether weight.grad is the plain gradient of passes that no step has used."""
        return self.weight.grad is not None and self._stepped is None and any(self._accumulated)

    def _local(self, tensor: Tensor) -> Tensor:
        """What this process holds of the weight or its gradient."""
        return tensor.detach()

    def _misses_sums(self) -> bool:
        """Between passes: whether some have added to weight.grad alone, or to the sums alone."""
        return self._accumulated[0] != self._accumulated[1]

    def _is_replaced(self) -> bool:
        """Whether weight.grad is another tensor than at the last step, with no pass since."""
        return self._stepped is not None and self._stepped.tensor() is not self.weight.grad

    def _drop(self) -> None:
        self._A.grad = self._moments.grad = None
        self._accumulated = [0, 0]
        self._doubt = False
        self._stepped = None
        self._weight_version = self.weight._version

    def _count_sums(self, _: Tensor) -> None:
        self._accumulated[1] += 1

    @torch.no_grad()
    def _begin_pass(self, _: Tensor) -> None:
        """Before a backward pass adds to weight.grad or the sums: start afresh where weight.grad does."""
        current = torch._C._current_graph_task_id()
        if current == self._pass:
            return
        self._pass = current
        weight = self.weight
        if self._swapped is not None:  # the optimizer raised in its step
            plain, gated = self._swapped
            self._swapped = torch.where((gated != 0).any(), plain, 0.0), gated
            self.restore()
        grad = weight.grad
        self._fresh_starts = self._fresh_starts + 1 if grad is None else 0
        # one that was replaced since the step was zeroed, and DDP has brought other processes' gradient
        if grad is None or self._A.grad is None or self._is_replaced():
            self._drop()
        else:
            self._go_on_from(grad)
        self._stepped = None

    def _go_on_from(self, grad: Tensor) -> None:
        """Forget the sums if weight.grad was zeroed in place; told on the device, which nothing waits for."""
        zeroed = self._zeroed(grad)
        if zeroed is not None:
            for leaf in (self._A, self._moments):
                if leaf.grad is not None:
                    leaf.grad.masked_fill_(zeroed, 0.0)
        is_changed = not self._is_untouched(grad)
        # after a step the sums are of an earlier weight in any case
        is_stale = self._stepped is None and self._weight_version != self.weight._version
        is_wrong = is_changed and (self._misses_sums() or is_stale)
        if is_wrong or self._doubt is not False:
            self._doubt = (is_wrong or self._doubt) & (True if zeroed is None else ~zeroed)
        if is_changed:
            self._weight_version = self.weight._version
            self._accumulated = [0, 0]

    def _is_untouched(self, grad: Tensor) -> bool:
        """Whether weight.grad is as the last pass left it, for all that its version says."""
        return self._gradient is not None and self._gradient.still_is(grad)

    def _zeroed(self, grad: Tensor) -> Tensor | None:
        """Whether weight.grad is 0 now and the last pass did not leave it so; None where it is not asked."""
        if not self._is_untouched(grad):
            return ~self._local(grad).any()
        # only grad.data.zero_() gets here with a gradient that was zeroed
        return None if self._was_alive is None else ~self._local(grad).any() & self._was_alive

    def _end_pass(self, weight: Tensor) -> None:
        grad = weight.grad
        assert grad is not None
        self._gradient = _Seen.now(grad)
        # a reading of the gradient, spared where it is None again before every pass
        self._was_alive = self._local(grad).any() if self._fresh_starts < 2 else None
        self._accumulated[0] += 1


class Attachments:
    """The layers with gate_at="step" that one optimizer serves, and their sums over all processes."""

    def __init__(self, optimizer: Optimizer, model: nn.Module, process_group: Any) -> None:
        layers = _layers_held(optimizer, model)
        self._processes = Processes(model, [layer.weight for _, layer in layers], process_group)
        self._members: list[Attachment]
        if self._processes.is_sharded:
            self._members = _sharded().attach(layers, optimizer, self._processes)
        else:
            self._members = [Attachment(name, layer, optimizer) for name, layer in layers]

    def __iter__(self) -> Iterator[Attachment]:
        return iter(self._members)

    def sums(self) -> list[tuple[Attachment, list[Tensor]]]:
        """[A, moments] of every layer that has a gradient; all layers are checked before any is returned."""
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

    def detach(self) -> None:
        """Let go of the layers, which can then be attached again."""
        for member in self._members:
            member.detach()
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
        TypeError: not an optimizer or a module.
        ValueError: LBFGS, an optimizer that holds none of the layers' weights, layers that another
            StepGate holds, or several processes without a process group; weights sharded other than by
            rows, or sharded with a decay that mixes rows (subspace, sanger).

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
            # gated already: a subclass of an optimizer in its step calls super().step(), which has hooks too
            if not any(attachment.is_gated() for attachment in self._attachments):
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
        for attachment, gated in self._attachments.gated():
            if scale is not None:  # fused optimizers divide by it; it lies on one of the model's devices
                gated.mul_(scale.to(gated.device))
            attachment.swap(gated)


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


def _sharded() -> Any:
    # torch.distributed.tensor takes a while to import: only for those who shard
    from ghl_kernels import _sharded

    return _sharded
