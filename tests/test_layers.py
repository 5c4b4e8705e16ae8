"""The layers: torch's forward, input and bias gradient bit for bit, and the rule's weight gradient."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import io
import itertools
import pickle
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import LAYOUTS, Judgement, assert_as_good, assert_gated, embed, judge_delta, padded_input
from strategies import LayerCase, crossover, layer_cases
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations, parametrize, prune

import ghl_kernels as ghl
from ghl_kernels import HebbianRule, _dispatch, functional, reference
from ghl_kernels.backends import eager

pytestmark = [
    pytest.mark.usefixtures("poison"),
    # torch's own remark on padding="same" with even kernels, which are tested on purpose
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning"),
]

KINDS = ("Linear", "Conv1d", "Conv2d", "Conv3d")
G_RULE = HebbianRule(activity="linear", decay="none", normalize="none")
sums_at = st.sampled_from(("forward", "backward"))


def make(
    kind: str, rule: HebbianRule | None = None, *, units: int = 11, **options: Any
) -> tuple[nn.Module, nn.Module, Tensor]:
    """A torch layer, ours with the same parameters, and an input."""
    sizes = (7, units) if kind == "Linear" else (6, units, 3)
    plain = getattr(nn, kind)(*sizes)
    ours = getattr(ghl, f"GHL{kind}")(*sizes, rule=rule, **options)
    ours.load_state_dict(plain.state_dict())
    dims = 0 if kind == "Linear" else int(kind[4])
    return plain, ours, torch.randn(5, sizes[0], *(4 + i for i in range(dims)))


def run(layer: nn.Module, x: Tensor, grad_u: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Output, input gradient and bias gradient of one pass; the weight's gradient is left in the layer."""
    layer.zero_grad()
    x = x.detach().requires_grad_()
    u = layer(x)
    u.backward(torch.ones_like(u) if grad_u is None else grad_u)
    return u.detach(), x.grad, None if layer.bias is None else layer.bias.grad


def assert_same_bits(actual: Tensor | None, expected: Tensor | None) -> None:
    if expected is None:
        assert actual is None
        return
    assert actual is not None
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[expected.element_size()]
    assert torch.equal(actual.contiguous().view(bits), expected.contiguous().view(bits))


def judge_layer(
    layer: nn.Module, x: Tensor, u: Tensor, grad_u: Tensor, rule: HebbianRule
) -> tuple[Judgement, Tensor, Tensor]:
    """H, and G with the sum of the absolute values of its terms, for the layer's own u."""
    weight = layer.weight.detach()
    if isinstance(layer, nn.Linear):
        delta, arguments, dim = reference.linear_delta, {}, -1
    else:
        delta, dim = reference.conv_delta, 1
        arguments = {"stride": layer.stride, "dilation": layer.dilation, "groups": layer.groups}
        x = padded_input(layer, x)
        u, grad_u = (t if t.dim() == x.dim() else t.unsqueeze(0) for t in (u, grad_u))
    exact, grad_u = x.detach().double(), grad_u.double()
    G = delta(exact, grad_u, weight.double(), G_RULE, **arguments)
    magnitude = delta(exact.abs(), grad_u.abs(), weight.double(), G_RULE, **arguments)
    return judge_delta(delta, x, u, weight, rule, dim, **arguments), G, magnitude


def assert_weight_grad(
    layer: nn.Module, x: Tensor, u: Tensor, grad_u: Tensor, rule: HebbianRule, G_dtype: torch.dtype
) -> None:
    judgement, G, magnitude = judge_layer(layer, x, u, grad_u, rule)
    grad = layer.weight.grad
    assert grad.dtype == layer.weight.dtype
    if grad.dtype in (torch.float16, torch.bfloat16):
        # what the parameter's dtype can hold: half a unit in the last place, and the smallest number
        info = torch.finfo(grad.dtype)
        rounding = judgement.oracle.abs() * info.eps / 2 + info.smallest_normal * info.eps
        judgement = judgement._replace(floor=judgement.floor + rounding)
    if rule.gate == "none":
        assert_as_good(grad, -judgement.eager, -judgement.oracle, judgement.floor)
    else:
        assert_gated(grad, judgement, G, magnitude, torch.finfo(G_dtype).eps)


# --- against torch's layers and the reference ---------------------------------------------------


def _fits(case: LayerCase) -> bool:
    """float16 cannot hold unnormalised sums with certainty."""
    return not (case.dtype == torch.float16 and case.rule.normalize == "none")


@given(case=layer_cases().filter(_fits), sums_at=sums_at)
@settings(max_examples=2 * settings.default.max_examples)
def test_layer(backend: str, case: LayerCase, sums_at: str) -> None:
    plain, ours = case.layers(sums_at=sums_at)
    x = case.x()
    before = x.clone()
    grad_u = case.grad_u(plain(x))
    with crossover(case.path):
        expected, actual = run(plain, x, grad_u), run(ours, x, grad_u)
    for ours_, torch_ in zip(actual, expected, strict=True):
        assert_same_bits(ours_, torch_)
    assert torch.equal(x, before)
    assert_weight_grad(ours, x, actual[0], grad_u, case.rule, case.dtype)


