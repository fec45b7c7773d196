"""Triton kernels of the fused group norm's backward; regimes and names as in the forward's file.

With z = a * xhat + b, a = weight * (1 + scale), dz = dL/dz and M elements per group:

    ds = rstd * (a * dz - m1 - xhat * m2) + d_sum
    m1 = sum(a * dz) / M,  m2 = sum(a * dz * xhat) / M

so three sums per channel, S1 = sum dz, S2 = sum dz * xhat and X1 = sum xhat, give every gradient:
d_shift = S1, d_scale = weight * S2 + bias * S1, d_bias = sum_n (1 + scale) * S1, d_weight =
sum_n (1 + scale) * S2, d_pre_bias = sum ds = rstd * (a * S1 - HW * m1 - m2 * X1) + sum d_sum.
"""

import triton
import triton.language as tl

from .triton_group_norm_forward import (
    _affine,
    _keep,
    _members,
    _offsets,
    _per_channel,
    _per_group,
    _slab,
    _with_shift,
)
from .triton_math import tanh


@triton.jit
def _load_tile(
    p_s, p_dy, p_seed, b_offsets, m_tile, b_shift, b_gain, b_offset,
    threshold, keep_scale, n, first_c, b_p, C, HW,
    SILU: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """(s, in fp32 s - mean, and dz, with SiLU doubled) of one tile; dz is 0 outside of it.

    With h = z / 2 and t = tanh(h), silu'(z) = (1 + t + h * (1 - t^2)) / 2. So b_gain and b_offset
    are those of h, and the half of dz is left to what sums it up.
    """
    b_d = tl.load(p_s + b_offsets, mask=m_tile, other=0.0).to(tl.float32)
    if p_s.dtype.element_ty == tl.float32:
        b_d += b_shift[None, :]
    b_dz = tl.load(p_dy + b_offsets, mask=m_tile, other=0.0).to(tl.float32)
    if p_seed is not None:
        m_keep = _keep(p_seed, threshold, n, first_c, b_p, C, HW, BLOCK_P, BLOCK_C)
        b_dz = tl.where(m_keep, b_dz * keep_scale, 0.0)
    if SILU:
        b_h = b_d * b_gain[None, :] + b_offset[None, :]
        b_t = tanh(b_h, p_s.dtype.element_ty != tl.float32)
        b_dz += b_dz * (b_t + b_h * (1 - b_t * b_t))
    return b_d, b_dz


@triton.jit
def _channel_sums(
    p_s, p_dy, p_d_sum, p_seed, b_c, m_c, first, last, b_shift, b_gain, b_offset,
    threshold, keep_scale, n, first_c, C, HW,
    SILU: tl.constexpr, CHANNELS_LAST: tl.constexpr, PRE_BIAS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, UNROLL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Sums of b_dz, b_dz * b_d, b_d and d_sum of each channel over the pixels first..last-1."""
    b_s1 = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    b_s2 = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    b_x1 = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    b_d1 = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for start in tl.range(first, last, BLOCK_P * UNROLL, num_stages=STAGES):
        for tile in tl.static_range(UNROLL):
            b_p = start + tile * BLOCK_P + tl.arange(0, BLOCK_P)
            m_tile = (b_p < last)[:, None] & m_c[None, :]
            b_offsets = _offsets(b_p, b_c, C, HW, CHANNELS_LAST)
            b_d, b_dz = _load_tile(
                p_s, p_dy, p_seed, b_offsets, m_tile, b_shift, b_gain, b_offset,
                threshold, keep_scale, n, first_c, b_p, C, HW, SILU, BLOCK_P, BLOCK_C,
            )  # fmt: skip
            b_s1 += b_dz
            b_s2 += b_dz * b_d
            if PRE_BIAS:
                b_x1 += tl.where(m_tile, b_d, 0.0)
                if p_d_sum is not None:
                    b_d1 += tl.load(p_d_sum + b_offsets, mask=m_tile, other=0.0).to(tl.float32)
    return tl.sum(b_s1, 0), tl.sum(b_s2, 0), tl.sum(b_x1, 0), tl.sum(b_d1, 0)


@triton.jit
def _store_ds(p_ds, p_d_sum, b_offsets, m_tile, b_d, b_dz, b_gain, b_slope, b_constant):
    """Write rstd * (a * dz - m1 - xhat * m2) + d_sum, and return it; linear in b_dz and b_d."""
    b_ds = b_gain[None, :] * b_dz + (b_slope[None, :] * b_d + b_constant[None, :])
    if p_d_sum is not None:
        b_ds += tl.load(p_d_sum + b_offsets, mask=m_tile, other=0.0).to(tl.float32)
    tl.store(p_ds + b_offsets, b_ds.to(p_ds.dtype.element_ty), mask=m_tile)
    return tl.where(m_tile, b_ds, 0.0)


@triton.jit
def _channel_operands(
    p_s, p_pre_bias, p_weight, p_bias, p_scale, p_shift, p_mean, p_rstd,
    pre_bias_row, scale_row, shift_row, num_groups, n, b_c, m_c,
    CG: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """(pre_bias - mean, rstd, 1 + scale, and of h, or of z without SiLU, gain and offset)."""
    row = n * num_groups
    b_mean = tl.load(p_mean + row + b_c // CG, mask=m_c, other=0.0)
    b_rstd = tl.load(p_rstd + row + b_c // CG, mask=m_c, other=0.0)
    b_shift = _slab(p_pre_bias, n * pre_bias_row, b_c, m_c, 0.0) - b_mean
    b_scale, b_a, b_b = _affine(
        p_weight, p_bias, p_scale, p_shift, scale_row, shift_row, n, b_c, m_c
    )
    b_gain, b_offset = _once(b_a * b_rstd, SILU), _once(b_b, SILU)
    return b_shift, b_rstd, b_scale, b_gain, _with_shift(p_s, b_shift, b_gain, b_offset)


@triton.jit
def _once(b_twice, SILU: tl.constexpr):
    """Halve z to h and what `_load_tile` doubles to what it is."""
    return b_twice * 0.5 if SILU else b_twice


@triton.jit
def _store_channels(
    p_weight, p_bias, p_d_affine, p_d_scale, p_d_shift, plane, row, b_c, m_c, b_s1, b_s2, b_scale,
):  # fmt: skip
    """What the sums of a sample's channels give; p_d_affine is (2, N, C), still to be summed."""
    if p_d_affine is not None:
        tl.store(p_d_affine + row + b_c, b_scale * b_s2, mask=m_c)
        tl.store(p_d_affine + plane + row + b_c, b_scale * b_s1, mask=m_c)
    if p_d_scale is not None:
        b_weight = _slab(p_weight, 0, b_c, m_c, 1.0)
        b_bias = _slab(p_bias, 0, b_c, m_c, 0.0)
        tl.store(p_d_scale + row + b_c, b_weight * b_s2 + b_bias * b_s1, mask=m_c)
    if p_d_shift is not None:
        tl.store(p_d_shift + row + b_c, b_s1, mask=m_c)


@triton.jit
def backward_fused(
    p_dy, p_d_sum, p_s, p_pre_bias, p_weight, p_bias, p_scale, p_shift, p_seed, p_mean, p_rstd,
    p_ds, p_d_pre_bias, p_d_affine, p_d_scale, p_d_shift,
    pre_bias_row, scale_row, shift_row, samples, c_units, hw_units, slabs, num_groups,
    threshold, keep_scale,
    VEC_C: tl.constexpr, VEC_P: tl.constexpr, CG: tl.constexpr, SLAB_GROUPS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, SILU: tl.constexpr, ONE_TILE: tl.constexpr,
    UNROLL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program = one slab of SLAB_GROUPS groups of one sample; grid (N * slabs,)."""
    n = (tl.program_id(0) // slabs).to(tl.int64)
    slab = tl.program_id(0) % slabs
    C, HW = c_units * VEC_C, hw_units * VEC_P
    first_c = slab * (SLAB_GROUPS * CG)
    b_slot = tl.arange(0, BLOCK_C)
    b_c = first_c + b_slot
    m_c = (b_slot < SLAB_GROUPS * CG) & (b_c < C)
    sample = n * C * HW
    p_s += sample
    p_dy += sample
    p_ds += sample
    if p_d_sum is not None:
        p_d_sum += sample

    b_shift, b_rstd, b_scale, b_gain, b_offset = _channel_operands(
        p_s, p_pre_bias, p_weight, p_bias, p_scale, p_shift, p_mean, p_rstd,
        pre_bias_row, scale_row, shift_row, num_groups, n, b_c, m_c, CG, SILU,
    )  # fmt: skip
    if ONE_TILE:
        b_p = tl.arange(0, BLOCK_P)
        b_offsets = _offsets(b_p, b_c, C, HW, CHANNELS_LAST)
        m_tile = (b_p < HW)[:, None] & m_c[None, :]
        b_d, b_dz = _load_tile(
            p_s, p_dy, p_seed, b_offsets, m_tile, b_shift, b_gain, b_offset,
            threshold, keep_scale, n, first_c, b_p, C, HW, SILU, BLOCK_P, BLOCK_C,
        )  # fmt: skip
        b_s1, b_s2 = tl.sum(b_dz, 0), tl.sum(b_dz * b_d, 0)
    else:
        b_s1, b_s2, _, _ = _channel_sums(
            p_s, p_dy, None, p_seed, b_c, m_c, 0, HW, b_shift, b_gain, b_offset,
            threshold, keep_scale, n, first_c, C, HW,
            SILU, CHANNELS_LAST, False, BLOCK_P, BLOCK_C, UNROLL, STAGES,
        )  # fmt: skip

    if p_s.dtype.element_ty != tl.float32:
        b_s2 += b_shift * b_s1
    m_members = _members(CG, BLOCK_C, BLOCK_G)
    # b_gain = rstd * a, halved where b_dz is doubled.
    b_m1 = _per_channel(_per_group(b_gain * b_s1, m_members) / (CG * HW), m_members)
    b_m2 = _per_channel(_per_group(b_gain * b_s2, m_members) / (CG * HW), m_members)
    b_slope, b_constant = -b_rstd * b_rstd * b_m2, -b_m1
    if p_s.dtype.element_ty != tl.float32:
        b_constant += b_slope * b_shift
    _store_channels(
        p_weight, p_bias, p_d_affine, p_d_scale, p_d_shift, samples * C, n * C, b_c, m_c,
        _once(b_s1, SILU), _once(b_s2, SILU) * b_rstd, b_scale,
    )  # fmt: skip
    # Here d_pre_bias costs least as the sum of what is written.
    if ONE_TILE:
        b_total = _store_ds(
            p_ds, p_d_sum, b_offsets, m_tile, b_d, b_dz, b_gain, b_slope, b_constant
        )
    else:
        WIDE_P: tl.constexpr = BLOCK_P * UNROLL
        tiles = tl.cdiv(HW, WIDE_P)
        b_total = tl.zeros([WIDE_P, BLOCK_C], tl.float32)
        # Backwards: what was read last is what the caches still have.
        for tile in tl.range(0, tiles, num_stages=STAGES):
            b_pixel = (tiles - 1 - tile) * WIDE_P + tl.arange(0, WIDE_P)
            b_offsets = _offsets(b_pixel, b_c, C, HW, CHANNELS_LAST)
            m_tile = (b_pixel < HW)[:, None] & m_c[None, :]
            b_d, b_dz = _load_tile(
                p_s, p_dy, p_seed, b_offsets, m_tile, b_shift, b_gain, b_offset,
                threshold, keep_scale, n, first_c, b_pixel, C, HW, SILU, WIDE_P, BLOCK_C,
            )  # fmt: skip
            b_total += _store_ds(
                p_ds, p_d_sum, b_offsets, m_tile, b_d, b_dz, b_gain, b_slope, b_constant
            )
    if p_d_pre_bias is not None:
        tl.store(p_d_pre_bias + n * C + b_c, tl.sum(b_total, 0), mask=m_c)


@triton.jit
def backward_sums(
    p_dy, p_d_sum, p_s, p_pre_bias, p_weight, p_bias, p_scale, p_shift, p_seed, p_mean, p_rstd,
    p_partial,
    pre_bias_row, scale_row, shift_row, c_units, hw_units, slabs, num_groups, splits, chunk,
    threshold, keep_scale,
    VEC_C: tl.constexpr, VEC_P: tl.constexpr, CG: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, SILU: tl.constexpr, PRE_BIAS: tl.constexpr,
    UNROLL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """S1, S2, X1, sum d_sum of each channel in a chunk: (N, splits, 4, C)."""
    n = (tl.program_id(0) // slabs).to(tl.int64)
    split = tl.program_id(1)
    C, HW = c_units * VEC_C, hw_units * VEC_P
    first_c = tl.program_id(0) % slabs * BLOCK_C
    b_c = first_c + tl.arange(0, BLOCK_C)
    m_c = b_c < C
    p_s += n * C * HW
    p_dy += n * C * HW
    if p_d_sum is not None:
        p_d_sum += n * C * HW
    b_shift, b_rstd, _, b_gain, b_offset = _channel_operands(
        p_s, p_pre_bias, p_weight, p_bias, p_scale, p_shift, p_mean, p_rstd,
        pre_bias_row, scale_row, shift_row, num_groups, n, b_c, m_c, CG, SILU,
    )  # fmt: skip
    first = split * chunk
    b_s1, b_s2, b_x1, b_d1 = _channel_sums(
        p_s, p_dy, p_d_sum, p_seed, b_c, m_c, first, tl.minimum(first + chunk, HW),
        b_shift, b_gain, b_offset, threshold, keep_scale, n, first_c, C, HW,
        SILU, CHANNELS_LAST, PRE_BIAS, BLOCK_P, BLOCK_C, UNROLL, STAGES,
    )  # fmt: skip
    if p_s.dtype.element_ty != tl.float32:
        b_s2 += b_shift * b_s1
        b_x1 += b_shift * (tl.minimum(first + chunk, HW) - first)
    row = (n * splits + split) * 4 * C
    tl.store(p_partial + row + b_c, _once(b_s1, SILU), mask=m_c)
    tl.store(p_partial + row + C + b_c, _once(b_s2, SILU) * b_rstd, mask=m_c)
    if PRE_BIAS:
        tl.store(p_partial + row + 2 * C + b_c, b_x1 * b_rstd, mask=m_c)
        tl.store(p_partial + row + 3 * C + b_c, b_d1, mask=m_c)


@triton.jit
def backward_groups(
    p_partial, p_weight, p_bias, p_scale, p_rstd, p_moments,
    p_d_pre_bias, p_d_affine, p_d_scale, p_d_shift,
    scale_row, samples, c_units, hw_units, splits, num_groups,
    VEC_C: tl.constexpr, VEC_P: tl.constexpr, CG: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """m1 and m2 of one group into (N, num_groups, 2), and its channels' gradients."""
    n = (tl.program_id(0) // num_groups).to(tl.int64)
    g = tl.program_id(0) % num_groups
    C, HW = c_units * VEC_C, hw_units * VEC_P
    b_slot = tl.arange(0, BLOCK_C)
    m_c = b_slot < CG
    b_c = g * CG + b_slot
    b_s1 = tl.zeros([BLOCK_C], tl.float32)
    b_s2 = tl.zeros([BLOCK_C], tl.float32)
    b_x1 = tl.zeros([BLOCK_C], tl.float32)
    b_d1 = tl.zeros([BLOCK_C], tl.float32)
    for split in range(splits):
        row = (n * splits + split) * 4 * C
        b_s1 += tl.load(p_partial + row + b_c, mask=m_c, other=0.0)
        b_s2 += tl.load(p_partial + row + C + b_c, mask=m_c, other=0.0)
        if p_d_pre_bias is not None:
            b_x1 += tl.load(p_partial + row + 2 * C + b_c, mask=m_c, other=0.0)
            b_d1 += tl.load(p_partial + row + 3 * C + b_c, mask=m_c, other=0.0)
    b_weight = _slab(p_weight, 0, b_c, m_c, 1.0)
    b_scale = 1 + _slab(p_scale, n * scale_row, b_c, m_c, 0.0)
    m1 = tl.sum(b_weight * b_scale * b_s1, 0) / (CG * HW)
    m2 = tl.sum(b_weight * b_scale * b_s2, 0) / (CG * HW)
    row = n * num_groups + g
    tl.store(p_moments + 2 * row, m1)
    tl.store(p_moments + 2 * row + 1, m2)
    _store_channels(
        p_weight, p_bias, p_d_affine, p_d_scale, p_d_shift, samples * C, n * C, b_c, m_c,
        b_s1, b_s2, b_scale,
    )  # fmt: skip
    if p_d_pre_bias is not None:
        b_d = tl.load(p_rstd + row) * (b_weight * b_scale * b_s1 - HW * m1 - m2 * b_x1) + b_d1
        tl.store(p_d_pre_bias + n * C + b_c, b_d, mask=m_c)


@triton.jit
def backward_apply(
    p_dy, p_d_sum, p_s, p_pre_bias, p_weight, p_bias, p_scale, p_shift, p_seed, p_mean, p_rstd,
    p_moments, p_ds,
    pre_bias_row, scale_row, shift_row, c_units, hw_units, slabs, num_groups, chunk,
    threshold, keep_scale,
    VEC_C: tl.constexpr, VEC_P: tl.constexpr, CG: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, SILU: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """ds of one chunk of pixels and one block of channels; grid (N * slabs, splits)."""
    n = (tl.program_id(0) // slabs).to(tl.int64)
    C, HW = c_units * VEC_C, hw_units * VEC_P
    first_c = tl.program_id(0) % slabs * BLOCK_C
    b_c = first_c + tl.arange(0, BLOCK_C)
    m_c = b_c < C
    p_s += n * C * HW
    p_dy += n * C * HW
    p_ds += n * C * HW
    if p_d_sum is not None:
        p_d_sum += n * C * HW
    b_shift, b_rstd, _, b_gain, b_offset = _channel_operands(
        p_s, p_pre_bias, p_weight, p_bias, p_scale, p_shift, p_mean, p_rstd,
        pre_bias_row, scale_row, shift_row, num_groups, n, b_c, m_c, CG, SILU,
    )  # fmt: skip
    b_row = 2 * (n * num_groups + b_c // CG)
    b_constant = -b_rstd * tl.load(p_moments + b_row, mask=m_c, other=0.0)
    b_slope = -b_rstd * b_rstd * tl.load(p_moments + b_row + 1, mask=m_c, other=0.0)
    if p_s.dtype.element_ty != tl.float32:
        b_constant += b_slope * b_shift
    first = tl.program_id(1) * chunk
    last = tl.minimum(first + chunk, HW)
    for start in tl.range(first, last, BLOCK_P, num_stages=STAGES):
        b_p = start + tl.arange(0, BLOCK_P)
        b_offsets = _offsets(b_p, b_c, C, HW, CHANNELS_LAST)
        m_tile = (b_p < last)[:, None] & m_c[None, :]
        b_d, b_dz = _load_tile(
            p_s, p_dy, p_seed, b_offsets, m_tile, b_shift, b_gain, b_offset,
            threshold, keep_scale, n, first_c, b_p, C, HW, SILU, BLOCK_P, BLOCK_C,
        )  # fmt: skip
        _store_ds(p_ds, p_d_sum, b_offsets, m_tile, b_d, b_dz, b_gain, b_slope, b_constant)
