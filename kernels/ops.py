"""The public ops: arguments checked once, brought into one shape, handed to the chosen backend.

Every backend's group_norm sees x as (N, C, H, W), contiguous or channels_last, and returns y in x's
layout, so each refuses the same arguments and none has to know of other shapes.
"""

import operator
from typing import Any, Literal, overload

import torch
from torch import Tensor

from .dispatch import choose
from .tracing import transforming

MAX_HEAD_DIM = 256

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@overload
def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    pre_bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    residual: Tensor | None = None,
    return_sum: Literal[False] = False,
    backend: str | None = None,
) -> Tensor: ...


@overload
def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    pre_bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    residual: Tensor | None = None,
    return_sum: Literal[True],
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    pre_bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    activation: str | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    residual: Tensor | None = None,
    return_sum: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """y = dropout(act(GN(x + pre_bias + residual) * (1 + scale) + shift)), GN of Wu and He 2018.

    Args:
        x: (N, C, *spatial) in fp32, bf16, fp16 or fp64; contiguous or channels_last, which y keeps;
            other strides are copied once to the nearer of the two.
        weight, bias: (C,), in fp32 or x's dtype, as are pre_bias, scale and shift.
        pre_bias: (C,) or (N, C).
        scale, shift: (N, C).
        activation: None or "silu".
        dropout_p: probability in [0, 1) of zeroing an element; the others grow by 1 / (1 - p).
        seed: 0-d int64 tensor on x's device; the mask is a pure function of it and of the element's
            row-major index, the same from every backend. None: torch's default generator decides.
        residual: like x, in x's dtype.
        return_sum: return (y, x + pre_bias + residual); without either it may share x's memory.
        backend: name of a backend; None leaves the choice to `use_backend`, the environment
            variable DDB_FAST_BACKEND, or the automatic order.

    Statistics are computed in fp32 (fp64 for fp64). y has x's dtype, under autocast too.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or a backend that cannot run this.
    """
    num_groups = _integer("num_groups", num_groups)
    _check_group_norm(x, num_groups, weight, bias, pre_bias, scale, shift, residual)
    eps = _number("eps", eps)
    if not eps >= 0:
        raise ValueError(f"eps must not be negative, got {eps}")
    if activation is not None and activation != "silu":
        raise ValueError(f'activation must be None or "silu", got {activation!r}')
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    if seed is not None:
        _check("seed", seed, (), (torch.int64,), x.device)

    shape = x.shape
    if x.dim() != 4:
        x = _as_image(x)
        residual = None if residual is None else _as_image(residual)
    if transforming():
        # Of a batch of tensors no other layout can be asked.
        x = x.contiguous()
    elif not (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)):
        channels_last = x.stride(1) == 1 and shape[1] > 1
        x = x.contiguous(
            memory_format=torch.channels_last if channels_last else torch.contiguous_format
        )
    # A reentrant checkpoint runs without gradients first: the same backend has to draw its mask.
    gradients = True if dropout_p > 0 else None
    result = choose("group_norm", backend, x, num_groups, gradients=gradients)(
        x,
        num_groups,
        weight,
        bias,
        eps,
        pre_bias=pre_bias,
        scale=scale,
        shift=shift,
        activation=activation,
        dropout_p=dropout_p,
        seed=seed,
        residual=residual,
        return_sum=return_sum,
    )
    if len(shape) == 4:
        return result
    if return_sum:
        y, total = result
        return y.reshape(shape), total.reshape(shape)
    return result.reshape(shape)


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, backend: str | None = None
) -> Tensor:
    """o = softmax(q k^T * scale) v without a mask; Vaswani et al. 2017, equation 1.

    Args:
        q: (B, H, S, D) in fp32, bf16, fp16 or fp64, any strides, S >= 1, D up to 256.
        k, v: (B, H, S', D), like q but for their length S' >= 1.
        scale: None means 1 / sqrt(D).
        backend: as for `group_norm`.

    Returns o (B, H, S, D) in q's dtype, under autocast too.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or a backend that cannot run this.
    """
    if q.dim() != 4:
        raise ValueError(f"q must be (B, H, S, D), got shape {tuple(q.shape)}")
    b, h, s, d = q.shape
    _check_attention(q, s, d)
    if k.dim() != 4 or k.shape[2] < 1:
        raise ValueError(f"k must be (B, H, S >= 1, D), got shape {tuple(k.shape)}")
    expected = (b, h, k.shape[2], d)
    _check("k", k, expected, (q.dtype,), q.device)
    _check("v", v, expected, (q.dtype,), q.device)
    scale = None if scale is None else _number("scale", scale)
    return choose("attention", backend, q, k, v)(q, k, v, scale=scale)


