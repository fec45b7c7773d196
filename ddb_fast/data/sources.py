"""Where images come from, each as a Listing: a folder of classes, a CSV, or a known data set."""

import logging
from collections import Counter
from pathlib import Path

from ddb_fast.config import DataConfig
from ddb_fast.data.benchmarks import BENCHMARKS, open_benchmark
from ddb_fast.data.digits import digits
from ddb_fast.data.files import EXTENSIONS, Row, image_files, integer, read_table, subfolders
from ddb_fast.data.listing import SPLITS, Entry, Listing, hold_out

logger = logging.getLogger(__name__)

_SPLIT_NAMES = {s: s for s in SPLITS} | {"training": "train", "testing": "test"}
_SPLIT_NAMES |= dict.fromkeys(("valid", "validation", "dev"), "val")
# WILDS numbers its splits.
_SPLIT_VALUES = {**_SPLIT_NAMES, "0": "train", "1": "val", "2": "test"}
_TREE = "expected ROOT/CLASS/*.jpg or ROOT/{train,val,test}/CLASS/*.jpg"


def split_folders(root: Path) -> dict[str, Path]:
    """Where each split's class folders lie: {"train": root} if the data names no splits.

    ValueError for a folder that may be a class or a split, and for a split that is there twice.
    """
    folders = subfolders(root)
    named = [f for f in folders if f.name.lower() in _SPLIT_NAMES]
    # `train` may be a class, next to `car`: only a folder of folders is a split.
    if not named or (len(named) < len(folders) and not any(subfolders(f) for f in named)):
        return {"train": root}
    for other in (f for f in folders if f not in named):
        if next(image_files(other, []), None) is not None:
            raise ValueError(
                f"{root}: {other.name}/ holds images beside {named[0].name}/, is it a class or a "
                f"split? {_TREE}"
            )
    answer: dict[str, Path] = {}
    for folder in named:
        split = _SPLIT_NAMES[folder.name.lower()]
        if split in answer:
            raise ValueError(f"{root}: both {answer[split].name}/ and {folder.name}/; keep one")
        answer[split] = folder
    return answer


