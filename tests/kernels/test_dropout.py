"""Dropout addressed by a seed: Random123's known answers, Triton's generator, and statistics."""

import os
import subprocess
import sys

import pytest
import torch

from ddb_fast.kernels import group_norm
from ddb_fast.kernels.reference import philox, uniform

backends = pytest.mark.parametrize("backend", ("reference", "torch"))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def dropped(x, p, seed, backend, **options):
    """Group norm with a zero weight and a bias of one: y is the mask over 1 - p."""
    ones = torch.ones(x.shape[1])
    return group_norm(
        x, 2, 0 * ones, ones, dropout_p=p, seed=torch.tensor(seed), backend=backend, **options
    )


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    (
        ("00000000 00000000 00000000 00000000", "00000000 00000000",
         "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
         "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
         "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ),
)  # fmt: skip
def test_philox_known_answers(counter, key, expected):
    def words(text):
        return tuple(torch.tensor(int(word, 16)) for word in text.split())

    assert philox(words(counter), words(key)) == words(expected)


TRITON = """
import sys
import torch
import triton
import triton.language as tl

@triton.jit
def draw(p_seed, p_out, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(p_out + index, tl.rand(tl.load(p_seed), index))

rows = []
for seed in map(int, sys.argv[2:]):
    out = torch.empty(2048)
    draw[(2,)](torch.tensor(seed), out, BLOCK=1024)
    rows.append(out)
torch.stack(rows).numpy().tofile(sys.argv[1])
"""


def test_uniform_is_what_triton_draws(tmp_path):
    pytest.importorskip("triton")
    seeds = (0, 1, 2**40 + 7, 2**63 - 1, -3)
    script, result = tmp_path / "draw.py", tmp_path / "draws"
    script.write_text(TRITON)
    subprocess.run(
        [sys.executable, script, result, *map(str, seeds)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        check=True,
        timeout=120,
    )
    draws = torch.from_file(str(result), size=2048 * len(seeds)).view(len(seeds), 2048)
    for seed, expected in zip(seeds, draws, strict=True):
        assert torch.equal(uniform(torch.tensor(seed), torch.Size((2048,))), expected)


def test_uniform_is_uniform():
    u = uniform(torch.tensor(11), torch.Size((200_000,)))
    assert u.min() >= 0 and u.max() < 1
    assert abs(u.mean() - 0.5) < 5 / 12**0.5 / len(u) ** 0.5
    counts = torch.histc(u, 50, 0, 1)
    chi_squared = ((counts - len(u) / 50) ** 2 / (len(u) / 50)).sum()
    assert chi_squared < 100  # 49 degrees of freedom: mean 49, standard deviation 10


@backends
@pytest.mark.parametrize("p", (0.1, 0.5, 0.9))
def test_share_and_scale(backend, p):
    y = dropped(torch.randn(4, 8, 40, 40), p, 3, backend)
    kept = y != 0
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 1 / (1 - p)))
    assert abs(kept.double().mean() - (1 - p)) < 5 * (p * (1 - p) / y.numel()) ** 0.5


@backends
def test_the_seed_alone_decides(backend):
    x = torch.randn(2, 4, 8, 6)
    first = dropped(x, 0.5, 7, backend)
    torch.manual_seed(1)
    assert torch.equal(dropped(x + 1, 0.5, 7, backend), first)
    assert not torch.equal(dropped(x, 0.5, 8, backend), first)
    last = dropped(x.contiguous(memory_format=torch.channels_last), 0.5, 7, backend)
    assert torch.equal(last, first)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(dropped(x.flatten(2), 0.5, 7, backend), first.flatten(2))
    half = dropped(x.bfloat16(), 0.5, 7, backend)
    assert torch.equal(half, first.bfloat16())
    mask = uniform(torch.tensor(7), x.shape) >= 0.5
    assert torch.equal(first != 0, mask)


@backends
def test_a_draw_equal_to_the_probability_is_kept(backend):
    u = uniform(torch.tensor(7), torch.Size((2, 4, 8, 6)))
    p = u[1, 2, 3, 4].item()
    y = dropped(torch.randn(u.shape), p, 7, backend)
    assert y[1, 2, 3, 4] != 0 and torch.equal(y == 0, u < p)


@backends
def test_without_a_seed_the_default_generator_decides(backend):
    x = torch.randn(2, 4, 16, 16)

    def run():
        return group_norm(x, 2, dropout_p=0.5, backend=backend)

    torch.manual_seed(0)
    first, second = run(), run()
    torch.manual_seed(0)
    assert torch.equal(run(), first) and not torch.equal(second, first)
    assert 0.4 < (first == 0).double().mean() < 0.6
    whole = group_norm(x, 2, backend=backend)
    torch.testing.assert_close(first[first != 0], 2 * whole[first != 0])


@backends
def test_gradients_pass_where_values_do(backend):
    bias = torch.zeros(2, 4, requires_grad=True)
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    y, total = group_norm(
        x, 4, pre_bias=bias, dropout_p=0.5, seed=torch.tensor(2), return_sum=True, backend=backend
    )
    mask = (uniform(torch.tensor(2), x.shape) >= 0.5).float()
    upstream = torch.randn(y.shape)
    gradient = torch.autograd.grad(y, x, upstream, retain_graph=True)[0]
    z = group_norm(x, 4, backend="reference")
    expected = torch.autograd.grad(z, x, upstream * mask * 2)[0]
    torch.testing.assert_close(gradient, expected)
    # Dropout comes after the norm: the sum is whole.
    assert torch.equal(torch.autograd.grad(total, x, upstream)[0], upstream)


@backends
def test_zero_probability_draws_nothing(backend):
    x = torch.randn(2, 4, 3, 3)
    state = torch.get_rng_state()
    assert torch.equal(
        group_norm(x, 2, dropout_p=0.0, seed=torch.tensor(1), backend=backend),
        group_norm(x, 2, backend=backend),
    )
    assert torch.equal(torch.get_rng_state(), state)
