"""BAR, Biased Action Recognition (Nam et al. 2020): six actions, each at its usual place in train.

`list_bar` is the set as published, without bias labels. `list_bar_rho` is our protocol for when
groups are needed: it takes the published training images for aligned and the test images for
conflicting.
"""

from collections import Counter
from fractions import Fraction
from pathlib import Path

from ddb_fast.data.benchmarks.layout import LayoutError, compare_counts, folder_at, images_in
from ddb_fast.data.listing import Entry, Listing, hold_out, path_hash

CLASSES = ("climbing", "diving", "fishing", "pole vaulting", "racing", "throwing")
PUBLISHED = {"train": (326, 520, 163, 279, 336, 317), "test": (105, 159, 42, 131, 132, 85)}
_TENTH = Fraction(1, 10)


def list_bar(root: str | Path, *, validation_share: float = 0.1) -> Listing:
    """List BAR as published: train, test, and a validation split held out of train.

    Class = the name's text before its last underscore. There is no official validation split;
    `hold_out` takes validation_share of each class, 0 for none.

    Raises:
        ValueError: one line, for missing folders and names of no class (LayoutError).
    """
    entries = hold_out(_entries(Path(root)), validation_share=validation_share, test_share=0)
    return Listing(name="bar", classes=CLASSES, entries=tuple(entries))


def list_bar_rho(root: str | Path, *, rho: float = 0.95) -> Listing:
    """List BAR with bias labels, a share rho of the training images aligned.

    a: aligned 0 (published in train), conflicting 1 (published in test). Per class, each pool in
    the order of sha256 of the path. Aligned: the first tenth validates, the next tests, the rest
    trains. Conflicting: k = max(1, round(n (1 - rho) / rho)) train, n being the aligned training
    images of the class; the next tenth of the pool validates, the rest tests. Roundings are to
    even.

    Raises:
        ValueError: one line, as `list_bar`; and for a rho of 0 or less, more than 1, or so small
            that a class has no conflicting image left to test.
    """
    if not 0 < rho <= 1:
        raise ValueError(f"rho is {rho}; bar-rho needs a share above 0, at most 1")
    root, share = Path(root), Fraction(str(rho))
    pools: dict[tuple[int, str], list[Entry]] = {}
    for entry in sorted(_entries(root), key=lambda e: path_hash(e.path)):
        pools.setdefault((entry.y, entry.split), []).append(entry)
    entries = []
    for y, name in enumerate(CLASSES):
        aligned, conflicting = pools.get((y, "train"), []), pools.get((y, "test"), [])
        tenth = round(_TENTH * len(aligned))
        trained = len(aligned) - 2 * tenth
        entries += _dealt(aligned, 0, {"val": tenth, "test": tenth, "train": trained})
        k = max(1, round(trained * (1 - share) / share))
        tenth = round(_TENTH * len(conflicting))
        if k + tenth >= len(conflicting):
            raise ValueError(
                f"{root}: rho {rho} puts {k} conflicting images of {name} into training and "
                f"{tenth} into validation, test/ has {len(conflicting)}; use a larger rho"
            )
        left = len(conflicting) - k - tenth
        entries += _dealt(conflicting, 1, {"train": k, "val": tenth, "test": left})
    return Listing(
        name="bar-rho",
        classes=CLASSES,
        entries=tuple(entries),
        biases=("aligned", "conflicting"),
        aligned_bias=(0,) * len(CLASSES),
    )


def _entries(root: Path) -> list[Entry]:
    entries = []
    for split in PUBLISHED:
        for file in images_in(folder_at(root, split)):
            name = file.stem.rpartition("_")[0]
            if name not in CLASSES:
                raise LayoutError(
                    f"{file}: not named <class>_<n> with one of {', '.join(CLASSES)} as class"
                )
            path = file.relative_to(root).as_posix()
            entries.append(Entry(path, CLASSES.index(name), split, file))
    found = Counter(f"{entry.split} {CLASSES[entry.y]}" for entry in entries)
    published = {
        f"{split} {name}": count
        for split, counts in PUBLISHED.items()
        for name, count in zip(CLASSES, counts, strict=True)
    }
    compare_counts("bar", found, published)
    return entries


def _dealt(pool: list[Entry], a: int, counts: dict[str, int]) -> list[Entry]:
    """The entries of a pool, the first of them to the first split, and so on."""
    splits = [split for split, count in counts.items() for _ in range(count)]
    return [entry._replace(split=s, a=a) for entry, s in zip(pool, splits, strict=True)]
