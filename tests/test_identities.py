"""What the mathematics says must be equal, and what must not change a single bit."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor, nn

import ghl_kernels as ghl
from ghl_kernels import HebbianRule, functional

pytestmark = [pytest.mark.usefixtures("poison"), pytest.mark.broad]

DECAYS = ("oja", "instar", "none", "subspace", "sanger")
RULES = [
    HebbianRule(),
    HebbianRule(winners=1),
    HebbianRule.kwta(2),
    HebbianRule(losers="anti", temperature=0.5),
    HebbianRule(activity="relu", decay="instar"),
    HebbianRule(winners=3, decay="subspace", normalize="filter"),
    HebbianRule(activity="linear", decay="sanger", normalize="mean"),
    HebbianRule(activity="binary", winners=2, normalize="none"),
]
rounding = {"rtol": 2e-5, "atol": 2e-6}


def conv_gradient(
    rule: HebbianRule, x: Tensor, weight: Tensor, grad_u: Tensor, sums_at: str = "forward"
) -> Tensor:
    """weight.grad of a 3 x 3 layer with padding 1."""
    layer = ghl.GHLConv2d(
        weight.shape[1], weight.shape[0], 3, padding=1, bias=False, rule=rule, sums_at=sums_at
    )
    layer.weight.data.copy_(weight)
    layer(x).backward(grad_u)
    return layer.weight.grad


def data(batch: int = 4, units: int = 37) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(batch, 5, 9, 7), torch.randn(units, 5, 3, 3) / 6, torch.randn(batch, units, 9, 7)


# --- the mathematics ----------------------------------------------------------------------------


@pytest.mark.parametrize("winners", [None, 2])
@pytest.mark.parametrize("activity", ["softmax", "linear", "relu"])
def test_oja_decay_is_free(backend: str, activity: str, winners: int | None) -> None:
    """<W_k, A_k> is sum_p y_pk (w_k . x_p): with no bias, the authors' sum of y * u."""
    x, weight = torch.randn(50, 7, dtype=torch.float64), torch.randn(11, 7, dtype=torch.float64)
    u = x @ weight.t()
    rule = HebbianRule(activity=activity, winners=winners, normalize="none")
    y = functional.compete(u, rule)
    explicit = y.t() @ x - (y * u).sum(0).unsqueeze(1) * weight
    torch.testing.assert_close(functional.linear_delta(x, u, weight, rule), explicit)


@pytest.mark.parametrize("activity", ["softmax", "linear", "relu"])
@pytest.mark.parametrize("losers", ["silent", "anti"])
def test_all_winners_equal_none(backend: str, activity: str, losers: str) -> None:
    x, weight, _ = data()
    u = nn.functional.conv2d(x, weight, padding=1)
    everyone, counted = (HebbianRule(activity=activity, losers=losers, winners=k) for k in (None, 37))
    y = functional.compete(u, counted, 1)
    torch.testing.assert_close(y, functional.compete(u, everyone, 1), rtol=1e-6, atol=1e-7)
    H = functional.conv_delta(x, u, weight, counted, padding=1)
    torch.testing.assert_close(H, functional.conv_delta(x, u, weight, everyone, padding=1), **rounding)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_conv_of_size_one_is_linear(backend: str, rule: HebbianRule, dims: int) -> None:
    x, weight = torch.randn(3, 7, *(4, 3, 2)[:dims]), torch.randn(11, 7)
    u = torch.randn(3, 11, *x.shape[2:])
    kernel = weight.reshape(11, 7, *(1,) * dims)
    by_conv = functional.conv_delta(x, u, kernel, rule)
    by_linear = functional.linear_delta(x.movedim(1, -1), u.movedim(1, -1), weight, rule)
    torch.testing.assert_close(by_conv.view_as(by_linear), by_linear, **rounding)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("activity", ["linear", "relu"])
