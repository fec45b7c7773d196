"""What a source of images holds before a pixel is decoded: files, labels, splits, groups.

Every source, a folder, a CSV or an embedded set, becomes a `Listing`; what follows never asks where
images came from. Listings are made on every start of a run, so they touch names and sizes only.
"""

import hashlib
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from os.path import normpath, realpath
from os.path import split as split_path
from pathlib import Path
from stat import S_ISLNK, S_ISREG
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

SPLITS = ("train", "val", "test")
# By content, not by name; the other formats that Pillow knows are not opened (EPS runs a program).
_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF", "PPM")


class BrokenImageError(ValueError):
    """An image file whose contents cannot be decoded."""


class Entry(NamedTuple):
    """One image: the path shown to people, its labels, and a file or uint8 (H, W, 3) pixels.

    clusters: its number in each of some clusterings, for evaluation where no bias label exists.
    """

    path: str
    y: int
    split: str
    pixels: Path | np.ndarray
    a: int | None = None
    clusters: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False, kw_only=True)
class Listing:
    """The images of a source, sorted by split (train, val, test), then class, then path.

    classes, biases: names of the values of y and a; biases is None without bias labels, and then
    every entry's `a` is. aligned_bias: the attribute of each class that makes its images
    bias-aligned, None to take the majority among the training images. factors: where a stands for
    several attributes, the name and number of values of each; a is the number with these as its
    digits, the first most significant. bias_of: the attributes (N,) of any uint8 images
    (N, 3, H, W), where pixels tell. fit: how the diffusion model's copy takes its size: squash
    resizes; pad puts black around what is smaller and resizes what is larger. ValueError for fewer
    than two classes, a class without training images, factors that make another number of biases,
    clusters that only some images of a split have, and as `check_entries`.
    """

    name: str
    classes: tuple[str, ...]
    entries: tuple[Entry, ...]
    biases: tuple[str, ...] | None = None
    aligned_bias: tuple[int, ...] | None = None
    factors: tuple[tuple[str, int], ...] = ()
    bias_of: Callable[[Tensor], Tensor] | None = None
    fit: Literal["squash", "pad"] = "squash"

    def __post_init__(self) -> None:
        order = sorted(self.entries, key=lambda e: (SPLITS.index(e.split), e.y, e.path))
        object.__setattr__(self, "entries", tuple(order))
        if len(self.classes) < 2:
            raise ValueError(
                f"{self.name}: only one class, {', '.join(self.classes)}; a classifier needs two"
            )
        trained = {entry.y for entry in self.entries if entry.split == "train"}
        for label, name in enumerate(self.classes):
            if label not in trained:
                others = Counter(entry.split for entry in self.entries if entry.y == label)
                found = ", ".join(f"{n} {split}" for split, n in others.items()) or "none at all"
                raise ValueError(
                    f"{self.name}: class {name} has no training images ({found}); "
                    "add some to its train split or remove the class"
                )
        if self.factors and math.prod(n for _, n in self.factors) != len(self.biases or ()):
            raise ValueError(
                f"{self.name}: factors {self.factors} do not make the {len(self.biases or ())} "
                "values of a"
            )
        for split in SPLITS:
            if len({len(entry.clusters) for entry in self.entries if entry.split == split}) > 1:
                raise ValueError(f"{self.name}: only some images of {split} have clusters")
        check_entries(self.name, self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    @cached_property
    def paths(self) -> tuple[str, ...]:
        return tuple(entry.path for entry in self.entries)

    @cached_property
    def split(self) -> tuple[str, ...]:
        return tuple(entry.split for entry in self.entries)

    @cached_property
    def y(self) -> Tensor:
        """Classes, (N,) int64."""
        return torch.tensor([entry.y for entry in self.entries])

    @cached_property
    def a(self) -> Tensor | None:
        """Bias attributes, (N,) int64."""
        return None if self.biases is None else torch.tensor([entry.a for entry in self.entries])

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of classes, paths, splits, labels, clusters, file sizes or embedded pixels."""
        digest = hashlib.sha256(json.dumps(self.classes).encode())
        for path, y, split, pixels, a, clusters in self.entries:
            embedded = isinstance(pixels, np.ndarray)
            size = pixels.nbytes if embedded else pixels.stat().st_size
            labels = [path, y, split, a, size, *([clusters] if clusters else [])]
            digest.update(json.dumps(labels).encode())
            if embedded:
                digest.update(pixels.tobytes())
        return digest.hexdigest()

    def read(self, i: int) -> Image.Image:
        """Image i as upright RGB; BrokenImageError if it is damaged, OSError if the disk is."""
        pixels = self.entries[i].pixels
        return Image.fromarray(pixels) if isinstance(pixels, np.ndarray) else read_image(pixels)


def check_entries(name: str, entries: Iterable[Entry]) -> None:
    """ValueError for what `name` lists twice, by other spellings or by links, or cannot hold.

    That is a path that is not Unicode, and what is no file (a pipe would be waited for without
    end); OSError for a link to nothing.
    """
    paths, files, folders = set(), {}, {}
    for path, _, _, pixels, _, _ in entries:
        if not path.isascii() and any("\ud800" <= letter <= "\udfff" for letter in path):
            utf8 = sys.getfilesystemencoding() == "utf-8"
            advice = "" if utf8 else "; if it is in UTF-8, set PYTHONUTF8=1: this locale is not"
            raise ValueError(f"{name}: rename {path!r}, its name is not valid Unicode{advice}")
        plain = normpath(path)
        if plain in paths:
            raise ValueError(f"{name}: {path} is listed twice; keep one of the two")
        paths.add(plain)
        if isinstance(pixels, np.ndarray):
            continue
        real, mode = real_file(pixels, folders)
        if not S_ISREG(mode):
            raise ValueError(f"{name}: {path} is no file; remove it")
        if real in files:
            raise ValueError(
                f"{name}: {path} is the same file as {files[real]}; keep one of the two"
            )
        files[real] = path


def real_file(file: Path, folders: dict[str, str]) -> tuple[str, int]:
    """Where a file lies once links are followed, and its mode; OSError where none is.

    folders: what is known from other files. A folder's links are followed once, not for each of its
    files: there may be 100,000.
    """
    folder, name = split_path(file)
    if folder not in folders:
        folders[folder] = realpath(folder)
    mode, real = file.lstat().st_mode, f"{folders[folder]}/{name}"
    if S_ISLNK(mode):
        mode, real = file.stat().st_mode, realpath(file)
    return real, mode


def read_image(file: Path) -> Image.Image:
    """Decode a file as RGB, turned upright by its EXIF orientation; of an animation, frame one.

    Transparent pixels show white, as on a page. 16-bit greys are scaled to 8 bits. Truncated files,
    and pixels whose range is unknown (floating-point, or greys outside 0 to 65535), are
    BrokenImageErrors, one line each. What the operating system refuses (permissions, a failing
    disk) is an OSError with the file's name.
    """
    try:
        with Image.open(file, formats=_FORMATS) as image:
            image.load()
            # Pillow turns greys that count from white (TIFF tag 262) round, but not those of 16
            # bits.
            tags = getattr(image, "tag_v2", {})
            negative = tags.get(262) == 0 and image.mode.startswith("I;16")
            # In place: a photograph of 24 megapixels takes 90 MB, and every core decodes one.
            ImageOps.exif_transpose(image, in_place=True)
            upright = _rgb(image)
            return ImageOps.invert(upright) if negative else upright
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged bytes
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(file)) from error
        # Pillow's own text for it ends in the path, which is named already.
        unknown = isinstance(error, Image.UnidentifiedImageError)
        reason = "not an image" if unknown else " ".join(str(error).split()) or repr(error)
        raise BrokenImageError(f"{file}: cannot be read as an image: {reason}") from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise BrokenImageError("floating-point pixels")
    if image.mode.startswith("I"):
        # convert() would clip at 255 instead of scaling; mode I holds 16-bit files too.
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise BrokenImageError(f"greys from {values.min()} to {values.max()}, not 0 to 65535")
        grey = np.rint(values / 257)
        image = Image.fromarray(grey.astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        page = Image.new("RGBA", image.size, "white")
        page.alpha_composite(image.convert("RGBA"))
        image = page
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy


def path_hash(path: str) -> bytes:
    """sha256 of a path: an order that is the same everywhere and has nothing to do with images."""
    return hashlib.sha256(path.encode(errors="surrogateescape")).digest()


def hold_out(
    entries: Sequence[Entry], *, validation_share: float, test_share: float
) -> list[Entry]:
    """Name the validation and test images where the data does not.

    Per class, in the order of sha256(path), so that the choice is the same everywhere and new
    images move few old ones: round(test_share * n) of the n training images become the test split
    if none is named, then round(validation_share * rest) the validation split if none is named
    (round: half to even). One image a class stays in training, so small classes may lack the rest.
    """
    named = {entry.split for entry in entries}
    shares = {"test": test_share, "val": validation_share}
    answer = [entry for entry in entries if entry.split != "train"]
    by_class: dict[int, list[Entry]] = {}
    for entry in entries:
        if entry.split == "train":
            by_class.setdefault(entry.y, []).append(entry)
    for members in by_class.values():
        members.sort(key=lambda entry: path_hash(entry.path))
        for split, share in shares.items():
            count = 0 if split in named else min(round(share * len(members)), len(members) - 1)
            answer += [entry._replace(split=split) for entry in members[:count]]
            members = members[count:]
        answer += members
    return answer
