"""The native epilogue (Oja dot, decay, norm, then gate, store or learn) against the formulas in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ghl_kernels._native import cpu_status, load_cpu

if not cpu_status()[0]:
    pytest.skip(cpu_status()[1], allow_module_level=True)

_cpu: Any = load_cpu()

DTYPES = {torch.float32: 0, torch.bfloat16: 1}
DECAYS = {"none": 0, "oja": 1, "rows": 2}
NORMS = {"layer": 0, "filter": 1, "constant": 2}
TARGETS = {"gate": 0, "delta": 1, "learn": 2}
LAYOUTS = ("contiguous", "channels_last", "slice")
GUARD = 12345.0
EPSILON = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Epilogue:
    decay: str = "oja"
    normalize: str = "layer"
    target: str = "gate"
    scale: float = 1.0
    rate: float = 0.25


@dataclass
class Operands:
    """[units, channels, taps] each; row_decay [units]. To learn, out is the weight."""

    a: Tensor
    weight: Tensor
    out: Tensor
    row_decay: Tensor

    def to(self, dtype: torch.dtype) -> Operands:
        return Operands(*(t.to(dtype) for t in (self.a, self.weight, self.out, self.row_decay)))


def random_operands(
    shape: tuple[int, int, int],
    weight_dtype: torch.dtype = torch.float32,
    out_dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Operands:
    generator = torch.Generator().manual_seed(seed)
    a, weight, out = (torch.randn(shape, generator=generator) for _ in range(3))
    out[torch.rand(shape, generator=generator) < 0.1] = 0.0
    row_decay = torch.randn(shape[0], generator=generator)
    return Operands(a, (weight * 0.1).to(weight_dtype), out.to(out_dtype), row_decay)


def expected(rule: Epilogue, given: Operands) -> Tensor:
    """The target in the operands' dtype, by the definition."""
    coefficient = {
        "none": torch.zeros_like(given.row_decay),
        "oja": (given.weight * given.a).sum((1, 2)),
        "rows": given.row_decay,
    }[rule.decay]
    update = given.a
    if rule.decay != "none":
        update = update - coefficient[:, None, None] * given.weight
    if rule.normalize == "constant":
        update = update * rule.scale
    else:
        largest = update.abs().amax(None if rule.normalize == "layer" else (1, 2), keepdim=True)
        update = update / (largest.where(largest.isfinite(), math.nan) + 1e-30)
    if rule.target == "gate":
        return update.abs() * given.out.sign() + (given.out - given.out)
    return update if rule.target == "delta" else given.weight + rule.rate * update


