"""Every baseline is the rule that it stands for, in float64; those that are no HebbianRule, a plain loop."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.baselines import (
    BASELINES,
    backprop,
    boosting,
    conv_trick,
    depthwise,
    epilogue,
    hpca,
    library,
    linear,
    scatter,
    selection,
    softhebb,
    surrogate,
    swta,
    topk,
    unfold,
)
from ghl_kernels import reference
from ghl_kernels.rule import HebbianRule

# H = A: the sums and nothing else, of activities given as responses.
SUMS = HebbianRule(activity="linear", decay="none", normalize="none", gate="none")
DEFAULTS = {"stride": 1, "padding": 0, "dilation": 1}
FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


class Layer(NamedTuple):
    """A convolution's tensors in float64, and its arguments."""

    x: Tensor
    u: Tensor
    grad_u: Tensor
    weight: Tensor
    conv: dict[str, Any]

    def to(self, *args: Any, **kwargs: Any) -> Layer:
        return Layer(*(tensor.to(*args, **kwargs) for tensor in self[:4]), self.conv)

    def delta(self, rule: HebbianRule) -> Tensor:
        return reference.conv_delta(self.x, self.u, self.weight, rule, **self.conv)

    def correlation(self, y: Tensor) -> Tensor:
        return reference.conv_delta(self.x, y, self.weight, SUMS, **self.conv)


def conv_layer(
    kernel: tuple[int, int] = (3, 2), size: tuple[int, int] = (9, 8), units: int = 5, **conv: Any
) -> Layer:
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    weight = torch.randn(units, 3, *kernel, dtype=torch.float64) / 4
    u = F.conv2d(x, weight, **conv)
    return Layer(x, u, torch.randn_like(u), weight, conv)


GEOMETRIES: dict[str, dict[str, Any]] = {
    "same": {"kernel": (3, 3), "padding": 1},
    "strided": {"stride": 2},
    "crop": {"kernel": (3, 3), "size": (32, 32), "stride": 2, "padding": 1},
    "dilated": {"kernel": (3, 3), "size": (11, 13), "dilation": 2, "padding": 2},
    "strided-dilated": {"kernel": (3, 3), "size": (14, 16), "stride": 3, "padding": 1, "dilation": 2},
    "per-dimension": {"stride": (1, 2), "padding": (2, 1), "dilation": (2, 1)},
    "pointwise": {"kernel": (1, 1), "size": (5, 4)},
}


@pytest.fixture(params=GEOMETRIES)
def layer(request: pytest.FixtureRequest) -> Layer:
    return conv_layer(**GEOMETRIES[request.param])


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    assert not actual.requires_grad
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-11)


def test_baselines_are_complete_and_described() -> None:
    codes = [*(f"B{i}" for i in range(4)), "B4", "B4c", "B4d", "B5", "B6", *(f"B7{way}" for way in "abcd")]
    assert list(BASELINES) == [*codes, *(f"B{i}" for i in (8, 9, 10, 11, 12, 13, 15))]
    for code, baseline in BASELINES.items():
        assert baseline.code == code
        assert all(baseline)
    assert len({baseline.name for baseline in BASELINES.values()}) == len(BASELINES)


# --- dense sums of a convolution ----------------------------------------------------------------


def test_backprop(layer: Layer) -> None:
    x, weight = layer.x.clone().requires_grad_(), layer.weight.clone().requires_grad_()
    F.conv2d(x, weight, **layer.conv).backward(layer.grad_u)
    assert_equal(backprop.weight_grad(layer.x, layer.grad_u, layer.weight, **layer.conv), weight.grad)
    G, dx = backprop.weight_and_input_grad(layer.x, layer.grad_u, layer.weight, **layer.conv)
    assert_equal(G, weight.grad)
    assert_equal(dx, x.grad)


