"""The oracle's oracle: ghl.reference against loops over single numbers, written from the formulas alone."""

from __future__ import annotations

import inspect
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch

from ghl_kernels import HebbianRule, functional, reference

RULES = [
    HebbianRule(),
    HebbianRule(temperature=0.5, winners=3),
    HebbianRule(losers="anti"),
    HebbianRule(losers="anti", winners=2, temperature=2.0),
    HebbianRule(activity="linear"),
    HebbianRule(activity="linear", winners=2),
    HebbianRule(activity="linear", winners=3, losers="anti"),
    HebbianRule(activity="relu", winners=0.5),
    HebbianRule(activity="relu", losers="anti"),
    HebbianRule(activity="binary", winners=1),
    HebbianRule(activity="binary", winners=3, losers="anti"),
]
DECAYS = ("oja", "instar", "none", "subspace", "sanger")
NORMALIZATIONS = ("layer", "filter", "mean", "none")


def compete_position(u: list[float], rule: HebbianRule) -> list[float]:
    """y of one position."""
    n = len(u)
    k = (
        n
        if rule.winners is None
        else rule.winners
        if isinstance(rule.winners, int)
        else math.ceil(rule.winners * n)
    )
    ranking = sorted(range(n), key=lambda i: (-u[i], i))  # ties: the lowest index is ahead
    winners = ranking[:k]
    y = [0.0] * n
    for i in winners:
        if rule.activity == "softmax":
            top = u[ranking[0]]
            total = sum(math.exp((u[j] - top) / rule.temperature) for j in winners)
            y[i] = math.exp((u[i] - top) / rule.temperature) / total
        elif rule.activity == "linear":
            y[i] = u[i]
        elif rule.activity == "relu":
            y[i] = max(u[i], 0.0)
        else:
            y[i] = 1.0
        if rule.losers == "anti" and i != ranking[0]:
            y[i] = -y[i]
    return y


