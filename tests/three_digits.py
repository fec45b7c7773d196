"""A finished run on files: three digits of the embedded set in three colours, seconds to make."""

import csv
from pathlib import Path

from accelerate.state import AcceleratorState
from PIL import Image

import small
from ddb_fast.data.digits import digits
from ddb_fast.train import main

FIELDS = {name: value for name, value in small.FIELDS.items() if name != "data.rho"} | {
    "diffusion.images": "640",
    "amplifier.images": "1280",
    "classifier.images": "2560",
    "audit": "false",
    "methods": "erm ddb-ii",
}


def train(*words, **changes: str) -> None:
    """`ddb-fast run digits` in this process, shortened; dots of fields are written as `__`."""
    fields = FIELDS | {name.replace("__", "."): value for name, value in changes.items()}
    words = ["digits", *map(str, words)]
    if "--synthetic" in words:
        fields = small.without_generator(fields)
    for name, value in fields.items():
        words += [f"--{name}", *value.split()]
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main(words, prog="ddb-fast run") == 0


def write_table(path: Path, rows: list[dict]) -> Path:
    """Write rows as a CSV with their keys as columns."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_photos(root: Path) -> Path:
    """Write ROOT/SPLIT/CLASS/*.png, and ROOT/table.csv of the same with their colours."""
    rows = []
    for path, y, split, pixels, a, *_ in digits(0.9).entries:
        if y < 3 and a < 3:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(root / path)
            rows.append({"path": path, "y": y, "a": a, "split": split})
    write_table(root / "table.csv", rows)
    return root


def near(photos: Path, folder: Path, rows: list[dict]) -> list[dict]:
    """Rows of the table with paths relative to another folder below the same one."""
    up = Path("..") / photos.relative_to(folder.parent)
    return [row | {"path": (up / row["path"]).as_posix()} for row in rows]
