"""Images for a finished run: any that its networks are to judge, labelled or not, few or many.

A Listing is what a run can be trained on; here a class may have no images, a split may be missing,
and there may be no labels at all. Classes are matched by name, because folders sort 0, 1, 10, 2
where a CSV counts 0, 1, 2. Pixels are decoded as they are needed, and held for one batch only.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from ddb_fast.config import DataConfig
from ddb_fast.data.files import (
    EXTENSIONS,
    few,
    image_files,
    number_name,
    read_table,
    subfolders,
)
from ddb_fast.data.listing import (
    SPLITS,
    BrokenImageError,
    Entry,
    check_entries,
    hold_out,
    read_image,
)
from ddb_fast.data.sources import csv_image, open_listing, source_of, split_folders

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False, kw_only=True)
class Images:
    """Images by split (train, val, test, or "" for none), in a split by class, then by path.

    entries: y is the number that the run has for the class, or -1 throughout where `labelled` is
    False. biases: names of the values of `a`, None without bias labels.
    """

    name: str
    entries: tuple[Entry, ...]
    labelled: bool
    biases: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.entries)

    def split(self, name: str) -> list[Entry]:
        return [entry for entry in self.entries if entry.split == name]


def list_images(config: DataConfig, classes: Sequence[str]) -> Images:
    """List what a configuration names, for a run with these classes.

    As `open_listing`, and also: a folder or split folder with only some of the classes; a folder
    with images directly in it, or a CSV without a column y, whose images have no labels; a CSV
    whose y are names. What names no split is held out as a run would (`hold_out`).
    ValueError, one line, for everything a user can get wrong, a class of another name among it.
    """
    source = source_of(config)
    if source == "folder":
        images = _from_folder(Path(config.path), config, classes)
    elif source == "csv":
        images = _from_csv(Path(config.path), config, classes)
    else:
        listing = open_listing(config)
        known = _numbers(classes)
        number = [_number(listing.name, name, known) for name in listing.classes]
        entries = [entry._replace(y=number[entry.y]) for entry in listing.entries]
        images = _sorted(listing.name, entries, labelled=True, biases=listing.biases)
    return images


def _numbers(names: Sequence[str]) -> dict[str, int]:
    """Each name's number: a search for every row took a third of a listing with 1,000 classes."""
    return {name: number for number, name in enumerate(names)}


def _number(where: str, name: str, classes: dict[str, int]) -> int:
    if name not in classes:
        raise ValueError(f"{where}: class {name!r} is none of the run's: {few(list(classes))}")
    return classes[name]


def _sorted(
    name: str,
    entries: Sequence[Entry],
    *,
    labelled: bool,
    biases: tuple[str, ...] | None = None,
) -> Images:
    check_entries(name, entries)
    order = sorted(entries, key=lambda e: ((*SPLITS, "").index(e.split), e.y, e.path))
    return Images(name=name, entries=tuple(order), labelled=labelled, biases=biases)


def _held_out(entries: Sequence[Entry], config: DataConfig) -> list[Entry]:
    return hold_out(entries, validation_share=config.validation_share, test_share=config.test_share)


def _from_folder(root: Path, config: DataConfig, classes: Sequence[str]) -> Images:
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder")
    name = root.resolve().name
    found, loose, ignored, known = [], [], [], _numbers(classes)
    for split, parent in split_folders(root).items():
        for folder in subfolders(parent):
            files = list(image_files(folder, ignored))
            label = _number(str(folder), folder.name, known) if files else -1
            found += [Entry(f.relative_to(root).as_posix(), label, split, f) for f in files]
        for file in (p for p in parent.iterdir() if not p.is_dir()):
            image = file.suffix.lower() in EXTENSIONS and not file.name.startswith(".")
            (loose if image else ignored).append(file)
    if found:
        ignored += loose
    if ignored:
        logger.info("%s: %d other files ignored, first %s", root, len(ignored), ignored[0].name)
    if found:
        return _sorted(name, _held_out(found, config), labelled=True)
    if not loose:
        raise ValueError(
            f"{root}: no images found; expected ROOT/CLASS/*.jpg, or images without labels in "
            f"ROOT/ itself, with {' '.join(EXTENSIONS)}"
        )
    entries = [Entry(file.relative_to(root).as_posix(), -1, "", file) for file in loose]
    return _sorted(name, entries, labelled=False)


