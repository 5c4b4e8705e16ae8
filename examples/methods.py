"""The methods of the Fashion-MNIST table, with their settings.

Every method starts from the same weights, sees the images in the same order and trains the same read-out in
the same way. Learning rates were chosen by ``python -m examples.fashion_mnist --search`` and shorter
runs, always on held-out training images.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

import ghl_kernels as ghl
from bench.baselines import swta
from examples.learner import Learner, LocalLearner
from examples.models.hebbian import HebbianNetwork
from ghl_kernels.nn import GHLLayer
from ghl_kernels.rule import Activity, HebbianRule

How = Literal["gradient", "rule", "swta", "frozen"]
READ_OUT_LR = 1e-3  # of Adam, the same for all


@dataclasses.dataclass(frozen=True)
class Method:
    """How the filters learn.

    Attributes:
        key: on the command line and in file names.
        label: in the table.
        how: by the gradient (gated where there is a rule), by a local rule, by SWTA-FH, or not.
        lr: of the filters, the initial one.
        rule: of the filters.
        momentum, weight_decay: of the filters' SGD.
        temperature: of SWTA-FH.
        lrs: what ``--search`` tries.
    """

    key: str
    label: str
    how: How
    lr: float = 0.0
    rule: HebbianRule | None = None
    momentum: float = 0.0
    weight_decay: float = 0.0
    temperature: float = 0.02
    lrs: Sequence[float] = ()


def _ghl(key: str, label: str, lr: float, activity: Activity, winners: float | None) -> Method:
    """GHL with a scale per filter, so that filters that seldom win take steps of the same size."""
    rule = HebbianRule(activity=activity, winners=winners, normalize="filter")
    return Method(key, label, "gradient", lr, rule, lrs=(0.003, 0.01, 0.03))


METHODS = {
    method.key: method
    for method in (
        Method("backprop", "backprop", "gradient", 0.1, momentum=0.9, lrs=(0.03, 0.1, 0.3)),
        _ghl("ghl-softmax", "GHL softmax", 0.01, "softmax", None),
        Method(
            "ghl-softmax-layer",
            "GHL softmax, a scale per layer (the paper's)",
            "gradient",
            0.01,
            HebbianRule.ghl(),
            lrs=(0.003, 0.01, 0.03),
        ),
        _ghl("ghl-kwta-1", "GHL k-WTA, k = 1", 0.01, "linear", 1),
        _ghl("ghl-kwta-4", "GHL k-WTA, k = 4", 0.01, "linear", 4),
        _ghl("ghl-kwta-half", "GHL k-WTA, k = N / 2", 0.01, "linear", 0.5),
        _ghl("ghl-kwta-all", "GHL k-WTA, k = N", 0.01, "linear", None),
        Method(
            "softhebb", "SoftHebb, local", "rule", 0.003, HebbianRule.softhebb(), lrs=(0.0003, 0.003, 0.03)
        ),
        Method("swta-fh", "SWTA-FH, local", "swta", 0.001, lrs=(0.0001, 0.001, 0.01)),
        Method("hpca-fh", "HPCA-FH, local", "rule", 0.01, HebbianRule.hpca(), lrs=(0.001, 0.01, 0.03)),
        Method("frozen", "frozen", "frozen"),
    )
}


def make_learner(method: Method, model: HebbianNetwork, local_epochs: int) -> Learner:
    """A learner that trains ``model`` by ``method``; ``local_epochs`` are those of the local rules."""
    if method.rule is not None:
        ghl.convert(model, method.rule)
    filters = [conv.weight for conv in model.modules() if isinstance(conv, nn.Conv2d)]
    read_out = torch.optim.Adam(model.classifier.parameters(), lr=READ_OUT_LR)
    if method.how == "gradient":
        sgd = torch.optim.SGD(filters, method.lr, method.momentum, weight_decay=method.weight_decay)
        return Learner(model, [sgd, read_out])
    for weight in filters:
        weight.requires_grad_(False)
    if method.how == "frozen":
        return Learner(model, [read_out])

    def local(network: nn.Module, images: Tensor, lr: float) -> None:
        local_step(network, images, lr, method.temperature)

    return LocalLearner(model, [read_out], local, method.lr, local_epochs)


@torch.no_grad()
def local_step(model: nn.Module, images: Tensor, lr: float, temperature: float) -> None:
    """Each convolution in turn learns from its input: by its rule, or by SWTA-FH where it has none."""
    assert isinstance(model, HebbianNetwork)
    x = images
    for stage in model.stages:
        for module in stage:
            if isinstance(module, GHLLayer):
                x = module.learn_(x, lr)
            elif isinstance(module, nn.Conv2d):
                u = module(x)
                H = swta.delta(x, module.weight, temperature, padding=module.padding)
                module.weight.add_(H, alpha=lr)
                x = u
            else:
                x = module(x)
