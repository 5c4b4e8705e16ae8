"""The ghl:: operations: registered as torch.library wants it, guarded, and honest about what they mutate."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import EPS32, assert_as_good, embed, guards_intact
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map

from ghl_kernels import _check, _ops
from ghl_kernels.backends.eager import moments_size

ops = torch.ops.ghl
SOFTMAX = ("softmax", 0, 1.0, False)
ANTI = ("softmax", 0, 0.5, True)
FEW = ("softmax", 2, 2.0, True)
KWTA = ("linear", 3, 1.0, False)
GEOMETRY = ((3, 2), (2, 1), (1, 0), (1, 2), 2, False)  # of x (2, 4, 7, 6) and u (2, 6, 4, 4)


def _sums(weight: Tensor, groups: int, decay: str) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return torch.randn(weight.shape, dtype=dtype), torch.rand(
        moments_size(weight.shape[0], groups, decay), dtype=dtype
    )


def _winner_lists(positions: int, k: int, units: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    unit = torch.rand(positions, units).argsort(1)[:, :k].sort(1).values.to(torch.int32)
    return unit, torch.rand(positions, k, dtype=torch.promote_types(dtype, torch.float32))


def _tensors(arguments: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]


def samples(name: str, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    """Arguments of an operation: linear and convolution, several rules and layouts."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype)

    image, response = draw(2, 4, 7, 6), draw(2, 6, 4, 4)
    last = {"memory_format": torch.channels_last}
    if name in ("compete", "competition_state", "winners"):
        rules = (FEW, KWTA) if name == "winners" else (SOFTMAX, ANTI, FEW, KWTA)
        inputs = [(draw(5, 7), -1), (response, 1), (response.contiguous(**last), 1), (draw(3, 5, 7), 0)]
        inputs += [(draw(5, 14)[:, ::2], 1), (draw(7, 5).t(), -1), (draw(0, 7), 1)]
        return [(u, dim, *rule) for u, dim in inputs for rule in rules]
    if name == "linear_sums":
        pairs = [
            (draw(5, 3), draw(5, 7)),
            (draw(2, 3, 4), draw(2, 3, 5)),
            (draw(3), draw(7)),
            (draw(0, 3), draw(0, 7)),
        ]
        return [
            (x, u, *rule, decay) for x, u in pairs for rule in (ANTI, KWTA) for decay in ("oja", "sanger")
        ]
    if name == "conv_sums":
        pairs = [
            (image, response),
            (image.contiguous(**last), response.contiguous(**last)),
            (image[:0], response[:0]),
        ]
        inputs = [(x, u, *GEOMETRY[:-1], by_tap) for x, u in pairs for by_tap in (False, True)]
        inputs.append((draw(2, 3, 8), draw(2, 5, 6), (3,), (1,), (0,), (1,), 1, True))
        inputs.append(
            (draw(1, 2, 3, 4, 3), draw(1, 5, 2, 4, 3), (2, 1, 1), (1, 1, 1), (0, 0, 0), (1, 1, 1), 1, False)
        )
        return [
            (*first, *rule, decay)
            for first in inputs
            for rule in (SOFTMAX, KWTA)
            for decay in ("none", "subspace")
        ]
    if name == "conv_winner_pair":
        return [
            (x, unit, activity, torch.randn_like(response[: len(x)]), *rest)
            for x, unit, activity, _, *rest in samples("conv_winner_sums", dtype)
        ] + [
            # of a kernel of its own in 16 bits
            (
                draw(2, 3, 6, 5).contiguous(**last),
                *_winner_lists(60, k, 40, dtype),
                draw(2, 40, 6, 5).contiguous(**last),
                *((5, 3), (1, 1), (2, 1), (1, 1), 1, by_tap, "oja"),
            )
            for k in (1, 2)
            for by_tap in (False, True)
        ]
    if name.endswith("_pair"):
        sums = samples(name.removesuffix("_pair") + "_sums", dtype)
        return [(x, u, torch.randn_like(u), *rest) for x, u, *rest in sums]
    if name == "linear_grad":
        inputs = [
            *samples("linear_sums", dtype),
            (draw(300, 48), draw(300, 40)),
            (draw(48, 300).t(), draw(300, 40)),
        ]
        return [(x, torch.randn_like(u)) for x, u, *_ in inputs]
    if name == "conv_grad":
        wide, padding = (draw(3, 16, 9, 8), draw(3, 20, 9, 6)), ((3, 3), (1, 1), (1, 0), (1, 1))
        inputs = [
            (image, response, *GEOMETRY),
            (image[:0], response[:0], *GEOMETRY),
            (draw(2, 3, 8), draw(2, 5, 6), (3,), (1,), (0,), (1,), 1, True),
        ]
        inputs += [
            (*wide, *padding, 1, False),
            (*(t.contiguous(**last) for t in wide), *padding, 2, True),
        ]
        return [(x, torch.randn_like(u), *rest) for x, u, *rest in inputs]
    if name == "gate_all_":
        some = (slice(1), slice(1, 5), slice(None))
        return [tuple(map(list, zip(*samples("gate_", dtype)[part], strict=True))) for part in some]
    if name == "gated_sgd_":
        cases = []
        for grads, A, moments, weights, *rules in samples("gate_all_", dtype):
            begins = [i % 2 == 0 for i in range(len(grads))]
            gates = [("sign", "none")[i % 3 == 2] for i in range(len(grads))]
            for momentum in (0.0, 0.9):
                buffers = [torch.randn_like(weight) for weight in weights] if momentum else []
                lists = (list(map(torch.clone, weights)), buffers, grads, A, moments, begins, *rules, gates)
                cases.append((*lists, 0.1, momentum, 0.0, 0.01, momentum > 0, False))
        return cases
    if name == "linear_winner_sums":
        return [
            (draw(5, 3), *_winner_lists(5, 2, 7, dtype), 7, "oja"),
            (draw(2, 3, 4), *_winner_lists(6, 1, 5, dtype), 5, "instar"),
            (draw(4, 3), *_winner_lists(4, 2, 6, dtype), 6, "subspace"),
            (draw(0, 3), *_winner_lists(0, 2, 7, dtype), 7, "none"),
            (draw(0, 3), *_winner_lists(0, 2, 7, dtype), 7, "sanger"),
        ]
    if name == "conv_winner_sums":
        return [
            (x, *_winner_lists(x.shape[0] * 16, 2, 6, dtype), 6, *GEOMETRY[:-1], by_tap, decay)
            for x in (image, image.contiguous(**last), image[:0])
            for by_tap in (False, True)
            for decay in ("none", "instar", "sanger")
        ]
    weights = [
        (draw(5, 7), 1),
        (draw(6, 2, 3, 2), 2),
        (draw(6, 2, 3, 2).contiguous(**last), 1),
        (draw(4, 3, 2), 4),
    ]
    cases = []
    for (weight, groups), decay, normalize in zip(
        weights * 2,
        ("oja", "instar", "none", "subspace", "sanger", "oja", "oja", "instar"),
        ("layer", "filter") * 4,
        strict=True,
    ):
        sums = _sums(weight, groups, decay)
        if name == "gate":
            narrow = torch.randn_like(weight).to(torch.bfloat16)
            cases.append((narrow, *sums, weight, groups, decay, normalize))
        elif name == "gate_":
            cases.append((torch.randn_like(weight), *sums, weight, groups, decay, normalize))
        elif name == "learn_":
            cases.append((weight, *sums, 0.1, groups, decay, normalize))
        else:
            cases.append((*sums, weight, groups, decay, normalize))
    return cases