GHL_DELTAS = {
    "per sample": unfold.per_sample_delta,
    "one product": unfold.delta,
    "convolution trick": conv_trick.delta,
    "library": library.delta,
    "surrogate": lambda x, u, weight, temperature, **conv: surrogate.delta(x, weight, temperature, **conv),
}


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("way", GHL_DELTAS)
def test_delta_is_the_ghl_rule(layer: Layer, way: str, temperature: float) -> None:
    H = GHL_DELTAS[way](layer.x, layer.u, layer.weight, temperature, **layer.conv)
    assert_equal(H, layer.delta(HebbianRule.ghl(temperature)))


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("way", GHL_DELTAS)
def test_delta_in_bfloat16(way: str, memory_format: str) -> None:
    layer = conv_layer((3, 3), padding=1).to(torch.bfloat16)
    stored = layer.to(memory_format=FORMATS[memory_format])
    H = GHL_DELTAS[way](stored.x, stored.u, stored.weight, 1.0, **layer.conv)
    expected = layer.to(torch.float64).delta(HebbianRule.ghl())
    assert H.dtype == torch.bfloat16
    torch.testing.assert_close(H.double(), expected, rtol=0, atol=0.05)


CORRELATIONS = {"convolution trick": conv_trick.correlation, "library": library.correlation}


@pytest.mark.parametrize("way", CORRELATIONS)
def test_correlation(layer: Layer, way: str) -> None:
    y = torch.randn_like(layer.u)
    A = CORRELATIONS[way](layer.x, y, layer.weight, **layer.conv)
    assert A.shape == layer.weight.shape
    assert_equal(A, layer.correlation(y))


def test_library_correlation_of_a_float32_weight_is_in_the_dtype_of_x() -> None:
    layer = conv_layer()
    A = library.correlation(layer.x, layer.u, layer.weight.float())
    assert_equal(A, layer.correlation(layer.u))


def test_library_correlation_by_groups() -> None:
    x, weight = torch.randn(2, 4, 6, 5).double(), torch.randn(6, 2, 3, 3).double()
    y = torch.randn(2, 6, 4, 3).double()
    expected = reference.conv_delta(x, y, weight, SUMS, groups=2)
    assert_equal(library.correlation(x, y, weight, groups=2), expected)


@pytest.mark.parametrize("pair", [library.pair, library.concatenated_pair])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_pair(layer: Layer, pair: Any, temperature: float) -> None:
    A, G = pair(layer.x, layer.u, layer.grad_u, layer.weight, temperature, **layer.conv)
    y = reference.compete(layer.u, HebbianRule.ghl(temperature), dim=1)
    assert_equal(A, layer.correlation(y))
    assert_equal(G, layer.correlation(layer.grad_u))


@pytest.mark.slow
def test_compiled_delta() -> None:
    layer = conv_layer(**GEOMETRIES["per-dimension"])
    H = library.compiled_delta()(layer.x, layer.u, layer.weight, 0.5, **layer.conv)
    assert_equal(H, layer.delta(HebbianRule.ghl(0.5)))


@pytest.mark.slow
def test_compiled_pair() -> None:
    layer = conv_layer(**GEOMETRIES["crop"])
    A, G = library.compiled_pair()(layer.x, layer.u, layer.grad_u, layer.weight, **layer.conv)
    assert_equal(A, layer.correlation(reference.compete(layer.u, HebbianRule.ghl(), dim=1)))
    assert_equal(G, layer.correlation(layer.grad_u))


@pytest.mark.parametrize("conv", [{"stride": 0}, {"padding": -1}, {"dilation": (1, 1, 1)}], ids=str)
def test_library_correlation_refuses(conv: dict[str, Any]) -> None:
    layer = conv_layer()
    with pytest.raises(ValueError, match="got"):
        library.correlation(layer.x, layer.u, layer.weight, **conv)


# --- the authors' layer -------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_unfold_layer_is_the_ghl_rule(layer: Layer, temperature: float) -> None:
    units, channels, *kernel = layer.weight.shape
    conv = nn.Conv2d(channels, units, tuple(kernel), **layer.conv, bias=False, dtype=torch.float64)
    unfold.convert(nn.Sequential(conv), temperature)
    with torch.no_grad():
        conv.weight.copy_(layer.weight)
    conv(layer.x).backward(layer.grad_u)
    unfold.gate_(conv)
    rule = HebbianRule.ghl(temperature)
    assert_equal(
        conv.weight.grad,
        reference.conv_weight_grad(layer.x, layer.u, layer.grad_u, layer.weight, rule, **layer.conv),
    )


