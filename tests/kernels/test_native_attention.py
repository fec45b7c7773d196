"""The C++ attention: every instruction set, block border and scale, canaries, and threads.

What all backends share is in test_attention.py.
"""

import pytest
import torch

from ddb_fast.kernels import attention, attention_qkv, native

REASONS = native.why_not("attention")
pytestmark = pytest.mark.skipif(bool(REASONS), reason="; ".join(REASONS))
LEVELS = ("baseline", "avx2", "avx512")
levels = pytest.mark.parametrize("level", range(3), ids=LEVELS)
# Errors of outputs and gradients over the truth's RMS: fp32 sums, and a rounding of p and of dS in
# bf16 beside those of the operands and results.
BOUNDS = {torch.float32: 3e-6, torch.float16: 6e-4, torch.bfloat16: 6e-3}
dtypes = pytest.mark.parametrize("dtype", BOUNDS, ids=str)
# (B, H, queries, keys, D): below, at and beside the widths of vectors, panels and tiles; blocks of
# 96 and 128 queries and of 96 and 256 keys with a rest; odd D and an odd number of keys, whose last
# one has no partner; keys enough to be split among tasks.
SHAPES = (
    (2, 1, 1, 1, 1),
    (1, 2, 5, 7, 3),
    (1, 2, 64, 64, 40),
    (2, 1, 97, 257, 33),
    (1, 1, 96, 256, 64),
    (1, 1, 129, 95, 16),
    (1, 1, 130, 193, 128),
    (1, 1, 40, 300, 256),
    (1, 2, 33, 1601, 17),
)


@pytest.fixture
def at_level():
    """Choose an instruction set or skip; the best comes back."""
    best = torch.ops.ddb_fast_native.set_level(0)

    def choose(level):
        if level > best:
            pytest.skip(f"this CPU has no {LEVELS[level]}")
        torch.ops.ddb_fast_native.set_level(level)

    yield choose
    torch.ops.ddb_fast_native.set_level(best)


def draw(shape, dtype=torch.float32, size=1.0, seed=0):
    """q, k, v and the gradient of o."""
    b, h, queries, keys, d = shape
    generator = torch.Generator().manual_seed(seed)
    lengths = (queries, keys, keys, queries)
    q, k, v, upstream = (
        torch.randn(b, h, n, d, generator=generator, dtype=torch.float64) for n in lengths
    )
    return [(q * size).to(dtype), k.to(dtype), v.to(dtype), upstream.to(dtype)]


def plain(q, k, v, scale):
    return torch.softmax(q @ k.mT * scale, -1) @ v


def results(function, q, k, v, upstream):
    """o and the gradients of q, k and v."""
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    o = function(*leaves)
    return [o.detach(), *torch.autograd.grad(o, leaves, upstream)]


def native_and_true(tensors, scale):
    ours = results(lambda q, k, v: attention(q, k, v, scale=scale, backend="native"), *tensors)
    doubles = [t.double() for t in tensors]
    return zip(
        ("o", "dq", "dk", "dv"), ours, results(lambda *t: plain(*t, scale), *doubles), strict=True
    )


def error(actual, truth):
    # One key is attended to alone: dq and dk are 0, and the operands of size 1.
    floor = 1.0 if truth.abs().max() < 1e-12 else 0.0
    difference = (actual.double() - truth).square().mean().sqrt()
    return (difference / truth.square().mean().sqrt().clamp_min(floor)).item()


@levels
def test_rows_whose_scores_are_all_far_below_zero(at_level, level):
    """Beside the last key there is room in a vector, whose zeros must not become the largest."""
    at_level(level)
    q, k, v, upstream = draw((1, 2, 20, 21, 16))
    tensors = [30 * q.abs(), -10 * k.abs(), v, upstream]
    for name, actual, truth in native_and_true(tensors, 0.25):
        assert actual.isfinite().all() and error(actual, truth) <= 1e-3, name


@levels
@dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_fp64(at_level, level, dtype, shape):
    at_level(level)
    for name, actual, truth in native_and_true(draw(shape, dtype), shape[-1] ** -0.5):
        assert actual.dtype == dtype
        assert error(actual, truth) <= BOUNDS[dtype], name


@levels
@pytest.mark.parametrize("scale", (0.0, -0.3, 2.5))
def test_any_scale(at_level, level, scale):
    at_level(level)
    tensors = draw((1, 2, 50, 70, 24))
    for name, actual, truth in native_and_true(tensors, scale):
        # With a scale of 0 the gradients of q and k are 0 to the bit.
        assert error(actual, truth) <= 5e-6, name


