"""Colored MNIST against the protocol's text, recomputed from MNIST's files; files gone wrong."""

import gzip
import lzma
import re
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from ddb_fast import cli
from ddb_fast.config import DataConfig
from ddb_fast.data.benchmarks.colored_mnist import (
    colours_of,
    held_out,
    list_colored_mnist,
    recoloured,
    stroke_colour,
)
from ddb_fast.data.digits import COLOURS
from ddb_fast.data.sources import open_listing
from ddb_fast.data.store import pad

DATA = Path(__file__).parents[3] / "shared" / "data"
MNIST = DATA / "mnist"
NAMES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
needs_mnist = pytest.mark.skipif(not MNIST.exists(), reason="MNIST is not on this machine")


@pytest.fixture(scope="module")
def real():
    """{split: (strokes (N, 28, 28), labels (N,))}, read without our reader."""

    def read(name, header):
        return np.frombuffer(lzma.open(MNIST / f"{name}.xz").read(), np.uint8, offset=header)

    return {s: (read(a, 16).reshape(-1, 28, 28), read(b, 8)) for s, (a, b) in NAMES.items()}


@pytest.fixture(scope="module")
def rendered():
    return list_colored_mnist(MNIST, rho=0.995, validation_share=0.0)


def dealt(labels, own, others):
    """The colour of each image by the protocol: cumulated shares of own and other colours in
    9000ths, halves to even, in whole numbers."""
    colours = np.full(len(labels), -1)
    for y in range(10):
        members, at, reached = np.flatnonzero(labels == y), 0, 0
        for colour in range(10):
            reached += own if colour == y else others
            whole, rest = divmod(len(members) * reached, 9000)
            cut = whole + (rest > 4500 or (rest == 4500 and whole % 2 == 1))
            colours[members[at:cut]] = colour
            at = cut
        assert at == len(members)
    return colours


def in_file_order(listing, split):
    """The entries of a split by the number that their path ends in."""
    entries = [e for e in listing.entries if e.split == split]
    return sorted(entries, key=lambda e: e.path.rsplit("/", 1)[1])


@needs_mnist
def test_colours_of_every_image_are_the_protocols(real, rendered):
    """own = 9000 rho, others = 1000 (1 - rho) each."""
    for rho, own, others in ((".95", 8550, 50), (".98", 8820, 20), (".99", 8910, 10)):
        labels = real["train"][1]
        assert (colours_of(labels, Fraction(rho)) == dealt(labels, own, others)).all()
    for split, own, others in (("train", 8955, 5), ("test", 900, 900)):
        labels = real[split][1]
        entries = in_file_order(rendered, split)
        assert [e.y for e in entries] == labels.tolist()
        assert [e.a for e in entries] == dealt(labels, own, others).tolist()
    assert Counter(rendered.split) == {"train": 60_000, "test": 10_000}
    assert rendered.aligned_bias == tuple(range(10)) and rendered.fit == "pad"
    # Worked by hand for the 5,923 zeros: cuts at round(5893.385 + 3.2905 k), so 5893 in colour 0.
    zeros = Counter(e.a for e in rendered.entries if (e.split, e.y) == ("train", 0))
    assert [zeros[c] for c in range(10)] == [5893, 4, 3, 3, 4, 3, 3, 3, 4, 3]


@needs_mnist
@pytest.mark.parametrize("split", ["train", "test"])
def test_pixels_are_strokes_times_a_noisy_mean_colour(real, rendered, split):
    text = (DATA / "lff_colors.md").read_text()
    means = np.array(
        [
            [float(x) for x in re.findall(r"\.\d+", row)]
            for row in re.findall(r"^\| \d.*", text, re.M)
        ]
    )
    assert means.shape == (10, 3)
    strokes = real[split][0][:3000].astype(float)
    entries = in_file_order(rendered, split)[:3000]
    images = np.stack([e.pixels for e in entries]).astype(float)
    assert entries[0].pixels.dtype == np.uint8 and images.shape[1:] == (28, 28, 3)
    # The colours that would give each pixel as it is rounded: what all pixels of an image allow.
    p = np.where(strokes > 0, strokes, np.nan)[..., None]
    low = np.nanmax((images - 0.5) / p, axis=(1, 2))
    high = np.nanmin((images + 0.5) / p, axis=(1, 2))
    gap = (low - high).max()
    assert gap < 1e-6
    shade = (low + high) / 2
    assert (images[strokes == 0] == 0).all()
    noise = shade - means[[e.a for e in entries]]
    inside = ((means > 0.03) & (means < 0.97))[[e.a for e in entries]]
    assert np.abs(noise[inside].mean()) < 3e-4
    assert noise[inside].std() == pytest.approx(0.005, rel=0.03)
    assert np.abs(np.corrcoef(noise[inside.all(1)].T)[np.triu_indices(3, 1)]).max() < 0.08
    least, most = low.max(), high.min()
    assert least <= 1 and most >= 0


