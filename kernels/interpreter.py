"""Triton's interpreter, with the arithmetic of a GPU.

The interpreter (3.6, 3.7) cuts fp32 off to bf16 where hardware rounds to the nearest even, which
doubles the error of every bf16 result and would hide as much of ours; and it multiplies bf16
matrices as the integers that hold their bits.
"""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_convert = interpreter._convert_float
_multiply = interpreter.InterpreterBuilder.create_dot


def _convert_float(
    data: np.ndarray, source: tl.dtype, target: tl.dtype, rounding: object
) -> np.ndarray:
    if source != tl.float32 or target != tl.bfloat16:
        return _convert(data, source, target, rounding)
    bits = np.ascontiguousarray(data).view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    # A NaN's payload must not be carried into infinity.
    rounded = np.where(np.isnan(data), bits >> 16 | 0x40, rounded)
    return rounded.astype(np.uint16).reshape(data.shape)


def _create_dot(self: object, a: object, b: object, d: object, *how: object) -> object:
    if a.dtype == tl.bfloat16 and b.dtype == tl.bfloat16:
        a, b = (
            interpreter.TensorHandle(interpreter._convert_float(x.data, x.dtype, tl.float32, None)
                                     .view(np.float32), tl.float32)
            for x in (a, b)
        )  # fmt: skip
    return _multiply(self, a, b, d, *how)


def correct() -> None:
    """Make fp32 to bf16 round to the nearest even, and products of bf16 matrices what they are."""
    interpreter._convert_float = _convert_float
    interpreter.InterpreterBuilder.create_dot = _create_dot
