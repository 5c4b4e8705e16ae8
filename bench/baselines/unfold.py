"""The authors' algorithm, and the same with one product: patches in full, then matrix products.

    y     = softmax over channels of u / temperature          u = W * x, zero padding
    A     = sum_b y_b unfold(x)_b^T                           B1: (B, N, D) is kept, then summed over b
    A     = Y X^T                                             B2: (N, P) times (P, D), summed as it is made
    v_n   = sum_p y_np u_np
    Delta = A - v W,  Delta <- Delta / (max |Delta| + 1e-30)
    after backward:  weight.grad <- |Delta| * sign(weight.grad)

Names: B1, "authors' algorithm"; B2, "unfold + one product". Source: Hua et al., "Hebbian Learning with
Global Direction", ICASSP 2026 (arXiv 2601.21367), formulas and order of operations; the code is our own. B2
is how FastHebb (Lagani et al., 2022) forms its sums. Both stand for ``HebbianRule.ghl(temperature)``. A
training step costs 4 dense passes, A one of them. B1 holds the patches (B, D, P / B) and the products of
every sample (B, N, D): 1.3 GB for one 20 MB weight at DeepHebb's third layer and B = 64. B2 holds the
patches twice, as unfold makes them and as rows, and no product.
"""

from __future__ import annotations

from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.baselines._baseline import Baseline
from bench.baselines._conv import ConvArguments, patch_rows, patches, unit_rows
from bench.baselines._oja import decayed

BASELINES = (
    Baseline(
        "B1",
        "authors' algorithm",
        "Hua et al., ICASSP 2026 (arXiv 2601.21367)",
        "M_b = y_b unfold(x)_b^T, A = sum_b M_b, H = A - (sum y u) W over max |H|",
    ),
    Baseline(
        "B2",
        "unfold + one product",
        "Hua et al., ICASSP 2026; product as in Lagani et al., FastHebb, 2022",
        "A = Y X^T, H = A - (sum y u) W over max |H|",
    ),
)


@torch.no_grad()
def per_sample_delta(
    x: Tensor, u: Tensor, weight: Tensor, temperature: float = 1.0, **conv: Unpack[ConvArguments]
) -> Tensor:
    """B1: H of weight's shape."""
    batch, units, *size = u.shape
    y = torch.softmax(unit_rows(u) / temperature, dim=0)
    y = y.view(units, batch, *size).transpose(0, 1).contiguous()
    per_sample = torch.bmm(y.flatten(2), patches(x, weight, **conv).transpose(1, 2))  # (B, N, D)
    return decayed(per_sample.sum(0).view_as(weight), (y * u).sum((0, 2, 3)), weight)


@torch.no_grad()
def delta(
    x: Tensor, u: Tensor, weight: Tensor, temperature: float = 1.0, **conv: Unpack[ConvArguments]
) -> Tensor:
    """B2: H of weight's shape."""
    rows = unit_rows(u)
    y = torch.softmax(rows / temperature, dim=0)
    A = y @ patch_rows(x, weight, **conv)
    return decayed(A.view_as(weight), (y * rows).sum(1), weight)


class UnfoldConv2d(nn.Conv2d):
    """Conv2d that leaves Delta in ``delta`` on every training forward; ``gate_`` applies it after backward.

    Zero padding, groups=1 and no bias, as published. ``temperature`` is the softmax's.

    Raises:
        ValueError: in the forward, any other padding, groups or a bias.
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
            self.delta = per_sample_delta(
                padded.detach(),
                u.detach(),
                self.weight.detach(),
                self.temperature,
                stride=self.stride,
                dilation=self.dilation,
            )
        return u

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
