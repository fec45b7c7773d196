"""What lies on disk before it becomes a listing: folders, the images below them, tables."""

import csv
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm")

Row = dict[str, str | None]


def subfolders(folder: Path) -> list[Path]:
    """The folders in a folder, sorted, without hidden ones."""
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def image_files(folder: Path, ignored: list[Path]) -> Iterator[Path]:
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


def read_table(
    table: Path, columns: Sequence[str], *, optional: Sequence[str] = ()
) -> list[tuple[str, Row]]:
    """The rows of a CSV in UTF-8, each with the words "TABLE line N" for what is wrong with it.

    ValueError if a column is missing, for what is no CSV, and for a table without rows.
    """
    if not table.is_file():
        raise ValueError(f"{table}: no such file")
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            found = reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
            for column in columns:
                if column not in found:
                    also = f" and optionally {', '.join(optional)}" if optional else ""
                    raise ValueError(
                        f"{table}: no column `{column}`; needs {', '.join(columns)}{also}, "
                        f"found {', '.join(found) or 'nothing'}"
                    )
            rows = [(f"{table} line {reader.line_num}", row) for row in reader]
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{table}: not a CSV in UTF-8 ({error})") from None
    if not rows:
        raise ValueError(f"{table}: no rows below the column names")
    return rows


def integer(where: str, row: Row, column: str, *, below: int | None = None) -> int:
    """A column as an integer, one of 0..below-1 if that is given; else a ValueError."""
    try:
        value = int(row[column] or "")
    except ValueError:
        raise ValueError(f"{where}: {column} is {row[column]!r}, not an integer") from None
    if below is not None and not 0 <= value < below:
        raise ValueError(f"{where}: {column} is {value}, not one of 0..{below - 1}")
    return value
