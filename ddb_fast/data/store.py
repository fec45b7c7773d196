"""Images decoded once, held on disk as two uint8 arrays, and handed out in batches.

`small` is what the diffusion model sees, `large` what classifiers crop from. Both are memory-mapped
so that a set of any size costs no memory until it is used. A cache is complete or it is not there:
arrays are written under temporary names and renamed, and `meta.json`, without which they are not
believed, comes last. They are written with ordinary writes: through a memory map a full disk would
be a SIGBUS, and here it is an OSError.
"""

import contextlib
import json
import logging
import mmap
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import psutil
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from ddb_fast.data.files import NAMED, few
from ddb_fast.data.groups import Groups, training_groups
from ddb_fast.data.listing import SPLITS, BrokenImageError, Listing

logger = logging.getLogger(__name__)

_FORMAT = 1
_RAM_SHARE, _DEVICE_SHARE = 0.25, 0.40
# Python has a name for this flag from 3.13 on.
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)


@dataclass(frozen=True, eq=False, kw_only=True)
class Split:
    """The images of one split: paths and labels (N,), `small` and `large` (N, H, W, 3) uint8.

    clusters: (R, N) int64, each image's number in each of R clusterings; None where there are none.
    """

    paths: tuple[str, ...]
    y: Tensor
    a: Tensor | None
    small: Tensor
    large: Tensor
    clusters: Tensor | None = None

    def __len__(self) -> int:
        return len(self.paths)


@dataclass(frozen=True, eq=False, kw_only=True)
class ImageData:
    """A decoded set: `splits` has train and, where they hold images, val and test, in that order.

    `bias_of`, `aligned_bias`, `factors` and `fit` are the Listing's; `fingerprint` too, of all it
    listed.
    """

    name: str
    classes: tuple[str, ...]
    biases: tuple[str, ...] | None
    splits: dict[str, Split]
    fingerprint: str
    aligned_bias: tuple[int, ...] | None = None
    factors: tuple[tuple[str, int], ...] = ()
    bias_of: Callable[[Tensor], Tensor] | None = None
    fit: Literal["squash", "pad"] = "squash"

    @property
    def count(self) -> int:
        """How many there are in all splits."""
        return sum(map(len, self.splits.values()))

    def groups(self, split: str) -> Groups | None:
        """The true groups of a split; None without bias labels.

        Every split is aligned as the training images are: what a class's images there mostly show
        is the shortcut, whatever a test set shows.
        """
        if self.biases is None:
            return None
        train, part = self.splits["train"], self.splits[split]
        groups = training_groups(
            train.y,
            train.a,
            class_names=self.classes,
            bias_names=self.biases,
            aligned_bias=self.aligned_bias,
        )
        return groups.with_labels(part.y, part.a)


def squash(image: Image.Image, size: int) -> Tensor:
    """The whole image in a square, whatever its proportions: (3, size, size) uint8.

    Pillow's bicubic filter, which widens when it shrinks and so does not alias.
    """
    return _tensor(image.resize((size, size), Image.Resampling.BICUBIC))


