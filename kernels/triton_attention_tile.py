"""Triton attention for short sequences: all keys of a head lie in one tile, plain softmax.

`triton_attention.py` chooses among the kernels and launches them. Rows of a tile are tokens; where
HEADS > 1, a tile holds that many (sample, head) pairs below each other, BLOCK / HEADS rows each,
and the scores between different pairs are masked. The backward is one kernel that reads q, k, v and
the gradient of o once, recomputes the probabilities and writes all three gradients: no atomics.

Names: p_ pointer, b_ tile or vector of a block, m_ mask; sequence = sample * num_heads + head. Of a
tensor x, x_b, x_h and x_s are the strides of sample, head and token in units of VEC elements, which
shows the compiler that rows are aligned; its stride along the head dimension is 1. lse holds
log2(sum(2^s)) of a row's scores s = q k^T * scale * log2(e).
"""

import triton
import triton.language as tl

SIZES = ("sequences", "num_heads", "queries", "keys")


def strides(*names: str) -> tuple[str, ...]:
    """Name the stride arguments of tensors."""
    return tuple(f"{name}_{axis}" for name in names for axis in "bhs")


@triton.jit
def pointers(
    p_x, sequence, b_token, b_d, num_heads, x_b, x_h, x_s,
    VEC: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Of the elements [token, d]; sequence is a scalar, or one for each row where HEADS > 1."""
    sample = (sequence // num_heads).to(tl.int64)
    head = (sequence % num_heads).to(tl.int64)
    p_x += (sample * x_b + head * x_h) * VEC
    # The launcher makes sure that the offsets within a tile fit into 32 bits.
    b_offset = (b_token * (x_s * VEC))[:, None] + b_d[None, :]
    if HEADS == 1:  # noqa: SIM108 - compiled, HEADS decides the type of p_x
        p_tile = p_x + b_offset
    else:
        p_tile = p_x[:, None] + b_offset
    return p_tile


@triton.jit
def mask(m_row, b_d, D: tl.constexpr):
    """Rows that exist and columns below D; comparing with a constant keeps the loads vectors."""
    return m_row[:, None] & (b_d < D)[None, :]


@triton.jit
def _place(first, b_row, length, sequences, BLOCK: tl.constexpr, HEADS: tl.constexpr):
    """(sequence, token, mask) of the rows of a tile whose first sequence is `first`."""
    if HEADS == 1:
        sequence = first
        b_token = b_row
        m_row = b_row < length
    else:
        sequence = first + b_row // (BLOCK // HEADS)
        b_token = b_row % (BLOCK // HEADS)
        m_row = (b_token < length) & (sequence < sequences)
    return sequence, b_token, m_row


@triton.jit
def _pairs(
    b_row, b_column, m_column,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Scores that count: of keys that exist, between rows of the same head."""
    m_pair = m_column
    if HEADS > 1:
        m_pair = m_pair & (b_row // (ROWS // HEADS) == b_column // (COLUMNS // HEADS))
    return m_pair


@triton.jit(do_not_specialize=(*strides("q", "k", "v", "o"), *SIZES))
def forward_tile(
    p_q, p_k, p_v, p_o, p_lse,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, o_b, o_h, o_s,
    sequences, num_heads, queries, keys, scale_log2,
    D: tl.constexpr, VEC: tl.constexpr, HEADS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, NEGATIVE: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """o [queries, D] and lse of BLOCK_M queries; keys <= BLOCK_N / HEADS."""
    if HEADS == 1:
        blocks = tl.cdiv(queries, BLOCK_M)
        first = tl.program_id(0) // blocks
        start = tl.program_id(0) % blocks * BLOCK_M
    else:
        first = tl.program_id(0) * HEADS
        start = 0
    b_m = tl.arange(0, BLOCK_M)
    b_n = tl.arange(0, BLOCK_N)
    b_d = tl.arange(0, BLOCK_D)
    sequence_m, b_query, m_m = _place(first, start + b_m, queries, sequences, BLOCK_M, HEADS)
    sequence_n, b_key, m_n = _place(first, b_n, keys, sequences, BLOCK_N, HEADS)
    m_queries = mask(m_m, b_d, D)
    m_keys = mask(m_n, b_d, D)

    p_q = pointers(p_q, sequence_m, b_query, b_d, num_heads, q_b, q_h, q_s, VEC, HEADS)
    p_k = pointers(p_k, sequence_n, b_key, b_d, num_heads, k_b, k_h, k_s, VEC, HEADS)
    p_v = pointers(p_v, sequence_n, b_key, b_d, num_heads, v_b, v_h, v_s, VEC, HEADS)
    b_q = tl.load(p_q, mask=m_queries, other=0.0)  # [BLOCK_M, BLOCK_D]
    b_k = tl.load(p_k, mask=m_keys, other=0.0)  # [BLOCK_N, BLOCK_D]

    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
    if NEGATIVE:
        b_s = -b_s
    if MASKED:
        m_pair = _pairs(b_m[:, None], b_n[None, :], m_n[None, :], BLOCK_M, BLOCK_N, HEADS)
        b_s = tl.where(m_pair, b_s, float("-inf"))
    b_max = tl.max(b_s, 1) * scale_log2
    if HEADS > 1:
        # Rows of a sequence that does not exist have no key; they are not stored.
        b_max = tl.where(m_m, b_max, 0.0)
    b_p = tl.exp2(b_s * scale_log2 - b_max[:, None])
    b_sum = tl.sum(b_p, 1)
    # Loaded late: beside the keys it would not fit in the registers of sm_80.
    b_v = tl.load(p_v, mask=m_keys, other=0.0)  # [BLOCK_N, BLOCK_D]
    b_o = tl.dot(b_p.to(b_v.dtype), b_v, input_precision=PRECISION) / b_sum[:, None]

    p_o = pointers(p_o, sequence_m, b_query, b_d, num_heads, o_b, o_h, o_s, VEC, HEADS)
    tl.store(p_o, b_o.to(p_o.dtype.element_ty), mask=m_queries)
    b_row = sequence_m.to(tl.int64) * queries + b_query
    tl.store(p_lse + b_row, b_max + tl.log2(b_sum), mask=m_m)


@triton.jit(do_not_specialize=(*strides("q", "k", "v", "do", "dq", "dk"), *SIZES))
def backward_tile(
    p_q, p_k, p_v, p_do, p_lse, p_dq, p_dk, p_dv,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, do_b, do_h, do_s, dq_b, dq_h, dq_s,
    dk_b, dk_h, dk_s,
    sequences, num_heads, queries, keys, scale, scale_log2,
    D: tl.constexpr, VEC: tl.constexpr, HEADS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, dk and dv of HEADS sequences; queries <= BLOCK_M / HEADS and keys <= BLOCK_N / HEADS.

    The head dimension is taken in chunks: the scores of all chunks first, then the gradients chunk
    by chunk, from the last one, which is still there. Scores are held as [keys, queries]: that is
    how two of the three products that follow need them.
    """
    first = tl.program_id(0) * HEADS
    b_m = tl.arange(0, BLOCK_M)
    b_n = tl.arange(0, BLOCK_N)
    sequence_m, b_query, m_m = _place(first, b_m, queries, sequences, BLOCK_M, HEADS)
    sequence_n, b_key, m_n = _place(first, b_n, keys, sequences, BLOCK_N, HEADS)
    b_c = tl.arange(0, CHUNK)
    p_q = pointers(p_q, sequence_m, b_query, b_c, num_heads, q_b, q_h, q_s, VEC, HEADS)
    p_k = pointers(p_k, sequence_n, b_key, b_c, num_heads, k_b, k_h, k_s, VEC, HEADS)
    p_v = pointers(p_v, sequence_n, b_key, b_c, num_heads, v_b, v_h, v_s, VEC, HEADS)
    p_do = pointers(p_do, sequence_m, b_query, b_c, num_heads, do_b, do_h, do_s, VEC, HEADS)
    p_dq = pointers(p_dq, sequence_m, b_query, b_c, num_heads, dq_b, dq_h, dq_s, VEC, HEADS)
    p_dk = pointers(p_dk, sequence_n, b_key, b_c, num_heads, dk_b, dk_h, dk_s, VEC, HEADS)
    p_dv = pointers(p_dv, sequence_n, b_key, b_c, num_heads, dk_b, dk_h, dk_s, VEC, HEADS)

    b_s = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    b_dp = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for start in tl.static_range(0, BLOCK_D, CHUNK):
        m_queries = mask(m_m, start + b_c, D)
        m_keys = mask(m_n, start + b_c, D)
        b_q = tl.load(p_q + start, mask=m_queries, other=0.0)
        b_k = tl.load(p_k + start, mask=m_keys, other=0.0)
        b_s = tl.dot(b_k, tl.trans(b_q), b_s, input_precision=PRECISION)
        b_do = tl.load(p_do + start, mask=m_queries, other=0.0)
        b_v = tl.load(p_v + start, mask=m_keys, other=0.0)
        b_dp = tl.dot(b_v, tl.trans(b_do), b_dp, input_precision=PRECISION)

    b_lse = tl.load(p_lse + sequence_m.to(tl.int64) * queries + b_query, mask=m_m, other=0.0)
    b_p = tl.exp2(b_s * scale_log2 - b_lse[None, :])
    if MASKED:
        # Queries that do not exist are rows of zeros in q and do, and add nothing.
        m_pair = _pairs(b_n[:, None], b_m[None, :], m_n[:, None], BLOCK_N, BLOCK_M, HEADS)
        b_p = tl.where(m_pair, b_p, 0.0)
    # A large lse is rounded so coarsely that p does not add up to 1, and where one key has nearly
    # all weight, dp - delta must still vanish. The sum is 0 for queries of no sequence only.
    b_delta = tl.sum(b_p * b_dp, 0) / tl.maximum(tl.sum(b_p, 0), 0.5)
    b_ds = (b_p * (b_dp - b_delta[None, :])).to(b_q.dtype)
    b_p = b_p.to(b_q.dtype)
    b_ds_of_queries = tl.trans(b_ds)

    for done in tl.static_range(0, BLOCK_D, CHUNK):
        start = BLOCK_D - CHUNK - done
        m_queries = mask(m_m, start + b_c, D)
        m_keys = mask(m_n, start + b_c, D)
        if done > 0:
            b_q = tl.load(p_q + start, mask=m_queries, other=0.0)
            b_k = tl.load(p_k + start, mask=m_keys, other=0.0)
            b_do = tl.load(p_do + start, mask=m_queries, other=0.0)
        b_dv = tl.dot(b_p, b_do, input_precision=PRECISION)
        tl.store(p_dv + start, b_dv.to(b_q.dtype), mask=m_keys)
        b_dk = tl.dot(b_ds, b_q, input_precision=PRECISION) * scale
        tl.store(p_dk + start, b_dk.to(b_q.dtype), mask=m_keys)
        b_dq = tl.dot(b_ds_of_queries, b_k, input_precision=PRECISION) * scale
        tl.store(p_dq + start, b_dq.to(b_q.dtype), mask=m_queries)
