"""Pixel normalisation: exact ends, ImageNet's figures, and a round trip without loss."""

import pytest
import torch

from ddb_fast.data import pixels
from ddb_fast.data.pixels import denormalise, normalise, value_range

KINDS = ("symmetric", "imagenet", "double-255")
EVERY_VALUE = torch.arange(256, dtype=torch.uint8).repeat(3, 1).view(1, 3, 16, 16)


@pytest.mark.parametrize("kind", KINDS)
def test_every_value_survives_the_round_trip(kind):
    assert torch.equal(denormalise(normalise(EVERY_VALUE, kind), kind), EVERY_VALUE)


def test_black_and_white_are_exactly_minus_one_and_one():
    x = normalise(EVERY_VALUE, "symmetric").flatten(2)
    assert x.dtype == torch.float32
    assert (x[..., 0] == -1).all() and (x[..., 255] == 1).all()
    assert torch.allclose(x, torch.linspace(-1, 1, 256), atol=1e-7)


def test_imagenet_figures():
    """White is (1 - mean) / std; figures worked by hand from .485/.229, .456/.224, .406/.225."""
    white = normalise(torch.full((1, 3, 1, 1), 255, dtype=torch.uint8), "imagenet").flatten()
    black = normalise(torch.zeros((1, 3, 1, 1), dtype=torch.uint8), "imagenet").flatten()
    assert white.tolist() == pytest.approx([2.248908, 2.428571, 2.640000], abs=1e-6)
    assert black.tolist() == pytest.approx([-2.117904, -2.035714, -1.804444], abs=1e-6)


def test_double_255_divides_twice():
    """As the published Colored MNIST code: to [0, 1], and by 255 again; each channel alike."""
    x = normalise(EVERY_VALUE, "double-255")
    expected = EVERY_VALUE.double() / 255 / 255
    torch.testing.assert_close(x.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_range_is_what_real_pixels_reach(kind):
    x = normalise(EVERY_VALUE, kind).squeeze(0).flatten(1)
    low, high = value_range(kind)
    assert low.shape == high.shape == (3, 1, 1)
    assert torch.equal(low.flatten(), x.min(dim=1).values)
    assert torch.equal(high.flatten(), x.max(dim=1).values)


@pytest.mark.parametrize("kind", KINDS)
def test_values_outside_are_clamped_and_halves_are_rounded(kind):
    low, high = value_range(kind)
    assert (denormalise((low - 1)[None], kind) == 0).all()
    assert (denormalise((high + 1)[None], kind) == 255).all()
    level = (high - low) / 255
    assert (denormalise((low + 6.4 * level)[None], kind) == 6).all()
    assert (denormalise((low + 6.6 * level)[None], kind) == 7).all()


@pytest.mark.parametrize("kind", KINDS)
def test_channels_last_stays(kind):
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8).to(memory_format=torch.channels_last)
    x = normalise(images, kind)
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert denormalise(x, kind).is_contiguous(memory_format=torch.channels_last)
    assert normalise(images.contiguous(), kind).is_contiguous()


@pytest.mark.parametrize("kind", KINDS)
def test_floats_of_the_same_levels_are_the_same_and_stay_as_they_were(kind):
    images = EVERY_VALUE.float()
    assert torch.equal(normalise(images, kind), normalise(EVERY_VALUE, kind))
    assert torch.equal(images, EVERY_VALUE.float())


def test_training_may_follow_evaluation():
    """Whatever is kept between calls must not be a tensor that only inference mode can use."""
    pixels._on_device.cache_clear()
    with torch.inference_mode():
        normalise(EVERY_VALUE, "imagenet")
    x = normalise(EVERY_VALUE, "imagenet")
    weight = torch.ones((), requires_grad=True)
    (weight * x).sum().backward()
    assert weight.grad.item() == pytest.approx(x.sum().item())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: normalise(EVERY_VALUE, "unit"), "'unit' is none of symmetric, imagenet"),
        (lambda: denormalise(EVERY_VALUE.float(), "unit"), "'unit' is none of"),
        (lambda: value_range("unit"), "'unit' is none of"),
        (lambda: normalise(EVERY_VALUE.double(), "symmetric"), "or float32, got torch.float64"),
        (lambda: denormalise(EVERY_VALUE, "symmetric"), "floating point, got torch.uint8"),
        (lambda: normalise(EVERY_VALUE[:, :1], "symmetric"), r"got \(1, 1, 16, 16\)"),
        (lambda: denormalise(torch.zeros(3, 8, 8), "symmetric"), r"got \(3, 8, 8\)"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_what_an_exporter_made_is_not_kept(monkeypatch):
    """Its stand-ins for tensors would be what every later call of the process gets."""
    monkeypatch.setattr(pixels, "_on_device", pixels.cache(pixels._on_device.__wrapped__))

    class Normalise(torch.nn.Module):
        def forward(self, images):
            return normalise(images, "imagenet")

    exported = torch.export.export(Normalise(), (EVERY_VALUE,)).module()
    after = normalise(EVERY_VALUE, "imagenet")
    assert type(after) is torch.Tensor and torch.equal(exported(EVERY_VALUE), after)
