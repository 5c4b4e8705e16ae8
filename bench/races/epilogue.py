"""From A to what the optimizer takes and to the learned weight: gate, step and local learning."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

import ghl_kernels as ghl
from bench import work
from bench.baselines import epilogue
from bench.baselines._oja import oja
from bench.race import Contender, Race, Target, ours
from bench.shapes import DEEPHEBB

RULE = (1, "oja", "layer")  # groups, decay, normalize
SHAPES = tuple(shape.weight_shape for shape in DEEPHEBB)
LR = 1e-3  # small enough that weights keep their size over all rounds
DECAY = 1e-4
TOLERANCE = 1e-5


def races(target: Target) -> Iterator[Race]:
    """Each convolution of DeepHebb by itself, then all three in one step; float32 on every device."""
    for shape in SHAPES[1:2] if target.quick else SHAPES:
        yield _gate(shape, target)
        yield _learn(shape, target)
    yield _step(target)


def _sums(shape: tuple[int, ...], target: Target, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """grad, A, moments, weight."""
    generator = torch.Generator().manual_seed(seed)
    grad, A, weight = (torch.randn(shape, generator=generator).to(target.device) for _ in range(3))
    return grad, A, torch.tensor([1.0], device=target.device), weight


def _gate(shape: tuple[int, ...], target: Target) -> Race:
    def run(grad: Tensor, A: Tensor, moments: Tensor, weight: Tensor) -> Tensor:
        # gating again changes nothing, so the same gradient serves every round
        torch.ops.ghl.gate_(grad, A, moments, weight, *RULE)
        return grad

    return Race(
        suite="epilogue",
        case=f"gate {_name(shape)}",
        target=target,
        inputs=lambda: _sums(shape, target),
        expected=lambda grad, A, moments, weight: ghl.reference.gate(
            oja(A.double(), weight.double()), grad.double()
        ),
        contenders=[
            Contender("B13", lambda grad, A, m, weight: epilogue.gate(grad, A, weight), baseline="B13"),
            *ours(target, run),
        ],
        reference="B13",
        work=work.gate(math.prod(shape)),
        tolerance=TOLERANCE,
    )


def _learn(shape: tuple[int, ...], target: Target) -> Race:
    def run(grad: Tensor, A: Tensor, moments: Tensor, weight: Tensor) -> Tensor:
        torch.ops.ghl.learn_(weight, A, moments, LR, *RULE)
        return weight

    return Race(
        suite="epilogue",
        case=f"learn {_name(shape)}",
        target=target,
        inputs=lambda: _sums(shape, target),
        expected=lambda grad, A, moments, weight: weight.double() + LR * oja(A.double(), weight.double()),
        contenders=[
            Contender("stock", lambda grad, A, m, weight: weight.add_(oja(A, weight), alpha=LR)),
            *ours(target, run),
        ],
        reference="stock",
        work=work.learn(math.prod(shape)),
        tolerance=TOLERANCE,
    )


def _step(target: Target) -> Race:
    layers = len(SHAPES)

    def inputs() -> tuple[Tensor, ...]:
        columns = zip(*(_sums(shape, target, seed) for seed, shape in enumerate(SHAPES)), strict=True)
        return tuple(tensor for column in columns for tensor in column)

    def split(tensors: tuple[Tensor, ...]) -> list[list[Tensor]]:
        """grads, A, moments, weights."""
        return [list(tensors[i * layers : (i + 1) * layers]) for i in range(4)]

    def expected(*tensors: Tensor) -> tuple[Tensor, ...]:
        stepped = []
        for G, A, _, W in zip(*split(tuple(tensor.double() for tensor in tensors)), strict=True):
            stepped.append(W - LR * (ghl.reference.gate(oja(A, W), G) + DECAY * W))
        return tuple(stepped)

    def rival(*tensors: Tensor) -> list[Tensor]:
        grads, A, _, weights = split(tensors)
        epilogue.step_(weights, A, grads, LR, DECAY)
        return weights

    def run(*tensors: Tensor) -> list[Tensor]:
        grads, A, moments, weights = split(tensors)
        rules = [[value] * layers for value in (*RULE, "sign")]
        begins = [False] * layers
        torch.ops.ghl.gated_sgd_(
            weights, [], grads, A, moments, begins, *rules, LR, 0.0, 0.0, DECAY, False, False
        )
        return weights

    return Race(
        suite="epilogue",
        case="step DeepHebb",
        target=target,
        inputs=inputs,
        expected=expected,
        contenders=[Contender("B13", rival, baseline="B13"), *ours(target, run)],
        reference="B13",
        work=work.step(sum(map(math.prod, SHAPES))),
        tolerance=TOLERANCE,
    )


def _name(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
