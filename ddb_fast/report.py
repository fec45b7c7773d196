"""report.html: what was found, in one self-contained page that opens from disk.

Whatever comes from people's files, names above all, reaches the page as escaped text. The page runs
no script and may load nothing.
"""

import base64
import csv
import io
import json
import logging
import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ddb_fast import checkpoint
from ddb_fast.config import RunConfig
from ddb_fast.data.store import ImageData
from ddb_fast.fields import flatten
from ddb_fast.scoring import Scores, read_scores
from ddb_fast.tabular import COLUMNS, caveats, percent, shown_metrics
from ddb_fast.trackers import read_log

logger = logging.getLogger(__name__)

SHOWN, GENERATED = 6, 9
"""Real images of each kind and generated ones, of each class."""
CLASSES, BYTES = 24, 3_000_000
"""Classes with pictures, and base64 bytes of pictures, at most; beyond, classes are rows."""
LISTED, ROWS = 20, 1_000
"""Flagged images listed by name under a class; classes in the table of all."""
CONFUSED, HEATED = 12, 100
"""Pairs of classes listed as mistaken for one another; classes of the confusion picture."""
GROUPS, MORE_GROUPS = 10, 200
"""Groups in the table of methods, and in the one that opens below it."""
PAIRS, NEAREST = 12, 6
"""Possible copies shown, and the nearest pairs where there is none."""
ODD = 9
"""Images at odds shown whose own class shows most, and least."""
PANELS, LINES, POINTS = 20, 10, 200
"""Curves: stages, seeds of a stage, points of a line."""
LOSSLESS, LARGEST = 32, 96
"""Pixels up to which a picture is kept as it is, and of a thumbnail."""


def plain(text: str) -> str:
    """Text whose every character shows: line breaks, controls and marks of direction escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _brief(path: str, most: int = 22) -> str:
    """The file's name, its middle left out where it is long."""
    name = plain(path.rsplit("/", 1)[-1])
    return name if len(name) <= most else f"{name[: most // 2 - 1]}…{name[-most // 2 :]}"


def _figure(score: float) -> str:
    return f"{score:.1f}" if abs(score) < 100 else f"{score:.0f}"


def _data_uri(image: Tensor) -> str:
    """An (H, W, 3) uint8 image: small ones pixel for pixel, others as a JPEG thumbnail."""
    picture, buffer = Image.fromarray(image.contiguous().numpy()), io.BytesIO()
    if max(picture.size) <= LOSSLESS:
        picture.save(buffer, format="PNG", optimize=True)
    else:
        picture.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
        picture.save(buffer, format="JPEG", quality=85)
    kind = "png" if max(image.shape[:2]) <= LOSSLESS else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


# --- classes -----------------------------------------------------------------------------------


def _ranked(scores: Scores, data: ImageData) -> list[dict[str, Any]]:
    """Every class's counts, the largest share of flagged images first, ties by mean score."""
    y, rows = data.splits["train"].y, []
    for label, name in enumerate(data.classes):
        members = (y == label).nonzero()[:, 0]
        flagged = members[scores.conflicting[members]]
        taken = Counter(scores.predicted[flagged].tolist()).most_common(3)
        rows.append(
            {
                "label": label,
                "name": plain(name),
                "count": len(members),
                "flagged": len(flagged),
                "share": len(flagged) / len(members),
                "score": scores.score[members].mean().item(),
                "taken": [(plain(data.classes[c]), n) for c, n in taken],
            }
        )
    return sorted(rows, key=lambda row: (-row["share"], -row["score"], row["label"]))