def as_layout(values: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """A copy of values in a memory layout, and the guarded buffer that it is a view of."""
    units, channels, taps = values.shape
    if layout == "channels_last":
        buffer = torch.full((units + 2, taps, channels), GUARD, dtype=values.dtype)
        view = buffer[1 : units + 1].transpose(1, 2)
    elif layout == "slice":
        buffer = torch.full((units + 2, channels + 1, 2 * taps + 1), GUARD, dtype=values.dtype)
        view = buffer[1 : units + 1, :channels, 1::2]
    else:
        buffer = torch.full((units + 2, channels, taps), GUARD, dtype=values.dtype)
        view = buffer[1 : units + 1]
    return view.copy_(values), buffer


def native(
    rule: Epilogue, given: Operands, threads: int = 2, layouts: tuple[str, str, str] = ("contiguous",) * 3
) -> Tensor:
    """What the kernel leaves in out; fails where an input, a guard or memory past the workspace changed."""
    a, a_buffer = as_layout(given.a, layouts[0])
    weight, weight_buffer = as_layout(given.weight, layouts[1])
    out, out_buffer = (weight, weight_buffer) if rule.target == "learn" else as_layout(given.out, layouts[2])
    units, channels, taps = given.a.shape
    arguments = {
        "units": units, "channels": channels, "taps": taps, "a": a.data_ptr(), "a_layout": a.stride(),
        "weight": 0 if rule.decay == "none" and rule.target != "learn" else weight.data_ptr(),
        "weight_dtype": DTYPES[weight.dtype], "weight_layout": weight.stride(),
        "decay": DECAYS[rule.decay], "row_decay": given.row_decay.data_ptr() if rule.decay == "rows" else 0,
        "normalize": NORMS[rule.normalize], "scale": rule.scale, "target": TARGETS[rule.target],
        "out": out.data_ptr(), "out_dtype": DTYPES[out.dtype], "out_layout": out.stride(), "rate": rule.rate,
        "threads": threads,
    }  # fmt: skip
    size = _cpu.epilogue_workspace(**arguments)
    workspace = torch.full((size + 192,), 0xAB, dtype=torch.uint8)
    start = -workspace.data_ptr() % 64
    before = (a_buffer.clone(), weight_buffer.clone())
    _cpu.epilogue(**arguments, workspace=workspace[start:].data_ptr())
    assert bool((workspace[start + size :] == 0xAB).all()), "wrote past the workspace"
    assert a_buffer.equal(before[0]) or bool(given.a.isnan().any()), "wrote to A"
    if rule.target != "learn":
        assert weight_buffer.equal(before[1]) or bool(given.weight.isnan().any()), "wrote to the weight"
    result = out.clone()
    out.fill_(GUARD)
    assert bool((out_buffer == GUARD).all()), "wrote beside out"
    return result


def assert_close(
    rule: Epilogue, given: Operands, threads: int = 2, layouts: tuple[str, str, str] = ("contiguous",) * 3
) -> None:
    """err <= 2 * err of the same in eager float32 (rounded to out's dtype) + 4 eps * the largest value."""
    actual = native(rule, given, threads, layouts)
    exact = expected(rule, given.to(torch.float64))
    eager = expected(rule, given.to(torch.float32)).to(actual.dtype)
    floor = 4 * EPSILON * exact.abs().max()
    assert (actual - exact).abs().max() <= 2 * (eager - exact).abs().max() + floor
    if rule.target == "gate":
        assert torch.equal(actual.sign()[actual != 0], given.out.sign()[actual != 0].to(actual.dtype))
        assert actual[given.out == 0].count_nonzero() == 0


SHAPES = ((1, 1, 1), (3, 17, 1), (5, 3, 25), (37, 67, 9), (7, 1, 9), (2, 4099, 1), (131, 5, 3))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("normalize", NORMS)
@pytest.mark.parametrize("decay", DECAYS)
def test_matches_the_formula(
    decay: str, normalize: str, target: str, shape: tuple[int, int, int], isa: str
) -> None:
    assert_close(Epilogue(decay, normalize, target, scale=0.37), random_operands(shape))


@settings(max_examples=200, deadline=None)
@given(
    rule=st.builds(
        Epilogue,
        decay=st.sampled_from(list(DECAYS)),
        normalize=st.sampled_from(list(NORMS)),
        target=st.sampled_from(list(TARGETS)),
        scale=st.floats(-2, 2, width=32),
        rate=st.floats(-1, 1, width=32),
    ),
    shape=st.tuples(st.integers(1, 19), st.integers(1, 40), st.integers(1, 27)),
    dtypes=st.tuples(st.sampled_from(list(DTYPES)), st.sampled_from(list(DTYPES))),
    layouts=st.tuples(*(st.sampled_from(LAYOUTS),) * 3),
    threads=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_any_layout_and_dtype(
    rule: Epilogue, shape: tuple[int, int, int], dtypes: tuple[torch.dtype, torch.dtype],
    layouts: tuple[str, str, str], threads: int, seed: int,
) -> None:  # fmt: skip
    assert_close(rule, random_operands(shape, *dtypes, seed=seed), threads, layouts)


@pytest.mark.parametrize("out_dtype", DTYPES, ids=("f32", "bf16"))
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=("f32", "bf16"))
@pytest.mark.parametrize("target", TARGETS)
def test_dtypes(target: str, weight_dtype: torch.dtype, out_dtype: torch.dtype, isa: str) -> None:
    given = random_operands((37, 67, 9), weight_dtype, out_dtype)
    assert_close(Epilogue(target=target), given)
    assert_close(Epilogue(target=target), given, layouts=("contiguous", "channels_last", "channels_last"))


@pytest.mark.parametrize("normalize", NORMS)
@pytest.mark.parametrize("target", TARGETS)
def test_same_bits_for_any_number_of_threads(target: str, normalize: str, isa: str) -> None:
    rule, given = Epilogue(target=target, normalize=normalize), random_operands((61, 67, 9))
    one = native(rule, given, threads=1)
    for threads in (2, 3, 7):
        assert torch.equal(one, native(rule, given, threads=threads))


def test_largest_element_of_the_scope_is_one(isa: str) -> None:
    given = random_operands((37, 67, 9))
    assert native(Epilogue(target="delta"), given).abs().max() == 1
    assert bool((native(Epilogue(normalize="filter", target="delta"), given).abs().amax((1, 2)) == 1).all())


@pytest.mark.parametrize("normalize", NORMS)
def test_zero_correlation_changes_nothing(normalize: str, isa: str) -> None:
    given = random_operands((5, 17, 9))
    given.a.zero_()
    assert native(Epilogue(normalize=normalize, target="delta"), given).count_nonzero() == 0
    assert torch.equal(native(Epilogue(normalize=normalize, target="learn"), given), given.weight)


def test_zero_and_negative_zero_gradients_stay_zero(isa: str) -> None:
    given = random_operands((5, 17, 9))
    given.out[:, ::2] = 0.0
    given.out[:, ::4] = -0.0
    result = native(Epilogue(), given)
    assert result[:, ::2].count_nonzero() == 0
    assert result[:, 1::2].count_nonzero() == given.out[:, 1::2].count_nonzero()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("where", ["a", "weight"])
@pytest.mark.parametrize("position", [0, 16, 152])
def test_non_finite_update_makes_its_scope_nan(
    position: int, where: str, target: str, value: float, isa: str
) -> None:
    """One element of row 2, in a whole vector and in the rest of the row."""
    given = random_operands((5, 17, 9))
    getattr(given, where)[2].view(-1)[position] = value
    assert bool(native(Epilogue(target=target), given).isnan().all())
    rows = native(Epilogue(normalize="filter", target=target), given).isnan()
    assert bool(rows[2].all())
    assert not bool(rows[[0, 1, 3, 4]].any())


def test_constant_norm_keeps_non_finite_elements_to_themselves(isa: str) -> None:
    given = random_operands((5, 17, 9))
    given.a[2, 3, 4] = math.inf
    given.a[4, 16, 8] = math.nan
    result = native(Epilogue("none", "constant", "delta"), given)
    assert result[2, 3, 4] == math.inf
    assert bool(result[4, 16, 8].isnan())
    assert result.isfinite().sum() == result.numel() - 2


@pytest.mark.parametrize("dtype", DTYPES, ids=("f32", "bf16"))
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_gradient_becomes_nan(value: float, dtype: torch.dtype, isa: str) -> None:
    given = random_operands((5, 17, 9), out_dtype=dtype)
    given.out[1, 0, 0] = given.out[3, 16, 8] = value
    result = native(Epilogue(), given)
    assert bool(result[1, 0, 0].isnan())
    assert bool(result[3, 16, 8].isnan())
    assert result.isnan().sum() == 2


def test_huge_and_denormal_updates(isa: str) -> None:
    given = random_operands((5, 17, 9))
    for size in (3e38, 1e-38, 1e-42):
        given.a.uniform_(-1, 1).mul_(size)
        assert_close(Epilogue("none", target="delta"), given)


def test_decay_none_ignores_the_weight(isa: str) -> None:
    given = random_operands((5, 17, 9))
    rule = Epilogue("none")
    clean = native(rule, given)
    given.weight.fill_(math.nan)
    assert torch.equal(native(rule, given), clean)
    given.weight.fill_(1.0)
    learned = native(replace(rule, target="learn"), given)
    assert torch.allclose(learned, 1 + rule.rate * given.a / given.a.abs().max())


@pytest.mark.parametrize("shape", [(0, 3, 4), (3, 0, 4), (3, 4, 0)])
def test_empty(shape: tuple[int, int, int], isa: str) -> None:
    assert native(Epilogue(), random_operands(shape)).numel() == 0


def test_a_wrong_sign_would_be_seen(isa: str) -> None:
    given = random_operands((5, 17, 9))
    actual = native(Epilogue(), given)
    given.out.neg_()
    assert (actual - expected(Epilogue(), given.to(torch.float64))).abs().max() > 0.5
