"""Fused group norms as differentiable, compilable ops: what the Triton and C++ kernels share.

A `Fused` is a pair of functions, forward and backward, over plain tensors. Eager calls go through a
`torch.autograd.Function`; while torch.compile traces, through one `torch.library.custom_op` per
direction, which costs more on the host but is opaque to the compiler.

The sum s = x + pre_bias + residual is normalised. Without a residual the backward keeps x and adds
pre_bias again; with one, s itself is written once and kept, so the backward reads one tensor.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference
from .tracing import batched


class Gradients(NamedTuple):
    """Of one backward call; ds like s in its dtype, the others in fp32 (fp64 for fp64).

    d_pre_bias, d_scale and d_shift are (N, C), d_weight and d_bias (C,). None where not asked for.
    """

    ds: Tensor
    d_pre_bias: Tensor | None
    d_weight: Tensor | None
    d_bias: Tensor | None
    d_scale: Tensor | None
    d_shift: Tensor | None


# forward(x, residual, pre_bias, weight, bias, scale, shift, seed, num_groups, eps, silu, dropout_p,
#         keep_sum) -> (y, s or None, mean, rstd)
#     x, residual: (N, C, H, W) of one layout, contiguous or channels_last; N may be 0.
#     pre_bias (C,) or (N, C), scale and shift (N, C): stride 1 in C, any stride in N.
#     mean, rstd: (N, num_groups) in fp32 (fp64 for fp64), of s before it is rounded to x's dtype.
# backward(dy, d_sum, s, pre_bias, weight, bias, scale, shift, seed, mean, rstd, num_groups, silu,
#          dropout_p, needs) -> Gradients
#     s is x with the pre_bias still to be added or, then pre_bias is None, the sum that was kept.
#     dy, d_sum (or None) have the layout and dtype of s; d_sum is added to ds.
#     needs: five flags, which of Gradients[1:] are wanted.
class Fused(NamedTuple):
    """The two directions of a fused group norm, see the comment above for their arguments."""

    forward: Callable[..., tuple[Tensor, Tensor | None, Tensor, Tensor]]
    backward: Callable[..., Gradients]


Options = tuple[int, float, bool, float, bool]
"""num_groups, eps, silu, dropout_p, keep_sum: the end of forward's arguments."""


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        fused: Fused,
        options: Options,
        return_sum: bool,
        x: Tensor,
        residual: Tensor | None,
        pre_bias: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        scale: Tensor | None,
        shift: Tensor | None,
        seed: Tensor | None,
    ) -> Any:
        y, total, mean, rstd = fused.forward(
            x, residual, pre_bias, weight, bias, scale, shift, seed, *options
        )
        s = x if total is None else total
        # A scale's gradient needs bias, bias's needs scale; pre_bias is needed only beside x.
        ctx.save_for_backward(s, pre_bias, weight, bias, scale, shift, seed, mean, rstd)
        ctx.fused, ctx.options, ctx.kept_sum = fused, options, total is not None
        ctx.set_materialize_grads(False)
        return (y, total) if return_sum else y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, d_sum: Tensor | None = None) -> Any:
        _, _, _, need_x, need_residual, *needs, _ = ctx.needs_input_grad
        if torch.is_grad_enabled() or batched(dy):
            dx, *others = _differentiable(ctx, dy, (need_x, *needs))
        else:
            s, pre_bias, weight, bias, scale, shift, seed, mean, rstd = ctx.saved_tensors
            num_groups, _, silu, dropout_p, _ = ctx.options
            dx, *others = _backward(
                ctx.fused.backward, dy, d_sum, s, pre_bias, ctx.kept_sum, weight, bias, scale,
                shift, seed, mean, rstd, num_groups, silu, dropout_p, tuple(needs),
            )  # fmt: skip
        return (
            None, None, None, dx if need_x else None, dx if need_residual else None, *others, None
        )  # fmt: skip


