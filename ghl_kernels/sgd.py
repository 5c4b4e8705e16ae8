"""GHLSGD: StepGate and torch.optim.SGD in one; with the CUDA kernels, each weight read and written once."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.sgd import SGD, sgd

from ghl_kernels import _check
from ghl_kernels._attachment import Attachment
from ghl_kernels._processes import is_sharded
from ghl_kernels.step_gate import Attachments


class GHLSGD(SGD):
    """SGD that applies the rule of a model's GHL layers in its step, as StepGate does for any optimizer.

        model = ghl.convert(model, gate_at="step")
        optimizer = ghl.GHLSGD(model, lr=0.1, momentum=0.9, weight_decay=5e-4)

    A step equals that of torch.optim.SGD under a :class:`StepGate` up to rounding. The ``cuda`` backend
    applies gate, weight decay, momentum and update to all layers of a parameter group in one pass over their
    tensors; the others gate first, and then take torch's step. weight.grad is the plain gradient at all
    times; what StepGate says of accumulation, GradScaler, clipping, closures and DDP holds here. All other
    parameters are torch.optim.SGD's.

    Args:
        model: the model, or its DistributedDataParallel wrapper, whose process group is then used.
        lr, momentum, dampening, weight_decay, nesterov, maximize: as for torch.optim.SGD, but numbers; a
            CUDA graph keeps the values that it was captured with.
        params: what to optimize, parameters or groups of them; default: all parameters of the model.
        process_group: over which the sums are added up; needed with several processes without DDP.

    State dicts are interchangeable with those of torch.optim.SGD.

    Raises:
        TypeError: ``model`` is not a module, or an option not a number.
        ValueError: a value that torch.optim.SGD refuses, an option that is a tensor, sharded weights, no
            trainable weight of a layer with ``gate_at="step"``, layers that a StepGate or another GHLSGD
            holds or that share their weights, several processes without a process group, or layers that DDP
            reduces over different ones.

    At the step, RuntimeError as for StepGate.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        params: Iterable[Any] | None = None,
        process_group: Any = None,
    ) -> None:
        _check.module(model)
        given = {"lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay}
        _check_numbers(given)  # of another type torch does not say which one it is
        super().__init__(
            model.parameters() if params is None else params,
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            maximize=maximize,
        )
        for group in self.param_groups:
            _options(group)
            if any(is_sharded(p) for p in group["params"]):
                raise ValueError("GHLSGD takes no sharded weights; use torch.optim.SGD with a StepGate")
        self._attachments: Attachments | None = Attachments(self, model, process_group)

    def remove(self) -> None:
        """Let go of the layers, which can then be attached again; this optimizer steps no more.

        A weight.grad that waits for the rule, or that a step has left, becomes None.
        """
        if self._attachments is not None:
            self._attachments.detach()
        self._attachments = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient.

        Args:
            closure: evaluates the model, runs backward and returns the loss, which is returned.

        Raises:
            RuntimeError: a weight.grad without sums, a weight that was changed between backward and step,
                or an optimizer whose layers were removed. Nothing has been updated then.
            TypeError: a gradient of another dtype than its weight (``weight.grad_dtype``), or an option of a
                group that is no number. As above.
            ValueError: an option of a group that is a tensor.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._attachments is None:
            raise RuntimeError("this GHLSGD has let go of its layers (remove() was called); make a new one")
        options = [_options(group) for group in self.param_groups]
        sums = {id(a.layer.weight): (a, A, moments) for a, (A, moments) in self._attachments.sums()}
        for attachment, *_ in sums.values():
            _check_dtype(attachment)
        for group, values in zip(self.param_groups, options, strict=True):
            params = [p for p in group["params"] if p.grad is not None]
            self._step_plain([p for p in params if id(p) not in sums], group, values)
            self._step_layers([sums[id(p)] for p in params if id(p) in sums], values)
        return loss

    def _step_plain(self, params: list[Tensor], group: dict[str, Any], options: dict[str, Any]) -> None:
        buffers = self._momentum_buffers(params, options)
        grads = [p.grad for p in params if p.grad is not None]
        has_sparse = any(grad.is_sparse for grad in grads)
        sgd(
            params,
            grads,
            buffers,
            has_sparse_grad=has_sparse,
            foreach=group["foreach"],
            fused=group["fused"],
            **options,
        )
        self._keep(params, buffers, options)

    def _step_layers(self, layers: list[tuple[Attachment, Tensor, Tensor]], options: dict[str, Any]) -> None:
        if not layers:
            return
        weights = [attachment.layer.weight for attachment, _, _ in layers]
        known = self._momentum_buffers(weights, options)
        buffers = []
        if options["momentum"]:
            buffers = [torch.empty_like(w) if b is None else b for w, b in zip(weights, known, strict=True)]
        rules = [attachment.layer.rule for attachment, _, _ in layers]
        torch.ops.ghl.gated_sgd_(
            [weight.detach() for weight in weights],
            buffers,
            [weight.grad for weight in weights],
            [A for _, A, _ in layers],
            [moments for _, _, moments in layers],
            [buffer is None for buffer in known],
            [attachment.layer.filter_groups for attachment, _, _ in layers],
            [rule.decay for rule in rules],
            [rule.normalize for rule in rules],
            [rule.gate for rule in rules],
            **options,
        )
        self._keep(weights, buffers, options)
        for attachment, _, _ in layers:
            attachment.follow_weight()

    def _momentum_buffers(self, params: list[Tensor], options: dict[str, Any]) -> list[Tensor | None]:
        """Those of torch.optim.SGD; None for a parameter that has none yet, or needs none."""
        return [self.state[p].get("momentum_buffer") if options["momentum"] else None for p in params]

    def _keep(self, params: list[Tensor], buffers: Sequence[Tensor | None], options: dict[str, Any]) -> None:
        if options["momentum"]:
            for p, buffer in zip(params, buffers, strict=True):
                self.state[p]["momentum_buffer"] = buffer

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            "a GHLSGD belongs to one model and cannot be copied; make a new one and load the state_dict"
        )


def _check_dtype(attachment: Attachment) -> None:
    weight = attachment.layer.weight
    if weight.grad is not None and weight.grad.dtype != weight.dtype:
        raise TypeError(
            f"GHLSGD takes gradients of the weight's dtype, which is {weight.dtype} for {attachment.name!r}, "
            f"got {weight.grad.dtype}; use torch.optim.SGD with a StepGate"
        )


def _check_numbers(group: Mapping[str, Any]) -> None:
    """ValueError where an option is a tensor, TypeError where it is no number at all."""
    for name in ("lr", "momentum", "dampening", "weight_decay"):
        value = group[name]
        if isinstance(value, Tensor):
            raise ValueError(f"{name} must be a number for GHLSGD, got a tensor; use {name}.item()")
        if not isinstance(value, numbers.Real):
            raise TypeError(f"{name} must be a number, got {value!r}")


def _options(group: dict[str, Any]) -> dict[str, Any]:
    """The options of a group as numbers, by the names that torch gives them."""
    _check_numbers(group)
    names = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")
    return {name: group[name] for name in names}