def test_groups_equal_separate_layers(backend: str, activity: str, decay: str) -> None:
    """Where units do not compete, each group is a layer of its own."""
    rule = HebbianRule(activity=activity, decay=decay, normalize="filter")
    x, weight, u = torch.randn(4, 6, 7, 5), torch.randn(12, 2, 3, 2), torch.randn(4, 12, 5, 4)
    together = functional.conv_delta(x, u, weight, rule, groups=3)
    apart = [
        functional.conv_delta(
            x[:, 2 * g : 2 * g + 2], u[:, 4 * g : 4 * g + 4], weight[4 * g : 4 * g + 4], rule
        )
        for g in range(3)
    ]
    torch.testing.assert_close(together, torch.cat(apart), **rounding)


@pytest.mark.parametrize("winners", [None, 1, 3])
@pytest.mark.parametrize("decay", DECAYS)
def test_depthwise_rows_are_rows_of_the_dense_layer(backend: str, winners: int | None, decay: str) -> None:
    """A depthwise layer with all channels alike correlates as one dense layer on that channel does."""
    rule = HebbianRule(winners=winners, decay=decay, normalize="none")
    plane, weight, u = torch.randn(3, 1, 8, 6), torch.randn(5, 1, 3, 3), torch.randn(3, 5, 6, 4)
    depthwise = functional.conv_delta(plane.expand(3, 5, 8, 6), u, weight, rule, groups=5)
    dense = functional.conv_delta(plane, u, weight, rule)
    if decay in ("subspace", "sanger"):  # units of different groups do not decay each other
        y = functional.compete(u, rule, 1)
        A = functional.conv_delta(plane, u, weight, dataclasses.replace(rule, decay="none"))
        dense = A - y.square().sum((0, 2, 3)).view(5, 1, 1, 1) * weight
    torch.testing.assert_close(depthwise, dense, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_conv1d_is_conv2d_of_height_one_is_conv3d(backend: str, rule: HebbianRule) -> None:
    x, u, weight = torch.randn(3, 4, 11), torch.randn(3, 6, 6), torch.randn(6, 2, 3)
    line = functional.conv_delta(x, u, weight, rule, stride=2, padding=1, groups=2)
    for dims in (1, 2):
        one = (1,) * dims
        x_, u_, weight_ = (t.view(*t.shape[:2], *one, -1) for t in (x, u, weight))
        other = functional.conv_delta(
            x_, u_, weight_, rule, stride=(*one, 2), padding=((0,) * dims + (1,)), groups=2
        )
        torch.testing.assert_close(other.view_as(line), line, **rounding)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_sums_at_forward_equals_backward(backend: str, rule: HebbianRule) -> None:
    """Bit for bit: the same sums of the same numbers, only later."""
    x, weight, grad_u = data()
    early, late = (conv_gradient(rule, x, weight, grad_u, sums_at) for sums_at in ("forward", "backward"))
    assert torch.equal(early, late)


@pytest.mark.broad
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_the_order_of_the_batch_does_not_matter(backend: str, rule: HebbianRule) -> None:
    x, weight, _ = data(batch=7)
    u = nn.functional.conv2d(x, weight, padding=1)
    order = torch.randperm(7)
    H = functional.conv_delta(x, u, weight, rule, padding=1)
    # a sum of hundreds of terms that comes out small is off by what the others round to
    bound = max(2e-6, 5e-7 * H.abs().max().item())
    torch.testing.assert_close(
        functional.conv_delta(x[order], u[order], weight, rule, padding=1), H, rtol=2e-5, atol=bound
    )


@pytest.mark.broad
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_sums_add_over_the_batch(backend: str, rule: HebbianRule) -> None:
    """A and the moments are linear in the data: two halves add up to the whole, and none of it is lost."""
    x, weight, _ = data(batch=7)
    u = nn.functional.conv2d(x, weight, padding=1)
    one = ((3, 3), (1, 1), (1, 1), (1, 1), 1, False, *rule.competition(37), rule.decay)

    def dense(part: slice) -> tuple[Tensor, Tensor]:
        return torch.ops.ghl.conv_sums(x[part], u[part], *one)

    def sparse(part: slice) -> tuple[Tensor, Tensor]:
        lists = torch.ops.ghl.winners(u[part], 1, *rule.competition(37))
        return torch.ops.ghl.conv_winner_sums(x[part], *lists, 37, *one[:6], rule.decay)

    for sums in (dense, sparse) if rule.winners else (dense,):
        for total, first, last in zip(*map(sums, (slice(0, 7), slice(0, 6), slice(6, 7))), strict=True):
            torch.testing.assert_close(first + last, total, rtol=2e-5, atol=2e-5)
            assert last.any()


@pytest.mark.parametrize("activity", ["softmax", "binary"])
def test_scale_free(backend: str, activity: str) -> None:
    """The layer norm makes H independent of the number of times the data are repeated."""
    rule = HebbianRule(activity=activity, winners=3)
    x, weight, _ = data()
    u = nn.functional.conv2d(x, weight, padding=1)
    H = functional.conv_delta(x, u, weight, rule, padding=1)
    assert H.abs().max() == 1.0
    twice = functional.conv_delta(torch.cat([x, x]), torch.cat([u, u]), weight, rule, padding=1)
    torch.testing.assert_close(twice, H, **rounding)


@pytest.mark.large
def test_a_local_update_is_hebbian(backend: str) -> None:
    """Oja's rule finds the first principal component, of length one: the sign of H is uphill."""
    direction = torch.tensor([0.6, 0.8, 0.0])
    x = torch.randn(4000, 1) * direction * 3 + torch.randn(4000, 3) * 0.3
    layer = ghl.GHLLinear(3, 1, bias=False, rule=HebbianRule.oja())
    for _ in range(200):
        layer.learn_(x, 0.05)
    weight = layer.weight[0].detach()
    torch.testing.assert_close(weight * weight[0].sign(), direction, rtol=0, atol=0.02)


def test_gated_training_descends(backend: str) -> None:
    """The gated gradient is a descent direction: steps along it lower the loss."""
    layer = ghl.GHLLinear(7, 11, rule=HebbianRule.ghl())
    x, target = torch.randn(64, 7), torch.randn(64, 11)
    optimizer = torch.optim.SGD(layer.parameters(), 0.01)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (layer(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


# --- bits ---------------------------------------------------------------------------------------


def results(dtype: torch.dtype, rule: HebbianRule) -> list[Tensor]:
    """Everything that a kernel computes, from fixed numbers."""
    torch.manual_seed(3)
    x, weight, grad_u = (t.to(dtype) for t in data(batch=6))
    u = torch.randn(6, 37, 9, 7).to(dtype)
    rows = u.movedim(1, -1).reshape(-1, 37)
    out = [
        functional.compete(u, rule, 1),
        functional.compete(rows, rule),
        functional.conv_delta(x, u, weight, rule, padding=1),
        functional.conv_weight_grad(x, u, grad_u, weight, rule, padding=1),
        functional.linear_delta(torch.randn(378, 13).to(dtype), rows, torch.randn(37, 13).to(dtype), rule),
    ]
    layer = ghl.GHLLinear(13, 37, rule=rule, dtype=dtype)
    layer.learn_(torch.randn(91, 13).to(dtype), 0.1)
    return [*out, layer.weight.detach()]


@pytest.mark.broad
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_repeats_bit_for_bit(backend: str, dtype: torch.dtype, rule: HebbianRule) -> None:
    first, second = results(dtype, rule), results(dtype, rule)
    assert all(itertools.starmap(torch.equal, zip(first, second, strict=True)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("winners", [1, 2, 3])
@pytest.mark.parametrize("decay", ["oja", "instar", "none"])
@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_threads_do_not_change_a_bit(backend: str, dtype: torch.dtype, winners: int, decay: str) -> None:
    """Where our own kernels do all the work; the dense product is the library's, and so are its bits."""
    rule = HebbianRule(winners=winners, decay=decay)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = results(dtype, dataclasses.replace(rule, gate="none"))
        for count in (2, 3, 5):
            torch.set_num_threads(count)
            together = results(dtype, dataclasses.replace(rule, gate="none"))
            # learn_ last: its u is the library's
            assert all(itertools.starmap(torch.equal, zip(alone[:-1], together[:-1], strict=True)))
    finally:
        torch.set_num_threads(threads)
