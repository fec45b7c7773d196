"""Decoding of every kind of file, the hold-out's arithmetic, and what a listing refuses."""

import hashlib
import os
import struct

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from ddb_fast.data.listing import BrokenImageError, Entry, Listing, hold_out, read_image

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)


def entries(counts, split="train"):
    """As many entries of each class as `counts` says."""
    return [
        Entry(f"{y}/{i}.png", y, split, PIXELS)
        for y, count in enumerate(counts)
        for i in range(count)
    ]


def listing(items, **changes):
    given = {"name": "set", "classes": ("cat", "dog"), "entries": tuple(items)}
    return Listing(**given | changes)


def test_sorted_by_split_then_class_then_path():
    items = [
        Entry("b", 1, "train", PIXELS, 0),
        Entry("z", 0, "test", PIXELS, 1),
        Entry("c", 0, "train", PIXELS, 1),
        Entry("d", 1, "val", PIXELS, 0),
        Entry("a", 1, "train", PIXELS, 1),
    ]
    ordered = listing(items, biases=("red", "blue"))
    assert ordered.paths == ("c", "a", "b", "d", "z")
    assert ordered.split == ("train", "train", "train", "val", "test")
    assert torch.equal(ordered.y, torch.tensor([0, 1, 1, 1, 0]))
    assert torch.equal(ordered.a, torch.tensor([1, 1, 0, 0, 1]))
    assert listing(items).a is None


@pytest.mark.parametrize(
    ("items", "changes", "words"),
    [
        (entries([3]), {"classes": ("cat",)}, "only one class, cat"),
        (entries([3, 0]), {}, "class dog has no training images (none at all)"),
        (
            [*entries([3, 0]), Entry("x.png", 1, "test", PIXELS)],
            {},
            "class dog has no training images (1 test)",
        ),
        ([*entries([1, 1]), *entries([1])], {}, "0/0.png is listed twice"),
        ([*entries([1, 1]), Entry("\udcff.png", 0, "train", PIXELS)], {}, "not valid Unicode"),
    ],
)
def test_what_cannot_be_trained_on_is_refused(items, changes, words):
    with pytest.raises(ValueError) as error:
        listing(items, **changes)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_the_fingerprint_sees_labels_splits_pixels_and_sizes_but_not_the_place(tmp_path):
    items = entries([2, 2])
    seen = {listing(items).fingerprint}
    assert listing(items[::-1]).fingerprint in seen
    other = items[0].pixels.copy()
    other[0, 0, 0] ^= 1
    for change in ({"split": "val"}, {"y": 1}, {"path": "x"}, {"a": 1}, {"pixels": other}):
        seen.add(listing([items[0]._replace(**change), *items[1:]]).fingerprint)
    seen.add(listing(items, classes=("cat", "cow")).fingerprint)
    files = []
    for folder in ("here", "there"):
        file = tmp_path / folder / "x.png"
        file.parent.mkdir()
        file.write_bytes(b"1234")
        files.append(listing([items[0]._replace(pixels=file), *items[1:]]).fingerprint)
    assert files[0] == files[1]
    seen.add(files[0])
    file.write_bytes(b"12345")
    seen.add(listing([items[0]._replace(pixels=file), *items[1:]]).fingerprint)
    assert len(seen) == 9


@pytest.mark.parametrize(
    ("n", "test", "val"),
    [(1, 0, 0), (2, 0, 0), (3, 1, 0), (5, 1, 0), (10, 2, 1), (33, 7, 3), (100, 20, 8)],
)
def test_hold_out_counts(n, test, val):
    held = hold_out(entries([n, n]), validation_share=0.1, test_share=0.2)
    for y in (0, 1):
        splits = [e.split for e in held if e.y == y]
        assert (splits.count("test"), splits.count("val")) == (test, val)
        assert splits.count("train") == n - test - val >= 1


def test_hold_out_takes_the_smallest_hashes():
    held = hold_out(entries([20, 20]), validation_share=0.25, test_share=0.1)
    for y in (0, 1):
        names = [f"{y}/{i}.png" for i in range(20)]
        names.sort(key=lambda name: hashlib.sha256(name.encode()).hexdigest())
        assert {e.path for e in held if e.y == y and e.split == "test"} == set(names[:2])
        # round(18 / 4) = 4: half to even.
        assert {e.path for e in held if e.y == y and e.split == "val"} == set(names[2:6])


