"""The decoded cache: its pixels, what survives a kill or a full disk, and how it is handed out."""

import errno
import json
import logging
import threading
import time

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from ddb_fast.data import store
from ddb_fast.data.groups import majority_bias
from ddb_fast.data.listing import Entry, Listing
from ddb_fast.data.sources import list_folder
from ddb_fast.data.store import centre_square, gather, open_images, resident, squash

CPU = torch.device("cpu")


def pixels(seed, height=40, width=50):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def embedded(count=12, **changes):
    """Two classes in turn; every fourth image is a test image; a follows y but for one in five."""
    items = tuple(
        Entry(
            f"{i:04d}.png",
            i % 2,
            "test" if i % 4 > 1 else "train",
            pixels(i),
            (i % 2) ^ (i % 5 == 0),
        )
        for i in range(count)
    )
    given = {"name": "set", "classes": ("cat", "dog"), "entries": items, "biases": ("red", "blue")}
    return Listing(**given | changes)


def photos(root, count=8):
    for name in ("cat", "dog"):
        for i in range(count):
            file = root / name / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels(i)).save(file)
    return root


def opened(listing, cache, **changes):
    given = {"image_size": 8, "cache_size": 12, "cache_dir": cache, "progress": False}
    return open_images(listing, **given | changes)


def everything(data):
    return [
        (s.paths, s.small.tolist(), s.large.tolist(), s.y.tolist()) for s in data.splits.values()
    ]


# --- pixels ------------------------------------------------------------------------------------


def test_squash_shows_all_and_the_square_the_centre():
    """A wide image: left third red, centre third green, right third blue."""
    image = Image.new("RGB", (90, 30))
    for i, colour in enumerate(("red", "lime", "blue")):
        image.paste(colour, (30 * i, 0, 30 * i + 30, 30))
    squashed = squash(image, 9)
    assert squashed.shape == (3, 9, 9) and squashed.dtype == torch.uint8
    assert squashed[:, 4, [1, 4, 7]].T.tolist() == [[255, 0, 0], [0, 255, 0], [0, 0, 255]]
    centre = centre_square(image, 10)
    assert centre[:, :, 2:8].unique(dim=2).squeeze().T.unique(dim=0).tolist() == [[0, 255, 0]]
    assert centre_square(image.transpose(Image.Transpose.TRANSPOSE), 10).equal(
        centre.transpose(1, 2)
    )


