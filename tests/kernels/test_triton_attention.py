"""What only Triton's attention has: three ways to cut a call, fenced memory, the registered op.

Run in the interpreter. `usual` is what a call gets by itself; `one_head` and `flash` make every
call, however short, take the kernel of one head's tile or the walk over blocks of 16 tokens.
"""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from ddb_fast.kernels import attention, attention_qkv, launch, triton_backend
from ddb_fast.kernels import triton_attention as module
from memory import apart, fenced, poisoned

if module_reasons := triton_backend.why_not("attention"):
    pytest.skip("; ".join(module_reasons), allow_module_level=True)

HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture(params=("usual", "one_head", "flash"))
def cut(request, monkeypatch):
    """Cut every call in one way; where two blocks of queries are needed, they are of 16."""
    if request.param == "usual":
        return request.param
    walked = module.Blocks(16, 16, 4)

    def forward_blocks(dtype, queries, keys, head_dim, device):
        if request.param == "flash":
            return walked
        return module.Blocks(16, max(16, launch.power_of_two(keys)), 4, heads=1)

    def backward_blocks(dtype, queries, keys, head_dim, device):
        if request.param == "flash":
            return walked, walked
        m, n = (max(16, launch.power_of_two(length)) for length in (queries, keys))
        blocks = module.Blocks(m, n, 4, heads=1, chunk=16)
        return blocks, blocks

    monkeypatch.setattr(module, "forward_blocks", forward_blocks)
    monkeypatch.setattr(module, "backward_blocks", backward_blocks)
    return request.param


def draw(b, h, queries, keys, d, dtype=torch.float32):
    """q, k, v and the gradient of o."""
    sizes = ((b, h, queries, d), (b, h, keys, d), (b, h, keys, d), (b, h, queries, d))
    return [torch.randn(size).to(dtype) for size in sizes]


def run(tensors, backend, *, scale=None, dtype=None):
    """o, dq, dk and dv."""
    *operands, upstream = (t.detach().to(dtype or t.dtype) for t in tensors)
    operands = [t.requires_grad_() for t in operands]
    o = attention(*operands, scale=scale, backend=backend)
    return (o, *torch.autograd.grad(o, operands, upstream))


def plain(tensors, scale=None, dtype=torch.float64):
    """The same by autograd through the formula; in fp64 the truth."""
    *operands, upstream = (t.detach().to(dtype) for t in tensors)
    q, k, v = (t.requires_grad_() for t in operands)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    o = torch.softmax(q @ k.mT * scale, -1) @ v
    return (o, *torch.autograd.grad(o, (q, k, v), upstream))


def errors(actual, truth, floor=1e-30):
    def rms(x):
        return x.double().square().mean().sqrt()

    return [
        (rms(a.double() - t.double()) / rms(t).clamp_min(floor)).item()
        for a, t in zip(actual, truth, strict=True)
    ]


def assert_exact(actual, truth, floor=1e-30):
    o, *gradients = errors(actual, truth, floor)
    assert o <= 3e-6
    assert max(gradients) <= 6e-6


# Heads that do not fill the last tile; blocks of queries and keys that are not full.
@pytest.mark.parametrize(
    ("b", "h", "queries", "keys", "d"),
    (
        (1, 3, 5, 5, 8),
        (3, 3, 16, 16, 16),
        (2, 1, 33, 33, 40),
        (1, 2, 20, 7, 24),
        (1, 2, 7, 20, 8),
        (1, 2, 16, 20, 8),
        (1, 2, 20, 16, 8),
        (1, 1, 1, 40, 16),
        (1, 2, 40, 1, 16),
    ),
)
def test_every_way_against_fp64(cut, b, h, queries, keys, d):
    tensors = draw(b, h, queries, keys, d)
    # With one key, dq and dk are 0: the error is held against operands of size 1.
    assert_exact(run(tensors, "triton"), plain(tensors), floor=1.0 if keys == 1 else 1e-30)


