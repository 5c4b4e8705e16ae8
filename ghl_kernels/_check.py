"""What an argument must be before a kernel sees it. Every message says what was got and what is allowed."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ghl_kernels._geometry import Geometry, to_int
from ghl_kernels.rule import HebbianRule


def floats(**tensors: Tensor) -> None:
    """Real floating-point tensors with data, dense and all on one device.

    Raises:
        TypeError: not a tensor, or integer, bool, complex, sparse, nested.
        ValueError: meta tensors, or tensors on different devices.
    """
    first: Tensor | None = None
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be a real floating-point tensor, got {tensor.dtype}")
        if tensor.layout != torch.strided or tensor.is_nested:
            kind = "nested" if tensor.is_nested else tensor.layout
            raise TypeError(f"{name} must be a dense tensor, got a {kind} one")
        if tensor.device.type == "meta":
            raise ValueError(f"{name} is a meta tensor, which has no values to compute with")
        if first is None:
            first = tensor
        elif tensor.device != first.device:
            devices = ", ".join(f"{k} on {t.device}" for k, t in tensors.items() if isinstance(t, Tensor))
            raise ValueError(f"all tensors must be on one device, got {devices}")


def same_dtype(**tensors: Tensor) -> None:
    """Tensors of one dtype, TypeError otherwise."""
    if len({tensor.dtype for tensor in tensors.values()}) > 1:
        dtypes = ", ".join(f"{name} {tensor.dtype}" for name, tensor in tensors.items())
        raise TypeError(f"these must have one dtype, got {dtypes}")


def alike_precision(**tensors: Tensor) -> None:
    """Sums are float64 for float64 tensors and float32 for all others: TypeError where both would meet."""
    if len({tensor.dtype == torch.float64 for tensor in tensors.values()}) > 1:
        dtypes = ", ".join(f"{name} {tensor.dtype}" for name, tensor in tensors.items())
        raise TypeError(f"all of these must be torch.float64, or none, got {dtypes}")


def shape(name: str, tensor: Tensor, expected: Sequence[int]) -> None:
    """A tensor of exactly this shape, ValueError otherwise."""
    if tuple(tensor.shape) != tuple(expected):
        raise ValueError(f"{name} must have shape {tuple(expected)}, got {tuple(tensor.shape)}")


def writable(name: str, tensor: Tensor) -> None:
    """A tensor in which no two elements share memory, ValueError otherwise."""
    reach = 0  # of the dimensions with smaller strides
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                raise ValueError(
                    f"{name} is written in place but its elements overlap: shape {tuple(tensor.shape)}, "
                    f"strides {tensor.stride()}; pass a clone"
                )
            reach += (size - 1) * stride


def dimension(u: Tensor, dim: int) -> int:
    """``dim`` of u counted from the front, TypeError unless an int, ValueError when there is none."""
    if type(dim) is not int and to_int(dim) is None:
        raise TypeError(f"dim must be an int, got {dim!r}")
    if u.dim() == 0:
        raise ValueError("u must have at least one dimension, that of the units, got shape ()")
    if not -u.dim() <= dim < u.dim():
        raise ValueError(
            f"dim must be in [{-u.dim()}, {u.dim() - 1}] for u of shape {tuple(u.shape)}, got {dim}"
        )
    return dim % u.dim()


def winners(k: int, units: int) -> None:
    """A number of winners among ``units``; 0 stands for all."""
    if not 0 <= k <= units:
        raise ValueError(f"winners must be at least 1 and at most the number of units {units}, got {k}")


def linear(x: Tensor, u: Tensor) -> None:
    """x (..., D) and u (..., N) with the same leading dimensions."""
    if x.dim() < 1 or u.dim() < 1 or x.shape[:-1] != u.shape[:-1]:
        raise ValueError(
            f"x (..., in_features) and u (..., out_features) must have the same leading dimensions, "
            f"got {tuple(x.shape)} and {tuple(u.shape)}"
        )


def conv(x: Tensor, u: Tensor, geometry: Geometry) -> None:
    """x (B, C, *size) and u (B, N, *out_size) that fit the geometry."""
    out = conv_input(x, geometry)
    if u.dim() != x.dim() or u.shape[0] != x.shape[0] or tuple(u.shape[2:]) != out:
        raise ValueError(
            f"u must have shape ({x.shape[0]}, units, {str(list(out))[1:-1]}), got {tuple(u.shape)}"
        )
    if u.shape[1] % geometry.groups:
        raise ValueError(f"the units of u must divide by groups={geometry.groups}, got {u.shape[1]}")


def conv_input(x: Tensor, geometry: Geometry) -> tuple[int, ...]:
    """Spatial output size of x (B, C, *size) that fits the geometry."""
    dims = len(geometry.kernel_size)
    if not len(geometry.stride) == len(geometry.padding) == len(geometry.dilation) == dims:
        raise ValueError(f"kernel_size, stride, padding and dilation must have one length, got {geometry}")
    if x.dim() != dims + 2:
        raise ValueError(
            f"x must be (batch, channels, {dims} spatial dimensions), got shape {tuple(x.shape)}"
        )
    if x.shape[1] % geometry.groups:
        raise ValueError(f"the channels of x must divide by groups={geometry.groups}, got {x.shape[1]}")
    out = geometry.out_size(x.shape[2:])
    if min(out, default=1) < 1:
        raise ValueError(
            f"the kernel {geometry.kernel_size} does not fit into x of shape {tuple(x.shape)}: {geometry}"
        )
    return out


def choice(name: str, value: str, allowed: Sequence[str]) -> None:
    """One of the allowed words, ValueError otherwise."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {tuple(allowed)}, got {value!r}")


def module(model: object) -> None:
    """A torch.nn.Module, TypeError otherwise."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def process_group(group: object) -> None:
    """What torch.distributed.new_group returns, or None, TypeError otherwise."""
    distributed = torch.distributed
    if group is None:
        return
    if distributed.is_available() and (
        isinstance(group, distributed.ProcessGroup) or group is distributed.GroupMember.NON_GROUP_MEMBER
    ):
        return
    raise TypeError(f"process_group must be a torch.distributed.ProcessGroup, got {group!r}")


def rule(rule: object) -> None:
    """A HebbianRule, TypeError otherwise."""
    if isinstance(rule, Tensor):  # its elements would hide that rule and weight are in each other's place
        raise TypeError(f"rule must be a HebbianRule, got a tensor of shape {tuple(rule.shape)}")
    if not isinstance(rule, HebbianRule):
        raise TypeError(f"rule must be a HebbianRule, got {rule!r}")


def finite(name: str, value: float) -> None:
    """A number, TypeError otherwise, and neither inf nor NaN nor beyond all doubles, ValueError otherwise."""
    try:
        # not math.isfinite, which no compiler takes of a number that changes, nor the largest double, which
        # NumPy makes inf, with a warning, beside numbers of its narrower types
        is_finite = -math.inf < value < math.inf
        is_number = not (isinstance(value, np.ndarray) and value.ndim)
    except (TypeError, ValueError, RuntimeError):  # of several elements NumPy and torch raise the latter two
        is_number = False
    if not is_number:
        raise TypeError(f"{name} must be a real number, got {value!r}")
    if not is_finite or (isinstance(value, int) and abs(value) > sys.float_info.max):
        raise ValueError(f"{name} must be finite, got {value!r}")


def label(name: str) -> str:
    """How messages and tables call the module of this qualified name; that of the model itself is empty."""
    return name or "(model)"


def counted(number: int, noun: str) -> str:
    """``1 layer``, ``2 layers``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