@needs_mnist
def test_noise_is_an_images_own_at_any_rho_and_validation_a_share_of_each_colour(rendered):
    listing = open_listing(DataConfig(source="colored-mnist", path=str(MNIST), rho=0.95))
    number = {}
    for entry in rendered.entries:
        if entry.split == "train":
            number[entry.path.rsplit("/", 1)[1][:5]] = entry
    same = 0
    for entry in listing.entries:
        if entry.split == "test":
            continue
        other = number[entry.path.rsplit("/", 1)[1][:5]]
        assert entry.y == other.y
        if entry.a == other.a:
            assert entry.pixels.tobytes() == other.pixels.tobytes()
            same += 1
    assert same > 50_000
    cells = Counter((e.y, e.a, e.split) for e in listing.entries)
    for y in range(10):
        for a in range(10):
            held, all_ = cells[y, a, "val"], cells[y, a, "val"] + cells[y, a, "train"]
            assert abs(held - 0.1 * all_) < 1, (y, a)
    assert Counter(listing.split) == {"train": 54_000, "val": 6_000, "test": 10_000}


@needs_mnist
def test_the_colour_is_read_off_the_strokes_of_an_image(rendered):
    entries = rendered.entries[-10_000:]
    images = torch.from_numpy(np.stack([e.pixels for e in entries])).permute(0, 3, 1, 2)
    truth = torch.tensor([e.a for e in entries])
    wrong = (stroke_colour(images) != truth).sum()
    assert wrong == 0
    padded = torch.stack([pad(rendered.read(i), 32) for i in range(200)])
    wrong = (stroke_colour(padded) != rendered.a[:200]).sum()
    assert wrong == 0


# --- files of other kinds ------------------------------------------------------------------------


def idx(array):
    """An array of bytes as MNIST's files hold it."""
    sizes = b"".join(n.to_bytes(4, "big") for n in array.shape)
    return bytes((0, 0, 8, array.ndim)) + sizes + array.astype(np.uint8).tobytes()


@pytest.fixture
def small(tmp_path):
    """Twenty images of each digit in either split, compressed in three ways."""
    labels = np.tile(np.arange(10), 20)
    strokes = np.random.default_rng(0).integers(0, 256, (200, 28, 28))
    contents = [("", idx(strokes)), (".gz", gzip.compress(idx(labels)))]
    contents += [(".xz", lzma.compress(idx(strokes))), ("", idx(labels))]
    for name, (end, content) in zip(sum(NAMES.values(), ()), contents, strict=True):
        (tmp_path / f"{name}{end}").write_bytes(content)
    return tmp_path


def test_files_raw_or_compressed_and_a_warning_that_it_is_not_mnist(small, caplog):
    listing = list_colored_mnist(small, rho=0.9, validation_share=0.0)
    assert Counter(listing.split) == {"train": 200, "test": 200}
    aligned = sum(e.a == e.y for e in listing.entries if e.split == "train")
    assert aligned == 180
    assert "200 train images, not MNIST's 60000" in caplog.text
    again = list_colored_mnist(small, rho=0.9, validation_share=0.0)
    assert again.fingerprint == listing.fingerprint


# --- the protocol where MNIST is not: other labels, other strokes ---------------------------------


def test_colours_of_any_labels_are_the_protocols():
    labels = np.random.default_rng(0).integers(0, 10, 3000) ** 2 // 10
    assert len(set(labels)) < 10, "a digit without images"
    for rho, own, others in (
        (".95", 8550, 50),
        (".9", 8100, 100),
        (".1", 900, 900),
        ("1", 9000, 0),
    ):
        assert (colours_of(labels, Fraction(rho)) == dealt(labels, own, others)).all()


