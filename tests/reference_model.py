"""A float64 copy of a model in plain torch layers, and what the reference rule makes of its gradients."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ghl_kernels as ghl
from ghl_kernels.nn import GHLLayer

Batch = tuple[Tensor, Tensor]


def small_network(*, inplace: bool = True) -> nn.Sequential:
    """Convolutions with padding, stride and groups, batch norm, and two linear layers: x (B, 3, 8, 8)."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=inplace),
        nn.Conv2d(8, 12, 3, stride=2, groups=2),
        nn.ELU(inplace=inplace),
        nn.Flatten(),
        nn.Linear(108, 16),
        nn.ELU(inplace=inplace),
        nn.Linear(16, 5),
    )


def small_batches(*sizes: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> list[Batch]:
    """Random images (B, 3, 8, 8) and one of five targets each, one batch of every size."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(size, 3, 8, 8, generator=generator, dtype=torch.float64).to(dtype),
            torch.randint(5, (size,), generator=generator),
        )
        for size in sizes
    ]


def summed_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy summed over the batch, so that micro-batches add up to the whole."""
    x, target = batch
    return F.cross_entropy(model(x), target, reduction="sum")


class ReferenceModel:
    """The torch model in float64; records what every GHL layer of the original saw since :meth:`forget`."""

    def __init__(self, model: nn.Module) -> None:
        self.rules = {name: m.rule for name, m in model.named_modules() if isinstance(m, GHLLayer)}
        self.model = ghl.revert(copy.deepcopy(model)).double()
        self._seen: dict[str, list[tuple[Tensor, Tensor, list[Tensor]]]] = {name: [] for name in self.rules}
        for name in self.rules:
            self.model.get_submodule(name).register_forward_hook(self._record(name))

    def _record(self, name: str):
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], u: Tensor) -> Tensor:
            grads: list[Tensor] = []
            if u.requires_grad:
                u.register_hook(lambda grad: grads.append(grad.clone()))
            self._seen[name].append((inputs[0].detach().clone(), u.detach().clone(), grads))
            return u.clone()  # what follows may change it in place

        return hook

    def backward(self, batch: Batch) -> None:
        """One pass, in float64 whatever the batch's dtype."""
        summed_loss(self.model, (batch[0].double(), batch[1])).backward()

    def forget(self) -> None:
        """Zero the gradients and start the record afresh."""
        self.model.zero_grad()
        for seen in self._seen.values():
            seen.clear()

    def follow(self, model: nn.Module) -> None:
        """Take over the parameters of ``model``."""
        with torch.no_grad():
            for mine, theirs in zip(self.model.parameters(), model.parameters(), strict=True):
                mine.copy_(theirs)

    def gradients(self) -> dict[str, Tensor]:
        """Of every parameter with a gradient: the rule on everything recorded, or the plain one elsewhere."""
        plain = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        return plain | {
            f"{name}.weight": self.gated(name) for name in self.rules if f"{name}.weight" in plain
        }

    def gated(self, name: str) -> Tensor:
        """The reference's gradient of one layer on everything recorded."""
        layer = self.model.get_submodule(name)
        used = [(x, u, grads) for x, u, grads in self._seen[name] if grads]
        x, u = (torch.cat([entry[i] for entry in used]) for i in (0, 1))
        grad_u = torch.cat([sum(grads) for _, _, grads in used])
        weight = layer.weight.detach()
        if isinstance(layer, nn.Linear):
            return ghl.reference.linear_weight_grad(x, u, grad_u, weight, self.rules[name])
        return ghl.reference.conv_weight_grad(
            x,
            u,
            grad_u,
            weight,
            self.rules[name],
            stride=layer.stride,
            padding=layer.padding,
            dilation=layer.dilation,
            groups=layer.groups,
        )

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """``optimizer.step()`` on :meth:`gradients`; the plain gradients are there again afterwards."""
        plain = {name: p.grad for name, p in self.model.named_parameters()}
        for name, grad in self.gradients().items():
            self.model.get_parameter(name).grad = grad
        optimizer.step()
        for name, grad in plain.items():
            self.model.get_parameter(name).grad = grad


def assert_gradients_close(
    got: dict[str, Tensor], reference: ReferenceModel, dtype: torch.dtype, names: Iterable[str] | None = None
) -> None:
    """Gradients equal the reference's up to rounding; signs count where the plain gradient is above it."""
    want = reference.gradients()
    names = list(want) if names is None else list(names)
    assert names
    rounding = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 5e-2}[dtype]
    for name in names:
        expected, actual = want[name], got[name].double()
        scale = expected.abs().max().clamp_min(1e-3)
        G = reference.model.get_parameter(name).grad
        gated = name.removesuffix(".weight") in reference.rules
        sure = (G.abs() > 10 * rounding * G.abs().max()) if gated else torch.ones_like(G, dtype=torch.bool)
        gated_to = reference.rules[name.removesuffix(".weight")].gate if gated else "none"
        if gated_to == "none":
            sure = torch.ones_like(sure)
        assert sure.double().mean() > 0.5, name
        error = torch.where(sure, actual - expected, actual.abs() - expected.abs()).abs().max() / scale
        assert error <= rounding, f"{name}: error {error:.2e} of the largest, allowed {rounding:.0e}"