def _from_csv(table: Path, config: DataConfig, classes: Sequence[str]) -> Images:
    rows = read_table(table, ("path",), optional=("y", "a", "split"))
    columns = rows[0][1]
    labelled, biased, split_named = (column in columns for column in ("y", "a", "split"))
    values = [number_name((row["a"] or "").strip()) for _, row in rows] if biased else []
    if "" in values:
        raise ValueError(f"{rows[values.index('')][0]}: a is empty; fill it in or drop the column")
    # By length first, so that numbers stand in their order.
    biases = tuple(sorted(set(values), key=lambda value: (len(value), value)))
    entries, class_number, bias_number = [], _numbers(classes), _numbers(biases)
    for i, (where, row) in enumerate(rows):
        path, file, split = csv_image(table, where, row)
        if labelled:
            y = (row["y"] or "").strip()
            if not y:
                raise ValueError(f"{where}: y is empty; images without labels have no column y")
            label = _number(where, y if y in class_number else number_name(y), class_number)
        else:
            label, split = -1, split if split_named else ""
        a = bias_number[values[i]] if biased else None
        entries.append(Entry(path, label, split, file, a))
    if labelled:
        entries = _held_out(entries, config)
    return _sorted(table.stem, entries, labelled=labelled, biases=biases or None)


def batches(
    entries: Sequence[Entry],
    fitted: Callable[[Image.Image], Tensor],
    *,
    size: int,
    corrupt: Literal["error", "skip"] = "error",
    title: str = "decode",
    progress: bool = True,
) -> Iterator[tuple[list[Entry], Tensor]]:
    """Decode images as they are asked for: entries and their pixels (B, S, S, 3) uint8, B <= size.

    fitted: (3, S, S) uint8 of an image, as `store.FITS` and `centre_square` make. Only the last
    batch is smaller, as where decoded images are cut into batches. progress: a bar on terminals.

    Raises:
        ValueError: a broken file, unless corrupt is skip: then it is left out, and a warning says.
        OSError: an image could not be read.
    """

    def decode(entry: Entry) -> Tensor | str:
        try:
            embedded = isinstance(entry.pixels, np.ndarray)
            image = Image.fromarray(entry.pixels) if embedded else read_image(entry.pixels)
        except BrokenImageError as error:
            return str(error)  # not the exception, which would keep the file's bytes alive
        return fitted(image).permute(1, 2, 0)

    if not entries:
        return
    kept: list[tuple[Entry, Tensor]] = []
    broken: list[str] = []
    bar = tqdm(
        total=len(entries), desc=f"{title:>24}", unit="img", disable=None if progress else True
    )
    with bar, ThreadPoolExecutor() as pool:
        for start in range(0, len(entries), size):
            part = entries[start : start + size]
            for entry, answer in zip(part, pool.map(decode, part), strict=True):
                if isinstance(answer, Tensor):
                    kept.append((entry, answer))
                elif corrupt == "skip":
                    broken.append(entry.path)
                else:
                    raise ValueError(
                        f"{answer}; repair or remove it, or, on the command line, leave such "
                        "images out with --corrupt skip"
                    )
                if len(kept) == size:
                    yield [e for e, _ in kept], torch.stack([pixels for _, pixels in kept])
                    kept.clear()
            bar.update(len(part))
    if broken:
        logger.warning("%d broken images left out: %s", len(broken), few(broken))
    if kept:
        yield [e for e, _ in kept], torch.stack([pixels for _, pixels in kept])
