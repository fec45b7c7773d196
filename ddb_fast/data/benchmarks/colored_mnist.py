"""Colored MNIST, the protocol of LfF (Nam et al. 2020), made from MNIST's own four files.

A digit's strokes have a colour, the background is black; colour i goes with digit i in most
training images. What noise there is comes from the raw output of the Philox counter generator,
which NumPy keeps the same: the set is the same on every machine, and image i's noise at any rho.
"""

import gzip
import logging
import lzma
import zlib
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate
from pathlib import Path
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

from ddb_fast.data.benchmarks.layout import LayoutError
from ddb_fast.data.digits import COLOURS
from ddb_fast.data.listing import Entry, Listing

logger = logging.getLogger(__name__)

FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
"""Names of images and labels; each may end in .gz or .xz."""
SIDE = 28
COUNTS = {
    "train": (5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949),
    "test": (980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009),
}
"""Images of each digit in MNIST."""
_OPENERS = {"": open, ".gz": gzip.open, ".xz": lzma.open}
_NOISE = 0.005
_STREAMS = {"train": 2, "test": 3}  # Colored Digits has 0 and 1
_RENDERED_AT_ONCE = 1000
# Seven pixels of 28 x 28: even the thinnest of MNIST's digits has as many at nearly full strength.
_BRIGHT_SHARE = 1 / 100


def list_colored_mnist(
    folder: str | Path, *, rho: float = 0.98, validation_share: float = 0.1
) -> Listing:
    """Render Colored MNIST with a share rho of bias-aligned training images.

    folder: holds MNIST's four idx files, as they are, .gz or .xz (the first of these that exists).
    Per class, in the order of the file, `colours_of` deals the colours; the test images are dealt
    with a rho of 0.1. An image is pixel/255 * clip(mean colour + N(0, 0.005^2), 0, 1), noise for
    each channel and image, rounded to 8 bits; 28 pixels, padded (never resized) for the diffusion
    model. The published protocol has no validation split and ends at validation_share 0; otherwise
    `held_out` takes that share from training.

    Raises:
        ValueError: one line, for a share outside [0, 1] and for files that are missing, damaged,
            truncated or not MNIST's format.
        OSError: the disk refuses to read.
    """
    for name, share in (("rho", rho), ("validation_share", validation_share)):
        if not 0 <= share <= 1:
            raise ValueError(f"{name} is {share}, a share in [0, 1] is needed")
    folder, entries = Path(folder), []
    for split, names in FILES.items():
        strokes, y = _read_split(folder, names)
        if tuple(np.bincount(y, minlength=10)) != COUNTS[split]:
            logger.warning(
                "%s: %d %s images, not MNIST's %d or not its counts of each digit: figures do not "
                "compare with published ones",
                folder, len(y), split, sum(COUNTS[split]),
            )  # fmt: skip
        colours = colours_of(y, Fraction(str(rho)) if split == "train" else Fraction(1, 10))
        held = np.zeros(len(y), dtype=bool)
        if split == "train":
            held = held_out(y, colours, Fraction(str(validation_share)))
        rendered = _render(strokes, colours, stream=_STREAMS[split])
        columns = (y.tolist(), colours.tolist(), held.tolist(), rendered)
        for i, (label, colour, validates, pixels) in enumerate(zip(*columns, strict=True)):
            part = "val" if validates else split
            path = f"{part}/{label}/{i:05d}_c{colour}.png"
            entries.append(Entry(path, label, part, pixels, colour))
    return Listing(
        name="colored-mnist",
        classes=tuple(str(label) for label in range(10)),
        entries=tuple(entries),
        biases=tuple(f"colour {colour}" for colour in range(10)),
        aligned_bias=tuple(range(10)),
        bias_of=stroke_colour,
        fit="pad",
    )


def colours_of(y: np.ndarray, rho: Fraction) -> np.ndarray:
    """The colour of each image, (N,) int64, rho of a class's images in its own.

    y: (N,) classes 0..9 in the order of the file. The n images of class c are cut at
    round(n * cumsum(r)), halves to even, r = (1 - rho) / 9 everywhere but r[c] = rho; consecutive
    blocks get colours 0..9.
    """
    colours = np.zeros(len(y), dtype=np.int64)
    for label in range(10):
        members = np.flatnonzero(y == label)
        shares = [(1 - rho) / 9] * 10
        shares[label] = rho
        cuts = [round(len(members) * reached) for reached in accumulate(shares)]
        colours[members] = np.searchsorted(cuts, np.arange(len(members)), side="right")
    return colours


