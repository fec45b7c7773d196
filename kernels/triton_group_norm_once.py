"""Triton kernel of the fused group norm's forward that reads a large image once from memory.

A program has one tile, [BLOCK_P pixels, BLOCK_C channels] of a slab of whole groups. It either sums
the tile up or normalises it with what all the sums of its slab give. Both kinds are programs of one
kernel, so ordered that a sample is normalised `lag` samples after it was summed up: soon enough to
read it a second time out of L2, late enough that hardly a program has to wait.

Sums come before what needs them and wait for nothing. So whatever a program waits for has begun and
will end, as long as a GPU starts programs in the order of their numbers, which CUB's scan relies on
too. Only arrivals are counted atomically. The sums are written, and added up by the last program of
a slab to arrive, always in the same order: the same bits every time.

Names and statistics as in `triton_group_norm_forward.py`.
"""

import triton
import triton.language as tl

from .triton_group_norm_forward import (
    _affine,
    _combine_lanes,
    _finish,
    _load_sum,
    _members,
    _offsets,
    _per_channel,
    _per_group,
    _slab,
    _with_shift,
)


@triton.jit
def _arrive(p_arrived):
    """Publish what this program has written; how many had arrived before."""
    # The atomic is one thread's: it must come after the stores of all.
    tl.debug_barrier()
    return tl.atomic_add(p_arrived, 1, sem="acq_rel")


@triton.jit
def _pixels(b_split, HW, BLOCK_P: tl.constexpr):
    """How many pixels the tiles of these splits have, 0 past the end."""
    return tl.minimum(tl.maximum(HW - b_split * BLOCK_P, 0), BLOCK_P).to(tl.float32)


