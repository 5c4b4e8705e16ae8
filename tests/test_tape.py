"""Tapes: an operation played back is the operation, and what cannot be repeated is not taped."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from test_ops import samples
from torch import Tensor

import ghl_kernels as ghl
from ghl_kernels import _tape
from ghl_kernels.backends.cuda.kernels.arguments import stream_of

ops = torch.ops.ghl
TAPED = (
    *("compete", "competition_state", "winners", "linear_sums", "conv_sums", "linear_pair", "conv_pair"),
    *("linear_winner_sums", "conv_winner_sums", "delta", "gate"),
)


@pytest.fixture(autouse=True)
def tapes(monkeypatch: pytest.MonkeyPatch) -> dict[Any, Any]:
    """Those of the test, and none of others."""
    found: dict[Any, Any] = {}
    monkeypatch.setattr(_tape, "_tapes", found)
    return found


@pytest.fixture(params=["triton", "cuda"])
def taping(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each backend whose operations are taped, where it runs: as an interpreter, as a build for the host."""
    available, reason = {b.name: (b.available, b.reason) for b in ghl.backends()}[request.param]
    if not available:
        pytest.skip(reason)
    with ghl.use_backend(request.param):
        yield


def run(body: Callable[..., Any], *arguments: Any, settings: Any = None) -> Any:
    return _tape.run("operation", settings, body, arguments)


def made(tapes: dict[Any, Any]) -> list[bool]:
    """Whether the calls so far could be taped."""
    return [tape is not None for tape in tapes.values()]


