"""What a Monitor keeps of one layer: sums on the layer's device, which no training step waits for.

A probe is reached from the ``ghl::observe_*`` operations by its number, because a compiled graph can hold
a number and not an object. Whether a step is observed is decided inside those operations, in Python.
"""

from __future__ import annotations

import itertools
import math
import weakref
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ghl_kernels.nn import GHLLayer

_EPS = 1e-30
_numbers = itertools.count()
_probes: weakref.WeakValueDictionary[int, Probe] = weakref.WeakValueDictionary()


class Probe:
    """The sums of one layer over its observed steps.

    A step lasts until the weight changes, so that all passes that it accumulates are observed, or none.

    Attributes:
        number: what :func:`find` takes.
        histogram: (2, N + 1) int64 of N units: at how many positions each was among the winners, and had the
            largest response; the last column counts positions whose responses have a NaN.
        totals: (5,) float64, sums over the observed gates: gates, weights whose local and task direction
            agree, weights where they are opposed, max |H| before normalization, |H| / |W| after it.
    """

    def __init__(self, layer: GHLLayer, every: int, positions: int) -> None:
        self._layer = layer
        self._every, self._positions = every, positions
        self._version: int | None = None
        self._step = -1
        self._missed = 0
        device = layer.weight.device
        with torch.inference_mode(False):  # what is made in it, training could not add to
            self.histogram = torch.zeros(2, layer.units + 1, dtype=torch.int64, device=device)
            self.totals = torch.zeros(5, dtype=torch.float64, device=device)
        self.number = next(_numbers)
        _probes[self.number] = self

    def __deepcopy__(self, memo: dict[int, object]) -> None:
        # for layers that are copied past their own __getstate__, as those with a parametrization are
        return None

    def is_due(self) -> bool:
        """Whether the step that a forward pass belongs to is observed."""
        # asked of the layer: a compiled graph passes copies and aliases, whose versions say nothing
        weight = self._layer.weight
        version = -1 if weight.is_inference() else weight._version  # which has none: all is one step
        if version != self._version:
            self._version = version
            self._step += 1
        return self.is_observing()

    def is_observing(self) -> bool:
        """Whether the step of the last forward pass is observed."""
        return self._step % self._every == 0

    def sums(self) -> Tensor:
        """The histogram's rows and the totals, flat in float64, exact for counts below 2^53."""
        return torch.cat([self.histogram.flatten().double(), self.totals])

    def reset(self) -> None:
        """Forget everything; the next step is observed."""
        self.histogram.zero_()
        self.totals.zero_()
        self._version, self._step = None, -1

    def follow(self, device: torch.device) -> None:
        """Take the sums to where the layer is now."""
        if self.histogram.device != device:
            with torch.inference_mode(False):
                self.histogram, self.totals = _moved(self.histogram, device), _moved(self.totals, device)

    def observe_responses(self, u: Tensor, dim: int) -> None:
        """Called by the layer with u, units along ``dim``, whenever it trains."""
        if _in_graph() or (not self._is_repetition() and self.is_due()):
            self.follow(u.device)
            torch.ops.ghl.observe_responses_(self.histogram, u, dim, self.number)

    def miss(self) -> None:
        """Called by the layer in train mode when it runs without grad mode, as checkpoints do at first."""
        if not _in_graph():
            self._missed += 1

    def _is_repetition(self) -> bool:
        """Whether a checkpoint runs the layer again in backward, after a pass that was not missed.

        Its hook tells; where the layer saves its tensors by another, there is no missed pass to make up for.
        """
        if torch._C._current_graph_task_id() < 0:  # not in backward
            return False
        if self._missed == 0 or _is_recomputation():
            return True
        self._missed -= 1
        return False

    def gate_arguments(self, weight: Tensor) -> tuple[Tensor, int] | tuple[None, None]:
        """What GateFunction takes in a forward pass, to observe the rule in backward."""
        if not (_in_graph() or self.is_due()):
            return None, None
        self.follow(weight.device)
        return self.totals, self.number

    def observe_rule(
        self,
        G: Tensor | None,
        A: Tensor,
        moments: Tensor,
        weight: Tensor,
        is_skipped: Tensor | None = None,
    ) -> None:
        """Called with the sums, and the plain gradient where there is one, before the rule is applied.

        ``is_skipped``, if given, is on a device: other than 0 where the step will leave the weight as it is.
        """
        if not (_in_graph() or self.is_observing()):
            return
        self.follow(weight.device)
        before = None if is_skipped is None else self.totals.clone()
        torch.ops.ghl.observe_rule_(self.totals, G, A, moments, weight, self.number)
        if is_skipped is not None and before is not None:
            # chosen and not weighted: what a skipped step adds may be NaN
            self.totals.copy_(torch.where(is_skipped.to(self.totals.device) != 0, before, self.totals))

    @torch.no_grad()
    def count_winners(self, histogram: Tensor, u: Tensor, dim: int) -> None:
        """Add the winners of u, units along ``dim``, to the histogram."""
        units = u.shape[dim]
        u = _thinned(u.detach(), dim, self._positions)
        k = max(1, self._layer.rule.winners_of(units))
        # linear activity: the lists then say which winner has the largest response
        unit, response = torch.ops.ghl.winners(u, dim, "linear", k, 1.0, False)
        unit = torch.where(unit[:, :1] < 0, units, unit).long()
        largest = unit if k == 1 else unit.gather(1, response.argmax(1, keepdim=True))
        for row, index in zip(histogram, (unit, largest), strict=True):
            index = index.flatten()
            row.scatter_add_(0, index, torch.ones_like(index))

    @torch.no_grad()
    def measure_rule(
        self, totals: Tensor, G: Tensor | None, A: Tensor, moments: Tensor, weight: Tensor
    ) -> None:
        """Add one application of the rule, with its plain gradient G if there is one, to the totals."""
        rule = self._layer.rule
        H = torch.ops.ghl.delta(A, moments, weight, self._layer.filter_groups, rule.decay, "none").flatten(1)
        largest = torch.linalg.vector_norm(H, math.inf, dim=1)
        norm = torch.linalg.vector_norm(H, dim=1)
        scale = _scale(rule.normalize, largest, moments)
        applied = torch.linalg.vector_norm(norm / scale) / torch.linalg.vector_norm(weight.to(H.dtype))
        agreeing = opposed = totals.new_zeros(())
        if G is not None:
            direction = H.sign_().mul_(G.flatten(1).sign())  # W += lr * H goes against G where they agree
            agreeing, opposed = (direction < 0).sum(), (direction > 0).sum()
        parts = (torch.ones_like(agreeing), agreeing, opposed, largest.amax(), applied)
        totals += torch.stack([part.double() for part in parts])


