"""The native k-sparse correlation against the dense weight gradient in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass
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
GUARD = 12345.0
EPSILON = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Conv:
    """One layer; the tuples have a value for each of its 0 to 3 spatial dimensions."""

    batch: int
    channels: int
    units: int
    winners: int
    size: tuple[int, ...] = ()
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1

    def option(self, name: str, default: int) -> tuple[int, ...]:
        return getattr(self, name) or (default,) * len(self.size)

    @property
    def out_size(self) -> tuple[int, ...]:
        kernel, padding = self.option("kernel", 1), self.option("padding", 0)
        stride, dilation = self.option("stride", 1), self.option("dilation", 1)
        each = zip(self.size, kernel, stride, padding, dilation, strict=True)
        return tuple((i + 2 * p - d * (k - 1) - 1) // s + 1 for i, k, s, p, d in each)

    @property
    def positions(self) -> int:
        return self.batch * math.prod(self.out_size)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return (self.units, self.channels // self.groups, *self.option("kernel", 1))


@dataclass
class Lists:
    unit: Tensor  # int32 [positions, winners], ascending
    activity: Tensor  # float32 [positions, winners]


def random_lists(conv: Conv, seed: int = 0) -> Lists:
    generator = torch.Generator().manual_seed(seed)
    score = torch.rand(conv.positions, conv.units, generator=generator)
    unit = score.topk(conv.winners, dim=1).indices.sort(dim=1).values.to(torch.int32)
    return Lists(unit, torch.randn(conv.positions, conv.winners, generator=generator))


def random_x(
    conv: Conv, layout: str = "contiguous", dtype: torch.dtype = torch.float32, seed: int = 1
) -> Tensor:
    """x [batch, channels, *size] in a memory layout; whatever lies beside it is a guard no sum may hold."""
    shape = (conv.batch, conv.channels, *conv.size)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    if layout == "channels_last":
        return values.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "slice":
        larger = torch.full([n + 3 for n in shape], GUARD, dtype=dtype)
        return larger[tuple(slice(1, n + 1) for n in shape)].copy_(values)
    if layout == "expanded":
        return values[:1].expand(shape)
    return values


def dense_y(conv: Conv, lists: Lists, dtype: torch.dtype) -> Tensor:
    y = torch.zeros(conv.positions, conv.units, dtype=dtype)
    y.scatter_(1, lists.unit.long(), lists.activity.to(dtype))
    return y.view(conv.batch, *conv.out_size, conv.units).movedim(-1, 1).contiguous()


def dense(conv: Conv, x: Tensor, lists: Lists, dtype: torch.dtype) -> Tensor:
    """sum_p y_p x_p^T by torch's weight gradient."""
    y = dense_y(conv, lists, dtype)
    x = x.to(dtype)
    if not conv.size:
        return y.t() @ x
    return torch.ops.aten.convolution_backward(
        y, x.contiguous(), torch.empty(conv.weight_shape, dtype=dtype), None, conv.option("stride", 1),
        conv.option("padding", 0), conv.option("dilation", 1), False, [0] * len(conv.size), conv.groups,
        [False, True, False],
    )[1]  # fmt: skip


def triple(values: tuple[int, ...], fill: int) -> tuple[int, ...]:
    return (fill,) * (3 - len(values)) + values


