"""Triton kernels of the fused group norm; `triton_group_norm.py` chooses among
them and launches them.

A tile is [BLOCK_P pixels, BLOCK_C channels] of one sample in either layout. Two regimes:

* fused: one program owns a slab of whole groups of one sample and walks over its pixels twice, the
  second time out of L2 (or, ONE_TILE, keeps them in registers);
* split: where that makes too few programs, or slabs too large, three kernels: sums per
  channel over a chunk of pixels, their combination per group, and the element-wise rest. Partial
  results are written and read, never added atomically, so every run gives the same bits.

Names: p_ pointer, b_ tile or vector of a block, m_ mask, n sample, c channel, p pixel, g group.
C and H * W come as a multiple of VEC_C and VEC_P, which shows the compiler what they are divisible
by. Statistics: shifted sums per lane, then Chan et al. 1983, equation 2.1, over lanes, channels,
chunks.
"""

import triton
import triton.language as tl

from .triton_math import sigmoid


@triton.jit
def _slab(p_vector, row, b_c, m_c, default):
    """One value for each channel in fp32; the default where the operand is absent."""
    if p_vector is None:
        b_vector = tl.full(b_c.shape, default, tl.float32)
    else:
        b_vector = tl.load(p_vector + row + b_c, mask=m_c, other=0.0).to(tl.float32)
    return b_vector


@triton.jit
def _offsets(b_p, b_c, C, HW, CHANNELS_LAST: tl.constexpr):
    if CHANNELS_LAST:
        b_offsets = b_p[:, None] * C + b_c[None, :]
    else:
        b_offsets = b_c[None, :] * HW + b_p[:, None]
    return b_offsets


@triton.jit
def _load_sum(p_x, p_residual, b_offsets, m_tile):
    """x + residual in fp32: s without the pre-bias, which is a channel's and not a pixel's."""
    b_s = tl.load(p_x + b_offsets, mask=m_tile, other=0.0).to(tl.float32)
    if p_residual is not None:
        b_s += tl.load(p_residual + b_offsets, mask=m_tile, other=0.0).to(tl.float32)
    return b_s


@triton.jit
def _combine_lanes(b_mean, b_m2, b_count, count):
    """Mean and sum of squared deviations of each channel from those of the lanes of a tile."""
    b_mean_c = tl.sum(b_mean * b_count[:, None], 0) / count
    b_deviation = b_mean - b_mean_c[None, :]
    b_m2_c = tl.sum(b_m2 + b_deviation * b_deviation * b_count[:, None], 0)
    return b_mean_c, b_m2_c


