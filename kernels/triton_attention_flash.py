"""Triton attention for sequences of any length: online softmax, scores never leave the chip.

Dao 2023, FlashAttention-2, algorithms 1 and 2, but with two kernels for the backward, so that it
needs no atomics and every run gives the same bits: dq walks over the keys and leaves
delta = sum(do * o) behind, dk and dv walk over the queries. Names as in `triton_attention_tile.py`.
"""

import triton
import triton.language as tl

from .triton_attention_tile import mask, pointers, strides

SIZES = ("num_heads", "queries", "keys")


@triton.jit
def _block(length, BLOCK: tl.constexpr):
    """(sequence, first token) of this program's block of tokens."""
    blocks = tl.cdiv(length, BLOCK)
    return tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK


@triton.jit
def _tokens(p_x, m_row, b_d, D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """Rows of a step of the walk; 0 where there is none."""
    if MASKED:
        b_x = tl.load(p_x, mask=mask(m_row, b_d, D), other=0.0)
    elif D != BLOCK_D:
        b_x = tl.load(p_x, mask=(b_d < D)[None, :], other=0.0)
    else:
        b_x = tl.load(p_x)
    return b_x


@triton.jit(do_not_specialize=(*strides("q", "k", "v", "o"), *SIZES))
def forward_flash(
    p_q, p_k, p_v, p_o, p_lse,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, o_b, o_h, o_s,
    num_heads, queries, keys, scale_log2,
    D: tl.constexpr, VEC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, NEGATIVE: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """o [queries, D] and lse of BLOCK_M queries."""
    sequence, first = _block(queries, BLOCK_M)
    b_m = tl.arange(0, BLOCK_M)
    b_n = tl.arange(0, BLOCK_N)
    b_d = tl.arange(0, BLOCK_D)
    m_m = first + b_m < queries
    m_queries = mask(m_m, b_d, D)
    p_q += first.to(tl.int64) * q_s * VEC
    p_q = pointers(p_q, sequence, b_m, b_d, num_heads, q_b, q_h, q_s, VEC, 1)
    p_k = pointers(p_k, sequence, b_n, b_d, num_heads, k_b, k_h, k_s, VEC, 1)
    p_v = pointers(p_v, sequence, b_n, b_d, num_heads, v_b, v_h, v_s, VEC, 1)
    b_q = tl.load(p_q, mask=m_queries, other=0.0)

    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    b_o = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, keys, BLOCK_N):
        b_k = _tokens(p_k, start + b_n < keys, b_d, D, BLOCK_D, MASKED)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        if NEGATIVE:
            b_s = -b_s
        if MASKED:
            b_s = tl.where((start + b_n < keys)[None, :], b_s, float("-inf"))
        b_new_max = tl.maximum(b_max, tl.max(b_s, 1) * scale_log2)
        b_p = tl.exp2(b_s * scale_log2 - b_new_max[:, None])
        b_decay = tl.exp2(b_max - b_new_max)
        b_sum = b_sum * b_decay + tl.sum(b_p, 1)
        b_v = _tokens(p_v, start + b_n < keys, b_d, D, BLOCK_D, MASKED)
        b_o = b_o * b_decay[:, None]
        b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o, input_precision=PRECISION)
        b_max = b_new_max
        p_k += BLOCK_N * (k_s * VEC)
        p_v += BLOCK_N * (v_s * VEC)

    p_o += first.to(tl.int64) * o_s * VEC
    p_o = pointers(p_o, sequence, b_m, b_d, num_heads, o_b, o_h, o_s, VEC, 1)
    tl.store(p_o, (b_o / b_sum[:, None]).to(p_o.dtype.element_ty), mask=m_queries)
    b_row = sequence.to(tl.int64) * queries + first + b_m
    tl.store(p_lse + b_row, b_max + tl.log2(b_sum), mask=m_m)


