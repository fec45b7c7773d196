"""Where images come from, each as a Listing: a folder of classes, a CSV, or a known data set."""

import csv
import logging
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from ddb_fast.config import DataConfig
from ddb_fast.data.listing import SPLITS, Entry, Listing, hold_out

logger = logging.getLogger(__name__)

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm")
_SPLIT_NAMES = {**{s: s for s in SPLITS}, "valid": "val", "validation": "val"}
# WILDS numbers its splits.
_SPLIT_VALUES = {**_SPLIT_NAMES, "0": "train", "1": "val", "2": "test"}
_TREE = "expected ROOT/CLASS/*.jpg or ROOT/{train,val,test}/CLASS/*.jpg"


def _folders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _image_files(folder: Path, ignored: list[Path]) -> Iterator[Path]:
    """The images below a folder at any depth; what else lies there is added to `ignored`."""

    def fail(error: OSError) -> None:
        raise error  # os.walk would pass over a folder that cannot be read

    seen = set()
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=fail):
        real = os.path.realpath(parent)
        if real in seen:  # a link back up would be followed for ever
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for file in (Path(parent, name) for name in sorted(files)):
            if file.suffix.lower() in EXTENSIONS and not file.name.startswith("."):
                yield file
            else:
                ignored.append(file)


def _split_folders(root: Path) -> dict[str, Path]:
    """Where each split's class folders lie: {"train": root} if the data names no splits."""
    folders = _folders(root)
    named = [f for f in folders if f.name.lower() in _SPLIT_NAMES]
    # `train` may be a class, next to `car`: only a folder of folders is a split.
    if not named or (len(named) < len(folders) and not any(_folders(f) for f in named)):
        return {"train": root}
    for other in (f for f in folders if f not in named):
        if next(_image_files(other, []), None) is not None:
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
    if "train" not in answer:
        raise ValueError(f"{root}: {named[0].name}/ but no train/; {_TREE}")
    return answer


def list_folder(
    root: str | Path, *, validation_share: float = 0.1, test_share: float = 0.2
) -> Listing:
    """List `<root>/<class>/*` or `<root>/{train,val,test}/<class>/*`, classes sorted by name.

    A class may have folders inside; `valid` and `validation` mean val. Hidden files and files that
    are no images by their extension are ignored, counted in the log. Splits that have no folder
    are held out of train (`hold_out`). ValueError for a folder that is missing, empty or laid out
    otherwise, and as for Listing.
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder; {_TREE}")
    found, ignored, names = [], [], set()
    for split, parent in _split_folders(root).items():
        for folder in _folders(parent):
            files = list(_image_files(folder, ignored))
            found += [(split, folder.name, file) for file in files]
            # An empty folder of the training split is a class too, one that needs images.
            if files or split == "train":
                names.add(folder.name)
        ignored += [p for p in parent.iterdir() if p.is_file()]
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
    if not table.is_file():
        raise ValueError(f"{table}: no such file")
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
            for column in ("path", "y"):
                if column not in columns:
                    raise ValueError(
                        f"{table}: no column `{column}`; needs path, y and optionally a, split, "
                        f"found {', '.join(columns) or 'nothing'}"
                    )
            entries = [_csv_entry(table, row, reader.line_num) for row in reader]
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{table}: not a CSV in UTF-8 ({error})") from None
    if not entries:
        raise ValueError(f"{table}: no rows below the column names")
    classes = _numbered(table, "y", {entry.y for entry in entries})
    biases = _numbered(table, "a", {e.a for e in entries}) if "a" in columns else None
    entries = hold_out(entries, validation_share=validation_share, test_share=test_share)
    return Listing(name=table.stem, classes=classes, entries=tuple(entries), biases=biases)


def _csv_entry(table: Path, row: dict[str, str | None], line: int) -> Entry:
    where = f"{table} line {line}"

    def integer(column: str) -> int:
        try:
            return int(row[column] or "")
        except ValueError:
            raise ValueError(f"{where}: {column} is {row[column]!r}, not an integer") from None

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
    return Entry(
        path, integer("y"), _SPLIT_VALUES[split], file, integer("a") if "a" in row else None
    )


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
    """List what a configuration names: a folder, a CSV, Colored MNIST, or the embedded digits.

    ValueError, one line, for everything a user can get wrong.
    """
    if config.source == "digits":
        # scikit-learn, which holds them, takes a second to import.
        from ddb_fast.data.digits import digits

        return digits(config.rho)
    if config.path is None:
        raise ValueError(
            "no images named: give --data FOLDER, --data FILE.csv or the preset digits"
        )
    path, source = Path(config.path), config.source
    if source == "colored-mnist":
        from ddb_fast.data.colored_mnist import colored_mnist

        return colored_mnist(path, rho=config.rho, validation_share=config.validation_share)
    if not path.exists():
        raise ValueError(f"{path}: no such file or folder; {_TREE}, or a CSV with path, y")
    if source == "auto":
        if not path.is_dir() and path.suffix.lower() != ".csv":
            raise ValueError(
                f"{path}: {path.suffix or 'no'} extension; give an image folder or a .csv file"
            )
        source = "folder" if path.is_dir() else "csv"
    shares = {"validation_share": config.validation_share, "test_share": config.test_share}
    return (list_folder if source == "folder" else list_csv)(path, **shares)


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
