"""Shapes of convolutions: per-dimension arguments, padding as torch resolves it, output sizes."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor


class Geometry(NamedTuple):
    """A convolution with zero padding on both sides, one int per spatial dimension.

    ``by_tap``: A and G are wanted in the order (unit, tap, channel), that of a weight in channels_last.
    """

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    by_tap: bool = False

    @property
    def has_short_form(self) -> bool:
        """Whether its weight gradient can be had with fewer multiplications (csrc/include/ghl/winograd.h)."""
        return (self.kernel_size, self.stride, self.dilation) == ((3, 3), (1, 1), (1, 1))

    def out_size(self, in_size: Sequence[int]) -> tuple[int, ...]:
        """Spatial output size."""
        return tuple(
            (size + 2 * pad - spread * (kernel - 1) - 1) // step + 1
            for size, kernel, step, pad, spread in zip(
                in_size, self.kernel_size, self.stride, self.padding, self.dilation, strict=True
            )
        )


def is_by_tap(filters: Tensor) -> bool:
    """Whether (units, channels, *kernel) lies in the order (unit, tap, channel), without gaps."""
    order = (1, *range(filters.dim() - 1, 1, -1), 0)
    expected = 1
    for dim in order:
        if filters.shape[dim] > 1 and filters.stride(dim) != expected:
            return False
        expected *= filters.shape[dim]
    return True


def to_int(value: object) -> int | None:
    """What torch takes for an int: those of numpy and of tensors of one element too; None for all else.

    A compiler's stays a symbol: to turn it into a number would compile for that number alone.
    """
    if isinstance(value, bool):
        return None
    if isinstance(value, int | torch.SymInt):
        return cast(int, value)
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def per_dim(value: int | Sequence[int], dims: int, name: str, least: int) -> tuple[int, ...]:
    """``value`` as ``dims`` ints, each at least ``least``; TypeError or ValueError otherwise."""
    values = value if type(value) is tuple else _unpacked(value, dims, name)
    if len(values) == 1:
        values *= dims
    if len(values) != dims:
        raise ValueError(f"{name} must be {_ints(name, dims)}, got {value!r}")
    if all(type(v) is int and v >= least for v in values):  # the layers ask in every pass
        return values
    values = _unpacked(values, dims, name)
    if any(v < least for v in values):
        raise ValueError(f"{name} must be at least {least}, got {value!r}")
    return values


def _unpacked(value: int | Sequence[int], dims: int, name: str) -> tuple[int, ...]:
    number = to_int(value)
    if number is not None:
        return (number,) * dims
    try:
        numbers = [to_int(v) for v in value]  # type: ignore[union-attr]
    except TypeError:  # nothing to iterate over
        numbers = [None]
    values = tuple(v for v in numbers if v is not None)
    if len(values) < len(numbers):
        raise TypeError(f"{name} must be {_ints(name, dims)}, got {value!r}")
    return values


def _ints(name: str, dims: int) -> str:
    """What an argument may be, in words."""
    return f"an int or {dims} ints" + (", 'same' or 'valid'" if name == "padding" else "")


def resolve_padding(
    padding: int | Sequence[int] | str, kernel_size: Sequence[int], dilation: Sequence[int]
) -> tuple[list[int] | None, tuple[int, ...]]:
    """Padding in two parts: what F.pad must add first (or None), and the symmetric rest.

    ``"same"`` splits an odd total as torch's convolution does, so that results agree bit for bit:
    the surplus is zeros on the right, added before a convolution with the smaller padding.
    """
    dims = len(kernel_size)
    if not isinstance(padding, str):
        return None, per_dim(padding, dims, "padding", 0)
    if padding == "valid":
        return None, (0,) * dims
    if padding != "same":
        raise ValueError(f"padding must be {_ints('padding', dims)}, got {padding!r}")
    totals = [spread * (size - 1) for size, spread in zip(kernel_size, dilation, strict=True)]
    surplus = [side for total in reversed(totals) for side in (0, total % 2)]
    return (surplus if any(surplus) else None), tuple(total // 2 for total in totals)


def make_geometry(
    kernel_size: Sequence[int],
    stride: int | Sequence[int],
    padding: int | Sequence[int] | str,
    dilation: int | Sequence[int],
    groups: int,
) -> tuple[list[int] | None, Geometry]:
    """A checked :class:`Geometry`, and what F.pad must add to the input first (or None).

    Raises:
        TypeError: a value that is no int.
        ValueError: the wrong number of values, or one out of range.
    """
    dims = len(kernel_size)
    spread = per_dim(dilation, dims, "dilation", 1)
    before, symmetric = resolve_padding(padding, kernel_size, spread)
    step = per_dim(stride, dims, "stride", 1)
    if isinstance(padding, str) and padding == "same" and any(s != 1 for s in step):
        raise ValueError(f"padding='same' needs stride 1, got stride {stride!r}")
    number = groups if type(groups) is int else to_int(groups)
    if number is None:
        raise TypeError(f"groups must be an int, got {groups!r}")
    if number < 1:
        raise ValueError(f"groups must be at least 1, got {groups!r}")
    return before, Geometry(tuple(kernel_size), step, symmetric, spread, number)
