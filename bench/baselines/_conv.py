"""What the baselines share of a 2-d convolution: its arguments, its patches, the library's backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from ghl_kernels._geometry import make_geometry


class ConvArguments(TypedDict, total=False):
    """Keyword arguments of a 2-d convolution: an int or one per dimension; 1, 0 and 1 by default."""

    stride: int | Sequence[int]
    padding: int | Sequence[int]
    dilation: int | Sequence[int]


def patches(
    x: Tensor,
    weight: Tensor,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
) -> Tensor:
    """im2col: the patches (B, D, OH * OW) of x (B, C, H, W) under weight (N, C, kh, kw), D = C kh kw."""
    return F.unfold(x, weight.shape[2:], dilation, padding, stride)


def patch_rows(x: Tensor, weight: Tensor, **conv: int | Sequence[int]) -> Tensor:
    """The patches as rows (P, D), P = B OH OW positions in the order (b, oh, ow): a second copy."""
    columns = patches(x, weight, **conv)
    return columns.transpose(1, 2).reshape(-1, columns.shape[1])


def unit_rows(u: Tensor) -> Tensor:
    """(N, P) from u (B, N, OH, OW), positions in the order (b, oh, ow): a copy unless B is 1."""
    return u.transpose(0, 1).reshape(u.shape[1], -1)


def convolution_backward(
    grad_u: Tensor,
    x: Tensor,
    weight: Tensor,
    mask: Sequence[bool],
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """aten's convolution_backward: gradients of (input, weight, bias) where ``mask`` asks for them.

    Raises:
        ValueError: stride, padding, dilation or groups out of range.
    """
    _, geometry = make_geometry(weight.shape[2:], stride, padding, dilation, groups)
    return torch.ops.aten.convolution_backward(
        grad_u,
        x,
        weight,
        None,
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        False,
        [0, 0],
        groups,
        mask,
    )
