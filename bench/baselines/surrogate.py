"""The rule as the gradient of a surrogate loss: one forward and one backward of autograd.

    L = -1/2 sum y'^2       value(y') = y = softmax of u / temperature
                            dy'/dW    = x - u W (decay "oja"), x - W (decay "instar")
    H = -dL/dW = sum_p y_p (x_p - u_p W) or sum_p y_p (x_p - W)

Name: B5, "surrogate loss". Source: Miconi, "Hebbian learning with gradients: Hebbian convolutional neural
networks with modern deep learning frameworks", 2021 (arXiv 2107.01729). There Oja's decay is y W, which is
u W where the activity is linear; u W makes it Oja's decay under every activity. It stands for
``HebbianRule.ghl(temperature)`` (norm over the layer) and for ``HebbianRule(temperature=temperature,
decay="instar", normalize="mean", gate="none")``, which is ``HebbianRule.instar()`` at 1. Its cost is two
dense passes, forward and weight gradient; u and y' are kept for the backward.
"""

from __future__ import annotations

from typing import Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.baselines._baseline import Baseline
from bench.baselines._conv import ConvArguments
from bench.baselines._oja import EPS

BASELINE = Baseline(
    "B5",
    "surrogate loss",
    "Miconi, 2021 (arXiv 2107.01729)",
    "H = -d/dW of L = -1/2 sum y'^2, value(y') = y, dy'/dW = x - u W or x - W",
)


def delta(
    x: Tensor,
    weight: Tensor,
    temperature: float = 1.0,
    decay: str = "oja",
    **conv: Unpack[ConvArguments],
) -> Tensor:
    """H of weight's shape: over its largest entry with "oja", over the number of positions with "instar".

    Raises:
        ValueError: any other decay.
    """
    if decay not in ("oja", "instar"):
        raise ValueError(f"decay must be 'oja' or 'instar', got {decay!r}")
    weight = weight.detach().requires_grad_()
    with torch.enable_grad():
        u = F.conv2d(x.detach(), weight, **conv)
        half_norm = 0.5 * weight.square().sum((1, 2, 3)).view(-1, 1, 1)
        graph = u - half_norm * (u.detach() if decay == "oja" else 1.0)
        y = torch.softmax(u.detach() / temperature, dim=1)
        surrogate = graph + (y - graph).detach()
        loss = -0.5 * surrogate.square().sum()
    H = -torch.autograd.grad(loss, weight)[0]
    if decay == "oja":
        return H / (H.abs().max() + EPS)
    return H / (u.numel() // u.shape[1])
