"""report.html: what was found, in one self-contained page that opens from disk."""

import base64
import io
import json
import shlex
from pathlib import Path
from typing import Any

import jinja2
import torch
from PIL import Image
from torch import Tensor

from ddb_fast import checkpoint
from ddb_fast.classification import read_scores
from ddb_fast.config import RunConfig, flatten
from ddb_fast.data.store import ImageData
from ddb_fast.results import findings
from ddb_fast.tabular import COLUMNS, caveats, percent, shown_metrics

SHOWN = 8
"""Images a row."""
HEIGHT = 96
"""Pixels of a thumbnail, twice what the page shows on an ordinary screen."""


def _data_uri(images: Tensor) -> str:
    """A row of (N, H, W, 3) uint8 images as one PNG picture."""
    picture = Image.fromarray(torch.cat(list(images), dim=1).contiguous().numpy())
    # Few pixels are shown as they are; interpolated they would look like another data set.
    method = Image.Resampling.NEAREST if picture.height < HEIGHT else Image.Resampling.LANCZOS
    width = round(picture.width * HEIGHT / picture.height)
    picture = picture.resize((width, HEIGHT), method)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _class_rows(folder: Path, data: ImageData) -> list[dict[str, Any]]:
    """For each class: generated images, then the most aligned and most conflicting real ones."""
    synthetic, table = folder / "synthetic" / "images.safetensors", folder / "amplifier/scores.csv"
    if not (synthetic.exists() and table.exists()):
        return []
    tensors, _ = checkpoint.load_tensors(synthetic)
    scores, train = read_scores(table), data.splits["train"]
    rows = []
    for label, name in enumerate(data.classes):
        generated = tensors["images"][tensors["labels"] == label][:SHOWN].permute(0, 2, 3, 1)
        members = (train.y == label).nonzero().squeeze(1)
        order = members[scores.score[members].argsort(stable=True)]
        strips = [("generated", generated)]
        strips.append(("most typical", train.small[order[:SHOWN]]))
        strips.append(("most conflicting", train.small[order.flip(0)[:SHOWN]]))
        flagged = int(scores.conflicting[members].sum())
        rows.append(
            {
                "name": name,
                "flagged": flagged,
                "count": len(members),
                "strips": [(title, _data_uri(images)) for title, images in strips if len(images)],
            }
        )
    return rows


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
    shown = shown_metrics(results)
    page = environment.get_template("report.html.j2").render(
        title=data.name,
        results=results,
        findings=findings(results),
        classes=_class_rows(folder, data),
        columns={name: COLUMNS[name] for name in shown},
        caveats=caveats(results, shown),
        percent=percent,
        command=shlex.join(manifest["command"]),
        device=manifest["device"],
        versions=manifest["versions"],
        fields=flatten(config),
    )
    checkpoint.write_atomically(folder / "report.html", page)