NAMES = (
    "compete",
    "competition_state",
    "winners",
    "linear_sums",
    "conv_sums",
    "linear_winner_sums",
    "conv_winner_sums",
    "conv_winner_pair",
    "linear_pair",
    "conv_pair",
    "linear_grad",
    "conv_grad",
    "delta",
    "gate",
    "gate_",
    "gate_all_",
    "learn_",
    "gated_sgd_",
)


def test_every_operation_is_tested() -> None:
    source = Path(_ops.__file__).read_text()
    observations = {"observe_responses_", "observe_rule_"}  # of a Monitor: test_monitor.py
    assert set(re.findall(r'_fake\("(\w+)"\)', source)) == {*NAMES, *observations}


@pytest.mark.broad
@pytest.mark.large
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(backend: str, name: str, dtype: torch.dtype) -> None:
    # each costs a compilation; the strides of all are tested below
    for arguments in samples(name, dtype)[::6]:
        torch.library.opcheck(getattr(ops, name).default, arguments)


@pytest.mark.broad
@pytest.mark.parametrize("name", [name for name in NAMES if not name.endswith("_")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_fakes_agree(backend: str, poison: None, name: str, dtype: torch.dtype) -> None:
    """Shapes, dtypes and strides that the compiler relies on are those that the kernels return."""
    for arguments in samples(name, dtype):
        real = getattr(ops, name)(*arguments)
        with FakeTensorMode() as mode:
            fake = getattr(ops, name)(
                *(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in arguments)
            )
        pairs = zip(real, fake, strict=True) if isinstance(real, tuple) else [(real, fake)]
        for actual, promised in pairs:
            assert (actual.shape, actual.dtype) == (promised.shape, promised.dtype)
            if actual.numel():
                assert actual.stride() == promised.stride(), (
                    name,
                    [getattr(a, "shape", a) for a in arguments],
                )


@pytest.mark.broad
@pytest.mark.parametrize("name", NAMES)
def test_gradients_do_not_flow(backend: str, name: str) -> None:
    for arguments in samples(name, torch.float32):
        arguments = tree_map(
            lambda a: a.clone().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a,
            arguments,
        )
        if name.endswith("_"):
            arguments = (tree_map(Tensor.detach, arguments[0]), *arguments[1:])
        result = getattr(ops, name)(*arguments)
        outputs = tree_leaves(arguments[0] if result is None else result)
        assert not any(output.requires_grad for output in outputs)


@pytest.mark.parametrize("name", ["gate_", "gate_all_", "learn_"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_mutation_bumps_the_version(backend: str, name: str, dtype: torch.dtype) -> None:
    for arguments in samples(name, dtype):
        mutated, others = tree_leaves(arguments[0]), _tensors(arguments[1:])
        versions, fixed = [a._version for a in mutated], [a._version for a in others]
        before, kept = [a.clone() for a in mutated], [a.clone() for a in others]
        getattr(ops, name)(*arguments)
        assert all(a._version > version for a, version in zip(mutated, versions, strict=True))
        assert not any(map(torch.equal, mutated, before))
        # nothing but the first argument is mutated
        assert [a._version for a in others] == fixed
        assert all(map(torch.equal, others, kept))


@pytest.mark.parametrize("name", ["gate_", "learn_"])
def test_the_version_is_what_autograd_goes_by(
    backend: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tensor saved for backward and then mutated is an error, and only increment_version makes it one.

    The second half shows that the first one tests it: with the call taken out, a backend that writes through
    a pointer leaves the counter alone, and the wrong gradient goes unnoticed.
    """

    def mutate_what_was_saved() -> Tensor:
        mutated, *others = samples(name, torch.float32)[0]
        scale = torch.ones_like(mutated, requires_grad=True)
        product = (scale * mutated).sum()  # saves `mutated`
        getattr(ops, name)(mutated, *others)
        return product

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        mutate_what_was_saved().backward()
    if backend == "cpu":
        monkeypatch.setattr(torch.autograd.graph, "increment_version", lambda tensor: None)
        mutate_what_was_saved().backward()


@pytest.mark.parametrize("operation", ["learn_", "gate_", "delta"])
@pytest.mark.parametrize("normalize", ["layer", "filter"])
def test_strides_of_single_kernel_dimensions_mean_nothing(
    backend: str, operation: str, normalize: str
) -> None:
    """A kernel (1, 5) turned into (5, 1) has a stride of 5 along the 1, and torch calls it contiguous."""
    weight, A, grad = (torch.randn(16, 8, 5, 1) for _ in range(3))

    def odd(tensor: Tensor) -> Tensor:
        buffer = torch.full((3 * tensor.numel(),), 7.0)
        return buffer.as_strided(tensor.shape, (40, 5, 1, 5), tensor.numel()).copy_(tensor)

    results = []
    for made in (torch.clone, odd):
        W, sums, G = made(weight), made(A), made(grad)
        options = (torch.ones(1), W, 1, "oja", normalize)
        if operation == "learn_":
            ops.learn_(W, sums, torch.ones(1), 0.1, 1, "oja", normalize)
            results.append(W)
        elif operation == "gate_":
            ops.gate_(G, sums, *options)
            results.append(G)
        else:
            results.append(ops.delta(sums, *options))
    torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-7)
    for tensor in (W, sums, G):
        buffer = tensor._base
        assert (buffer[: weight.numel()] == 7.0).all()
        assert (buffer[2 * weight.numel() :] == 7.0).all()


@pytest.mark.broad
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "slice", "step"])
@pytest.mark.parametrize("normalize", ["layer", "filter", "mean", "none"])
def test_epilogue(backend: str, poison: None, dtype: torch.dtype, layout: str, normalize: str) -> None:
    """delta, gate_ and learn_ against the formulas in float64, in place in slices of larger buffers."""
    for decay, shape, groups in (
        ("oja", (17, 3, 3, 5), 1),
        ("instar", (6, 1, 7), 3),
        ("none", (1, 1), 1),
        ("oja", (33, 67), 1),
        ("subspace", (6, 2, 3, 2), 2),
        ("sanger", (7, 19), 1),
    ):
        weight, grad = (embed(torch.randn(shape).to(dtype), layout) for _ in range(2))
        A, moments = _sums(weight, groups, decay)
        moments[-1] = 7.0
        A = embed(A, layout)
        H, G = _formula(A, moments, weight, groups, decay, normalize), grad.double()
        eager = _formula(A.float(), moments.float(), weight.float(), groups, decay, normalize, torch.float32)
        floor = (
            16
            * EPS32
            * max(1.0, H.abs().max().item())
            * _cancellation(A, moments, weight, H, groups, decay, normalize)
        )
        before, rounding = (
            weight.clone().double(),
            torch.finfo(dtype).eps / 2 if dtype.itemsize == 2 else EPS32,
        )
        ops.learn_(learned := embed(weight, layout), A, moments, 0.5, groups, decay, normalize)
        assert_as_good(
            learned,
            before.float() + 0.5 * eager,
            before + 0.5 * H,
            floor + rounding * (before.abs() + H.abs()),
        )
        assert_as_good(ops.delta(A, moments, weight, groups, decay, normalize), eager, H, floor)
        ops.gate_(grad, A, moments, weight, groups, decay, normalize)
        assert_as_good(grad, eager.abs() * G.sign(), H.abs() * G.sign(), floor + rounding * H.abs())
        assert torch.equal(weight.double(), before)
        if layout in ("slice", "step"):
            assert all(guards_intact(tensor) for tensor in (grad, learned, weight, A))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "slice"])
def test_a_gate_of_narrow_gradients(backend: str, poison: None, layout: str, dtype: torch.dtype) -> None:
    """The signs are those of the gradient as it is: the same bits as if it was widened before."""
    weight, wide = torch.randn(6, 4, 3, 2), torch.randn(6, 4, 3, 2)
    wide.view(-1)[:3] = torch.tensor([0.0, math.inf, math.nan])
    narrow, weight = embed(wide.to(dtype), layout), embed(weight, layout)
    sums = _sums(weight, 1, "oja")
    gated = ops.gate(narrow, *sums, weight, 1, "oja", "layer")
    widened = narrow.float()
    ops.gate_(widened, *sums, weight, 1, "oja", "layer")
    torch.testing.assert_close(gated, widened, rtol=0, atol=0, equal_nan=True)


def test_a_gate_asks_for_signs_beyond_the_weight_s_range(backend: str, poison: None) -> None:
    weight, grad = torch.randn(6, 4).half(), torch.randn(6, 4).sign()
    grad[::2] *= 1e-9
    grad[1::2] *= 1e6
    sums = _sums(weight, 1, "oja")
    gated = ops.gate(grad, *sums, weight, 1, "oja", "layer")
    assert torch.equal(gated.sign(), grad.sign())
    grad[0, 0] = math.inf
    assert ops.gate(grad, *sums, weight, 1, "oja", "layer")[0, 0].isnan()


def _formula(
    A: Tensor,
    moments: Tensor,
    weight: Tensor,
    groups: int,
    decay: str,
    normalize: str,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """H from the sums, row by row."""
    A_, m, W = A.to(dtype).flatten(1), moments.to(dtype), weight.to(dtype).flatten(1)
    per_group = W.shape[0] // groups
    rows = []
    for n, (a, w) in enumerate(zip(A_, W, strict=True)):
        if decay == "oja":
            a = a - (w @ a) * w
        elif decay == "instar":
            a = a - m[n] * w
        elif decay in ("subspace", "sanger"):
            first, i = n // per_group * per_group, n % per_group
            C = m[:-1].view(groups, per_group, per_group)[n // per_group, i]
            for j in range(i + 1 if decay == "sanger" else per_group):
                a = a - C[j] * W[first + j]
        rows.append(a)
    H = torch.stack(rows)
    if normalize == "layer":
        H = H / (H.abs().max() + 1e-30)
    elif normalize == "filter":
        H = H / (H.abs().amax(1, keepdim=True) + 1e-30)
    elif normalize == "mean":
        H = H / m[-1].clamp_min(1.0)
    return H.view(A.shape)


def _cancellation(
    A: Tensor, moments: Tensor, weight: Tensor, H: Tensor, groups: int, decay: str, normalize: str
) -> float:
    """How much larger the terms are than what is left of them."""
    raw = _formula(A, moments, weight, groups, decay, "none").abs().flatten(1)
    total = (
        A.double().abs() + (A.double() - _formula(A, moments, weight, groups, decay, "none")).abs()
    ).flatten(1)
    if normalize == "filter":
        return (total.amax(1) / raw.amax(1)).max().item()
    return (total.max() / raw.max()).item()


# --- what the guards refuse ---------------------------------------------------------------------

U, X = torch.randn(4, 5), torch.randn(4, 3)
IMAGE, RESPONSE = torch.randn(2, 4, 7, 6), torch.randn(2, 6, 4, 4)
W, A, P = torch.randn(5, 3), torch.randn(5, 3), torch.ones(1)
UNIT, ACTIVITY = torch.zeros(4, 2, dtype=torch.int32), torch.ones(4, 2)
EXPANDED = torch.ones(1, 3).expand(5, 3)
OVERLAPPING = torch.ones(20).as_strided((5, 3), (2, 1))

REFUSALS: list[tuple[Callable[..., Any], tuple[Any, ...], type[Exception], str]] = [
    (
        ops.compete,
        (U.long(), 1, *SOFTMAX),
        TypeError,
        "u must be a real floating-point tensor, got torch.int64",
    ),
    (ops.compete, (U.to(torch.complex64), 1, *SOFTMAX), TypeError, "got torch.complex64"),
    (ops.compete, (U, 2, *SOFTMAX), ValueError, r"dim must be in \[-2, 1\] for u of shape \(4, 5\), got 2"),
    (ops.compete, (U, -3, *SOFTMAX), ValueError, "got -3"),
    (ops.compete, (U, 1, "linear", 6, 1.0, False), ValueError, "at most the number of units 5, got 6"),
    (ops.compete, (U, 1, "linear", -1, 1.0, False), ValueError, "got -1"),
    (ops.competition_state, (U, 0, "linear", 5, 1.0, False), ValueError, "units 4, got 5"),
    (ops.competition_state, (U.bool(), 0, *KWTA), TypeError, "torch.bool"),
    (ops.winners, (U, 1, *SOFTMAX), ValueError, "need winners >= 1"),
    (ops.winners, (U, 1, "linear", 6, 1.0, False), ValueError, "units 5, got 6"),
    (ops.linear_sums, (X, U[:3], *SOFTMAX, "oja"), ValueError, r"got \(4, 3\) and \(3, 5\)"),
    (ops.linear_sums, (X.double(), U, *SOFTMAX, "oja"), TypeError, "x torch.float64, u torch.float32"),
    (ops.linear_sums, (X.int(), U, *SOFTMAX, "oja"), TypeError, "x must be a real floating-point"),
    (ops.linear_sums, (X, U, "linear", 6, 1.0, False, "oja"), ValueError, "units 5, got 6"),
    (
        ops.conv_sums,
        (IMAGE, RESPONSE[:, :, :3], *GEOMETRY, *SOFTMAX, "oja"),
        ValueError,
        r"u must have shape \(2, units, 4, 4\)",
    ),
    (ops.conv_sums, (IMAGE[:, :3], RESPONSE, *GEOMETRY, *SOFTMAX, "oja"), ValueError, "groups=2, got 3"),
    (ops.conv_sums, (IMAGE, RESPONSE[:, :5], *GEOMETRY, *SOFTMAX, "oja"), ValueError, "groups=2, got 5"),
    (ops.conv_sums, (IMAGE[0], RESPONSE[0], *GEOMETRY, *SOFTMAX, "oja"), ValueError, "x must be"),
    (ops.conv_sums, (IMAGE.half(), RESPONSE, *GEOMETRY, *SOFTMAX, "oja"), TypeError, "float16"),
    (
        ops.linear_winner_sums,
        (X, UNIT.long(), ACTIVITY, 5, "oja"),
        TypeError,
        "int32 units .* got torch.int64",
    ),
    (ops.linear_winner_sums, (X, UNIT, ACTIVITY.double(), 5, "oja"), TypeError, "torch.float64"),
    (ops.linear_winner_sums, (X, UNIT[:3], ACTIVITY[:3], 5, "oja"), ValueError, r"two \(4, k\) tensors"),
    (ops.linear_winner_sums, (X, UNIT, ACTIVITY[:, :1], 5, "oja"), ValueError, r"got \(4, 2\), \(4, 1\)"),
    (ops.linear_winner_sums, (X.int(), UNIT, ACTIVITY, 5, "oja"), TypeError, "x must be"),
    (
        ops.conv_winner_sums,
        (IMAGE, UNIT, ACTIVITY, 6, *GEOMETRY, "oja"),
        ValueError,
        r"two \(32, k\) tensors",
    ),
    (
        ops.conv_winner_pair,
        (IMAGE, UNIT, ACTIVITY, RESPONSE, *GEOMETRY, "oja"),
        ValueError,
        r"two \(32, k\) tensors",
    ),
    (
        ops.conv_winner_pair,
        (IMAGE, UNIT, ACTIVITY, RESPONSE[:1], *GEOMETRY, "oja"),
        ValueError,
        r"u must have shape \(2, units, 4, 4\)",
    ),
    (ops.delta, (A[:4], P, W, 1, "oja", "layer"), ValueError, r"A must have shape \(5, 3\), got \(4, 3\)"),
    (ops.delta, (A, P, W, 1, "instar", "layer"), ValueError, r"moments must have shape \(6,\), got \(1,\)"),
    (
        ops.delta,
        (A.double(), P.double(), W, 1, "oja", "layer"),
        TypeError,
        "must be torch.float32 .*got torch.float64",
    ),
    (
        ops.delta,
        (A.bfloat16(), P.bfloat16(), W.bfloat16(), 1, "oja", "layer"),
        TypeError,
        "must be torch.float32",
    ),
    (ops.delta, (A, P, W.long(), 1, "oja", "layer"), TypeError, "weight must be"),
    (
        ops.gate_,
        (W[:4], A, P, W, 1, "oja", "layer"),
        ValueError,
        r"grad must have shape \(5, 3\), got \(4, 3\)",
    ),
    (
        ops.gate_,
        (EXPANDED, A, P, W, 1, "oja", "layer"),
        ValueError,
        r"elements overlap: shape \(5, 3\), strides \(0, 1\)",
    ),
    (ops.gate_, (OVERLAPPING, A, P, W, 1, "oja", "layer"), ValueError, r"strides \(2, 1\); pass a clone"),
    (ops.gate_, (W.int(), A, P, W, 1, "oja", "layer"), TypeError, "grad must be"),
    (ops.gate_, (W.double(), A, P, W, 1, "oja", "layer"), TypeError, "no wider than the sums.*float64"),
    (ops.gate, (W.double(), A, P, W, 1, "oja", "layer"), TypeError, "no wider than the sums.*float64"),
    (ops.learn_, (EXPANDED, A, P, 0.1, 1, "oja", "layer"), ValueError, "elements overlap"),
    (ops.learn_, (OVERLAPPING, A, P, 0.1, 1, "oja", "layer"), ValueError, "elements overlap"),
    (ops.learn_, (W[:4], A, P, 0.1, 1, "oja", "layer"), ValueError, r"A must have shape \(4, 3\)"),
    (ops.learn_, (W.int(), A, P, 0.1, 1, "oja", "layer"), TypeError, "weight must be"),
]


@pytest.mark.parametrize(("operation", "arguments", "error", "message"), REFUSALS)
def test_guards(
    backend: str,
    operation: Callable[..., Any],
    arguments: tuple[Any, ...],
    error: type[Exception],
    message: str,
) -> None:
    before = [a.clone() for a in arguments if isinstance(a, Tensor)]
    with pytest.raises(error, match=message):
        operation(*arguments)
    assert all(map(torch.equal, before, [a for a in arguments if isinstance(a, Tensor)]))


def test_tensors_on_different_devices() -> None:
    """With fakes: they know devices that this machine does not have."""
    with FakeTensorMode():
        tensors = {"x": torch.ones(2), "weight": torch.ones(2, device="cuda")}
        with pytest.raises(
            ValueError, match="all tensors must be on one device, got x on cpu, weight on cuda"
        ):
            _check.floats(**tensors)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("device", ["CPU", "CUDA", "MPS", "XPU", "HPU", "PrivateUse1"])
def test_every_device_has_a_kernel(name: str, device: str) -> None:
    assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"ghl::{name}", device)


def test_sparse_tensors_have_no_kernel() -> None:
    with pytest.raises(TypeError, match=r"x must be a dense tensor, got a torch\.sparse_coo one"):
        ops.linear_sums(X.to_sparse(), U, *SOFTMAX, "oja")


def test_gate_reads_a_gradient_whose_elements_overlap() -> None:
    gated = ops.gate(EXPANDED, A, P, W, 1, "oja", "layer")
    assert torch.equal(gated, ops.gate(EXPANDED.contiguous(), A, P, W, 1, "oja", "layer"))


def test_pair_of_lists_is_both_sums(backend: str) -> None:
    for x, unit, activity, grad, *geometry, decay in samples("conv_winner_pair", torch.float32):
        A, moments, G = ops.conv_winner_pair(x, unit, activity, grad, *geometry, decay)
        alone = ops.conv_winner_sums(x, unit, activity, grad.shape[1], *geometry, decay)
        for ours, theirs in zip((A, moments, G), (*alone, ops.conv_grad(x, grad, *geometry)), strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("mapped", range(3))
def test_rules_are_not_mapped_over(mapped: int) -> None:
    tensors = [W.clone(), A.clone(), P.clone()]
    in_dims = [0 if i == mapped else None for i in range(3)]
    tensors[mapped] = torch.stack([tensors[mapped]] * 2)
    gate, learn = (W, 1, "oja", "layer"), (0.1, 1, "oja", "layer")
    for name, options in (("gate_", gate), ("gate", gate), ("learn_", learn)):

        def call(*tensors: Tensor, name: str = name, options: tuple[Any, ...] = options) -> None:
            getattr(ops, name)(*tensors, *options)

        with pytest.raises(RuntimeError, match=f"is_grads_batched cannot map over ghl::{name}"):
            torch.func.vmap(call, tuple(in_dims))(*tensors)


def test_meta_tensors_have_no_kernel() -> None:
    with pytest.raises(ValueError, match="u is a meta tensor"):
        ops.compete(U.to("meta"), 1, *SOFTMAX)


@pytest.mark.parametrize("value", ["unknown", ""])
def test_unknown_choices_are_refused(backend: str, value: str) -> None:
    """Below HebbianRule, where a typo would otherwise fall through to the last branch."""
    for call in (
        lambda: ops.compete(U, 1, value, 0, 1.0, False),
        lambda: ops.linear_sums(X, U, *SOFTMAX, value),
        lambda: ops.delta(A, P, W, 1, value, "layer"),
        lambda: ops.delta(A, P, W, 1, "oja", value),
        lambda: ops.gate_(W.clone(), A, P, W, 1, "oja", value),
    ):
        with pytest.raises(ValueError, match=repr(value)):
            call()


def test_autocast_does_not_touch_the_sums(backend: str) -> None:
    expected = ops.linear_sums(X, U, *SOFTMAX, "subspace")
    with torch.autocast("cpu", torch.bfloat16):
        actual = ops.linear_sums(X, U, *SOFTMAX, "subspace")
    assert all(map(torch.equal, actual, expected))
