"""A network with its optimizers, and the step that trains it.

    by the gradient     backprop, or GHL where layers were converted
    local               filters learn as images go by, then are frozen; the read-out learns from then on
    frozen              filters stay as they were

The step of the gradient is the same for every method.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import ghl_kernels as ghl
from ghl_kernels.demo.errors import UserError
from ghl_kernels.nn import GHLLayer

LocalStep = Callable[[nn.Module, Tensor, float], None]


class Learner:
    """Trains a model by the gradients of the cross entropy; frozen parameters stay as they are.

    Args:
        model: on its device; converted already if it is to learn by GHL.
        optimizers: together they hold the parameters that require gradients. Layers with
            ``gate_at="step"`` must belong to the first.
        amp: forward pass under bfloat16 autocast; weights and sums stay in float32.
        distributed: wrap the model in DistributedDataParallel.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        *,
        amp: bool = False,
        distributed: bool = False,
    ) -> None:
        self.model, self.optimizers, self.amp = model, list(optimizers), amp
        self.network: nn.Module = DistributedDataParallel(model) if distributed else model
        at_step = any(isinstance(m, GHLLayer) and m.gate_at == "step" for m in model.modules())
        self._gate = ghl.StepGate(self.optimizers[0], self.network) if at_step else None
        for group in self._groups():
            group.setdefault("initial_lr", group["lr"])

    @property
    def device(self) -> torch.device:
        """Of the model's parameters."""
        return next(self.model.parameters()).device

    @property
    def local_epochs(self) -> int:
        """Epochs before those of the gradient."""
        return 0

    def local_step(self, images: Tensor, share: float) -> None:
        """A step of the local epochs, at a share of its learning rate."""
        raise RuntimeError("this method has no local epochs")

    def step(self, images: Tensor, labels: Tensor, share: float) -> Tensor:
        """One optimizer step at a share of the initial learning rates.

        Args:
            images: (B, C, H, W), standardized.
            labels: (B,), int64.
            share: of every group's initial rate.

        Returns:
            The mean cross entropy before the step, on the device: reading it waits for the step.

        Raises:
            UserError: a batch too small for batch norm.
        """
        for group in self._groups():
            group["lr"] = share * group["initial_lr"]
        loss = F.cross_entropy(self._logits(self.network, images), labels)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss.detach()

    @torch.no_grad()
    def correct(self, images: Tensor, labels: Tensor) -> Tensor:
        """How many images have their largest logit at the label, on the device."""
        return (self._logits(self.model, images).argmax(1) == labels).sum()

    def state_dict(self) -> dict[str, Any]:
        """Model and optimizers."""
        return {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What ``state_dict`` returned."""
        self.model.load_state_dict(state["model"])
        for optimizer, kept in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)

    def _groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def _logits(self, network: nn.Module, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.amp):
            try:
                logits: Tensor = network(images)
            except ValueError as error:
                if "more than 1 value per channel" not in str(error):  # batch norm's
                    raise
                height, width = images.shape[2:]
                raise UserError(
                    f"a batch of one image of {height} x {width} leaves batch norm one value per channel; "
                    "take more images a batch, or larger ones."
                ) from None
        return logits.float()


class LocalLearner(Learner):
    """A learner whose filters, frozen for the optimizers, first learn by a local rule.

    Args:
        local: ``local(model, images, lr)`` trains the filters in place.
        lr: of ``local``.
        epochs: of ``local``.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        local: LocalStep,
        lr: float,
        epochs: int,
    ) -> None:
        super().__init__(model, optimizers)
        self._local, self._lr, self._epochs = local, lr, epochs

    @property
    def local_epochs(self) -> int:
        """Epochs of the local rule."""
        return self._epochs

    @torch.no_grad()
    def local_step(self, images: Tensor, share: float) -> None:
        """Let the filters learn from the images."""
        self._local(self.model, images, share * self._lr)