def test_hold_out_leaves_named_splits_alone():
    named = [Entry("t.png", 0, "test", PIXELS), *entries([10, 10])]
    held = hold_out(named, validation_share=0.1, test_share=0.2)
    assert [e.path for e in held if e.split == "test"] == ["t.png"]
    assert sum(e.split == "val" for e in held) == 2
    both = [Entry("v.png", 0, "val", PIXELS), *named]
    assert sorted(hold_out(both, validation_share=0.5, test_share=0.5)) == sorted(both)


def test_hold_out_of_everything_leaves_an_image_to_train_on():
    held = hold_out(entries([4, 1]), validation_share=1.0, test_share=1.0)
    assert sorted((e.y, e.split) for e in held) == [(0, "test")] * 3 + [(0, "train"), (1, "train")]


def saved(path, image, **options):
    image.save(path, **options)
    return path


def test_formats_without_loss_come_back(tmp_path):
    for suffix in ("png", "bmp", "tiff", "ppm"):
        image = read_image(saved(tmp_path / f"x.{suffix}", Image.fromarray(PIXELS)))
        assert image.mode == "RGB"
        assert np.array_equal(np.asarray(image), PIXELS)


def test_pixels_are_held_once(tmp_path, monkeypatch):
    """Of a photograph of 24 megapixels each copy takes 90 MB, on every core."""
    files = [
        saved(tmp_path / name, Image.fromarray(PIXELS)) for name in ("x.png", "x.jpg", "x.bmp")
    ]
    copies, copy = [], Image.Image.copy
    monkeypatch.setattr(Image.Image, "copy", lambda image: copies.append(image) or copy(image))
    for file in files:
        assert read_image(file).mode == "RGB"
    assert copies == []


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(tmp_path, orientation):
    # How a camera held in each way stores the upright picture (EXIF 2.3, tag 0x0112).
    stored = {
        1: lambda x: x,
        2: lambda x: x[:, ::-1],
        3: lambda x: x[::-1, ::-1],
        4: lambda x: x[::-1],
        5: lambda x: x.transpose(1, 0, 2),
        6: lambda x: np.rot90(x, 1),
        7: lambda x: x[::-1, ::-1].transpose(1, 0, 2),
        8: lambda x: np.rot90(x, -1),
    }[orientation](PIXELS)
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = saved(tmp_path / "x.png", Image.fromarray(np.ascontiguousarray(stored)), exif=exif)
    assert np.array_equal(np.asarray(read_image(file)), PIXELS)


def test_transparency_shows_white(tmp_path):
    rgba = np.dstack([PIXELS, np.full((6, 9), 255, np.uint8)])
    rgba[0, 0] = (10, 20, 30, 0)
    rgba[0, 1] = (0, 100, 200, 51)  # a fifth opaque
    expected = PIXELS.copy()
    expected[0, 0] = 255
    expected[0, 1] = (204, 224, 244)
    answer = np.asarray(read_image(saved(tmp_path / "x.png", Image.fromarray(rgba))))
    assert np.array_equal(answer, expected)

    grey = np.array([[7, 0], [9, 255]], np.uint8)
    answer = read_image(saved(tmp_path / "la.png", Image.merge("LA", [Image.fromarray(grey)] * 2)))
    assert np.asarray(answer)[:, :, 0].tolist() == [[248, 255], [246, 255]]

    palette = Image.frombytes("P", (2, 1), bytes([0, 1]))
    palette.putpalette([1, 2, 3, 4, 5, 6])
    answer = read_image(saved(tmp_path / "p.png", palette, transparency=1))
    assert np.asarray(answer).tolist() == [[[1, 2, 3], [255, 255, 255]]]