def small_network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False),
        nn.ReLU(),
        nn.Conv2d(4, 6, 2, stride=2, bias=False),
        nn.Flatten(),
        nn.Linear(96, 5),
    ).double()


@pytest.mark.parametrize(
    ("convert", "kind"), [(unfold.convert, unfold.UnfoldConv2d), (softhebb.convert, softhebb.SoftHebbConv2d)]
)
def test_convert_keeps_parameters_and_output(convert: Any, kind: type) -> None:
    model = small_network()
    parameters = list(model.parameters())
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    expected = model(x)
    assert convert(model) is model
    assert all(old is new for old, new in zip(parameters, model.parameters(), strict=True))
    assert [type(module) for module in model] == [kind, nn.ReLU, kind, nn.Flatten, nn.Linear]
    torch.testing.assert_close(model(x), expected)


def test_unfold_gate_needs_a_backward() -> None:
    conv = nn.Conv2d(3, 5, 3, bias=False)
    unfold.convert(nn.Sequential(conv))
    conv(torch.randn(1, 3, 4, 4))
    with pytest.raises(RuntimeError, match="backward"):
        unfold.gate_(conv)


UNPUBLISHED = [{"groups": 3}, {"bias": True}, {"padding": "same"}, {"padding_mode": "reflect"}]


@pytest.mark.parametrize("options", UNPUBLISHED, ids=str)
def test_unfold_refuses_what_was_not_published(options: dict[str, Any]) -> None:
    conv = nn.Conv2d(3, 6, 3, **({"bias": False} | options))
    unfold.convert(nn.Sequential(conv))
    with pytest.raises(ValueError, match="published"):
        conv(torch.randn(1, 3, 8, 8))


# --- surrogate loss -----------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_surrogate_instar(layer: Layer, temperature: float) -> None:
    H = surrogate.delta(layer.x, layer.weight, temperature, "instar", **layer.conv)
    rule = HebbianRule(temperature=temperature, decay="instar", normalize="mean", gate="none")
    assert_equal(H, layer.delta(rule))


def test_surrogate_leaves_the_weight_alone_under_no_grad() -> None:
    layer = conv_layer()
    weight = nn.Parameter(layer.weight)
    with torch.no_grad():
        H = surrogate.delta(layer.x, weight)
    assert_equal(H, layer.delta(HebbianRule.ghl()))
    assert weight.grad is None


def test_surrogate_refuses_other_decays() -> None:
    layer = conv_layer()
    with pytest.raises(ValueError, match="sanger"):
        surrogate.delta(layer.x, layer.weight, decay="sanger")


# --- SoftHebb -----------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_softhebb(layer: Layer, temperature: float) -> None:
    rule = HebbianRule.softhebb(temperature)
    assert_equal(softhebb.compete(layer.u, temperature), reference.compete(layer.u, rule, dim=1))
    H = softhebb.delta(layer.x, layer.u, layer.weight, temperature, **layer.conv)
    assert_equal(H, layer.delta(rule))


def test_softhebb_has_one_winner_where_values_tie() -> None:
    u = torch.randint(0, 2, (2, 5, 4, 3)).double()
    assert_equal(softhebb.compete(u), reference.compete(u, HebbianRule.softhebb(), dim=1))


@pytest.mark.parametrize("as_shipped", [False, True])
def test_softhebb_local_pass(as_shipped: bool) -> None:
    model = small_network()
    rule, lr = HebbianRule.softhebb(0.5), 0.1
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    first, second = model[0], model[2]
    u = first(x).detach()
    learned = [first.weight + lr * reference.conv_delta(x, u, first.weight, rule, padding=1)]
    h = torch.relu(u)
    u = second(h).detach()
    learned.append(second.weight + lr * reference.conv_delta(h, u, second.weight, rule, stride=2))
    logits = model(x)

    softhebb.convert(model, 0.5, as_shipped)
    torch.testing.assert_close(softhebb.local_pass(model, x, lr), logits)
    for conv, expected in zip((first, second), learned, strict=True):
        assert_equal(conv.weight.detach(), expected.detach())
    softhebb_winners = torch.bincount(u.argmax(1).flatten(), minlength=6)
    assert torch.equal(second.wins, softhebb_winners if as_shipped else torch.zeros(6, dtype=torch.int64))
    means = [torch.softmax(u / 0.5, 1).amax(1).mean()] if as_shipped else []
    torch.testing.assert_close(second.winner_activity, means)