def _moved(sums: Tensor, device: torch.device) -> Tensor:
    """Of a layer made on the meta device there are none yet."""
    return torch.zeros_like(sums, device=device) if sums.is_meta else sums.to(device)


def _in_graph() -> bool:
    """Where an operation's call cannot be spared: a compiled graph has to ask inside the operation."""
    return torch.compiler.is_compiling()


def _is_recomputation() -> bool:
    """Whether a checkpoint without reentrance, whose first pass has grad mode, is running its second one."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and getattr(hooks[0], "__qualname__", "").startswith("_recomputation_hook")


def find(number: int) -> Probe | None:
    """The probe of this number; None once its Monitor is gone."""
    return _probes.get(number)


def _scale(normalize: str, largest: Tensor, moments: Tensor) -> Tensor | float:
    """What H is divided by, from the largest |H| of every row."""
    if normalize == "none":
        return 1.0
    if normalize == "mean":
        return moments[-1].clamp_min(1.0)
    return (largest.amax() if normalize == "layer" else largest) + _EPS


def _thinned(u: Tensor, dim: int, positions: int) -> Tensor:
    """Whole items of the batch, evenly spaced, that hold about this many positions."""
    if dim == -1:
        u = u.reshape(-1, u.shape[-1])
    present = u.numel() // max(1, u.shape[dim])
    return u[:: max(1, -(-present // positions))]
