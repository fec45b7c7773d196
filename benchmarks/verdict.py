"""How often the verdict is right: Colored Digits from unbiased to strongly biased, many draws.

--classes: of neighbouring digits (of 2: 0 to 4 and 5 to 9), so that a bias is a family of colours.
--overlapping: two classes instead, which grey levels tell apart, and not always.

python benchmarks/verdict.py --work DIR --out docs/verdict --rho 0.1 0.95 --draws 12

Each set is written as a folder of PNG files by class, so that a run finds no bias label to look at;
the same command continues, other sets add rows to the same table. A set takes two to three minutes
of one core.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from finished import read_rows, write_rows
from PIL import Image

from ddb_fast.data.digits import digits


def write_set(
    root: Path, rho: float, draw: int, mislabelled: float, classes: int
) -> dict[str, bool]:
    """Write the training and validation images; whether each training path is in conflict.

    mislabelled: share of the images that stand in the next class's folder. classes: a divisor of
    ten; a colour is in conflict where it is of another class's digits.
    """
    conflicting = {}
    strangers = np.random.default_rng(draw)
    for entry in digits(rho, draw=draw).entries:
        if entry.split == "test":
            continue
        own, colour = (number * classes // 10 for number in (entry.y, entry.a))
        y = (own + (strangers.random() < mislabelled)) % classes
        path = Path(entry.split, str(y), Path(entry.path).name)
        if not (root / path).exists():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(entry.pixels).save(root / path)
        if entry.split == "train":
            conflicting[path.as_posix()] = colour != own
    return conflicting


def write_overlapping(root: Path, draw: int) -> dict[str, bool]:
    """Two classes of 500 images that differ in how bright they are; none is in conflict.

    Their grey levels, 110 and 145 with a standard deviation of 20 each, overlap: who knows both
    distributions errs on 19 % of the images. A dot at a random place says nothing.
    """
    generator = np.random.default_rng(draw)
    rows, columns = np.mgrid[:16, :16]
    conflicting = {}
    for name, mean in (("bright", 145), ("dark", 110)):
        for number in range(500):
            image = np.full((16, 16, 3), generator.normal(mean, 20))
            row, column = generator.integers(3, 13, 2)
            image[(rows - row) ** 2 + (columns - column) ** 2 <= 4] = 255
            image += generator.normal(0, 4, image.shape)
            path = Path("train", name, f"{number:03d}.png")
            conflicting[path.as_posix()] = False
            if not (root / path).exists():
                (root / path).parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image.clip(0, 255).round().astype(np.uint8)).save(root / path)
    return conflicting


def row_of(run: Path, conflicting: dict[str, bool]) -> dict[str, Any]:
    """What the run's verdict says, and how well the images it rests on are the conflicting ones."""
    verdict = json.loads((run / "results.json").read_text("utf-8"))["verdict"]
    _, unanimous, generator, shared = verdict["checks"]
    return {
        "conflicting": sum(conflicting.values()),
        "training_images": len(conflicting),
        "found": verdict["found"],
        "unanimous": unanimous["value"],
        "excess_errors": generator["value"],
        "shared": shared["value"],
        "at_odds": verdict["suspicious"]["count"],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """A line for each kind of set: how many draws, in how many a bias was found, and by what."""
    lines = [
        "| classes | rho | generator's images | mislabelled | in conflict | sets | bias found |"
        " none found | cannot tell | unanimous errors |",
        "|---" * 10 + "|",
    ]

    def kind(row: dict[str, Any]) -> tuple[int, bool, float, int, float]:
        rho = row["rho"]
        how = row["mislabelled"], -row["images"], 0.0 if rho is None else rho
        return -row["classes"], rho is None, *how

    for one in sorted({kind(row) for row in rows}):
        classes, overlapping, mislabelled, images, rho = one
        of_kind = [row for row in rows if kind(row) == one]
        shares = [r["unanimous"] for r in of_kind if r["unanimous"] is not None]
        counts = sorted({r["conflicting"] for r in of_kind})
        cells = (
            -classes,
            "overlapping classes" if overlapping else f"{rho:g}",
            f"{-images:,}",
            f"{100 * mislabelled:g} %",
            " to ".join(map(str, dict.fromkeys((counts[0], counts[-1])))),
            len(of_kind),
            sum(r["found"] is True for r in of_kind),
            sum(r["found"] is False for r in of_kind),
            sum(r["found"] is None for r in of_kind),
            " to ".join(dict.fromkeys(f"{100 * f(shares):.0f}" for f in (min, max))) + " %"
            if shares
            else "no error",
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for sets and runs")
    parser.add_argument("--out", type=Path, required=True, help="OUT.json")
    parser.add_argument("--rho", nargs="+", type=float, default=())
    parser.add_argument("--draws", type=int, default=1, help="sets of each rho, drawn 1, 2, ...")
    parser.add_argument("--first", type=int, default=1, help="number of the first draw")
    parser.add_argument("--images", type=int, default=48_000, help="length of the generator")
    parser.add_argument("--mislabelled", type=float, default=0.0, help="share of all images")
    parser.add_argument("--classes", type=int, choices=(2, 5, 10), default=10)
    parser.add_argument("--overlapping", action="store_true", help="no digits: overlapping classes")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args(argv)
    file = arguments.out.with_suffix(".json")
    draws = range(arguments.first, arguments.first + arguments.draws)
    rhos = [None] if arguments.overlapping else arguments.rho
    for rho, draw in ((rho, draw) for draw in draws for rho in rhos):
        told = {"rho": rho, "images": arguments.images, "mislabelled": arguments.mislabelled}
        told |= {"draw": draw, "classes": 2 if rho is None else arguments.classes}
        if any(told.items() <= row.items() for row in read_rows(file)):
            continue
        words = [f"{name}{value:g}" for name, value in told.items() if value is not None]
        folder = arguments.work / "-".join(words)
        if rho is None:
            conflicting = write_overlapping(folder / "images", draw)
        else:
            conflicting = write_set(
                folder / "images", rho, draw, arguments.mislabelled, arguments.classes
            )
        fields = {
            "data": folder / "images",
            "data.source": "folder",
            "data.validation_share": 0,
            "data.test_share": 0,
            "diffusion.images": arguments.images,
            "methods": "none",
            "seed": draw,
            "threads": arguments.threads,
            "progress": "false",
            "out": folder / "run",
        }
        words = [word for name, value in fields.items() for word in (f"--{name}", str(value))]
        command = [sys.executable, "-m", "ddb_fast.cli", "run", "digits", *words]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        # Read again: another process may have added its rows meanwhile.
        row = {**told, **row_of(folder / "run", conflicting)}
        write_rows(file, [*read_rows(file), row])
        print(json.dumps(row), flush=True)
    print(table(read_rows(file)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