def _pictured(
    row: dict[str, Any], generated: Tensor, scores: Scores, data: ImageData
) -> dict[str, Any]:
    """Add to a class's row its pictures and the names of its flagged images.

    generated: (n, H, W, 3) uint8, of this class.
    """
    train = data.splits["train"]
    members = (train.y == row["label"]).nonzero()[:, 0]
    order = members[scores.score[members].argsort(stable=True)]
    first = [
        {"src": _data_uri(image), "alt": f"generated image {number} of class {row['name']}"}
        for number, image in enumerate(generated, 1)
    ]

    def described(index: int) -> dict[str, Any]:
        return {
            "path": plain(train.paths[index]),
            "brief": _brief(train.paths[index]),
            "taken": plain(data.classes[scores.predicted[index]]),
            "right": bool(scores.predicted[index] == row["label"]),
            "score": _figure(scores.score[index].item()),
            "flagged": bool(scores.conflicting[index]),
        }

    def real(index: int) -> dict[str, Any]:
        about = described(index)
        alt = (
            f"real image {about['path']}, labelled {row['name']}, taken for {about['taken']}, "
            f"score {about['score']}"
        )
        return {"src": _data_uri(train.small[index]), "alt": alt, **about}

    worst = order.flip(0)
    flagged = worst[scores.conflicting[worst]]
    return {
        **row,
        "generated": first,
        "aligned": [real(index) for index in order[:SHOWN].tolist()],
        "conflicting": [real(index) for index in worst[:SHOWN].tolist()],
        "listed": [described(index) for index in flagged[:LISTED].tolist()],
    }


