"""Functions that a GPU has in one instruction and Triton has no name for.

Triton's own division and tanh cost five and more, which is what most of a group norm's instructions
would be for. The interpreter, which knows no machine code, and other makes of GPU compute the same
with operators.
"""

import os

import torch
import triton
import triton.language as tl

_PTX = tl.constexpr(os.environ.get("TRITON_INTERPRET") != "1" and torch.version.hip is None)
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def reciprocal(b_x):
    """1 / x in fp32 to 1 unit in the last place; 0 for what is above 2^126."""
    if _PTX:
        b_y = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [b_x], tl.float32, is_pure=True, pack=1
        )
    else:
        b_y = 1 / b_x
    return b_y


@triton.jit
def sigmoid(b_x):
    """1 / (1 + exp(-x)) in fp32, to 1e-6 of itself near 0 and 1e-5 at -80, as exp2(x) allows."""
    return reciprocal(1 + tl.exp2(b_x * -_LOG2_E))


@triton.jit
def tanh(b_x, COARSE: tl.constexpr):
    """tanh(x) in fp32: to 2e-7, or coarse, to 2^-11 of itself, in one instruction."""
    if COARSE and _PTX:
        b_y = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [b_x], tl.float32, is_pure=True, pack=1
        )
    else:
        b_y = 1 - 2 * reciprocal(1 + tl.exp2(b_x * (2 * _LOG2_E)))
    return b_y