def native(
    conv: Conv, x: Tensor, lists: Lists, threads: int = 2, layout: str = "contiguous"
) -> tuple[Tensor, Tensor]:
    """(A, activity_sum); fails where memory around an output or past the workspace changed."""
    units, channels, *kernel = conv.weight_shape
    taps = math.prod(kernel)
    if layout == "channels_last":
        buffer = torch.full((units + 2, taps, channels), GUARD)
        a = buffer[1 : units + 1].transpose(1, 2)
    elif layout == "slice":
        buffer = torch.full((units + 2, channels + 1, 2 * taps + 1), GUARD)
        a = buffer[1 : units + 1, :channels, 1::2]
    else:
        buffer = torch.full((units + 2, channels, taps), GUARD)
        a = buffer[1 : units + 1]
    sums = torch.full((units + 2,), GUARD)
    arguments = {
        "batch": conv.batch, "channels": conv.channels, "groups": conv.groups,
        "in_size": triple(conv.size, 1), "out_size": triple(conv.out_size, 1),
        "kernel": triple(conv.option("kernel", 1), 1), "stride": triple(conv.option("stride", 1), 1),
        "padding": triple(conv.option("padding", 0), 0), "dilation": triple(conv.option("dilation", 1), 1),
        "winner_unit": lists.unit.data_ptr(), "winner_activity": lists.activity.data_ptr(),
        "winners": conv.winners,
        "x": x.data_ptr(), "x_dtype": DTYPES[x.dtype],
        "x_stride_batch": x.stride(0), "x_stride_channel": x.stride(1), "x_stride": triple(x.stride()[2:], 0),
        "units": units, "a": a.data_ptr(),
        "a_stride_unit": a.stride(0), "a_stride_channel": a.stride(1), "a_stride_tap": a.stride(2),
        "activity_sum": sums[1:].data_ptr(), "threads": threads,
    }  # fmt: skip
    size = _cpu.correlate_workspace(**arguments)
    workspace = torch.full((size + 192,), 0xAB, dtype=torch.uint8)
    start = -workspace.data_ptr() % 64
    _cpu.correlate(**arguments, workspace=workspace[start:].data_ptr())
    assert bool((workspace[start + size :] == 0xAB).all()), "wrote past the workspace"
    assert bool((sums[[0, -1]] == GUARD).all()), "wrote beside activity_sum"
    result = a.clone().reshape(conv.weight_shape)
    a.fill_(GUARD)
    assert bool((buffer == GUARD).all()), "wrote beside A"
    return result, sums[1:-1].clone()


def assert_close(conv: Conv, x: Tensor, lists: Lists, threads: int = 2, layout: str = "contiguous") -> None:
    """err <= 2 * err of torch's float32 dense product + eps * the largest sum of |y| |x|, against float64."""
    expected = dense(conv, x, lists, torch.float64)
    bound = dense(conv, x.abs(), Lists(lists.unit, lists.activity.abs()), torch.float64).max()
    eager = (dense(conv, x, lists, torch.float32) - expected).abs().max()
    actual, sums = native(conv, x, lists, threads, layout)
    assert (actual - expected).abs().max() <= 2 * eager + EPSILON * bound

    y = dense_y(conv, lists, torch.float64).movedim(1, -1).reshape(-1, conv.units)
    eager = (y.float().sum(0) - y.sum(0)).abs().max()
    assert (sums - y.sum(0)).abs().max() <= 2 * eager + EPSILON * y.abs().sum(0).max()


