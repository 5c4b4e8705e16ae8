"""What a backend seldom meets: activities that a dtype hardly holds, no units, inputs of padding alone."""

from __future__ import annotations

import pytest
import torch

from ghl_kernels import HebbianRule, functional, reference

pytestmark = pytest.mark.usefixtures("poison")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", [
    HebbianRule(temperature=0.25, normalize="filter"),
    HebbianRule(temperature=0.25, normalize="filter", winners=10),
    HebbianRule(temperature=0.25, normalize="filter", decay="instar"),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("kind", ["linear", "conv", "few channels"])
def test_a_unit_that_is_hardly_active(backend: str, kind: str, rule: HebbianRule, dtype: torch.dtype) -> None:
    """Activities of 1e-9 to 1e-5, which float16 holds with few bits or none, are all that a row has."""
    torch.manual_seed(0)
    channels = {"linear": 32, "conv": 8, "few channels": 3}[kind]
    if kind == "linear":
        x, u, w = torch.randn(64, channels), torch.randn(64, 16) / 4, torch.randn(16, channels)
    else:
        x, u = torch.randn(4, channels, 6, 6), torch.randn(4, 16, 4, 4) / 4
        w = torch.randn(16, channels, 3, 3)
        x = x.to(memory_format=torch.channels_last)
    u[:, 3] -= 4.0
    if rule.winners is not None:
        u[:, 6:] -= 20.0  # so that it is among the winners
    x, u, w = x.to(dtype), u.to(dtype), w.to(dtype)
    delta = functional.linear_delta if kind == "linear" else functional.conv_delta
    judge = reference.linear_delta if kind == "linear" else reference.conv_delta
    expected = judge(x.double(), u.double(), w.double(), rule)
    error = (delta(x, u, w, rule).double() - expected).flatten(1).abs().amax(1)
    assert expected[3].abs().max() > 0.99
    assert error.max() < (4e-3 if dtype == torch.float16 else 3e-2)


@pytest.mark.parametrize("temperature", [1e-3, 1e-5, 3e-7])
@pytest.mark.parametrize("units", [32, 200])
def test_float16_at_low_temperature(backend: str, units: int, temperature: float) -> None:
    """One unit is active, by exactly 1, where u / temperature is rounded by more than 1."""
    torch.manual_seed(0)
    x, u, w = torch.randn(64, 16), torch.randn(64, units), torch.randn(units, 16)
    u[:, 3] = torch.linspace(30, 60, 64)
    x, u, w = x.half(), u.half(), w.half()
    rule = HebbianRule(temperature=temperature)
    expected = reference.linear_delta(x.double(), u.double(), w.double(), rule)
    actual = functional.linear_delta(x, u, w, rule)
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(5, 0), (0, 0), (2, 0, 3, 3)])
def test_no_units(backend: str, shape: tuple[int, ...]) -> None:
    for rule in (HebbianRule(), HebbianRule(activity="relu")):
        assert functional.compete(torch.empty(shape), rule, 1).shape == shape


@pytest.mark.parametrize("rule", [
    HebbianRule.instar(), HebbianRule(decay="subspace"), HebbianRule(), HebbianRule.instar(winners=1)
], ids=str)  # fmt: skip
def test_an_input_that_is_all_padding(backend: str, rule: HebbianRule) -> None:
    """A is 0, and the decay is that of y."""
    torch.manual_seed(0)
    x, u, w = torch.empty(2, 3, 0, 5), torch.randn(2, 4, 2, 7), torch.randn(4, 3, 3, 3)
    expected = reference.conv_delta(x.double(), u.double(), w.double(), rule, padding=2)
    actual = functional.conv_delta(x, u, w, rule, padding=2)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-6)
