"""What a GPU has measured replaces the estimates, shape by shape, and may hand an operation to CUDA."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import ghl_kernels as ghl
from ghl_kernels import _dispatch
from ghl_kernels._geometry import make_geometry
from ghl_kernels.backends import cuda
from ghl_kernels.backends.cuda import operations as cuda_operations
from ghl_kernels.backends.gpu.layout import patches, responses
from ghl_kernels.backends.triton import arch, choice, config, measured
from ghl_kernels.backends.triton.config import Problem, Tile
from ghl_kernels.backends.triton.operations import OPERATIONS
from ghl_kernels.rule import Competition

CHIP = arch.KNOWN["sm_90"]
PROBLEM = Problem(384, 864, 96, 100_000, 1, 2, 2, makes_y=True, state_here=False)
SOFTMAX, KWTA = Competition("softmax", 0, 1.0, False), Competition("linear", 2, 1.0, False)
DEPTHWISE = make_geometry((1, 1), 1, 0, 1, 4)[1]


@pytest.fixture
def write(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Replaces the table of sm_90, for which the interpreter is configured too."""

    def replace(entries: dict[str, Any]) -> None:
        monkeypatch.setattr(measured, "_file", lambda: {"sm_90": entries})
        measured.verdict.cache_clear()

    replace({})
    yield replace
    measured.verdict.cache_clear()


def test_the_file_is_a_table_for_each_architecture() -> None:
    assert measured.table("sm_1") == {}


def test_a_tile_holds_for_its_shape_only(write: Callable[..., None]) -> None:
    found = Tile(64, 256, 64, 8, 2)
    write({config._key(PROBLEM): list(found)})
    assert config.tile(PROBLEM, CHIP) == found
    assert config.tile(PROBLEM._replace(positions=100_001), CHIP) == found
    assert config.tile(PROBLEM, arch.KNOWN["sm_100"]) != found
    for other in ({"units": 385}, {"positions": 300_000}, {"bounded": False}, {"results": 1}):
        assert config.tile(PROBLEM._replace(**other), CHIP) != found


@pytest.mark.parametrize("value", [True, False])
def test_a_verdict_goes_before_the_estimate(write: Callable[..., None], value: bool) -> None:
    assert not config.prefers_library(PROBLEM, CHIP, is_conv=False)
    key = config._key(PROBLEM)
    write({f"{key}:library": value, f"{key}:library_grad": value, f"{key}:cuda": value})
    assert config.prefers_library(PROBLEM, CHIP, is_conv=False) is value
    assert config.leaves_grad_to_library(PROBLEM, CHIP) is value
    assert config.prefers_cuda(PROBLEM, CHIP, rows=True) is value
    assert not config.prefers_cuda(PROBLEM, arch.KNOWN["sm_100"], rows=True)


def test_a_verdict_holds_for_similar_shapes_of_its_kind(write: Callable[..., None]) -> None:
    """Up to a factor of two in every size, the positions in their powers of two."""
    write({f"{config._key(PROBLEM)}:cuda": True})

    def prefers_cuda(change: dict[str, Any]) -> bool:
        # of a layout for which nothing is known beforehand
        return config.prefers_cuda(PROBLEM._replace(**change), CHIP, rows=False)

    near = ({"units": 768}, {"units": 200, "positions": 60_000}, {"columns": 1000}, {"channels": 192})
    assert all(map(prefers_cuda, near))
    far = ({"units": 769}, {"units": 191}, {"columns": 2000}, {"channels": 864}, {"positions": 500_000})
    other_kinds = ({"results": 1}, {"itemsize": 4}, {"groups": 2}, {"makes_y": False})
    assert not any(map(prefers_cuda, (*far, *other_kinds)))


@pytest.mark.parametrize(
    ("change", "rows"),
    [
        ({"itemsize": 4}, True),
        ({"groups": 2}, True),
        ({"channels": 28, "columns": 252}, True),
        ({"channels": 66, "columns": 594}, True),
        ({"channels": 24, "columns": 216}, True),
        ({"units": 33}, True),
        ({}, False),
    ],
)
def test_the_hopper_kernel_is_taken_where_it_fits(
    write: Callable[..., None], change: dict[str, Any], rows: bool
) -> None:
    write({})
    for fitting in ({}, {"results": 1}, {"channels": 32, "columns": 288}, {"units": 1536}):
        problem = PROBLEM._replace(**fitting)
        assert config.prefers_cuda(problem, CHIP, rows=True)
        assert not config.prefers_cuda(problem, arch.KNOWN["sm_80"], rows=True)
    assert not config.prefers_cuda(PROBLEM._replace(**change), CHIP, rows=rows)


