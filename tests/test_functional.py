"""ghl.functional against the float64 reference, over shapes, layouts, dtypes and rules."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from oracle import (
    EPS32,
    LAYOUTS,
    assert_as_good,
    assert_gated,
    embed,
    guards_intact,
    judge_delta,
    padded_input,
)
from strategies import DTYPES, UNITS, LayerCase, crossover, layer_cases, rules
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from ghl_kernels import HebbianRule, functional, reference

pytestmark = [
    pytest.mark.usefixtures("poison"),
    # torch's own remark on padding="same" with even kernels, which are tested on purpose
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning"),
]


@st.composite
def _competitions(draw: st.DrawFn) -> dict[str, Any]:
    units = draw(st.sampled_from(UNITS))
    others = draw(st.lists(st.sampled_from((0, 1, 2, 3, 5, 17)), max_size=3))
    dim = draw(st.integers(0, len(others)))
    return {
        "shape": (*others[:dim], units, *others[dim:]),
        "dim": dim if draw(st.booleans()) else dim - len(others) - 1,
        "rule": draw(rules(units)),
        "dtype": draw(st.sampled_from(DTYPES)),
        "layout": draw(st.sampled_from(LAYOUTS)),
        "values": draw(st.sampled_from(("normal", "ties", "constant", "zeros", "denormal", "large"))),
    }


def _values(kind: str, shape: tuple[int, ...]) -> Tensor:
    if kind == "normal":
        return torch.randn(shape)
    if kind == "ties":
        return torch.randint(-2, 3, shape).float()
    if kind == "constant":
        return torch.full(shape, -1.5)
    if kind == "zeros":  # of both signs, which are equal
        return torch.where(torch.rand(shape) < 0.5, 0.0, -0.0)
    if kind == "denormal":
        return torch.randint(-3, 4, shape) * 1e-45
    return torch.randn(shape) * 1e4


@given(case=_competitions())
@example(  # a position tied at the threshold across the boundary of every vector width
    case={
        "shape": (3, 67, 2),
        "dim": 1,
        "rule": HebbianRule.kwta(33),
        "dtype": torch.float32,
        "layout": "contiguous",
        "values": "constant",
    }
)
def test_compete(backend: str, case: dict[str, Any]) -> None:
    u = embed(_values(case["values"], case["shape"]).to(case["dtype"]), case["layout"])
    before = u.clone()
    rule, dim = case["rule"], case["dim"]
    y = functional.compete(u, rule, dim)
    assert (y.shape, y.dtype) == (u.shape, u.dtype)
    assert torch.equal(u, before)
    expected = reference.compete(u.double(), rule, dim)
    if rule.activity == "softmax":
        eager = reference.compete(u.to(torch.promote_types(u.dtype, torch.float32)), rule, dim)
        largest = u.abs().max().item() / rule.temperature if u.numel() else 0.0
        assert_as_good(y, eager, expected, EPS32 * (8 + 2 * largest))
        assert torch.equal(y == 0, (expected == 0) | (y == 0)), "a loser is active"
    else:  # nothing is rounded
        assert torch.equal(y.double(), expected)


@given(case=_competitions())
def test_exactly_k_win_whatever_ties(backend: str, case: dict[str, Any]) -> None:
    u = embed(_values(case["values"], case["shape"]).to(case["dtype"]), case["layout"])
    rule = HebbianRule(activity="binary", winners=case["rule"].winners or 1)
    wins = functional.compete(u, rule, case["dim"])
    assert torch.equal(wins.double(), reference.compete(u.double(), rule, case["dim"]))
    assert bool((wins.sum(case["dim"]) == rule.winners_of(u.shape[case["dim"]])).all())


@pytest.mark.parametrize(("temperature", "y"), [(2.0**-126, [0.0, 0.0, 1.0]), (3.4e38, [1 / 3] * 3)])
def test_the_outermost_temperatures(backend: str, temperature: float, y: list[float]) -> None:
    u = torch.tensor([[-0.5, 0.25, 0.5]])
    torch.testing.assert_close(functional.compete(u, HebbianRule.ghl(temperature)), torch.tensor([y]))


def test_kwta_is_compete(backend: str) -> None:
    u = torch.randint(-3, 4, (3, 11, 5)).float()
    assert torch.equal(functional.kwta(u, 4, 1), reference.kwta(u, 4, 1))
    assert torch.equal(functional.kwta(u, 0.5), reference.kwta(u, 3))
    assert torch.equal(functional.kwta(u, 11, -2), u)


def _conv_arguments(case: LayerCase) -> dict[str, Any]:
    return {name: case.arguments[name] for name in ("stride", "dilation", "groups")}


@pytest.mark.parametrize("narrow", ["x", "grad_u"])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_gradient_of_another_dtype(backend: str, kind: str, narrow: str) -> None:
    """Neither is rounded to a dtype that does not hold it."""
    x, u, grad_u, weight = torch.randn(9, 4), torch.randn(9, 5), torch.randn(9, 5), torch.randn(5, 4)
    if narrow == "x":
        x, u, weight, grad_u = x.half(), u.half(), weight.half(), 1e-9 * grad_u
    else:
        x, grad_u = 1e5 * x, grad_u.half()
    G = grad_u.double().t() @ x.double()
    if kind == "conv":
        x, u, grad_u = (tensor.t().unsqueeze(0) for tensor in (x, u, grad_u))
        weight = weight.unsqueeze(-1)
    function = getattr(functional, f"{kind}_weight_grad")
    gated = function(x, u, grad_u, weight, HebbianRule()).view(5, 4)
    assert torch.equal(gated.sign(), G.sign().to(gated.dtype))
    assert gated.abs().max().item() == pytest.approx(1.0, rel=1e-3)


@given(case=layer_cases())
def test_delta_and_weight_grad(backend: str, case: LayerCase) -> None:
    with crossover(case.path):
        _check_delta_and_weight_grad(case)


def _check_delta_and_weight_grad(case: LayerCase) -> None:
    plain, _ = case.layers()
    x = case.x()
    with torch.no_grad():
        u = embed(plain(x), case.grad_layout)
    grad_u = case.grad_u(u)
    weight, rule = plain.weight.detach(), case.rule
    if case.kind == "Linear":
        delta, arguments, dim, inner = reference.linear_delta, {}, -1, (x, u, grad_u)
        H = functional.linear_delta(x, u, weight, rule)
        gated = functional.linear_weight_grad(x, u, grad_u, weight, rule)
    else:
        dim, arguments = 1, _conv_arguments(case)
        padded = padded_input(plain, x)
        inner = (padded, u.view_as(u) if u.dim() == padded.dim() else u.unsqueeze(0), grad_u)
        inner = (*inner[:2], grad_u.reshape(inner[1].shape))
        delta = reference.conv_delta
        if plain.padding_mode == "zeros":
            outer, padding = x, {"padding": case.arguments["padding"]}
        else:
            outer, padding = padded.squeeze(0) if x.dim() < padded.dim() else padded, {}
        H = functional.conv_delta(outer, u, weight, rule, **arguments, **padding)
        gated = functional.conv_weight_grad(outer, u, grad_u, weight, rule, **arguments, **padding)
    sums = torch.promote_types(case.dtype, torch.float32)
    assert H.dtype == gated.dtype == sums
    assert H.shape == gated.shape == weight.shape
    judgement = judge_delta(delta, inner[0], inner[1], weight, rule, dim, **arguments)
    assert_as_good(H, judgement.eager, judgement.oracle, judgement.floor)
    if rule.gate == "none":
        assert torch.equal(gated, -H)
        return
    correlate = HebbianRule(activity="linear", decay="none", normalize="none")
    G = delta(inner[0].double(), inner[2].double(), weight.double(), correlate, **arguments)
    magnitude = delta(
        inner[0].double().abs(), inner[2].double().abs(), weight.double(), correlate, **arguments
    )
    assert_gated(gated, judgement, G, magnitude, torch.finfo(case.dtype).eps)


@pytest.mark.broad
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decay", ["oja", "instar", "none", "subspace", "sanger"])
@pytest.mark.parametrize("winners", [None, 1, 23])
def test_many_positions(backend: str, dtype: torch.dtype, decay: str, winners: int | None) -> None:
    """More positions and units than a tile or a vector holds, and multiples of neither."""
    rule = HebbianRule(winners=winners, decay=decay)
    x, weight = torch.randn(3, 3, 19, 23).to(dtype), torch.randn(67, 3, 3, 3) / 5
    u = torch.nn.functional.conv2d(x.float(), weight, padding=1).to(dtype)
    conv = {"padding": 1}
    judgement = judge_delta(reference.conv_delta, x, u, weight, rule, 1, **conv)
    H = functional.conv_delta(x, u, weight, rule, **conv)
    assert_as_good(H, judgement.eager, judgement.oracle, judgement.floor)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_batch_in_blocks(backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """16-bit inputs are summed block by block; every block counts, the last and smaller one too."""
    from ghl_kernels.backends import eager

    monkeypatch.setattr(eager, "_BLOCK_BYTES", 4 * 1000)
    x, weight = torch.randn(7, 3, 9, 9).to(dtype), torch.randn(5, 3, 3, 3)
    u = torch.nn.functional.conv2d(x.float(), weight).to(dtype)
    for rule in (HebbianRule(), HebbianRule(decay="instar"), HebbianRule(decay="subspace", normalize="mean")):
        judgement = judge_delta(reference.conv_delta, x, u, weight, rule, 1)
        assert_as_good(functional.conv_delta(x, u, weight, rule), *_order(judgement))
        rows, flat = x.movedim(1, -1), u.new_ones(1).expand(7, 9, 9, 1) * x[:, :1].movedim(1, -1)
        judgement = judge_delta(reference.linear_delta, rows, flat, weight[:1, :, 0, 0], rule, -1)
        assert_as_good(functional.linear_delta(rows, flat, weight[:1, :, 0, 0], rule), *_order(judgement))


def _order(judgement: Any) -> tuple[Tensor, Tensor, Tensor]:
    return judgement.eager, judgement.oracle, judgement.floor


def test_inputs_are_read_within_their_bounds(backend: str) -> None:
    """Arguments are slices of buffers of NaN: reading past one shows in the result, writing in the buffer."""
    for dtype in (torch.float32, torch.bfloat16):
        x, weight = torch.randn(2, 5, 7, 9).to(dtype), torch.randn(19, 5, 3, 3).to(dtype)
        u = torch.nn.functional.conv2d(x.float(), weight.float()).to(dtype)
        arguments = [embed(t, "slice") for t in (x, u, torch.randn(u.shape).to(dtype), weight)]
        for winners in (None, 1, 9):
            rule = HebbianRule(winners=winners)
            H = functional.conv_delta(arguments[0], arguments[1], arguments[3], rule)
            assert torch.equal(H, functional.conv_delta(x, u, weight, rule))
            assert functional.conv_weight_grad(*arguments, rule).isfinite().all()
            assert functional.compete(arguments[1], rule, 1).isfinite().all()
        assert all(guards_intact(argument) for argument in arguments)


def test_nothing_requires_grad(backend: str) -> None:
    x, u = torch.randn(4, 3, requires_grad=True), torch.randn(4, 5, requires_grad=True)
    weight, rule = torch.randn(5, 3, requires_grad=True), HebbianRule()
    image, response = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 5, 3, requires_grad=True)
    kernel = torch.randn(5, 3, 2, requires_grad=True)
    results = [
        functional.compete(u, rule),
        functional.kwta(u, 2),
        functional.linear_delta(x, u, weight, rule),
        functional.linear_weight_grad(x, u, u, weight, rule),
        functional.conv_delta(image, response, kernel, rule),
        functional.conv_weight_grad(image, response, response, kernel, rule),
        functional.gate(weight, weight),
    ]
    assert not any(result.requires_grad for result in results)


def test_gate_is_the_reference(backend: str) -> None:
    H, G = torch.randn(5, 7), torch.randn(5, 7)
    G[0, 0], G[1, 1], G[2, 2] = 0.0, float("nan"), float("inf")
    assert torch.equal(functional.gate(H, G).nan_to_num(9), reference.gate(H, G).nan_to_num(9))


def _linear(**changes: Any) -> dict[str, Any]:
    arguments = {
        "x": torch.ones(4, 3),
        "u": torch.ones(4, 5),
        "weight": torch.ones(5, 3),
        "rule": HebbianRule(),
    }
    return {**arguments, **changes}


def _conv(**changes: Any) -> dict[str, Any]:
    arguments = {
        "x": torch.ones(2, 4, 6),
        "u": torch.ones(2, 6, 4),
        "weight": torch.ones(6, 4, 3),
        "rule": HebbianRule(),
    }
    return {**arguments, **changes}


META = torch.ones(4, 5, device="meta")
BAD = [
    ("compete", {"u": torch.ones(4, 5, dtype=torch.int64), "rule": HebbianRule()}, TypeError, "int64"),
    (
        "compete",
        {"u": torch.ones(4, 5, dtype=torch.complex64), "rule": HebbianRule()},
        TypeError,
        "complex64",
    ),
    ("compete", {"u": torch.ones(4, 5, dtype=torch.bool), "rule": HebbianRule()}, TypeError, "bool"),
    ("compete", {"u": META, "rule": HebbianRule()}, ValueError, "u is a meta tensor"),
    ("compete", {"u": [[1.0]], "rule": HebbianRule()}, TypeError, "u must be a tensor, got list"),
    (
        "compete",
        {"u": torch.ones(4, 5), "rule": HebbianRule(), "dim": 2},
        ValueError,
        r"dim must be in \[-2, 1\]",
    ),
    ("compete", {"u": torch.ones(4, 5), "rule": HebbianRule(), "dim": -3}, ValueError, "got -3"),
    (
        "compete",
        {"u": torch.tensor(1.0), "rule": HebbianRule()},
        ValueError,
        r"u must have at least one dimension, .*got shape \(\)",
    ),
    ("kwta", {"u": torch.ones(4, 5), "k": 2, "dim": "x"}, TypeError, "dim must be an int, got 'x'"),
    ("kwta", {"u": torch.ones(4, 5), "k": 2, "dim": 1.0}, TypeError, "dim must be an int, got 1.0"),
    ("kwta", {"u": torch.ones(4, 5), "k": 2, "dim": (0, 1)}, TypeError, r"dim must be an int, got \(0, 1\)"),
    ("kwta", {"u": torch.ones(4, 5), "k": 2, "dim": None}, TypeError, "dim must be an int, got None"),
    ("kwta", {"u": torch.ones(4, 5), "k": 2, "dim": True}, TypeError, "dim must be an int, got True"),
    ("compete", {"u": torch.ones(4, 5), "rule": HebbianRule(winners=6)}, ValueError, "got 6 of 5"),
    ("kwta", {"u": torch.ones(4, 5), "k": 0}, ValueError, "got 0"),
    ("kwta", {"u": torch.ones(4, 5), "k": 6}, ValueError, "got 6 of 5"),
    ("kwta", {"u": torch.ones(4, 5), "k": 1.5}, ValueError, "got 1.5"),
    ("kwta", {"u": torch.ones(4, 5), "k": True}, TypeError, "got True"),
    ("linear_delta", _linear(x=torch.ones(3, 3)), ValueError, r"\(3, 3\) and \(4, 5\)"),
    (
        "linear_delta",
        _linear(x=torch.ones(4, 2)),
        ValueError,
        r"weight must have shape \(5, 2\), got \(5, 3\)",
    ),
    ("linear_delta", _linear(x=torch.ones(4, 3).double()), TypeError, "float64"),
    (
        "linear_delta",
        _linear(weight=torch.ones(5, 3).double()),
        TypeError,
        r"float64, or none, got x torch\.float32, u torch\.float32, weight torch\.float64",
    ),
    (
        "linear_weight_grad",
        _linear(weight=torch.ones(5, 3).double(), grad_u=torch.ones(4, 5)),
        TypeError,
        r"got x torch\.float32, u torch\.float32, weight torch\.float64",
    ),
    ("linear_delta", _linear(weight=torch.ones(5, 3).int()), TypeError, "int32"),
    ("linear_delta", _linear(u=META), ValueError, "meta"),
    ("linear_delta", _linear(rule=HebbianRule(winners=6)), ValueError, "got 6 of 5"),
    ("linear_weight_grad", _linear(grad_u=torch.ones(4, 4)), ValueError, r"grad_u must have shape \(4, 5\)"),
    ("linear_weight_grad", _linear(grad_u=torch.ones(4, 5).int()), TypeError, "grad_u"),
    (
        "conv_delta",
        _conv(x=torch.ones(2, 4, 7)),
        ValueError,
        r"u must have shape \(2, units, 5\), got \(2, 6, 4\)",
    ),
    ("conv_delta", _conv(x=torch.ones(3, 4, 6)), ValueError, r"u must have shape \(3"),
    ("conv_delta", _conv(weight=torch.ones(6, 4)), ValueError, r"weight must be .*got \(6, 4\)"),
    ("conv_delta", _conv(weight=torch.ones(6, 3, 3)), ValueError, r"weight must have shape \(6, 4, 3\)"),
    ("conv_delta", _conv(weight=torch.ones(5, 4, 3)), ValueError, r"weight must have shape \(6, 4, 3\)"),
    ("conv_delta", _conv(groups=3), ValueError, "groups=3, got 4"),
    ("conv_delta", _conv(groups=0), ValueError, "groups must be at least 1, got 0"),
    ("conv_delta", _conv(u=torch.ones(2, 5, 4), groups=2), ValueError, "groups=2, got 5"),
    ("conv_delta", _conv(stride=0), ValueError, "stride must be at least 1, got 0"),
    ("conv_delta", _conv(stride=(1, 1)), ValueError, r"stride must be an int or 1 ints, got \(1, 1\)"),
    ("conv_delta", _conv(dilation=0), ValueError, "dilation must be at least 1"),
    ("conv_delta", _conv(padding=-1), ValueError, "padding must be at least 0"),
    ("conv_delta", _conv(padding="full"), ValueError, "padding must be .*got 'full'"),
    ("conv_delta", _conv(groups="2"), TypeError, "groups must be an int, got '2'"),
    ("conv_delta", _conv(groups=1.0), TypeError, "groups must be an int, got 1.0"),
    ("conv_delta", _conv(groups=True), TypeError, "groups must be an int, got True"),
    ("conv_delta", _conv(stride="2"), TypeError, "stride must be an int or 1 ints, got '2'"),
    ("conv_delta", _conv(stride=(1.0,)), TypeError, r"stride must be an int or 1 ints, got \(1.0,\)"),
    ("conv_delta", _conv(stride=1.5), TypeError, "stride must be an int or 1 ints, got 1.5"),
    ("conv_delta", _conv(stride=None), TypeError, "stride must be an int or 1 ints, got None"),
    ("conv_delta", _conv(dilation=[True]), TypeError, r"dilation must be an int or 1 ints, got \[True\]"),
    ("conv_delta", _conv(padding=None), TypeError, "padding must be .*'same' or 'valid', got None"),
    (
        "conv_delta",
        _conv(weight=torch.ones(6, 4, 3).double()),
        TypeError,
        r"got x torch\.float32, u torch\.float32, weight torch\.float64",
    ),
    ("conv_delta", _conv(padding="same", stride=2), ValueError, "padding='same' needs stride 1"),
    ("conv_delta", _conv(x=torch.ones(2, 4, 2)), ValueError, "does not fit"),
    ("conv_delta", _conv(x=torch.ones(2, 4, 6, 6)), ValueError, "x must be"),
    ("conv_delta", _conv(x=torch.ones(2, 4, 6).half()), TypeError, "float16"),
    ("conv_delta", _conv(x=torch.ones(2, 4, 6, device="meta")), ValueError, "meta"),
    (
        "conv_weight_grad",
        _conv(grad_u=torch.ones(2, 6, 5)),
        ValueError,
        r"grad_u must have shape \(2, 6, 4\)",
    ),
    (
        "gate",
        {"H": torch.ones(2, 3), "G": torch.ones(3, 2)},
        ValueError,
        r"G must have shape \(2, 3\), got \(3, 2\)",
    ),
    ("gate", {"H": torch.ones(2, 3), "G": torch.ones(2, 3).int()}, TypeError, "G must be"),
]


U = {"u": torch.ones(4, 5)}
RULED: dict[str, dict[str, Any]] = {
    "compete": U,
    "linear_delta": _linear(),
    "linear_weight_grad": _linear(grad_u=torch.ones(4, 5)),
    "conv_delta": _conv(),
    "conv_weight_grad": _conv(grad_u=torch.ones(2, 6, 4)),
}


@pytest.mark.parametrize("rule", ["softmax", None, HebbianRule, HebbianRule.ghl])
@pytest.mark.parametrize("name", RULED)
def test_rule_of_the_wrong_type(name: str, rule: Any) -> None:
    with pytest.raises(TypeError, match="rule must be a HebbianRule, got "):
        getattr(functional, name)(**RULED[name] | {"rule": rule})


def test_rule_and_weight_in_each_others_place() -> None:
    """The message does not show all of a weight."""
    x, u, weight = _conv()["x"], _conv()["u"], _conv()["weight"]
    with pytest.raises(TypeError, match=r"a HebbianRule, got a tensor of shape \(6, 4, 3\)$"):
        functional.conv_delta(x, u, HebbianRule(), weight)


NO_WEIGHTS = [(0, 4), (5, 0), (0, 0)]


@pytest.mark.parametrize("size", NO_WEIGHTS, ids=str)
@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (0,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_linear_layer_without_weights(
    backend: str, dtype: torch.dtype, leading: tuple[int, ...], size: tuple[int, int]
) -> None:
    """As a convolution without any: nothing, in the dtype of the sums."""
    units, features = size
    x, u, weight = (
        torch.randn(*shape, dtype=dtype) for shape in ((*leading, features), (*leading, units), size)
    )
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    for rule in (HebbianRule.ghl(), HebbianRule.softhebb(), HebbianRule.hpca(), HebbianRule.kwta(0.5)):
        if rule.winners and not units:
            with pytest.raises(ValueError, match="at most the number of units 0, got 1"):
                functional.linear_delta(x, u, weight, rule)
            continue
        for module, expected in ((functional, sums), (reference, dtype)):
            H = module.linear_delta(x, u, weight, rule)
            G = module.linear_weight_grad(x, u, torch.randn_like(u), weight, rule)
            assert (H.shape, H.dtype) == (G.shape, G.dtype) == (size, expected)
    wide = functional.linear_weight_grad(x, u, u.double(), weight, HebbianRule.ghl())
    assert wide.dtype == torch.float64


@pytest.mark.parametrize(("name", "arguments", "error", "message"), BAD)
def test_bad_input(
    backend: str, name: str, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        partial(getattr(functional, name), **arguments)()


@pytest.mark.parametrize("as_int", [int, np.int64, np.array, torch.tensor], ids=lambda kind: kind.__name__)
def test_what_torch_takes_for_an_int(as_int: Any) -> None:
    x, weight = torch.randn(2, 4, 6, 6), torch.randn(6, 2, 3, 3)
    options = {"stride": 2, "padding": 1, "dilation": 1, "groups": 2}
    u = torch.conv2d(x, weight, **options)
    expected = functional.conv_delta(x, u, weight, HebbianRule(), **options)
    numbers = {name: as_int(value) for name, value in options.items()}
    pairs = {name: value if name == "groups" else (value, value) for name, value in numbers.items()}
    oracle = reference.conv_delta(x, u, weight, HebbianRule(), **options)
    for equal in (numbers, pairs):
        assert torch.equal(functional.conv_delta(x, u, weight, HebbianRule(), **equal), expected)
        assert torch.equal(reference.conv_delta(x, u, weight, HebbianRule(), **equal), oracle)
    assert torch.equal(functional.kwta(u, 2, as_int(1)), functional.kwta(u, 2, 1))


def test_ints_of_a_trace_stay_symbolic() -> None:
    """Convolution arguments that depend on a size are traced for other sizes, too."""

    def delta(x: Tensor, u: Tensor, weight: Tensor) -> Tensor:
        step = x.shape[0] - 1
        return functional.conv_delta(x, u, weight, HebbianRule(), stride=step, padding=(step, step))

    def inputs(batch: int) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = torch.randn(batch, 4, 9, 9), torch.randn(7, 4, 2, 2)  # equal sizes share a symbol
        return x, torch.conv2d(x, weight, stride=batch - 1, padding=batch - 1), weight

    traced = make_fx(delta, tracing_mode="symbolic")(*inputs(3))
    other = inputs(4)
    assert torch.equal(traced(*other), delta(*other))


@pytest.mark.large
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [1, 3, 87])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "slice"])
@pytest.mark.parametrize("path", ["sparse", "dense"])
def test_few_winners_over_many_blocks(
    backend: str, dtype: torch.dtype, groups: int, layout: str, path: str
) -> None:
    """More images, channels and groups than fit into a second-level cache at once; each winner counts."""
    rule = HebbianRule(winners=1, decay="instar", normalize="none")
    x = embed(torch.randn(3, 87, 63, 61).to(dtype), layout)
    u, weight = torch.randn(3, 87, 31, 30).to(dtype), torch.zeros(87, 87 // groups, 3, 3)
    y = reference.compete(u.float(), rule, 1).double()
    arguments = ([2, 2], [0, 0], [1, 1], False, [0, 0], groups, [False, True, False])
    # a zero weight decays by nothing: H is A, which the library sums in float64
    correlate = torch.ops.aten.convolution_backward
    A = correlate(y, x.double(), weight.double(), None, *arguments)[1]
    magnitude = correlate(y, x.double().abs(), weight.double(), None, *arguments)[1]
    with crossover(path):
        actual = functional.conv_delta(x, u, weight, rule, stride=2, groups=groups)
        decayed = functional.conv_delta(x, u, weight + 1, rule, stride=2, groups=groups)
    assert_as_good(actual, A.float(), A, 8 * EPS32 * magnitude)
    decay = y.sum((0, 2, 3)).view(-1, 1, 1, 1)
    assert_as_good(decayed, (A - decay).float(), A - decay, 8 * EPS32 * (magnitude + decay))
