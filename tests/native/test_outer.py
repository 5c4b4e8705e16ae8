"""The native dense correlation of rows against the definition in float64."""

from __future__ import annotations

from typing import Any, NamedTuple

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
GUARD = 12345.0


class Case(NamedTuple):
    """One product: rows of x and y, columns of y, columns of x."""

    rows: int
    units: int
    channels: int


# Vectors, blocks, chunks and parts begin and end at other numbers in each.
CASES = {
    "one of each": Case(1, 1, 1),
    "a vector": Case(3, 16, 16),
    "less than a vector": Case(5, 3, 7),
    "one register of channels is left": Case(9, 17, 47),
    "a chunk": Case(128, 20, 33),
    "a chunk and a row": Case(129, 16, 40),
    "many parts": Case(2000, 5, 9),
    "several blocks": Case(37, 150, 300),
    "no parts": Case(300, 600, 500),
}


def draw(shape: tuple[int, int], dtype: torch.dtype, seed: int, gap: int = 0) -> Tensor:
    """Normal values with guards around them and between the rows, which no sum may hold."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    rows = torch.full((shape[0], shape[1] + gap), GUARD, dtype=dtype)
    rows[:, : shape[1]] = values
    guarded = torch.full((rows.numel() + 64,), GUARD, dtype=dtype)
    guarded[32:-32] = rows.flatten()
    return guarded[32:-32].view(rows.shape)[:, : shape[1]]


def tensors(
    case: Case,
    dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32),
    gap: int = 0,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    x = draw((case.rows, case.channels), dtypes[0], seed, gap)
    return x, draw((case.rows, case.units), dtypes[1], seed + 1, gap)


def arguments(x: Tensor, y: Tensor, A: Tensor) -> dict[str, Any]:
    return {
        "rows": x.shape[0],
        "units": y.shape[1],
        "channels": x.shape[1],
        "x": x.data_ptr(),
        "x_dtype": DTYPES[x.dtype],
        "x_stride": x.stride(0),
        "y": y.data_ptr(),
        "y_dtype": DTYPES[y.dtype],
        "y_stride": y.stride(0),
        "a": A.data_ptr(),
        "a_stride": A.stride(0),
    }


def native(x: Tensor, y: Tensor, threads: int = 2, gap: int = 0, *, adds_to: Tensor | None = None) -> Tensor:
    """A; fails where memory around A or behind the workspace changed."""
    A = draw((y.shape[1], x.shape[1]), torch.float32, 0, gap)
    if adds_to is not None:
        A.copy_(adds_to)
    before, around = A.clone(), torch.tensor([], dtype=torch.float32).set_(A.untyped_storage())
    untouched = around.clone()
    given_arguments = {**arguments(x, y, A), "adds": adds_to is not None, "threads": threads}
    size = _cpu.outer_workspace(**given_arguments)
    # uninitialized memory must not matter
    workspace = torch.full((size // 4 + 16,), float("nan"))
    workspace[size // 4 :] = GUARD
    _cpu.outer(**given_arguments, workspace=workspace.data_ptr())
    assert (workspace[size // 4 :] == GUARD).all()
    result = A.clone()
    A.copy_(before)
    assert torch.equal(around, untouched)
    return result


def definition(x: Tensor, y: Tensor) -> Tensor:
    return y.double().t() @ x.double()


def check(x: Tensor, y: Tensor, A: Tensor) -> None:
    terms = definition(x.abs(), y.abs())
    bound = 4 * torch.finfo(torch.float32).eps * max(len(x), 4) ** 0.5 * terms + 1e-30
    error = (A.double() - definition(x, y)).abs()
    assert (error <= bound).all(), error.max()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("dtypes", [(a, b) for a in DTYPES for b in DTYPES], ids=str)
@pytest.mark.parametrize("gap", [0, 3])
def test_is_the_sum(isa: str, case: Case, dtypes: tuple[torch.dtype, torch.dtype], gap: int) -> None:
    x, y = tensors(case, dtypes, gap)
    check(x, y, native(x, y, gap=gap))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_bits_do_not_depend_on_threads(isa: str, case: Case) -> None:
    x, y = tensors(case)
    first = native(x, y, threads=1)
    for threads in (2, 3, 16):
        assert torch.equal(first, native(x, y, threads=threads))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_adds_to_what_is_there(isa: str, case: Case) -> None:
    x, y = tensors(case)
    before = torch.randn(case.units, case.channels)
    assert torch.equal(native(x, y, adds_to=before), before + native(x, y))


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_shape(data: st.DataObject) -> None:
    case = Case(*(data.draw(st.integers(1, most)) for most in (400, 90, 90)))
    dtypes = data.draw(st.tuples(st.sampled_from(list(DTYPES)), st.sampled_from(list(DTYPES))))
    gap = data.draw(st.integers(0, 2))
    x, y = tensors(case, dtypes, gap, data.draw(st.integers(0, 99)))
    check(x, y, native(x, y, data.draw(st.integers(1, 5)), gap))


@pytest.mark.parametrize("kind", ["normal", "positive", "few"])
def test_is_as_exact_as_the_library(isa: str, kind: str) -> None:
    """The acceptance of every kernel: at most twice eager PyTorch's error, and a floor."""
    x, y = tensors(Case(1000, 96, 144))
    if kind == "positive":
        x, y = x.relu(), (2 * y).softmax(1)
    elif kind == "few":
        x, y = x.relu(), torch.where(y > 1.5, y, 0.0)
    expected = definition(x, y)
    floor = torch.finfo(torch.float32).eps * expected.abs().max()
    error = (native(x, y).double() - expected).abs()
    assert error.max() <= 2 * (y.t().mm(x).double() - expected).abs().max() + floor


