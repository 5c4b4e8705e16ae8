"""y = c(u) from u and the state of the competition, the device function that every kernel shares."""

from __future__ import annotations

import ctypes
from typing import Any

import triton
import triton.language as tl

from ghl_kernels.rule import Competition

LOG2E = tl.constexpr(1.4426950408889634)


def constants(competition: Competition) -> dict[str, Any]:
    """The arguments of a kernel that calls :func:`activities`, by name."""
    return {
        # of the float32 number, as CUDA's kernels have it: they may have made the state
        "scale": 1.0 / ctypes.c_float(competition.temperature).value,
        "ACTIVITY": competition.activity,
        "SELECTS": competition.winners > 0,
        "ANTI": competition.anti,
    }


@triton.jit
def activity_of(
    u,
    unit,
    wins,
    lost,
    logsumexp,
    first,
    scale,
    ACTIVITY: tl.constexpr,
    SELECTS: tl.constexpr,
    ANTI: tl.constexpr,
):
    """y of a tile of u (float32); ``lost`` is that of units that do not win."""
    if ACTIVITY == "softmax":
        # not u * (scale * log2(e)), which overflows where u / temperature does not
        y = tl.exp2((u * scale - logsumexp) * LOG2E)
    elif ACTIVITY == "linear":
        y = u
    elif ACTIVITY == "relu":
        y = tl.maximum(u, 0.0)
    else:
        y = tl.zeros_like(u) + 1.0
    if SELECTS:
        y = tl.where(wins, y, lost)
    if ANTI:
        y = tl.where(unit == first, y, -y)
    return y


@triton.jit
def activities(
    u,
    unit,
    threshold,
    cut,
    logsumexp,
    first,
    scale,
    ACTIVITY: tl.constexpr,
    SELECTS: tl.constexpr,
    ANTI: tl.constexpr,
):
    """y of a tile of u (float32): unit and the four fields of the state broadcast against it.

    scale is 1 / temperature. Where u is masked off it must be -inf for softmax and 0 otherwise, with
    a threshold of +inf and a logsumexp of 0: y is then 0.
    """
    wins = (u > threshold) | ((u == threshold) & (unit <= cut)) if SELECTS else u == u
    y = activity_of(u, unit, wins, 0.0, logsumexp, first, scale, ACTIVITY, SELECTS, ANTI)
    if SELECTS or ACTIVITY != "softmax":
        # comparisons with NaN are false and would hide it
        y = tl.where(threshold == threshold, y, float("nan"))
    return y


@triton.jit
def _field_at(field, position, inside, outside):
    value = outside
    if field is not None:
        value = tl.load(field + position, mask=inside, other=outside)
    return value


@triton.jit
def load_state(threshold, cut, logsumexp, first, position, inside):
    """The four fields of the State at positions of any shape; where not ``inside``, such that y is 0."""
    return (
        _field_at(threshold, position, inside, float("inf")),
        _field_at(cut, position, inside, 0),
        _field_at(logsumexp, position, inside, 0.0),
        _field_at(first, position, inside, 0),
    )


@triton.jit
def position_offset(position, inner, batch_stride, position_stride):
    """Where a position of layout.Responses begins, in elements; 64-bit."""
    batch, within = position // inner, position % inner
    return batch.to(tl.int64) * batch_stride + within.to(tl.int64) * position_stride