def test_softhebb_learns_only_in_a_local_pass() -> None:
    model = softhebb.convert(small_network())
    before = model[0].weight.detach().clone()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    model(x)
    assert torch.equal(model[0].weight, before)
    with pytest.raises(RuntimeError):
        softhebb.local_pass(model, x[:, :2], 0.1)
    model(x)
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize("options", UNPUBLISHED, ids=str)
def test_softhebb_refuses(options: dict[str, Any]) -> None:
    conv = nn.Conv2d(3, 6, 3, **({"bias": False} | options))
    softhebb.convert(nn.Sequential(conv))
    with pytest.raises(ValueError, match="SoftHebb has"):
        conv.learn_(torch.randn(1, 3, 8, 8), 0.1)


# --- selection ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, -1])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("k", [1, 3, 7])
@pytest.mark.parametrize("kwta", [topk.kwta_topk, selection.kwta_kthvalue])
def test_kwta(kwta: Any, k: int, memory_format: str, dim: int) -> None:
    u = torch.randn(2, 7, 4, 7, dtype=torch.float64).to(memory_format=FORMATS[memory_format])
    y = kwta(u, k, dim)
    assert torch.equal(y, reference.kwta(u, k, dim))
    assert y.is_contiguous(memory_format=FORMATS[memory_format])


def test_kthvalue_keeps_every_value_that_ties_with_the_last_winner() -> None:
    u = torch.tensor([[2.0, 1.0, 1.0, -1.0]])
    assert torch.equal(selection.kwta_kthvalue(u, 2), torch.tensor([[2.0, 1.0, 1.0, 0.0]]))


@pytest.mark.parametrize("dim", [1, -1])
def test_one_hot_argmax_with_ties(dim: int) -> None:
    u = torch.randint(0, 3, (3, 5, 4, 6)).double()
    assert torch.equal(selection.one_hot_argmax(u, dim), reference.compete(u, HebbianRule.hard_wta(), dim))


@pytest.mark.parametrize("krotov", [selection.krotov_topk, selection.krotov_sort])
@pytest.mark.parametrize("rank", [2, 4, 7])
def test_krotov_ranks(krotov: Any, rank: int) -> None:
    u = torch.randn(2, 7, 4, 3, dtype=torch.float64)
    expected = torch.zeros_like(u)
    for b, i, j in itertools.product(range(2), range(4), range(3)):
        order = sorted(range(7), key=lambda n: -u[b, n, i, j].item())
        expected[b, order[0], i, j] = 1.0
        expected[b, order[rank - 1], i, j] = -0.4
    assert torch.equal(krotov(u, rank, 0.4), expected)
    assert torch.equal(krotov(u.movedim(1, -1), rank, 0.4, dim=-1), expected.movedim(1, -1))


@pytest.mark.parametrize("krotov", [selection.krotov_topk, selection.krotov_sort])
@pytest.mark.parametrize("rank", [1, 8])
def test_krotov_refuses(krotov: Any, rank: int) -> None:
    with pytest.raises(ValueError, match=f"between 2 and the 7 units, got {rank}"):
        krotov(torch.randn(2, 7, 4, 3), rank, 0.4)


@pytest.mark.parametrize("k", [0, 8])
def test_kthvalue_refuses(k: int) -> None:
    with pytest.raises(ValueError, match=f"between 1 and the 7 units, got {k}"):
        selection.kwta_kthvalue(torch.randn(2, 7, 4, 3), k)


# --- the other rules ----------------------------------------------------------------------------


def swta_by_loop(layer: Layer, temperature: float) -> Tensor:
    arguments = (layer.conv.get(name, default) for name, default in DEFAULTS.items())
    rows = reference._patches(layer.x, layer.weight.shape[2:], *arguments, groups=1)[0]
    W = layer.weight.flatten(1)
    z = []
    for patch in rows:
        cosine = torch.stack([w @ patch / (w.norm() * patch.norm() + 1e-30) for w in W])
        exponentials = torch.exp(((cosine + 1) / 2) ** 2 / temperature)
        z.append(exponentials / exponentials.sum())
    wins = sum(z)
    H = torch.zeros_like(W)
    for z_p, patch in zip(z, rows, strict=True):
        for n in range(len(W)):
            H[n] += z_p[n] / wins[n] * z_p[n] * (patch - W[n])
    return H.view_as(layer.weight)