CASES = {
    "linear": Conv(101, 37, 23, 5),
    "linear-narrow": Conv(67, 3, 19, 2),
    "linear-all-win": Conv(31, 129, 11, 11),
    "first-layer": Conv(5, 3, 31, 3, (13, 11), (5, 5), padding=(2, 2)),
    "middle": Conv(3, 67, 47, 7, (9, 10), (3, 3), padding=(1, 1)),
    "1x1-strided": Conv(3, 83, 29, 4, (9, 7), (1, 1), stride=(2, 3)),
    "strided-dilated": Conv(2, 17, 13, 3, (17, 19), (3, 2), stride=(2, 3), padding=(3, 1), dilation=(2, 3)),
    "wide-padding": Conv(2, 5, 7, 2, (1, 2), (3, 3), padding=(4, 5)),
    "padded-1x1": Conv(2, 5, 7, 2, (3, 4), (1, 1), stride=(2, 2), padding=(1, 2)),
    "groups": Conv(3, 3 * 19, 3 * 7, 5, (7, 8), (3, 3), padding=(1, 1), groups=3),
    "depthwise": Conv(3, 37, 74, 9, (8, 9), (3, 3), padding=(1, 1), groups=37),
    "depthwise-dilated": Conv(3, 11, 11, 3, (12, 9), (3, 3), dilation=(1, 2), groups=11),
    "conv1d": Conv(4, 21, 17, 3, (53,), (7,), stride=(2,), padding=(3,)),
    "conv3d": Conv(2, 6, 14, 4, (5, 6, 7), (3, 2, 3), stride=(1, 2, 1), padding=(1, 0, 1), groups=2),
    # More than a block of images: these sums are added to A in several rounds.
    "large-images": Conv(5, 33, 19, 2, (67, 131), (3, 3), padding=(1, 1)),
    "large-groups": Conv(3, 12, 24, 3, (97, 257), (3, 3), padding=(1, 1), groups=12),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=("f32", "bf16"))
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "slice", "expanded"])
@pytest.mark.parametrize("name", CASES)
def test_matches_dense(name: str, layout: str, dtype: torch.dtype, isa: str) -> None:
    conv = CASES[name]
    assert_close(conv, random_x(conv, layout, dtype), random_lists(conv))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "slice"])
@pytest.mark.parametrize("name", CASES)
def test_layouts_of_a(name: str, layout: str, isa: str) -> None:
    conv = CASES[name]
    x, lists = random_x(conv), random_lists(conv)
    assert torch.equal(native(conv, x, lists, layout=layout)[0], native(conv, x, lists)[0])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", CASES)
def test_same_bits_for_any_number_of_threads(name: str, layout: str, isa: str) -> None:
    conv = CASES[name]
    x, lists = random_x(conv, layout), random_lists(conv)
    one = native(conv, x, lists, threads=1)
    for threads in (2, 3, 7):
        many = native(conv, x, lists, threads=threads)
        assert torch.equal(one[0], many[0])
        assert torch.equal(one[1], many[1])


@st.composite
def convs(draw: st.DrawFn) -> Conv:
    dimensions = draw(st.integers(1, 3))
    groups = draw(st.sampled_from((1, 1, 2, 3, 5)))
    each = st.integers
    kernel = tuple(draw(each(1, 4)) for _ in range(dimensions))
    dilation = tuple(draw(each(1, 3)) for _ in range(dimensions))
    padding = tuple(draw(each(0, 3)) for _ in range(dimensions))
    span = [d * (k - 1) + 1 - 2 * p for k, d, p in zip(kernel, dilation, padding, strict=True)]
    units = groups * draw(each(1, 9))
    return Conv(
        batch=draw(each(1, 4)),
        channels=groups * draw(st.sampled_from((1, 2, 3, 7, 15, 16, 17, 31, 48, 65))),
        units=units,
        winners=draw(each(1, units)),
        size=tuple(max(1, n) + draw(each(0, 6)) for n in span),
        kernel=kernel,
        stride=tuple(draw(each(1, 3)) for _ in range(dimensions)),
        padding=padding,
        dilation=dilation,
        groups=groups,
    )


