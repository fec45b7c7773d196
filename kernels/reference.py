"""The truth for every op, written to be read: plain torch in fp32, or in fp64 for fp64 inputs.

Every other backend is tested against these functions. They are differentiable by autograd and take
the arguments that `ops.py` has checked: x is (N, C, H, W), contiguous or channels_last.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .tracing import assume_constant_result

_WORD = 0xFFFFFFFF


def why_not(op: str, *arguments: Any) -> list[str]:
    """Nothing: the reference runs every op everywhere."""
    return []


def layout(x: Tensor) -> torch.memory_format:
    """Return the layout of an (N, C, H, W) tensor that is contiguous or channels_last."""
    return torch.contiguous_format if x.is_contiguous() else torch.channels_last


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    pre_bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    activation: str | None,
    dropout_p: float,
    seed: Tensor | None,
    residual: Tensor | None,
    return_sum: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """y = dropout(act(GN(x + pre_bias + residual) * (1 + scale) + shift)), see `ops.group_norm`.

    Group Normalization, Wu and He 2018, equations 1 to 4: mean and biased variance over the
    C / num_groups channels of a group and all pixels of a sample.
    """
    n, c = x.shape[:2]
    dtype, memory_format, exact = x.dtype, layout(x), computed_in(x.dtype)
    x = x.to(exact)
    if pre_bias is not None:
        x = x + pre_bias.to(exact)[..., None, None]
    if residual is not None:
        x = x + residual.to(exact)
    total = x

    groups = x.reshape(n, num_groups, c // num_groups, *x.shape[2:])
    centred = groups - groups.mean((2, 3, 4), keepdim=True)
    rstd = torch.rsqrt(centred.square().mean((2, 3, 4), keepdim=True) + eps)
    y = (centred * rstd).reshape(x.shape)

    if weight is not None:
        y = y * weight.to(exact)[:, None, None]
    if bias is not None:
        y = y + bias.to(exact)[:, None, None]
    if scale is not None:
        y = y * (1 + scale.to(exact)[:, :, None, None])
    if shift is not None:
        y = y + shift.to(exact)[:, :, None, None]
    if activation == "silu":
        y = y * torch.sigmoid(y)
    if dropout_p > 0:
        y = dropout(y, dropout_p, draw_seed(x.device) if seed is None else seed)

    y = y.to(dtype).contiguous(memory_format=memory_format)
    if not return_sum:
        return y
    return y, total.to(dtype).contiguous(memory_format=memory_format)


def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None) -> Tensor:
    """o = softmax(q k^T * scale) v; Vaswani et al. 2017, equation 1, where scale is 1 / sqrt(D)."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    exact = computed_in(q.dtype)
    with no_autocast(q.device):
        scores = q.to(exact) @ k.to(exact).mT * scale
        return (torch.softmax(scores, -1) @ v.to(exact)).to(q.dtype)


def attention_qkv(qkv: Tensor, num_heads: int, *, scale: float | None) -> Tensor:
    """Attention on a packed (B, S, 3 * H * D) projection; returns (B, S, H * D)."""
    return pack(attention(*unpack(qkv, num_heads), scale=scale))


def unpack(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """View (B, S, 3 * H * D) as q, k and v of (B, H, S, D)."""
    b, s, width = qkv.shape
    packed = qkv.view(b, s, 3, num_heads, width // (3 * num_heads))
    q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def pack(o: Tensor) -> Tensor:
    """Turn (B, H, S, D) into a contiguous (B, S, H * D); a view of what lies as (B, S, H, D)."""
    return o.transpose(1, 2).flatten(2).contiguous()


def dropout(y: Tensor, p: float, seed: Tensor) -> Tensor:
    """Zero the elements that `dropout_mask` does not keep and scale the others."""
    threshold, scale = dropout_constants(p)
    keep = random_halves(seed, y.shape) >= threshold
    # No product with 0: that of a gradient which overflowed would be NaN.
    return torch.where(keep.contiguous(memory_format=layout(y)), y * scale, 0.0)


def dropout_constants(p: float) -> tuple[int, float]:
    """Return (threshold, scale): a `random_halves` below threshold is dropped; p in units of 2^-16.

    The scale makes up for the p that is applied, so the mean is exact however p is rounded.
    """
    threshold = min(round(p * 65536), 65535)
    return threshold, 65536 / (65536 - threshold)


def draw_seed(device: torch.device) -> Tensor:
    """Draw a 0-d int64 seed from the device's default generator, without waiting for the device."""
    return torch.randint(2**63 - 1, (), dtype=torch.int64, device=device)


def random_halves(seed: Tensor, shape: torch.Size) -> Tensor:
    """Draw integers in 0..65535, a pure function of the seed and of an element's place in x.

    Args:
        seed: 0-d int64, the key of Philox; never read by the host.
        shape: (N, C, H, W).

    One call of Philox serves the eight channels c = 8b..8b+7 of a pixel, which lie side by side in
    channels_last: its counter is (n * H * W + pixel) * ceil(C / 8) + b, and channel 8b + j takes
    the lower (j < 4) or upper half of word j mod 4. The layout in memory plays no part.
    """
    n, c, h, w = shape
    blocks = (c + 7) // 8
    counter = torch.arange(n * h * w * blocks, device=seed.device)
    zero = torch.zeros_like(counter)
    words = torch.stack(
        philox((counter & _WORD, counter >> 32, zero, zero), (seed & _WORD, (seed >> 32) & _WORD)),
        -1,
    )
    halves = torch.cat([words & 0xFFFF, words >> 16], -1)
    return halves.view(n, h, w, blocks * 8)[..., :c].permute(0, 3, 1, 2)


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox-4x32-10: four random 32-bit words for each counter, held in int64 tensors.

    Salmon et al. 2011, Parallel random numbers: as easy as 1, 2, 3, section 3.3.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The 64-bit products wrap, which leaves both halves right once masked.
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = (b >> 32 & _WORD) ^ c1 ^ k0, b & _WORD
        c2, c3 = (a >> 32 & _WORD) ^ c3 ^ k1, a & _WORD
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def gradients(
    function: Callable[..., Tensor],
    operands: Sequence[Tensor | None],
    needs: Sequence[bool],
    dy: Tensor,
) -> tuple[Tensor | None, ...]:
    """Gradients of the needed operands, themselves differentiable; None for the others."""
    with torch.enable_grad():
        # Views: one tensor may be two operands, and each has a gradient of its own.
        own = [None if x is None else x.view_as(x) for x in operands]
        wanted = [x for x, need in zip(own, needs, strict=True) if need]
        found = iter(torch.autograd.grad(function(*own), wanted, dy, create_graph=True))
    return tuple(next(found) if need else None for need in needs)


def no_autocast(device: torch.device) -> AbstractContextManager:
    """Suspend autocast, which runs products in half precision and, on CUDA, group norms in fp32."""
    if _has_autocast(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


# Dynamo of torch 2.10 cannot trace the question.
@assume_constant_result
def _has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


def computed_in(dtype: torch.dtype) -> torch.dtype:
    """Name the dtype in which a tensor of `dtype` is computed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


OPS = {"group_norm": group_norm, "attention": attention, "attention_qkv": attention_qkv}
