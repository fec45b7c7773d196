"""What lies on disk before it becomes a listing: folders, the images below them, tables."""

import csv
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm")

Row = dict[str, str | None]
NAMED = 5
"""Files or classes that a message names; a run that skips no broken files stops reading there."""


def few(names: Sequence[str], most: int = NAMED) -> str:
    """The first `most` of them, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def subfolders(folder: Path) -> list[Path]:
    """The folders in a folder, sorted, without hidden ones."""
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def image_files(folder: Path, ignored: list[Path]) -> Iterator[Path]:
    """The images below a folder at any depth; what else lies there is added to `ignored`.

    ValueError for the folder of a run, whose images are not those that people put there.
    """

    def fail(error: OSError) -> None:
        raise error  # os.walk would pass over a folder that cannot be read

    seen = set()
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=fail):
        real = os.path.realpath(parent)
        if real in seen:  # a link back up would be followed for ever
            folders.clear()
            continue
        seen.add(real)
        if {"manifest.json", "config.json"} <= set(files):
            raise ValueError(f"{parent}: a run's folder among the images; move it elsewhere")
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

    A row that is too short has None in the columns that it lacks. ValueError for a column that is
    missing or there twice, a row with more values than columns, a quote that is left open, what is
    no CSV, and a table without rows.
    """
    if not table.is_file():
        raise ValueError(f"{table}: no such file")
    names: list[str] = []
    rows: list[tuple[str, Row]] = []
    begin = 1
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            for cells in reader:
                where, begin = f"{table} line {reader.line_num}", reader.line_num + 1
                if not cells:
                    continue
                if not names:
                    names = [name.strip() for name in cells]
                    _check_columns(table, names, columns, optional)
                elif "".join(cells[len(names) :]).strip():
                    raise ValueError(
                        f"{where}: {len(cells)} values for {len(names)} columns; put a value that "
                        "holds a comma in quotes"
                    )
                else:
                    cells += [None] * (len(names) - len(cells))
                    row = dict(zip(names, cells, strict=False))
                    _check_breaks(where, row)
                    rows.append((where, row))
    except csv.Error as error:
        raise ValueError(
            f"{table} line {begin}: not a CSV ({error}); close every quote, and double one inside"
        ) from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{table}: not a CSV in UTF-8 ({error})") from None
    if not names:
        _check_columns(table, names, columns, optional)
    if not rows:
        raise ValueError(f"{table}: no rows below the column names")
    return rows


def _check_columns(
    table: Path, found: Sequence[str], needed: Sequence[str], optional: Sequence[str]
) -> None:
    for column in needed:
        if column not in found:
            also = f" and optionally {', '.join(optional)}" if optional else ""
            raise ValueError(
                f"{table}: no column `{column}`; needs {', '.join(needed)}{also}, "
                f"found {', '.join(found) or 'nothing'}"
            )
    for column in (*needed, *optional):
        if found.count(column) > 1:
            raise ValueError(f"{table}: column `{column}` is there twice; keep one of the two")


def _check_breaks(where: str, row: Row) -> None:
    """Refuse a value of several lines: after a quote that is left open, rows are part of it."""
    for column, value in row.items():
        # Names of files may hold anything, and there is no file of a name that has swallowed rows.
        if column != "path" and value is not None and ("\n" in value or "\r" in value):
            raise ValueError(
                f"{where}: {column} holds a line break; close the quote that is open, or leave the "
                "break out"
            )


def integer(where: str, row: Row, column: str, *, below: int | None = None) -> int:
    """A column as an integer, one of 0..below-1 if that is given; else a ValueError."""
    try:
        value = int(row[column] or "")
    except ValueError:
        raise ValueError(f"{where}: {column} is {row[column]!r}, not an integer") from None
    if below is not None and not 0 <= value < below:
        raise ValueError(f"{where}: {column} is {value}, not one of 0..{below - 1}")
    return value


def number_name(value: str) -> str:
    """What a run calls a value of a table: 0 for 00, as `integer` reads it; other text as it is."""
    try:
        return str(int(value))
    except ValueError:
        return value
