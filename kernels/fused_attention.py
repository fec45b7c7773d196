"""Around an attention that computes both directions itself: autograd, and what torch.compile sees.

Eager calls go through a `torch.autograd.Function`; while torch.compile traces, through one
`torch.library.custom_op` per direction. Both take q, k and v apart or, as `qkv`, packed as
[3, H, D] in the last axis of one tensor, whose gradient the kernels then write in that form: q is
the packed tensor and k and v are absent, or all three are given and num_heads is 0.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference
from .tracing import batched


class Fused(NamedTuple):
    """The two directions of an attention.

    forward(q, k, v, scale) -> o, statistics: q (B, H, S, D), k and v (B, H, S', D), stride 1 in D.
        o is made by `empty_like_tokens`; statistics, fp32 (B, H, S, *per_row), are what
        backward needs.
    backward(do, q, k, v, o, statistics, scale, (dq, dk, dv)): writes the gradients; do is like o
        with any strides but 1 in D; dk and dv have the same strides.
    """

    forward: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    backward: Callable[..., None]
    per_row: tuple[int, ...]


def empty_like_tokens(b: int, h: int, s: int, d: int, like: Tensor) -> Tensor:
    """Make an empty (b, h, s, d), in memory (b, s, h, d) if `like` has tokens outside of heads."""
    if like.stride(2) > like.stride(1):
        return like.new_empty((b, s, h, d)).transpose(1, 2)
    return like.new_empty((b, h, s, d))


def _dense(x: Tensor) -> Tensor:
    # Without elements, every tensor calls itself contiguous.
    return x if x.stride(3) == 1 else x.clone(memory_format=torch.contiguous_format)


def _apart(q: Tensor, k: Tensor | None, v: Tensor | None, num_heads: int) -> tuple[Tensor, ...]:
    if k is None:
        return reference.unpack(q, num_heads)
    return q, k, v


def _unpacked_gradients(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """Make dq, dk and dv; dk and dv lie alike however k and v do."""
    return tuple(empty_like_tokens(*x.shape, like) for x, like in ((q, q), (k, k), (v, k)))


def _forward(
    fused: Fused, q: Tensor, k: Tensor | None, v: Tensor | None, num_heads: int, scale: float
) -> tuple[Tensor, Tensor]:
    return fused.forward(*map(_dense, _apart(q, k, v, num_heads)), scale)


def _backward(
    fused: Fused,
    do: Tensor,
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    o: Tensor,
    statistics: Tensor,
    num_heads: int,
    scale: float,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    operands = tuple(map(_dense, _apart(q, k, v, num_heads)))
    if k is None:
        d_qkv = q.new_empty(q.shape)
        results, gradients = (d_qkv, None, None), reference.unpack(d_qkv, num_heads)
    else:
        results = gradients = _unpacked_gradients(*operands)
    fused.backward(_dense(do), *operands, o, statistics, scale, gradients)
    return results


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        fused: Fused,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        num_heads: int,
        scale: float,
    ) -> Tensor:
        o, statistics = _forward(fused, q, k, v, num_heads, scale)
        ctx.save_for_backward(q, k, v, o, statistics)
        ctx.fused, ctx.num_heads, ctx.scale = fused, num_heads, scale
        return o

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> Any:
        if torch.is_grad_enabled() or batched(do):
            grads = _differentiable(ctx, do)
        else:
            grads = _backward(ctx.fused, do, *ctx.saved_tensors, ctx.num_heads, ctx.scale)
        return (None, *grads, None, None)


def _differentiable(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients once more from the reference: as a graph, or for a batch of them."""
    q, k, v, _, _ = ctx.saved_tensors

    def o(q: Tensor, k: Tensor | None, v: Tensor | None) -> Tensor:
        return reference.attention(*_apart(q, k, v, ctx.num_heads), scale=ctx.scale)

    return reference.gradients(o, (q, k, v), ctx.needs_input_grad[1:4], do)


def attention_with(name: str, fused: Fused) -> Mapping[str, Callable[..., Tensor]]:
    """Make a backend's ops of a `Fused`; registers `ddb_fast::attention_<name>`."""
    traced = _register(name, fused)

    def run(q: Tensor, k: Tensor | None, v: Tensor | None, num_heads: int, scale: float) -> Tensor:
        if torch.compiler.is_compiling():
            return traced(q, k, v, num_heads, scale)[0]
        if torch.is_grad_enabled():
            return _Attention.apply(fused, q, k, v, num_heads, scale)
        return _forward(fused, q, k, v, num_heads, scale)[0]

    def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None) -> Tensor:
        """softmax(q k^T * scale) v, see `ops.attention`."""
        return run(q, k, v, 0, q.shape[3] ** -0.5 if scale is None else scale)

    def attention_qkv(qkv: Tensor, num_heads: int, *, scale: float | None) -> Tensor:
        """Attention on a packed (B, S, 3 * H * D) projection; returns (B, S, H * D)."""
        if scale is None:
            scale = (qkv.shape[2] // (3 * num_heads)) ** -0.5
        return reference.pack(run(qkv, None, None, num_heads, scale))

    return {"attention": attention, "attention_qkv": attention_qkv}


def _register(name: str, fused: Fused) -> Callable[..., tuple[Tensor, Tensor]]:
    def forward(
        q: Tensor, k: Tensor | None, v: Tensor | None, num_heads: int, scale: float
    ) -> tuple[Tensor, Tensor]:
        return _forward(fused, q, k, v, num_heads, scale)

    def backward(
        do: Tensor,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        o: Tensor,
        statistics: Tensor,
        num_heads: int,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        grads = _backward(fused, do, q, k, v, o, statistics, num_heads, scale)
        return tuple(q.new_empty(0) if grad is None else grad for grad in grads)

    forward_op = torch.library.custom_op(f"ddb_fast::attention_{name}", forward, mutates_args=())
    backward_op = torch.library.custom_op(
        f"ddb_fast::attention_{name}_backward", backward, mutates_args=()
    )

    @forward_op.register_fake
    def _(q, k, v, num_heads, scale):
        q = _dense(_apart(q, k, v, num_heads)[0])
        statistics = q.new_empty((*q.shape[:3], *fused.per_row), dtype=torch.float32)
        return empty_like_tokens(*q.shape, q), statistics

    @backward_op.register_fake
    def _(do, q, k, v, o, statistics, num_heads, scale):
        if k is None:
            return q.new_empty(q.shape), q.new_empty(0), q.new_empty(0)
        return _unpacked_gradients(*map(_dense, (q, k, v)))

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Sequence[Tensor]) -> None:
        *tensors, ctx.num_heads, ctx.scale = inputs
        ctx.save_for_backward(*tensors, *output)

    def run_backward(ctx: Any, do: Tensor, _: Tensor | None) -> Any:
        grads = backward_op(do, *ctx.saved_tensors, ctx.num_heads, ctx.scale)
        if ctx.num_heads:
            grads = (grads[0], None, None)
        return (*grads, None, None)

    forward_op.register_autograd(run_backward, setup_context=setup_context)
    return forward_op
