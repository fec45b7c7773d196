"""How often the verdict is right: Colored Digits from unbiased to strongly biased, many draws.

--classes: of neighbouring digits (of 2: 0 to 4 and 5 to 9), so that a bias is a family of colours.
--noise: on their pixels, so that many a digit cannot be told.
--overlapping: two classes instead, which grey levels tell apart, and not always; with --rho a dot's
colour is the shortcut, with --minority the classes are of unequal size.

python benchmarks/verdict.py --work DIR --out docs/verdict --rho 0.1 0.95 --draws 12

Each set is written as a folder of PNG files by class, so that a run finds no bias label to look at;
the same command continues, other sets add rows to the same table. A set takes two to three minutes
of one core.
"""

import argparse
import csv
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from finished import read_rows, write_rows
from PIL import Image

from ddb_fast.data.digits import digits
from ddb_fast.metrics import auroc
from ddb_fast.opinions import read_opinions


def write_image(path: Path, pixels: np.ndarray) -> None:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8)).save(path)


def write_set(
    root: Path, rho: float, draw: int, *, mislabelled: float, noise: float, classes: int
) -> dict[str, str]:
    """Write the training and validation images; which KIND each training path is of.

    mislabelled: share of the images that stand in the next class's folder. noise: standard
    deviation of what is added to every pixel, of 255. classes: a divisor of ten; a colour is in
    conflict where it is of another class's digits.
    """
    kinds = {}
    strangers, static = np.random.default_rng(draw), np.random.default_rng([draw, 1])
    for entry in digits(rho, draw=draw).entries:
        if entry.split == "test":
            continue
        own, colour = (number * classes // 10 for number in (entry.y, entry.a))
        strange = strangers.random() < mislabelled
        y = (own + strange) % classes
        path = Path(entry.split, str(y), Path(entry.path).name)
        write_image(root / path, entry.pixels + static.normal(0, noise, entry.pixels.shape))
        if entry.split == "train":
            kind = "mislabelled" if strange else "conflicting" if colour != own else "usual"
            kinds[path.as_posix()] = kind
    return kinds


def write_overlapping(root: Path, rho: float | None, draw: int, minority: float) -> dict[str, str]:
    """Two classes of 1,000 images together that differ in how bright they are.

    Their grey levels, 110 and 145 with a standard deviation of 20 each, overlap: who knows both
    distributions errs on 19 % of the images of classes of equal size. A dot at a random place is
    white and says nothing; given rho, its colour is the class's own in that share of the images and
    in conflict in the others. minority: share of the bright ones.
    """
    generator = np.random.default_rng(draw)
    rows, columns = np.mgrid[:16, :16]
    colours = {"bright": (255, 0, 0), "dark": (0, 0, 255)}
    kinds = {}
    for name, mean, share in (("bright", 145, minority), ("dark", 110, 1 - minority)):
        other = colours["dark" if name == "bright" else "bright"]
        for number in range(round(1000 * share)):
            image = np.full((16, 16, 3), generator.normal(mean, 20))
            row, column = generator.integers(3, 13, 2)
            strange = rho is not None and generator.random() >= rho
            dot = (255, 255, 255) if rho is None else other if strange else colours[name]
            image[(rows - row) ** 2 + (columns - column) ** 2 <= 4] = dot
            image += generator.normal(0, 4, image.shape)
            path = Path("train", name, f"{number:03d}.png")
            kinds[path.as_posix()] = "conflicting" if strange else "usual"
            write_image(root / path, image)
    return kinds


SAID = {
    "A bias was found": "found",
    "There may be a bias": "may be",
    "No bias is shown": "not shown",
    "No bias was found": "none",
    "Nothing can be said": "cannot tell",
}
"""How each verdict begins."""


def told_apart(run: Path, kinds: dict[str, str]) -> dict[str, float]:
    """How well conflicting images at odds are told from mislabelled ones: counts, and AUROCs.

    standing: with the rebalanced networks; erm: with those on the real images; score: the
    amplifier's.
    """
    said = read_opinions(run / "audit")
    odd = (~said.standing.isnan()).nonzero()[:, 0].tolist()
    with (run / "amplifier" / "scores.csv").open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "train"]
    odd = torch.tensor([i for i in odd if kinds[rows[i]["path"]] != "usual"], dtype=torch.int64)
    conflicting = torch.tensor([kinds[rows[i]["path"]] == "conflicting" for i in odd.tolist()])
    score = torch.tensor([float(rows[i]["score"]) for i in odd.tolist()])
    stand, gain = said.standing[odd], said.gain[odd]
    ways = {"standing": stand, "erm": stand - gain, "score": score}
    return {
        "conflicting": int(conflicting.sum()),
        "mislabelled": int((~conflicting).sum()),
        **{name: auroc(values, conflicting) for name, values in ways.items()},
    }