@pytest.mark.parametrize("shape", [(48, 24), (24, 60), (24, 24), (6, 10)])
def test_the_square_is_pillows_resize_and_crop(shape):
    """Sides that scale to whole pixels, so that both orders of resize and crop are exact."""
    image = Image.fromarray(pixels(0, *shape))
    size = 12
    width, height = (side * size // min(image.size) for side in image.size)
    whole = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    expected = np.asarray(whole.crop((left, top, left + size, top + size)))
    answer = centre_square(image, size).permute(1, 2, 0).numpy()
    # Pillow rounds between its two passes, whose order may differ.
    assert np.abs(answer.astype(int) - expected).max() <= 1


def test_small_pictures_of_the_size_asked_are_not_touched():
    x = pixels(0, 16, 16)
    for view in (squash, centre_square):
        assert np.array_equal(view(Image.fromarray(x), 16).permute(1, 2, 0), x)


def test_splits_hold_the_listing_in_its_order(tmp_path):
    listing = embedded()
    data = opened(listing, tmp_path)
    assert list(data.splits) == ["train", "test"]
    at = 0
    for split in data.splits.values():
        assert split.small.shape == (len(split), 8, 8, 3) and split.small.dtype == torch.uint8
        assert split.large.shape == (len(split), 12, 12, 3)
        for i in range(len(split)):
            assert split.paths[i] == listing.paths[at]
            assert (split.y[i], split.a[i]) == (listing.y[at], listing.a[at])
            assert split.small[i].equal(squash(listing.read(at), 8).permute(1, 2, 0))
            assert split.large[i].equal(centre_square(listing.read(at), 12).permute(1, 2, 0))
            at += 1
    assert at == len(listing) == 12
    assert (data.name, data.classes, data.biases) == ("set", ("cat", "dog"), ("red", "blue"))
    assert data.fingerprint == listing.fingerprint


# --- groups ------------------------------------------------------------------------------------


def test_groups_of_every_split_are_aligned_as_training_is(tmp_path):
    """Training says cat-blue and dog-red, numbered crosswise; the test split says the opposite."""
    items = [Entry(f"{i}", i % 2, "train", pixels(i), 1 - i % 2) for i in range(8)]
    items += [Entry(f"{i}", i % 2, "test", pixels(i), i % 2) for i in range(8, 14)]
    data = opened(embedded(entries=tuple(items)), tmp_path)
    train, test = data.groups("train"), data.groups("test")
    expected = majority_bias(train.y, train.a, num_classes=2, num_biases=2)
    assert expected.tolist() == [1, 0]
    assert train.bias_aligned.all() and not test.bias_aligned.any()
    assert test.names[2] == "y=dog a=red"
    assert test.counts.tolist() == [3, 0, 0, 3]


def test_a_source_may_say_what_is_aligned_and_may_have_no_bias_labels(tmp_path):
    data = opened(embedded(aligned_bias=(1, 1)), tmp_path / "a")
    assert data.groups("test").aligned_bias.tolist() == [1, 1]
    unlabelled = tuple(e._replace(a=None) for e in embedded().entries)
    assert opened(embedded(entries=unlabelled, biases=None), tmp_path / "b").groups("train") is None


# --- damaged files -----------------------------------------------------------------------------


def test_broken_files_stop_a_run_and_are_named(tmp_path):
    root = photos(tmp_path / "pets")
    (root / "dog" / "3.png").write_bytes(b"nothing")
    (root / "cat" / "5.png").write_bytes((root / "cat" / "5.png").read_bytes()[:900])
    with pytest.raises(ValueError) as error:
        opened(list_folder(root), tmp_path / "cache")
    line = str(error.value)
    assert "\n" not in line
    assert "pets: 2 of 16 images cannot be read" in line
    assert "cat/5.png" in line and "dog/3.png" in line and "--data.corrupt skip" in line
    assert list((tmp_path / "cache").iterdir()) == []


def test_reading_stops_after_a_handful_of_broken_files(tmp_path, monkeypatch):
    root = photos(tmp_path / "pets", count=200)
    for file in (root / "cat").iterdir():
        file.write_bytes(b"")
    seen, read = [], Listing.read
    monkeypatch.setattr(Listing, "read", lambda self, i: (seen.append(i), read(self, i))[1])
    with pytest.raises(ValueError, match="5 or more of 400 images cannot be read"):
        opened(list_folder(root), tmp_path / "cache")
    assert len(seen) < 100


def test_broken_files_are_skipped_when_asked(tmp_path, caplog):
    root = photos(tmp_path / "pets")
    whole = opened(list_folder(root), tmp_path / "whole").splits["train"]
    gone = whole.paths[2]
    content = (root / gone).read_bytes()
    (root / gone).write_bytes(b"\0" * len(content))
    listing = list_folder(root)
    with caplog.at_level(logging.WARNING):
        first = opened(listing, tmp_path / "cache", corrupt="skip")
    assert f"1 broken images left out: {gone}" in caplog.text
    train = first.splits["train"]
    assert train.paths == whole.paths[:2] + whole.paths[3:]
    assert train.large.equal(torch.cat([whole.large[:2], whole.large[3:]]))
    assert train.y.equal(torch.cat([whole.y[:2], whole.y[3:]]))
    assert everything(opened(listing, tmp_path / "cache", corrupt="skip")) == everything(first)
    # The same cache is not good enough for a run that wants every image.
    with pytest.raises(ValueError, match="1 of 16 images"):
        opened(listing, tmp_path / "cache", corrupt="error")


def test_a_class_that_loses_all_its_training_images_is_refused(tmp_path, caplog):
    root = photos(tmp_path / "pets", count=7)
    for i in range(7):
        (root / "cat" / f"{i}.png").write_bytes(b"")
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(ValueError, match="class cat has no training images"),
    ):
        opened(list_folder(root), tmp_path / "cache", corrupt="skip")
    assert "7 broken images left out" in caplog.text and "and 2 more" in caplog.text