@pytest.mark.broad
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sums_at", ["forward", "backward"])
@pytest.mark.parametrize("rule", [HebbianRule(), HebbianRule.kwta(2), HebbianRule(decay="instar")], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_three_by_three(
    backend: str, rule: HebbianRule, sums_at: str, bias: bool, memory_format: torch.memory_format
) -> None:
    """The convolution of which the CPU's kernels sum A, and G without a bias gradient, in a short form."""
    plain = nn.Conv2d(20, 18, 3, padding=(1, 0), bias=bias)
    ours = ghl.GHLConv2d(20, 18, 3, padding=(1, 0), bias=bias, rule=rule, sums_at=sums_at)
    ours.load_state_dict(plain.state_dict())
    x = torch.randn(3, 20, 8, 7).contiguous(memory_format=memory_format)
    grad_u = torch.randn_like(plain(x))
    for ours_, torch_ in zip(run(ours, x, grad_u), run(plain, x, grad_u), strict=True):
        assert_same_bits(ours_, torch_)
    assert_weight_grad(ours, x, plain(x).detach(), grad_u, rule, torch.float32)


@pytest.mark.parametrize("positions", [4, 81, 400])
def test_gradients_that_are_expanded(backend: str, positions: int) -> None:
    """As of a sum: one number in memory, whatever the shape."""
    layer = ghl.GHLConv2d(16, 16, 3, padding=1, bias=False, rule=HebbianRule.ghl())
    x = torch.randn(2, 16, 1, positions)
    grad_u = torch.ones(1).expand(2, 16, 1, positions)
    run(layer, x, grad_u)
    assert_weight_grad(layer, x, layer(x).detach(), grad_u, layer.rule, torch.float32)


def test_products_that_are_zero_leave_no_sign(backend: str) -> None:
    """Where no position that a weight sees has both x and dL/du, though its neighbors' do."""
    layer = ghl.GHLConv2d(16, 16, 3, bias=False)
    x, grad_u = torch.zeros(1, 16, 10, 10), torch.zeros(1, 16, 8, 8)
    x[:, :, 2:4, 2], grad_u[:, :, 2, 0:2] = torch.randn(16, 2), torch.randn(16, 2)
    layer(x).backward(grad_u)
    G = torch.nn.grad.conv2d_weight(x, layer.weight.shape, grad_u)
    assert 0 < (G == 0).sum() < G.numel()
    assert not layer.weight.grad[G == 0].any()
    assert (layer.weight.grad[G != 0].sign() == G[G != 0].sign()).all()


@pytest.mark.parametrize("bias", [True, False])
def test_the_short_form_of_g_is_for_layers_without_a_bias_gradient(
    monkeypatch: pytest.MonkeyPatch, bias: bool
) -> None:
    calls = []
    real = eager.conv_grad
    monkeypatch.setattr(eager, "conv_grad", lambda *arguments: calls.append(1) or real(*arguments))
    layer = ghl.GHLConv2d(16, 16, 3, bias=bias)
    for backend_, expected in (("auto", not bias), ("eager", False)):
        calls.clear()
        with ghl.use_backend(backend_):
            layer(torch.randn(2, 16, 9, 9)).sum().backward()
        assert bool(calls) == expected


@pytest.mark.parametrize("slow", [True, False])
@pytest.mark.parametrize("sums_at", ["forward", "backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "expanded"])
def test_linear_with_the_kernel_of_rows_and_without(
    monkeypatch: pytest.MonkeyPatch, slow: bool, sums_at: str, dtype: torch.dtype, layout: str
) -> None:
    monkeypatch.setattr(_dispatch, "HAS_SLOW_PRODUCTS", slow)
    layer = ghl.GHLLinear(384, 360, sums_at=sums_at, dtype=dtype)
    x, grad_u = torch.randn(70, 384).to(dtype), torch.randn(70, 360).to(dtype)
    if layout == "transposed":
        x, grad_u = x.t().contiguous().t(), grad_u.t().contiguous().t()
    elif layout == "expanded":
        grad_u = grad_u[:1].expand(70, -1)
    run(layer, x, grad_u)
    assert_weight_grad(layer, x, layer(x).detach(), grad_u, layer.rule, dtype)


def test_16_bit_sums_in_blocks_with_the_kernel_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "HAS_SLOW_PRODUCTS", True)
    x, u = torch.randn(500, 100).bfloat16(), torch.randn(500, 80).bfloat16()
    whole = torch.ops.ghl.linear_sums(x, u, "softmax", 0, 1.0, True, "oja")
    monkeypatch.setattr(eager, "_BLOCK_BYTES", 4 * 180 * 137)
    in_blocks = torch.ops.ghl.linear_sums(x, u, "softmax", 0, 1.0, True, "oja")
    torch.testing.assert_close(in_blocks, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.broad
@pytest.mark.parametrize("shape", [(1,), (7,), (5, 7), (64, 33), (5, 1), (2, 3, 7), (1, 3, 7), (2, 2, 2, 33)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_linear_bits(backend: str, shape: tuple[int, ...], dtype: torch.dtype, bias: bool) -> None:
    """Every pair of layouts: torch picks the order of products and sums by the strides of x."""
    plain, ours = nn.Linear(shape[-1], 13, bias, dtype=dtype), ghl.GHLLinear(shape[-1], 13, bias, dtype=dtype)
    ours.load_state_dict(plain.state_dict())
    for layout, grad_layout in itertools.product(LAYOUTS, LAYOUTS):
        x = embed(torch.randn(shape).to(dtype), layout)
        grad_u = embed(torch.randn(*shape[:-1], 13).to(dtype), grad_layout)
        for actual, expected in zip(run(ours, x, grad_u), run(plain, x, grad_u), strict=True):
            assert_same_bits(actual, expected)


# (channels, units, groups, spatial size): a dimension of size 1 may have any stride, and a library takes the
# order of its result from it.
SINGLE = [(1, 16, 1, (9, 8)), (3, 1, 1, (8, 8)), (2, 1, 1, (7, 6)), (6, 6, 6, (7, 6)), (1, 8, 1, (5, 6, 7))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("last", [(True, True), (True, False), (False, True)], ids=str)
@pytest.mark.parametrize(("channels", "units", "groups", "size"), SINGLE)
@pytest.mark.parametrize("batch", [1, 4])
def test_convolution_bits_where_a_dimension_is_single(
    batch: int,
    channels: int,
    units: int,
    groups: int,
    size: tuple[int, ...],
    last: tuple[bool, bool],
    dtype: torch.dtype,
) -> None:
    kind, options = f"Conv{len(size)}d", {"padding": 1, "groups": groups, "dtype": dtype}
    layouts = {2: torch.channels_last, 3: torch.channels_last_3d}
    of_weight, of_x = (layouts[len(size)] if is_last else torch.contiguous_format for is_last in last)
    plain = getattr(nn, kind)(channels, units, 3, **options).to(memory_format=of_weight)
    ours = getattr(ghl, f"GHL{kind}")(channels, units, 3, **options).to(memory_format=of_weight)
    ours.load_state_dict(plain.state_dict())
    x = torch.randn(batch, channels, *size).to(dtype).contiguous(memory_format=of_x)
    for actual, expected in zip(run(ours, x), run(plain, x), strict=True):
        assert_same_bits(actual, expected)
        assert actual.stride() == expected.stride()


@given(case=layer_cases().filter(lambda case: case.dtype == torch.float32), sums_at=sums_at)
def test_autocast(backend: str, case: LayerCase, sums_at: str) -> None:
    """bfloat16 products and float32 sums; the decay takes the float32 weight."""
    plain, ours = case.layers(sums_at=sums_at)
    x = case.x()
    with torch.autocast("cpu", torch.bfloat16), crossover(case.path):
        u = plain(x)
        assert u.dtype == torch.bfloat16
        grad_u = dataclasses.replace(case, dtype=torch.bfloat16).grad_u(u)
        expected, actual = run(plain, x, grad_u), run(ours, x, grad_u)
    for ours_, torch_ in zip(actual, expected, strict=True):
        assert_same_bits(ours_, torch_)
    assert_weight_grad(ours, x.to(torch.bfloat16), actual[0], grad_u, case.rule, torch.bfloat16)


@pytest.mark.broad
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("winners", [None, 1])
def test_only_what_is_asked_for_is_computed(backend: str, kind: str, winners: int | None) -> None:
    _, ours, x = make(kind, HebbianRule(winners=winners))
    ours(x).sum().backward()
    first = ours.weight.grad.clone()
    assert x.grad is None
    ours.zero_grad()
    ours.bias.requires_grad_(False)
    ours(x).sum().backward()
    assert ours.bias.grad is None
    assert torch.equal(ours.weight.grad, first)
    (grad,) = torch.autograd.grad(ours(x).sum(), ours.weight)
    assert torch.equal(grad, first)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_accumulate_over_passes(backend: str, kind: str) -> None:
    _, ours, x = make(kind)
    run(ours, x)
    first = ours.weight.grad.clone()
    ours(x).sum().backward()
    assert torch.equal(ours.weight.grad, 2 * first)
    ours.zero_grad()
    u = ours(x)
    u.sum().backward(retain_graph=True)
    u.sum().backward()
    assert torch.equal(ours.weight.grad, 2 * first)


def test_layers_in_a_network(backend: str) -> None:
    """Every layer's gradient, where each one's dL/du comes from the next."""
    model = nn.Sequential(
        ghl.GHLConv2d(3, 8, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Flatten(),
        ghl.GHLLinear(128, 5),
    )
    twin = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 5)
    )
    twin.load_state_dict(model.state_dict())
    x, target = torch.randn(6, 3, 8, 8), torch.randint(5, (6,))
    for network in (model, twin):
        nn.functional.cross_entropy(network(x), target).backward()
    assert torch.equal(model[0].bias.grad, twin[0].bias.grad)
    H = reference.conv_delta(x, model[0](x).detach(), twin[0].weight.detach(), HebbianRule(), padding=1)
    torch.testing.assert_close(model[0].weight.grad, H.abs() * twin[0].weight.grad.sign())


# --- what follows the layer ---------------------------------------------------------------------


@pytest.mark.broad
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", [HebbianRule(), HebbianRule.kwta(1), HebbianRule(winners=1)], ids=str)
@pytest.mark.parametrize("shape", ["batch", "unbatched", "leading", "strided"])
def test_in_place_consumers(backend: str, kind: str, rule: HebbianRule, shape: str) -> None:
    plain, ours, x = make(kind, rule)
    if shape == "unbatched":
        x = x[0]
    elif kind == "Linear" and shape != "batch":
        x = torch.randn(3, 5, 7) if shape == "leading" else torch.randn(5, 3, 7).transpose(0, 1)
    elif shape == "strided":
        x = torch.randn(2 * x.shape[0], *x.shape[1:])[::2]
    skip = torch.randn_like(plain(x))
    wanted = plain(x).detach()

    def through(layer: nn.Module, consume: Any) -> tuple[Tensor, Tensor, Tensor]:
        layer.zero_grad()
        inputs = x.clone().requires_grad_()
        out = consume(layer(inputs))
        out.square().sum().backward()
        return out.detach(), inputs.grad, layer.weight.grad

    def add(out: Tensor) -> Tensor:
        out += skip
        return out

    for consume in (nn.ReLU(inplace=True), add):
        out, grad_x, weight_grad = through(ours, consume)
        expected = through(plain, consume)
        assert torch.equal(out, expected[0])
        assert torch.equal(grad_x, expected[1])
        grad_u = 2 * out if consume is add else 2 * out * (wanted > 0)
        judgement, G, magnitude = judge_layer(plain, x, wanted, grad_u, rule)
        assert_gated(weight_grad, judgement, G, magnitude, torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("kind", KINDS)
def test_u_that_is_kept_must_not_change(backend: str, kind: str) -> None:
    _, ours, x = make(kind, HebbianRule(), sums_at="backward")
    u = ours(x)
    out = nn.functional.relu(u, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.broad
@pytest.mark.parametrize("kind", KINDS)
def test_few_winners_are_kept_instead_of_u(backend: str, kind: str) -> None:
    """Whatever sums_at says: the output may change in place."""
    _, ours, x = make(kind, HebbianRule.kwta(1), units=40, sums_at="backward")
    run(ours, x)
    expected = ours.weight.grad.clone()
    ours.zero_grad()
    ours(x).mul_(1.0).sum().backward()
    assert torch.equal(ours.weight.grad, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gate", ["sign", "none"])
def test_double_backward_raises(backend: str, kind: str, gate: str) -> None:
    _, ours, x = make(kind, HebbianRule(gate=gate))
    x.requires_grad_()
    u = ours(x)
    grads = torch.autograd.grad(u.square().sum(), [x, ours.weight], create_graph=True)
    for grad in grads:
        with pytest.raises(RuntimeError, match="no second derivatives"):
            grad.sum().backward(retain_graph=True)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_a_linear_loss_have_no_derivative_either(backend: str, kind: str) -> None:
    """dL/du needs no gradient then, but the weight does, which dL/dx depends on."""
    _, ours, x = make(kind)
    (grad_x,) = torch.autograd.grad(ours(x.requires_grad_()).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        grad_x.square().sum().backward()


def test_second_derivatives_by_function_transforms_raise() -> None:
    layer, x = ghl.GHLLinear(5, 4), torch.randn(3, 5)
    parameters = {name: parameter.detach() for name, parameter in layer.named_parameters()}

    def loss(x: Tensor) -> Tensor:
        return layer(x).tanh().sum()

    def loss_of(parameters: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    def after_a_step(parameters: dict[str, Tensor], detach: bool) -> Tensor:
        grads = torch.func.grad(loss_of)(parameters)
        return loss_of({n: p - (grads[n].detach() if detach else grads[n]) for n, p in parameters.items()})

    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.func.grad(lambda z: torch.func.grad(loss)(z).square().sum())(x)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.func.grad(after_a_step)(parameters, False)
    grads = torch.func.grad(after_a_step)(parameters, True)  # of first order
    assert all(grad.any() for grad in grads.values())


def test_jacobian_of_the_input() -> None:
    plain, ours, x = make("Linear")
    torch.testing.assert_close(torch.func.jacrev(ours)(x), torch.func.jacrev(plain)(x))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gate", ["sign", "none"])
def test_an_output_whose_gradient_is_undefined_has_no_part(backend: str, kind: str, gate: str) -> None:
    class Drop(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, u: Tensor, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
            return None, grad

    _, ours, x = make(kind, HebbianRule(gate=gate))
    Drop.apply(ours(x.requires_grad_()), x).sum().backward()
    assert ours.weight.grad is None


# --- when a layer is its torch layer ------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["eval", "no_grad", "inference", "frozen"])
def test_plain_layer_when_not_learning(
    backend: str, kind: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, ours, x = make(kind)

    def refuse(*_: Any) -> None:
        raise AssertionError("the rule ran")

    monkeypatch.setattr(ours, "_apply_rule", refuse)
    if how in ("no_grad", "inference"):
        with torch.no_grad() if how == "no_grad" else torch.inference_mode():
            assert torch.equal(ours(x), plain(x))
            assert not ours(x).requires_grad
        return
    if how == "eval":
        ours.eval()
    else:
        ours.weight.requires_grad_(False)
        plain.weight.requires_grad_(False)
    for actual, expected in zip(run(ours, x), run(plain, x), strict=True):
        assert_same_bits(actual, expected)
    if how == "frozen":
        assert ours.weight.grad is None
    else:
        assert torch.equal(ours.weight.grad, plain.weight.grad)


# --- learning in place --------------------------------------------------------------------------


@given(case=layer_cases(gate="none").filter(_fits))
def test_learn(backend: str, case: LayerCase) -> None:
    plain, ours = case.layers()
    x = case.x()
    with torch.no_grad():
        u = plain(x)
    before, version = ours.weight.detach().clone(), ours.weight._version
    lr = 0.5
    with crossover(case.path):
        returned = ours.learn_(x, lr)
    assert_same_bits(returned, u)
    assert not returned.requires_grad
    assert ours.weight.grad is None
    assert ours.weight._version > version
    judgement, _, _ = judge_layer(plain, x, u, u, case.rule)
    weight = before.double()
    rounding = torch.finfo(torch.promote_types(case.dtype, torch.float32)).eps * weight.abs()
    assert_as_good(
        ours.weight.detach(),
        before.to(judgement.eager.dtype) + lr * judgement.eager,
        weight + lr * judgement.oracle,
        lr * judgement.floor
        + rounding
        + torch.finfo(case.dtype).eps / 2 * (weight + lr * judgement.oracle).abs(),
    )


@pytest.mark.broad
@pytest.mark.parametrize("kind", KINDS)
def test_learn_ignores_gate_mode_and_grad(backend: str, kind: str) -> None:
    plain, ours, x = make(kind)
    twins = [copy.deepcopy(ours) for _ in range(3)]
    twins[1].set_rule(HebbianRule(gate="none"), gate_at="step")
    twins[2].eval()
    for layer in (ours, *twins):
        assert torch.equal(layer.learn_(x.requires_grad_(), 0.1), plain(x))
        assert torch.equal(layer.weight, ours.weight)
        assert torch.equal(layer.bias, plain.bias)
    assert not torch.equal(ours.weight, plain.weight)


@pytest.mark.parametrize("kind", ["Linear", "Conv2d"])
@pytest.mark.parametrize("change", ["learn_", "optimizer"])
@pytest.mark.parametrize("is_narrow", [False, True], ids=["float32", "autocast"])
def test_weight_changed_between_forward_and_backward(
    backend: str, kind: str, change: str, is_narrow: bool
) -> None:
    """The version counter: a weight saved for backward must not change unseen."""
    _, ours, x = make(kind)
    with torch.autocast("cpu", torch.bfloat16, enabled=is_narrow):
        out = ours(x.requires_grad_())
    if change == "learn_":
        ours.learn_(x, 0.1)
    else:
        ours.weight.grad = torch.ones_like(ours.weight)
        torch.optim.SGD(ours.parameters(), lr=0.1).step()
    with pytest.raises(RuntimeError, match=r"^the weight was changed .* by learn_ or an optimizer; run"):
        out.sum().backward()


def test_other_tensors_changed_between_forward_and_backward() -> None:
    """torch's message, which says what they are: no weight."""
    _, ours, x = make("Linear")
    base = x.clone().requires_grad_().clone()
    for changed, used in ((x, x), (base, base.unbind()[0])):  # the latter is one of several views
        out = ours(used)
        with torch.no_grad():
            changed.add_(1)
        with pytest.raises(RuntimeError, match=r"modified (by an )?inplace"):
            out.sum().backward()


@pytest.mark.parametrize("lr", [float("nan"), float("inf"), np.float32("inf"), 10**400, -(10**400)])
def test_learn_refuses_a_learning_rate(backend: str, lr: float) -> None:
    _, ours, x = make("Linear")
    with pytest.raises(ValueError, match=re.escape(f"lr must be finite, got {lr!r}")):
        ours.learn_(x, lr)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", [np.float64, np.float32, np.float16])
def test_learning_rate_of_numpy(backend: str, kind: Any) -> None:
    _, ours, x = make("Linear")
    twin = copy.deepcopy(ours)
    ours.learn_(x, kind(0.125))
    twin.learn_(x, 0.125)
    assert torch.equal(ours.weight, twin.weight)


@pytest.mark.parametrize("lr", ["0.1", None, [0.1], 1j, torch.ones(2), np.ones(2), np.ones(1)])
def test_learning_rate_that_is_no_number(backend: str, lr: Any) -> None:
    _, ours, x = make("Linear")
    with pytest.raises(TypeError, match=re.escape(f"lr must be a real number, got {lr!r}")):
        ours.learn_(x, lr)


def test_learn_is_an_update_whatever_the_state_of_the_layer(backend: str) -> None:
    _, ours, x = make("Linear")
    twin = copy.deepcopy(ours).eval()
    twin.weight.requires_grad_(False)
    ours.learn_(x, 0.1)
    before = twin.weight.clone()
    twin.learn_(x, 0.1)
    assert not torch.equal(twin.weight, before)
    assert torch.equal(twin.weight, ours.weight)


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["forward", "learn_"])
def test_bad_input(backend: str, kind: str, method: str) -> None:
    _, ours, x = make(kind)

    def call(x: Any) -> None:
        ours.learn_(x, 0.1) if method == "learn_" else ours(x)

    with pytest.raises(TypeError, match=r"x must be a real floating-point tensor, got torch\.int64"):
        call(x.long())
    with pytest.raises(TypeError, match=r"got torch\.complex64"):
        call(x.to(torch.complex64))
    with pytest.raises(ValueError, match="x is a meta tensor"):
        call(x.to("meta"))
    with pytest.raises(TypeError, match="x must be a tensor, got list"):
        call([1.0])
    with pytest.raises(ValueError, match=r"x must be .*, got shape \(5, 3"):
        call(x[:, :3])
    if kind != "Linear":
        with pytest.raises(ValueError, match="x must be"):
            call(x[0, 0])


@pytest.mark.filterwarnings("ignore:.*(nested tensors is in prototype|support is in beta):UserWarning")
@pytest.mark.parametrize("method", ["forward", "learn_"])
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr, torch.jagged, torch.strided], ids=str)
def test_only_dense_input(method: str, layout: torch.layout) -> None:
    _, ours, x = make("Linear")
    is_nested = layout in (torch.jagged, torch.strided)
    other = (
        torch.nested.as_nested_tensor([x, x[:2]], layout=layout) if is_nested else x.to_sparse(layout=layout)
    )
    kind = "nested" if is_nested else layout
    with pytest.raises(TypeError, match=f"x must be a dense tensor, got a {kind} one"):
        ours(other) if method == "forward" else ours.learn_(other, 0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_other_dtypes_need_autocast(backend: str, kind: str) -> None:
    _, ours, x = make(kind)
    message = (
        r"weight.s dtype torch.float32 where autocast does not turn both into another, got torch.float64"
    )
    before = ours.weight.clone()
    for call in (ours, lambda x: ours.learn_(x, 0.1)):
        with pytest.raises(TypeError, match=message):
            call(x.double())
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match=message):
            call(x.double())  # which autocast leaves alone
    assert torch.equal(ours.weight, before)
    with torch.autocast("cpu", torch.bfloat16):
        assert ours.learn_(x.bfloat16(), 0.1).dtype == torch.bfloat16
    assert not torch.equal(ours.weight, before)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rule": "ghl"}, TypeError, "rule must be a HebbianRule, got 'ghl'"),
        ({"rule": HebbianRule.ghl}, TypeError, "rule must be a HebbianRule"),
        ({"gate_at": "forward"}, ValueError, "gate_at must be one of .*'step'.*got 'forward'"),
        ({"sums_at": "step"}, ValueError, "sums_at must be one of .*'backward'.*got 'step'"),
        ({"gate_at": None}, ValueError, "gate_at must be one of .*got None"),
        ({"sums_at": None}, ValueError, "sums_at must be one of .*got None"),
        ({"dtype": torch.complex64}, TypeError, "must be a real floating-point dtype, got torch.complex64"),
        ({"dtype": torch.int32}, TypeError, "must be a real floating-point dtype, got torch.int32"),
        ({"rule": HebbianRule(winners=12)}, ValueError, "got 12 of 11"),
        ({"rule": HebbianRule(winners=0.01, losers="anti")}, ValueError, "one winner"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_bad_options(kind: str, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(kind, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_arguments_that_do_not_exist_are_those_of_a_public_class(kind: str) -> None:
    shown = "GHLLinear" if kind == "Linear" else "GHLConv1d/2d/3d"
    with pytest.raises(TypeError, match=rf"^{shown}\.__init__\(\) got an unexpected .* 'strides'"):
        make(kind, strides=2)


@pytest.mark.parametrize(
    ("argument", "value"), [("stride", "2"), ("stride", None), ("stride", 1.5), ("padding", None)]
)
def test_arguments_that_torch_stores_unseen(argument: str, value: Any) -> None:
    layer = ghl.GHLConv2d(4, 6, 3, **{argument: value})
    with pytest.raises(TypeError, match=f"{argument} must be an int or 2 ints, .*{value}"):
        layer(torch.ones(1, 4, 5, 5))


# --- as modules ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_subclass_with_the_same_state(kind: str) -> None:
    plain, ours, x = make(kind)
    assert isinstance(ours, type(plain))
    assert list(ours.state_dict()) == list(plain.state_dict())
    assert ours.load_state_dict(plain.state_dict()) == plain.load_state_dict(ours.state_dict())
    assert torch.equal(ours(x), plain(x))
    assert dict(ours.named_buffers()) == {}


def test_positional_arguments_are_those_of_torch() -> None:
    assert ghl.GHLLinear(3, 4, False).bias is None
    for dims in (1, 2, 3):
        arguments = (4, 6, 3, 2, 1, 1, 2, False, "circular", "cpu", torch.float64)
        plain = getattr(nn, f"Conv{dims}d")(*arguments)
        ours = getattr(ghl, f"GHLConv{dims}d")(*arguments, rule=HebbianRule.kwta(2))
        ours.load_state_dict(plain.state_dict())
        for name in ("stride", "padding", "dilation", "groups", "bias", "padding_mode"):
            assert getattr(ours, name) == getattr(plain, name)
        x = torch.randn(2, 4, *(5,) * dims, dtype=torch.float64)
        assert torch.equal(ours(x), plain(x))
    assert ghl.GHLLinear(3, 4, True, "cpu", torch.float64).weight.dtype == torch.float64


@pytest.mark.parametrize("kind", KINDS)
def test_signature_is_that_of_torch_and_the_options(kind: str) -> None:
    theirs, ours = (
        inspect.signature(owner).parameters for owner in (getattr(nn, kind), getattr(ghl, f"GHL{kind}"))
    )
    options = {"rule": None, "gate_at": "backward", "sums_at": "forward"}
    assert list(ours) == [*theirs, *options]
    for name, parameter in theirs.items():
        assert (ours[name].kind, ours[name].default) == (parameter.kind, parameter.default)
    for name, default in options.items():
        assert (ours[name].kind, ours[name].default) == (inspect.Parameter.KEYWORD_ONLY, default)
    call = inspect.signature(make(kind)[1])
    assert "rule" not in call.parameters


@pytest.mark.parametrize("kind", KINDS)
def test_ghl_layers_are_found_by_their_base(kind: str) -> None:
    plain, ours, _ = make(kind)
    assert isinstance(ours, ghl.GHLLayer)
    assert not isinstance(plain, ghl.GHLLayer)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["pickle", "deepcopy", "torch.save"])
def test_copies(kind: str, how: str) -> None:
    _, ours, x = make(kind, HebbianRule.kwta(2), sums_at="backward")
    if how == "pickle":
        twin = pickle.loads(pickle.dumps(ours))
    elif how == "deepcopy":
        twin = copy.deepcopy(ours)
    else:
        file = io.BytesIO()
        torch.save(ours, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert type(twin) is type(ours)
    assert (twin.rule, twin.gate_at, twin.sums_at) == (ours.rule, "backward", "backward")
    run(ours, x)
    run(twin, x)
    assert torch.equal(ours.weight.grad, twin.weight.grad)
    assert twin.weight is not ours.weight


@pytest.mark.parametrize("kind", KINDS)
def test_repr_shows_the_rule(kind: str) -> None:
    plain, ours, _ = make(kind, HebbianRule.kwta(2), gate_at="step", sums_at="backward")
    rule = "rule=HebbianRule(activity='linear', winners=2)"
    assert repr(ours) == f"GHL{repr(plain)[:-1]}, {rule}, gate_at='step', sums_at='backward')"
    rule = "rule=HebbianRule(activity='softmax', winners=None)"
    assert repr(make(kind)[1]) == f"GHL{repr(plain)[:-1]}, {rule})"


def test_default_rule_is_ghl() -> None:
    assert ghl.GHLLinear(3, 4).rule == HebbianRule.ghl()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [True, False])
def test_hooks_and_parametrized_forward(backend: str, kind: str, training: bool) -> None:
    """Forward hooks see and may replace the output, as on the torch layer."""
    plain, ours, x = make(kind)
    for layer in (plain, ours):
        layer.train(training)
        layer.register_forward_hook(lambda module, inputs, out: 2 * out)
    assert torch.equal(ours(x), plain(x))


@pytest.mark.parametrize("kind", ["Linear", "Conv2d"])
def test_gradients_mapped_over(backend: str, kind: str) -> None:
    """As for Jacobians: of the input they are the torch layer's, of the weight they are refused."""
    plain, ours, x = make(kind)
    found = []
    for layer in (plain, ours):
        u = layer(x.requires_grad_())
        directions = torch.randn(3, *u.shape, generator=torch.Generator().manual_seed(0))
        found += torch.autograd.grad(u, [x], directions, is_grads_batched=True, retain_graph=True)
    assert torch.equal(*found)
    with pytest.raises(RuntimeError, match="is_grads_batched cannot map over ghl::gate_"):
        torch.autograd.grad(u, [ours.weight], directions, is_grads_batched=True)


class LeafTracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, ghl.GHLLayer) or super().is_leaf_module(m, module_qualified_name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gate_at", ["backward", "step"])
def test_traced_by_fx(kind: str, gate_at: str) -> None:
    plain, ours, x = make(kind, gate_at=gate_at)
    model = nn.Sequential(ours, nn.ReLU())
    with pytest.raises(RuntimeError, match=r"traces into a GHL layer in training.*is_leaf_module"):
        fx.symbolic_trace(model)
    leaf = fx.GraphModule(model, LeafTracer().trace(model))
    assert leaf.get_submodule("0") is ours
    assert torch.equal(fx.symbolic_trace(model.eval())(x), plain(x).relu())
    model.train().requires_grad_(False)
    assert torch.equal(fx.symbolic_trace(model)(x), plain(x).relu())


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")
@pytest.mark.parametrize(("inputs", "units"), [(0, 4), (5, 0), (0, 0)])
@pytest.mark.parametrize("gate_at", ["backward", "step"])
def test_empty_weights(backend: str, inputs: int, units: int, gate_at: str) -> None:
    plain, ours = nn.Linear(inputs, units), ghl.GHLLinear(inputs, units, gate_at=gate_at)
    ours.load_state_dict(plain.state_dict())
    x = torch.randn(6, inputs)
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1)
    if gate_at == "step":
        gate = ghl.StepGate(optimizer, ours)
    for theirs, mine in zip(run(plain, x), run(ours, x), strict=True):
        assert_same_bits(mine, theirs)
    assert ours.weight.grad.shape == (units, inputs)
    assert torch.equal(ours.learn_(x, 0.1), plain(x))
    optimizer.step()
    if gate_at == "step":
        gate.remove()


COMPUTED = {
    "weight_norm": (parametrizations.weight_norm, "parametrized.*remove_parametrizations"),
    "spectral_norm": (parametrizations.spectral_norm, "parametrized.*remove_parametrizations"),
    "pruned": (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), "computed by.*prune.remove"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("computed", COMPUTED)
@pytest.mark.parametrize("gate_at", ["backward", "step"])
def test_weights_that_are_computed_cannot_learn(kind: str, computed: str, gate_at: str) -> None:
    compute, message = COMPUTED[computed]
    _, ours, x = make(kind, gate_at=gate_at)
    compute(ours)
    for call in (lambda: ours(x), lambda: ours.learn_(x, 0.1)):
        with pytest.raises(RuntimeError, match=f"a GHL layer cannot learn where its weight is .*{message}"):
            call()
    assert ours.eval()(x).shape == make(kind)[1](x).shape
    ours.train().requires_grad_(False)
    assert not ours(x).requires_grad


def test_a_computed_weight_that_is_made_a_parameter_again_learns() -> None:
    _, ours, x = make("Linear")
    prune.remove(prune.l1_unstructured(ours, "weight", 0.5), "weight")
    parametrize.remove_parametrizations(parametrizations.weight_norm(ours), "weight")
    run(ours, x)
    assert ours.weight.grad.abs().max() == 1
    parametrize.register_parametrization(ours, "bias", nn.Tanh())
    ours.weight.grad = None
    ours(x).sum().backward()
    assert ours.weight.grad.abs().max() == 1


def test_layer_equals_functional(backend: str) -> None:
    _, ours, x = make("Conv2d", HebbianRule(winners=3, decay="instar"))
    grad_u = torch.randn_like(ours(x))
    u, _, _ = run(ours, x, grad_u)
    expected = functional.conv_weight_grad(x, u, grad_u, ours.weight, ours.rule)
    torch.testing.assert_close(ours.weight.grad, expected, rtol=1e-5, atol=1e-6)


def test_step_mode_needs_a_step_gate(backend: str) -> None:
    _, ours, x = make("Linear", gate_at="step")
    with pytest.raises(RuntimeError, match="StepGate"):
        ours(x)
    assert ours.eval()(x).shape == (5, 11)
