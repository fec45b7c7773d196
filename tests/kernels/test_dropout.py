"""Dropout addressed by a seed: Random123's known answers, Triton's generator, and statistics."""

import pytest
import torch

from ddb_fast.kernels import group_norm, native
from ddb_fast.kernels.reference import dropout_constants, philox, random_halves

NATIVE = pytest.param(
    "native",
    marks=pytest.mark.skipif(
        bool(native.why_not("group_norm")), reason="; ".join(native.why_not("group_norm"))
    ),
)
backends = pytest.mark.parametrize("backend", ("reference", "torch", "triton", NATIVE))


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


def test_each_element_has_its_half_word():
    seed, shape = 2**40 + 7, (2, 11, 3, 2)
    halves = random_halves(torch.tensor(seed), torch.Size(shape))
    assert halves.shape == shape
    zero = torch.tensor(0)
    key = (torch.tensor(seed & 0xFFFFFFFF), torch.tensor(seed >> 32))
    for n, c, h, w in ((0, 0, 0, 0), (0, 5, 0, 1), (1, 10, 2, 1), (1, 7, 1, 0)):
        pixel = (n * 3 + h) * 2 + w
        words = philox((torch.tensor(pixel * 2 + c // 8), zero, zero, zero), key)
        word = words[c % 4].item()
        assert halves[n, c, h, w] == (word >> 16 if c % 8 >= 4 else word & 0xFFFF)


def test_halves_are_uniform_and_differ_between_seeds():
    halves = random_halves(torch.tensor(11), torch.Size((4, 50, 40, 25))).flatten().double()
    assert halves.min() >= 0 and halves.max() <= 65535
    assert abs(halves.mean() - 32767.5) < 5 * 65536 / 12**0.5 / len(halves) ** 0.5
    counts = torch.histc(halves, 64, 0, 65536)
    chi_squared = ((counts - len(halves) / 64) ** 2 / (len(halves) / 64)).sum()
    assert chi_squared < 63 + 5 * (2 * 63) ** 0.5
    other = random_halves(torch.tensor(12), torch.Size((4, 50, 40, 25))).flatten().double()
    correlation = torch.corrcoef(torch.stack([halves, other]))[0, 1]
    assert abs(correlation) < 5 / len(halves) ** 0.5


def test_threshold_and_scale():
    assert dropout_constants(0.5) == (32768, 2.0)
    assert dropout_constants(1e-9) == (0, 1.0)
    threshold, scale = dropout_constants(0.1)
    assert threshold == 6554 and scale == 65536 / 58982
    assert dropout_constants(1 - 1e-9) == (65535, 65536.0)


@backends
@pytest.mark.parametrize("p", (0.1, 0.5, 0.9))
def test_share_and_scale(backend, p):
    y = dropped(torch.randn(4, 8, 40, 40), p, 3, backend)
    kept = y != 0
    # p is rounded to a multiple of 2^-16, its scale with it.
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 1 / (1 - p)), rtol=2e-4, atol=0)
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
    mask = random_halves(torch.tensor(7), x.shape) >= 32768
    assert torch.equal(first != 0, mask)


@backends
@pytest.mark.parametrize("seed", (2**40 + 7, -3))
def test_all_bits_of_a_seed_and_every_pixel_of_an_image_count(backend, seed):
    """Seeds that are drawn have 63 bits; the C++ kernels draw for 512 pixels at a time."""
    x = torch.randn(1, 6, 27, 19)
    mask = random_halves(torch.tensor(seed), x.shape) >= 32768
    for layout in (torch.contiguous_format, torch.channels_last):
        y = dropped(x.contiguous(memory_format=layout), 0.5, seed, backend)
        assert torch.equal(y != 0, mask)


# Triton's threshold and scale are the reference's; its interpreter would take half a minute.
@pytest.mark.parametrize("backend", ("reference", "torch", NATIVE))
def test_the_highest_probability_leaves_few_and_finite(backend):
    x, seed = torch.randn(1, 8, 96, 96), -3
    mask = random_halves(torch.tensor(seed), x.shape) == 65535
    y = dropped(x, 1 - 1e-9, seed, backend)
    assert mask.any() and torch.equal(y != 0, mask) and y.isfinite().all()


@backends
def test_a_draw_equal_to_the_probability_is_kept(backend):
    halves = random_halves(torch.tensor(7), torch.Size((2, 4, 8, 6)))
    threshold = halves[1, 2, 3, 4].item()
    y = dropped(torch.randn(halves.shape), threshold / 65536, 7, backend)
    assert y[1, 2, 3, 4] != 0 and torch.equal(y == 0, halves < threshold)


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
    mask = (random_halves(torch.tensor(2), x.shape) >= 32768).float()
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