def attention_qkv(
    qkv: Tensor, num_heads: int, *, scale: float | None = None, backend: str | None = None
) -> Tensor:
    """`attention` on the output of one projection to q, k and v, without copying them apart.

    Args:
        qkv: (B, S, 3 * H * D), packed as [3, H, D] in the last axis.
        num_heads: H.
        scale: None means 1 / sqrt(D).
        backend: as for `group_norm`.

    Returns o (B, S, H * D), contiguous, for the output projection.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or a backend that cannot run this.
    """
    num_heads = _integer("num_heads", num_heads)
    if qkv.dim() != 3 or num_heads < 1 or qkv.shape[2] % (3 * num_heads):
        raise ValueError(
            f"qkv must be (B, S, 3 * num_heads * D) with num_heads >= 1, got shape "
            f"{tuple(qkv.shape)} and num_heads {num_heads}"
        )
    _check_attention(qkv, qkv.shape[1], qkv.shape[2] // (3 * num_heads))
    scale = None if scale is None else _number("scale", scale)
    return choose("attention_qkv", backend, qkv, num_heads)(qkv, num_heads, scale=scale)


def _check_group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    pre_bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
) -> None:
    if x.dim() < 2:
        raise ValueError(f"x must be (N, C, *spatial), got shape {tuple(x.shape)}")
    if x.dtype not in _DTYPES:
        raise ValueError(f"x must be fp32, bf16, fp16 or fp64, got {x.dtype}")
    n, c = x.shape[0], x.shape[1]
    if not 1 <= num_groups <= c or c % num_groups:
        raise ValueError(f"num_groups must divide the channels of x, got {num_groups} for {c}")
    if n > 0 and x.numel() == 0:
        raise ValueError(f"x must have at least one pixel, got shape {tuple(x.shape)}")
    device, dtypes = x.device, (x.dtype, torch.float32)
    if weight is not None:
        _check("weight", weight, (c,), dtypes, device)
    if bias is not None:
        _check("bias", bias, (c,), dtypes, device)
    if pre_bias is not None:
        _check("pre_bias", pre_bias, (c,) if pre_bias.dim() == 1 else (n, c), dtypes, device)
    if scale is not None:
        _check("scale", scale, (n, c), dtypes, device)
    if shift is not None:
        _check("shift", shift, (n, c), dtypes, device)
    if residual is not None:
        _check("residual", residual, x.shape, (x.dtype,), device)


def _check_attention(x: Tensor, length: int, head_dim: int) -> None:
    if x.dtype not in _DTYPES:
        raise ValueError(f"attention takes fp32, bf16, fp16 or fp64, got {x.dtype}")
    if length < 1:
        raise ValueError(f"attention needs at least one token, got shape {tuple(x.shape)}")
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"the head dimension must be in 1..{MAX_HEAD_DIM}, got {head_dim}")


def _check(
    name: str,
    tensor: Tensor,
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}")
    if tensor.dtype not in dtypes:
        names = " or ".join(str(dtype) for dtype in dict.fromkeys(dtypes))
        raise ValueError(f"{name} must be {names}, got {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device}, got {tensor.device}")


def _integer(name: str, value: Any) -> int:
    """Of whatever type, as numpy's; kernels and compilers take Python's own."""
    if type(value) is int:
        return value
    try:
        return int(operator.index(value))
    except TypeError:
        raise ValueError(f"{name} must be an integer, got {value!r}") from None


def _number(name: str, value: Any) -> float:
    if type(value) is float:
        return value
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a number, got {value!r}") from None


def _as_image(x: Tensor) -> Tensor:
    """View (N, C, *spatial) as (N, C, 1, W): channels_last stays channels_last."""
    if x.dim() == 2:
        return x[:, :, None, None]
    return x.flatten(2).unsqueeze(2)
