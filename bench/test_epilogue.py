"""From A to the gated gradient and to the learned weight (Oja decay, layer norm), on DeepHebb's weights.

The rival is the ``eager`` backend: the same formula as a chain of torch operators.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import ghl_kernels as ghl
from bench.parity import assert_close
from bench.shapes import DEEPHEBB, ConvShape

RULE = (1, "oja", "layer")  # groups, decay, normalize
TOLERANCE = 1e-5


def sums(shape: ConvShape) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """grad, A, moments, weight."""
    generator = torch.Generator().manual_seed(0)
    grad, A, weight = (torch.randn(shape.weight_shape, generator=generator) for _ in range(3))
    return grad, A, torch.tensor([float(shape.batch * shape.size**2)]), weight


def expected_delta(A: Tensor, weight: Tensor) -> Tensor:
    W, A = weight.double().flatten(1), A.double().flatten(1)
    H = A - (W * A).sum(1, keepdim=True) * W
    return (H / (H.abs().max() + 1e-30)).view(weight.shape)


@pytest.mark.parametrize("shape", DEEPHEBB, ids=str)
class TestEpilogue:
    def test_gate(self, benchmark, backend: str, shape: ConvShape) -> None:
        grad, A, moments, weight = sums(shape)
        expected = ghl.reference.gate(expected_delta(A, weight), grad.double())
        # Gating again changes nothing, so the same gradient serves every round.
        torch.ops.ghl.gate_(grad, A, moments, weight, *RULE)
        assert_close("gate_", grad, expected, TOLERANCE)
        benchmark.group = f"gate {shape}"
        benchmark(torch.ops.ghl.gate_, grad, A, moments, weight, *RULE)

    def test_learn(self, benchmark, backend: str, shape: ConvShape) -> None:
        _, A, moments, weight = sums(shape)
        expected = weight.double() + 0.5 * expected_delta(A, weight)
        learned = weight.clone()
        torch.ops.ghl.learn_(learned, A, moments, 0.5, *RULE)
        assert_close("learn_", learned, expected, TOLERANCE)
        benchmark.group = f"learn {shape}"
        # A rate of 0 costs the same and leaves the weight as it is from round to round.
        benchmark(torch.ops.ghl.learn_, weight, A, moments, 0.0, *RULE)
