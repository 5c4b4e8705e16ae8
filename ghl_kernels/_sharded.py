"""StepGate for weights whose rows are spread over processes by ``torch.distributed.fsdp.fully_shard``.

In a pass the layer computes with the gathered weight, so every process sums A and the moments of its
share of the batch for all rows. At the step they are summed over the processes, and each applies the
rule to its own rows; the largest |H| of a layer, where that is its scale, is the largest of all
processes. This is exact where a row's decay needs that row alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.optim import Optimizer

from ghl_kernels import _check
from ghl_kernels._attachment import Attachment, laid_out_as, untraced
from ghl_kernels._processes import Processes, is_sharded
from ghl_kernels.backends.eager import EPS, sum_dtype
from ghl_kernels.nn import GHLLayer


class ShardedAttachment(Attachment):
    """One layer's part in a StepGate where its weight is sharded by rows.

    A pass leaves its gradient beside the gathered weight, where it is counted. There it waits until FSDP
    reduces it, at the end of that pass or, without gradient sync, of a later one, and adds it to weight.grad.
    """

    weight: DTensor

    def __init__(
        self, name: str, layer: GHLLayer, optimizer: Optimizer, processes: Processes, record: Any
    ) -> None:
        self._processes = processes
        self._record = record
        self._gathered: Tensor | None = None  # the weight of the passes, once its gradients are counted
        self._is_counted = False  # since FSDP reduced
        self._is_waiting = False
        self._has_arrived = False  # weight.grad is more than what waits
        self._undefined_in: int | None = None  # the backward pass that has brought the weight no gradient
        super().__init__(name, layer, optimizer)

    def leaves(self) -> tuple[Tensor, Tensor]:
        """As for a whole weight."""
        leaves, weight = super().leaves(), self.layer.weight
        if weight is not self._gathered and not torch.compiler.is_compiling():
            self._gathered = weight
            self._handles[2:] = [weight.register_hook(self._count_gradient)]
        return leaves

    def delta(self, A: Tensor, moments: Tensor) -> Tensor:
        """H of this process's rows; where it is normalized over the layer, before that."""
        rule, W = self.layer.rule, self.weight.to_local().detach()
        if rule.decay == "instar":
            moments = torch.cat([self._rows(moments[:-1]), moments[-1:]])
        sums = [t.to(sum_dtype(W.dtype)) for t in (self._rows(A), moments)]
        normalize = "none" if rule.normalize == "layer" else rule.normalize
        # per row, groups make no difference
        return cast(Tensor, torch.ops.ghl.delta(*sums, W, 1, rule.decay, normalize))

    def gated(self, H: Tensor) -> Tensor:
        """What these rows of weight.grad become."""
        G = cast(DTensor, self.weight.grad).to_local()
        if self.layer.rule.gate == "none":
            return laid_out_as(G, H.neg())
        return laid_out_as(G, (H.abs() * G.sign()).to(G.dtype) + (G - G))

    def observe(self, A: Tensor, moments: Tensor) -> None:
        """RuntimeError if there is a probe: what it sees in a pass and at the step are not one weight."""
        if self.layer._probe is not None:
            raise RuntimeError(f"a Monitor cannot watch {self.name!r}, whose weight is sharded; remove it")

    def swap(self, gated: Tensor) -> None:
        """As for a whole weight, from this process's rows."""
        weight = self.weight
        super().swap(
            DTensor.from_local(
                gated,
                weight.device_mesh,
                weight.placements,
                run_check=False,
                shape=weight.shape,
                stride=weight.stride(),
            )
        )

    def _rows(self, total: Tensor) -> Tensor:
        mesh, placements = self.weight.device_mesh, self.weight.placements
        whole = DTensor.from_local(total, mesh, [Replicate()] * mesh.ndim, run_check=False)
        return whole.redistribute(placements=placements).to_local()

    def _is_attached(self, weight: Tensor) -> bool:
        if is_sharded(weight) or weight.shape != self.weight.shape:
            return False
        record = self._record
        if record is None or torch.compiler.is_compiling():
            return True
        return record.sharded_param is self.weight and getattr(record, "_unsharded_param", None) is weight

    def _is_registered(self) -> bool:
        weight = self.layer.weight
        return weight is self.weight or not is_sharded(weight)  # it may be gathered still

    def _drop(self) -> None:
        if not self._is_waiting:
            self._has_arrived = False
            super()._drop()
        elif self._has_arrived:
            raise RuntimeError(
                f"the gradient of {self.name!r} was zeroed after a pass without gradient sync, which FSDP "
                "has yet to add to it; run the pass that reduces it first"
            )

    def _local(self, tensor: Tensor) -> Tensor:
        return cast(DTensor, tensor).to_local().detach()

    def _refusal(self, grad: Tensor) -> str | None:
        if self._is_waiting:
            return (
                f"FSDP has yet to reduce the gradient of a pass through {self.name!r} without gradient sync; "
                "step after the pass that reduces it"
            )
        return super()._refusal(grad)

    def _begin_pass(self) -> None:
        super()._begin_pass()
        self._is_waiting = True

    @untraced
    def _count_gradient(self, gradient: Tensor | None) -> None:
        if gradient is not None:
            self._begin_pass()
            self._accumulated[0] += 1
            self._is_counted = True

    @untraced
    def _begin_gradient(self, gradient: Tensor | None) -> None:
        super()._begin_gradient(gradient)
        if gradient is None:
            self._undefined_in = torch._C._current_graph_task_id()

    def _end_gradient(self, weight: Tensor) -> None:
        if self._undefined_in == torch._C._current_graph_task_id():
            # autograd's own call, for the undefined gradient that a compiled graph leaves; FSDP's follows
            self._undefined_in = None
            return
        if not self._is_counted:  # in a compiled layer, or before the first pass in training mode
            passes, with_sums = self._accumulated
            self._accumulated[0] = with_sums if self._is_waiting else passes + 1
        self._is_counted = self._is_waiting = False
        self._has_arrived = True
        self._fresh_starts = 0  # zeroing in place need not count a version of a DTensor
        if weight.grad is not None:
            self._end_pass(weight.grad)

    def _is_alive(self, grad: Tensor) -> Tensor:
        return self._processes.maximum(self._local(grad).any().float()) != 0

    def signs_of_life(self) -> tuple[Tensor, Tensor]:
        """Whether this process's rows of weight.grad are other than 0, and whether they were left so."""
        grad = cast(Tensor, self.weight.grad)
        is_alive = self._local(grad).any()
        was_alive = self._was_alive if self._is_untouched(grad) else None
        return is_alive, torch.ones_like(is_alive) if was_alive is None else was_alive

    def _zeroed(self, grad: Tensor) -> Tensor | None:
        if self._is_waiting and self._is_untouched(grad):
            return None
        # some process may hold nothing but rows without a gradient
        is_alive, was_alive = self._processes.maximum(torch.stack(self.signs_of_life()).float())
        return _was_zeroed(is_alive, was_alive)

    def _clear_if_zeroed(self, grad: Tensor, sums: list[Tensor]) -> None:
        """Nothing: :func:`gated` asks for all layers at once."""

    def _forget(self, zeroed: Tensor | None) -> None:
        if not self._is_waiting:
            super()._forget(zeroed)
        elif self._has_arrived and zeroed is not None:  # among them are those of what waits
            self._doubt = self._doubt | zeroed