@triton.jit
def _statistics(
    p_sums, b_g, splits, HW,
    CG: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Mean and squared deviations of each group of a slab from those of its tiles."""
    b_mean = tl.zeros([BLOCK_G], tl.float32)
    b_m2 = tl.zeros([BLOCK_G], tl.float32)
    for first in range(0, splits, BLOCK_S):
        b_mean_s, b_m2_s = _group_sums(p_sums, b_g, first, splits, BLOCK_G, BLOCK_S)
        b_count = _pixels(first + tl.arange(0, BLOCK_S), HW, BLOCK_P)[:, None]
        before = first * BLOCK_P
        count = tl.minimum(HW - before, BLOCK_S * BLOCK_P).to(tl.float32)
        b_mean_b = tl.sum(b_mean_s * b_count, 0) / count
        b_deviation = b_mean_s - b_mean_b[None, :]
        b_delta = b_mean_b - b_mean
        share = count / (before + count)
        b_m2 += tl.sum(b_m2_s + b_deviation * b_deviation * (b_count * CG), 0)
        b_m2 += b_delta * b_delta * (before * share * CG)
        b_mean += b_delta * share
    return b_mean, b_m2


@triton.jit
def _group_sums(p_sums, b_g, first, splits, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr):
    """[BLOCK_S, BLOCK_G]: the two sums of some splits, 0 past the last."""
    b_split = first + tl.arange(0, BLOCK_S)
    b_at = b_split[:, None] * (2 * BLOCK_G) + b_g[None, :]
    m_split = (b_split < splits)[:, None]
    b_first = tl.load(p_sums + b_at, mask=m_split, other=0.0)
    return b_first, tl.load(p_sums + BLOCK_G + b_at, mask=m_split, other=0.0)


@triton.jit
def forward_once(
    p_x, p_residual, p_pre_bias, p_weight, p_bias, p_scale, p_shift, p_seed,
    p_y, p_sum, p_mean, p_rstd, p_partial, p_arrived,
    samples, slabs, splits, lag, pre_bias_row, scale_row, shift_row, c_units, hw_units,
    num_groups, eps, threshold, keep_scale,
    VEC_C: tl.constexpr, VEC_P: tl.constexpr, CG: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    SLAB_GROUPS: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Statistics and y; grid (2 * (N + lag) * slabs * splits,).

    p_partial: (N, slabs, splits, 2, BLOCK_G), mean and m2 of each tile's groups. p_arrived:
    (N, slabs), zeros.
    """
    tasks = slabs * splits
    turn = tl.program_id(0) % (2 * tasks)
    normalises = turn >= tasks
    sample = tl.program_id(0) // (2 * tasks) - tl.where(normalises, lag, 0)
    if (sample < 0) | (sample >= samples):
        return
    # Neighbours in memory follow one another.
    slab, split = turn % slabs, turn % tasks // slabs
    n = sample.to(tl.int64)
    C, HW = c_units * VEC_C, hw_units * VEC_P
    first_c = slab * (SLAB_GROUPS * CG)
    b_slot = tl.arange(0, BLOCK_C)
    b_c = first_c + b_slot
    m_c = (b_slot < SLAB_GROUPS * CG) & (b_c < C)
    start = n * C * HW
    p_x += start
    p_y += start
    if p_residual is not None:
        p_residual += start
    if p_sum is not None:
        p_sum += start
    b_p = split * BLOCK_P + tl.arange(0, BLOCK_P)
    b_offsets = _offsets(b_p, b_c, C, HW, CHANNELS_LAST)
    m_tile = (b_p < HW)[:, None] & m_c[None, :]
    b_s = _load_sum(p_x, p_residual, b_offsets, m_tile)
    b_pre = _slab(p_pre_bias, n * pre_bias_row, b_c, m_c, 0.0)
    p_arrived += sample * slabs + slab

    if normalises:
        _, b_gain, b_offset = _affine(
            p_weight, p_bias, p_scale, p_shift, scale_row, shift_row, n, b_c, m_c
        )
        # Until the last program to arrive has done so a second time, with the results.
        while tl.atomic_add(p_arrived, 0, sem="acquire") <= splits:
            pass
        b_mean = tl.load(p_mean + n * num_groups + b_c // CG, mask=m_c, other=0.0)
        b_rstd = tl.load(p_rstd + n * num_groups + b_c // CG, mask=m_c, other=0.0)
        b_gain *= b_rstd
        b_shift = b_pre - b_mean
        b_offset = _with_shift(p_x, b_shift, b_gain, b_offset)
        _finish(
            b_s, b_offsets, m_tile, b_pre, b_shift, b_gain, b_offset, p_y, p_sum,
            p_seed, threshold, keep_scale, n, first_c, b_p, C, HW, SILU, BLOCK_P, BLOCK_C,
        )  # fmt: skip
    else:
        b_g = tl.arange(0, BLOCK_G)
        m_members = _members(CG, BLOCK_C, BLOCK_G)
        pixels = _pixels(split, HW, BLOCK_P)
        b_mean_c, b_m2_c = _combine_lanes(b_s, b_s * 0.0, (b_p < HW).to(tl.float32), pixels)
        b_mean_c += b_pre
        b_mean_g = _per_group(b_mean_c, m_members) / CG
        b_deviation = b_mean_c - _per_channel(b_mean_g, m_members)
        p_sums = p_partial + (n * slabs + slab) * splits * (2 * BLOCK_G)
        tl.store(p_sums + split * (2 * BLOCK_G) + b_g, b_mean_g)
        b_m2_g = _per_group(b_m2_c + b_deviation * b_deviation * pixels, m_members)
        tl.store(p_sums + split * (2 * BLOCK_G) + BLOCK_G + b_g, b_m2_g)
        if _arrive(p_arrived) == splits - 1:
            b_mean_g, b_m2_g = _statistics(p_sums, b_g, splits, HW, CG, BLOCK_P, BLOCK_G, BLOCK_S)
            row = n * num_groups + slab * SLAB_GROUPS
            m_g = (b_g < SLAB_GROUPS) & (slab * SLAB_GROUPS + b_g < num_groups)
            tl.store(p_mean + row + b_g, b_mean_g, mask=m_g)
            tl.store(p_rstd + row + b_g, tl.rsqrt(b_m2_g / (CG * HW) + eps), mask=m_g)
            _arrive(p_arrived)
