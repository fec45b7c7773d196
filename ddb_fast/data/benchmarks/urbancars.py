"""UrbanCars (Li et al. 2023): cars with two shortcuts, the background and an object beside them."""

import logging
from collections import Counter
from itertools import product
from pathlib import Path

from ddb_fast.data.benchmarks.layout import compare_counts, folder_at, folders_named
from ddb_fast.data.files import image_files
from ddb_fast.data.listing import Entry, Listing

logger = logging.getLogger(__name__)

KINDS = ("urban", "country")
FACTORS = (("background", 2), ("co_object", 2))
FOLDERS = {
    "train": "bg-0.95_co_occur_obj-0.95",
    "val": "bg-0.5_co_occur_obj-0.5",
    "test": "bg-0.5_co_occur_obj-0.5",
}
BIASES = tuple(f"bg {bg}, object {obj}" for bg, obj in product(KINDS, repeat=2))
# By how many shortcuts agree with the class: both, background only, object only, neither.
_TRAIN = {(True, True): 3610, (True, False): 190, (False, True): 190, (False, False): 10}
PUBLISHED = {
    **{
        f"train {KINDS[y]}, {BIASES[2 * bg + obj]}": _TRAIN[bg == y, obj == y]
        for y, bg, obj in product((0, 1), repeat=3)
    },
    "val": 1000,
    "test": 1000,
}


def list_urbancars(root: str | Path) -> Listing:
    """List UrbanCars: y = the car, a = 2 * background + object, each urban 0 or country 1.

    An image's labels are those of its folder; aligned iff both shortcuts equal y. The masks that
    lie beside each NNN.jpg, and all else that is no such image, are ignored, counted in the log.
    LayoutError, one line, for folders that lack or do not belong there.
    """
    root = Path(root)
    entries: list[Entry] = []
    ignored: list[Path] = []
    labels = {
        f"obj-{KINDS[y]}_bg-{KINDS[bg]}_co_occur_obj-{KINDS[obj]}": (y, 2 * bg + obj)
        for y, bg, obj in product((0, 1), repeat=3)
    }
    for split, name in FOLDERS.items():
        for folder in folders_named(folder_at(root, name, split), labels):
            y, a = labels[folder.name]
            entries += [
                Entry(file.relative_to(root).as_posix(), y, split, file, a)
                for file in _photographs(folder, ignored)
            ]
    if ignored:
        logger.info("%s: %d other files ignored, first %s", root, len(ignored), ignored[0].name)
    found = Counter(
        f"train {KINDS[e.y]}, {BIASES[e.a]}" if e.split == "train" else e.split for e in entries
    )
    compare_counts("urbancars", found, PUBLISHED)
    return Listing(
        name="urbancars",
        classes=KINDS,
        entries=tuple(entries),
        biases=BIASES,
        aligned_bias=(0, 3),
        factors=FACTORS,
    )


def _photographs(folder: Path, ignored: list[Path]) -> list[Path]:
    """The .jpg images below a folder that are no masks; what else lies there goes to `ignored`."""
    found = []
    for file in image_files(folder, ignored):
        photograph = file.suffix.lower() == ".jpg" and not file.stem.endswith("_mask")
        (found if photograph else ignored).append(file)
    return found