def pad(image: Image.Image, size: int) -> Tensor:
    """The image unchanged amid black: (3, size, size) uint8; one that is larger is squashed."""
    if max(image.size) > size:
        return squash(image, size)
    page = Image.new("RGB", (size, size))
    page.paste(image, tuple((size - side) // 2 for side in image.size))
    return _tensor(page)


FITS = {"squash": squash, "pad": pad}
"""What makes `small` of an image, by the Listing's `fit`."""


def centre_square(image: Image.Image, size: int) -> Tensor:
    """Shorter side resized to `size` (bicubic, as `squash`), then the centre: (3, size, size)."""
    side, (width, height) = min(image.size), image.size
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side)
    return _tensor(image.resize((size, size), Image.Resampling.BICUBIC, box=box))


def _tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def open_images(
    listing: Listing,
    *,
    image_size: int,
    cache_size: int,
    cache_dir: str | Path,
    corrupt: Literal["error", "skip"] = "error",
    progress: bool = True,
) -> ImageData:
    """Decode a listing into `cache_dir`, or open what was decoded there before.

    image_size: side of `small`, which the listing's `fit` makes. cache_size: side of `large`
    (`centre_square`).
    corrupt: error stops at the fifth broken file, or at the end if there are fewer, and names them;
    skip drops them and says so. A cache that is unfinished, or of other sizes or another fit, is
    written anew.

    Raises:
        ValueError: broken files; a class left without training images; the cache is of other data.
        OSError: an image could not be read or the cache not written; nothing half is believed.
    """
    if corrupt not in ("error", "skip"):
        raise ValueError(f"corrupt is {corrupt!r}, not error or skip")
    cache = Path(cache_dir)
    sizes = {"small": image_size, "large": cache_size}
    expected = {"format": _FORMAT, "fingerprint": listing.fingerprint, "sizes": sizes}
    expected["fit"] = listing.fit
    dropped = _find(cache, expected, listing)
    if dropped is None or (dropped and corrupt == "error"):
        dropped = _decode(listing, cache, expected, corrupt, progress)
    kept = listing
    if dropped:
        gone, names = set(dropped), few([listing.paths[i] for i in dropped])
        logger.warning("%s: %d broken images left out: %s", listing.name, len(dropped), names)
        left = tuple(entry for i, entry in enumerate(listing.entries) if i not in gone)
        kept = replace(listing, entries=left)
    arrays = {
        name: _mapped(cache / f"{name}.u8", (len(kept), size, size, 3))
        for name, size in sizes.items()
    }
    splits, start = {}, 0
    for split in SPLITS:
        part = slice(start, start + kept.split.count(split))
        start = part.stop
        if part.stop > part.start:
            a = None if kept.a is None else kept.a[part]
            views = {name: array[part] for name, array in arrays.items()}
            rows = [entry.clusters for entry in kept.entries[part]]
            clusters = torch.tensor(rows).T.contiguous() if rows[0] else None
            splits[split] = Split(
                paths=kept.paths[part], y=kept.y[part], a=a, clusters=clusters, **views
            )
    return ImageData(
        name=kept.name,
        classes=kept.classes,
        biases=kept.biases,
        splits=splits,
        fingerprint=listing.fingerprint,
        aligned_bias=kept.aligned_bias,
        factors=kept.factors,
        bias_of=kept.bias_of,
        fit=kept.fit,
    )


def _mapped(path: Path, shape: tuple[int, ...]) -> Tensor:
    """A file as a uint8 tensor; what is written to the tensor never reaches the file."""
    # PyTorch has no read-only tensors, so the map is copy-on-write, for which Linux would reserve
    # memory: without the flag it refuses files larger than all of it.
    flags, access = mmap.MAP_PRIVATE | _NO_RESERVE, mmap.PROT_READ | mmap.PROT_WRITE
    with path.open("rb") as file:
        pixels = mmap.mmap(file.fileno(), 0, flags=flags, prot=access)
    return torch.frombuffer(pixels, dtype=torch.uint8).view(shape)


def _find(cache: Path, expected: dict[str, Any], listing: Listing) -> list[int] | None:
    """The indices that a complete cache leaves out; None if there is none to be used."""
    try:
        meta = json.loads((cache / "meta.json").read_text("utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:  # of JSON and of UTF-8
        raise ValueError(f"{cache / 'meta.json'}: damaged ({error}); delete {cache}") from None
    if meta.get("fingerprint") != expected["fingerprint"]:
        raise ValueError(
            f"{cache} was decoded from other files, labels or splits than {listing.name} has now; "
            "restore the data, or delete that folder, or name another one with --out"
        )
    meta = {"fit": "squash", **meta}  # caches from before there was a choice
    if {key: meta.get(key) for key in expected} != expected:
        return None
    count = len(listing) - len(meta["dropped"])
    for name, size in expected["sizes"].items():
        file = cache / f"{name}.u8"
        if not file.exists() or file.stat().st_size != count * size * size * 3:
            return None
    return meta["dropped"]


def _decode(
    listing: Listing, cache: Path, meta: dict[str, Any], corrupt: str, progress: bool
) -> list[int]:
    """Write both arrays and meta.json; return the indices of the broken images left out."""
    cache.mkdir(parents=True, exist_ok=True)
    # From here on the arrays may be new ones, which an old meta.json must not vouch for.
    (cache / "meta.json").unlink(missing_ok=True)
    sizes, fitted = meta["sizes"], FITS[listing.fit]
    broken: dict[int, str] = {}

    def decode(i: int) -> tuple[Tensor, Tensor] | str:
        try:
            image = listing.read(i)
        except BrokenImageError as error:
            return str(error)  # not the exception, which would keep the file's bytes alive
        return fitted(image, sizes["small"]), centre_square(image, sizes["large"])

    with (
        _written(cache / "small.u8") as small,
        _written(cache / "large.u8") as large,
        contextlib.closing(in_order(decode, len(listing))) as answers,
        _progress(answers, len(listing), "decode", progress) as bar,
    ):
        for i, answer in enumerate(bar):
            if isinstance(answer, str):
                broken[i] = answer
                if corrupt == "error" and len(broken) == NAMED:
                    break
            else:
                for file, pixels in zip((small, large), answer, strict=True):
                    file.write(pixels.permute(1, 2, 0).numpy())
        if broken and corrupt == "error":
            raise ValueError(_refusal(broken, listing))
    with _written(cache / "meta.json") as file:
        file.write(json.dumps({**meta, "dropped": list(broken)}).encode())
    return list(broken)


def broken_images(listing: Listing, *, progress: bool = True) -> dict[str, str]:
    """Decode every image and return why, by path, for those that cannot be; OSError as `read`."""

    def reason(i: int) -> str | None:
        try:
            listing.read(i)
        except BrokenImageError as error:
            return str(error)
        return None

    with contextlib.closing(in_order(reason, len(listing))) as answers:
        bar = _progress(answers, len(listing), "check", progress)
        reasons = dict(zip(listing.paths, bar, strict=True))
    return {path: text for path, text in reasons.items() if text is not None}


def _progress(answers: Iterator[Any], total: int, title: str, shown: bool) -> tqdm:
    return tqdm(
        answers,
        total=total,
        desc=f"{title:>24}",
        unit="img",
        unit_scale=True,
        disable=not shown,
        dynamic_ncols=True,
    )


def _refusal(broken: dict[int, str], listing: Listing) -> str:
    names = few([listing.paths[i] for i in broken])
    count = f"{len(broken)} or more" if len(broken) == NAMED else str(len(broken))
    return (
        f"{listing.name}: {count} of {len(listing)} images cannot be read: {names} "
        f"(the first: {next(iter(broken.values()))}); repair or remove them, or, on the command "
        "line, leave them out with --data.corrupt skip"
    )


def in_order(work: Callable[[int], Any], count: int) -> Iterator[Any]:
    """work(0), work(1), ... from a thread a core, never far ahead: memory stays flat."""
    workers = os.cpu_count() or 1
    pending: deque[Future] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for i in range(count):
                pending.append(pool.submit(work, i))
                if len(pending) > 4 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


@contextlib.contextmanager
def _written(path: Path) -> Iterator[BinaryIO]:
    """A file that takes its name once it is whole and on the disk, and else leaves no trace."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.filename is None:  # a write that failed does not say where
            reason = f"{error.strerror} while the decoded images were written"
            raise OSError(error.errno, reason, str(path.parent)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def resident(images: Tensor, device: torch.device) -> Tensor:
    """Images where batches are taken from fastest: on the device if they fit, else on the host.

    images: any uint8 tensor, memory-mapped or not. On CUDA they move if they take less than 40 % of
    the device's free memory; elsewhere they are read into memory, if they are not there, where that
    takes less than 25 % of what is available, and otherwise stay as they are, on disk if mapped.
    """
    cuda = device.type == "cuda"
    free = torch.cuda.mem_get_info(device)[0] if cuda else psutil.virtual_memory().available
    megabytes, room = images.nbytes / 1e6, (_DEVICE_SHARE if cuda else _RAM_SHARE) * free / 1e6
    if megabytes >= room:
        logger.info("images: %.0f MB, left where they are (%.0f fit)", megabytes, room)
        return images
    logger.debug("images: %.0f MB, held %s", megabytes, f"on {device}" if cuda else "in memory")
    if cuda:
        return images.to(device)
    # PyTorch can resize what it allocated itself, which a file's map is not.
    return images if images.untyped_storage().resizable() else images.clone()


def gather(images: Tensor, index: Tensor, device: torch.device) -> Tensor:
    """A batch (B, 3, H, W) uint8 in channels_last memory on the device.

    images: (N, H, W, 3) uint8, anywhere. index: (B,) int64. Where images stay on the host and the
    device is a GPU, each call waits for the copy.
    """
    batch = images.index_select(0, index.to(images.device))
    return batch.to(device).permute(0, 3, 1, 2)