@triton.jit(do_not_specialize=(*strides("q", "k", "v", "o", "do", "dq"), *SIZES))
def backward_queries(
    p_q, p_k, p_v, p_o, p_do, p_lse, p_delta, p_dq,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, o_b, o_h, o_s, do_b, do_h, do_s,
    dq_b, dq_h, dq_s,
    num_heads, queries, keys, scale, scale_log2,
    D: tl.constexpr, VEC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq [queries, D] and delta of BLOCK_M queries."""
    sequence, first = _block(queries, BLOCK_M)
    b_m = tl.arange(0, BLOCK_M)
    b_n = tl.arange(0, BLOCK_N)
    b_d = tl.arange(0, BLOCK_D)
    m_m = first + b_m < queries
    m_queries = mask(m_m, b_d, D)
    skipped = first.to(tl.int64) * VEC
    p_q = pointers(p_q + skipped * q_s, sequence, b_m, b_d, num_heads, q_b, q_h, q_s, VEC, 1)
    p_o = pointers(p_o + skipped * o_s, sequence, b_m, b_d, num_heads, o_b, o_h, o_s, VEC, 1)
    p_do = pointers(p_do + skipped * do_s, sequence, b_m, b_d, num_heads, do_b, do_h, do_s, VEC, 1)
    p_k = pointers(p_k, sequence, b_n, b_d, num_heads, k_b, k_h, k_s, VEC, 1)
    p_v = pointers(p_v, sequence, b_n, b_d, num_heads, v_b, v_h, v_s, VEC, 1)
    b_row = sequence.to(tl.int64) * queries + first + b_m

    b_do = tl.load(p_do, mask=m_queries, other=0.0)
    b_o = tl.load(p_o, mask=m_queries, other=0.0)
    b_delta = tl.sum(b_o.to(tl.float32) * b_do.to(tl.float32), 1)
    tl.store(p_delta + b_row, b_delta, mask=m_m)
    b_q = tl.load(p_q, mask=m_queries, other=0.0)
    b_lse = tl.load(p_lse + b_row, mask=m_m, other=0.0)

    b_dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, keys, BLOCK_N):
        b_k = _tokens(p_k, start + b_n < keys, b_d, D, BLOCK_D, MASKED)
        b_v = _tokens(p_v, start + b_n < keys, b_d, D, BLOCK_D, MASKED)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
        b_p = tl.exp2(b_s * scale_log2 - b_lse[:, None])
        if MASKED:
            # A key that does not exist scores 0, which may be far above its row's lse.
            b_p = tl.where((start + b_n < keys)[None, :], b_p, 0.0)
        b_ds = (b_p * (b_dp - b_delta[:, None])).to(b_k.dtype)
        b_dq = tl.dot(b_ds, b_k, b_dq, input_precision=PRECISION)
        p_k += BLOCK_N * (k_s * VEC)
        p_v += BLOCK_N * (v_s * VEC)

    p_dq = pointers(p_dq + skipped * dq_s, sequence, b_m, b_d, num_heads, dq_b, dq_h, dq_s, VEC, 1)
    tl.store(p_dq, (b_dq * scale).to(p_dq.dtype.element_ty), mask=m_queries)


@triton.jit(do_not_specialize=(*strides("q", "k", "v", "do", "dk"), *SIZES))
def backward_keys(
    p_q, p_k, p_v, p_do, p_lse, p_delta, p_dk, p_dv,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, do_b, do_h, do_s, dk_b, dk_h, dk_s,
    num_heads, queries, keys, scale, scale_log2,
    D: tl.constexpr, VEC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv [keys, D] of BLOCK_N keys.

    Keys that do not exist need no mask: their rows, whatever is in them, are not stored.
    """
    sequence, first = _block(keys, BLOCK_N)
    b_m = tl.arange(0, BLOCK_M)
    b_n = tl.arange(0, BLOCK_N)
    b_d = tl.arange(0, BLOCK_D)
    m_n = first + b_n < keys
    m_keys = mask(m_n, b_d, D)
    skipped = first.to(tl.int64) * VEC
    p_q = pointers(p_q, sequence, b_m, b_d, num_heads, q_b, q_h, q_s, VEC, 1)
    p_do = pointers(p_do, sequence, b_m, b_d, num_heads, do_b, do_h, do_s, VEC, 1)
    p_k = pointers(p_k + skipped * k_s, sequence, b_n, b_d, num_heads, k_b, k_h, k_s, VEC, 1)
    p_v = pointers(p_v + skipped * v_s, sequence, b_n, b_d, num_heads, v_b, v_h, v_s, VEC, 1)
    p_lse += sequence.to(tl.int64) * queries
    p_delta += sequence.to(tl.int64) * queries
    b_k = tl.load(p_k, mask=m_keys, other=0.0)
    b_v = tl.load(p_v, mask=m_keys, other=0.0)

    b_dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in range(0, queries, BLOCK_M):
        m_m = start + b_m < queries
        b_q = _tokens(p_q, m_m, b_d, D, BLOCK_D, MASKED)
        b_do = _tokens(p_do, m_m, b_d, D, BLOCK_D, MASKED)
        b_lse = tl.load(p_lse + start + b_m, mask=m_m, other=0.0)
        b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
        b_p = tl.exp2(b_s * scale_log2 - b_lse[None, :])
        b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision=PRECISION)
        b_delta = tl.load(p_delta + start + b_m, mask=m_m, other=0.0)
        b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)
        b_ds = (b_p * (b_dp - b_delta[None, :])).to(b_q.dtype)
        b_dk = tl.dot(b_ds, b_q, b_dk, input_precision=PRECISION)
        p_q += BLOCK_M * (q_s * VEC)
        p_do += BLOCK_M * (do_s * VEC)

    p_dk = pointers(p_dk + skipped * dk_s, sequence, b_n, b_d, num_heads, dk_b, dk_h, dk_s, VEC, 1)
    p_dv = pointers(p_dv + skipped * dk_s, sequence, b_n, b_d, num_heads, dk_b, dk_h, dk_s, VEC, 1)
    tl.store(p_dk, (b_dk * scale).to(p_dk.dtype.element_ty), mask=m_keys)
    tl.store(p_dv, b_dv.to(p_dv.dtype.element_ty), mask=m_keys)