def _differentiable(ctx: Any, dy: Tensor, needs: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    """The gradients once more from the reference: as a graph, or for a batch of them."""
    if ctx.kept_sum:
        # What was kept is no operand: nothing leads from it to x and the residual.
        raise RuntimeError(
            "group_norm with a residual or return_sum has no second derivatives and no batched "
            'backward in this backend; backend="torch" has'
        )
    x, pre_bias, weight, bias, scale, shift, seed, _, _ = ctx.saved_tensors
    num_groups, eps, silu, dropout_p, _ = ctx.options

    def y(x: Tensor, *operands: Tensor | None) -> Tensor:
        pre_bias, weight, bias, scale, shift = operands
        return reference.group_norm(
            x, num_groups, weight, bias, eps, pre_bias=pre_bias, scale=scale, shift=shift,
            activation="silu" if silu else None, dropout_p=dropout_p, seed=seed, residual=None,
            return_sum=False,
        )  # fmt: skip

    return reference.gradients(y, (x, pre_bias, weight, bias, scale, shift), needs, dy)


def _backward(
    backward: Callable[..., Gradients],
    dy: Tensor | None,
    d_sum: Tensor | None,
    s: Tensor,
    pre_bias: Tensor | None,
    kept_sum: bool,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    seed: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    num_groups: int,
    silu: bool,
    dropout_p: float,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Call `backward` on gradients in s's layout and give each result its operand's dtype."""
    memory_format = reference.layout(s)
    dy = torch.zeros_like(s) if dy is None else dy.contiguous(memory_format=memory_format)
    if d_sum is not None:
        d_sum = d_sum.contiguous(memory_format=memory_format)
    added = None if kept_sum else pre_bias
    grads = backward(
        dy, d_sum, s, added, weight, bias, scale, shift, seed, mean, rstd,
        num_groups, silu, dropout_p, needs,
    )  # fmt: skip
    ds, d_pre_bias, d_weight, d_bias, d_scale, d_shift = grads
    if d_pre_bias is not None and pre_bias.dim() == 1:
        d_pre_bias = d_pre_bias.sum(0)
    return (
        ds,
        _cast(d_pre_bias, pre_bias),
        _cast(d_weight, weight),
        _cast(d_bias, bias),
        _cast(d_scale, scale),
        _cast(d_shift, shift),
    )


def _cast(gradient: Tensor | None, operand: Tensor | None) -> Tensor | None:
    # Tensor.to costs a microsecond even where it has nothing to do.
    if gradient is None or gradient.dtype == operand.dtype:
        return gradient
    return gradient.to(operand.dtype)


def group_norm_with(fused: Fused, traced: Callable[..., Any]) -> Callable[..., Any]:
    """Make a backend's `group_norm` (see `ops.group_norm`) of a `Fused` and its traced twin."""

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
        if residual is not None:
            residual = residual.contiguous(memory_format=reference.layout(x))
        if dropout_p == 0:
            seed = None
        elif seed is None:
            seed = reference.draw_seed(x.device)
        differentiable = torch.is_grad_enabled()
        tensors = (
            x, residual, _rows(pre_bias), _rows(weight), _rows(bias), _rows(scale), _rows(shift),
            seed,
        )  # fmt: skip
        keep_sum = return_sum or (residual is not None and differentiable)
        options = num_groups, eps, activation == "silu", dropout_p, keep_sum
        if torch.compiler.is_compiling():
            y, total, _, _ = traced(*tensors, *options)
        elif differentiable:
            # Each argument of `apply` and each gradient that it gets back costs the host time.
            return _GroupNorm.apply(fused, options, return_sum, *tensors)
        else:
            y, total, _, _ = fused.forward(*tensors, *options)
        return (y, total) if return_sum else y

    return group_norm


def _rows(x: Tensor | None) -> Tensor | None:
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def register(name: str, fused: Fused) -> Callable[..., Any]:
    """Register `ddb_fast::group_norm_<name>` and its backward; returns what a trace calls."""

    def forward(
        x: Tensor,
        residual: Tensor | None,
        pre_bias: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        scale: Tensor | None,
        shift: Tensor | None,
        seed: Tensor | None,
        num_groups: int,
        eps: float,
        silu: bool,
        dropout_p: float,
        keep_sum: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        y, total, mean, rstd = fused.forward(
            x, residual, pre_bias, weight, bias, scale, shift, seed,
            num_groups, eps, silu, dropout_p, keep_sum,
        )  # fmt: skip
        return y, x.new_empty(0) if total is None else total, mean, rstd

    def backward(
        dy: Tensor,
        d_sum: Tensor | None,
        s: Tensor,
        pre_bias: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        scale: Tensor | None,
        shift: Tensor | None,
        seed: Tensor | None,
        mean: Tensor,
        rstd: Tensor,
        num_groups: int,
        silu: bool,
        dropout_p: float,
        needs: list[bool],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        grads = fused.backward(
            dy, d_sum, s, pre_bias, weight, bias, scale, shift, seed, mean, rstd,
            num_groups, silu, dropout_p, tuple(needs),
        )  # fmt: skip
        # An op's results must not share memory, which d_weight and d_bias may.
        grads = grads._replace(d_bias=None if grads.d_bias is None else grads.d_bias.clone())
        return tuple(mean.new_empty(0) if grad is None else grad for grad in grads)

    forward_op = torch.library.custom_op(f"ddb_fast::group_norm_{name}", forward, mutates_args=())
    backward_op = torch.library.custom_op(
        f"ddb_fast::group_norm_{name}_backward", backward, mutates_args=()
    )

    @forward_op.register_fake
    def _(x, residual, pre_bias, weight, bias, scale, shift, seed, num_groups, eps, silu, dropout_p,
          keep_sum):  # fmt: skip
        stats = x.new_empty((x.shape[0], num_groups), dtype=reference.computed_in(x.dtype))
        total = torch.empty_like(x) if keep_sum else x.new_empty(0)
        return torch.empty_like(x), total, stats, torch.empty_like(stats)

    @backward_op.register_fake
    def _(dy, d_sum, s, pre_bias, weight, bias, scale, shift, seed, mean, rstd, num_groups, silu,
          dropout_p, needs):  # fmt: skip
        n, c = s.shape[:2]
        sizes = ((n, c), (c,), (c,), (n, c), (n, c))
        return (
            torch.empty_like(s),
            *(mean.new_empty(size if need else 0) for size, need in zip(sizes, needs, strict=True)),
        )

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        (x, _, pre_bias, weight, bias, scale, shift, seed,
         ctx.num_groups, _, ctx.silu, ctx.dropout_p, ctx.kept_sum) = inputs  # fmt: skip
        _, total, mean, rstd = output
        s = total if ctx.kept_sum else x
        ctx.save_for_backward(s, pre_bias, weight, bias, scale, shift, seed, mean, rstd)
        ctx.set_materialize_grads(False)

    def run_backward(ctx: Any, dy: Tensor | None, d_sum: Tensor | None, *_: Any) -> Any:
        s, pre_bias, weight, bias, scale, shift, seed, mean, rstd = ctx.saved_tensors
        need_x, need_residual, *needs = ctx.needs_input_grad[:7]

        def call(*arguments: Any) -> tuple[Tensor | None, ...]:
            grads = backward_op(*arguments[:-1], list(arguments[-1]))
            wanted = (True, *arguments[-1])
            return tuple(g if want else None for g, want in zip(grads, wanted, strict=True))

        grads = _backward(
            call, dy, d_sum if ctx.kept_sum else None, s, pre_bias, ctx.kept_sum, weight, bias,
            scale, shift, seed, mean, rstd, ctx.num_groups, ctx.silu, ctx.dropout_p, tuple(needs),
        )  # fmt: skip
        dx = grads[0]
        return (
            dx if need_x else None, dx if need_residual else None, *grads[1:],
            None, None, None, None, None, None,
        )  # fmt: skip

    forward_op.register_autograd(run_backward, setup_context=setup_context)

    return forward_op
