"""Augmentation against Pillow, PyTorch's own resize, and the statistics it promises."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from ddb_fast.data import augment as module
from ddb_fast.data.augment import KINDS, amplifier_view, augment, centre, random_boxes


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def images(count=4, side=16, seed=0):
    """Random uint8 pictures, channels_last as `gather` hands them out."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (count, side, side, 3), generator=generator, dtype=torch.uint8)
    return x.permute(0, 3, 1, 2)


def coordinates(count, side):
    """Pictures whose red is the column and green the row, so that moves can be read off."""
    ramp = torch.arange(side, dtype=torch.uint8)
    red, green = ramp.expand(side, side), ramp[:, None].expand(side, side)
    return torch.stack([red, green, torch.zeros_like(red)]).expand(count, -1, -1, -1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("side", "size"), [(16, 16), (20, 16), (16, 24)])
def test_form_range_and_repeatability(kind, side, size):
    x = images(side=side)
    before = x.clone()
    y = augment(x, kind, size=size)
    assert y.shape == (4, 3, size, size) and y.dtype == torch.float32
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert y.min() >= 0 and y.max() <= 255 + 1e-3
    assert torch.equal(x, before)
    torch.manual_seed(0)
    assert torch.equal(y, augment(x, kind, size=size))


def test_none_is_the_evaluation_view():
    for side in (16, 20, 12):
        x = images(side=side)
        assert torch.equal(augment(x, "none", size=16), centre(x, 16))
    assert torch.equal(centre(images(), 16), images().float())


def test_flip_mirrors_half_of_the_images():
    x = images(1, 8).expand(4000, -1, -1, -1)
    y = augment(x, "flip", size=8)
    kept = (y == x).flatten(1).all(1)
    assert torch.equal(y[~kept], x.flip(3)[~kept].float())
    # Binomial(4000, 1/2): standard deviation 31.6.
    assert abs(int(kept.sum()) - 2000) < 5 * 31.6


@pytest.mark.parametrize("kind", ["shift", "shift-flip"])
def test_shift_repeats_the_edge(kind):
    side = 16
    ramp = torch.arange(side)
    y = augment(coordinates(3000, side), kind, size=side).long()
    assert (y == y.clamp(0, side - 1)).all() and (y[:, 2] == 0).all()
    rows, columns = y[:, 1, :, 0], y[:, 0, 0, :]
    assert (y[:, 1] == rows[:, :, None]).all() and (y[:, 0] == columns[:, None, :]).all()
    flipped = columns[:, 0] > columns[:, -1]
    assert flipped.any() == (kind == "shift-flip")
    columns = torch.where(flipped[:, None], columns.flip(1), columns)
    seen = set()
    for lines in (rows, columns):
        moves = lines[:, 8] - 8
        assert torch.equal(lines, (ramp + moves[:, None]).clamp(0, side - 1))
        # An eighth of 16: five moves, equally likely.
        counts = torch.bincount(moves + 2, minlength=5)
        assert len(counts) == 5 and (counts - 600).abs().max() < 5 * math.sqrt(3000 * 0.16)
        seen.add(tuple(moves.tolist()))
    assert len(seen) == 2, "rows and columns move on their own"


def test_small_pictures_do_not_shift():
    x = images(side=7)
    assert torch.equal(augment(x, "shift", size=7), x.float())


def test_crops_keep_their_bounds():
    """A rejected draw is not cut: areas and ratios hold exactly, as in torchvision."""
    corners, sides = random_boxes(20_000, device=torch.device("cpu"))
    area, ratio = sides.prod(1), sides[:, 0] / sides[:, 1]
    assert area.min() >= 0.08 - 1e-6 and area.max() <= 1
    assert ratio.min() >= 3 / 4 - 1e-5 and ratio.max() <= 4 / 3 + 1e-5
    assert corners.min() >= 0 and (corners + sides).max() <= 1 + 1e-6
    # Small areas are never rejected and so uniform; ratios are symmetric in the logarithm.
    small = area[area < 0.7]
    assert small.mean().item() == pytest.approx((0.08 + 0.7) / 2, abs=0.01)
    assert ratio.log().mean().abs() < 0.01
    free = (corners / (1 - sides))[sides.amax(1) < 0.9]
    assert free.mean(0).tolist() == pytest.approx([0.5, 0.5], abs=0.02)


def test_crop_falls_back_inside_the_image(monkeypatch):
    """Where no draw fits, which these ratios force."""
    monkeypatch.setattr(module, "_CROP_RATIO", (100.0, 101.0))
    corners, sides = random_boxes(50, device=torch.device("cpu"))
    assert sides.max() == 1 and (corners + sides).max() <= 1
    assert torch.isfinite(augment(images(), "crop-flip", size=8)).all()


