"""Triton's attention: which kernels run with which blocks, and their launch."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from . import triton_attention_flash as flash
from . import triton_attention_tile as tile
from . import tuned
from .fused_attention import Fused, attention_with, empty_like_tokens
from .launch import launch, power_of_two

# Stands in for a scale that fp32 takes for 0, so that a masked score times it is still -inf.
_TINY = 2.0**-126
# Tokens of the longest block, whose offsets are 32 bits wide.
_LONGEST_BLOCK = 256


def why_not(op: str, *arguments: Any) -> list[str]:
    """List what the kernels cannot do for these arguments, wherever they lie."""
    tensors = arguments[:1] if op == "attention_qkv" else arguments
    reasons = []
    if tensors[0].dtype == torch.float64:
        reasons.append("the kernels compute in fp32, these tensors are fp64")
    # Others are copied first, which leaves at most all heads between two tokens.
    stride = max(x.stride(-2) if x.stride(-1) == 1 else 0 for x in tensors)
    if stride * _LONGEST_BLOCK >= 2**31:
        reasons.append(f"offsets in a block are 32 bits wide, tokens are {stride} elements apart")
    return reasons


@dataclass(frozen=True)
class Blocks:
    """How one launch is cut up.

    heads: how many (sample, head) pairs one tile holds; 0: the kernel walks over a long sequence.
    chunk: columns that `backward_tile` takes at a time.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int = 1
    heads: int = 0
    chunk: int = 0


@functools.lru_cache(maxsize=4096)
def forward_blocks(
    dtype: torch.dtype, queries: int, keys: int, head_dim: int, device: torch.device
) -> Blocks:
    """Choose kernel and blocks.

    Sequences of at most 32 tokens share a tile of 64. Longer ones are taken whole where the keys
    and values of a head lie on chip beside their scores, else the kernel walks over them. In half
    precision nothing spills on sm_80, sm_90 and sm_100, and all fits into the 99 KiB of shared
    memory of a GeForce card; what is faster where there is more is in `tuned/`.
    """
    half, d = dtype.itemsize == 2, _block_d(head_dim)
    heads, tile_m, tile_n = _tile(queries, keys)
    if max(queries, keys) <= 64:
        usual = Blocks(tile_m, tile_n, 4 if half else 8, heads=heads)
    elif half and tile_n <= 128 and tile_n * d <= 2**14:
        usual = Blocks(min(64, tile_m), tile_n, 4, heads=1)
    elif half:
        usual = Blocks(64, 32, 8, 2) if d > 128 else Blocks(64, 64, 4, 3)
    else:
        usual = Blocks(32 if d > 64 else 64, 32, 8)
    return _configured("attention_forward", dtype, queries, keys, head_dim, device, usual)


@functools.lru_cache(maxsize=4096)
def backward_blocks(
    dtype: torch.dtype, queries: int, keys: int, head_dim: int, device: torch.device
) -> tuple[Blocks, Blocks]:
    """Choose kernels and blocks for dq, and for dk and dv; see `forward_blocks`.

    The two are the same where one tile holds a head and one kernel computes all three.
    """
    half, d = dtype.itemsize == 2, _block_d(head_dim)
    heads, tile_m, tile_n = _tile(queries, keys)
    case = (dtype, queries, keys, head_dim, device)
    if max(queries, keys) <= 64:
        chunk = d if half and d <= 64 else min(d, 32)
        usual = Blocks(tile_m, tile_n, 4 if half else 8, heads=heads, chunk=chunk)
        blocks = _configured("attention_backward", *case, usual)
        return blocks, blocks
    if not half:
        of_queries, of_keys = Blocks(32, 16, 8), Blocks(16, 32, 8)
    elif d > 128:
        of_queries, of_keys = Blocks(64, 32, 8), Blocks(32, 32, 8)
    elif d > 16:
        stages = 1 if d > 64 else 2
        of_queries, of_keys = Blocks(64, 64, 4, stages), Blocks(32, 64, 4, stages)
    else:
        # Every thread moves at least 16 bytes of each operand.
        of_queries = of_keys = Blocks(64, 64, 4)
    return (
        _configured("attention_backward_queries", *case, of_queries),
        _configured("attention_backward_keys", *case, of_keys),
    )


