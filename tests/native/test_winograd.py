"""The native dense correlation of 3 x 3 convolutions against the definition in float64."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ghl_kernels._native import cpu_status, load_cpu

if not cpu_status()[0]:
    pytest.skip(cpu_status()[1], allow_module_level=True)

_cpu: Any = load_cpu()

DTYPES = {torch.float32: 0, torch.bfloat16: 1}
LAYOUTS = ("nchw", "nhwc")
GUARD = 12345.0


class Conv(NamedTuple):
    """One layer."""

    batch: int
    channels: int
    units: int
    size: tuple[int, int]
    padding: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def out_size(self) -> tuple[int, int]:
        return self.size[0] + 2 * self.padding[0] - 2, self.size[1] + 2 * self.padding[1] - 2

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return self.units, self.channels // self.groups, 3, 3


# Vectors, blocks, chunks and parts begin and end at other numbers in each.
CONVS = {
    "one position": Conv(1, 1, 1, (1, 1)),
    "one patch": Conv(1, 2, 3, (3, 3), (0, 0)),
    "an odd plane": Conv(2, 16, 16, (7, 5)),
    "a plane of less than a vector": Conv(3, 16, 32, (3, 4)),
    "more padding than input": Conv(2, 5, 4, (2, 1), (3, 2)),
    "no padding": Conv(2, 17, 33, (9, 8), (0, 0)),
    "several images in a chunk": Conv(21, 16, 16, (4, 6)),
    "a chunk ends within an image": Conv(3, 18, 20, (20, 20)),
    "a row of tiles in pieces": Conv(1, 3, 16, (5, 300), (1, 2)),
    "one register of channels is left": Conv(2, 40, 24, (6, 6)),
    "several blocks": Conv(2, 150, 300, (6, 7)),
    "no parts": Conv(1, 160, 144, (4, 4)),
    "groups": Conv(2, 3 * 17, 3 * 5, (6, 9), (1, 0), 3),
    "depthwise": Conv(2, 6, 12, (5, 6), (1, 1), 6),
}


def draw(shape: tuple[int, ...], layout: str, dtype: torch.dtype, seed: int) -> Tensor:
    """Normal values with guards in front of the tensor and behind it, which no sum may hold."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    if layout == "nhwc":
        values = values.movedim(1, -1)
    guarded = torch.full((values.numel() + 64,), GUARD, dtype=dtype)
    inside = guarded[32:-32].view(values.shape).copy_(values)
    return inside.movedim(-1, 1) if layout == "nhwc" else inside


def tensors(
    conv: Conv, layouts: tuple[str, str] = ("nchw", "nchw"), dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor]:
    x = draw((conv.batch, conv.channels, *conv.size), layouts[0], dtype, seed)
    return x, draw((conv.batch, conv.units, *conv.out_size), layouts[1], dtype, seed + 1)


def arguments(conv: Conv, x: Tensor, y: Tensor, layouts: tuple[str, str], A: Tensor) -> dict[str, Any]:
    return {
        "batch": conv.batch,
        "channels": conv.channels,
        "units": conv.units,
        "groups": conv.groups,
        "in_size": conv.size,
        "padding": conv.padding,
        "x": x.data_ptr(),
        "x_dtype": DTYPES[x.dtype],
        "x_layout": strides(x, layouts[0]),
        "y": y.data_ptr(),
        "y_dtype": DTYPES[y.dtype],
        "y_layout": strides(y, layouts[1]),
        "a": A.data_ptr(),
        "a_layout": (A.stride(0), A.stride(1), A.stride(3)),
    }


def strides(images: Tensor, layout: str) -> tuple[int, int, int]:
    units, positions = images.shape[1], images.shape[2:].numel()
    return (units * positions, positions, 1) if layout == "nchw" else (units * positions, 1, units)


