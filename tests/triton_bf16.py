"""bfloat16 for Triton's interpreter, which multiplies raw bits and truncates; for tests only.

Put right: products (tl.dot), arithmetic on two bfloat16 operands, literals, rounding to nearest even, and
widening, which loses subnormal numbers.
Reductions directly on bfloat16 stay wrong; kernels convert to float32 after every load anyway.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np


def install() -> None:
    """Patch the interpreter, once; the backend then accepts bfloat16 under it."""
    import triton.language as tl
    from triton.runtime import interpreter

    if getattr(interpreter, "rounds_bfloat16", False):
        return
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    dot, cast, convert, binary = (
        builder.create_dot,
        builder.cast_impl,
        builder.create_fp_to_fp,
        builder.binary_op,
    )

    def is_bf16(operand: Any) -> bool:
        return operand.dtype.scalar == tl.bfloat16

    def widened(operand: Any) -> Any:
        return handle(_to_float(operand.data), tl.float32) if is_bf16(operand) else operand

    def narrows(source: Any, target: Any) -> bool:
        return source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16

    def widens(source: Any, target: Any) -> bool:
        return is_bf16(source) and target.scalar == tl.float32

    def create_dot(self: Any, a: Any, b: Any, accumulator: Any, *precision: Any) -> Any:
        return dot(self, widened(a), widened(b), accumulator, *precision)

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        if narrows(source, target):
            return handle(_to_bits(source.data), tl.bfloat16)
        if widens(source, target):
            return widened(source)
        return cast(self, source, target)

    def create_fp_to_fp(self: Any, source: Any, target: Any, rounding: Any) -> Any:
        if narrows(source, target):
            return handle(_to_bits(source.data), tl.bfloat16)
        if widens(source, target):
            return widened(source)
        return convert(self, source, target, rounding)

    def binary_op(self: Any, left: Any, right: Any, operation: Callable[..., Any]) -> Any:
        bitwise = operation in (np.bitwise_and, np.bitwise_or, np.bitwise_xor)
        if bitwise or not (is_bf16(left) and is_bf16(right)):
            return binary(self, left, right, operation)
        result = operation(_to_float(left.data), _to_float(right.data))
        if result.dtype == bool:
            return handle(result, tl.int1)
        return handle(_to_bits(result), tl.bfloat16)

    builder.create_dot, builder.cast_impl = create_dot, cast_impl
    builder.create_fp_to_fp, builder.binary_op = create_fp_to_fp, binary_op
    builder.get_bf16 = lambda self, value: handle(_to_bits(np.array([value], np.float32)), tl.bfloat16)
    interpreter.rounds_bfloat16 = True


def _to_float(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _to_bits(values: np.ndarray) -> np.ndarray:
    """Rounded to nearest, ties to even; every NaN becomes the quiet one."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + ((bits >> 16) & 1) + np.uint32(0x7FFF)) >> 16
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded.astype(np.uint16))
