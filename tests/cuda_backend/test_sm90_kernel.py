"""The Hopper pair kernel, its source run on a CPU with twins of its instructions, against float64 sums."""

from __future__ import annotations

import ctypes
import math
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from sm90_build import CUDA, ROOT, SOURCES, compile_cpp, kernel_library, runs_sanitized
from torch import Tensor
from torch.nn import functional

DTYPES = {torch.bfloat16: 1, torch.float16: 2}
SOFTMAX, LINEAR, RELU, BINARY = range(4)


@pytest.fixture(scope="session")
def sm90(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return kernel_library(tmp_path_factory.mktemp("sm90"), sanitize=runs_sanitized())


@dataclass(frozen=True)
class Case:
    """A layer and its competition; sizes are (depth, height, width)."""

    batch: int
    channels: int
    units: int
    size: tuple[int, int, int] = (1, 1, 1)
    kernel: tuple[int, int, int] = (1, 1, 1)
    stride: tuple[int, int, int] = (1, 1, 1)
    padding: tuple[int, int, int] = (0, 0, 0)
    dilation: tuple[int, int, int] = (1, 1, 1)
    dtype: torch.dtype = torch.bfloat16
    activity: int = SOFTMAX
    winners: int = 0
    anti: bool = False
    temperature: float = 1.0
    wants: str = "ag"
    multiprocessors: int = 6
    result_channels: int | None = None
    channels_last_result: bool = False
    groups: int = 1

    @property
    def out(self) -> tuple[int, ...]:
        shape = zip(self.size, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        return tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in shape)

    @property
    def positions(self) -> int:
        return self.batch * math.prod(self.out)


@dataclass
class Problem:
    """Tensors of a case; x is (batch, *size, channels), responses are (positions, units)."""

    case: Case
    x: Tensor
    u: Tensor
    grad: Tensor
    threshold: Tensor | None = None
    cut: Tensor | None = None
    logsumexp: Tensor | None = None
    first: Tensor | None = None


def padded(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Random, its last dimension padded to a multiple of 8 with NaN that nobody may read."""
    wide = torch.full((*shape[:-1], -(-shape[-1] // 8) * 8), float("nan"), dtype=dtype)
    wide[..., : shape[-1]] = torch.randn(shape).to(dtype)
    return wide[..., : shape[-1]]


def problem(case: Case) -> Problem:
    torch.manual_seed(1)
    x = padded((case.batch, *case.size, case.channels), case.dtype)
    u, grad = (padded((case.positions, case.units), case.dtype) for _ in range(2))
    made = Problem(case, x, u, grad)
    if case.units > 5:
        u[:, 3] = u[:, 5]  # ties
    values = u.float()
    won = torch.ones_like(values, dtype=torch.bool)
    if case.winners:
        order = torch.sort(values, dim=1, descending=True, stable=True)
        won = torch.zeros_like(won).scatter_(1, order.indices[:, : case.winners], True)
        made.threshold = order.values[:, case.winners - 1].contiguous()
        tied = won & (values == made.threshold[:, None])
        made.cut = torch.where(tied, torch.arange(case.units), -1).amax(1).int()
    elif case.activity != SOFTMAX:
        made.threshold = torch.zeros(case.positions)
    if case.activity == SOFTMAX:
        scaled = (values / case.temperature).masked_fill(~won, -torch.inf)
        made.logsumexp = torch.logsumexp(scaled, 1)
    if case.anti:
        made.first = values.argmax(1).int()
    return made


def activity(made: Problem) -> Tensor:
    """y, rounded to the dtype as the products are."""
    case, u = made.case, made.u.double()
    y = torch.ones_like(u)
    if case.activity == SOFTMAX:
        assert made.logsumexp is not None
        y = torch.exp(u / case.temperature - made.logsumexp.double()[:, None])
    if case.activity == LINEAR:
        y = u
    if case.activity == RELU:
        y = u.clamp(min=0)
    unit = torch.arange(case.units)
    if case.winners:
        assert made.threshold is not None
        assert made.cut is not None
        threshold = made.threshold.double()[:, None]
        y = torch.where((u > threshold) | ((u == threshold) & (unit <= made.cut[:, None])), y, 0.0)
    if case.anti:
        assert made.first is not None
        y = torch.where(unit == made.first[:, None], y, -y)
    if made.threshold is not None:
        y = torch.where(made.threshold.isnan()[:, None], torch.nan, y)
    return y.to(case.dtype).double()


def patches(case: Case, x: Tensor) -> Tensor:
    """(positions, channels, taps), by slices of the padded input."""
    d, h, w = case.padding
    wide = functional.pad(x.double(), (0, 0, w, w, h, h, d, d))
    taps = []
    for tap in (
        (i, j, k) for i in range(case.kernel[0]) for j in range(case.kernel[1]) for k in range(case.kernel[2])
    ):
        part = wide
        for axis in range(3):
            begin = tap[axis] * case.dilation[axis]
            end = begin + (case.out[axis] - 1) * case.stride[axis] + 1
            part = part.narrow(1 + axis, begin, end - begin)
            part = part.index_select(1 + axis, torch.arange(0, end - begin, case.stride[axis]))
        taps.append(part.reshape(case.positions, case.channels))
    return torch.stack(taps, 2)


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def fields(made: Problem, a: Tensor, g: Tensor) -> list[int]:
    case, x = made.case, made.x
    responses = [[address(r), 1, r.stride(0), 0, r.stride(1)] for r in (made.u, made.grad)]
    state = [address(s) for s in (made.threshold, made.cut, made.logsumexp, made.first)]
    results = [address(t) if name in case.wants else 0 for t, name in ((a, "a"), (g, "g"))]
    channels = a.shape[1]
    return [
        *(case.batch, case.channels, case.groups),
        *(*case.size, *case.out, *case.kernel, *case.stride, *case.padding, *case.dilation),
        *(DTYPES[case.dtype], address(x), x.stride(0), x.stride(4), x.stride(1), x.stride(2), x.stride(3)),
        *(case.units, *responses[0], *responses[1]),
        *(case.activity, int(case.winners > 0), int(case.anti), *state, *results, *a.stride(), channels),
    ]


def result_like(case: Case) -> Tensor:
    """[units, channels, taps] of NaN, in either order of the last two."""
    channels, taps = case.result_channels or case.channels, math.prod(case.kernel)
    shape = (case.units, taps, channels) if case.channels_last_result else (case.units, channels, taps)
    result = torch.full(shape, float("nan"))
    return result.transpose(1, 2) if case.channels_last_result else result


def run(sm90: ctypes.CDLL, made: Problem, schedule: int = 0, seed: int = 1) -> tuple[Tensor, Tensor]:
    case = made.case
    a, g = result_like(case), result_like(case)
    raw = (ctypes.c_int64 * 128)(*fields(made, a, g))
    processors = ctypes.c_int64(case.multiprocessors)
    assert sm90.takes(raw, processors)
    plan = (ctypes.c_int64 * 5)()
    sm90.plan(raw, processors, plan)
    workspace = torch.full((plan[0] // 4 + 1,), float("nan"))
    wrong = sm90.pair(
        raw,
        ctypes.c_double(case.temperature),
        processors,
        ctypes.c_void_p(address(workspace)),
        ctypes.c_int64(schedule),
        ctypes.c_int64(seed),
    )
    assert wrong is None, wrong.decode()
    assert workspace[-1].isnan(), "one past the workspace"
    return a, g


def check(sm90: ctypes.CDLL, case: Case) -> None:
    made = problem(case)
    a, g = run(sm90, made)
    x = patches(case, made.x)[:, : case.result_channels]
    for name, result, left in (("a", a, activity(made)), ("g", g, made.grad.double())):
        if name not in case.wants:
            assert result.isnan().all()
            continue
        expected = torch.einsum("pn,pct->nct", left, x)
        size = torch.einsum("pn,pct->nct", left.abs(), x.abs())
        # an ulp of y where exp2 rounds the other way, and float sums
        bound = (2**-8 if name == "a" else 2**-20) * size + 1e-6
        assert ((result.double() - expected).abs() <= bound).all(), name


LINEAR_LAYER = Case(batch=200, channels=300, units=150)
IMAGE = Case(batch=3, channels=72, units=80, size=(1, 9, 7), kernel=(1, 3, 3), padding=(0, 1, 1))

MANY_STAGES = replace(IMAGE, batch=9, multiprocessors=4)

CASES = {
    "linear": LINEAR_LAYER,
    "one of everything": Case(batch=1, channels=32, units=1),
    "whole tiles": Case(batch=128, channels=256, units=128, multiprocessors=2),
    "tiles cut and whole": Case(batch=320, channels=600, units=64, multiprocessors=2),
    "many segments of a tile": Case(batch=900, channels=64, units=64, multiprocessors=13),
    "three tiles of units": Case(batch=100, channels=64, units=192),
    "image": IMAGE,
    "image of many stages": MANY_STAGES,
    "half": replace(IMAGE, dtype=torch.float16),
    "strides": replace(IMAGE, stride=(1, 2, 3), size=(1, 12, 11)),
    "dilation": replace(IMAGE, dilation=(1, 2, 1), padding=(0, 2, 0), kernel=(1, 3, 2)),
    "1-d": Case(4, 64, 70, size=(1, 1, 37), kernel=(1, 1, 5), stride=(1, 1, 2), padding=(0, 0, 2)),
    "3-d": Case(
        2, 40, 65, size=(4, 5, 6), kernel=(2, 3, 2), stride=(2, 1, 1), padding=(1, 1, 0), dilation=(1, 2, 3)
    ),
    "images of a row": replace(IMAGE, size=(1, 1, 9), kernel=(1, 1, 3), padding=(0, 0, 1)),
    "images of a column": replace(IMAGE, size=(1, 9, 1), kernel=(1, 3, 1), padding=(0, 1, 0)),
    "one volume": Case(1, 40, 8, size=(4, 5, 1), kernel=(2, 3, 1), padding=(0, 1, 0)),
    "pointwise with a stride": Case(3, 64, 64, size=(1, 7, 8), stride=(1, 2, 2)),
    "more padding than input": Case(2, 32, 8, size=(1, 2, 1), kernel=(1, 3, 3), padding=(0, 3, 2)),
    "tiles of 64 columns": Case(batch=150, channels=64, units=70),
    "tiles of 128 columns": Case(batch=150, channels=120, units=70),
    "tiles of 192 columns": Case(batch=150, channels=190, units=70),
    "tiles of 192 columns in an image": replace(IMAGE, channels=64),
    "tiles of 224 columns in narrow chunks": replace(IMAGE, channels=96),
    "tiles of 256 columns in narrow chunks": replace(IMAGE, channels=96, kernel=(1, 2, 4)),
    "tiles of 256 columns": replace(IMAGE, channels=128, kernel=(1, 2, 2)),
    "winners, 64 columns": Case(batch=150, channels=64, units=70, winners=3),
    "winners, 128 columns": Case(batch=150, channels=120, units=70, winners=3),
    "winners, 224 columns in narrow chunks": replace(IMAGE, channels=96, winners=3),
    "winners, 256 columns in narrow chunks": replace(IMAGE, channels=96, kernel=(1, 2, 4), winners=3),
    "winners, 256 columns": replace(IMAGE, channels=128, kernel=(1, 2, 2), winners=3),
    "odd and even stages": Case(batch=97, channels=64, units=64, multiprocessors=2),
    "padding channels": replace(IMAGE, result_channels=67),
    "channels last result": replace(IMAGE, channels_last_result=True),
    "A alone": replace(LINEAR_LAYER, wants="a"),
    "G alone": replace(LINEAR_LAYER, wants="g"),
    "A alone, few units": replace(IMAGE, units=24, wants="a"),
    "A alone, a cluster": Case(batch=70, channels=64, units=200, wants="a"),
    "temperature": replace(LINEAR_LAYER, temperature=0.3),
    "winners": replace(LINEAR_LAYER, winners=5),
    "winners and anti": replace(IMAGE, winners=4, anti=True),
    "anti": replace(LINEAR_LAYER, anti=True),
    "linear activity": replace(LINEAR_LAYER, activity=LINEAR, winners=3),
    "relu": replace(LINEAR_LAYER, activity=RELU),
    "binary": replace(LINEAR_LAYER, activity=BINARY, winners=7, dtype=torch.float16),
}


@pytest.mark.parametrize("name", CASES)
def test_sums(sm90: ctypes.CDLL, name: str) -> None:
    check(sm90, CASES[name])


def bits(result: Tensor) -> Tensor:
    return result.contiguous().view(torch.int32)


@pytest.mark.parametrize("case", [LINEAR_LAYER, replace(IMAGE, winners=4)])
def test_any_order_of_threads_and_copies_gives_the_same_bits(sm90: ctypes.CDLL, case: Case) -> None:
    made = problem(case)
    once = run(sm90, made)
    for schedule, seed in ((1, 2), (2, 3), (2, 4)):
        for result, other in zip(run(sm90, made, schedule, seed), once, strict=True):
            assert torch.equal(bits(result), bits(other))


def test_nan_shows_where_it_belongs(sm90: ctypes.CDLL) -> None:
    made = problem(replace(IMAGE, winners=4))
    assert made.threshold is not None
    assert made.logsumexp is not None
    made.u[5, 7] = made.threshold[5] = made.logsumexp[5] = torch.nan
    made.grad[9, 11] = torch.nan
    a, g = run(sm90, made)
    assert torch.equal(
        a.isnan(), torch.einsum("pn,pct->nct", activity(made), patches(made.case, made.x)).isnan()
    )
    assert g[11, :, 4].isnan().all()
    assert not g[:11].isnan().any()
    assert not g[12:].isnan().any()


def takes(sm90: ctypes.CDLL, made: Problem) -> bool:
    result = result_like(made.case)
    raw = (ctypes.c_int64 * 128)(*fields(made, result, result))
    return bool(sm90.takes(raw, ctypes.c_int64(made.case.multiprocessors)))


REFUSED = {
    "groups": replace(IMAGE, groups=2),
    "few channels": replace(LINEAR_LAYER, channels=24),
    "very few channels": replace(LINEAR_LAYER, channels=4),
    "strides": replace(IMAGE, size=(1, 30, 30), stride=(1, 9, 1)),
    "padding beyond a corner": replace(IMAGE, size=(1, 4, 4), padding=(0, 129, 0)),
    "reach beyond a corner": replace(IMAGE, size=(1, 140, 4), dilation=(1, 66, 1)),
    "reach beyond a corner in 3-d": replace(IMAGE, size=(40, 4, 4), kernel=(2, 3, 3), dilation=(17, 1, 1)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_shapes(sm90: ctypes.CDLL, name: str) -> None:
    assert not takes(sm90, problem(REFUSED[name]))


def test_refuses_layouts(sm90: ctypes.CDLL) -> None:
    made = problem(IMAGE)
    assert takes(sm90, made)
    made.u = made.u.T.contiguous().T
    assert not takes(sm90, made), "units that are not contiguous"
    made = problem(IMAGE)
    made.x = made.x.movedim(-1, 1).contiguous().movedim(1, -1)
    assert not takes(sm90, made), "channels that are not contiguous"
    made = problem(IMAGE)
    made.grad = torch.randn(made.case.positions, 81).to(made.case.dtype)[:, :80]
    assert not takes(sm90, made), "rows that are not aligned"
    made = problem(IMAGE)
    made.x = torch.randn(made.x.numel() + 1).to(made.case.dtype)[1:].view(made.x.shape)
    assert not takes(sm90, made), "a tensor that is not aligned"


def test_takes_a_part_of_a_larger_tensor(sm90: ctypes.CDLL) -> None:
    """Steps between channels, columns and rows that nobody reads."""
    made = problem(IMAGE)
    wide = torch.randn(3, 1, 11, 8, 96).to(made.case.dtype)
    for columns in (7, 1):
        made.case = replace(IMAGE, size=(1, 9, columns))
        made.x = wide[:, :, 1:10, :columns, 8:80]
        assert takes(sm90, made), columns


def test_refuses_strides_that_the_manual_does_not_allow(sm90: ctypes.CDLL) -> None:
    """A step of a dimension holds whole steps of the one before, and at least all of them."""
    made = problem(IMAGE)
    values = made.x.contiguous()
    for name, x in {
        "rows and columns exchanged": values.transpose(2, 3).contiguous().transpose(2, 3),
        "images within rows": values.movedim(0, 2).contiguous().movedim(2, 0),
        "no whole number of columns in a row": values.new_zeros(3, 1, 9, 512)[..., :504].unflatten(
            3, (7, 72)
        ),
        "rows that overlap": values.flatten().as_strided((3, 1, 9, 7, 72), (2520, 2520, 144, 72, 1)),
    }.items():
        made.x = x
        assert not takes(sm90, made), name


def test_refuses_a_missing_state(sm90: ctypes.CDLL) -> None:
    for name in ("threshold", "cut", "logsumexp", "first"):
        made = problem(replace(IMAGE, winners=4, anti=True))
        setattr(made, name, None)
        assert not takes(sm90, made), name


def test_the_driver_s_functions_are_found_by_the_runtime_of_cuda_12_0(tmp_path: Path) -> None:
    """The call that newer releases have, and the only one that CUDA 13 has, came with 12.5."""
    flags = ["-fsyntax-only", "-DGHL_CUDA_ON_HOST", f"-I{SOURCES / 'cuda_12_0'}", "-isystem", CUDA]
    compile_cpp(tmp_path / "none", *flags, SOURCES / "driver.cpp")


PLANTED = {
    "empty barriers forget the other block": (
        "pair_sm90_layout.h",
        "return static_cast<uint32_t>(cluster * warps);",
        "return static_cast<uint32_t>(warps + 0 * cluster);",
    ),
    "a stage is released while it is multiplied": (
        "pair_sm90_kernel.cuh",
        "ptx::wgmma_wait_group<1>();\n    if (i > 0)",
        "ptx::wgmma_wait_group<2>();\n    if (i > 0)",
    ),
    "a stage of y is released while it is multiplied": (
        "pair_sm90_kernel.cuh",
        "ptx::wgmma_wait_group<1>();\n    ptx::wgmma_hold(y);",
        "ptx::wgmma_wait_group<2>();\n    ptx::wgmma_hold(y);",
    ),
    "y is overwritten while it is multiplied": (
        "pair_sm90_kernel.cuh",
        "load(odd);\n    queue_activity<T>(d, odd, stages);",
        "load(even);\n    queue_activity<T>(d, even, stages);",
    ),
    "a barrier expects too few bytes": (
        "pair_sm90_kernel.cuh",
        "kConsumers * kResponseBytes;",
        "kResponseBytes;",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_error_is_found(tmp_path: Path, name: str) -> None:
    file, sound, planted = PLANTED[name]
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    source = tmp_path / "csrc/cuda" / file
    text = source.read_text()
    assert text.count(sound) == 1
    source.write_text(text.replace(sound, planted))
    library = kernel_library(tmp_path, tmp_path / "csrc")
    with pytest.raises(AssertionError):
        check(library, MANY_STAGES)