@triton.jit
def _channel_statistics(
    p_x, p_residual, b_c, m_c, first, last, C, HW,
    CHANNELS_LAST: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    UNROLL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Mean and squared deviations of each channel over the pixels first..last-1.

    A lane sums what its elements differ by from its first one, and the squares. Were that one an
    outlier, what this makes inexact would be small beside its own squared deviation.
    """
    b_first = first + tl.arange(0, BLOCK_P)
    m_tile = (b_first < last)[:, None] & m_c[None, :]
    b_offsets = _offsets(b_first, b_c, C, HW, CHANNELS_LAST)
    b_base = _load_sum(p_x, p_residual, b_offsets, m_tile)
    b_sum = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    b_square = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for start in tl.range(0, last - first, BLOCK_P * UNROLL, num_stages=STAGES):
        for tile in tl.static_range(UNROLL):
            b_p = b_first + start + tile * BLOCK_P
            # Past the end a lane reads its first element again, which changes neither sum.
            b_p = tl.where(b_p < last, b_p, b_first)
            b_offsets = _offsets(b_p, b_c, C, HW, CHANNELS_LAST)
            b_delta = _load_sum(p_x, p_residual, b_offsets, m_tile) - b_base
            b_sum += b_delta
            b_square += b_delta * b_delta
    b_count = ((last - b_first + BLOCK_P - 1) // BLOCK_P).to(tl.float32)
    b_mean = b_sum / tl.maximum(b_count, 1.0)[:, None]
    b_m2 = tl.maximum(b_square - b_sum * b_mean, 0.0)
    return _combine_lanes(b_base + b_mean, b_m2, b_count, (last - first) * 1.0)


@triton.jit
def _members(CG: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr):
    """[BLOCK_G, BLOCK_C]: which channels of a slab belong to which of its groups."""
    b_group = tl.arange(0, BLOCK_C) // CG
    return tl.arange(0, BLOCK_G)[:, None] == b_group[None, :]


@triton.jit
def _per_group(b_channels, m_members):
    return tl.sum(tl.where(m_members, b_channels[None, :], 0.0), 1)


@triton.jit
def _per_channel(b_groups, m_members):
    return tl.sum(tl.where(m_members, b_groups[:, None], 0.0), 0)


@triton.jit
def _keep(p_seed, threshold, n, first_c, b_p, C, HW, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """[BLOCK_P, BLOCK_C]: which elements dropout keeps, see `reference.random_halves`."""
    blocks = (C + 7) // 8
    b_block = first_c // 8 + tl.arange(0, BLOCK_C // 8)
    b_pixel = n * HW + b_p.to(tl.int64)
    b_counter = b_pixel[:, None] * blocks + b_block[None, :]
    b_low = (b_counter & 0xFFFFFFFF).to(tl.uint32)
    b_high = (b_counter >> 32).to(tl.uint32)
    b_zero = b_low * 0
    w0, w1, w2, w3 = tl.philox(tl.load(p_seed), b_low, b_high, b_zero, b_zero)
    b_0 = tl.join((w0 & 0xFFFF) >= threshold, (w0 >> 16) >= threshold)
    b_1 = tl.join((w1 & 0xFFFF) >= threshold, (w1 >> 16) >= threshold)
    b_2 = tl.join((w2 & 0xFFFF) >= threshold, (w2 >> 16) >= threshold)
    b_3 = tl.join((w3 & 0xFFFF) >= threshold, (w3 >> 16) >= threshold)
    # [.., half, word / 2, word % 2]: channel 8b + 4 * half + word.
    b_keep = tl.join(tl.join(b_0, b_2), tl.join(b_1, b_3))
    return tl.reshape(b_keep, [BLOCK_P, BLOCK_C])


@triton.jit
def _affine(p_weight, p_bias, p_scale, p_shift, scale_row, shift_row, n, b_c, m_c):
    """(1 + scale, a, b) of z = a * xhat + b."""
    b_scale = 1 + _slab(p_scale, n * scale_row, b_c, m_c, 0.0)
    b_a = _slab(p_weight, 0, b_c, m_c, 1.0) * b_scale
    b_b = _slab(p_bias, 0, b_c, m_c, 0.0) * b_scale
    b_b += _slab(p_shift, n * shift_row, b_c, m_c, 0.0)
    return b_scale, b_a, b_b


@triton.jit
def _with_shift(p_s, b_shift, b_gain, b_offset):
    """What z = s * gain + offset adds in 16 bits, z = (s + shift) * gain + offset in fp32.

    s of 16 bits is so coarse that fp32 loses nothing where the shift goes into the offset, which
    saves an instruction for each element and a register for each channel.
    """
    if p_s.dtype.element_ty != tl.float32:
        b_offset += b_shift * b_gain
    return b_offset


@triton.jit
def _finish(
    b_s, b_offsets, m_tile, b_pre, b_shift, b_gain, b_offset, p_y, p_sum,
    p_seed, threshold, keep_scale, n, first_c, b_p, C, HW,
    SILU: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Everything after the statistics, for one tile; see `_with_shift`."""
    b_y = b_s
    if p_y.dtype.element_ty == tl.float32:
        b_y += b_shift[None, :]
    b_y = b_y * b_gain[None, :] + b_offset[None, :]
    if SILU:
        b_y *= sigmoid(b_y)
    if p_seed is not None:
        m_keep = _keep(p_seed, threshold, n, first_c, b_p, C, HW, BLOCK_P, BLOCK_C)
        b_y = tl.where(m_keep, b_y * keep_scale, 0.0)
    tl.store(p_y + b_offsets, b_y.to(p_y.dtype.element_ty), mask=m_tile)
    if p_sum is not None:
        tl.store(p_sum + b_offsets, (b_s + b_pre[None, :]).to(p_sum.dtype.element_ty), mask=m_tile)


@triton.jit
def forward_fused(
    p_x, p_residual, p_pre_bias, p_weight, p_bias, p_scale, p_shift, p_seed,
    p_y, p_sum, p_mean, p_rstd,
    pre_bias_row, scale_row, shift_row, c_units, hw_units, slabs, num_groups, eps,
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
    p_x += sample
    p_y += sample
    if p_residual is not None:
        p_residual += sample
    if p_sum is not None:
        p_sum += sample

    b_pre = _slab(p_pre_bias, n * pre_bias_row, b_c, m_c, 0.0)
    if ONE_TILE:
        b_p = tl.arange(0, BLOCK_P)
        b_offsets = _offsets(b_p, b_c, C, HW, CHANNELS_LAST)
        m_tile = (b_p < HW)[:, None] & m_c[None, :]
        b_s = _load_sum(p_x, p_residual, b_offsets, m_tile)
        b_mean_c, b_m2_c = _combine_lanes(b_s, b_s * 0.0, (b_p < HW).to(tl.float32), HW * 1.0)
    else:
        b_mean_c, b_m2_c = _channel_statistics(
            p_x, p_residual, b_c, m_c, 0, HW, C, HW, CHANNELS_LAST, BLOCK_P, BLOCK_C,
            UNROLL, STAGES,
        )  # fmt: skip
    b_mean_c += b_pre

    _, b_gain, b_offset = _affine(
        p_weight, p_bias, p_scale, p_shift, scale_row, shift_row, n, b_c, m_c
    )
    m_members = _members(CG, BLOCK_C, BLOCK_G)
    b_mean_g = _per_group(b_mean_c, m_members) / CG
    b_mean = _per_channel(b_mean_g, m_members)
    b_deviation = b_mean_c - b_mean
    b_m2_g = _per_group(b_m2_c + b_deviation * b_deviation * HW, m_members)
    b_rstd_g = tl.rsqrt(b_m2_g / (CG * HW) + eps)
    b_rstd = _per_channel(b_rstd_g, m_members)
    b_g = tl.arange(0, BLOCK_G)
    m_g = (b_g < SLAB_GROUPS) & (slab * SLAB_GROUPS + b_g < num_groups)
    row = n * num_groups + slab * SLAB_GROUPS
    tl.store(p_mean + row + b_g, b_mean_g, mask=m_g)
    tl.store(p_rstd + row + b_g, b_rstd_g, mask=m_g)

    b_gain *= b_rstd
    b_shift = b_pre - b_mean
    b_offset = _with_shift(p_x, b_shift, b_gain, b_offset)
    if ONE_TILE:
        _finish(
            b_s, b_offsets, m_tile, b_pre, b_shift, b_gain, b_offset, p_y, p_sum,
            p_seed, threshold, keep_scale, n, first_c, b_p, C, HW, SILU, BLOCK_P, BLOCK_C,
        )  # fmt: skip
    else:
        WIDE_P: tl.constexpr = BLOCK_P * UNROLL
        tiles = tl.cdiv(HW, WIDE_P)
        # Backwards: what was read last is what the caches still have.
        for tile in tl.range(0, tiles, num_stages=STAGES):
            b_pixel = (tiles - 1 - tile) * WIDE_P + tl.arange(0, WIDE_P)
            b_offsets = _offsets(b_pixel, b_c, C, HW, CHANNELS_LAST)
            m_tile = (b_pixel < HW)[:, None] & m_c[None, :]
            b_s = _load_sum(p_x, p_residual, b_offsets, m_tile)
            _finish(
                b_s, b_offsets, m_tile, b_pre, b_shift, b_gain, b_offset, p_y, p_sum,
                p_seed, threshold, keep_scale, n, first_c, b_pixel, C, HW, SILU, WIDE_P, BLOCK_C,
            )  # fmt: skip


@triton.jit
def forward_statistics(
    p_x, p_residual, p_pre_bias, p_partial,
    pre_bias_row, c_units, hw_units, slabs, splits, chunk,
    VEC_C: tl.constexpr, VEC_P: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    UNROLL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Mean and m2 of each channel in a chunk: (N, splits, 2, C); grid (N * slabs, splits)."""
    n = (tl.program_id(0) // slabs).to(tl.int64)
    split = tl.program_id(1)
    C, HW = c_units * VEC_C, hw_units * VEC_P
    b_c = tl.program_id(0) % slabs * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = b_c < C
    p_x += n * C * HW
    if p_residual is not None:
        p_residual += n * C * HW
    b_pre = _slab(p_pre_bias, n * pre_bias_row, b_c, m_c, 0.0)
    first = split * chunk
    last = tl.minimum(first + chunk, HW)
    b_mean, b_m2 = _channel_statistics(
        p_x, p_residual, b_c, m_c, first, last, C, HW, CHANNELS_LAST, BLOCK_P, BLOCK_C,
        UNROLL, STAGES,
    )  # fmt: skip
    row = (n * splits + split) * 2 * C
    tl.store(p_partial + row + b_c, b_mean + b_pre, mask=m_c)
    tl.store(p_partial + row + C + b_c, b_m2, mask=m_c)


@triton.jit
def forward_groups(
    p_partial, p_mean, p_rstd, c_units, hw_units, splits, chunk, num_groups, eps,
    VEC_C: tl.constexpr, VEC_P: tl.constexpr, CG: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Mean and rstd of one group from the partial results; grid (N * num_groups,)."""
    n = (tl.program_id(0) // num_groups).to(tl.int64)
    g = tl.program_id(0) % num_groups
    C, HW = c_units * VEC_C, hw_units * VEC_P
    b_slot = tl.arange(0, BLOCK_C)
    m_c = b_slot < CG
    b_c = g * CG + b_slot
    b_mean = tl.zeros([BLOCK_C], tl.float32)
    b_m2 = tl.zeros([BLOCK_C], tl.float32)
    for split in range(splits):
        before = split * chunk
        count = tl.minimum(HW - before, chunk)
        row = (n * splits + split) * 2 * C
        b_delta = tl.load(p_partial + row + b_c, mask=m_c, other=0.0) - b_mean
        share = count * 1.0 / (before + count)
        b_m2 += tl.load(p_partial + row + C + b_c, mask=m_c, other=0.0)
        b_m2 += b_delta * b_delta * (before * share)
        b_mean += b_delta * share
    mean = tl.sum(tl.where(m_c, b_mean, 0.0), 0) / CG
    b_deviation = b_mean - mean
    m2 = tl.sum(tl.where(m_c, b_m2 + b_deviation * b_deviation * HW, 0.0), 0)
    tl.store(p_mean + n * num_groups + g, mean)
    tl.store(p_rstd + n * num_groups + g, tl.rsqrt(m2 / (CG * HW) + eps))


@triton.jit
def forward_apply(
    p_x, p_residual, p_pre_bias, p_weight, p_bias, p_scale, p_shift, p_seed,
    p_y, p_sum, p_mean, p_rstd,
    pre_bias_row, scale_row, shift_row, c_units, hw_units, slabs, num_groups, chunk,
    threshold, keep_scale,
    VEC_C: tl.constexpr, VEC_P: tl.constexpr, CG: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, SILU: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y of one chunk of pixels and one block of channels; grid (N * slabs, splits)."""
    n = (tl.program_id(0) // slabs).to(tl.int64)
    C, HW = c_units * VEC_C, hw_units * VEC_P
    first_c = tl.program_id(0) % slabs * BLOCK_C
    b_c = first_c + tl.arange(0, BLOCK_C)
    m_c = b_c < C
    sample = n * C * HW
    p_x += sample
    p_y += sample
    if p_residual is not None:
        p_residual += sample
    if p_sum is not None:
        p_sum += sample
    b_pre = _slab(p_pre_bias, n * pre_bias_row, b_c, m_c, 0.0)
    b_mean = tl.load(p_mean + n * num_groups + b_c // CG, mask=m_c, other=0.0)
    b_rstd = tl.load(p_rstd + n * num_groups + b_c // CG, mask=m_c, other=0.0)
    _, b_gain, b_offset = _affine(
        p_weight, p_bias, p_scale, p_shift, scale_row, shift_row, n, b_c, m_c
    )
    b_gain *= b_rstd
    b_shift = b_pre - b_mean
    b_offset = _with_shift(p_x, b_shift, b_gain, b_offset)
    first = tl.program_id(1) * chunk
    last = tl.minimum(first + chunk, HW)
    for start in tl.range(first, last, BLOCK_P, num_stages=STAGES):
        b_p = start + tl.arange(0, BLOCK_P)
        b_offsets = _offsets(b_p, b_c, C, HW, CHANNELS_LAST)
        m_tile = (b_p < last)[:, None] & m_c[None, :]
        b_s = _load_sum(p_x, p_residual, b_offsets, m_tile)
        _finish(
            b_s, b_offsets, m_tile, b_pre, b_shift, b_gain, b_offset, p_y, p_sum,
            p_seed, threshold, keep_scale, n, first_c, b_p, C, HW, SILU, BLOCK_P, BLOCK_C,
        )  # fmt: skip