@pytest.mark.parametrize("scale", (-0.3, 0.0, 1e-46, 2.5))
def test_any_scale(cut, scale):
    """One of 1e-46 is 0 in fp32."""
    tensors = draw(2, 3, 9, 21, 16)
    assert_exact(run(tensors, "triton", scale=scale), plain(tensors, scale), floor=1e-3)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_precision(cut, dtype):
    tensors = draw(2, 2, 40, 24, 32, dtype)
    truth, usual = plain(tensors), plain(tensors, dtype=dtype)
    pairs = zip(errors(run(tensors, "triton"), truth), errors(usual, truth), strict=True)
    for i, (ours, theirs) in enumerate(pairs):
        assert ours <= max(1.25 * theirs, 4e-3 if i else 3e-3)


# As the U-Nets have them, by the choice that a GPU would make in half precision and in fp32. Their
# 1024 tokens are cut as fewer are, which `test_long_calls_are_cut_alike` holds to.
@pytest.mark.parametrize(
    ("queries", "d", "dtype"),
    (
        (64, 256, torch.bfloat16),
        (100, 96, torch.float32),
        (100, 128, torch.bfloat16),
        (256, 8, torch.bfloat16),
        (256, 64, torch.float32),
        (256, 256, torch.bfloat16),
        (384, 64, torch.bfloat16),
        (320, 40, torch.float32),
    ),
)
def test_lengths_of_networks(queries, d, dtype):
    tensors = draw(1, 2 if queries <= 256 else 1, queries, queries, d, dtype)
    truth = plain(tensors)
    if dtype == torch.float32:
        assert_exact(run(tensors, "triton"), truth)
        return
    usual = errors(plain(tensors, dtype=dtype), truth)
    for ours, theirs in zip(errors(run(tensors, "triton"), truth), usual, strict=True):
        assert ours <= max(1.25 * theirs, 3e-3)


@pytest.mark.parametrize(
    ("tokens", "d", "dtype"), ((384, 64, torch.bfloat16), (320, 40, torch.float32))
)
def test_long_calls_are_cut_alike(tokens, d, dtype):
    for choose in (module.forward_blocks, module.backward_blocks):
        short, long = (
            choose(dtype, length, length, d, torch.device("cpu")) for length in (tokens, 1024)
        )
        assert short == long


def rounding(tensors):
    """What rounding its score once in fp32 does to a weight, 2^score: as many parts of it.

    The backward pass computes scores anew, and in which order the machine's product adds up, so
    which way they are rounded, is not the forward pass's.
    """
    q, k = (t.double() for t in tensors[:2])
    scores = q @ k.mT * q.shape[3] ** -0.5 * math.log2(math.e)
    return scores.abs().max().item() * 2.0**-24


def test_scores_of_any_size(cut):
    """The maximum is subtracted: exp2(1000 * log2(e)) would be infinite."""
    tensors = draw(1, 2, 20, 20, 16)
    tensors[0] *= 300
    truth = plain(tensors)
    usual = errors(plain(tensors, dtype=torch.float32), truth)
    for ours, theirs in zip(errors(run(tensors, "triton"), truth), usual, strict=True):
        assert ours <= max(2 * theirs, rounding(tensors))


def test_rows_whose_scores_are_all_far_below_zero(cut):
    """There a key that does not exist, which scores 0, would get all weight or an infinite one."""
    tensors = draw(1, 2, 20, 20, 16)
    tensors[0] = tensors[0].abs() * 30
    tensors[1] = -tensors[1].abs() * 10
    truth = plain(tensors)
    usual = errors(plain(tensors, dtype=torch.float32), truth, 1.0)
    for ours, theirs in zip(errors(run(tensors, "triton"), truth, 1.0), usual, strict=True):
        assert ours <= max(2 * theirs, rounding(tensors))


