"""The Hebbian sums of several processes: over which of them, and one flat all-reduce for all layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from ghl_kernels._attachment import Attachment


def is_sharded(weight: Tensor | None) -> bool:
    """Whether a weight is a DTensor, as fully_shard makes it; asked without importing DTensor."""
    return hasattr(weight, "device_mesh")


class Processes:
    """The processes whose sums belong together: those over which the gradients are reduced.

    Args:
        model: where a DistributedDataParallel wrapper is looked for.
        weights: the gated ones, all sharded over one mesh of devices or none of them sharded.
        given: the user's process group, or None.

    Attributes:
        groups: reduced over in turn; empty where there are no other processes.
        is_sharded: whether the weights are.

    Raises:
        ValueError: several processes and none of the three says which; or sharded weights that
            do not agree.
    """

    def __init__(self, model: nn.Module, weights: Sequence[Tensor], given: Any) -> None:
        self._ddp = _wrapper(model)
        self.is_sharded = any(is_sharded(weight) for weight in weights)
        if self.is_sharded:
            self.groups = _groups_of_shards(weights, given)
        else:
            self.groups = _groups(self._ddp, given)

    def sums(self, members: Sequence[Attachment]) -> list[list[Tensor] | None]:
        """[A, moments] of every member over all processes, None where it has no gradient.

        Raises:
            RuntimeError: as Attachment.sums, a gradient that no process has sums for, or a step within
                DistributedDataParallel.join.
        """
        if not self.groups:
            return [member.sums() for member in members]
        self._refuse_join()
        local = [member.sums(shared=True) for member in members]
        total = self._reduced([s or m.empty_sums() for s, m in zip(local, members, strict=True)])
        for member, reduced in zip(members, total, strict=True):
            member.check_shared(reduced)
        return [None if s is None else t for s, t in zip(local, total, strict=True)]

    def maximum(self, values: Tensor) -> Tensor:
        """The largest over all processes, elementwise and in place."""
        for group in self.groups:
            torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX, group)
        return values

    def _reduced(self, local: list[list[Tensor]]) -> list[list[Tensor]]:
        """The sums over all processes, one flat all-reduce per dtype and device; copies of the local ones."""
        reduced: list[list[Tensor]] = [[] for _ in local]
        kinds = [(str(sums[0].dtype), str(sums[0].device)) for sums in local]
        for kind in sorted(set(kinds)):
            members = [i for i, own in enumerate(kinds) if own == kind]
            flat = torch.cat([t.flatten() for i in members for t in local[i]])
            for group in self.groups:
                torch.distributed.all_reduce(flat, group=group)
            parts = iter(flat.split([t.numel() for i in members for t in local[i]]))
            for i in members:
                reduced[i] = [next(parts).view(t.shape) for t in local[i]]
        return reduced

    def _refuse_join(self) -> None:
        # a process that ran out of data repeats the others' all-reduces of gradients, and not these
        if self._ddp is not None and self._ddp._join_config.enable:
            raise RuntimeError(
                "a step within DistributedDataParallel.join: a process that has joined takes no part in the "
                "reduction of the Hebbian sums. Give every process a share of each batch, which may be "
                "unequal or empty, and weight the loss by samples"
            )


def _wrapper(model: nn.Module) -> nn.parallel.DistributedDataParallel | None:
    ddp = nn.parallel.DistributedDataParallel
    return next((module for module in model.modules() if isinstance(module, ddp)), None)


def _groups(ddp: nn.parallel.DistributedDataParallel | None, given: Any) -> list[Any]:
    distributed = torch.distributed
    if given is not None:
        return [given]
    if not (distributed.is_available() and distributed.is_initialized()):
        return []
    if ddp is not None:
        return [ddp.process_group]
    if distributed.get_world_size() > 1:
        raise ValueError(
            f"{distributed.get_world_size()} processes and no DistributedDataParallel model: "
            "give the process_group over which gradients are reduced"
        )
    return []


def _groups_of_shards(weights: Sequence[Any], given: Any) -> list[Any]:
    """One group per dimension of the mesh: reduced over each in turn, a tensor is reduced over all."""
    if given is not None:
        raise ValueError("sharded weights bring their processes along; leave out process_group")
    mesh, *others = {weight.device_mesh if is_sharded(weight) else None for weight in weights}
    if mesh is None or others:
        meshes = sorted("no mesh" if m is None else str(m) for m in (mesh, *others))
        raise ValueError(
            "the gated weights must be sharded over one device mesh, got "
            f"{', '.join(meshes)}; make an optimizer and a StepGate for each"
        )
    return list(mesh.get_all_groups())
