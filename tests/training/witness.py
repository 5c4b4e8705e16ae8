"""What the layers of a network saw in low precision, and the float64 rule on exactly that."""

from __future__ import annotations

import torch
from oracle import CORRELATION, assert_gated, judge_delta, padded_input
from torch import Tensor, nn

from ghl_kernels import reference
from ghl_kernels.nn import GHLLayer

Pass = tuple[Tensor, Tensor, Tensor]


class Witness:
    """Keeps x, u and dL/du of every GHL layer of a model; on the CPU, whatever device the model is on."""

    def __init__(self, model: nn.Module) -> None:
        self._layers = {name: m for name, m in model.named_modules() if isinstance(m, GHLLayer)}
        self._seen: dict[str, list[Pass]] = {name: [] for name in self._layers}
        for name, layer in self._layers.items():
            layer.register_forward_hook(self._record(name))

    def _record(self, name: str):
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], u: Tensor) -> None:
            # cast as autocast casts it; cloned, as what follows may change u in place
            x, kept = inputs[0].detach().to(u.dtype).cpu(), u.detach().clone().cpu()
            u.register_hook(lambda grad: self._seen[name].append((x, kept, grad.clone().cpu())))

        return hook

    def forget(self) -> None:
        """Start afresh."""
        for seen in self._seen.values():
            seen.clear()

    def assert_follows(self, grads: dict[str, Tensor]) -> None:
        """These gradients, by parameter, are the rule on all that was seen, for the present weights."""
        for name, layer in self._layers.items():
            self._judge(layer, grads[f"{name}.weight"].cpu(), self._seen[name])

    @staticmethod
    def _judge(layer: GHLLayer, grad: Tensor, seen: list[Pass]) -> None:
        x, u, grad_u = (torch.cat(parts) for parts in zip(*seen, strict=True))
        weight = layer.weight.detach().cpu()
        if isinstance(layer, nn.Linear):
            delta, arguments, dim = reference.linear_delta, {}, -1
        else:
            delta, dim, x = reference.conv_delta, 1, padded_input(layer, x)
            arguments = {"stride": layer.stride, "dilation": layer.dilation, "groups": layer.groups}
        judgement = judge_delta(delta, x, u, weight, layer.rule, dim, **arguments)
        exact = x.double(), grad_u.double(), weight.double()
        G = delta(*exact, CORRELATION, **arguments)
        magnitude = delta(*(t.abs() for t in exact), CORRELATION, **arguments)
        if grad.dtype != torch.float32:  # half a unit in the last place of what the parameter's dtype holds
            rounding = judgement.oracle.abs() * torch.finfo(grad.dtype).eps / 2
            judgement = judgement._replace(floor=judgement.floor + rounding)
        G_eps = torch.finfo(x.dtype).eps
        assert (G.abs() > 4 * G_eps * magnitude).double().mean() > 0.5  # else no sign would be compared
        assert_gated(grad, judgement, G, magnitude, G_eps)