def _classes(
    folder: Path, scores: Scores, data: ImageData
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The classes with pictures, the worst first, and all of them as rows."""
    path, train = folder / "synthetic" / "images.safetensors", data.splits["train"].small
    labels, generated = torch.empty(0, dtype=torch.int64), train[:0]
    if path.exists():  # a run on given scores has none
        tensors, _ = checkpoint.load_tensors(path)
        labels, generated = tensors["labels"], tensors["images"].permute(0, 2, 3, 1)
    rows, shown, used = _ranked(scores, data), [], 0
    for row in rows[:CLASSES]:
        chosen = (labels == row["label"]).nonzero()[:GENERATED, 0]
        pictured = _pictured(row, generated[chosen], scores, data)
        kinds = ("generated", "aligned", "conflicting")
        used += sum(len(image["src"]) for kind in kinds for image in pictured[kind])
        if shown and used > BYTES:
            break
        shown.append(pictured)
    return shown, rows


def _confused(scores: Scores, data: ImageData) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Label against prediction (K, K), and the pairs of classes most often mistaken."""
    y, number = data.splits["train"].y, len(data.classes)
    counts = torch.bincount(y * number + scores.predicted, minlength=number**2)
    counts = counts.view(number, number).numpy()
    off = counts * ~np.eye(number, dtype=bool)
    pairs = []
    for cell in np.argsort(-off, axis=None, kind="stable")[:CONFUSED].tolist():
        row, column = divmod(cell, number)
        if off[row, column] > 0:
            share = off[row, column] / counts[row].sum()
            names = plain(data.classes[row]), plain(data.classes[column])
            pairs.append({"names": names, "count": int(off[row, column]), "share": share})
    return counts, pairs


# --- what was found ----------------------------------------------------------------------------


def lead(results: dict[str, Any], rows: Sequence[dict[str, Any]]) -> list[str]:
    """What was found in at most three sentences, from what was measured without bias labels.

    rows: of `_ranked`, empty where the run trained no amplifier.
    """
    if results.get("verdict") is not None:
        return results["verdict"]["sentences"][:3]
    if not rows:
        return [
            "This run trained no generator, so it says nothing about shortcuts in these images.",
            "A run of ddb-i or ddb-ii does.",
        ]
    flagged, count = sum(row["flagged"] for row in rows), sum(row["count"] for row in rows)
    first = rows[0]
    generated = results.get("synthetic") is not None
    learned = "what the generator learned of their class" if generated else "their class"
    lines = [
        f"{flagged} of {count} training images ({100 * flagged / count:.1f} %) are at odds with "
        f"{learned}."
    ]
    if flagged:
        lines.append(
            f"Class {first['name']} has the largest share of them: {first['flagged']} of "
            f"{first['count']} ({100 * first['share']:.1f} %)."
        )
    others = "generated" if generated else "most typical"
    lines.append(
        f"Whether that is a shortcut is for you to see: do the {others} images share something, "
        "a colour, a place, a background, that the images at odds lack?"
    )
    return lines


def _told_apart(
    folder: Path, verdict: dict[str, Any] | None, data: ImageData
) -> list[dict[str, Any]]:
    """Images at odds whose own class shows most and least; none where the audit could not tell."""
    path = folder / "audit" / "at_odds.csv"
    checks = {} if verdict is None else {check["name"]: check for check in verdict["checks"]}
    unanimous = checks.get("unanimous", {"passed": False})["passed"]
    if not unanimous or (checks["separable"]["value"] or 0) <= 0 or not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    count, seen = min(ODD, len(rows) // 2), Counter()
    for row in rows:  # of equals, one of each class, then a second: many stand at 100 %
        seen[row["y"], row["standing"]] += 1
        row["turn"] = seen[row["y"], row["standing"]]
    clearest = sorted(rows, key=lambda row: (-float(row["standing"]), row["turn"]))
    train, kinds = data.splits["train"], []
    for least, some in ((False, clearest[:count]), (True, rows[:count])):
        images = []
        for row in some:
            own, other = (plain(data.classes[int(row[name])]) for name in ("y", "predicted"))
            about = {"path": plain(row["path"]), "own": own, "other": other}
            stand = f"{100 * float(row['standing']):.0f}\N{NO-BREAK SPACE}%"
            alt = f"real image {about['path']}, labelled {own}, looks like {other}, {stand}"
            src = _data_uri(train.small[int(row["index"])])
            brief = _brief(row["path"])
            images.append({**about, "standing": stand, "alt": alt, "src": src, "brief": brief})
        kinds.append({"least": least, "images": images})
    return kinds


def _memorised(
    found: dict[str, Any] | None, folder: Path, data: ImageData
) -> dict[str, Any] | None:
    """The pairs of results["memorisation"] as pictures, with its counts."""
    if found is None:
        return None
    tensors, _ = checkpoint.load_tensors(folder / "synthetic" / "images.safetensors")
    flagged = [pair for pair in found["pairs"] if pair["flagged"]][:PAIRS]
    shown = []
    for pair in flagged or found["pairs"][:NEAREST]:
        generated = tensors["images"][pair["synthetic"]].permute(1, 2, 0)
        name, path = plain(pair["class"]), plain(pair["path"])
        about = {"path": path, "brief": _brief(path), "name": name, "ratio": pair["ratio"]}
        made, real = _data_uri(generated), _data_uri(data.splits["train"].small[pair["real"]])
        shown.append({**about, "generated": made, "real": real, "number": pair["synthetic"]})
    skipped = [plain(name) for name in found["classes_skipped"]]
    return {**found, "shown": shown, "any": bool(flagged), "classes_skipped": skipped}


def _groups(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The test groups that hold images, a row each: the first method's worst first."""
    methods = {m: entry["groups"] for m, entry in results["methods"].items() if entry["groups"]}
    rows = []
    for number, group in enumerate(next(iter(methods.values()), [])):
        if group["n"] > 0:
            cells = []
            for groups in methods.values():
                seeds = groups[number]["accuracy"]
                interval = groups[number]["low"], groups[number]["high"]
                cells.append({"mean": sum(seeds) / len(seeds), "interval": interval})
            rows.append({"name": plain(group["name"]), "n": group["n"], "cells": cells})
    return sorted(rows, key=lambda row: row["cells"][0]["mean"])


# --- how it went -------------------------------------------------------------------------------


def _log_name(stage: str) -> str:
    """What `log.jsonl` calls a stage of the manifest."""
    if stage == "real-amplifier":
        return "real amplifier"
    stage = stage.replace("jtt-identification/", "jtt identification/seed")
    return stage.replace("/seed", " seed ")


def _stages(
    results: dict[str, Any], log: dict[str, list[tuple[float, float]]]
) -> list[dict[str, Any]]:
    """Seconds of each stage, with the images it trained on where the log has them."""
    rows = []
    for stage, seconds in results["seconds"].items():
        points = log.get(_log_name(stage))
        images = points[-1][0] if points else None
        rate = images / seconds if images and seconds > 0 else None
        rows.append({"name": stage, "seconds": seconds, "images": images, "rate": rate})
    return rows


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    if len(points) <= POINTS:
        return points
    return [points[i] for i in np.linspace(0, len(points) - 1, POINTS).round().astype(int)]


def _figures(
    config: RunConfig,
    data: ImageData,
    scores: Scores | None,
    rows: Sequence[dict[str, Any]],
    counts: np.ndarray | None,
    found: dict[str, Any] | None,
    log: dict[str, list[tuple[float, float]]],
) -> dict[str, Any]:
    """Every figure as SVG by its name; only `missing`, the reason, where matplotlib is not."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        reason = f"The figures are left out: matplotlib cannot be imported ({error})."
        logger.warning("report: %s `pip install matplotlib` brings it", reason)
        return {"missing": reason}
    from ddb_fast import figures

    drawn: dict[str, Any] = {"missing": None}
    if scores is not None:
        threshold = config.pseudo_labels.gamma
        # Scores that were brought were flagged elsewhere, by whatever rule.
        if config.pseudo_labels.filter != "threshold" or config.pseudo_labels.load is not None:
            threshold = None
        drawn["scores"] = figures.scores(
            scores.score.numpy(), scores.conflicting.numpy(), threshold
        )
        kept = sorted(row["label"] for row in rows[:HEATED])
        names = [data.classes[label] for label in kept]
        drawn["confusion"] = figures.confusion(counts[np.ix_(kept, kept)], names)
    if found is not None and found["generated"]["share"] is not None:
        drawn["nearness"] = figures.nearness(found["histograms"]["ratio"], found["bin"])
    panels: dict[str, list[list[tuple[float, float]]]] = {}
    for stage, points in log.items():
        panels.setdefault(stage.split(" seed ")[0].split(",")[0], []).append(_thinned(points))
    drawn["curves"] = [
        figures.curve(lines[:LINES], title, f"curve{number}")
        for number, (title, lines) in enumerate(list(panels.items())[:PANELS])
    ]
    return drawn


def write(folder: Path, config: RunConfig, data: ImageData, results: dict[str, Any]) -> None:
    """Write `report.html` from the run's files and its results."""
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ddb_fast", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    table, log = folder / "amplifier" / "scores.csv", read_log(folder / "log.jsonl")
    scores, classes, rows, counts, confused = None, [], [], None, []
    if table.exists():
        scores = read_scores(table)
        classes, rows = _classes(folder, scores, data)
        counts, confused = _confused(scores, data)
    found = _memorised(results.get("memorisation"), folder, data)
    shown = shown_metrics(results)
    groups = _groups(results)
    page = environment.get_template("report.html.j2").render(
        title=plain(data.name),
        results=results,
        verdict=results.get("verdict"),
        told_apart=_told_apart(folder, results.get("verdict"), data),
        lead=lead(results, rows),
        classes=classes,
        rows=rows[:ROWS],
        unlisted=max(0, len(rows) - ROWS),
        heated=min(HEATED, len(rows)),
        confused=confused,
        found=found,
        figures=_figures(config, data, scores, rows, counts, found, log),
        columns={name: COLUMNS[name] for name in shown},
        caveats=caveats(results, shown),
        percent=percent,
        groups=groups[:GROUPS],
        more_groups=groups[GROUPS : GROUPS + MORE_GROUPS],
        left_groups=max(0, len(groups) - GROUPS - MORE_GROUPS),
        stages=_stages(results, log),
        command=plain(shlex.join(manifest["command"])),
        device=plain(manifest["device"]),
        versions=manifest["versions"],
        fields={name: plain(str(value)) for name, value in flatten(config).items()},
    )
    checkpoint.write_atomically(folder / "report.html", page)
