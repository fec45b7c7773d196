"""Colored Digits against the protocol's own arithmetic, and against any machine's copy."""

import hashlib
from collections import Counter
from decimal import ROUND_HALF_EVEN, Decimal

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F

from ddb_fast.data.digits import COLOURS, digits, nearest_colour

DATA = load_digits()
# sha256 of the uint8 pixels (N, 3, 16, 16) and of the listing at rho 0.95.
PIXELS = "1b20465c517ffb099d5112d6e4d880bb03c09de8d38dd67d15da7b8b4671f493"
FINGERPRINT = "82cd9cff3b390a30d5b041f389b92091c6e6e5346541425904aa97f49b6a92b8"
MEMBERS = {y: [i for i, t in enumerate(DATA.target.tolist()) if t == y] for y in range(10)}


def rounded(number: Decimal) -> int:
    return int(number.quantize(Decimal(1), rounding=ROUND_HALF_EVEN))


@pytest.fixture(scope="module")
def usual():
    return digits()


def digit(entry):
    """(index in load_digits, colour) as the path tells them."""
    name = entry.path.removesuffix(".png").split("/")[-1]
    index, colour = name.split("_c")
    return int(index), int(colour)


def images(listing):
    pixels = np.stack([e.pixels for e in listing.entries])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def test_splits_are_cut_from_the_order_of_load_digits(usual):
    for y, members in MEMBERS.items():
        n_test = rounded(Decimal("0.28") * len(members))
        n_val = rounded(Decimal("0.1") * (len(members) - n_test))
        rest = members[: len(members) - n_test]
        expected = {
            "train": rest[: len(rest) - n_val],
            "val": rest[len(rest) - n_val :],
            "test": members[-n_test:],
        }
        for split, indices in expected.items():
            found = [digit(e)[0] for e in usual.entries if e.y == y and e.split == split]
            assert sorted(set(found)) == indices
            assert len(found) == len(indices) * (10 if split == "test" else 1)
    assert Counter(usual.split) == {"train": 1164, "val": 129, "test": 5040}


def test_labels_and_paths(usual):
    assert usual.classes == tuple("0123456789")
    assert usual.biases[7] == "colour 7" and len(usual.biases) == 10
    assert usual.aligned_bias == tuple(range(10))
    for entry in usual.entries:
        index, colour = digit(entry)
        assert DATA.target[index] == entry.y and colour == entry.a
        assert entry.path == f"{entry.split}/{entry.y}/{index:04d}_c{colour}.png"
        assert entry.pixels.shape == (16, 16, 3) and entry.pixels.dtype == np.uint8


@pytest.mark.parametrize("rho", ["0.95", "0.9", "0.995", "0.5", "0.1", "1.0", "0.0"])
def test_exactly_the_share_conflicts_in_the_other_colours_in_turn(rho):
    listing = digits(float(rho))
    for split in ("train", "val"):
        for y in range(10):
            a = [e.a for e in listing.entries if e.split == split and e.y == y]
            conflicting = Counter(c for c in a if c != y)
            # 115 digits at 0.9 are 11.5: the decimal decides, not its neighbour in binary.
            assert conflicting.total() == rounded(len(a) * (1 - Decimal(rho)))
            dealt = [(y + 1 + k % 9) % 10 for k in range(conflicting.total())]
            assert conflicting == Counter(dealt)


def test_every_test_digit_comes_in_every_colour(usual):
    shown = Counter(digit(e) for e in usual.entries if e.split == "test")
    assert set(shown.values()) == {1}
    assert Counter(i for i, _ in shown) == {i: 10 for i, _ in shown}


def test_conflicting_digits_lie_all_over_the_class():
    """And a smaller share is part of a larger one, so that runs at two rho compare."""
    conflicting = {
        rho: {digit(e)[0] for e in digits(rho).entries if e.split == "train" and e.a != e.y}
        for rho in (0.9, 0.95)
    }
    assert conflicting[0.95] < conflicting[0.9]
    train = [i for members in MEMBERS.values() for i in members[: len(members) * 648 // 1000]]
    middle = float(np.median(train))
    early = sum(i < middle for i in conflicting[0.9]) / len(conflicting[0.9])
    assert 0.35 < early < 0.65


def test_rendering_by_another_road(usual):
    """PyTorch's bilinear, and the background read off pixels that no stroke touches."""
    for entry in usual.entries[::97]:
        index, colour = digit(entry)
        glyph = torch.from_numpy(DATA.images[index] / 16)[None, None]
        v = F.interpolate(glyph, (16, 16), mode="bilinear", align_corners=False)[0, 0].numpy()
        background = entry.pixels[v == 0]
        assert len(np.unique(background, axis=0)) == 1
        level = background[0].astype(float)
        assert np.abs(level / 255 - COLOURS[colour]).max() < 5 * 0.05
        expected = level * (1 - v[..., None]) + 255 * v[..., None]
        # The background is known to half a level only.
        assert np.abs(entry.pixels - expected).max() <= 1.0
        assert (entry.pixels[v == 1] == 255).all()


def test_noise_has_the_stated_deviation_and_is_clipped(usual):
    """Over every test image, whose colours are balanced."""
    test = [e for e in usual.entries if e.split == "test"]
    level = np.array([e.pixels.reshape(-1, 3).min(0) for e in test]) / 255
    mean = COLOURS[[e.a for e in test]]
    inside = (mean > 0.2) & (mean < 0.8)  # four deviations from being clipped
    noise = (level - mean)[inside]
    assert abs(noise.mean()) < 5 * 0.05 / np.sqrt(inside.sum())
    assert noise.std() == pytest.approx(0.05, rel=0.05)
    assert (level[mean > 0.97] == 1).mean() > 0.2


def test_the_same_pixels_on_every_machine(usual):
    assert hashlib.sha256(images(usual).numpy().tobytes()).hexdigest() == PIXELS
    assert usual.fingerprint == FINGERPRINT
    assert digits().fingerprint == FINGERPRINT
    assert digits(0.9).fingerprint != FINGERPRINT


def test_the_backgrounds_colour_is_found(usual):
    """All right but for the noise itself: colours 0 and 9 lie 4.2 deviations apart."""
    found = nearest_colour(images(usual))
    assert found.dtype == torch.int64 and found.shape == (len(usual),)
    background = np.array([e.pixels.reshape(-1, 3).min(0) for e in usual.entries])
    distance = np.linalg.norm(background[:, None] - 255 * COLOURS, axis=2)
    assert np.array_equal(found.numpy(), distance.argmin(1))
    wrong = found != usual.a
    assert wrong.double().mean() < 0.005
    assert set((found + usual.a)[wrong].tolist()) == {9} and (found * usual.a)[wrong].sum() == 0


@pytest.mark.parametrize("size", [8, 16, 32])
def test_the_colour_is_found_in_any_size_under_noise_as_a_generator_leaves_it(usual, size):
    apart = [i for i, a in enumerate(usual.a.tolist()) if a not in (0, 9)][::7]
    x = F.interpolate(images(usual)[apart].float(), (size, size), mode="bilinear")
    noisy = x + 8 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    found = nearest_colour(noisy.round().clamp(0, 255).to(torch.uint8))
    assert torch.equal(found, usual.a[apart])


def test_what_is_no_share_or_no_image_is_refused():
    for rho in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="rho"):
            digits(rho)
    for wrong in (torch.zeros(2, 16, 16, 3, dtype=torch.uint8), torch.zeros(2, 3, 16, 16)):
        with pytest.raises(ValueError, match="uint8"):
            nearest_colour(wrong)