def _other_values(value: Any) -> Any:
    """A tensor of the same layout and other values; winners' lists stay ascending."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    other = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
    return other.copy_(torch.randn(value.shape))


def _tensors(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("name", TAPED)
def test_a_taped_operation_is_the_same_bit_for_bit(
    taping: None, poison: None, tapes: dict[Any, Any], name: str
) -> None:
    """Played on values that it was not made from: results, dtypes and strides."""
    for arguments in samples(name, torch.float32)[::4]:
        getattr(ops, name)(*arguments)
        others = tuple(map(_other_values, arguments))
        count = len(tapes)
        played = getattr(ops, name)(*others)
        assert len(tapes) == count
        with _tape.bypassed():
            expected = getattr(ops, name)(*others)
        assert type(played) is type(expected)
        for ours, right in zip(
            *((r if isinstance(r, tuple) else (r,)) for r in (played, expected)), strict=True
        ):
            assert (ours.dtype, ours.shape, ours.stride()) == (right.dtype, right.shape, right.stride())
            assert torch.equal(ours.view(torch.int32), right.view(torch.int32))
            assert not ours.requires_grad
    # the gate of the CUDA backend is told addresses
    assert any(made(tapes)) or (name in ("delta", "gate") and not any(made(tapes)))


def test_the_pair_of_lists_is_taped(poison: None, tapes: dict[Any, Any]) -> None:
    """In 16 bits, where it is one kernel."""
    available, reason = {b.name: (b.available, b.reason) for b in ghl.backends()}["cuda"]
    if not available:
        pytest.skip(reason)
    with ghl.use_backend("cuda"):
        for arguments in samples("conv_winner_pair", torch.bfloat16)[-4:]:
            tapes.clear()
            ops.conv_winner_pair(*arguments)
            assert made(tapes) == [True]
            others = tuple(map(_other_values, arguments))
            played = ops.conv_winner_pair(*others)
            with _tape.bypassed():
                expected = ops.conv_winner_pair(*others)
            for ours, right in zip(played, expected, strict=True):
                assert torch.equal(ours, right)
                assert ours.stride() == right.stride()


def test_a_gate_in_place_is_taped_too(taping: None, poison: None, tapes: dict[Any, Any]) -> None:
    for arguments in samples("gate_", torch.float32)[::2]:
        ops.gate_(*arguments)
        others = tuple(map(_other_values, arguments))
        count, expected, version = len(tapes), others[0].clone(), others[0]._version
        played = ops.gate_(*others)
        assert played is None
        assert others[0]._version > version
        assert len(tapes) == count
        with _tape.bypassed():
            ops.gate_(expected, *others[1:])
        torch.testing.assert_close(others[0], expected, rtol=0, atol=0, equal_nan=True)


def test_a_played_operation_leaves_autocast_and_gradients_alone(taping: None, tapes: dict[Any, Any]) -> None:
    x, u = torch.randn(5, 3).requires_grad_(), torch.randn(5, 7).requires_grad_()
    rule = ("linear", 3, 1.0, False, "oja")
    expected = ops.linear_sums(x, u, *rule)
    with torch.autocast("cpu", torch.bfloat16):
        played = ops.linear_sums(x, u, *rule)
        with pytest.raises(ValueError, match="same leading dimensions"):
            ops.linear_sums(x[:4], u, *rule)
        assert torch.is_autocast_enabled("cpu")
    assert made(tapes) == [True]
    assert all(
        torch.equal(*pair) and not pair[0].requires_grad for pair in zip(played, expected, strict=True)
    )


def test_another_layout_is_another_tape(tapes: dict[Any, Any]) -> None:
    def body(x: Tensor, factor: float) -> Tensor:
        return x.reshape(-1) * factor

    x = torch.arange(24.0).view(4, 6)
    for variant in (x, x.t(), x.view(6, 4), x.double(), torch.arange(25.0)[1:].view(4, 6)):
        for factor in (2.0, 3.0):
            for _ in range(2):
                assert torch.equal(run(body, variant, factor), variant.reshape(-1) * factor)
    assert made(tapes) == [True] * 10
    run(body, x, 2.0, settings="another architecture")
    assert len(tapes) == 11


def test_what_depends_on_values_or_is_unseen_is_not_taped(tapes: dict[Any, Any]) -> None:
    known = torch.ones(3)

    def asks(x: Tensor) -> Tensor:
        return x + 1 if x.sum() > 0 else x - 1

    def refuses(x: Tensor) -> Tensor:
        _tape.refuse()
        return x + 1

    def takes_another(x: Tensor) -> Tensor:
        return x + known

    def takes_a_list(x: Tensor) -> Tensor:
        return torch.cat([x, x])

    def calls_another_operation(x: Tensor) -> Tensor:
        return ops.compete(x, 0, "relu", 0, 1.0, False)

    for body in (asks, refuses, takes_another, takes_a_list, calls_another_operation):
        tapes.clear()
        for sign in (1.0, -1.0):
            x = torch.full((3,), sign)
            assert torch.equal(run(body, x), body(x))
        assert made(tapes) == [False]


def test_one_tensor_twice_is_neither_taped_nor_played(tapes: dict[Any, Any]) -> None:
    x, y = torch.ones(3), torch.full((3,), 2.0)
    assert torch.equal(run(torch.sub, x, x), torch.zeros(3))
    assert made(tapes) == []
    assert torch.equal(run(torch.sub, x, y), -torch.ones(3))
    assert torch.equal(run(torch.sub, x, x), torch.zeros(3))
    assert torch.equal(run(torch.sub, y, x), torch.ones(3))
    assert made(tapes) == [True]


def test_kernels_that_are_not_queued_are_not_taped(tapes: dict[Any, Any]) -> None:
    """A kernel that is told addresses asks for its stream, which shows it."""

    def body(x: Tensor) -> Tensor:
        stream_of(x)
        return x + 1

    run(body, torch.ones(3))
    assert made(tapes) == [False]


def test_a_tape_frees_what_nobody_reads_any_more() -> None:
    alive: list[int] = []
    references: list[weakref.ref[Tensor]] = []

    def look(x: Tensor) -> None:
        references.append(weakref.ref(x))
        alive.append(sum(reference() is not None for reference in references))

    def body(x: Tensor) -> Tensor:
        for _ in range(4):
            x = x + 1
            _tape.note(look, (x,))
        return x

    run(body, torch.zeros(3))
    references.clear()
    assert torch.equal(run(body, torch.zeros(3)), torch.full((3,), 4.0))
    assert alive == [1, 1, 1, 1]


def test_without_memory_the_operation_says_for_what(
    tapes: dict[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def play(self: _tape.Tape, tensors: Any) -> None:
        raise torch.OutOfMemoryError

    run(torch.neg, torch.ones(3))
    monkeypatch.setattr(_tape.Tape, "play", play)
    assert torch.equal(run(torch.neg, torch.ones(3)), -torch.ones(3))


def test_tapes_are_limited_in_number(tapes: dict[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tape, "_MOST_TAPES", 3)
    for size in range(1, 10):
        run(torch.neg, torch.ones(size))
        assert 1 <= len(tapes) <= 3