def test_silent_units_and_channels_have_no_sum(isa: str) -> None:
    x, y = tensors(Case(300, 20, 35))
    x[:, 3], y[:, 5] = 0.0, 0.0
    A = native(x, y)
    assert not A[5].any()
    assert not A[:, 3].any()
    assert A.count_nonzero() == 19 * 34


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("into", ["x", "y"])
def test_what_is_not_finite_stays_so(isa: str, value: float, into: str) -> None:
    """In all sums that it is a part of, and in no other."""
    x, y = tensors(Case(200, 18, 37))
    if into == "x":
        x[131, 33] = value
    else:
        y[7, 17] = value
    A = native(x, y)
    hit = A[:, 33] if into == "x" else A[17]
    assert not hit.isfinite().any()
    assert A.isfinite().sum() == A.numel() - hit.numel()


REFUSED = {
    "threads must be at least 1": {"threads": 0},
    "there must be a row": {"rows": 0},
    "no size be negative": {"units": -1},
    "a tensor is null": {"y": 0},
    "a tensor is not aligned": {"x": 2},
    "the workspace is null": {"workspace": 0},
    "not aligned to 64 bytes": {"workspace": 32},
}


@pytest.mark.parametrize("message", REFUSED)
def test_refusals(message: str) -> None:
    x, y = tensors(Case(3, 4, 5))
    A = torch.full((4, 5), GUARD)
    given_arguments = {**arguments(x, y, A), "workspace": 64, "threads": 1, **REFUSED[message]}
    with pytest.raises(RuntimeError, match=f"outer: .*{message}"):
        _cpu.outer(**given_arguments)
    assert (A == GUARD).all()


def test_no_units_are_no_work() -> None:
    x, y = tensors(Case(3, 0, 5))
    A = torch.empty(0, 5)
    assert _cpu.outer_workspace(**arguments(x, y, A), threads=1) == 0
    _cpu.outer(**arguments(x, y, A), threads=1)


def test_the_workspace_does_not_grow_with_the_batch() -> None:
    sizes = []
    for rows in (1 << 10, 1 << 30):
        sizes.append(
            _cpu.outer_workspace(
                rows=rows, units=128, channels=784, x_stride=784, y_stride=128, a_stride=784, threads=4
            )
        )
    assert sizes[0] == sizes[1] < 4 << 20