def loop_delta(patches: np.ndarray, u: np.ndarray, weight: np.ndarray, rule: HebbianRule) -> np.ndarray:
    """H (N, D) from patches (P, groups, D), u (P, N) and weight (N, D)."""
    positions, groups, width = patches.shape
    units = weight.shape[0]
    per_group = units // groups
    y = [compete_position(list(map(float, row)), rule) for row in u]
    A = [
        [sum(y[p][n] * patches[p][n // per_group][d] for p in range(positions)) for d in range(width)]
        for n in range(units)
    ]
    H = np.zeros((units, width))
    for n in range(units):
        if rule.decay == "oja":  # as the definition has it: with the projection of each patch, without bias
            factor = sum(y[p][n] * float(weight[n] @ patches[p][n // per_group]) for p in range(positions))
        elif rule.decay == "instar":
            factor = sum(y[p][n] for p in range(positions))
        first = n // per_group * per_group
        last = n if rule.decay == "sanger" else first + per_group - 1
        for d in range(width):
            R = 0.0
            if rule.decay in ("oja", "instar"):
                R = factor * weight[n, d]
            elif rule.decay in ("subspace", "sanger"):
                R = sum(
                    sum(y[p][n] * y[p][m] for p in range(positions)) * weight[m, d]
                    for m in range(first, last + 1)
                )
            H[n, d] = A[n][d] - R
    if rule.normalize == "layer":
        return H / (np.abs(H).max() + 1e-30)
    if rule.normalize == "filter":
        return H / (np.abs(H).max(axis=1, keepdims=True) + 1e-30)
    return H / positions if rule.normalize == "mean" else H


def loop_patches(
    x: np.ndarray,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> tuple[np.ndarray, tuple[int, ...]]:
    """Patches (P, groups, D), one number at a time, and the output size."""
    batch, channels, *size = x.shape
    out = tuple(
        (s + 2 * p - d * (k - 1) - 1) // t + 1
        for s, p, d, k, t in zip(size, padding, dilation, kernel, stride, strict=True)
    )
    per_group = channels // groups
    rows = []
    for b, position in itertools.product(range(batch), itertools.product(*map(range, out))):
        row = np.zeros((groups, per_group * math.prod(kernel)))
        for g in range(groups):
            taps = itertools.product(range(per_group), *map(range, kernel))
            for d, (c, *tap) in enumerate(taps):
                at = [
                    o * t - p + i * s
                    for o, t, p, i, s in zip(position, stride, padding, tap, dilation, strict=True)
                ]
                if all(0 <= a < s for a, s in zip(at, size, strict=True)):
                    row[g, d] = x[(b, g * per_group + c, *at)]
        rows.append(row)
    return np.array(rows), out


def close(actual: torch.Tensor, expected: np.ndarray) -> None:
    assert actual.dtype == torch.float64
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_compete(rule: HebbianRule, dim: int) -> None:
    u = torch.randn(5, 6, 7, dtype=torch.float64)
    u[:, :, 3] = u[:, :, 1].round()
    rows = u.movedim(dim, -1).reshape(-1, u.shape[dim])
    expected = torch.tensor([compete_position(row.tolist(), rule) for row in rows], dtype=torch.float64)
    shape = u.movedim(dim, -1).shape
    close(reference.compete(u, rule, dim).movedim(dim, -1), expected.reshape(shape).numpy())


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_ties_go_to_the_lowest_index(rule: HebbianRule) -> None:
    u = torch.tensor(
        [[2, 1, 2, 1, 2], [0.0, -0.0, 0.0, -0.0, 0.0], [1, 1, 1, 1, 1], [-1, 0, 3, 3, 3]]
    ).double()
    expected = np.array([compete_position(row.tolist(), rule) for row in u])
    close(reference.compete(u, rule), expected)


def test_kwta_keeps_exactly_k() -> None:
    u = torch.tensor([[3.0, 5.0, 3.0, 5.0], [1.0, 1.0, 1.0, 1.0]])
    assert reference.kwta(u, 3).tolist() == [[3, 5, 0, 5], [1, 1, 1, 0]]
    assert reference.kwta(u.t(), 0.5, 0).t().tolist() == [[0, 5, 0, 5], [1, 1, 0, 0]]


def test_a_nan_fills_its_position() -> None:
    u = torch.tensor([[1.0, float("nan"), 3.0], [1.0, 2.0, 3.0]])
    for rule in RULES:
        y = reference.compete(u, rule)
        assert y[0].isnan().all()
        assert y[1].isfinite().all()


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_linear_delta(rule: HebbianRule, decay: str, normalize: str) -> None:
    rule = HebbianRule(rule.activity, rule.winners, rule.temperature, rule.losers, decay, normalize)
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    weight = torch.randn(5, 4, dtype=torch.float64)
    u = x @ weight.t() + 0.3
    expected = loop_delta(x.reshape(-1, 1, 4).numpy(), u.reshape(-1, 5).numpy(), weight.numpy(), rule)
    close(reference.linear_delta(x, u, weight, rule), expected)


CONVOLUTIONS = [
    # size, kernel, stride, padding, dilation, groups, units
    ((5,), (3,), (1,), (0,), (1,), 1, 4),
    ((7,), (3,), (2,), (2,), (2,), 2, 4),
    ((5,), (2,), (1,), (1,), (1,), 4, 4),
    ((4, 5), (3, 2), (1, 2), (1, 0), (1, 1), 1, 3),
    ((5, 4), (2, 2), (2, 1), (0, 2), (2, 1), 2, 6),
    ((3, 3), (2, 1), (1, 1), (1, 1), (1, 1), 4, 8),
    ((2, 3, 4), (2, 2, 3), (1, 2, 1), (1, 0, 2), (1, 1, 2), 1, 3),
    ((3, 2, 3), (1, 2, 2), (2, 1, 1), (0, 1, 0), (1, 1, 1), 2, 4),
]


@pytest.mark.parametrize(("size", "kernel", "stride", "padding", "dilation", "groups", "units"), CONVOLUTIONS)
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_conv(size, kernel, stride, padding, dilation, groups, units, decay, normalize) -> None:
    rule = HebbianRule(winners=2, temperature=0.5, decay=decay, normalize=normalize)
    x = torch.randn(2, 4, *size, dtype=torch.float64)
    weight = torch.randn(units, 4 // groups, *kernel, dtype=torch.float64)
    patches, out = loop_patches(x.numpy(), kernel, stride, padding, dilation, groups)
    u = torch.randn(2, units, *out, dtype=torch.float64)
    rows = u.movedim(1, -1).reshape(-1, units).numpy()
    flat = weight.flatten(1).numpy()
    arguments = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    H = loop_delta(patches, rows, flat, rule)
    close(reference.conv_delta(x, u, weight, rule, **arguments), H.reshape(weight.shape))

    grad_u = torch.randn(u.shape, dtype=torch.float64)
    G = loop_delta(
        patches,
        grad_u.movedim(1, -1).reshape(-1, units).numpy(),
        flat,
        HebbianRule(activity="linear", decay="none", normalize="none"),
    )
    gated = reference.conv_weight_grad(x, u, grad_u, weight, rule, **arguments)
    close(gated, (np.abs(H) * np.sign(G)).reshape(weight.shape))
    local = HebbianRule(winners=2, temperature=0.5, decay=decay, normalize=normalize, gate="none")
    close(reference.conv_weight_grad(x, u, grad_u, weight, local, **arguments), -H.reshape(weight.shape))


def test_the_patches_are_those_of_torch() -> None:
    """The loops' G is torch's weight gradient, which ties both to the layers."""
    x = torch.randn(2, 4, 5, 4, dtype=torch.float64)
    weight = torch.randn(6, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    u = torch.nn.functional.conv2d(x, weight, None, (2, 1), (0, 2), (2, 1), 2)
    grad_u = torch.randn_like(u)
    u.backward(grad_u)
    patches, out = loop_patches(x.numpy(), (2, 2), (2, 1), (0, 2), (2, 1), 2)
    assert out == u.shape[2:]
    rule = HebbianRule(activity="linear", decay="none", normalize="none")
    rows = grad_u.movedim(1, -1).reshape(-1, 6).numpy()
    G = loop_delta(patches, rows, weight.detach().flatten(1).numpy(), rule)
    close(weight.grad, G.reshape(weight.shape))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("padding", ["same", "valid", 1, (2,), (1, 0)])
@pytest.mark.parametrize("kernel", [(3, 2), (4, 1)])
def test_padding_is_that_of_torch(kernel: tuple[int, int], padding: str | int | tuple[int, ...]) -> None:
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    weight = torch.randn(6, 2, *kernel, dtype=torch.float64, requires_grad=True)
    arguments = {"padding": padding, "dilation": (1, 3), "groups": 2}
    u = torch.nn.functional.conv2d(x, weight, **arguments)
    u.backward(u.detach())
    rule = HebbianRule(activity="linear", decay="none", normalize="none")
    close(reference.conv_delta(x, u.detach(), weight.detach(), rule, **arguments), weight.grad.numpy())


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_unbatched_convolutions(dims: int) -> None:
    x, u, grad_u = (torch.randn(c, *(6 - s,) * dims).double() for c, s in ((4, 0), (6, 2), (6, 2)))
    weight = torch.randn(6, 4, *(3,) * dims).double()
    one = [t.unsqueeze(0) for t in (x, u, grad_u)]
    for rule in (HebbianRule(), HebbianRule(decay="instar"), HebbianRule(gate="none")):
        H = reference.conv_delta(*one[:2], weight, rule)
        gated = reference.conv_weight_grad(*one, weight, rule)
        assert torch.equal(reference.conv_delta(x, u, weight, rule), H)
        assert torch.equal(reference.conv_weight_grad(x, u, grad_u, weight, rule), gated)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"padding": "full"}, "got 'full'"), ({"padding": "same", "stride": 2}, "needs stride 1, got stride 2")],
)
def test_padding_that_torch_refuses(arguments: dict[str, Any], message: str) -> None:
    x, u, weight = torch.ones(1, 2, 5), torch.ones(1, 3, 5), torch.ones(3, 2, 3)
    with pytest.raises(ValueError, match=message):
        reference.conv_delta(x, u, weight, HebbianRule(), **arguments)


def test_arguments_are_those_of_functional() -> None:
    for name, theirs in vars(functional).items():
        if inspect.isfunction(theirs) and theirs.__module__ == functional.__name__ and name[0] != "_":
            ours = inspect.signature(getattr(reference, name))
            assert ours == inspect.signature(theirs), name


def test_linear_weight_grad() -> None:
    x, weight = torch.randn(7, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    u, grad_u = torch.randn(7, 5, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)
    H = loop_delta(x.unsqueeze(1).numpy(), u.numpy(), weight.numpy(), HebbianRule())
    gated = reference.linear_weight_grad(x, u, grad_u, weight, HebbianRule())
    close(gated, np.abs(H) * np.sign(np.einsum("pn,pd->nd", grad_u, x)))
    local = reference.linear_weight_grad(x, u, grad_u, weight, HebbianRule(gate="none"))
    close(local, -H)


def test_gate() -> None:
    inf, nan = math.inf, math.nan
    H = torch.tensor([-2.0, 2.0, 2.0, -2.0, 0.0, nan, 1.0, 1.0, 1.0])
    G = torch.tensor([3.0, -1e-30, 0.0, -0.0, 5.0, 1.0, inf, -inf, nan])
    expected = torch.tensor([2.0, -2.0, 0.0, 0.0, 0.0, nan, nan, nan, nan])
    assert torch.equal(reference.gate(H, G).nan_to_num(99), expected.nan_to_num(99))


@pytest.mark.parametrize("normalize", ["layer", "filter"])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_scale_that_is_not_finite_makes_its_scope_nan(normalize: str, bad: float) -> None:
    rule = HebbianRule(activity="linear", decay="none", normalize=normalize)
    u = torch.tensor([[1.0, 2.0]])
    x = torch.tensor([[1.0, bad]])
    H = reference.linear_delta(x, u, torch.zeros(2, 2), rule)
    assert H.isnan().all()
    x, u = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, bad]])
    H = reference.linear_delta(x, u, torch.zeros(2, 2), rule)
    if math.isnan(bad) or normalize == "layer":
        assert H.isnan().all()
    else:
        assert H[0].isfinite().all()
        assert H[1].isnan().all()


def test_empty_batches() -> None:
    for decay, normalize in itertools.product(DECAYS, NORMALIZATIONS):
        rule = HebbianRule(decay=decay, normalize=normalize)
        H = reference.linear_delta(torch.ones(0, 3), torch.ones(0, 2), torch.ones(2, 3), rule)
        assert H.tolist() == [[0.0] * 3] * 2
        H = reference.conv_delta(torch.ones(0, 3, 4), torch.ones(0, 2, 3), torch.ones(2, 3, 2), rule)
        assert H.shape == (2, 3, 2)
        assert not H.any()


def test_convolutions_without_channels() -> None:
    for decay, normalize in itertools.product(DECAYS, NORMALIZATIONS):
        rule = HebbianRule(decay=decay, normalize=normalize)
        x, u, weight = torch.ones(2, 0, 4), torch.ones(2, 5, 3), torch.ones(5, 0, 2)
        assert reference.conv_delta(x, u, weight, rule).shape == weight.shape
        assert reference.conv_weight_grad(x, u, u, weight, rule).shape == weight.shape
