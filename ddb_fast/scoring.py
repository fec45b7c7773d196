"""The bias score: the amplifier's loss of an image's label, beside those of the training split.

One set of functions makes the rows of a run's `amplifier/scores.csv` and of any other images; what
comes out is a `ScoreTable`, NumPy columns that other tools take as they are.
"""

import contextlib
import csv
import importlib.util
import io
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddb_fast.checkpoint import write_atomically
from ddb_fast.config import ClassifierConfig, PseudoLabelConfig
from ddb_fast.data.augment import amplifier_view, centre
from ddb_fast.data.files import few
from ddb_fast.data.pixels import normalise
from ddb_fast.data.store import gather
from ddb_fast.recipes import pseudo_groups

logger = logging.getLogger(__name__)

EVALUATION_BATCH = 256
FORMATS = ("csv", "parquet", "json")
_AT_ONCE = 512
"""Rows that are text at the same time: with 1,000 classes half a million cells."""
COLUMNS = (
    "index",
    "split",
    "path",
    "y",
    "predicted",
    "loss",
    "probability_y",
    "score",
    "pseudo_conflicting",
)
"""Of scores.csv; `ScoreTable.columns` has `probability_of_<class>` for each class after them."""


@torch.inference_mode()
def logits_of(
    network: nn.Module,
    images: Tensor,
    config: ClassifierConfig,
    *,
    device: torch.device,
    crop: bool,
    rows: Tensor | None = None,
) -> Tensor:
    """Logits (N, K) fp32 on the CPU of uint8 NHWC images, in eval mode without augmentation.

    rows: (N,) int64, of which images; all without it. crop: centre crop (target classifiers, from
    `large`); otherwise a plain resize (the amplifier, whose real images come from `small`, squashed
    or padded to the size of the synthetic ones).
    """
    network.eval()
    view = centre if crop else amplifier_view
    answers = []
    rows = torch.arange(len(images)) if rows is None else rows
    for index in rows.split(EVALUATION_BATCH):
        pixels = view(gather(images, index, device), config.image_size)
        answers.append(network(normalise(pixels, config.pixel_norm)).float().cpu())
    return torch.cat(answers)