def _tile(queries: int, keys: int) -> tuple[int, int, int]:
    """How many heads share a tile, and its rows and columns: at least the 16 of a product."""
    m, n = power_of_two(queries), power_of_two(keys)
    heads = max(1, 64 // max(m, n))
    return heads, max(16, m * heads), max(16, n * heads)


def _configured(
    kernel: str,
    dtype: torch.dtype,
    queries: int,
    keys: int,
    head_dim: int,
    device: torch.device,
    usual: Blocks,
) -> Blocks:
    """Replace what was measured to be better; the size of a tile is not a matter of speed."""
    key = tuned.attention_class(dtype, max(queries, keys), head_dim, kernel != "attention_forward")
    asked = tuned.configuration(kernel, device, key)
    if asked is None:
        return usual
    free = ("num_warps", "num_stages") if usual.heads else [f.name for f in fields(Blocks)]
    return replace(usual, **{name: asked[name] for name in free if name in asked})


def _block_d(head_dim: int) -> int:
    # A product needs at least 16 columns.
    return max(16, power_of_two(head_dim))


Strides = tuple[int, ...]


@dataclass(frozen=True)
class _Plan:
    """A launch but for its tensors, which is all that two calls of one shape differ in."""

    kernel: Any
    grid: tuple[int]
    numbers: dict[str, int | float]
    constants: dict[str, Any]
    blocks: Blocks

    def run(self, **tensors: Tensor) -> None:
        launch(
            self.kernel,
            self.grid,
            {**tensors, **self.numbers},
            self.constants,
            num_warps=self.blocks.num_warps,
            num_stages=self.blocks.num_stages,
        )


def _vec(strides: Sequence[Strides]) -> int:
    """Elements, at most 8, that every row of every tensor is a multiple of."""
    return math.gcd(8, *(stride for x in strides for stride in x[:3]))


def _strides(vec: int, **tensors: Strides) -> dict[str, int]:
    """Strides of sample, head and token in units of `vec` elements, as the kernels take them."""
    return {
        f"{name}_{axis}": stride // vec
        for name, strides in tensors.items()
        for axis, stride in zip("bhs", strides, strict=False)
    }


def _constants(blocks: Blocks, dtype: torch.dtype, d: int, vec: int) -> dict[str, Any]:
    return {
        "D": d,
        "VEC": vec,
        "BLOCK_M": blocks.block_m,
        "BLOCK_N": blocks.block_n,
        "BLOCK_D": _block_d(d),
        # Three products of tf32 parts: fp32 on tensor cores. Triton's default would be one.
        "PRECISION": "tf32x3" if dtype == torch.float32 else "ieee",
    }


def _scales(scale: float) -> dict[str, float]:
    log2 = scale * math.log2(math.e)
    return {"scale": scale, "scale_log2": log2 if abs(log2) >= _TINY else _TINY}


@functools.lru_cache(maxsize=4096)
def _forward_plan(
    blocks: Blocks, dtype: torch.dtype, shape: torch.Size, keys: int, scale: float,
    q: Strides, k: Strides, v: Strides, o: Strides,
) -> _Plan:  # fmt: skip
    b, h, s, d = shape
    vec = _vec((q, k, v, o))
    numbers = {
        **_strides(vec, q=q, k=k, v=v, o=o), "num_heads": h, "queries": s, "keys": keys,
        # The maximum is taken before the scale is applied.
        "scale_log2": abs(_scales(scale)["scale_log2"]),
    }  # fmt: skip
    constants = _constants(blocks, dtype, d, vec) | {
        "NEGATIVE": scale < 0,
        "MASKED": blocks.heads > 1 or keys % blocks.block_n != 0,
    }
    if not blocks.heads:
        programs = b * h * -(-s // blocks.block_m)
        return _Plan(flash.forward_flash, (programs,), numbers, constants, blocks)
    programs = -(-b * h // blocks.heads) if blocks.heads > 1 else b * h * -(-s // blocks.block_m)
    return _Plan(
        tile.forward_tile,
        (programs,),
        numbers | {"sequences": b * h},
        constants | {"HEADS": blocks.heads},
        blocks,
    )


@functools.lru_cache(maxsize=4096)
def _backward_plans(
    of_queries: Blocks, of_keys: Blocks, dtype: torch.dtype, shape: torch.Size, keys: int,
    scale: float, q: Strides, k: Strides, v: Strides, o: Strides, do: Strides, dq: Strides,
    dk: Strides,
) -> tuple[_Plan, ...]:  # fmt: skip
    """One kernel for all gradients, or one for dq and delta, then one for dk and dv."""
    b, h, s, d = shape
    vec = _vec((q, k, v, o, do, dq, dk))
    numbers = {
        **_strides(vec, q=q, k=k, v=v, do=do),
        "num_heads": h, "queries": s, "keys": keys, **_scales(scale),
    }  # fmt: skip
    constants = _constants(of_queries, dtype, d, vec)
    if heads := of_queries.heads:
        masked = heads > 1 or keys != of_queries.block_n
        return (
            _Plan(
                tile.backward_tile,
                (-(-b * h // heads),),
                numbers | _strides(vec, dq=dq, dk=dk) | {"sequences": b * h},
                constants | {"MASKED": masked, "HEADS": heads, "CHUNK": of_queries.chunk},
                of_queries,
            ),
        )
    return (
        _Plan(
            flash.backward_queries,
            (b * h * -(-s // of_queries.block_m),),
            numbers | _strides(vec, o=o, dq=dq),
            constants | {"MASKED": keys % of_queries.block_n != 0},
            of_queries,
        ),
        _Plan(
            flash.backward_keys,
            (b * h * -(-keys // of_keys.block_n),),
            numbers | _strides(vec, dk=dk),
            _constants(of_keys, dtype, d, vec) | {"MASKED": s % of_keys.block_m != 0},
            of_keys,
        ),
    )


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Compute o and lse, see `triton_attention_tile`.

    q (B, H, S, D), k and v (B, H, S', D), stride 1 in D. o lies in memory like q: heads outside of
    tokens or inside. lse (B, H, S), fp32, is the log2 of the sum of a row's exponentials.
    """
    shape, keys = q.shape, k.shape[2]
    b, h, s, d = shape
    o = empty_like_tokens(b, h, s, d, q)
    lse = q.new_empty((b, h, s), dtype=torch.float32)
    if b * h > 0:
        blocks = forward_blocks(q.dtype, s, keys, d, q.device)
        _forward_plan(
            blocks, q.dtype, shape, keys, scale, q.stride(), k.stride(), v.stride(), o.stride()
        ).run(p_q=q, p_k=k, p_v=v, p_o=o, p_lse=lse)
    return o, lse


def backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    scale: float,
    gradients: Sequence[Tensor],
) -> None:
    """Write dq, dk and dv to `gradients`; dk and dv have the same strides.

    do like o with any strides but 1 in D.
    """
    shape, keys = q.shape, k.shape[2]
    b, h, s, d = shape
    if b * h == 0:
        return
    dq, dk, dv = gradients
    plans = _backward_plans(
        *backward_blocks(q.dtype, s, keys, d, q.device), q.dtype, shape, keys, scale,
        q.stride(), k.stride(), v.stride(), o.stride(), do.stride(), dq.stride(), dk.stride(),
    )  # fmt: skip
    inputs = {"p_q": q, "p_k": k, "p_v": v, "p_do": do, "p_lse": lse}
    if len(plans) == 1:
        plans[0].run(**inputs, p_dq=dq, p_dk=dk, p_dv=dv)
    else:
        delta = torch.empty_like(lse)
        plans[0].run(**inputs, p_o=o, p_delta=delta, p_dq=dq)
        plans[1].run(**inputs, p_delta=delta, p_dk=dk, p_dv=dv)


OPS = attention_with("triton", Fused(forward, backward, ()))