def test_an_unknown_answer_to_broken_files_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'drop'"):
        opened(embedded(), tmp_path, corrupt="drop")


# --- the cache ---------------------------------------------------------------------------------


def test_decoding_is_done_once(tmp_path, monkeypatch):
    first = everything(opened(embedded(), tmp_path))
    assert {p.name for p in tmp_path.iterdir()} == {"small.u8", "large.u8", "meta.json"}
    monkeypatch.setattr(Listing, "read", None)
    assert everything(opened(embedded(), tmp_path)) == first


@pytest.mark.parametrize(
    ("name", "left"),
    [("small.u8", None), ("large.u8", None), ("meta.json", None), ("small.u8", -1)],
)
def test_an_unfinished_cache_is_written_anew(tmp_path, name, left):
    first = everything(opened(embedded(), tmp_path))
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).unlink()
    if left is not None:
        (tmp_path / name).write_bytes(content[:left])
    assert everything(opened(embedded(), tmp_path)) == first
    assert {p.name for p in tmp_path.iterdir()} == {"small.u8", "large.u8", "meta.json"}


def test_other_sizes_are_decoded_anew(tmp_path):
    opened(embedded(), tmp_path)
    other = opened(embedded(), tmp_path, image_size=4)
    assert other.splits["train"].small.shape[1:] == (4, 4, 3)
    assert everything(other) == everything(opened(embedded(), tmp_path / "new", image_size=4))


def test_data_that_changed_is_refused_and_the_cache_kept(tmp_path):
    opened(embedded(), tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(ValueError) as error:
        opened(embedded(count=14), tmp_path)
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value) and "delete that folder" in str(error.value)
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_damaged_description_is_refused(tmp_path):
    opened(embedded(), tmp_path)
    (tmp_path / "meta.json").write_text("{")
    with pytest.raises(ValueError, match=r"meta\.json: damaged"):
        opened(embedded(), tmp_path)