@pytest.mark.parametrize("patch_norms", ["box", "unfold"])
@pytest.mark.parametrize("geometry", [name for name in GEOMETRIES if name != "crop"])
@pytest.mark.parametrize("temperature", [0.02, 1.0])
def test_swta(geometry: str, patch_norms: str, temperature: float) -> None:
    layer = conv_layer(**GEOMETRIES[geometry])
    H = swta.delta(layer.x, layer.weight, temperature, patch_norms, **layer.conv)
    assert_equal(H, swta_by_loop(layer, temperature))


@pytest.mark.parametrize("patch_norms", ["box", "unfold"])
def test_swta_of_patches_of_zeros(patch_norms: str) -> None:
    layer = conv_layer((3, 3), padding=1)
    layer.x[:, :, :5] = 0.0
    H = swta.delta(layer.x, layer.weight, patch_norms=patch_norms, **layer.conv)
    assert_equal(H, swta_by_loop(layer, 0.02))


def test_swta_refuses_other_norms() -> None:
    layer = conv_layer()
    with pytest.raises(ValueError, match="fft"):
        swta.delta(layer.x, layer.weight, patch_norms="fft")


@pytest.mark.parametrize("delta", [hpca.delta, hpca.naive_delta])
def test_hpca(layer: Layer, delta: Any) -> None:
    H = delta(layer.x, layer.u, layer.weight, **layer.conv)
    assert_equal(H, layer.delta(HebbianRule.hpca()))


@pytest.mark.parametrize("k", [1, 3])
def test_scatter(layer: Layer, k: int) -> None:
    rule = HebbianRule.kwta(k)
    unit, activity = torch.ops.ghl.winners(layer.u, 1, *rule.competition(5))
    A = scatter.correlation(layer.x, unit, activity, layer.weight, **layer.conv)
    assert_equal(A, layer.correlation(reference.compete(layer.u, rule, dim=1)))


@pytest.mark.parametrize("way", [depthwise.correlation, depthwise.dense_diagonal])
@pytest.mark.parametrize("multiplier", [1, 2])
@pytest.mark.parametrize("conv", [{"padding": 1}, {"stride": 2}, {"dilation": (1, 2)}], ids=str)
def test_depthwise(way: Any, multiplier: int, conv: dict[str, Any]) -> None:
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    weight = torch.randn(3 * multiplier, 1, 3, 2, dtype=torch.float64)
    y = torch.randn_like(F.conv2d(x, weight, groups=3, **conv))
    assert_equal(way(x, y, weight, **conv), reference.conv_delta(x, y, weight, SUMS, groups=3, **conv))


@pytest.mark.parametrize("way", [depthwise.correlation, depthwise.dense_diagonal])
@pytest.mark.parametrize("shape", [(6, 3, 3, 3), (4, 1, 3, 3)])
def test_depthwise_refuses(way: Any, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="multiple of 3 channels"):
        way(torch.randn(2, 3, 9, 8), torch.randn(2, shape[0], 7, 6), torch.randn(shape))


# --- k-winners with boosting --------------------------------------------------------------------


def test_boosted_winners_follow_the_duty_cycle() -> None:
    kwinners = boosting.BoostedKWinners2d(6, 2, boost=1.5, period=5).double()
    duty, seen = torch.zeros(6, dtype=torch.float64), 0
    for batch in (2, 3, 2, 7):
        u = torch.randn(batch, 6, 4, 3, dtype=torch.float64)
        expected = torch.zeros_like(u)
        for b, i, j in itertools.product(range(batch), range(4), range(3)):
            boosted = u[b, :, i, j] * torch.exp(-1.5 * duty)
            winners = boosted.argsort(descending=True)[:2]
            expected[b, winners, i, j] = u[b, winners, i, j]
        assert torch.equal(kwinners(u), expected)
        seen += batch
        window = max(min(5, seen), batch)
        duty = (duty * (window - batch) + (expected > 0).double().mean((2, 3)).sum(0)) / window
        assert_equal(kwinners.duty, duty)