def native(
    conv: Conv,
    x: Tensor,
    y: Tensor,
    layouts: tuple[str, str] = ("nchw", "nchw"),
    threads: int = 2,
    a_layout: str = "nchw",
) -> Tensor:
    """A; fails where memory around A or behind the workspace changed."""
    A = draw(conv.weight_shape, a_layout, torch.float32, 0)
    around = A.untyped_storage()
    given_arguments = arguments(conv, x, y, layouts, A)
    size = _cpu.winograd_workspace(**given_arguments, threads=threads)
    # uninitialized memory must not matter
    workspace = torch.full((size // 4 + 16,), float("nan"))
    workspace[size // 4 :] = GUARD
    aligned = workspace.data_ptr() % 64 == 0
    assert aligned
    _cpu.winograd(**given_arguments, workspace=workspace.data_ptr(), threads=threads)
    assert (workspace[size // 4 :] == GUARD).all()
    guards = torch.tensor([], dtype=torch.float32).set_(around)
    assert (guards[:32] == GUARD).all()
    assert (guards[-32:] == GUARD).all()
    return A


def definition(conv: Conv, x: Tensor, y: Tensor) -> Tensor:
    """sum_p y_p x_p^T in float64, by unfolding."""
    patches = F.unfold(x.double(), 3, padding=conv.padding)
    patches = patches.view(conv.batch, conv.groups, -1, patches.shape[-1])
    rows = y.double().reshape(conv.batch, conv.groups, conv.units // conv.groups, -1)
    return torch.einsum("bgnp,bgdp->gnd", rows, patches).reshape(conv.weight_shape)


def bound(conv: Conv, x: Tensor, y: Tensor) -> Tensor:
    """So many roundings of the terms of a tap and its neighbors, which take part in its products."""
    terms = F.max_pool2d(definition(conv, x.abs(), y.abs()), 3, 1, 1)
    positions = conv.batch * conv.out_size[0] * conv.out_size[1]
    return 8 * torch.finfo(torch.float32).eps * max(positions, 16) ** 0.5 * terms + 1e-30


def check(conv: Conv, x: Tensor, y: Tensor, A: Tensor) -> None:
    error = (A.double() - definition(conv, x, y)).abs()
    assert (error <= bound(conv, x, y)).all(), error.max()


@pytest.mark.parametrize("conv", CONVS.values(), ids=CONVS)
@pytest.mark.parametrize("layouts", [(a, b) for a in LAYOUTS for b in LAYOUTS], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_the_sum(isa: str, conv: Conv, layouts: tuple[str, str], dtype: torch.dtype) -> None:
    x, y = tensors(conv, layouts, dtype)
    check(conv, x, y, native(conv, x, y, layouts))


@pytest.mark.parametrize("conv", CONVS.values(), ids=CONVS)
def test_bits_do_not_depend_on_threads(isa: str, conv: Conv) -> None:
    x, y = tensors(conv)
    first = native(conv, x, y, threads=1)
    for threads in (2, 3, 16):
        assert torch.equal(first, native(conv, x, y, threads=threads))


def test_bits_do_not_depend_on_layouts(isa: str) -> None:
    conv = CONVS["a chunk ends within an image"]
    sums = []
    for layouts in ((a, b) for a in LAYOUTS for b in LAYOUTS):
        sums.append(native(conv, *tensors(conv, layouts), layouts))
    assert all(torch.equal(sums[0], other) for other in sums)


def test_writes_any_layout(isa: str) -> None:
    conv = CONVS["groups"]
    x, y = tensors(conv)
    assert torch.equal(native(conv, x, y), native(conv, x, y, a_layout="nhwc"))


def test_mixed_dtypes(isa: str) -> None:
    conv = CONVS["an odd plane"]
    (x, _), (_, y) = tensors(conv, dtype=torch.bfloat16), tensors(conv)
    check(conv, x, y, native(conv, x, y))
    check(conv, x.float(), y.bfloat16(), native(conv, x.float(), y.bfloat16()))


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_any_shape(data: st.DataObject) -> None:
    groups = data.draw(st.sampled_from([1, 1, 2, 3]))
    padding = data.draw(st.tuples(st.integers(0, 3), st.integers(0, 3)))
    least = [max(1, 3 - 2 * pad) for pad in padding]
    conv = Conv(
        data.draw(st.integers(1, 9)),
        groups * data.draw(st.integers(1, 50)),
        groups * data.draw(st.integers(1, 50)),
        (data.draw(st.integers(least[0], 20)), data.draw(st.integers(least[1], 40))),
        padding,
        groups,
    )
    layouts = data.draw(st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)))
    x, y = tensors(conv, layouts, data.draw(st.sampled_from(list(DTYPES))), data.draw(st.integers(0, 99)))
    A = native(conv, x, y, layouts, data.draw(st.integers(1, 5)))
    check(conv, x, y, A)


@pytest.mark.parametrize("conv", [Conv(8, 64, 64, (16, 16)), Conv(16, 48, 96, (8, 8))], ids=str)
@pytest.mark.parametrize("kind", ["normal", "positive", "few"])
def test_is_as_exact_as_the_library(isa: str, conv: Conv, kind: str) -> None:
    """The acceptance of every kernel: at most twice eager PyTorch's error, and a floor."""
    x, y = tensors(conv)
    if kind == "positive":
        x, y = x.relu(), (2 * y).softmax(1)
    elif kind == "few":
        x, y = x.relu(), torch.where(y > 1.5, y, 0.0)
    expected = definition(conv, x, y)
    library = torch.nn.grad.conv2d_weight(x, conv.weight_shape, y, padding=conv.padding)
    floor = torch.finfo(torch.float32).eps * expected.abs().max()
    error = (native(conv, x, y).double() - expected).abs()
    assert error.max() <= 2 * (library.double() - expected).abs().max() + floor


def test_silent_units_and_channels_have_no_sum(isa: str) -> None:
    conv = Conv(3, 20, 18, (7, 7))
    x, y = tensors(conv)
    x[:, 3], y[:, 5] = 0.0, 0.0
    A = native(conv, x, y)
    assert not A[5].any()
    assert not A[:, 3].any()
    assert A.count_nonzero() == A.numel() - 20 * 9 - 17 * 9


def test_taps_without_a_product_have_no_sum(isa: str) -> None:
    """One tile of y over few inputs: most taps multiply zeros, and share M with some that do not."""
    conv = Conv(1, 16, 16, (10, 10), (0, 0))
    for seed in range(20):
        x, y = tensors(conv, seed=seed)
        mask = torch.rand(x.shape[2:], generator=torch.Generator().manual_seed(seed)) < 0.05
        x *= mask
        y[:, :, 2:], y[:, :, :, 2:] = 0.0, 0.0
        A, dead = native(conv, x, y), definition(conv, x.abs(), y.abs()) == 0
        assert dead.any()
        assert not A[dead].any()


@pytest.mark.parametrize("kind", ["few inputs", "few positions", "an outlier"])
def test_a_sign_is_that_of_the_own_products(isa: str, kind: str) -> None:
    """Wherever the sum is above the rounding of its own terms, however large those of its neighbors are."""
    conv = Conv(1, 16, 24, (12, 12))
    for seed in range(10):
        x, y = tensors(conv, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        if kind == "few inputs":
            x.relu_().mul_(torch.rand(x.shape, generator=generator) < 0.02)
        elif kind == "few positions":
            y.mul_((torch.rand(y.shape, generator=generator) < 0.01) * 10.0 ** (-10 * torch.rand(y.shape)))
        else:
            x[0, :, 6, 6] = 1e6
        A, exact = native(conv, x, y), definition(conv, x, y)
        terms = definition(conv, x.abs(), y.abs())
        certain = exact.abs() > 4 * torch.finfo(torch.float32).eps * terms
        assert certain.any()
        assert torch.equal(A.sign()[certain], exact.sign()[certain].float())
        assert not A[terms == 0].any()


@pytest.mark.parametrize("layouts", [("nchw", "nchw"), ("nhwc", "nchw"), ("nchw", "nhwc")], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("few", ["none", "y", "x", "both"])
def test_products_that_never_meet_have_no_sum(
    isa: str, few: str, dtype: torch.dtype, layouts: tuple[str, str]
) -> None:
    """Inputs and positions in every other column: two of three taps multiply zeros in every tile."""
    conv = Conv(3, 20, 18, (21, 22), (1, 1))
    x, y = tensors(conv, layouts, dtype)
    x[..., 1::2], y[..., 1::2] = 0.0, 0.0
    for name, tensor in (("x", x), ("y", y)):
        if few in (name, "both"):
            kept = torch.rand(tensor.shape, generator=torch.Generator().manual_seed(2)) < 0.1
            tensor.mul_(kept)
    A = native(conv, x, y, layouts)
    check(conv, x, y, A)
    assert not A[..., 0].any()
    assert not A[..., 2].any()
    assert torch.equal(A[..., 1] != 0, definition(conv, x, y)[..., 1] != 0)
    assert A[..., 1].any()


def test_taps_that_see_padding_alone_have_no_sum(isa: str) -> None:
    """One row of positions: the taps above and below it lie in the zeros."""
    conv = Conv(4, 16, 16, (1, 11))
    x, y = tensors(conv)
    A = native(conv, x, y)
    assert not A[:, :, 0].any()
    assert not A[:, :, 2].any()
    assert A[:, :, 1].all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("into", ["x", "y"])
def test_what_is_not_finite_stays_so(isa: str, value: float, into: str) -> None:
    """In all taps of the unit or channel, where the definition has it in one at least."""
    conv = Conv(2, 20, 18, (6, 6))
    x, y = tensors(conv)
    if into == "x":
        x[1, 7, 2, 3] = value
    else:
        y[0, 9, 5, 5] = value
    A = native(conv, x, y)
    hit = A[:, 7] if into == "x" else A[9]
    assert not hit.isfinite().any()
    assert A.isfinite().sum() == A.numel() - hit.numel()


REFUSED = {
    "threads must be at least 1": {"threads": 0},
    "there must be an image": {"batch": 0},
    "groups must divide": {"groups": 3},
    "the planes must hold a position": {"padding": (0, 0)},
    "a tensor is null": {"y": 0},
    "a tensor is not aligned": {"x": 2},
    "the workspace is null": {"workspace": 0},
    "not aligned to 64 bytes": {"workspace": 32},
}


@pytest.mark.parametrize("message", REFUSED)
def test_refusals(message: str) -> None:
    conv = Conv(2, 4, 4, (2, 2))
    x, y = tensors(conv)
    A = torch.full(conv.weight_shape, GUARD)
    given_arguments = {
        **arguments(conv, x, y, ("nchw", "nchw"), A),
        "workspace": 64,
        "threads": 1,
        **REFUSED[message],
    }
    with pytest.raises(RuntimeError, match=f"winograd: .*{message}"):
        _cpu.winograd(**given_arguments)
    assert (A == GUARD).all()


def test_no_units_are_no_work() -> None:
    conv = Conv(2, 4, 0, (4, 4))
    x, y = tensors(conv)
    A = torch.empty(conv.weight_shape)
    assert _cpu.winograd_workspace(**arguments(conv, x, y, ("nchw", "nchw"), A), threads=1) == 0
    _cpu.winograd(**arguments(conv, x, y, ("nchw", "nchw"), A), threads=1)


def test_the_workspace_does_not_grow_with_the_batch() -> None:
    sizes = []
    for batch in (64, 4096):
        conv = Conv(batch, 64, 128, (8, 8))
        given_arguments = arguments(
            conv, *tensors(Conv(1, 64, 128, (8, 8))), ("nchw", "nchw"), torch.empty(1, 1, 1, 1)
        )
        sizes.append(_cpu.winograd_workspace(**given_arguments, threads=4))
    assert sizes[0] == sizes[1] < 16 << 20