def row_of(run: Path, kinds: dict[str, str]) -> dict[str, Any]:
    """What the run's verdict says, and how it orders the images at odds."""
    verdict = json.loads((run / "results.json").read_text("utf-8"))["verdict"]
    _, unanimous, separable, generator, shared = verdict["checks"]
    counts = Counter(kinds.values())
    biased = counts["mislabelled"] and counts["conflicting"] < len(kinds) / 2
    return {
        "conflicting": counts["conflicting"],
        "training_images": len(kinds),
        "said": next(s for start, s in SAID.items() if verdict["sentences"][0].startswith(start)),
        "unanimous": unanimous["value"],
        "gain": separable["value"],
        "two_standard_errors": separable["limit"],
        "excess_errors": generator["value"],
        "shared": shared["value"],
        "at_odds": verdict["suspicious"]["count"],
        "told_apart": told_apart(run, kinds) if biased else None,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """A line for each kind of set: how many draws, in how many a bias was found, and by what."""
    names = ("classes", "overlapping", "minority", "noise", "mislabelled", "images", "rho")
    lines = [
        "| images | classes | rho | generator's images | in conflict | sets | bias found |"
        " may be | not shown | none found | cannot tell | unanimous errors |"
        " gain / its standard error | conflicting from mislabelled, AUROC |",
        "|---" * 14 + "|",
    ]

    def kind(row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row[name] for name in names)

    def span(values: list[float], form: str) -> str:
        return " to ".join(dict.fromkeys(form.format(f(values)) for f in (min, max)))

    def order(one: tuple[Any, ...]) -> tuple[Any, ...]:
        classes, overlapping, *others, images, rho = one
        return overlapping, -classes, *others, -images, -1.0 if rho is None else rho

    for one in sorted({kind(row) for row in rows}, key=order):
        told = dict(zip(names, one, strict=True))
        of_kind = [row for row in rows if kind(row) == one]
        words = ["overlapping classes" if told["overlapping"] else "digits"]
        if told["minority"] != 0.5:
            words.append(f"{100 * told['minority']:g} % of one")
        words += [f"noise of {told['noise']:g}"] if told["noise"] else []
        words += [f"{100 * told['mislabelled']:g} % mislabelled"] if told["mislabelled"] else []
        shares = [100 * r["unanimous"] for r in of_kind if r["unanimous"] is not None]
        gains = [
            2 * r["gain"] / r["two_standard_errors"] for r in of_kind if r["two_standard_errors"]
        ]
        areas = [r["told_apart"]["standing"] for r in of_kind if r["told_apart"] is not None]
        cells = (
            ", ".join(words),
            told["classes"],
            "-" if told["rho"] is None else f"{told['rho']:g}",
            f"{told['images']:,}",
            span([r["conflicting"] for r in of_kind], "{:d}"),
            len(of_kind),
            *(sum(r["said"] == said for r in of_kind) for said in SAID.values()),
            span(shares, "{:.0f}") + " %" if shares else "no error",
            span(gains, "{:+.1f}") if gains else "-",
            span(areas, "{:.3f}") if areas else "-",
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def one_set(told: dict[str, Any], work: Path, file: Path, threads: int) -> None:
    """Make the set, run on it, and add its row to `file`."""
    folder = work / "-".join(f"{name}{value:g}" for name, value in told.items() if value)
    images, rho, draw = folder / "images", told["rho"], told["draw"]
    if told["overlapping"]:
        kinds = write_overlapping(images, rho, draw, told["minority"])
    else:
        how = {name: told[name] for name in ("mislabelled", "noise", "classes")}
        kinds = write_set(images, rho, draw, **how)
    fields = {
        "data": images,
        "data.source": "folder",
        "data.validation_share": 0,
        "data.test_share": 0,
        "diffusion.images": told["images"],
        "methods": "none",
        "seed": draw,
        "threads": threads,
        "progress": "false",
        "out": folder / "run",
    }
    words = [word for name, value in fields.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "ddb_fast.cli", "run", "digits", *words]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    # Read again: another process may have added its rows meanwhile.
    row = {**told, **row_of(folder / "run", kinds)}
    write_rows(file, [*read_rows(file), row])
    print(json.dumps(row), flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for sets and runs")
    parser.add_argument("--out", type=Path, required=True, help="OUT.json")
    parser.add_argument("--rho", nargs="+", type=float, default=())
    parser.add_argument("--draws", type=int, default=1, help="sets of each rho, drawn 1, 2, ...")
    parser.add_argument("--first", type=int, default=1, help="number of the first draw")
    parser.add_argument("--images", type=int, default=48_000, help="length of the generator")
    parser.add_argument("--mislabelled", type=float, default=0.0, help="share of all images")
    parser.add_argument("--noise", type=float, default=0.0, help="on pixels, of 255")
    parser.add_argument("--classes", type=int, choices=(2, 5, 10), default=10)
    parser.add_argument("--overlapping", action="store_true", help="no digits: overlapping classes")
    parser.add_argument("--minority", type=float, default=0.5, help="of overlapping classes")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args(argv)
    file = arguments.out.with_suffix(".json")
    draws = range(arguments.first, arguments.first + arguments.draws)
    overlapping = arguments.overlapping
    if not (overlapping or arguments.rho):
        parser.error("--rho is needed for digits")
    for draw in draws:
        for rho in arguments.rho or [None]:
            told = {
                "rho": rho,
                **{name: getattr(arguments, name) for name in ("images", "mislabelled", "noise")},
                "draw": draw,
                "classes": 2 if overlapping else arguments.classes,
                "overlapping": overlapping,
                "minority": arguments.minority,
            }
            if not any(told.items() <= row.items() for row in read_rows(file)):
                one_set(told, arguments.work, file, arguments.threads)
    print(table(read_rows(file)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