def test_boosted_winners_in_evaluation() -> None:
    kwinners = boosting.BoostedKWinners2d(6, 0.3, boost=0.0).double().eval()
    u = torch.randn(2, 6, 4, 3, dtype=torch.float64)
    assert torch.equal(kwinners(u), reference.kwta(u, 2, dim=1))
    assert not kwinners.duty.any()


def test_boosted_winners_pass_their_gradient() -> None:
    kwinners = boosting.BoostedKWinners2d(6, 2)
    u = torch.randn(2, 6, 4, 3, requires_grad=True)
    out = kwinners(u)
    grad = torch.randn_like(u)
    out.backward(grad)
    assert torch.equal(u.grad, grad * (out != 0))


@pytest.mark.parametrize(
    "arguments", [{"winners": 0}, {"winners": 7}, {"winners": 1.5}, {"boost": -1.0}, {"period": 0}], ids=str
)
def test_boosting_refuses(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be"):
        boosting.BoostedKWinners2d(6, **({"winners": 2} | arguments))


def test_boosting_refuses_other_channels() -> None:
    with pytest.raises(ValueError, match="6, H, W"):
        boosting.BoostedKWinners2d(6, 2)(torch.randn(2, 5, 4, 3))


# --- linear layers, gate and step ---------------------------------------------------------------


def linear_layer(*leading: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, weight = torch.randn(*leading, 11).double(), torch.randn(7, 11).double() / 3
    u = x @ weight.t()
    return x, u, torch.randn_like(u), weight


@pytest.mark.parametrize("leading", [(9,), (2, 5)])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_linear_softmax(leading: tuple[int, ...], temperature: float) -> None:
    x, u, grad_u, weight = linear_layer(*leading)
    rule = HebbianRule.ghl(temperature)
    assert_equal(linear.delta(x, u, weight, temperature), reference.linear_delta(x, u, weight, rule))
    A, G = linear.pair(x, u, grad_u, weight, temperature)
    assert_equal(A, reference.linear_delta(x, reference.compete(u, rule), weight, SUMS))
    assert_equal(G, reference.linear_delta(x, grad_u, weight, SUMS))


@pytest.mark.parametrize("k", [1, 3, 7])
def test_linear_kwta(k: int) -> None:
    x, u, _, weight = linear_layer(2, 5)
    expected = reference.linear_delta(x, u, weight, HebbianRule.kwta(k))
    assert_equal(linear.kwta_delta(x, u, weight, k), expected)


def test_gate() -> None:
    x, u, grad_u, weight = linear_layer(9)
    A, G = linear.pair(x, u, grad_u, weight)
    expected = reference.linear_weight_grad(x, u, grad_u, weight, HebbianRule.ghl())
    assert_equal(epilogue.gate(G, A, weight), expected)


@pytest.mark.parametrize("weight_decay", [0.0, 0.05])
def test_step_is_sgd_on_gated_gradients(weight_decay: float) -> None:
    weights = [torch.randn(5, 3, 2, 2).double(), torch.randn(4, 6).double()]
    sums, grads = ([torch.randn_like(weight) for weight in weights] for _ in range(2))
    parameters = [nn.Parameter(weight.clone()) for weight in weights]
    for parameter, A, G in zip(parameters, sums, grads, strict=True):
        W, rows = parameter.detach().flatten(1), A.flatten(1)
        H = rows - (W * rows).sum(1, keepdim=True) * W
        parameter.grad = reference.gate(H / H.abs().max(), G.flatten(1)).view_as(G)
    torch.optim.SGD(parameters, lr=0.1, weight_decay=weight_decay).step()
    epilogue.step_(weights, sums, grads, 0.1, weight_decay)
    for weight, parameter in zip(weights, parameters, strict=True):
        assert_equal(weight, parameter.detach())


def test_step_refuses_lists_of_different_lengths() -> None:
    weights = [torch.randn(3, 2), torch.randn(3, 2)]
    with pytest.raises(ValueError, match="zip"):
        epilogue.step_(weights, weights, weights[:1], 0.1)
