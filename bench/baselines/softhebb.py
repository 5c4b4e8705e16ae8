"""SoftHebb: softmax whose losers learn with the opposite sign, sums by the convolution trick.

    y = softmax over channels of u / temperature, negated for every unit but the largest
    H = A - v W with A = sum_p y_p x_p^T and v_n = sum_p y_np u_np, over max |H|
    W <- W + lr H while the batch goes by; no backward

Name: B6, "SoftHebb". Source: Journé et al., "Hebbian Deep Learning Without Feedback", ICLR 2023. It stands
for ``HebbianRule.softhebb(temperature)``; the published learning rate that follows the norm of each filter
and the reflecting padding are left out, as is the bias. Its cost is two dense passes, forward and A, and
y and its signs, of u's size. With ``as_shipped`` it also does what the published code does in every layer and
step: the winners as a one-hot matrix (P, N), and two statistics of them copied to the host, which waits
for the device each time.
"""

from __future__ import annotations

from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.baselines._baseline import Baseline
from bench.baselines._conv import ConvArguments
from bench.baselines._oja import decayed
from bench.baselines.conv_trick import correlation

BASELINE = Baseline(
    "B6",
    "SoftHebb",
    "Journé et al., ICLR 2023",
    "y = softmax(u / T), negated for all but the largest; H = A - (sum y u) W over max |H|; W += lr H",
)


@torch.no_grad()
def compete(u: Tensor, temperature: float = 1.0) -> Tensor:
    """y of u's shape (B, N, OH, OW): softmax over units, losers negated; ties go to the lowest index."""
    sign = torch.full_like(u, -1.0).scatter_(1, u.argmax(1, keepdim=True), 1.0)
    return sign * torch.softmax(u / temperature, dim=1)


@torch.no_grad()
def delta(
    x: Tensor, u: Tensor, weight: Tensor, temperature: float = 1.0, **conv: Unpack[ConvArguments]
) -> Tensor:
    """H of weight's shape."""
    return _update(x, u, compete(u, temperature), weight, **conv)


def _update(x: Tensor, u: Tensor, y: Tensor, weight: Tensor, **conv: Unpack[ConvArguments]) -> Tensor:
    return decayed(correlation(x, y, weight, **conv), (y * u).sum((0, 2, 3)), weight)


class SoftHebbConv2d(nn.Conv2d):
    """Conv2d that can learn by SoftHebb as a batch goes by: ``learn_``, or ``local_pass`` over a model.

    Numeric zero padding, groups=1 and no bias. ``temperature`` is the softmax's; with ``as_shipped`` the
    statistics of the published code are kept on the host: ``wins``, how often each unit won, (N,), and
    ``winner_activity``, the winners' mean activity of every step.

    Raises:
        ValueError: in ``learn_``, any other padding, groups or a bias.
    """

    temperature: float = 1.0
    as_shipped: bool = False
    lr: float | None = None  # set while a local pass is under way

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.lr is None else self.learn_(x, self.lr)

    @torch.no_grad()
    def learn_(self, x: Tensor, lr: float) -> Tensor:
        """W <- W + lr H; returns u (B, N, OH, OW) from before the update."""
        if (
            isinstance(self.padding, str)
            or self.groups != 1
            or self.bias is not None
            or self.padding_mode != "zeros"
        ):
            raise ValueError(f"this SoftHebb has numeric zero padding, groups=1, no bias, got {self}")
        conv = ConvArguments(stride=self.stride, padding=self.padding, dilation=self.dilation)
        u = F.conv2d(x, self.weight, **conv)
        y = self._compete_as_shipped(u) if self.as_shipped else compete(u, self.temperature)
        self.weight.add_(_update(x, u, y, self.weight, **conv), alpha=lr)
        return u

    def _compete_as_shipped(self, u: Tensor) -> Tensor:
        """``compete``, on rows (P, N), with the statistics of the winners on the host."""
        rows = u.movedim(1, -1).reshape(-1, u.shape[1])
        activity = torch.softmax(rows / self.temperature, dim=1)
        winners = F.one_hot(rows.argmax(1), u.shape[1])
        self.wins += winners.sum(0).cpu()
        self.winner_activity.append((activity * winners).sum(1).mean().cpu())
        y = torch.where(winners.bool(), activity, -activity)
        return y.view(u.shape[0], *u.shape[2:], u.shape[1]).movedim(-1, 1)


def convert(model: nn.Module, temperature: float = 1.0, as_shipped: bool = False) -> nn.Module:
    """Swap every Conv2d of the model for SoftHebbConv2d, in place (parameters stay); returns the model."""
    for module in model.modules():
        if type(module) is nn.Conv2d:
            module.__class__ = SoftHebbConv2d
            module.temperature, module.as_shipped = temperature, as_shipped
            module.wins = torch.zeros(module.out_channels, dtype=torch.int64)
            module.winner_activity = []
    return model


@torch.no_grad()
def local_pass(model: nn.Module, x: Tensor, lr: float) -> Tensor:
    """The model's output while each of its SoftHebbConv2d learns from its own input; one training step."""
    layers = [module for module in model.modules() if isinstance(module, SoftHebbConv2d)]
    for layer in layers:
        layer.lr = lr
    try:
        return model(x)
    finally:
        for layer in layers:
            layer.lr = None