def held_out(y: np.ndarray, colours: np.ndarray, share: Fraction) -> np.ndarray:
    """Which training images validate instead, (N,) bool: `share` of each class and colour.

    The n images of a class stand in line, own colour first, then the other colours in turn from
    y + 1 on, each in the order of the file. Image k of the line (from 0) validates if
    floor(share (k + 1) + 1/2) exceeds floor(share k + 1/2): floor(share n + 1/2) images, evenly
    spread, so that each colour, and all conflicting ones together, give their share to within one.
    """
    held = np.zeros(len(y), dtype=bool)
    p, q = share.numerator, share.denominator
    for label in range(10):
        members = np.flatnonzero(y == label)
        line = members[np.argsort((colours[members] - label) % 10, kind="stable")]
        reached = [(2 * k * p + q) // (2 * q) for k in range(len(line) + 1)]
        held[line] = np.diff(reached) > 0
    return held


def _render(strokes: np.ndarray, colours: np.ndarray, *, stream: int) -> np.ndarray:
    """(N, 28, 28, 3) uint8 from (N, 28, 28) uint8; image i takes numbers 3i to 3i + 2."""
    key = np.array([0, stream], dtype=np.uint64)
    raw = np.random.Philox(key=key).random_raw(3 * len(colours))
    normal = np.array([NormalDist().inv_cdf(u) for u in (((raw >> 11) + 0.5) * 2.0**-53).tolist()])
    shades = np.clip(COLOURS[colours] + _NOISE * normal.reshape(-1, 3), 0, 1).astype(np.float32)
    images = np.empty((*strokes.shape, 3), dtype=np.uint8)
    for start in range(0, len(images), _RENDERED_AT_ONCE):
        part = slice(start, start + _RENDERED_AT_ONCE)
        images[part] = np.rint(strokes[part, ..., None] * shades[part, None, None])
    return images


def recoloured(folder: str | Path, paths: Sequence[str], colours: np.ndarray) -> Tensor:
    """Training digits in other colours: (N, 28, 28, 3) uint8, without noise.

    paths: (N,) of training or validation images, as listed; colours: (N,) in 0..9. For choices on
    validation digits that the shortcut does not help with. ValueError as `list_colored_mnist`.
    """
    strokes, _ = _read_split(Path(folder), FILES["train"])
    number = [int(Path(path).stem.split("_")[0]) for path in paths]
    shades = COLOURS[colours].astype(np.float32)
    return torch.from_numpy(np.rint(strokes[number, ..., None] * shades[:, None, None])).byte()


def stroke_colour(images: Tensor) -> Tensor:
    """The mean colour nearest to each image's bright pixels, (N,) int64.

    images: (N, 3, H, W) uint8, a digit on black. Strokes fade at their edges, so the brightest
    hundredth of the pixels, by the sum of the channels, is taken, and their median per channel.
    ValueError for another shape or dtype.
    """
    if images.ndim != 4 or images.shape[1] != 3 or images.dtype != torch.uint8:
        raise ValueError(
            f"images must be (N, 3, H, W) uint8, got {tuple(images.shape)} {images.dtype}"
        )
    colours = torch.tensor(255 * COLOURS, dtype=torch.float32, device=images.device)
    answers = []
    for part in images.flatten(2).split(_RENDERED_AT_ONCE):
        pixels = part.float()
        count = max(1, int(pixels.shape[2] * _BRIGHT_SHARE))
        brightest = pixels.sum(1).topk(count).indices
        shade = pixels.gather(2, brightest[:, None].expand(-1, 3, -1)).median(2).values
        answers.append((shade[:, None] - colours).square().sum(2).argmin(1))
    return torch.cat(answers)


def _read_split(folder: Path, names: tuple[str, str]) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 28, 28) uint8 and labels (N,) int64 of one split."""
    image_file, images = _read_idx(folder, names[0], dimensions=3)
    label_file, labels = _read_idx(folder, names[1], dimensions=1)
    if images.shape[1:] != (SIDE, SIDE):
        raise ValueError(
            f"{image_file}: images of {images.shape[1]} x {images.shape[2]} pixels, MNIST's have "
            f"{SIDE} x {SIDE}"
        )
    if len(images) != len(labels):
        raise ValueError(
            f"{image_file}: {len(images)} images, {len(labels)} labels in {label_file}"
        )
    if len(labels) and labels.max() > 9:
        raise ValueError(f"{label_file}: label {labels.max()} is none of the digits 0 to 9")
    return images, labels.astype(np.int64)


def _read_idx(folder: Path, name: str, *, dimensions: int) -> tuple[Path, np.ndarray]:
    """The file that holds `name`, and its uint8 contents in their shape."""
    found = [
        (folder / f"{name}{end}", end) for end in _OPENERS if (folder / f"{name}{end}").is_file()
    ]
    if not found:
        raise LayoutError(f"{folder}: no {name}")
    file, end = found[0]
    try:
        with _OPENERS[end](file, "rb") as stream:
            content = stream.read()
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{file}: damaged or truncated ({error})") from None
    header = 4 + 4 * dimensions
    # Two zeros, 8 for unsigned bytes, the number of dimensions; then their sizes, big-endian.
    if content[:4] != bytes((0, 0, 8, dimensions)) or len(content) < header:
        raise ValueError(
            f"{file}: not an idx file of bytes in {dimensions} dimensions (it starts with "
            f"{content[:4].hex() or 'nothing'})"
        )
    shape = [int.from_bytes(content[at : at + 4], "big") for at in range(4, header, 4)]
    promised = header + int(np.prod(shape, dtype=object))
    if len(content) != promised:
        what = "truncated" if len(content) < promised else "too long"
        raise ValueError(f"{file}: {what}, {len(content)} bytes where its header says {promised}")
    return file, np.frombuffer(content, dtype=np.uint8, offset=header).reshape(shape)
