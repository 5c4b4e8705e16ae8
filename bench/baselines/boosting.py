"""Local k-winners whose rare winners are boosted.

    mask = u exp(-boost duty) >= its k-th largest over the channels of a position
    out  = u mask
    duty <- (duty (T - B) + sum_b mean over positions of [out > 0]) / T        T = min(period, samples seen)

Name: B10, "k-winners with boosting". Source: Ahmad & Scheinkman, "How Can We Be So Dense? The Benefits of
Using Highly Sparse Representations", 2019. With boost 0 it stands for the competition of
``HebbianRule.kwta(k)`` where no value ties with the k-th largest (all that tie win); with a boost it is no
HebbianRule. Its cost is a selection at every position, and five tensors of u's size, two of them booleans.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bench.baselines._baseline import Baseline
from ghl_kernels.rule import HebbianRule

BASELINE = Baseline(
    "B10",
    "k-winners with boosting",
    "Ahmad & Scheinkman, 2019",
    "out = u where u exp(-boost duty) >= its k-th largest, duty <- running mean of [out > 0]",
)


class BoostedKWinners2d(nn.Module):
    """An activation on (B, channels, H, W), channels competing at every position; differentiable.

    In training the duty cycle follows the winners; the boost acts in both modes.

    Args:
        channels: units at a position.
        winners: k, an int in 1..channels, or a fraction in (0, 1]: k = max(1, ceil(fraction * channels)).
        boost: strength, at least 0.
        period: samples that the duty cycle remembers, at least 1; a longer batch is remembered whole.

    Attributes:
        duty: (channels,), the share of positions at which each channel was active.

    Raises:
        TypeError: ``winners`` is no number.
        ValueError: an argument out of range; in the forward, another number of channels.
    """

    duty: Tensor

    def __init__(self, channels: int, winners: int | float, boost: float = 1.0, period: int = 1000) -> None:
        super().__init__()
        if not boost >= 0 or period < 1:
            raise ValueError(f"boost must be at least 0 and period 1, got {boost=}, {period=}")
        self.k = HebbianRule.kwta(winners).winners_of(channels) or channels
        self.boost = boost
        self.period = period
        self.seen = 0
        self.register_buffer("duty", torch.zeros(channels))

    def forward(self, u: Tensor) -> Tensor:
        if u.dim() != 4 or u.shape[1] != self.duty.numel():
            raise ValueError(f"u must be (batch, {self.duty.numel()}, H, W), got shape {tuple(u.shape)}")
        out = u * self._mask(u.detach())
        if self.training:
            self._follow(out.detach())
        return out

    @torch.no_grad()
    def _mask(self, u: Tensor) -> Tensor:
        boosted = u * torch.exp(-self.boost * self.duty).to(u.dtype).view(-1, 1, 1)
        threshold = boosted.kthvalue(u.shape[1] - self.k + 1, 1, keepdim=True).values
        return boosted >= threshold

    @torch.no_grad()
    def _follow(self, out: Tensor) -> None:
        batch = out.shape[0]
        self.seen += batch
        window = max(min(self.period, self.seen), batch)
        active = (out > 0).to(self.duty.dtype).mean((2, 3)).sum(0)
        self.duty.mul_(window - batch).add_(active).div_(window)
