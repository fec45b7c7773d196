"""What studies share: a run's configuration and data, what they judge, the rows they write."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F

from ddb_fast.config import RunConfig
from ddb_fast.context import Context
from ddb_fast.data.store import ImageData
from ddb_fast.metrics import auroc, precision_recall, wilson_interval
from ddb_fast.pipeline import read_data
from ddb_fast.provenance import FinishedRun
from ddb_fast.recipes import pseudo_groups
from ddb_fast.scoring import logits_of
from ddb_fast.trackers import RunLog
from ddb_fast.train import choose_precision


def start(threads: int) -> Accelerator:
    """An Accelerator in the precision that a run takes on this machine, with so many threads."""
    torch.set_num_threads(threads)
    cuda = torch.cuda.is_available()
    precision, _ = choose_precision("auto", exported=None, cuda=cuda)
    return Accelerator(mixed_precision=precision)


def open_run(run: Path, accelerator: Accelerator) -> Context:
    """What the stages of the run in this folder were given, its decoded images among it.

    Only the cache of decoded images is written, where it is gone. ValueError if it is no run or its
    data has changed.
    """
    return open_context(replace(FinishedRun.open(run).config, out=str(run)), accelerator)


def open_context(config: RunConfig, accelerator: Accelerator) -> Context:
    """What the stages of a run of this configuration are given; decoded images go to `out`."""
    config = replace(config, progress=False)
    data = read_data(config, Path(config.out))
    return Context(config=config, accelerator=accelerator, data=data, log=RunLog(accelerator, None))


def aligned_share(data: ImageData, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Share of bias-aligned images, read off the pixels by `bias_of`; its 95 % Wilson interval."""
    a = data.bias_of(images)
    aligned = int(data.groups("train").with_labels(labels, a).bias_aligned.sum())
    low, high = wilson_interval(aligned, len(labels))
    return {"aligned_share": aligned / len(labels), "low": low, "high": high}


def judge_amplifier(
    context: Context, network: nn.Module, chosen: Tensor | None = None
) -> dict[str, float]:
    """AUROC, precision and recall of an amplifier's pseudo labels of training images; NaN if none.

    chosen: numbers of the images; all without. The bias labels are compared with, never used.
    ValueError for data without.
    """
    data, rules = context.data, context.config.pseudo_labels
    train, groups = data.splits["train"], data.groups("train")
    if groups is None:
        raise ValueError(f"{data.name} has no bias labels to compare with")
    chosen = torch.arange(len(train)) if chosen is None else chosen
    images, labels = train.small[chosen], train.y[chosen]
    conflicting, config = ~groups.bias_aligned[chosen], context.config.amplifier
    logits = logits_of(network, images, config, device=context.device, crop=False)
    verdict = pseudo_groups(
        F.cross_entropy(logits.double(), labels, reduction="none"),
        logits.argmax(1),
        labels,
        len(data.classes),
        gamma=rules.gamma,
        stats_over=rules.stats_over,
        filter=rules.filter,
    )
    precision, recall = precision_recall(verdict.conflicting, conflicting)
    correct = logits.argmax(1) == labels
    return {
        "auroc": auroc(verdict.score, conflicting),
        "precision": precision,
        "recall": recall,
        "conflicting_accuracy": correct[conflicting].double().mean().item(),
    }


def write_rows(path: Path, rows: list[dict]) -> None:
    """Write all rows measured so far as JSON, one a line, so that a diff shows what changed."""
    lines = ",\n".join(json.dumps(row) for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"[\n{lines}\n]\n", "utf-8")


def read_rows(path: Path) -> list[dict]:
    """Rows that an earlier call wrote; none where there is no file."""
    return json.loads(path.read_text("utf-8")) if path.exists() else []
