"""What torch itself offers: its group norm and its scaled dot product attention.

Differentiable by autograd, takes the arguments that `ops.py` has checked: x is (N, C, H, W),
contiguous or channels_last. Known limit: torch's CPU kernel for channels_last takes the variance as
E[x^2] - E[x]^2, in fp32 10 % off where mean / std = 1000; its contiguous kernel is not.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference


def why_not(op: str, *arguments: Any) -> list[str]:
    """Nothing: torch runs every op on every device it knows."""
    return []


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

    Without a seed dropout is `F.dropout`, which is much faster than a mask addressed by a seed.
    """
    if pre_bias is not None:
        x = x + pre_bias.to(x.dtype)[..., None, None]
    if residual is not None:
        x = x + residual
    if scale is None and shift is None:
        y = _group_norm(x, num_groups, weight, bias, eps)
    else:
        y = _modulated_group_norm(x, num_groups, weight, bias, eps, scale, shift)
    if activation == "silu":
        y = F.silu(y, inplace=not (y.requires_grad or torch.jit.is_tracing()))
    if dropout_p > 0:
        y = F.dropout(y, dropout_p) if seed is None else reference.dropout(y, dropout_p, seed)
    return (y, x) if return_sum else y


def _modulated_group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor | None,
    shift: Tensor | None,
) -> Tensor:
    n, c, h, w = x.shape
    if n == 0 or not x.is_contiguous() or torch.compiler.is_compiling():
        y = _group_norm(x, num_groups, weight, bias, eps)
        shift = None if shift is None else shift.to(x.dtype)[..., None, None]
        if scale is None:
            return y + shift
        gain = (scale + 1).to(x.dtype)[..., None, None]
        return y * gain if shift is None else torch.addcmul(shift, y, gain)

    # All samples as the channels of one: then weight and bias may differ between samples and absorb
    # scale and shift, which saves a pass over x forward and three backward. (A compiler fuses the
    # passes, and would compile this anew for each batch size.)
    dtype = _parameter_dtype(x)
    gain = x.new_ones((n, c), dtype=dtype) if scale is None else scale.to(dtype) + 1
    offset = None if shift is None else shift.to(dtype)
    if bias is not None:
        bias = bias.to(dtype)
        offset = gain * bias if offset is None else torch.addcmul(offset, gain, bias)
    if weight is not None:
        gain = gain * weight.to(dtype)
    y = _group_norm(
        x.view(1, n * c, h, w),
        n * num_groups,
        gain.reshape(-1),
        None if offset is None else offset.reshape(-1),
        eps,
    )
    return y.view(x.shape)


def _group_norm(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    if x.shape[0] == 0:
        # torch 2.14 refuses images without pixels, even where there is no image.
        return reference.group_norm(
            x, num_groups, weight, bias, eps, pre_bias=None, scale=None, shift=None,
            activation=None, dropout_p=0.0, seed=None, residual=None, return_sum=False,
        )  # fmt: skip
    dtype = _parameter_dtype(x)
    if x.device.type != "cpu":
        # torch's CUDA kernel takes parameters of x's dtype only.
        dtype = x.dtype
    elif weight is None and (bias is not None or dtype != x.dtype):
        # Without an fp32 parameter the statistics would be kept for the backward in half precision.
        # And the backward of torch's channels_last takes no bias without a weight.
        weight = x.new_ones(x.shape[1], dtype=dtype)
    memory_format = reference.layout(x)
    channels_last = x.device.type == "cpu" and memory_format is torch.channels_last
    if channels_last and torch.is_grad_enabled() and not x.requires_grad:
        # The backward of torch's kernel for it ends the process where x alone needs no gradient.
        learns = any(p is not None and p.requires_grad for p in (weight, bias))
        x = x.contiguous() if learns else x
    # Not F.group_norm, which refuses one element per channel.
    with reference.no_autocast(x.device):
        y = torch.group_norm(x, num_groups, _cast(weight, dtype), _cast(bias, dtype), eps)
    # A copy only on CUDA, whose kernel reads and writes NCHW alone up to torch 2.13.
    return y.contiguous(memory_format=memory_format)


def _parameter_dtype(x: Tensor) -> torch.dtype:
    return torch.float32 if x.dtype in (torch.bfloat16, torch.float16) else x.dtype


def _cast(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    # Tensor.to costs a microsecond even where it has nothing to do.
    return x if x is None or x.dtype == dtype else x.to(dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None) -> Tensor:
    """`F.scaled_dot_product_attention`, in q's dtype under autocast too."""
    with reference.no_autocast(q.device):
        return F.scaled_dot_product_attention(q, k, v, scale=scale)


def attention_qkv(qkv: Tensor, num_heads: int, *, scale: float | None) -> Tensor:
    """Attention on a packed (B, S, 3 * H * D) projection; returns (B, S, H * D).

    q, k and v are views, and torch's flash kernels lay o out in memory as q: nothing is copied.
    """
    return reference.pack(attention(*reference.unpack(qkv, num_heads), scale=scale))


OPS = {"group_norm": group_norm, "attention": attention, "attention_qkv": attention_qkv}