@pytest.mark.parametrize("share", ["0", "0.1", "0.25", "1"])
def test_each_colour_gives_its_share_to_validation(share):
    labels = np.random.default_rng(1).integers(0, 10, 5000)
    colours, part = colours_of(labels, Fraction("0.8")), Fraction(share)
    held = held_out(labels, colours, part)
    for y in range(10):
        of_class = labels == y
        assert held[of_class].sum() == int(part * int(of_class.sum()) + Fraction(1, 2))
        cells = [of_class & (colours == c) for c in range(10)] + [of_class & (colours != y)]
        assert all(abs(held[cell].sum() - part * int(cell.sum())) < 1 for cell in cells)
    # In the order of the file the held-out images are spread, and not the first of a colour.
    own = np.flatnonzero((labels == 3) & (colours == 3))
    if 0 < part < 1:
        assert np.diff(np.flatnonzero(held[own])).max() <= -(-1 // part)


def test_any_strokes_are_drawn_in_a_noisy_mean_colour_and_it_is_read_off(small):
    listing = list_colored_mnist(small, rho=0.5, validation_share=0.0)
    strokes = np.random.default_rng(0).integers(0, 256, (200, 28, 28)).astype(float)
    noise, pictures, truth = [], [], []
    for split in ("train", "test"):
        entries = in_file_order(listing, split)
        images = np.stack([e.pixels for e in entries]).astype(float)
        # The largest stroke tells the colour to half of one of 255 levels.
        brightest = strokes.reshape(200, -1).argmax(1)
        level = strokes.reshape(200, -1).max(1)
        shade = images.reshape(200, -1, 3)[np.arange(200), brightest] / level[:, None]
        assert np.abs(images - strokes[..., None] * shade[:, None, None]).max() <= 1.01
        a = np.array([e.a for e in entries])
        noise.append(shade - COLOURS[a])
        noise[-1][(COLOURS[a] < 0.03) | (COLOURS[a] > 0.97)] = np.nan
        pictures.append(torch.tensor(images).byte().permute(0, 3, 1, 2))
        truth.append(torch.tensor(a))
    for of_split in noise:
        assert np.abs(np.nanmean(of_split)) < 1e-3
        assert np.nanstd(of_split) == pytest.approx(0.005, rel=0.1)
    assert np.nanmax(np.abs(noise[0] - noise[1])) > 0.005, "each split has noise of its own"
    # More of them than are looked at at once.
    assert torch.equal(stroke_colour(torch.cat(3 * pictures)), torch.cat(3 * truth))
    cells = Counter((i % 10, colour) for i, colour in enumerate(truth[1].tolist()))
    assert set(cells.values()) == {2} and len(cells) == 100, "two test images in each colour"
    assert listing.aligned_bias == tuple(range(10)) and listing.fit == "pad"


def test_files_that_are_wrong(small, capsys):
    labels, images = small / "t10k-labels-idx1-ubyte", small / "train-images-idx3-ubyte"
    kept = {path: path.read_bytes() for path in (labels, images)}

    def line(path, content):
        for each, whole in kept.items():
            each.write_bytes(whole)
        path.write_bytes(content)
        assert cli.main(["data", str(small), "--as", "colored-mnist"]) == 2
        (answer,) = capsys.readouterr().err.strip().splitlines()
        return answer

    assert "t10k-labels-idx1-ubyte: truncated, 207 bytes where" in line(labels, kept[labels][:-1])
    assert "too long" in line(labels, kept[labels] + b"x")
    assert "not an idx file" in line(labels, b"<html>")
    assert "starts with nothing" in line(labels, b"")
    assert "label 10 is none of the digits" in line(labels, kept[labels][:-1] + b"\x0a")
    assert "images of 27 x 28 pixels" in line(images, idx(np.zeros((200, 27, 28))))
    assert "199 images, 200 labels" in line(images, idx(np.zeros((199, 28, 28))))
    compressed = small / "train-labels-idx1-ubyte.gz"
    assert "damaged or truncated" in line(compressed, compressed.read_bytes()[:-9])
    compressed.unlink()
    told = line(labels, kept[labels])
    assert "no train-labels-idx1-ubyte; expected ROOT/ with MNIST's" in told
    assert "published at https://" in told


@pytest.mark.parametrize("share", [{"rho": 1.5}, {"rho": -0.1}, {"validation_share": 2}])
def test_shares_that_are_none(small, share):
    with pytest.raises(ValueError, match="a share in"):
        list_colored_mnist(small, **share)


def test_digits_in_other_colours_keep_their_strokes(small):
    listing = list_colored_mnist(small, rho=0.9, validation_share=0.2)
    entries = [entry for entry in listing.entries if entry.split != "test"]
    assert {entry.split for entry in entries} == {"train", "val"}
    paths = [entry.path for entry in entries]
    same = recoloured(small, paths, np.array([entry.a for entry in entries]))
    shown = np.stack([entry.pixels for entry in entries]).astype(int)
    # The same but for the noise, of deviation 0.005 in 255 levels.
    assert np.abs(same.numpy().astype(int) - shown).max() <= 5 * 0.005 * 255 + 1
    blue = recoloured(small, paths, np.full(len(paths), 6)).numpy()
    strokes = np.random.default_rng(0).integers(0, 256, (200, 28, 28))
    number = [int(path.split("/")[-1][:5]) for path in paths]
    assert np.array_equal(blue[..., 2], np.rint(strokes[number] * np.float32(0.7587)))
