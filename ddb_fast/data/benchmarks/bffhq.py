"""BFFHQ (Lee et al. 2021): faces of FFHQ, young or old, most young ones female, old ones male."""

import logging
import re
from collections import Counter
from fractions import Fraction
from pathlib import Path

from ddb_fast.data.benchmarks.layout import (
    LayoutError,
    compare_counts,
    folder_at,
    folders_named,
    images_in,
)
from ddb_fast.data.files import subfolders
from ddb_fast.data.listing import Entry, Listing

logger = logging.getLogger(__name__)

CLASSES, GENDERS = ("young", "old"), ("female", "male")
PUBLISHED = {
    "train aligned": 19_104,
    "train conflicting": 96,
    "val aligned": 1000,
    "val conflicting": 0,
    **{f"test {y} {a}": 250 for y in CLASSES for a in GENDERS},
}
"""Images where 0.5 % of the training images conflict."""
_NAME = re.compile(r".+_([01])_([01])")
_PERCENT = re.compile(r"(\d+(?:\.\d+)?)pct")


def list_bffhq(root: str | Path, *, rho: float = 0.995) -> Listing:
    """List BFFHQ: training images of one percentage of conflicting ones, valid and test.

    y: young 0, old 1, the second field of a file's name; a: the third; aligned iff equal. The
    training images are those of the `<percent>pct` folder of 100 (1 - rho) percent; where there are
    others, the log says so. Names count, not folders: a warning says how many training images lie
    in a folder of another class or alignment.

    Raises:
        ValueError: one line, for folders that lack or do not belong there and names that are not
            `<id>_<age>_<gender>` (LayoutError), and for a rho that no folder has.
    """
    root = Path(root)
    train = _percentage(root, rho)
    entries, misplaced = [], 0
    for part in folders_named(train, ("align", "conflict")):
        for label in folders_named(part, ("0", "1")):
            for file in images_in(label):
                entry = _entry(root, file, "train")
                entries.append(entry)
                place = (str(entry.y), "align" if entry.y == entry.a else "conflict")
                misplaced += place != (label.name, part.name)
    if misplaced:
        logger.warning(
            "bffhq: %d training images lie in a folder that their names contradict; names count",
            misplaced,
        )
    for folder, split in (("valid", "val"), ("test", "test")):
        entries += [_entry(root, file, split) for file in images_in(folder_at(root, folder))]
    if train.name == "0.5pct":
        compare_counts("bffhq", Counter(map(_part, entries)), PUBLISHED)
    else:
        logger.info("bffhq: counts of %s are not known here and not compared", train.name)
    return Listing(
        name="bffhq",
        classes=CLASSES,
        entries=tuple(entries),
        biases=GENDERS,
        aligned_bias=(0, 1),
    )


def _percentage(root: Path, rho: float) -> Path:
    """The folder of training images."""
    found = {}
    for folder in subfolders(root):
        if match := _PERCENT.fullmatch(folder.name):
            found[1 - Fraction(match[1]) / 100] = folder
    if not found:
        raise LayoutError(f"{root}: no folder 0.5pct/")
    wanted = Fraction(str(rho))
    if wanted not in found:
        choices = " or ".join(f"{float(share)} for {p.name}/" for share, p in found.items())
        raise ValueError(f"{root}: no percentage there is that of rho {rho}; pass rho {choices}")
    if len(found) > 1:
        name = found[wanted].name
        logger.info("bffhq: %d percentages there, rho %s takes %s", len(found), rho, name)
    return found[wanted]


def _entry(root: Path, file: Path, split: str) -> Entry:
    match = _NAME.fullmatch(file.stem)
    if match is None:
        raise LayoutError(f"{file}: not named <id>_<age>_<gender> with 0 or 1 for the two")
    return Entry(file.relative_to(root).as_posix(), int(match[1]), split, file, int(match[2]))


def _part(entry: Entry) -> str:
    if entry.split == "test":
        return f"test {CLASSES[entry.y]} {GENDERS[entry.a]}"
    return f"{entry.split} {'aligned' if entry.y == entry.a else 'conflicting'}"
