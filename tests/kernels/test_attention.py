"""attention and attention_qkv against a softmax written out in fp64 and finite differences.

Every backend, Triton's in its interpreter, whose kernels' branches have their own file.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from ddb_fast.kernels import attention, attention_qkv

backends = pytest.mark.parametrize("backend", ("reference", "torch", "triton", "native"))
# Triton and C++ compute in fp32.
doubles = pytest.mark.parametrize("backend", ("reference", "torch"))
HALVES = (torch.bfloat16, torch.float16)


def naive(q, k, v, scale=None):
    """One query at a time, in fp64."""
    q, k, v = q.double(), k.double(), v.double()
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    o = torch.empty(q.shape, dtype=torch.float64)
    for b, h in torch.cartesian_prod(torch.arange(q.shape[0]), torch.arange(q.shape[1])):
        for i in range(q.shape[2]):
            weights = torch.exp((k[b, h] * q[b, h, i]).sum(-1) * scale)
            o[b, h, i] = (weights[:, None] * v[b, h]).sum(0) / weights.sum()
    return o


def error(actual: Tensor, truth: Tensor, floor: float = 1e-30) -> float:
    """RMS of the difference over RMS of the truth, or over the floor where the truth vanishes."""
    difference = (actual.double() - truth.double()).square().mean().sqrt()
    return (difference / truth.double().square().mean().sqrt().clamp_min(floor)).item()


def draw(shape, keys, dtype=torch.float32):
    b, h, _, d = shape
    q, k, v = torch.randn(shape), torch.randn(b, h, keys, d), torch.randn(b, h, keys, d)
    return q.to(dtype), k.to(dtype), v.to(dtype)


@backends
@pytest.mark.parametrize("length", (1, 5, 64, 100))
@pytest.mark.parametrize("head_dim", (8, 40, 64, 128, 256))
def test_lengths_and_head_dims(backend, length, head_dim):
    q, k, v = draw((2, 2, length, head_dim), length)
    o = attention(q, k, v, backend=backend)
    assert o.shape == q.shape and o.dtype == q.dtype
    assert error(o, naive(q, k, v)) <= 3e-6


@backends
@pytest.mark.parametrize(("queries", "keys"), ((5, 64), (64, 5), (1, 100), (7, 1)))
@pytest.mark.parametrize("scale", (None, 0.5))
def test_keys_of_another_length(backend, queries, keys, scale):
    q, k, v = draw((2, 3, queries, 16), keys)
    o = attention(q, k, v, scale=scale, backend=backend)
    assert error(o, naive(q, k, v, scale)) <= 3e-6


@backends
def test_any_strides(backend):
    dense = draw((2, 3, 6, 8), 6)
    expected = naive(*dense)

    def strided(order):
        back = [order.index(i) for i in range(4)]
        return [t.permute(order).contiguous().permute(back) for t in dense]

    for order in ((0, 2, 1, 3), (2, 0, 1, 3), (0, 1, 3, 2), (3, 2, 1, 0)):
        assert error(attention(*strided(order), backend=backend), expected) <= 3e-6
    wide = [F.pad(t, (2, 3))[..., 2:-3] for t in dense]
    assert error(attention(*wide, backend=backend), expected) <= 3e-6
    q, k, v = dense[0], *(t[:1, :1].expand_as(t) for t in dense[1:])
    assert error(attention(q, k, v, backend=backend), naive(q, k, v)) <= 3e-6


@backends
@pytest.mark.parametrize("length", (8, 70))
@pytest.mark.parametrize("different", range(3))
def test_gradients_where_one_operand_lies_differently(backend, length, different):
    """As where k comes out of a norm or an embedding of positions and v straight from the layer."""
    dense = draw((2, 3, length, 16), length)
    apart = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in dense]
    apart[different] = dense[different].contiguous()
    truths = [t.double().requires_grad_() for t in dense]
    do = torch.randn(2, 3, length, 16)
    weights = (truths[0] @ truths[1].mT / 4).softmax(-1)
    expected = torch.autograd.grad(weights @ truths[2], truths, do.double())
    own = [t.requires_grad_() for t in apart]
    actual = torch.autograd.grad(attention(*own, backend=backend), own, do)
    assert max(map(error, actual, expected)) <= 6e-6


@pytest.mark.parametrize("backend", ("triton", "native"))  # torch's has none on a CPU, and says so
@pytest.mark.parametrize("packed", (False, True))
def test_second_derivatives(backend, packed):
    """Against the reference in fp64, as a gradient penalty takes them."""

    def derivatives(backend, dtype):
        torch.manual_seed(0)
        operands = [torch.randn(2, 5, 48).to(dtype).requires_grad_()]
        if packed:
            o = attention_qkv(*operands, 2, backend=backend)
        else:
            operands = [t.requires_grad_() for t in torch.randn(3, 2, 2, 5, 8).to(dtype)]
            o = attention(*operands, backend=backend)
        first = torch.autograd.grad(o.pow(3).sum(), operands, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), operands)

    expected = derivatives("reference", torch.float64)
    assert max(map(error, derivatives(backend, torch.float32), expected)) <= 1e-5


@backends
def test_large_scores_do_not_overflow(backend):
    v = torch.randn(1, 1, 8, 8)
    one_hot = torch.eye(8).expand_as(v)
    torch.testing.assert_close(attention(1000 * one_hot, one_hot, v, backend=backend), v)


@backends
def test_an_empty_batch(backend):
    q, k, v = (t.requires_grad_() for t in draw((0, 2, 4, 8), 5))
    o = attention(q, k, v, backend=backend)
    assert o.shape == (0, 2, 4, 8)
    assert torch.autograd.grad(o.sum(), q)[0].shape == q.shape
    assert attention_qkv(torch.randn(0, 4, 48), 2, backend=backend).shape == (0, 4, 16)
    # Every second element of nothing.
    sliced = [torch.randn(0, 2, 3, 16)[..., ::2]] * 3
    assert attention(*sliced, backend=backend).shape == (0, 2, 3, 8)


@doubles
@pytest.mark.parametrize("shape", ((2, 2, 5, 4), (1, 2, 1, 3)))
def test_gradients_against_finite_differences(backend, shape):
    tensors = [t.requires_grad_() for t in draw(shape, 4, torch.float64)]
    assert torch.autograd.gradcheck(
        lambda q, k, v: attention(q, k, v, scale=0.7, backend=backend), tensors
    )


@backends
@pytest.mark.parametrize("dtype", (torch.float32, *HALVES), ids=str)
@pytest.mark.parametrize("length", (1, 64))
def test_error_against_fp64(backend, dtype, length):
    tensors = draw((2, 2, length, 40), length, dtype)
    upstream = torch.randn(2, 2, length, 40)

    def run(function, tensors):
        tensors = [t.detach().requires_grad_() for t in tensors]
        o = function(*tensors)
        return o, torch.autograd.grad(o, tensors, upstream.to(o.dtype))

    def plain(q, k, v):
        return torch.softmax(q @ k.mT * 40**-0.5, -1) @ v

    truth, true_gradients = run(plain, [t.double() for t in tensors])
    usual, usual_gradients = run(plain, tensors)
    o, gradients = run(lambda q, k, v: attention(q, k, v, backend=backend), tensors)

    half = dtype in HALVES
    assert o.dtype == dtype
    assert error(o, truth) <= (max(1.25 * error(usual, truth), 3e-3) if half else 3e-6)
    for actual, expected, common in zip(gradients, true_gradients, usual_gradients, strict=True):
        # One token attends to itself alone: dq and dk are 0, and the operands are of size 1.
        bound = max(1.25 * error(common, expected, 1.0), 4e-3) if half else 6e-6
        assert actual.dtype == dtype
        assert error(actual, expected, floor=1.0 if length == 1 else 1e-30) <= bound


@backends
@pytest.mark.parametrize("num_heads", (1, 3))
@pytest.mark.parametrize("length", (1, 10))
def test_packed_equals_unpacked(backend, num_heads, length):
    width = num_heads * 8
    projection = torch.nn.Linear(width, 3 * width)
    qkv = projection(torch.randn(2, length, width))
    o = attention_qkv(qkv, num_heads, backend=backend)
    heads = [t.unflatten(-1, (num_heads, 8)).transpose(1, 2) for t in qkv.split(width, -1)]
    expected = naive(*(t.detach() for t in heads)).transpose(1, 2).reshape(2, length, width)
    assert o.shape == expected.shape and o.is_contiguous()
    assert error(o, expected) <= 3e-6
    apart = attention(*heads, scale=0.3, backend=backend).transpose(1, 2).flatten(2)
    assert error(attention_qkv(qkv, num_heads, scale=0.3, backend=backend), apart) <= 1e-6


def packed_views(dtype):
    """The output of a 1x1 convolution in channels_last, seen as tokens, and half of a wider one."""
    image = torch.randn(2, 24, 3, 2, dtype=dtype).contiguous(memory_format=torch.channels_last)
    tokens = image.flatten(2).transpose(1, 2)
    wide = torch.randn(2, 6, 48, dtype=dtype)[..., 12:36]
    return tokens, wide, tokens.transpose(0, 1)


@backends
def test_packed_views(backend):
    for qkv in packed_views(torch.float32):
        truth_of = qkv.detach().double().contiguous().requires_grad_()
        truth = attention_qkv(truth_of, 2, backend="reference")
        upstream = torch.randn(truth.shape)
        expected = torch.autograd.grad(truth, truth_of, upstream.double())[0]
        qkv.requires_grad_()
        o = attention_qkv(qkv, 2, backend=backend)
        assert error(o, truth) <= 3e-6
        assert error(torch.autograd.grad(o, qkv, upstream)[0], expected) <= 6e-6


@doubles
def test_gradients_of_packed_views_against_finite_differences(backend):
    for qkv in packed_views(torch.float64):
        assert torch.autograd.gradcheck(
            lambda t: attention_qkv(t, 2, backend=backend), qkv.detach().requires_grad_()
        )


@backends
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_autocast_changes_nothing(backend, dtype):
    q, k, v = draw((2, 2, 6, 8), 6, dtype)
    outside = attention(q, k, v, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = attention(q, k, v, backend=backend)
    assert inside.dtype == dtype and torch.equal(inside, outside)


@backends
def test_compiles_whole_and_once(backend):
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()

    def run(q, k, v, qkv):
        packed = attention_qkv(qkv, 2, backend=backend)
        return attention(q, k, v, backend=backend), packed

    compiled = torch.compile(run, backend=counter, fullgraph=True)
    for batch in (3, 5):
        arguments = [*draw((batch, 2, 6, 8), 7), torch.randn(batch, 6, 48)]
        for argument in arguments:
            argument.requires_grad_()
            torch._dynamo.mark_dynamic(argument, 0)
        results = []
        for function in (run, compiled):
            o, packed = function(*arguments)
            results.append(
                (o, packed, *torch.autograd.grad(o.square().sum() + packed.sum(), arguments))
            )
        for eager, traced in zip(*results, strict=True):
            assert error(traced, eager) <= 1e-6
    assert counter.frame_count == 1


@backends
def test_refusals(backend):
    q, k, v = draw((2, 2, 4, 8), 4)
    meta = torch.randn(2, 2, 4, 8, device="meta")
    cases = [
        ((q[0], k, v), r"q must be .* got shape \(2, 4, 8\)"),
        ((q, k[0], v), r"k must be .* got shape \(2, 4, 8\)"),
        ((q, k[:1], v[:1]), r"k must have shape \(2, 2, 4, 8\), got \(1, 2, 4, 8\)"),
        ((q, k[..., :4], v), r"k .* got \(2, 2, 4, 4\)"),
        ((q, k, v[:, :, :3]), r"v .* got \(2, 2, 3, 8\)"),
        ((q[:, :, :0], k, v), r"at least one token, got shape \(2, 2, 0, 8\)"),
        ((q, k[:, :, :0], v[:, :, :0]), r"k must be .* got shape \(2, 2, 0, 8\)"),
        (draw((1, 1, 2, 257), 2), "257"),
        ((q.long(), k.long(), v.long()), "int64"),
        ((q, k.half(), v), "k must be torch.float32, got torch.float16"),
        ((q, k, meta), "v must be on cpu, got meta"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            attention(*arguments, backend=backend)
    packed = [
        (torch.randn(2, 4, 48), 5, "48.* num_heads 5"),
        (torch.randn(2, 4, 48), 0, "num_heads 0"),
        (torch.randn(4, 48), 2, r"\(4, 48\)"),
        (torch.randn(2, 0, 48), 2, "at least one token"),
        (torch.randn(2, 4, 3 * 257), 1, "257"),
        (torch.ones(2, 4, 48, dtype=torch.int32), 2, "int32"),
    ]
    for qkv, num_heads, message in packed:
        with pytest.raises(ValueError, match=message):
            attention_qkv(qkv, num_heads, backend=backend)