def list_folder(
    root: str | Path, *, validation_share: float = 0.1, test_share: float = 0.2
) -> Listing:
    """List `<root>/<class>/*` or `<root>/{train,val,test}/<class>/*`, classes sorted by name.

    A class may have folders inside; `valid`, `validation` and `dev` mean val, `training` train and
    `testing` test. Hidden files and files that
    are no images by their extension are ignored, counted in the log. Splits that have no folder
    are held out of train (`hold_out`). ValueError for a folder that is missing, empty or laid out
    otherwise, and as for Listing.
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder; {_TREE}")
    parents = split_folders(root)
    if "train" not in parents:
        raise ValueError(f"{root}: {next(iter(parents.values())).name}/ but no train/; {_TREE}")
    found, ignored, names = [], [], set()
    for split, parent in parents.items():
        for folder in subfolders(parent):
            files = list(image_files(folder, ignored))
            found += [(split, folder.name, file) for file in files]
            # An empty folder of the training split is a class too, one that needs images.
            if files or split == "train":
                names.add(folder.name)
        ignored += [p for p in parent.iterdir() if not p.is_dir()]
    if not found:
        loose = sum(p.suffix.lower() in EXTENSIONS for p in ignored)
        what = f"{loose} images but none in a class folder" if loose else "no images found"
        raise ValueError(f"{root}: {what}; {_TREE}, with {' '.join(EXTENSIONS)}")
    if ignored:
        logger.info("%s: %d other files ignored, first %s", root, len(ignored), ignored[0].name)
    classes = tuple(sorted(names))
    number = {name: label for label, name in enumerate(classes)}
    entries = [
        Entry(file.relative_to(root).as_posix(), number[name], split, file)
        for split, name, file in found
    ]
    entries = hold_out(entries, validation_share=validation_share, test_share=test_share)
    return Listing(name=root.resolve().name, classes=classes, entries=tuple(entries))


def list_csv(
    path: str | Path, *, validation_share: float = 0.1, test_share: float = 0.2
) -> Listing:
    """List the images of a CSV in UTF-8 with columns path, y and optionally a, split.

    Paths are relative to the CSV's folder. y and a are integers that leave none of 0..K-1 out.
    split is train, val or test, or 0, 1, 2 as in WILDS; splits never named are held out of train
    (`hold_out`). ValueError names the line that is wrong, and as for Listing.
    """
    table = Path(path)
    rows = read_table(table, ("path", "y"), optional=("a", "split"))
    entries = [_csv_entry(table, where, row) for where, row in rows]
    classes = _numbered(table, "y", {entry.y for entry in entries})
    biases = _numbered(table, "a", {e.a for e in entries}) if "a" in rows[0][1] else None
    entries = hold_out(entries, validation_share=validation_share, test_share=test_share)
    return Listing(name=table.stem, classes=classes, entries=tuple(entries), biases=biases)


def csv_image(table: Path, where: str, row: Row) -> tuple[str, Path, str]:
    """The path, the file and the split, train without a column, of a row; ValueError names it."""
    path = Path(row["path"] or "").as_posix()
    if Path(path).suffix.lower() not in EXTENSIONS:
        known = " ".join(EXTENSIONS)
        raise ValueError(f"{where}: path {row['path']!r} has none of the extensions {known}")
    file = table.parent / path
    if not file.is_file():
        raise ValueError(f"{where}: no file {file}; paths are relative to the CSV's folder")
    split = (row.get("split", "train") or "").strip().lower()
    if split not in _SPLIT_VALUES:
        raise ValueError(
            f"{where}: split is {row['split']!r}, not one of {', '.join(_SPLIT_VALUES)}"
        )
    return path, file, _SPLIT_VALUES[split]


def _csv_entry(table: Path, where: str, row: Row) -> Entry:
    path, file, split = csv_image(table, where, row)
    a = integer(where, row, "a") if "a" in row else None
    return Entry(path, integer(where, row, "y"), split, file, a)


def _numbered(table: Path, column: str, values: set[int]) -> tuple[str, ...]:
    wrong = [f"{v} is negative" for v in sorted(values) if v < 0]
    wrong += [f"{v} is missing" for v in range(len(values)) if v not in values]
    if wrong:
        raise ValueError(
            f"{table}: {column} must be numbered 0..K-1 with none left out: {wrong[0]} "
            f"(found {min(values)}..{max(values)})"
        )
    return tuple(str(v) for v in range(len(values)))


def open_listing(config: DataConfig) -> Listing:
    """List what a configuration names: a folder, a CSV, a published set, or the embedded digits.

    ValueError, one line, for everything a user can get wrong.
    """
    source = source_of(config)
    if source == "digits":
        return digits(config.rho)
    path = Path(config.path)
    if source in BENCHMARKS:
        return open_benchmark(path, config)
    shares = {"validation_share": config.validation_share, "test_share": config.test_share}
    return (list_folder if source == "folder" else list_csv)(path, **shares)


def check_outside(config: DataConfig, out: str | Path) -> None:
    """ValueError for a run's folder `out` within a folder of images, where it would be a class."""
    if source_of(config) != "folder":
        return
    root, place = Path(config.path).resolve(), Path(out).resolve()
    if not place.is_relative_to(root):
        return
    if not any(part.startswith(".") for part in place.relative_to(root).parts):
        raise ValueError(
            f"{out} lies within the images, {config.path}, and would be a class of its own; name a "
            "folder outside with --out"
        )


def source_of(config: DataConfig) -> str:
    """What a configuration names, auto told to be folder or csv; ValueError if it is not there."""
    if config.source == "digits":
        return "digits"
    if config.path is None:
        raise ValueError(
            "no images named: give --data FOLDER, --data FILE.csv or the preset digits"
        )
    path = Path(config.path)
    if config.source in BENCHMARKS:
        return config.source
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder; {_TREE}, or a CSV with path, y")
    if config.source != "auto":
        return config.source
    if not path.is_dir() and path.suffix.lower() != ".csv":
        raise ValueError(
            f"{path}: {path.suffix or 'no'} extension; give an image folder or a .csv file"
        )
    return "folder" if path.is_dir() else "csv"


def describe(listing: Listing) -> str:
    """A listing as text: a row for each class, or each group where bias labels exist."""
    counts = Counter((entry.y, entry.a, entry.split) for entry in listing.entries)
    biases = listing.biases or (None,)
    rows = [("class" if listing.biases is None else "class, bias", *SPLITS)]
    for label, name in enumerate(listing.classes):
        for bias, bias_name in enumerate(biases):
            key = (label, None if bias_name is None else bias)
            title = name if bias_name is None else f"{name}, {bias_name}"
            rows.append((title, *(str(counts[*key, split]) for split in SPLITS)))
    totals = Counter(listing.split)
    rows.append(("all", *(str(totals[split]) for split in SPLITS)))
    width = max(len(row[0]) for row in rows)
    lines = [f"{row[0]:{width}}" + "".join(f"{cell:>9}" for cell in row[1:]) for row in rows]
    head = f"{listing.name}: {len(listing)} images, {len(listing.classes)} classes"
    return "\n".join([head, *lines])
