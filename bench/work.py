"""What an operation has to move and to multiply at the least, from its shape; and the time that takes.

Notation: P positions, N units, D = channels per group x kernel volume, k winners, ``itemsize`` bytes of an
element of x, u and dL/du. Sums (A, G, H) and weights are float32. Every tensor is moved once: what a cache
would have to hold for that is not asked, so no implementation is below its floor when its inputs are cold.
A multiplication and an addition count as one operation each; what is not a product of matrices counts none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

_SUM = 4  # bytes of an entry of A, G, H and of a weight
_WINNER = 8  # bytes of a winner in a list: int32 unit, float32 activity


class Work(NamedTuple):
    """Bytes that must be moved and operations of matrix products."""

    bytes: float
    operations: float = 0.0

    def floor_seconds(self, ceilings: Mapping[str, float], dtype: str) -> float | None:
        return floor_seconds(ceilings, dtype, self.bytes, self.operations)


class Layer(NamedTuple):
    """The sizes of a layer's pass; ``inputs`` is the number of elements of x (P D without overlap)."""

    positions: int
    units: int
    columns: int
    inputs: int
    itemsize: int = 4

    @property
    def responses(self) -> int:
        return self.positions * self.units

    @property
    def weights(self) -> int:
        return self.units * self.columns


def floor_seconds(ceilings: Mapping[str, float], dtype: str, moved: float, operations: float) -> float | None:
    """max(bytes / copy bandwidth, operations / matrix rate); None where a ceiling is unknown."""
    if "copy" not in ceilings or (operations and dtype not in ceilings):
        return None
    return max(moved / ceilings["copy"], operations / ceilings[dtype] if operations else 0.0)


def compete(shape: tuple[int, ...], itemsize: int) -> Work:
    """y = c(u): u is read and y written."""
    return Work(2 * math.prod(shape) * itemsize)


def winners(positions: int, units: int, k: int, itemsize: int) -> Work:
    """Lists of winners: u is read, k units and activities a position are written."""
    return Work(positions * (units * itemsize + k * _WINNER))


def correlate(layer: Layer) -> Work:
    """A = sum_p y_p x_p^T from x and y (or u): 2 P N D operations."""
    moved = (layer.inputs + layer.responses) * layer.itemsize + layer.weights * _SUM
    return Work(moved, 2.0 * layer.positions * layer.weights)


def sparse(layer: Layer, k: int) -> Work:
    """A of k winners a position from x and u: 2 P k D operations."""
    return Work(correlate(layer).bytes, 2.0 * layer.positions * k * layer.columns)


def pair(layer: Layer) -> Work:
    """A and G from one read of x, u and dL/du: 4 P N D operations."""
    moved = (layer.inputs + 2 * layer.responses) * layer.itemsize + 2 * layer.weights * _SUM
    return Work(moved, 4.0 * layer.positions * layer.weights)


def delta(layer: Layer, k: int = 0) -> Work:
    """H from x, u and W; with k winners a position only those are multiplied (0: all units)."""
    products = sparse(layer, k) if k else correlate(layer)
    return Work(products.bytes + layer.weights * _SUM, products.operations)


def gate(weights: int) -> Work:
    """The gated gradient: A, W and G are read, G is written."""
    return Work(4 * weights * _SUM)


def step(weights: int) -> Work:
    """The gated step: A, W and G are read, W is written."""
    return Work(4 * weights * _SUM)


def learn(weights: int) -> Work:
    """W <- W + lr H: A and W are read, W is written."""
    return Work(3 * weights * _SUM)