def test_greys_and_inks(tmp_path):
    grey = np.array([[0, 128, 255]], np.uint8)
    answer = read_image(saved(tmp_path / "l.png", Image.fromarray(grey)))
    assert np.asarray(answer).tolist() == [[[v] * 3 for v in (0, 128, 255)]]

    deep = np.array([[0, 257 * 128, 65535, 200]], np.uint16)
    for name in ("i16.png", "i16.tiff"):
        answer = read_image(saved(tmp_path / name, Image.fromarray(deep)))
        assert np.asarray(answer).tolist() == [[[v] * 3 for v in (0, 128, 255, 1)]]

    bits = Image.fromarray(np.array([[True, False]]))
    answer = read_image(saved(tmp_path / "bits.png", bits))
    assert np.asarray(answer).tolist() == [[[255] * 3, [0] * 3]]

    inks = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    answer = np.asarray(read_image(saved(tmp_path / "cmyk.jpg", inks, quality=100)))
    assert (np.abs(answer.astype(int) - (255, 0, 0)) <= 3).all()


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    file = saved(tmp_path / "x.gif", frames[0], save_all=True, append_images=frames[1:])
    assert read_image(file).getpixel((0, 0)) == (255, 0, 0)


def damaged(tmp_path):
    whole = saved(tmp_path / "whole.png", Image.fromarray(np.tile(PIXELS, (20, 20, 1))))
    content = whole.read_bytes()
    photo = saved(tmp_path / "whole.jpg", Image.fromarray(np.tile(PIXELS, (20, 20, 1))))
    yield "empty.png", b""
    yield "text.jpg", b"this is no image\n"
    yield "short.png", content[:200]
    yield "half.png", content[: len(content) // 2]
    yield "half.jpg", photo.read_bytes()[: photo.stat().st_size // 2]
    yield "header.png", content[:20] + b"\xff" * 4 + content[24:]
    # Whole, but of a kind that is not opened under whatever name.
    other = saved(tmp_path / "whole.pcx", Image.fromarray(PIXELS))
    yield "other.png", other.read_bytes()


def test_damaged_files_are_named_in_one_line(tmp_path):
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    for name, content in damaged(tmp_path):
        file = tmp_path / name
        file.write_bytes(content)
        with pytest.raises(BrokenImageError) as error:
            read_image(file)
        assert str(error.value).startswith(f"{file}: cannot be read as an image: ")
        assert "\n" not in str(error.value)


def test_floating_point_pixels_are_refused(tmp_path):
    file = saved(tmp_path / "x.tiff", Image.fromarray(np.ones((4, 4), np.float32)))
    with pytest.raises(BrokenImageError, match="floating-point"):
        read_image(file)


@pytest.mark.parametrize("values", [[0, 65536], [-1, 0], [0, 2**31 - 1]])
def test_greys_of_unknown_range_are_refused(tmp_path, values):
    file = saved(tmp_path / "x.tiff", Image.fromarray(np.array([values], np.int32)))
    with pytest.raises(BrokenImageError, match=f"greys from {values[0]} to {values[1]}, not 0 to"):
        read_image(file)


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_greys_that_count_from_white_are_turned_round(tmp_path, kind):
    top = np.iinfo(kind).max
    image = Image.fromarray(np.array([[0, top // 5, top]], kind))
    tags = {262: 0} if kind is np.uint16 else {}
    file = saved(tmp_path / "x.tiff", image, tiffinfo=tags)
    if kind is np.uint8:  # Pillow writes black as 0; the tag alone is exchanged
        content = file.read_bytes()
        here = content.index(struct.pack("<HHI", 262, 3, 1)) + 8
        file.write_bytes(content[:here] + b"\0" + content[here + 1 :])
    assert np.asarray(read_image(file))[0, :, 0].tolist() == [255, 204, 0]


def test_what_the_disk_refuses_is_not_called_a_damaged_image(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError) as missing:
        read_image(tmp_path / "absent.png")
    assert "absent.png" in str(missing.value)

    def fail(*_, **__):
        raise OSError(5, os.strerror(5))

    file = saved(tmp_path / "x.png", Image.fromarray(PIXELS))
    monkeypatch.setattr(Image.Image, "load", fail)
    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    with pytest.raises(OSError) as error:
        read_image(file)
    assert not isinstance(error.value, ValueError)
    assert error.value.errno == 5 and error.value.filename == str(file)


def test_embedded_pixels_are_read_as_they_are():
    assert np.array_equal(np.asarray(listing(entries([1, 1])).read(1)), PIXELS)