def test_two_runs_are_bitwise_equal(cut):
    tensors = draw(2, 3, 40, 24, 16)
    first, second = (run(tensors, "triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_nothing_unwritten_is_read_or_returned(cut):
    tensors = draw(2, 3, 40, 24, 24)
    expected = run(tensors, "triton")
    with poisoned():
        actual = run(tensors, "triton")
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("lengths", ((40, 24), (5, 7), (16, 16)))
def test_nothing_outside_is_read_or_written(cut, lengths, monkeypatch):
    """Heads lie inside of tokens, D is no power of two: what a mask lets through in the middle of a
    tensor is another head's, and shows in the result."""
    tensors = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in draw(2, 3, *lengths, 24)]
    expected = run(tensors, "triton")
    launched = []
    monkeypatch.setattr(module, "launch", fenced(launched, 4096))
    actual = run(tensors, "triton")
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    if cut == "flash":
        assert launched == ["forward_flash", "backward_queries", "backward_keys"]
    else:
        assert launched == ["forward_tile", "backward_tile"]


@pytest.mark.parametrize("lengths", ((40, 24), (5, 7)))
def test_no_program_touches_what_another_writes(cut, lengths, monkeypatch):
    tensors = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in draw(2, 3, *lengths, 8)]
    launched = []
    monkeypatch.setattr(module, "launch", apart(launched))
    assert_exact(run(tensors, "triton"), plain(tensors))
    assert len(launched) == (3 if cut == "flash" else 2)


def test_gradients_lie_like_their_operands(cut):
    """Tokens outside of heads, as a projection leaves them, so that no copy follows."""
    tensors = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in draw(2, 3, 9, 12, 8)]
    o, *gradients = run(tensors, "triton")
    assert o.transpose(1, 2).is_contiguous()
    for gradient in gradients:
        assert gradient.transpose(1, 2).is_contiguous()
    assert_exact((o, *gradients), plain(tensors))


def test_a_gradient_of_any_strides(cut):
    """The expanded gradient of a mean, and one whose head dimension is not the innermost."""
    *operands, upstream = draw(2, 2, 9, 12, 8)
    for gradient in (upstream[:1, :1, :1].expand(2, 2, 9, 8), upstream.mT.contiguous().mT):
        tensors = [*operands, gradient]
        assert_exact(run(tensors, "triton"), plain(tensors))


def test_keys_and_values_that_lie_differently(cut):
    """dk and dv are written with the same strides."""
    q, k, v, upstream = draw(2, 3, 9, 12, 8)
    tensors = [q, k, v.transpose(1, 2).contiguous().transpose(1, 2), upstream]
    assert_exact(run(tensors, "triton"), plain(tensors))


def test_packed_gradients_fill_one_tensor(cut):
    qkv = torch.randn(2, 21, 3 * 2 * 24, requires_grad=True)
    upstream = torch.randn(2, 21, 2 * 24)
    expected = torch.autograd.grad(attention_qkv(qkv, 2, backend="reference"), qkv, upstream)[0]
    with poisoned():
        actual = torch.autograd.grad(attention_qkv(qkv, 2, backend="triton"), qkv, upstream)[0]
    assert errors([actual], [expected])[0] <= 6e-6


@pytest.mark.parametrize("packed", (False, True))
def test_the_registered_ops(packed):
    if packed:
        operands = (torch.randn(2, 5, 48, requires_grad=True), None, None, 2)
    else:
        operands = (*(t.requires_grad_() for t in draw(2, 2, 5, 7, 8)[:3]), 0)
    op = torch.ops.ddb_fast.attention_triton.default
    torch.library.opcheck(op, (*operands, 0.3))
    with torch.no_grad():
        o, lse = op(*operands, 0.3)
        q, k, v, heads = (t.detach() if isinstance(t, torch.Tensor) else t for t in operands)
        backward = torch.ops.ddb_fast.attention_triton_backward.default
        torch.library.opcheck(backward, (torch.randn_like(o), q, k, v, o, lse, heads, 0.3))


def test_a_compiled_call_is_one_op():
    seen = []

    def keep(graph, inputs):
        seen.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph

    torch._dynamo.reset()
    counter = CompileCounterWithBackend(keep)
    compiled = torch.compile(
        lambda q, k, v: attention(q, k, v, backend="triton"), backend=counter, fullgraph=True
    )
    for batch in (2, 3):
        tensors = draw(batch, 2, 5, 5, 8)[:3]
        for t in tensors:
            torch._dynamo.mark_dynamic(t, 0)
        assert torch.equal(compiled(*tensors), attention(*tensors, backend="triton"))
    assert counter.frame_count == 1
    # Besides it there are comparisons of sizes.
    calls = [name for name in seen[0] if "built-in function" not in name]
    assert calls == ["ddb_fast.attention_triton.default"]


