"""The softmax activity over channels, against torch.softmax; and the softmax of the winners alone."""

from __future__ import annotations

import pytest
import torch

import ghl_kernels as ghl
from bench.parity import assert_close
from bench.shapes import DEEPHEBB, MEMORY_FORMATS, ConvShape, conv_tensors

TOLERANCE = 1e-5


@pytest.mark.parametrize("memory_format", MEMORY_FORMATS)
@pytest.mark.parametrize("shape", DEEPHEBB, ids=str)
class TestSoftmax:
    def test_ghl(self, benchmark, backend: str, shape: ConvShape, memory_format: str) -> None:
        _, u, _ = conv_tensors(shape, memory_format)
        rule = ghl.HebbianRule.ghl()
        y = ghl.functional.compete(u, rule, dim=1)
        assert_close("softmax", y, ghl.reference.compete(u.double(), rule, dim=1), TOLERANCE)
        benchmark.group = f"softmax {shape} {memory_format}"
        benchmark(ghl.functional.compete, u, rule, dim=1)

    def test_torch(self, benchmark, shape: ConvShape, memory_format: str) -> None:
        _, u, _ = conv_tensors(shape, memory_format)
        expected = ghl.reference.compete(u.double(), ghl.HebbianRule.ghl(), dim=1)
        assert_close("torch.softmax", torch.softmax(u, 1), expected, TOLERANCE)
        benchmark.group = f"softmax {shape} {memory_format}"
        benchmark(torch.softmax, u, 1)

    def test_winners_only(self, benchmark, backend: str, shape: ConvShape, memory_format: str) -> None:
        _, u, _ = conv_tensors(shape, memory_format)
        rule = ghl.HebbianRule(winners=0.02)
        y = ghl.functional.compete(u, rule, dim=1)
        assert_close("winners' softmax", y, ghl.reference.compete(u, rule, dim=1), TOLERANCE)
        benchmark.group = f"softmax of 2% winners {shape} {memory_format}"
        benchmark(ghl.functional.compete, u, rule, dim=1)