@levels
def test_scores_in_the_thousands(at_level, level):
    """A weight is near 1 or 0; what is left of it in dS must come from weights that add up to 1."""
    at_level(level)
    tensors = draw((1, 1, 40, 64, 32), size=300.0)
    for name, actual, truth in native_and_true(tensors, 1.0):
        # Scores of 2,000 have an absolute error of 2e-4 in fp32, and weights the relative one.
        assert error(actual, truth) <= 2e-3, name
    o, dq, *_ = (pair[1] for pair in native_and_true(tensors, 1.0))
    assert o.isfinite().all() and dq.isfinite().all()


@levels
def test_maxima_that_grow_block_by_block(at_level, level):
    """Each block of keys raises the largest score, so earlier sums shrink; and the reverse."""
    at_level(level)
    for sign in (1, -1):
        q, k, v, upstream = draw((1, 1, 10, 1000, 8))
        q = q.abs()
        k = k + sign * torch.linspace(-30, 30, 1000)[:, None]
        for name, actual, truth in native_and_true((q, k, v, upstream), 1.0):
            assert error(actual, truth) <= 5e-5, name


@dtypes
def test_the_same_bits_from_any_number_of_threads(dtype):
    tensors = draw((1, 2, 300, 1100, 24), dtype)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            found.append(results(lambda *t: attention(*t, backend="native"), *tensors))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def fenced(tensor, fence=64):
    """The same strides and values amid NaN, and a check that nothing outside was written."""
    size = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    buffer = torch.full((size + 2 * fence,), float("nan"), dtype=tensor.dtype)
    inside = buffer.as_strided(tensor.shape, tensor.stride(), fence)
    inside.copy_(tensor)
    covered = torch.zeros(len(buffer), dtype=torch.bool)
    covered.as_strided(tensor.shape, tensor.stride(), fence).fill_(True)

    def untouched():
        assert buffer[~covered].isnan().all()

    return inside, untouched


@levels
@dtypes
@pytest.mark.parametrize("heads_inside", (False, True))
def test_nothing_outside_the_tensors_is_read_or_written(at_level, level, dtype, heads_inside):
    at_level(level)
    tensors = draw((2, 2, 37, 101, 19), dtype)
    if heads_inside:  # rows of all heads, with a gap between tokens
        tensors = [
            torch.nn.functional.pad(t.transpose(1, 2), (0, 5))[..., :19].transpose(1, 2)
            for t in tensors
        ]
    q, k, v, upstream = tensors
    outputs = [torch.zeros_like(t) for t in (q, q, k, v)]
    statistics = torch.zeros(2, 2, 37, 2)
    (q, k, v, upstream, o, dq, dk, dv, statistics), checks = zip(
        *map(fenced, (q, k, v, upstream, *outputs, statistics)), strict=True
    )
    op = torch.ops.ddb_fast_native
    op.attention(q, k, v, o, statistics, 0.2)
    op.attention_backward(upstream, q, k, v, o, statistics, dq, dk, dv, 0.2)
    for check in checks:
        check()
    doubles = [t.double() for t in (q, k, v, upstream)]
    truth = results(lambda *t: plain(*t, 0.2), *doubles)
    for actual, expected in zip((o, dq, dk, dv), truth, strict=True):
        assert error(actual, expected) <= BOUNDS[dtype]


def test_infinite_and_missing_values_stay_in_their_head():
    for bad in (float("nan"), float("inf")):
        q, k, v, upstream = draw((1, 3, 20, 30, 8))
        k[0, 1, 7, 3] = bad
        o, *gradients = results(lambda *t: attention(*t, backend="native"), q, k, v, upstream)
        assert not o[0, 1].isfinite().all()
        for tensor in (o, *gradients):
            assert tensor[0, [0, 2]].isfinite().all()


@pytest.mark.parametrize("packed", (False, True))
def test_opcheck(packed):
    op = torch.ops.ddb_fast.attention_native.default
    if packed:
        arguments = (torch.randn(2, 6, 48, requires_grad=True), None, None, 2, 0.3)
    else:
        q, k, v, _ = draw((2, 2, 6, 7, 8))
        arguments = (*(t.requires_grad_() for t in (q, k, v)), 0, 0.3)
    torch.library.opcheck(op, arguments)


def test_automatic_takes_it_on_a_cpu():
    qkv = torch.randn(2, 6, 48)
    assert torch.equal(attention_qkv(qkv, 2), attention_qkv(qkv, 2, backend="native"))
    double = attention_qkv(qkv.double(), 2)
    assert torch.equal(double, attention_qkv(qkv.double(), 2, backend="torch"))