def test_refusals():
    q = torch.randn(1, 2, 4, 8)
    with pytest.raises(ValueError, match="fp32, these tensors are fp64"):
        attention(*[q.double()] * 3, backend="triton")
    with pytest.raises(ValueError, match="on meta"):
        attention(*[q.to("meta")] * 3, backend="triton")
    far = torch.empty(1, device="meta").as_strided((1, 1, 300, 8), (0, 0, 2**23, 1))
    assert "8388608 elements apart" in module.why_not("attention", q, far, far)[0]
    # The head dimension is not the innermost: it is copied, and lies side by side then.
    assert module.why_not("attention", q, far.mT, far.mT) == []


SHAPES = {
    "queries": st.integers(1, 5000),
    "keys": st.integers(1, 5000),
    "head_dim": st.sampled_from((1, 8, 16, 24, 32, 40, 64, 72, 96, 128, 160, 256)),
    "dtype": st.sampled_from((torch.float32, *HALVES)),
}


@settings(max_examples=400, deadline=None)
@given(**SHAPES)
def test_blocks_hold_what_their_kernel_assumes(queries, keys, head_dim, dtype):
    case = (dtype, queries, keys, head_dim, torch.device("cpu"))
    forward, backward = module.forward_blocks(*case), module.backward_blocks(*case)
    for blocks in (forward, *backward):
        for size in (blocks.block_m, blocks.block_n, blocks.num_warps, max(1, blocks.heads)):
            assert size >= 1 and size & (size - 1) == 0
        assert min(blocks.block_m, blocks.block_n) >= 16, "a product's least size"
        if blocks.heads:
            assert blocks.block_n // blocks.heads >= keys, "a tile holds all keys of a head"
    if forward.heads > 1:
        assert forward.block_m // forward.heads >= queries
    if backward[0].heads:
        assert backward[0] == backward[1]
        assert backward[0].block_m // backward[0].heads >= queries
        assert head_dim <= 16 or backward[0].chunk >= 16
    assert not backward[1].heads or backward[0].heads


@pytest.mark.parametrize("heads", (0, 1))
@pytest.mark.parametrize("odd", ("q", "k", "v", "o", "do", "dq", "dk"))
def test_strides_come_in_units_that_divide_every_one(heads, odd):
    """Also where one tensor alone lies apart."""
    names = ("q", "k", "v", "o", "do", "dq", "dk")
    strides = {name: (240, 8, 24, 1) if name != odd else (246, 8, 24, 1) for name in names}
    blocks = module.Blocks(16, 16, 4, heads=heads, chunk=16)
    case = (torch.float32, torch.Size((2, 3, 10, 8)), 10, 0.3)
    plans = module._backward_plans(blocks, blocks, *case, *strides.values())
    if odd in names[:4]:
        first_four = list(strides.values())[:4]
        plans = (*plans, module._forward_plan(blocks, *case, *first_four))
    for plan in plans:
        for name, elements in strides.items():
            for axis, stride in zip("bhs", elements, strict=False):
                units = plan.numbers.get(f"{name}_{axis}")
                assert units is None or units * plan.constants["VEC"] == stride


def test_tuned_blocks_change_the_speed_only(monkeypatch):
    """A recorded configuration replaces the blocks of a walk, but not the size of a tile."""
    asked = {"block_m": 32, "block_n": 128, "num_warps": 2, "num_stages": 3}
    monkeypatch.setattr(module.tuned, "configuration", lambda *_: asked)
    usual = module.Blocks(64, 64, 4, heads=2)
    case = (torch.bfloat16, 30, 30, 64, torch.device("cpu"))
    tile = module._configured("attention_forward", *case, usual)
    assert tile == dataclasses.replace(usual, num_warps=2, num_stages=3)
    walk = module._configured("attention_forward", *case, module.Blocks(64, 64, 4))
    assert walk == module.Blocks(32, 128, 2, 3)
