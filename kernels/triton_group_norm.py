"""Triton's fused group norm: the launch of its kernels, cut up as `triton_group_norm_plan` says."""

import math
from typing import Any

import torch
from torch import Tensor

from . import reference
from . import triton_group_norm_backward as backward_kernels
from . import triton_group_norm_forward as forward_kernels
from .fused_group_norm import Fused, Gradients, group_norm_with, register
from .launch import launch, power_of_two
from .triton_group_norm_plan import plan

# One program combines all channels of a group, in the split regime.
MAX_GROUP = 8192


def why_not(x: Tensor, num_groups: int) -> list[str]:
    """List what the kernels cannot do for these arguments, wherever x lies."""
    reasons = []
    if x.dtype == torch.float64:
        reasons.append("the kernels compute in fp32, x is fp64")
    if (elements := math.prod(x.shape[1:])) >= 2**31:
        reasons.append(f"offsets within a sample are 32 bits wide, it has {elements} elements")
    if x.shape[1] // num_groups > MAX_GROUP:
        reasons.append(f"a group has more than {MAX_GROUP} channels: {x.shape[1] // num_groups}")
    return reasons


def _constants(x: Tensor, num_groups: int) -> tuple[dict[str, int], dict[str, Any]]:
    """What every kernel takes: (arguments, constants)."""
    c, hw = x.shape[1], x.shape[2] * x.shape[3]
    vec_c, vec_p = math.gcd(c, 8), math.gcd(hw, 8)
    arguments = {"c_units": c // vec_c, "hw_units": hw // vec_p}
    constants = {"VEC_C": vec_c, "VEC_P": vec_p, "CG": c // num_groups}
    return arguments, constants


def _row(x: Tensor | None) -> int:
    return 0 if x is None or x.dim() == 1 else x.stride(0)


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
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """(y, s or None, mean, rstd), see `fused_group_norm.Fused`."""
    n = x.shape[0]
    y = torch.empty_like(x)
    total = torch.empty_like(x) if keep_sum else None
    mean = x.new_empty((n, num_groups), dtype=torch.float32)
    rstd = torch.empty_like(mean)
    if n == 0:
        return y, total, mean, rstd
    cut = plan(x, num_groups, backward=False, dropout=seed is not None)
    sizes, shared = _constants(x, num_groups)
    threshold, keep_scale = reference.dropout_constants(dropout_p)
    tile = {
        "BLOCK_P": cut.block_p,
        "BLOCK_C": cut.block_c,
        "CHANNELS_LAST": cut.channels_last,
    }
    loops = {"UNROLL": cut.unroll, "STAGES": cut.stages}
    inputs = {"p_x": x, "p_residual": residual, "p_pre_bias": pre_bias}
    affine = {"p_weight": weight, "p_bias": bias, "p_scale": scale, "p_shift": shift}
    outputs = {"p_y": y, "p_sum": total, "p_mean": mean, "p_rstd": rstd}
    pre_row = {"pre_bias_row": _row(pre_bias)}
    rows = {**pre_row, "scale_row": _row(scale), "shift_row": _row(shift)}
    slabs, groups = {"slabs": cut.slabs}, {"num_groups": num_groups}
    dropout = {"threshold": threshold, "keep_scale": keep_scale}
    if not cut.splits:
        launch(
            forward_kernels.forward_fused,
            (n * cut.slabs,),
            {**inputs, **affine, "p_seed": seed, **outputs, **rows, **sizes, **slabs, **groups,
             "eps": eps, **dropout},
            {**shared, **tile, "SLAB_GROUPS": cut.slab_groups,
             "BLOCK_G": power_of_two(cut.slab_groups), "SILU": silu, "ONE_TILE": cut.one_tile,
             **loops},
            num_warps=cut.num_warps,
        )  # fmt: skip
        return y, total, mean, rstd

    vectors = {name: shared[name] for name in ("VEC_C", "VEC_P")}
    partial = mean.new_empty((n, cut.splits, 2, x.shape[1]))
    grid, chunks = (n * cut.slabs, cut.splits), {"splits": cut.splits, "chunk": cut.chunk}
    launch(
        forward_kernels.forward_statistics,
        grid,
        {**inputs, "p_partial": partial, **pre_row, **sizes, **slabs, **chunks},
        {**vectors, **tile, **loops},
        num_warps=cut.num_warps,
    )
    launch(
        forward_kernels.forward_groups,
        (n * num_groups,),
        {"p_partial": partial, "p_mean": mean, "p_rstd": rstd, **sizes, **chunks, **groups,
         "eps": eps},
        {**shared, "BLOCK_C": power_of_two(shared["CG"])},
        num_warps=_warps_of_a_group(shared["CG"]),
    )  # fmt: skip
    launch(
        forward_kernels.forward_apply,
        grid,
        {**inputs, **affine, "p_seed": seed, **outputs, **rows, **sizes, **slabs, **groups,
         "chunk": cut.chunk, **dropout},
        {**shared, **tile, "SILU": silu, "STAGES": cut.stages},
        num_warps=cut.num_warps,
    )  # fmt: skip
    return y, total, mean, rstd


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
    needs: tuple[bool, ...],
) -> Gradients:
    """Compute `Gradients`, see `fused_group_norm.Fused`."""
    n, c = s.shape[:2]
    need_pre_bias, need_weight, need_bias, need_scale, need_shift = needs

    def per_sample(needed: bool) -> Tensor | None:
        return mean.new_empty((n, c)) if needed else None

    ds = torch.empty_like(s)
    d_affine = mean.new_empty((2, n, c)) if need_weight or need_bias else None
    d_pre_bias, d_scale, d_shift = map(per_sample, (need_pre_bias, need_scale, need_shift))
    if n > 0:
        _launch_backward(
            dy, d_sum, s, pre_bias, weight, bias, scale, shift, seed, mean, rstd,
            num_groups, silu, dropout_p, ds, d_pre_bias, d_affine, d_scale, d_shift,
        )  # fmt: skip
    d_weight, d_bias = (None, None) if d_affine is None else d_affine.sum(1).unbind(0)
    return Gradients(
        ds,
        d_pre_bias,
        d_weight if need_weight else None,
        d_bias if need_bias else None,
        d_scale,
        d_shift,
    )


def _launch_backward(
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
    ds: Tensor,
    d_pre_bias: Tensor | None,
    d_affine: Tensor | None,
    d_scale: Tensor | None,
    d_shift: Tensor | None,
) -> None:
    n = s.shape[0]
    cut = plan(s, num_groups, backward=True, dropout=seed is not None)
    sizes, shared = _constants(s, num_groups)
    threshold, keep_scale = reference.dropout_constants(dropout_p)
    tile = {
        "BLOCK_P": cut.block_p,
        "BLOCK_C": cut.block_c,
        "CHANNELS_LAST": cut.channels_last,
    }
    loops = {"UNROLL": cut.unroll, "STAGES": cut.stages}
    inputs = {
        "p_dy": dy, "p_d_sum": d_sum, "p_s": s, "p_pre_bias": pre_bias, "p_weight": weight,
        "p_bias": bias, "p_scale": scale, "p_shift": shift, "p_seed": seed, "p_mean": mean,
        "p_rstd": rstd,
    }  # fmt: skip
    gradients = {
        "p_d_pre_bias": d_pre_bias, "p_d_affine": d_affine, "p_d_scale": d_scale,
        "p_d_shift": d_shift,
    }  # fmt: skip
    rows = {
        "pre_bias_row": _row(pre_bias), "scale_row": _row(scale), "shift_row": _row(shift),
    }  # fmt: skip
    slabs, groups, samples = {"slabs": cut.slabs}, {"num_groups": num_groups}, {"samples": n}
    dropout = {"threshold": threshold, "keep_scale": keep_scale}
    if not cut.splits:
        launch(
            backward_kernels.backward_fused,
            (n * cut.slabs,),
            {**inputs, "p_ds": ds, **gradients, **rows, **samples, **sizes, **slabs, **groups,
             **dropout},
            {**shared, **tile, "SLAB_GROUPS": cut.slab_groups,
             "BLOCK_G": power_of_two(cut.slab_groups), "SILU": silu, "ONE_TILE": cut.one_tile,
             **loops},
            num_warps=cut.num_warps,
        )  # fmt: skip
        return

    partial = mean.new_empty((n, cut.splits, 4, s.shape[1]))
    moments = mean.new_empty((n, num_groups, 2))
    grid, splits = (n * cut.slabs, cut.splits), {"splits": cut.splits}
    launch(
        backward_kernels.backward_sums,
        grid,
        {**inputs, "p_partial": partial, **rows, **sizes, **slabs, **groups, **splits,
         "chunk": cut.chunk, **dropout},
        {**shared, **tile, "SILU": silu, "PRE_BIAS": d_pre_bias is not None,
         **loops},
        num_warps=cut.num_warps,
    )  # fmt: skip
    launch(
        backward_kernels.backward_groups,
        (n * num_groups,),
        {"p_partial": partial, "p_weight": weight, "p_bias": bias, "p_scale": scale,
         "p_rstd": rstd, "p_moments": moments, **gradients, "scale_row": _row(scale),
         **samples, **sizes, **splits, **groups},
        {**shared, "BLOCK_C": power_of_two(shared["CG"])},
        num_warps=_warps_of_a_group(shared["CG"]),
    )  # fmt: skip
    launch(
        backward_kernels.backward_apply,
        grid,
        {**inputs, "p_moments": moments, "p_ds": ds, **rows, **sizes, **slabs, **groups,
         "chunk": cut.chunk, **dropout},
        {**shared, **tile, "SILU": silu, "STAGES": cut.stages},
        num_warps=cut.num_warps,
    )  # fmt: skip


def _warps_of_a_group(channels: int) -> int:
    return min(8, max(1, channels // 256))


fused = Fused(forward, backward)
OPS = {"group_norm": group_norm_with(fused, register("triton", fused))}
