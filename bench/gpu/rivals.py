"""What the pair stage's products are raced against: what a user could write with library calls.

The baselines B4, B4c and B4d of bench/baselines/library.py, for a linear layer B12, also compiled and with
float32 results. In bfloat16 a library convolution rounds A (and a library product does by default), so all
but the last compute less than what is asked for. ``python -m bench.gpu.rivals FOLDER`` only compiles.
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import ghl_kernels as ghl
from bench.baselines import library, linear
from bench.gpu import stage
from bench.gpu.layers import LAYERS, Layer
from bench.gpu.stage import Stage

AS_EXACT = ("B12 to float32",)  # those whose A and G leave the accumulator as they are
SOFTMAX = ghl.HebbianRule.ghl()
Tensors = tuple[Tensor, ...]


def rivals(
    device: torch.device, layer: Layer, tensors: list[Tensors], product: str
) -> dict[str, Callable[[int], tuple[Tensor, ...]]]:
    """By name, as functions of the number of a set of tensors; ``product`` is "pair" or "A"."""
    torch._dynamo.reset()  # or the next layer's shapes would be compiled as dynamic ones
    dry = device.type == "cpu"
    weight = torch.empty(layer.weight_shape, dtype=tensors[0][0].dtype, device=device)
    conv: dict[str, Any] = {}
    if layer.size:
        g = layer.geometry
        conv = {"stride": g.stride, "padding": g.padding, "dilation": g.dilation}
        weight = weight.contiguous(memory_format=torch.channels_last)
    found = _of_conv(product) if layer.size else _of_linear(product, dry)
    plain = next(iter(found))
    options = {"backend": "eager" if dry else "inductor", "dynamic": False, "fullgraph": True}
    found["B4c" if layer.size else f"{plain}, compiled"] = torch.compile(found[plain], **options)
    return {
        name: lambda i, run=run: run(*tensors[i], weight, SOFTMAX.temperature, **conv)
        for name, run in found.items()
    }


def _of_conv(product: str) -> dict[str, Callable[..., tuple[Tensor, ...]]]:
    if product == "A":
        return {"B4": _conv_sums}
    return {"B4": library.pair, "B4d": library.concatenated_pair}


def _of_linear(product: str, dry: bool) -> dict[str, Callable[..., tuple[Tensor, ...]]]:
    rows = 1 if product == "A" else 2

    def rounded(*arguments: Any) -> tuple[Tensor, ...]:
        return linear.pair(*arguments) if rows == 2 else _linear_sums(*arguments)

    def exact(x: Tensor, u: Tensor, grad_u: Tensor, weight: Tensor, temperature: float) -> tuple[Tensor, ...]:
        y = torch.softmax(u / temperature, dim=1)
        return tuple(torch.mm(left.t(), x, out_dtype=torch.float32) for left in (y, grad_u)[:rows])

    # a CPU's product has no wider result
    return {"B12": rounded} | ({} if dry else {AS_EXACT[0]: exact})


@torch.no_grad()
def _conv_sums(
    x: Tensor, u: Tensor, grad_u: Tensor, weight: Tensor, temperature: float, **conv: Any
) -> tuple[Tensor, ...]:
    return (library.correlation(x, torch.softmax(u / temperature, dim=1), weight, **conv),)


@torch.no_grad()
def _linear_sums(
    x: Tensor, u: Tensor, grad_u: Tensor, weight: Tensor, temperature: float
) -> tuple[Tensor, ...]:
    return (torch.softmax(u / temperature, dim=1).t() @ x,)


def warm(out: pathlib.Path) -> int:
    """Run every layer's rivals once, so that the compiled ones are in Inductor's cache."""
    this = Stage("warm-rivals", stage.Options(out))
    for layer in this.each(LAYERS, lambda layer: layer.name, least=5):
        tensors = [layer.tensors(this.device, torch.bfloat16)]
        for product in ("pair", "A"):
            found = rivals(this.device, layer, tensors, product)
            this.attempt(layer.name, lambda found=found: [run(0) for run in found.values()])
    return this.finish()


if __name__ == "__main__":
    sys.exit(warm(pathlib.Path(sys.argv[1])))