def loss_of_label(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of each image, (N,) fp32 in nats, by way of float64; logits (N, K), y (N,)."""
    return F.cross_entropy(logits.double(), y, reduction="none").float()


# --- what a score is measured against ----------------------------------------------------------


@dataclass(frozen=True, eq=False, kw_only=True)
class Statistics:
    """What the amplifier's losses on a run's training split make of another loss, for K classes.

    mean, std, threshold: (K,) float64, nats, NaN for a class without training images. by_error_set:
    (K,) bool, where every misclassified image counts as conflicting, whatever its loss.
    """

    classes: tuple[str, ...]
    mean: Tensor
    std: Tensor
    threshold: Tensor
    by_error_set: Tensor


def training_statistics(
    loss: Tensor, predicted: Tensor, y: Tensor, classes: Sequence[str], rules: PseudoLabelConfig
) -> Statistics:
    """The statistics of a training split; a warning names classes that fall back to their errors.

    loss, predicted, y: (N,), the amplifier's verdict and the labels. ValueError as `pseudo_groups`.
    """
    groups = pseudo_groups(
        loss,
        predicted,
        y,
        len(classes),
        gamma=rules.gamma,
        stats_over=rules.stats_over,
        filter=rules.filter,
    )
    if names := [classes[c] for c in groups.fallback_classes]:
        # One line: with 1,000 classes there may be hundreds.
        logger.warning(
            "class %s: no image passes the threshold; its error set is taken instead", few(names)
        )
    by_error_set = torch.full((len(classes),), rules.filter == "none")
    by_error_set[list(groups.fallback_classes)] = True
    return Statistics(
        classes=tuple(classes),
        mean=groups.mean,
        std=groups.std,
        threshold=groups.threshold,
        by_error_set=by_error_set,
    )


# --- the table ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scores:
    """The amplifier's verdict on the images of one split, in their order; all (N,)."""

    y: Tensor
    predicted: Tensor
    loss: Tensor
    score: Tensor
    conflicting: Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class ScoreTable:
    """The amplifier's verdict on N images in K classes, a row each, as NumPy columns.

    path, split: (N,) str. predicted: (N,) int64. probabilities: (N, K) float64. classes: the K
    names, in the order of their numbers. y: (N,) int64; loss: (N,) float32, nats; score: (N,)
    float64, (loss - mean_y) / std_y, higher = more conflicting; conflicting: (N,) bool, the pseudo
    bias label. These four are None where images have no labels: it is the loss of the label that a
    score compares.
    """

    classes: tuple[str, ...]
    path: np.ndarray
    split: np.ndarray
    predicted: np.ndarray
    probabilities: np.ndarray
    y: np.ndarray | None = None
    loss: np.ndarray | None = None
    score: np.ndarray | None = None
    conflicting: np.ndarray | None = None

    def __post_init__(self) -> None:
        for name, column in vars(self).items():
            if name != "classes" and column is not None and len(column) != len(self):
                raise ValueError(f"{name} has {len(column)} values for {len(self)} images")

    def __len__(self) -> int:
        return len(self.path)

    def __repr__(self) -> str:
        return f"ScoreTable({len(self)} images, {len(self.classes)} classes)"

    def columns(self, *, probabilities: bool = True) -> dict[str, Any]:
        """Name -> N values, in the order of COLUMNS: what a data frame is made of.

        What needs labels is a list of None where there are none.
        """
        count = len(self)
        probability = None
        if self.loss is not None:
            probability = torch.from_numpy(self.loss).double().neg().exp().float().numpy()
        values = (
            *(np.arange(count), self.split, self.path, self.y, self.predicted),
            *(self.loss, probability, self.score, self.conflicting),
        )
        named = {
            name: [None] * count if column is None else column
            for name, column in zip(COLUMNS, values, strict=True)
        }
        if probabilities:
            for name, column in zip(self.classes, self.probabilities.T, strict=True):
                named[f"probability_of_{name}"] = np.ascontiguousarray(column)
        return named

    def where(self, rows: np.ndarray | slice) -> "ScoreTable":
        """The rows that `rows`, a mask (N,) bool, a slice or indices in any order, picks."""
        picked = {
            name: column[rows]
            for name, column in vars(self).items()
            if name != "classes" and column is not None
        }
        return replace(self, **picked)

    def parts(self, format: str = "csv", *, probabilities: bool = True) -> Iterator[str]:
        """The table as CSV (floats to 9 digits) or as JSON, a list of objects, one a line.

        Some rows at a time: as Python objects all cells take ten times their memory.
        """
        for start in range(0, len(self), _AT_ONCE) or (0,):
            some = self.where(slice(start, start + _AT_ONCE))
            columns = some.columns(probabilities=probabilities)
            columns["index"] = np.arange(start, start + len(some))
            cells = (np.asarray(c, dtype=object).tolist() for c in columns.values())
            rows = zip(*cells, strict=True)
            if format == "json":
                lines = [json.dumps(dict(zip(columns, row, strict=True))) for row in rows]
                opening = ",\n" if start else "[\n"
                yield opening + ",\n".join(lines)
                continue
            out = io.StringIO(newline="")
            writer = csv.writer(out)
            if not start:
                writer.writerow(columns)
            writer.writerows([_cell(value) for value in row] for row in rows)
            yield out.getvalue()
        if format == "json":
            yield "\n]\n"

    def write(
        self, path: str | Path, format: str | None = None, *, probabilities: bool = True
    ) -> None:
        """Write a file, whole or not at all, in one of FORMATS; by the path's ending without one.

        ValueError as `table_format`, OSError when the disk refuses.
        """
        path, format = Path(path), table_format(path, format)
        if format != "parquet":
            write_atomically(path, self.parts(format, probabilities=probabilities))
            return
        import pyarrow
        from pyarrow import parquet

        out = io.BytesIO()
        parquet.write_table(pyarrow.table(self.columns(probabilities=probabilities)), out)
        write_atomically(path, out.getvalue())


def _cell(value: Any) -> Any:
    if isinstance(value, bool):
        return int(value)
    return f"{value:.9g}" if isinstance(value, float) else value


def table_format(path: str | Path | None, format: str | None = None) -> str:
    """The format of a table to be written: as asked, else by the path's ending, CSV without a path.

    ValueError, one line, for another one, for a path where no file can be written, and for parquet
    without a path or without pyarrow.
    """
    if path is not None:
        if Path(path).is_dir():
            raise ValueError(f"{path}: a folder; name a file")
        there = next(folder for folder in Path(path).absolute().parents if folder.exists())
        if not there.is_dir() or not os.access(there, os.W_OK):
            raise ValueError(f"{path}: no file can be written in {there}")
    if format is None:
        format = "csv" if path is None else Path(path).suffix.lower().lstrip(".")
    if format not in FORMATS:
        where = "" if path is None else f"{path}: "
        raise ValueError(f"{where}format {format!r} is none of {', '.join(FORMATS)}")
    if format == "parquet":
        if path is None:
            raise ValueError(
                "parquet is no text for a terminal: name a file, such as scores.parquet"
            )
        if importlib.util.find_spec("pyarrow") is None:
            raise ValueError(
                f"{path}: parquet needs pyarrow (pip install pyarrow); csv needs nothing"
            )
    return format


# --- making it ---------------------------------------------------------------------------------


def table_of(
    logits: Tensor,
    statistics: Statistics,
    *,
    paths: Sequence[str],
    split: str = "",
    y: Tensor | None = None,
) -> ScoreTable:
    """The amplifier's verdict from its logits (N, K); without y (N,) there are no scores.

    ValueError for labels or logits of other classes than the statistics'.
    """
    count, k = len(logits), len(statistics.classes)
    if logits.shape[1:] != (k,) or (y is not None and len(y) and not 0 <= y.min() <= y.max() < k):
        raise ValueError(f"logits {tuple(logits.shape)} or labels are not of {k} classes")
    if len(paths) != count:
        raise ValueError(f"{len(paths)} paths for {count} images")
    predicted = logits.argmax(1)
    verdict = {}
    if y is not None:
        loss = loss_of_label(logits, y)
        # On the training split this is what `pseudo_groups` says: one rule for every row.
        passes = loss > statistics.threshold[y]
        verdict = {
            "y": y,
            "loss": loss,
            "score": (loss - statistics.mean[y]) / statistics.std[y],
            "conflicting": (predicted != y) & (passes | statistics.by_error_set[y]),
        }
    return ScoreTable(
        classes=statistics.classes,
        path=np.array(list(paths), dtype=object),
        split=np.full(count, split, dtype=object),
        predicted=predicted.numpy(),
        probabilities=logits.double().softmax(1).numpy(),
        **{name: column.numpy() for name, column in verdict.items()},
    )


def joined(tables: Sequence[ScoreTable]) -> ScoreTable:
    """The rows of tables one after the other; all are of the same classes, labelled or none."""
    first = tables[0]
    columns = {
        name: np.concatenate([getattr(table, name) for table in tables])
        for name, value in vars(first).items()
        if name != "classes" and value is not None
    }
    return ScoreTable(classes=first.classes, **columns)


@contextlib.contextmanager
def rows_of_scores(path: Path) -> Iterator[Iterator[dict[str, str]]]:
    """The rows of a `scores.csv`, as text; ValueError where they, or what is made of them, fail."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            yield csv.DictReader(file)
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        why = f"{type(error).__name__}: {error}"  # its repr may hold the whole file
        raise ValueError(f"{path}: not a table of scores with labels ({why})") from None


def read_scores(path: str | Path, *, images: int | None = None) -> Scores:
    """The training rows of `scores.csv`; ValueError if it is none, or has none of them.

    images: of how many the table is, with those of other splits, where that is known: ValueError
    for another number of rows, which a table that was cut between two of them has.
    """
    path = Path(path)
    count, y, predicted, loss, score, conflicting = 0, [], [], [], [], []
    with rows_of_scores(path) as rows:
        # As they are read: rows as dictionaries take ten times what is kept of them.
        for row in rows:
            count += 1
            if row["split"] == "train":
                y.append(int(row["y"]))
                predicted.append(int(row["predicted"]))
                loss.append(float(row["loss"]))
                score.append(float(row["score"]))
                conflicting.append(row["pseudo_conflicting"] == "1")
        if not conflicting:
            raise KeyError("train")
        scores = Scores(*map(torch.tensor, (y, predicted, loss, score, conflicting)))
    if images is not None and count != images:
        raise ValueError(
            f"{path}: {count} rows, but the run has {images} images: cut short, or of others; "
            "restore it, or begin again with another --out"
        )
    return scores