@settings(max_examples=150, deadline=None)
@given(
    conv=convs(),
    layout=st.sampled_from(("contiguous", "channels_last", "slice", "expanded")),
    a_layout=st.sampled_from(("contiguous", "channels_last", "slice")),
    dtype=st.sampled_from(list(DTYPES)),
    threads=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_any_convolution(
    conv: Conv, layout: str, a_layout: str, dtype: torch.dtype, threads: int, seed: int
) -> None:
    assert_close(conv, random_x(conv, layout, dtype, seed), random_lists(conv, seed), threads, a_layout)


def test_hot_unit_keeps_the_accuracy_of_the_dense_product(isa: str) -> None:
    """One unit wins 40,000 positions of like sign: a plain running sum would lose digits."""
    conv = Conv(40_000, 32, 5, 1)
    x = random_x(conv).abs()
    lists = Lists(torch.full((conv.positions, 1), 3, dtype=torch.int32), random_lists(conv).activity.abs())
    expected = dense(conv, x, lists, torch.float64)
    eager = (dense(conv, x, lists, torch.float32) - expected).abs().max()
    actual, _ = native(conv, x, lists)
    assert (actual - expected).abs().max() <= 2 * eager + EPSILON * expected.max()
    assert actual[[0, 1, 2, 4]].count_nonzero() == 0


def test_conv_1x1_equals_linear(isa: str) -> None:
    conv = Conv(4, 71, 13, 3, (5, 6), (1, 1))
    x, lists = random_x(conv, "channels_last"), random_lists(conv)
    rows = x.permute(0, 2, 3, 1).reshape(-1, 71)
    linear = Conv(rows.shape[0], 71, 13, 3)
    assert torch.equal(native(conv, x, lists)[0].flatten(1), native(linear, rows, lists)[0])


@pytest.mark.parametrize("row", [0, 40, 100])
def test_nan_position_makes_all_nan(row: int, isa: str) -> None:
    conv = CASES["linear"]
    lists = random_lists(conv)
    lists.unit[row] = torch.tensor([-1, 10**9, -7, 0, 0])  # only the first is meant to be read
    a, sums = native(conv, random_x(conv), lists)
    assert bool(a.isnan().all())
    assert bool(sums.isnan().all())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_x_reaches_the_units_that_saw_it(value: float, isa: str) -> None:
    conv = CASES["middle"]
    x, lists = random_x(conv), random_lists(conv)
    x[1, 5, 4, 4] = value
    a, _ = native(conv, x, lists)
    rows = lists.unit.view(conv.batch, *conv.out_size, -1)
    saw = torch.zeros(conv.units, dtype=torch.bool)
    saw[rows[1, 3:6, 3:6].flatten().long()] = True
    assert torch.equal(a.isfinite().logical_not().flatten(2).any(2)[:, 5], saw)
    assert bool(a[:, torch.arange(conv.channels) != 5].isfinite().all())


def test_non_finite_activity_reaches_its_unit_only(isa: str) -> None:
    conv = CASES["linear"]
    lists = random_lists(conv)
    lists.activity[7, 2] = math.nan
    a, sums = native(conv, random_x(conv), lists)
    hit = torch.zeros(conv.units, dtype=torch.bool)
    hit[lists.unit[7, 2].long()] = True
    assert torch.equal(a.isnan().all(1), hit)
    assert torch.equal(a.isnan().any(1), hit)
    assert torch.equal(sums.isnan(), hit)


@pytest.mark.parametrize(
    "conv", [Conv(0, 5, 3, 2), Conv(0, 5, 3, 2, (4, 4), (3, 3)), Conv(2, 5, 3, 2, (0,), (1,))]
)
def test_no_positions_gives_zero(conv: Conv, isa: str) -> None:
    a, sums = native(conv, random_x(conv), random_lists(conv))
    assert a.shape == conv.weight_shape
    assert a.count_nonzero() == 0
    assert sums.count_nonzero() == 0


def test_inputs_are_left_alone(isa: str) -> None:
    conv = CASES["middle"]
    x, lists = random_x(conv), random_lists(conv)
    before = (x.clone(), lists.unit.clone(), lists.activity.clone())
    native(conv, x, lists)
    assert all(
        torch.equal(now, old) for now, old in zip((x, lists.unit, lists.activity), before, strict=True)
    )


def test_a_dropped_batch_item_would_be_seen(isa: str) -> None:
    conv = CASES["middle"]
    x, lists = random_x(conv), random_lists(conv)
    expected = dense(conv, x, lists, torch.float64)
    x[2] = 0
    actual, _ = native(conv, x, lists)
    assert (actual - expected).abs().max() > 100 * EPSILON * expected.abs().max()
