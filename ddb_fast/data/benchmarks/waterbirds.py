"""Waterbirds (Sagawa et al. 2020): birds of two kinds cut out and put before land or water."""

from collections import Counter
from fractions import Fraction
from pathlib import Path

from ddb_fast.data.benchmarks.layout import LayoutError, compare_counts
from ddb_fast.data.files import integer, read_table
from ddb_fast.data.listing import SPLITS, Entry, Listing, path_hash

FOLDER = "waterbird_complete95_forest2water2"
CLASSES, PLACES = ("landbird", "waterbird"), ("land", "water")
PUBLISHED = {
    "train": (3498, 184, 56, 1057),
    "val": (467, 466, 133, 133),
    "test": (2255, 2255, 642, 642),
}
"""Images of each group 2 * y + place."""
OFFICIAL_RHO = 0.95
RHOS = (0.95, 0.9, 0.8, 0.7, 0.6)
_ABLATION_IMAGES = 2030
_COLUMNS = ("img_id", "img_filename", "y", "split", "place", "place_filename")


def list_waterbirds(root: str | Path, *, rho: float = OFFICIAL_RHO) -> Listing:
    """List Waterbirds with its official splits (rho 0.95) or an ablation's training images.

    root: the folder of metadata.csv, or the one that holds it under its published name. y: landbird
    0, waterbird 1; a: land 0, water 1; aligned iff equal. rho 0.9, 0.8, 0.7, 0.6: `ablation`.

    Raises:
        ValueError: one line, for another rho, a metadata.csv that lacks a column or holds a value
            it may not, and for images it names that are not there (LayoutError).
    """
    if rho not in RHOS:
        raise ValueError(
            f"rho is {rho}; waterbirds has {RHOS[0]} (the official split) and the ablations "
            f"{', '.join(map(str, RHOS[1:]))}"
        )
    root = Path(root)
    if not (root / "metadata.csv").is_file():
        root = root / FOLDER
    table = root / "metadata.csv"
    if not table.is_file():
        raise LayoutError(f"{root.parent}: no metadata.csv there or in {FOLDER}/")
    entries, missing = [], []
    for where, row in read_table(table, _COLUMNS):
        path = Path(row["img_filename"] or "").as_posix()
        if not (root / path).is_file():
            missing.append(path)
        y, place = integer(where, row, "y", below=2), integer(where, row, "place", below=2)
        split = SPLITS[integer(where, row, "split", below=3)]
        entries.append(Entry(path, y, split, root / path, place))
    if missing:
        raise LayoutError(
            f"{table}: {len(missing)} of {len(entries)} images it names are not there, "
            f"first {missing[0]}"
        )
    compare_counts("waterbirds", _counts(entries), _named_counts(PUBLISHED))
    return Listing(
        name="waterbirds",
        classes=CLASSES,
        entries=tuple(entries if rho == OFFICIAL_RHO else ablation(entries, rho)),
        biases=PLACES,
        aligned_bias=(0, 1),
    )


def ablation(entries: list[Entry], rho: float) -> list[Entry]:
    """The entries with a training split of 2,030 images, round(2030 (1 - rho)) of them conflicting.

    How the authors drew theirs is open; sizes and shares are theirs, the rest is ours. Waterbirds
    make up the same share of the aligned and of the conflicting images, their share of the official
    training split (1,113 of 4,795), rounded; so class and alignment stay independent. Within a
    class, aligned images come from the training split; conflicting ones from the training split
    and, where it has too few, then from the validation split, which loses them; each in the order
    of sha256 of the path. Training images that are not drawn are left out, test stays as it is. A
    training split of another size N gives round(2030 N / 4795) images instead of 2,030. Roundings
    are to even. ValueError if a group has too few images.
    """
    train = [e for e in entries if e.split == "train"]
    total = round(Fraction(_ABLATION_IMAGES * len(train), sum(PUBLISHED["train"])))
    conflicting = round(total * (1 - Fraction(str(rho))))
    waterbird_share = Fraction(sum(e.y for e in train), max(len(train), 1))
    ordered = sorted(entries, key=lambda entry: path_hash(entry.path))
    drawn: dict[str, Entry] = {}
    for count, aligned in ((conflicting, False), (total - conflicting, True)):
        waterbirds_wanted = round(count * waterbird_share)
        for y, wanted in enumerate((count - waterbirds_wanted, waterbirds_wanted)):
            splits = ("train",) if aligned else ("train", "val")
            pool = [
                entry
                for split in splits
                for entry in ordered
                if entry.split == split and entry.y == y and (entry.a == y) == aligned
            ]
            if len(pool) < wanted:
                place = PLACES[y if aligned else 1 - y]
                raise ValueError(
                    f"waterbirds: rho {rho} needs {wanted} images of a {CLASSES[y]} on {place}, "
                    f"{' and '.join(splits)} have {len(pool)}; use a larger rho"
                )
            drawn |= {entry.path: entry for entry in pool[:wanted]}
    rest = [e for e in entries if e.split != "train" and e.path not in drawn]
    return [*(entry._replace(split="train") for entry in drawn.values()), *rest]


def _counts(entries: list[Entry]) -> dict[str, int]:
    groups = Counter((entry.split, 2 * entry.y + entry.a) for entry in entries)
    return _named_counts({s: tuple(groups[s, g] for g in range(4)) for s in SPLITS})


def _named_counts(groups: dict[str, tuple[int, ...]]) -> dict[str, int]:
    return {
        f"{split} {CLASSES[group // 2]} on {PLACES[group % 2]}": count
        for split, counts in groups.items()
        for group, count in enumerate(counts)
    }
