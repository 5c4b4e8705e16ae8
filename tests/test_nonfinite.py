"""NaN and inf are never hidden, and signed zeros, denormals and ties are nothing special."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import ghl_kernels as ghl
from ghl_kernels import HebbianRule, functional, reference

pytestmark = pytest.mark.usefixtures("poison")

NAN, INF = math.nan, math.inf
BAD = [NAN, INF, -INF]
RULES = [
    HebbianRule(),
    HebbianRule(winners=1),
    HebbianRule(winners=5, losers="anti", decay="instar"),
    HebbianRule.kwta(2),
    HebbianRule(activity="linear", decay="none"),
    HebbianRule(activity="relu", decay="subspace"),
    HebbianRule(activity="binary", winners=1, decay="sanger"),
]


def same_with_nan(actual: Tensor, expected: Tensor) -> bool:
    return torch.equal(actual.isnan(), expected.isnan()) and torch.equal(
        actual.nan_to_num(), expected.nan_to_num()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("where", [0, 5, 16, 36])
@pytest.mark.parametrize("layout", ["rows", "planes"])
def test_a_nan_makes_its_position_nan(
    backend: str, dtype: torch.dtype, rule: HebbianRule, where: int, layout: str
) -> None:
    u = torch.randn(7, 37)
    u[2, where] = NAN
    u[4] = NAN
    u = u.to(dtype)
    y = (
        functional.compete(u, rule)
        if layout == "rows"
        else functional.compete(u.t().contiguous(), rule, 0).t()
    )
    bad = torch.zeros(7, dtype=torch.bool)
    bad[[2, 4]] = True
    assert torch.equal(y.isnan(), bad.unsqueeze(1).expand(7, 37))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["rows", "planes"])
def test_a_nan_among_many_winners(backend: str, dtype: torch.dtype, layout: str) -> None:
    """A threshold that is searched for step by step is found, in the other positions too."""
    u = torch.randn(18, 131).to(dtype)
    u[2, 0] = u[5, 130] = u[17, 64] = NAN
    u[9] = NAN
    for winners in (65, 90, 130):
        rule = HebbianRule.kwta(winners)
        across = u.t().contiguous() if layout == "planes" else u
        y = functional.compete(across, rule, 0 if layout == "planes" else 1)
        expected = reference.compete(u, rule)
        assert same_with_nan(y.t() if layout == "planes" else y, expected)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("values", [[INF], [-INF], [INF, INF], [INF, -INF], [-INF] * 37])
@pytest.mark.parametrize("layout", ["rows", "planes"])
def test_infinite_responses(backend: str, rule: HebbianRule, values: list[float], layout: str) -> None:
    """As the reference has it: softmax of an infinity is NaN where inf - inf is, and 0 at -inf."""
    u = torch.randn(5, 37)
    u[1, 3 : 3 + len(values)] = torch.tensor(values)[: 37 - 3]
    if len(values) == 37:
        u[1] = -INF
    y = (
        functional.compete(u, rule)
        if layout == "rows"
        else functional.compete(u.t().contiguous(), rule, 0).t()
    )
    expected = reference.compete(u.double(), rule).float()
    assert torch.equal(y.isnan(), expected.isnan())
    torch.testing.assert_close(y, expected, equal_nan=True, rtol=1e-5, atol=1e-6)


@pytest.mark.broad
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("sums_at", ["forward", "backward"])
@pytest.mark.parametrize("kind", ["Linear", "Conv2d"])
def test_a_bad_input_reaches_the_gradient(
    backend: str, bad: float, rule: HebbianRule, sums_at: str, kind: str
) -> None:
    if kind == "Linear":
        layer = ghl.GHLLinear(7, 37, rule=rule, sums_at=sums_at)
        x = torch.randn(5, 7)
    else:
        layer = ghl.GHLConv2d(3, 37, 3, rule=rule, sums_at=sums_at)
        x = torch.randn(2, 3, 6, 5)
    x.flatten()[9] = bad
    layer(x).nan_to_num().sum().backward()
    # the layer norm makes one scope of the whole layer
    assert layer.weight.grad.isnan().all()


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("winners", [None, 1])
def test_a_bad_output_gradient_reaches_its_row(backend: str, bad: float, winners: int | None) -> None:
    """G of one unit is not finite: that row is NaN, and only that."""
    layer = ghl.GHLLinear(7, 37, rule=HebbianRule(winners=winners))
    x = torch.randn(5, 7)
    grad_u = torch.randn(5, 37)
    grad_u[2, 11] = bad
    layer(x).backward(grad_u)
    nans = torch.zeros(37, 7, dtype=torch.bool)
    nans[11] = True
    assert torch.equal(layer.weight.grad.isnan(), nans)


@pytest.mark.broad
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("normalize", ["layer", "filter", "mean", "none"])
@pytest.mark.parametrize("decay", ["none", "oja", "instar", "subspace", "sanger"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_bad_sum_reaches_the_gradient(
    backend: str, bad: float, normalize: str, decay: str, dtype: torch.dtype
) -> None:
    """gate_, delta and learn_ with an A that is not finite do what the formulas do."""
    sums = torch.promote_types(dtype, torch.float32)
    A, weight, grad = (
        torch.randn(5, 19, dtype=sums),
        torch.randn(5, 19).to(dtype),
        torch.randn(5, 19).to(dtype),
    )
    A[3, 17] = bad
    moments = torch.rand({"instar": 6, "subspace": 26, "sanger": 26}.get(decay, 1), dtype=sums)
    H = torch.ops.ghl.delta(A, moments, weight, 1, decay, normalize)
    scope = torch.zeros(5, 19, dtype=torch.bool)
    if normalize == "layer":
        scope[:] = True
    elif normalize == "filter" or decay == "oja":
        scope[3] = True  # <W, A> of the row is not finite
    else:
        scope[3, 17] = True
    assert torch.equal(~H.isfinite(), scope)
    if normalize in ("layer", "filter"):
        assert torch.equal(H.isnan(), scope)
    gated = grad.clone()
    torch.ops.ghl.gate_(gated, A, moments, weight, 1, decay, normalize)
    assert torch.equal(~gated.isfinite(), scope)
    learned = weight.clone()
    torch.ops.ghl.learn_(learned, A, moments, 0.1, 1, decay, normalize)
    assert torch.equal(~learned.isfinite(), scope)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_signs(backend: str, dtype: torch.dtype) -> None:
    """sign(0) and sign(-0) are 0, a denormal has a sign, and what is not finite becomes NaN."""
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    grad = torch.tensor([[0.0, -0.0, tiny, -tiny, 3.0, -3.0, NAN, INF, -INF]], dtype=dtype)
    assert grad[0, 2] > 0
    A = torch.full((1, 9), -0.5, dtype=torch.promote_types(dtype, torch.float32))
    moments = torch.ones(1, dtype=A.dtype)
    torch.ops.ghl.gate_(grad, A, moments, torch.zeros(1, 9, dtype=dtype), 1, "none", "layer")
    expected = torch.tensor([[0.0, 0.0, 1.0, -1.0, 1.0, -1.0, NAN, NAN, NAN]], dtype=dtype)
    assert same_with_nan(grad, expected)


@pytest.mark.parametrize("normalize", ["layer", "filter"])
def test_zero_and_tiny_updates(backend: str, normalize: str) -> None:
    """H = 0 stays 0; below the 1e-30 of the denominator H fades out instead of blowing up."""
    weight, moments = torch.zeros(3, 5), torch.ones(1)
    for size, expected in ((0.0, 0.0), (1e-40, 1e-10), (1e-30, 0.5), (1e-20, 1.0), (1e30, 1.0)):
        A = torch.full((3, 5), size)
        H = torch.ops.ghl.delta(A, moments, weight, 1, "none", normalize)
        torch.testing.assert_close(H, torch.full((3, 5), expected), rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [1, 2, 18, 36])
def test_ties_zeros_and_denormals(backend: str, dtype: torch.dtype, k: int) -> None:
    """Exactly k winners, the lowest indices among equals; -0.0 equals 0.0; a denormal is above zero."""
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    constant = torch.full((37,), 2.5)
    zeros = torch.tensor([0.0, -0.0] * 18 + [0.0])
    denormal = torch.zeros(37)
    denormal[35] = tiny
    below = torch.full((37,), -tiny)
    below[30] = -0.0
    u = torch.stack([constant, zeros, denormal, below]).to(dtype)
    rule = HebbianRule(activity="binary", winners=k)
    lowest = torch.arange(37) < k
    but_one = torch.arange(37) < k - 1
    expected = torch.stack(
        [lowest, lowest, but_one | (torch.arange(37) == 35), but_one | (torch.arange(37) == 30)]
    )
    if k == 36:  # the first 35, then the odd one out, already in line or not
        expected[2] = torch.arange(37) < 36
        expected[3] = torch.arange(37) < 36
    for y in (functional.compete(u, rule), functional.compete(u.t().contiguous(), rule, 0).t()):
        assert torch.equal(y.bool(), expected)


def test_a_bad_sum_is_seen_in_step_mode(backend: str) -> None:
    """weight.grad is G then, which is finite; a bad A must show in it all the same, for GradScaler's eyes."""
    layer = ghl.GHLLinear(7, 5, gate_at="step")
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    ghl.StepGate(optimizer, layer)
    x = torch.randn(3, 7)
    (layer(x).sum() * 0.0).backward()
    assert layer.weight.grad.isfinite().all()
    optimizer.zero_grad()
    layer.bias.data[2] = NAN  # u and with it A is NaN, x is not, and this loss does not look at u
    u = layer(x)
    u.backward(torch.ones_like(u))
    assert layer.weight.grad.isnan().all()


def test_softmax_does_not_overflow(backend: str) -> None:
    u = torch.tensor([[1e4, 1e4 - 1, -1e4], [3e38, -3e38, 0.0], [-3e38, -3e38, -3e38]])
    for rule in (HebbianRule(), HebbianRule(winners=2), HebbianRule(temperature=4.0)):
        y = functional.compete(u, rule)
        assert y.isfinite().all()
        expected = reference.compete(u.double(), rule).float()
        if backend in ("triton", "cuda"):
            # a logsumexp in one float32 number is exact to as many roundings as it is large
            torch.testing.assert_close(y[:1], expected[:1], rtol=1e4 * torch.finfo(u.dtype).eps, atol=1e-7)
        else:
            torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-7)