def test_the_nearest_verdict_decides() -> None:
    entries = {
        "100/state rows 2:cuda": False,
        "200/state rows 2:cuda": True,
        "128/state rows 2:library": True,
    }
    expected = {51: False, 140: False, 142: True, 200: True, 400: True, 401: None, 49: None}
    for units, value in expected.items():
        key = measured.competition_key("state", units, 2, rows=True)
        assert measured.nearest(entries, key, "cuda") is value
    assert measured.nearest(entries, measured.competition_key("state", 200, 2, rows=False), "cuda") is None
    assert measured.nearest({"epilogue:cuda": True}, "epilogue", "cuda") is True
    assert measured.nearest({"epilogue:cuda": True}, "sparse", "cuda") is None


def test_the_threshold_of_the_library_can_be_replaced(write: Callable[..., None]) -> None:
    wide = PROBLEM._replace(units=4096, columns=4096, channels=4096)
    assert config.prefers_library(wide, CHIP, is_conv=False)
    write({"intensity:2": 1e6})
    assert not config.prefers_library(wide, CHIP, is_conv=False)
    write({"intensity:4": 1e6})
    assert config.prefers_library(wide, CHIP, is_conv=False)
    assert not config.prefers_library(wide._replace(itemsize=4), CHIP, is_conv=False)


@pytest.fixture
def cuda_calls(monkeypatch: pytest.MonkeyPatch, write: Callable[..., None]) -> list[str]:
    """Has the CUDA backend's kernels be Triton's, and lists the calls of them; the backend is ``auto``'s."""
    calls: list[str] = []
    ours = {name: getattr(choice, name) for name in ("compete", "depthwise", "sparse", "epilogue")}
    for name, module in ours.items():
        stand_in = SimpleNamespace(**{f: _noted(calls, f, getattr(module, f)) for f in _FUNCTIONS[name]})
        monkeypatch.setattr(choice, f"cuda_{name}", stand_in)
    monkeypatch.setattr(cuda, "refusal", lambda device, dtype: "")
    monkeypatch.setattr(_dispatch._Choice, "name", "auto")
    return calls


_FUNCTIONS = {
    "compete": ("activities", "state", "full_state", "winner_lists", "activity_sums"),
    "depthwise": ("correlate",),
    "sparse": ("correlate",),
    "epilogue": ("delta", "gate_", "learn_"),
}