@pytest.mark.parametrize(("side", "size"), [(40, 32), (64, 16), (16, 24), (33, 33)])
def test_crops_are_pillows_resize_of_the_box(side, size):
    x = images(6, side)
    torch.manual_seed(5)
    y = augment(x, "crop-flip", size=size)
    torch.manual_seed(5)
    corners, sides = random_boxes(6, device=torch.device("cpu"))
    flips = torch.rand((6, 1, 1)).flatten() < 0.5
    assert 0 < flips.sum() < 6
    for i in range(6):
        start, stop = corners[i] * side, ((corners[i] + sides[i]) * side).clamp(max=side)
        picture = Image.fromarray(x[i].permute(1, 2, 0).contiguous().numpy())
        box = (*start.tolist(), *stop.tolist())
        expected = np.asarray(picture.resize((size, size), Image.Resampling.BILINEAR, box=box))
        if flips[i]:
            expected = expected[:, ::-1]
        # Pillow rounds to whole levels twice: between the two passes and after them.
        assert np.abs(y[i].permute(1, 2, 0).numpy() - expected).max() <= 1.01


def test_a_crop_of_everything_is_pytorchs_antialiased_resize(monkeypatch):
    monkeypatch.setattr(module, "_CROP_AREA", (1.0, 1.0))
    monkeypatch.setattr(module, "_CROP_RATIO", (1.0, 1.0))
    x = images(1, 40).expand(8, -1, -1, -1)
    y = augment(x, "crop-flip", size=16)
    expected = F.interpolate(x.float(), (16, 16), mode="bilinear", antialias=True)
    kept = torch.tensor([(a - b).abs().max() < 0.01 for a, b in zip(y, expected, strict=True)])
    assert 0 < kept.sum() < 8
    assert torch.allclose(y[~kept], expected.flip(3)[~kept], atol=0.01)


def test_crops_are_as_exact_under_autocast():
    x = images(side=20)
    expected = augment(x, "crop-flip", size=16)
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(augment(x, "crop-flip", size=16), expected)


def test_centre_crops_256_to_224_and_keeps_that_share():
    x = images(2, 256)
    assert torch.equal(centre(x, 224), x[:, :, 16:240, 16:240].float())
    y = centre(coordinates(1, 64), 28)  # 56 of 64, halved
    assert torch.allclose(y[0, 0, 3, 1:-1], 4 + 2 * torch.arange(1, 27) + 0.5)
    assert torch.allclose(y[0, 1].T, y[0, 0])
    smaller = centre(images(side=16), 32)
    expected = F.interpolate(images(side=16).float(), (32, 32), mode="bilinear")
    assert torch.allclose(smaller, expected, atol=1e-3)


@pytest.mark.parametrize("size", [8, 16, 40])
def test_the_amplifier_sees_the_whole_image(size):
    x = images()
    y = amplifier_view(x, size)
    assert y.dtype == torch.float32 and y.is_contiguous(memory_format=torch.channels_last)
    for i in range(len(x)):
        picture = Image.fromarray(x[i].permute(1, 2, 0).contiguous().numpy())
        expected = np.asarray(picture.resize((size, size), Image.Resampling.BILINEAR))
        assert np.abs(y[i].permute(1, 2, 0).numpy() - expected).max() <= 1.01
    if size == 16:
        assert torch.equal(y, x.float())


def test_shrinking_does_not_alias():
    """A picture of one-pixel stripes is grey from afar, wherever it is cropped."""
    stripes = torch.zeros(8, 3, 128, 128, dtype=torch.uint8)
    stripes[..., ::2] = 255
    for y in (centre(stripes, 16), amplifier_view(stripes, 16)):
        assert (y[..., 1:-1] - 127.5).abs().max() < 3
    y = augment(stripes, "crop-flip", size=8)
    assert (y[..., 1:-1] - 127.5).abs().max() < 20


@pytest.mark.parametrize(
    ("x", "kind", "size", "words"),
    [
        (images(), "rotate", 8, "'rotate' is none of none, flip"),
        (images().float(), "none", 8, "uint8"),
        (images()[0], "crop-flip", 8, r"\(3, 16, 16\)"),
        (images()[:, :, :8], "flip", 8, r"\(4, 3, 8, 16\)"),
        (images(), "shift", 0, "0 pixels"),
    ],
)
def test_what_cannot_be_augmented_is_refused(x, kind, size, words):
    with pytest.raises(ValueError, match=words):
        augment(x, kind, size=size)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu(kind):
    x = images(side=20).cuda()
    y = augment(x, kind, size=16)
    assert y.device == x.device and y.is_contiguous(memory_format=torch.channels_last)
    torch.manual_seed(0)
    assert torch.equal(y, augment(x, kind, size=16))
    assert torch.allclose(centre(x, 16).cpu(), centre(x.cpu(), 16), atol=1e-3)


@pytest.mark.parametrize("side", [16, 32, 48])
def test_whole_images_are_seen_in_training_as_in_scoring(side):
    """The amplifier must not tell synthetic from real by how much of the picture it was shown."""
    images = torch.randint(0, 256, (3, 3, side, side), dtype=torch.uint8)
    assert augment(images, "none", size=32, whole=True).equal(amplifier_view(images, 32))
