"""The authors' algorithm: unfold, one matrix product per sample, gate by hand after backward.

    y     = softmax over channels of u / temperature          u = W * x, zero padding
    A     = sum_b y_b unfold(x)_b^T                           (B, N, D) is kept, then summed over b
    v_n   = sum_p y_np u_np
    Delta = A - v W,  Delta <- Delta / (max |Delta| + 1e-30)
    after backward:  weight.grad <- |Delta| * sign(weight.grad)

Name: B1, "authors' algorithm". Source: Hua et al., "Hebbian Learning with Global Direction", ICASSP 2026
(arXiv 2601.21367), formulas and order of operations; the code is our own. It stands for
``HebbianRule.ghl(temperature)``. Its cost is 4 dense passes, the patches (B, D, P) and the products of
every sample (B, N, D): 1.3 GB for one 20 MB weight at DeepHebb's third layer and B = 64.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-30


class UnfoldConv2d(nn.Conv2d):
    """Conv2d that leaves |Delta| in ``delta`` on every training forward; ``gate_`` applies it after backward.

    Zero padding, groups=1 and no bias, as published. ``temperature`` is the softmax's.
    """

    temperature: float = 1.0
    delta: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        padding = self.padding
        if (
            isinstance(padding, str)
            or self.groups != 1
            or self.bias is not None
            or self.padding_mode != "zeros"
        ):
            raise ValueError(
                f"the published algorithm has numeric zero padding, groups=1, no bias, got {self}"
            )
        padded = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
        u = F.conv2d(padded, self.weight, None, self.stride, 0, self.dilation)
        if self.training:
            self.delta = self._local_update(padded.detach(), u.detach())
        return u

    @torch.no_grad()
    def _local_update(self, padded: Tensor, u: Tensor) -> Tensor:
        batch, units, *size = u.shape
        rows = u.transpose(0, 1).reshape(units, -1)  # (N, B * P)
        y = (
            torch.softmax(rows / self.temperature, dim=0)
            .view(units, batch, *size)
            .transpose(0, 1)
            .contiguous()
        )
        patches = F.unfold(padded, self.kernel_size, self.dilation, 0, self.stride)  # (B, D, P)
        per_sample = torch.bmm(y.flatten(2), patches.transpose(1, 2))  # (B, N, D)
        weight = self.weight.flatten(1)
        delta = per_sample.sum(0) - (y * u).sum((0, 2, 3)).unsqueeze(1) * weight
        return (delta / (delta.abs().max() + EPS)).view_as(self.weight)

    @torch.no_grad()
    def gate_(self) -> None:
        """weight.grad <- |Delta| * sign(weight.grad)."""
        if self.delta is None or self.weight.grad is None:
            raise RuntimeError("gate_ needs a forward in training mode and a backward before it")
        self.weight.grad = self.delta.abs() * torch.sign(self.weight.grad)


def convert(model: nn.Module, temperature: float = 1.0) -> nn.Module:
    """Swap every Conv2d of the model for UnfoldConv2d, in place (parameters stay); returns the model."""
    for module in model.modules():
        if type(module) is nn.Conv2d:
            module.__class__ = UnfoldConv2d
            module.temperature = temperature
    return model


def gate_(model: nn.Module) -> None:
    """Gate the gradient of every UnfoldConv2d in the model: call between backward and the step."""
    for module in model.modules():
        if isinstance(module, UnfoldConv2d):
            module.gate_()