def _noted(calls: list[str], name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        calls.append(name)
        return function(*arguments, **options)

    return call


def _sample() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(9, 8, generator=generator), torch.randn(9, 16, generator=generator)


OPERATIONS_BY_KEY: dict[str, tuple[Callable[[Tensor, Tensor], Any], str]] = {
    "16/activities rows 4": (lambda x, u: OPERATIONS.compete(u, 1, KWTA), "activities"),
    "16/activities planes 4": (lambda x, u: OPERATIONS.compete(u.t().contiguous(), 0, KWTA), "activities"),
    "16/full_state rows 4": (lambda x, u: OPERATIONS.competition_state(u, 1, KWTA), "full_state"),
    "16/winner_lists rows 4": (lambda x, u: OPERATIONS.winners(u, 1, KWTA), "winner_lists"),
    "16/state rows 4": (lambda x, u: OPERATIONS.linear_sums(x, u, KWTA, "oja"), "state"),
    "16/activity_sums rows 4": (lambda x, u: OPERATIONS.linear_sums(x, u, KWTA, "instar"), "activity_sums"),
    "depthwise": (
        lambda x, u: OPERATIONS.conv_sums(
            x[:8].view(1, 4, 4, 4), u[:4].view(1, 4, 4, 4), DEPTHWISE, SOFTMAX, "oja"
        ),
        "correlate",
    ),
    "sparse": (
        lambda x, u: OPERATIONS.linear_winner_sums(x, *OPERATIONS.winners(u, 1, KWTA), 16, "oja"),
        "correlate",
    ),
    "epilogue": (
        lambda x, u: OPERATIONS.delta(u.clone(), torch.ones(1), u, 1, "oja", "layer"),
        "delta",
    ),
}


@pytest.mark.parametrize("key", OPERATIONS_BY_KEY)
def test_an_operation_goes_to_cuda_where_that_was_faster(
    write: Callable[..., None], cuda_calls: list[str], monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    """Only under ``auto``, and only where the CUDA backend can run it; the result is the same."""
    monkeypatch.setattr(choice, "_cuda_competes", lambda *_, **__: False)
    operation, function = OPERATIONS_BY_KEY[key]
    write({f"{key}:cuda": False})
    x, u = _sample()
    expected = operation(x, u)
    assert cuda_calls == []
    write({f"{key}:cuda": True})
    torch.testing.assert_close(operation(x, u), expected, rtol=0, atol=0)
    assert cuda_calls == [function]
    with ghl.use_backend("triton"):
        operation(x, u)
    monkeypatch.setattr(cuda, "refusal", lambda device, dtype: "no nvcc")
    operation(x, u)
    assert cuda_calls == [function]


@pytest.mark.parametrize(("units", "dtype", "taken"), [
    (8, torch.float32, True), (1024, torch.float32, True), (1025, torch.float32, False),
    (8, torch.bfloat16, True), (1536, torch.float16, True), (1537, torch.bfloat16, False),
], ids=str)  # fmt: skip
def test_cuda_competes_by_default_on_hopper_alone(
    cuda_calls: list[str], units: int, dtype: torch.dtype, taken: bool
) -> None:
    u = torch.randn(3, units).to(dtype)
    OPERATIONS.compete(u, 1, KWTA)
    assert cuda_calls == (["activities"] if taken else [])
    with arch.assume(arch.KNOWN["sm_80"]):
        assert choice._competing("activities", u, units, 1) is choice.compete


@pytest.mark.parametrize(("function", "units", "itemsize", "rows", "taken"), [
    ("winner_lists", 128, 4, False, False), ("winner_lists", 129, 4, False, True),
    ("winner_lists", 96, 2, False, True), ("state", 1536, 2, False, True),
    ("full_state", 1024, 2, True, True), ("full_state", 1025, 2, True, False),
    ("activity_sums", 128, 2, True, False), ("activity_sums", 1024, 2, True, True),
    ("activity_sums", 1025, 2, True, False), ("state", 96, 8, True, False),
])  # fmt: skip
def test_which_competitions_cuda_takes_unmeasured(
    function: str, units: int, itemsize: int, rows: bool, taken: bool
) -> None:
    assert choice._cuda_competes(function, units, itemsize, rows=rows) == taken


def test_a_alone_and_the_pair_go_to_cuda_by_shape(
    write: Callable[..., None], cuda_calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, u = _sample()
    shapes: list[tuple[int, ...]] = []

    def correlate(*arguments: Any) -> tuple[Tensor, Tensor | None]:
        shapes.append(arguments[-1])
        return torch.zeros(16, 8), None if arguments[2] is None else torch.zeros(16, 8)

    monkeypatch.setattr(cuda_operations.OPERATIONS, "correlate", correlate)
    alone = Problem(16, 8, 8, 9, 1, 4, 1, makes_y=True, state_here=False)
    write({f"{config._key(alone)}:cuda": True})
    OPERATIONS.linear_pair(x, u, u, SOFTMAX, "oja")
    assert shapes == []
    OPERATIONS.linear_sums(x, u, SOFTMAX, "oja")
    assert shapes == [(16, 8)]


def test_the_library_makes_no_gradient_that_cuda_makes_beside_the_sums(
    write: Callable[..., None], cuda_calls: list[str]
) -> None:
    _, geometry = make_geometry((1, 1), 1, 0, 1, 1)
    last = {"dtype": torch.bfloat16, "memory_format": torch.channels_last}
    x, u = (torch.zeros(2, channels, 3, 3).to(**last) for channels in (8, 16))
    arguments = patches(x, geometry), responses(u, 1), responses(u, 1)
    key = config._key(Problem(16, 8, 8, 18, 1, 2, 2, makes_y=True, state_here=False))
    for cuda_is_faster in (False, True):
        write({f"{key}:library_grad": True, f"{key}:cuda": cuda_is_faster})
        assert OPERATIONS.leaves_grad_to_library(*arguments) is not cuda_is_faster
        with ghl.use_backend("triton"):
            assert OPERATIONS.leaves_grad_to_library(*arguments)
