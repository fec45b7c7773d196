"""Small kernels, each of which breaks one rule of the machine code gate, and one that breaks none.

Printed as JSON by `python planted_kernels.py BENCHMARKS_FOLDER`, without the interpreter: for each
kernel what the gate says about it on sm_90.
"""

import json
import sys

import torch
import triton
import triton.language as tl
from torch import Tensor

from ddb_fast.kernels.launch import Launch
from ddb_fast.kernels.triton_math import tanh


@triton.jit
def scale(p_x, p_y, n, BLOCK: tl.constexpr):
    b_i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(p_y + b_i, tl.load(p_x + b_i, mask=b_i < n) * 2, mask=b_i < n)


@triton.jit
def spread(p_x, p_y, step, BLOCK: tl.constexpr):
    b_i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(p_y + b_i * step, tl.load(p_x + b_i))


@triton.jit
def product(p_x, p_y, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    b_i = tl.arange(0, BLOCK)
    b_tile = b_i[:, None] * BLOCK + b_i[None, :]
    b_x = tl.load(p_x + b_tile)
    b_y = tl.dot(b_x, b_x) if PRECISION == "" else tl.dot(b_x, b_x, input_precision=PRECISION)
    tl.store(p_y + b_tile, b_y.to(p_y.dtype.element_ty))


@triton.jit
def hoard(p_x, p_y, BLOCK: tl.constexpr):
    """All rows are alive across the sum, and one warp has not enough registers for them."""
    b_i = tl.arange(0, BLOCK)
    b_0 = tl.load(p_x + b_i).to(tl.float32)
    b_1 = tl.load(p_x + BLOCK + b_i).to(tl.float32)
    b_2 = tl.load(p_x + 2 * BLOCK + b_i).to(tl.float32)
    b_3 = tl.load(p_x + 3 * BLOCK + b_i).to(tl.float32)
    total = tl.sum(b_0 + b_1 + b_2 + b_3, 0)
    tl.store(p_y + b_i, (b_0 * total).to(p_y.dtype.element_ty))
    tl.store(p_y + BLOCK + b_i, (b_1 * total).to(p_y.dtype.element_ty))
    tl.store(p_y + 2 * BLOCK + b_i, (b_2 * total).to(p_y.dtype.element_ty))
    tl.store(p_y + 3 * BLOCK + b_i, (b_3 * total).to(p_y.dtype.element_ty))


@triton.jit
def broken(p_x, p_y, BLOCK: tl.constexpr):
    tl.store(p_y + tl.arange(0, BLOCK), tl.load(p_x + tl.arange(0, 2 * BLOCK)))


@triton.jit
def coarse(p_x, p_y, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    y = tanh(tl.load(p_x + offsets), True)
    tl.store(p_y + offsets, y)


def empty(*size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


def launches() -> dict[str, Launch]:
    x, odd, single = empty(64, 64), empty(64, 63), empty(64, 64, dtype=torch.float32)
    long = empty(4, 4096)
    pair, fp32 = {"p_x": x, "p_y": x}, {"p_x": single, "p_y": single}
    dot = {"BLOCK": 64, "PRECISION": ""}
    return {
        "clean": Launch(scale, (1,), {**pair, "n": 4096}, {"BLOCK": 1024}, 4, 1),
        # A length that is no multiple of 8 hides how the mask is aligned.
        "narrow": Launch(scale, (1,), {**pair, "n": 4097}, {"BLOCK": 1024}, 4, 1),
        "narrow stores": Launch(spread, (1,), {**pair, "step": 16}, {"BLOCK": 1024}, 4, 1),
        "allowed narrow": Launch(
            scale, (1,), {"p_x": odd, "p_y": odd, "n": 4097}, {"BLOCK": 1024}, 4, 1
        ),
        "spills": Launch(hoard, (1,), {"p_x": long, "p_y": long}, {"BLOCK": 4096}, 1, 1),
        "fp32 default": Launch(product, (1,), fp32, dot, 4, 1),
        "fp32 ieee": Launch(product, (1,), fp32, {**dot, "PRECISION": "ieee"}, 4, 1),
        "fp32 tf32x3": Launch(product, (1,), fp32, {**dot, "PRECISION": "tf32x3"}, 4, 1),
        "fp32 tanh": Launch(coarse, (1,), fp32, {"BLOCK": 1024}, 4, 1),
        "HGMMA": Launch(product, (1,), pair, dot, 4, 1),
        "broken": Launch(broken, (1,), pair, {"BLOCK": 64}, 4, 1),
        # Warp group instructions need four warps.
        "no HGMMA": Launch(product, (1,), pair, dot, 2, 1),
    }


if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    import machine_code
    from variants import variant

    planted = {
        name: variant(launch, name, lambda x: x.element_size() == 2 and x.shape[-1] % 8 == 0)
        for name, launch in launches().items()
    }
    rows = machine_code.check(list(planted.values()), ["sm_90"], jobs=1)
    found = dict(zip(planted, rows, strict=True))
    # The product fits into an H100; on a smaller machine it would not.
    machine_code.SHARED_MEMORY["sm_90"] = 4096
    (found["shared memory"],) = machine_code.check([planted["HGMMA"]], ["sm_90"], jobs=1)
    print(json.dumps(found))
