"""ImageNet-9 (ReBias, Bahng et al. 2020): nine kinds of animals from ImageNet's folders.

No image has a bias label. Texture is what misleads, so evaluation may use clusters of textures of
the validation images, and ImageNet-A, photographs that ordinary classifiers get wrong.
"""

import logging
import re
from collections import Counter
from pathlib import Path

from ddb_fast.data.benchmarks.layout import LayoutError, compare_counts, folder_at, images_in
from ddb_fast.data.files import integer, read_table, subfolders
from ddb_fast.data.listing import Entry, Listing

logger = logging.getLogger(__name__)

# Positions among ImageNet's 1000 sorted wnids, in this order: 151 207 234 235 254, 281-285, 30-32,
# 33-37, 89 90 94 96 97, 372-375 378, 393-397, 118-121, 306-310.
WNIDS = {
    "dog": ("n02085620", "n02099601", "n02106550", "n02106662", "n02110958"),
    "cat": ("n02123045", "n02123159", "n02123394", "n02123597", "n02124075"),
    "frog": ("n01641577", "n01644373", "n01644900"),
    "turtle": ("n01664065", "n01665541", "n01667114", "n01667778", "n01669191"),
    "bird": ("n01819313", "n01820546", "n01833805", "n01843383", "n01847000"),
    "monkey": ("n02486410", "n02487347", "n02488291", "n02488702", "n02492035"),
    "fish": ("n02607072", "n02640242", "n02641379", "n02643566", "n02655020"),
    "crab": ("n01978287", "n01978455", "n01980166", "n01981276"),
    "insect": ("n02174001", "n02177972", "n02190166", "n02206856", "n02219486"),
}
CLASSES = tuple(WNIDS)
_CLASS_OF = {wnid: y for y, wnids in enumerate(WNIDS.values()) for wnid in wnids}
_TRAIN_IMAGES, _TRAIN_MARGIN = 54_600, 0.02
"""Training images are published as "about" so many."""
_VALIDATION_IMAGES = 50
"""Of each folder."""
CLUSTERS = "texture_clusters.csv"
_COLUMNS = ("cluster_1", "cluster_2", "cluster_3")


def list_imagenet9(root: str | Path) -> Listing:
    """List the nine classes' folders of ImageNet and, where it lies, of ImageNet-A.

    ROOT/train and ROOT/val hold a folder per wnid, all 1000 or only the 42 of the nine classes; of
    ROOT/imagenet-a those wnids are read that it has. With imagenet-a, val is the validation split
    and imagenet-a the test split; without, val is the test split and nothing validates. Where
    ROOT/texture_clusters.csv (path, cluster_1, cluster_2, cluster_3; paths relative to ROOT) lies,
    it gives every image of val its clusters.

    Raises:
        ValueError: one line, for folders that lack or are no wnid (LayoutError), and for a cluster
            table that is wrong or lacks an image.
    """
    root = Path(root)
    adversarial = (root / "imagenet-a").is_dir()
    clusters = _clusters(root)
    entries = _entries(root, "train", "train")
    val = _entries(root, "val", "val" if adversarial else "test")
    if clusters:
        lacking = [entry.path for entry in val if entry.path not in clusters]
        if lacking:
            raise ValueError(
                f"{root / CLUSTERS}: {len(lacking)} of {len(val)} images of val/ have no row, "
                f"first {lacking[0]}"
            )
        val = [entry._replace(clusters=clusters[entry.path]) for entry in val]
    entries += val
    if adversarial:
        entries += _entries(root, "imagenet-a", "test", all_wnids=False)
    else:
        logger.info("imagenet-9: no imagenet-a/, so val/ is the test split and nothing validates")
    # Published figures are of ImageNet-A: another test split has another name in every table.
    name = "imagenet-9" if adversarial else "imagenet-9 tested on val"
    return Listing(name=name, classes=CLASSES, entries=tuple(entries))


def _entries(root: Path, folder: str, split: str, *, all_wnids: bool = True) -> list[Entry]:
    parent = folder_at(root, folder)
    for other in subfolders(parent):
        if not re.fullmatch(r"n\d{8}", other.name):
            raise LayoutError(f"{other}: not named as an ImageNet class, such as n02085620")
    lacking = [wnid for wnid in _CLASS_OF if not (parent / wnid).is_dir()]
    if lacking and (all_wnids or len(lacking) == len(_CLASS_OF)):
        name = CLASSES[_CLASS_OF[lacking[0]]]
        raise LayoutError(
            f"{parent}: {len(lacking)} of the {len(_CLASS_OF)} folders needed are not there, "
            f"first {lacking[0]} ({name})"
        )
    entries = [
        Entry(file.relative_to(root).as_posix(), y, split, file)
        for wnid, y in _CLASS_OF.items()
        if wnid not in lacking
        for file in images_in(parent / wnid)
    ]
    if folder == "train" and abs(len(entries) - _TRAIN_IMAGES) > _TRAIN_MARGIN * _TRAIN_IMAGES:
        compare_counts("imagenet-9", {"train": len(entries)}, {"train": _TRAIN_IMAGES})
    if folder == "val":
        found = Counter(f"val {CLASSES[entry.y]}" for entry in entries)
        published = {f"val {n}": _VALIDATION_IMAGES * len(wnids) for n, wnids in WNIDS.items()}
        compare_counts("imagenet-9", found, published)
    return entries


def _clusters(root: Path) -> dict[str, tuple[int, ...]]:
    """The clusters of each path in the table; nothing without a table."""
    table = root / CLUSTERS
    if not table.is_file():
        logger.info("imagenet-9: no %s, so no accuracy over texture clusters", CLUSTERS)
        return {}
    answer = {}
    for where, row in read_table(table, ("path", *_COLUMNS)):
        path = Path(row["path"] or "").as_posix()
        if path in answer:
            raise ValueError(f"{where}: {path} has a second row; keep one")
        answer[path] = tuple(integer(where, row, column) for column in _COLUMNS)
        if min(answer[path]) < 0:
            raise ValueError(f"{where}: a cluster is {min(answer[path])}; they start at 0")
    return answer
