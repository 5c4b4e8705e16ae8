"""Which gradient a layer's Hebbian sums belong to, while autograd accumulates both.

The sums travel as gradients: every layer of a StepGate gets two hidden leaves without storage, its autograd
function returns A and the moments as their gradients, and autograd itself accumulates them whenever, and only
when, it accumulates weight.grad.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ghl_kernels import _check
from ghl_kernels.backends.eager import moments_size, sum_dtype
from ghl_kernels.nn import GHLLayer

# For what looks at versions, identities and weak references, which a compiler would take for constants;
# torch.compiler.disable loads the compiler at once, and this when a function is first called.
untraced = _disable_dynamo


class _Seen(NamedTuple):
    """A tensor at one moment: whether it is the same and unchanged can be asked later, on the host."""

    tensor: Callable[[], Tensor | None]
    version: int

    @classmethod
    def now(cls, tensor: Tensor) -> _Seen:
        return cls(weakref.ref(tensor), tensor._version)

    @classmethod
    def nothing(cls) -> _Seen:
        return cls(lambda: None, 0)

    def still_is(self, tensor: Tensor | None) -> bool:
        return tensor is not None and self.tensor() is tensor and self.version == tensor._version


class _Swap(NamedTuple):
    """The plain gradient and the gated one that is weight.grad in its place, as it was then."""

    plain: Tensor
    gated: Tensor
    version: int


# by the id of the weight, which its attachment keeps alive
_attached: dict[int, weakref.ref[Attachment]] = {}


def _register(attachment: Attachment) -> None:
    key = id(attachment.weight)

    def forget(reference: weakref.ref[Attachment]) -> None:
        if _attached.get(key) is reference:  # the weight may have a new attachment by now
            del _attached[key]

    _attached[key] = weakref.ref(attachment, forget)


def attached_to(weight: Tensor) -> Attachment | None:
    """The attachment whose weight this is."""
    reference = _attached.get(id(weight))
    return None if reference is None else reference()


def _held_by(optimizer: Optimizer) -> Iterator[Attachment]:
    if not _attached:
        return
    # no other tensors: a backward pass in another thread changes their gradients while they are looked at
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if attachment := attached_to(parameter):
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

    @untraced
    def hook(tensor: Tensor) -> None:
        bound = reference()
        if bound is not None:
            bound(tensor)

    return hook


class Attachment:
    """One layer's part in a StepGate: the leaves that receive its sums, and which gradient those belong to.

    Sums count while weight.grad is the gradient of the very passes that made them, and nobody tells when it
    is zeroed or changed. So it is looked at before a pass, and compared with what the last pass or step left:

        ================================  ==========================================  ==================
        weight.grad                       what happened                               its sums
        ================================  ==========================================  ==================
        None                              zeroed                                      are dropped
        as it was left                    nothing; data.zero_() if it became 0        stay; become 0
        changed, and 0                    zeroed in place                             become 0
        changed, and not 0                clipped, unscaled, reduced                  stay
        another tensor since the step     zeroed, and set by someone else             are dropped
        changed since the step, several   zeroed, and reduced in a pass that did      are dropped
          processes                         not use the layer here
        not None, and without sums        likewise; of one process, no pass of ours   none: a doubt
        ================================  ==========================================  ==================

    Whether it is 0 is asked and answered on the device, which nothing waits for. What makes sums wrong (a
    pass without any, a weight that changed) becomes a doubt when it can no longer be counted, and goes with
    the sums. At the step weight.grad is looked at once more, and the doubt is asked. A gradient of 0 is
    never refused: its sums are 0, whatever they were.
    """

    def __init__(self, name: str, layer: GHLLayer, optimizer: Optimizer) -> None:
        self.name = _check.label(name)
        self.layer = layer
        self._owner = weakref.ref(optimizer)
        self._decay = layer.rule.decay  # which the leaves are made for
        self._A, self._moments = self._new_leaves()
        self.weight = weight = layer.weight  # the parameter that the optimizer holds
        self._handles = [
            weight.register_hook(self._begin_gradient),
            weight.register_post_accumulate_grad_hook(_weakly(self._end_gradient)),
        ]
        self._implementation = weight._cdata
        self._peers: Sequence[Attachment] = (self,)  # who looks when a pass of this one begins
        self._is_shared = False  # weight.grad gets other processes' gradients, too
        self._pass: int | None = None
        self._seen: _Seen | None = None  # weight.grad as the last look or pass left it
        self._was_alive: Tensor | None = None  # whether that was other than 0, where it may be asked
        self._was_look = False  # it was a look, and no pass has followed
        self._fresh_starts = 0  # passes in a row that found no weight.grad
        self._stepped: _Seen | None = None  # weight.grad as the last step left it, until the next pass
        self._weight_state: tuple[int, int] | None = None  # of the passes
        self._swapped: _Swap | None = None  # in a step
        self._is_arriving = [False, False]  # a gradient, which may be undefined, at the weight and at A
        self._accumulated = [0, 0]  # passes that added to weight.grad and to the sums, since it was changed
        self._has_marks = False  # some pass's rule had no gate, and left a mark in place of G
        self._doubt: Tensor | bool = False  # parts of weight.grad may have no sums, or another weight's
        self._is_idle = False  # no pass of this process has a part in weight.grad
        self._watched: Tensor | None = None  # the weight before the step of an optimizer that is not ours
        layer._attachment = self
        _register(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        # for layers that are copied past their own __getstate__, as those with a parametrization are
        return None

    def leaves(self) -> tuple[Tensor, Tensor]:
        """Where the sums go in the next backward pass.

        Raises:
            RuntimeError: the layer's weight is another tensor than the one that was attached, or its rule has
                another decay.
        """
        self._check_decay()
        weight = self.layer.weight
        if not self._is_attached(weight):  # its gradient would be plain, wherever it goes
            raise RuntimeError(
                f"the weight of {self.name!r} is not the parameter that its StepGate is attached to: "
                "functional_call with other weights needs gate_at='backward'; a layer whose parameter was "
                "replaced (load_state_dict with assign=True) needs a new optimizer and StepGate"
            )
        if self._A.device != weight.device or self._A.dtype != sum_dtype(weight.dtype):
            self._convert_leaves()
        # not asked by a compiler, which would compile anew for either answer
        if not torch.compiler.is_compiling():
            self._follow_implementation()
            if self.weight.grad is None:
                self._drop()  # now rather than in backward: a copy of the weights less at the peak
        return self._A, self._moments

    def sums(self, *, shared: bool = False) -> list[Tensor] | None:
        """The accumulated [A, moments] that belong to weight.grad, or None where there is no gradient.

        Zeros where the gradient is 0, or ``shared`` and all of it came from other processes.

        Raises:
            RuntimeError: a gradient without sums, or a weight or decay that changed since they were made.
        """
        self._check_decay()
        weight, grad = self.weight, self.weight.grad
        if grad is None:
            self._drop()
            return None
        if not self._is_registered():
            raise RuntimeError(
                f"the weight of {self.name!r} was replaced (load_state_dict with assign=True) after its "
                "backward pass; make a new optimizer and StepGate for the new parameter"
            )
        self._is_idle = shared and self._has_no_part(grad)
        wrong = None if self._is_idle else self._refusal(grad)
        if wrong is not None and self._is_alive(grad):  # waits for the device, where there is a reason to ask
            raise RuntimeError(wrong)
        if self._is_idle or wrong is not None:
            self._drop()
            return self.empty_sums()
        self._doubt = False
        dtype = sum_dtype(weight.dtype)  # the model may have been converted since its backward pass
        sums = [t.to(weight.device, dtype) for t in (self._A.grad, self._moments.grad) if t is not None]
        self._clear_if_zeroed(grad, sums)
        return sums

    def empty_sums(self) -> list[Tensor]:
        """Zeros of the shapes of the sums: this process's share when it had no part in the gradient."""
        weight = self.weight
        zero = torch.zeros((), dtype=sum_dtype(weight.dtype), device=weight.device)
        return [zero.new_zeros(leaf.shape) for leaf in (self._A, self._moments)]

    def share(self, peers: Sequence[Attachment]) -> None:
        """weight.grad is reduced over processes, also after passes in which this one does not use the layer.

        A pass of any of ``peers`` is a reason to look, before such a gradient arrives.
        """
        self._peers, self._is_shared = peers, True

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

    @untraced
    def watch_step_of(self, optimizer: Optimizer) -> None:
        """Before a step of an optimizer that holds the weight: keep it, as ``data`` may be changed unseen."""
        self._watched, grad = None, self.weight.grad
        if grad is None or optimizer is self._owner() or self._swapped is not None:
            return
        # after a step of ours it may have been zeroed, which only the device knows
        if self._is_pending() or (self._is_left(grad) and self._local(grad).any()):
            self._watched = self._local(self.weight).clone()

    @untraced
    def forbid_step_of(self, optimizer: Optimizer) -> None:
        """After a step of an optimizer that holds the weight: RuntimeError if it took the plain gradient."""
        before, self._watched = self._watched, None
        if optimizer is self._owner() or self._swapped is not None:
            return
        # by its version where the gradient came in the step, from a closure
        is_changed = self._is_pending() and self._weight_state != self._state_of_weight()
        if is_changed or (before is not None and not torch.equal(before, self._local(self.weight))):
            raise RuntimeError(
                f"the weight of {self.name!r} was stepped on its plain gradient by an optimizer that its "
                "StepGate does not serve; call the gate's remove() and make one for the optimizer that steps"
            )

    def is_gated(self) -> bool:
        """Whether weight.grad is the gated gradient."""
        return self._swapped is not None and self.weight.grad is self._swapped.gated

    def swap(self, gated: Tensor) -> None:
        """Let weight.grad be the gated gradient, until :meth:`restore`."""
        plain = self.weight.grad
        assert plain is not None
        self._swapped = _Swap(plain, gated, self._local(gated)._version)
        self.weight.grad = gated

    @torch.no_grad()
    def restore(self, *, looks: bool = False) -> None:
        """Put the plain gradient back, so that accumulation without zeroing goes on from it.

        Zeroed, if the gated one was meanwhile; a version need not tell of that where one ``looks``.
        """
        if self._swapped is None:
            return
        (plain, gated, version), self._swapped = self._swapped, None
        weight = self.weight
        if weight.grad is not gated:  # it was zeroed or replaced
            return
        weight.grad = plain
        local = self._local(gated)
        if looks or local._version != version:
            self._local(plain).masked_fill_(~local.any(), 0.0)
            torch.autograd.graph.increment_version(plain)
        self.follow_weight()

    @contextlib.contextmanager
    def converting(self) -> Iterator[None]:
        """While tensors of the layer are converted: torch may swap them, if nobody refers to them weakly."""
        grad, is_same = self.weight.grad, self._weight_state == self._state_of_weight()
        seen, stepped = self._seen, self._stepped
        self._seen, self._stepped = (None if s is None else _Seen.nothing() for s in (seen, stepped))
        was = [s is not None and s.still_is(grad) for s in (seen, stepped)]
        del grad, seen, stepped
        try:
            yield
        finally:
            grad = self.weight.grad
            if grad is not None and was[0]:
                self._seen = _Seen.now(grad)
            if grad is not None and was[1]:
                self._stepped = _Seen.now(grad)
            self._follow_implementation()
            if is_same:
                self._weight_state = self._state_of_weight()

    @untraced
    def follow_weight(self) -> None:
        """Take the weight as it is now: the step itself has changed it."""
        self._weight_state = self._state_of_weight()
        if self.weight.grad is not None:
            self._stepped = _Seen.now(self.weight.grad)

    def drop_gradient(self) -> None:
        """Let no other optimizer step on a plain gradient."""
        grad = self.weight.grad
        if grad is not None and (self._is_pending() or self._is_left(grad)):
            self.weight.grad = None

    def detach(self) -> None:
        """Undo the attachment."""
        if self.is_gated():  # a step that raised has left it
            self.weight.grad = None
        self.restore()
        for handle in self._handles + self._leaf_handles:
            handle.remove()
        _attached.pop(id(self.weight), None)
        del self.layer._attachment

    def owner(self) -> Optimizer | None:
        """The optimizer; None where it is gone, and with it whoever could have undone the attachment."""
        return self._owner()

    def _new_leaves(self) -> tuple[Tensor, Tensor]:
        layer = self.layer
        dtype, device = sum_dtype(layer.weight.dtype), layer.weight.device
        size = moments_size(layer.units, layer.filter_groups, layer.rule.decay)
        # Parameters, because a compiler takes their shapes as constants; unregistered, of one element each,
        # which control flow operators refuse to find shared
        A, moments = (
            nn.Parameter(torch.zeros(1, dtype=dtype, device=device).expand(shape))
            for shape in (layer.weight.shape, (size,))
        )
        self._leaf_handles = [
            A.register_hook(self._begin_sums),
            moments.register_hook(self._begin),
            A.register_post_accumulate_grad_hook(_weakly(self._end_sums)),
        ]
        return A, moments

    def _convert_leaves(self) -> None:
        """New leaves for a weight of another dtype or on another device; the sums so far come along."""
        sums = self._A.grad, self._moments.grad
        for handle in self._leaf_handles:  # a pass that is under way would add to the old ones
            handle.remove()
        self._A, self._moments = self._new_leaves()
        for leaf, kept in zip((self._A, self._moments), sums, strict=True):
            leaf.grad = None if kept is None else kept.to(leaf)

    def _check_decay(self) -> None:
        decay = self.layer.rule.decay
        if decay != self._decay:
            raise RuntimeError(
                f"the decay of {self.name!r} was {self._decay!r} when its StepGate or GHLSGD was made and is "
                f"{decay!r} now, by an assignment to layer.rule; set_rule says what may change"
            )

    def _state_of_weight(self) -> tuple[int, int]:
        """Another one after the weight was changed."""
        return self.weight._cdata, self.weight._version

    def _follow_implementation(self) -> None:
        """Where torch has swapped what is behind the weight, its hooks are behind another tensor."""
        weight = self.weight
        if self._implementation != weight._cdata:
            self._implementation = weight._cdata
            weight._backward_hooks = weight._backward_hooks
            weight._post_accumulate_grad_hooks = weight._post_accumulate_grad_hooks

    def _is_attached(self, weight: Tensor) -> bool:
        """Whether what the layer computes with in a forward pass is this attachment's weight."""
        return weight is self.weight

    def _is_registered(self) -> bool:
        """Whether the layer's parameter still is this attachment's weight."""
        return self.layer.weight is self.weight

    def _has_no_part(self, grad: Tensor) -> bool:
        """Whether no pass of this process has added to weight.grad since it was zeroed: DDP brought it."""
        if self._stepped is not None:
            return not self._stepped.still_is(grad)
        return self._A.grad is None and not any(self._accumulated) and self._doubt is False

    def _is_pending(self) -> bool:
        """Whether weight.grad is the plain gradient of passes that no step has used."""
        has_passes = self._A.grad is not None or any(self._accumulated)
        return self.weight.grad is not None and self._stepped is None and has_passes

    def _is_left(self, grad: Tensor) -> bool:
        """Whether weight.grad is the tensor that the last step left, plain, whatever has changed it since."""
        return self._stepped is not None and self._stepped.tensor() is grad

    def _refusal(self, grad: Tensor) -> str | None:
        """Why an optimizer must not step on weight.grad unless it is 0; None where it may."""
        name = repr(self.name)
        has_sums = self._A.grad is not None and self._moments.grad is not None
        if not has_sums or self._misses_sums() or self._is_replaced(grad):
            return (
                f"weight.grad of {name} has no Hebbian sums: all or part of it was not made by a backward "
                "pass through this layer in training mode, and the optimizer must not step on it"
            )
        if self._weight_state != self._state_of_weight():
            return (
                f"the weight of {name} was changed between backward and the optimizer's step; its sums "
                "belong to the old weight. Zero the gradients after changing a weight"
            )
        if self._lacks_gradient():
            return (
                f"weight.grad of {name} is no gradient: its rule had gate='none' in some of the passes and "
                "has gate='sign' now. Zero the gradients after such a set_rule"
            )
        if not self._is_untouched(grad):
            self._doubt = self._doubt | self._had_nothing()
        if self._doubt is not False and self._doubt:
            return (
                f"part of weight.grad of {name} has no Hebbian sums, or those of an earlier weight: a "
                "gradient of no pass in training mode, or a change of the weight, came before or between "
                "the accumulated passes. Zero the gradients after either"
            )
        return None

    def _local(self, tensor: Tensor) -> Tensor:
        """What this process holds of the weight or its gradient."""
        return tensor.detach()

    def _misses_sums(self) -> bool:
        """Between passes: whether some have added to weight.grad alone, or to the sums alone."""
        return self._accumulated[0] != self._accumulated[1]

    def _lacks_gradient(self) -> bool:
        """Whether the rule asks for signs that some pass did not compute."""
        return self._has_marks and self.layer.rule.gate == "sign"

    def _had_nothing(self) -> Tensor | bool:
        """Whether weight.grad was 0 at a look that no pass has followed: nobody knows what made it more."""
        was_alive = self._was_alive
        return ~was_alive if self._was_look and not self._is_shared and was_alive is not None else False

    def _is_replaced(self, grad: Tensor) -> bool:
        """Whether weight.grad is another tensor than at the last step, with no pass since."""
        return self._stepped is not None and self._stepped.tensor() is not grad

    def _is_alive(self, grad: Tensor) -> Tensor:
        """Whether weight.grad is other than 0, in some process if its rows are spread."""
        return self._local(grad).any()

    def _drop(self) -> None:
        self._A.grad = self._moments.grad = None
        self._doubt = self._has_marks = False
        self._stepped = None
        self._count_afresh()

    def _count_afresh(self) -> None:
        self._accumulated = [0, 0]
        self._weight_state = self._state_of_weight()

    @untraced
    def _begin_gradient(self, gradient: Tensor | None) -> None:
        self._is_arriving[0] = gradient is not None
        self._begin(gradient)

    @untraced
    def _begin_sums(self, gradient: Tensor | None) -> None:
        self._is_arriving[1] = gradient is not None
        self._begin(gradient)

    @untraced
    def _begin(self, gradient: Tensor | None) -> None:
        if gradient is not None:  # an undefined one adds nothing, and its hooks are called all the same
            self._begin_pass()

    @torch.no_grad()
    def _begin_pass(self) -> None:
        """Before a backward pass adds to weight.grad or the sums."""
        current = torch._C._current_graph_task_id()
        if current == self._pass:
            return
        for peer in self._peers:
            # not one whose sums a pass around this one has added, and whose gradient it has not yet
            if peer is self or (peer._pass != current and not peer._misses_sums()):
                peer._pass = current
                peer._look()

    def _look(self) -> None:
        """See what has become of weight.grad, and let the sums follow."""
        weight = self.weight
        self.restore(looks=True)  # the optimizer may have raised in its step
        grad = weight.grad
        self._fresh_starts = self._fresh_starts + 1 if grad is None else 0
        if grad is None:
            self._drop()
            return
        if self._is_replaced(grad) or (self._is_shared and self._has_no_part(grad)):
            self._drop()
        if self._A.grad is not None:
            self._go_on_from(grad)
        elif self._misses_sums() or not self._is_shared:
            self._count_afresh()
            self._doubt = self._is_alive(grad)
        self._seen = _Seen.now(grad)

    def _go_on_from(self, grad: Tensor) -> None:
        """Forget the sums if weight.grad was zeroed in place; told on the device, which nothing waits for."""
        zeroed = self._zeroed(grad)
        is_changed = not self._is_untouched(grad)
        has_moved = self._weight_state != self._state_of_weight()
        if is_changed:
            # after a step the sums are of an earlier weight in any case
            is_wrong = self._misses_sums() or (has_moved and self._stepped is None) or self._lacks_gradient()
            self._doubt = self._doubt | (is_wrong or self._had_nothing())
        elif has_moved and self._was_look and self._was_alive is not None:
            self._doubt = self._doubt | self._was_alive
            self._weight_state = self._state_of_weight()
        if self._doubt is not False and zeroed is not None:
            self._doubt = self._doubt & ~zeroed
        self._forget(zeroed)
        if is_changed:
            self._count_afresh()
            self._has_marks &= self.layer.rule.gate == "none"  # else the doubt has them
            self._was_alive, self._was_look = None if zeroed is None else ~zeroed, True

    def _forget(self, zeroed: Tensor | None) -> None:
        _zero_where(zeroed, [leaf.grad for leaf in (self._A, self._moments) if leaf.grad is not None])

    def _clear_if_zeroed(self, grad: Tensor, sums: list[Tensor]) -> None:
        """At the step: sums that a zeroed gradient leaves may be NaN, which the sign of 0 does not make 0."""
        _zero_where(self._zeroed(grad), sums)

    def _is_untouched(self, grad: Tensor) -> bool:
        """Whether weight.grad is as it was seen last, for all that its version says."""
        return self._seen is not None and self._seen.still_is(grad)

    def _zeroed(self, grad: Tensor) -> Tensor | None:
        """Whether weight.grad is 0 now and was not left so; None where it is not asked."""
        if not self._is_untouched(grad):
            return ~self._local(grad).any()
        # only grad.data.zero_() gets here with a gradient that was zeroed
        return None if self._was_alive is None else ~self._local(grad).any() & self._was_alive

    def _end_gradient(self, weight: Tensor) -> None:
        grad = weight.grad
        if grad is not None and self._is_arriving[0]:  # a hook before this one may have taken it
            self._accumulated[0] += 1
            self._end_pass(grad)

    def _end_sums(self, leaf: Tensor) -> None:
        if leaf.grad is not None and self._is_arriving[1]:
            self._accumulated[1] += 1
            self._stepped = None

    def _end_pass(self, grad: Tensor) -> None:
        self._stepped = None
        self._seen = _Seen.now(grad)
        # a reading of the gradient, spared where it is None again before every pass
        self._was_alive = self._local(grad).any() if self._fresh_starts < 2 else None
        self._was_look = False
        self._has_marks |= self.layer.rule.gate == "none"


def laid_out_as(plain: Tensor, gated: Tensor) -> Tensor:
    """``gated`` in the dtype and order of elements of the gradient that it is to stand for.

    torch's fused optimizers on a CPU take the elements as they lie.
    """
    if gated.dtype == plain.dtype and gated.stride() == plain.stride():
        return gated
    return torch.empty_like(plain).copy_(gated)


def _zero_where(zeroed: Tensor | None, sums: list[Tensor]) -> None:
    if zeroed is not None:
        for t in sums:
            t.masked_fill_(zeroed, 0.0)