def attach(
    model: nn.Module, layers: Sequence[tuple[str, GHLLayer]], optimizer: Optimizer, processes: Processes
) -> list[Attachment]:
    """The attachments of all layers.

    Raises:
        ValueError: a weight sharded other than by rows, offloaded to the CPU, or whose decay mixes its rows.
    """
    for name, layer in layers:
        _check_shards(repr(_check.label(name)), layer)
    records = _records(model)
    return [
        ShardedAttachment(name, layer, optimizer, processes, records.get(id(layer.weight)))
        for name, layer in layers
    ]


def _records(model: nn.Module) -> dict[int, Any]:
    """What FSDP keeps of every sharded weight, by the weight's id, where this torch lets one see it.

    It alone knows which sharded weight a gathered one is made of.
    """
    states = [m._get_fsdp_state() for m in model.modules() if isinstance(m, FSDPModule)]
    groups = [group for state in states for group in _groups(state)]
    records = [record for group in groups for record in group.fsdp_params]
    return {id(record.sharded_param): record for record in records}


def _groups(state: Any) -> Iterable[Any]:
    """What one call of fully_shard keeps; before torch 2.12 that was one group or none."""
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:
        group = getattr(state, "_fsdp_param_group", None)
        return () if group is None else (group,)
    return groups


def gated(
    active: Sequence[tuple[Attachment, list[Tensor]]], processes: Processes
) -> Iterator[tuple[Attachment, Tensor]]:
    """This process's rows of the gated gradient of every layer.

    The largest |H| of all rows, and whether their gradient was zeroed, by one all-reduce for all layers.
    """
    layers = [(cast(ShardedAttachment, attachment), sums) for attachment, sums in active]
    updates = [(attachment, attachment.delta(*sums)) for attachment, sums in layers]
    if not updates:
        return
    asked = torch.stack([torch.stack([_largest(H), *a.signs_of_life()]) for a, H in updates], dim=1)
    # MAX need not return a NaN; an inf is as bad and does
    scales, are_alive, were_alive = processes.maximum(torch.where(asked.isfinite(), asked, torch.inf))
    scales = torch.where(scales.isfinite(), scales + EPS, torch.nan)
    zeroed = _was_zeroed(are_alive, were_alive)
    for (attachment, H), scale, is_zeroed in zip(updates, scales, zeroed, strict=True):
        if attachment.layer.rule.normalize == "layer":
            H = H / scale.to(H.dtype)
        yield attachment, attachment.gated(H.masked_fill_(is_zeroed, 0.0))


def _was_zeroed(is_alive: Tensor, was_alive: Tensor) -> Tensor:
    """From the signs of life of all processes: no row is other than 0, and some was left so."""
    return (is_alive == 0) & (was_alive != 0)


def _largest(H: Tensor) -> Tensor:
    """max |H| in float64, 0 of no rows."""
    return H.abs().amax().double() if H.numel() else H.new_zeros((), dtype=torch.float64)


def _check_shards(shown: str, layer: GHLLayer) -> None:
    weight = cast(DTensor, layer.weight)
    *replicas, rows = weight.placements
    if type(rows) is not Shard or rows.dim != 0 or any(placement != Replicate() for placement in replicas):
        raise ValueError(
            f"the weight of {shown} must be sharded by rows, Shard(0) as fully_shard does by default, "
            f"got {tuple(weight.placements)}"
        )
    if weight.device.type != weight.device_mesh.device_type:
        raise ValueError(
            f"the weight of {shown} is offloaded to {weight.device.type}; StepGate takes weights on the "
            f"mesh's {weight.device_mesh.device_type} devices"
        )
    if layer.rule.decay in ("subspace", "sanger"):
        raise ValueError(
            f"the decay {layer.rule.decay!r} of {shown} mixes all rows of the weight, of which a process "
            "holds some; shard a model with decay 'oja', 'instar' or 'none', or train with "
            "DistributedDataParallel"
        )