class FullDisk:
    """A file that takes so many bytes and then refuses, as a full disk does."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, content):
        self.room -= memoryview(content).nbytes
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.file.write(content)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.file.close()


@pytest.mark.parametrize("part", ["small.u8", "large.u8", "meta.json"])
def test_a_full_disk_leaves_nothing_that_is_believed(tmp_path, monkeypatch, part):
    real = type(tmp_path).open

    def opening(path, *arguments, **options):
        file = real(path, *arguments, **options)
        return FullDisk(file, 100) if path.name.startswith(f".{part}.") else file

    with monkeypatch.context() as patch:
        patch.setattr(type(tmp_path), "open", opening)
        with pytest.raises(OSError) as error:
            opened(embedded(), tmp_path)
    assert error.value.errno == errno.ENOSPC
    assert error.value.filename == str(tmp_path) and "decoded images" in str(error.value)
    assert not list(tmp_path.glob(".*")) and not (tmp_path / "meta.json").exists()
    assert not [t for t in threading.enumerate() if t.name.startswith("ThreadPool")]
    assert everything(opened(embedded(), tmp_path)) == everything(
        opened(embedded(), tmp_path / "b")
    )


def test_a_rebuild_that_is_killed_does_not_pass_for_the_old_cache(tmp_path, monkeypatch):
    """From its first byte on nothing vouches for the arrays, which may be of either."""
    opened(embedded(), tmp_path)
    assert json.loads((tmp_path / "meta.json").read_text())["sizes"] == {"small": 8, "large": 12}

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(store.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        opened(embedded(), tmp_path, image_size=4)
    assert not (tmp_path / "meta.json").exists()


def test_hundreds_of_images_come_in_order(tmp_path, monkeypatch):
    """Though every seventh takes longer than those after it."""
    monkeypatch.setattr(store.os, "cpu_count", lambda: 3)
    items = tuple(
        Entry(f"{i:03d}", i % 3 > 1, "train", np.full((6, 6, 3), i % 251, np.uint8))
        for i in range(300)
    )
    listing = Listing(name="many", classes=("a", "b"), entries=items)
    read = Listing.read

    def uneven(self, i):
        if i % 7 == 0:
            time.sleep(0.002)
        return read(self, i)

    monkeypatch.setattr(Listing, "read", uneven)
    train = opened(listing, tmp_path, image_size=2, cache_size=3).splits["train"]
    assert len(train) == 300
    expected = torch.tensor([int(path) % 251 for path in train.paths]).to(torch.uint8)
    for images in (train.small, train.large):
        assert images.flatten(1).eq(expected[:, None]).all()


def test_decoding_does_not_run_ahead_of_a_slow_disk(monkeypatch):
    monkeypatch.setattr(store.os, "cpu_count", lambda: 3)
    begun = []
    answers = store.in_order(lambda i: (begun.append(i), i)[1], 300)
    for i in range(50):
        assert next(answers) == i
        assert len(begun) <= i + 1 + 4 * 3
    answers.close()


# --- handing out -------------------------------------------------------------------------------


def test_images_stay_on_disk_and_writing_to_them_changes_no_file(tmp_path):
    data = opened(embedded(), tmp_path)
    before = (tmp_path / "small.u8").read_bytes()
    data.splits["train"].small.fill_(7)
    assert (tmp_path / "small.u8").read_bytes() == before


def test_a_file_larger_than_memory_can_be_mapped(tmp_path):
    size = 2 * (psutil.virtual_memory().total + psutil.swap_memory().total)
    with (tmp_path / "x.u8").open("wb") as file:  # sparse: takes no room
        file.truncate(size)
    images = store._mapped(tmp_path / "x.u8", (size // 1024, 1024))
    images[-1, 5] = 7
    assert images[-1, :7].tolist() == [0, 0, 0, 0, 0, 7, 0]


def test_resident_reads_into_memory_what_fits(tmp_path, monkeypatch, caplog):
    images = opened(embedded(), tmp_path).splits["train"].small
    with caplog.at_level(logging.DEBUG):
        held = resident(images, CPU)
    assert held.equal(images) and held.data_ptr() != images.data_ptr()
    assert "held in memory" in caplog.text
    # A quarter of what is free must hold them.
    memory = type("Memory", (), {"available": 4 * images.nbytes})
    monkeypatch.setattr(store.psutil, "virtual_memory", lambda: memory)
    with caplog.at_level(logging.INFO):
        assert resident(images, CPU) is images
    assert "left where they are" in caplog.text
    memory.available += 4
    assert resident(images, CPU) is not images
    # Synthetic images are there already, and were held twice while networks were trained on them.
    assert resident(held, CPU) is held
    loaded = torch.arange(48, dtype=torch.uint8).view(1, 3, 4, 4).permute(0, 2, 3, 1).contiguous()
    assert resident(loaded, CPU) is loaded


def test_gather_is_a_channels_last_batch():
    images = torch.arange(5 * 4 * 4 * 3, dtype=torch.uint8).view(5, 4, 4, 3)
    batch = gather(images, torch.tensor([4, 0, 4]), CPU)
    assert batch.shape == (3, 3, 4, 4) and batch.dtype == torch.uint8
    assert batch.is_contiguous(memory_format=torch.channels_last)
    assert batch[1, 2, 3, 1] == images[0, 3, 1, 2]
    assert batch[0].equal(batch[2]) and batch[0].equal(images[4].permute(2, 0, 1))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_images_move_to_a_gpu_when_they_fit(monkeypatch):
    images = torch.arange(5 * 4 * 4 * 3, dtype=torch.uint8).view(5, 4, 4, 3)
    gpu, index = torch.device("cuda", 0), torch.tensor([4, 0, 4], device="cuda")
    moved = resident(images, gpu)
    assert moved.device == gpu
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (2 * images.nbytes, 0))
    assert resident(images, gpu) is images
    for place in (images, moved):
        batch = gather(place, index, gpu)
        assert batch.device == gpu and batch.cpu().equal(gather(images, index.cpu(), CPU))
        assert batch.is_contiguous(memory_format=torch.channels_last)
