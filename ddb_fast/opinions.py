"""What is trained for the verdict: a second amplifier, and networks on parts of the real images.

All have the amplifier's network and length, and first weights of their own. What each says of the
real training images is kept in `audit/predictions.safetensors`; `ddb_fast.verdict` judges. Beside
it `audit/at_odds.csv` lists the images at odds.
"""

import csv
import io
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ddb_fast import checkpoint
from ddb_fast.classification import first_network, train_classifier
from ddb_fast.context import Context
from ddb_fast.data.samplers import Lookup, ShuffledSampler
from ddb_fast.engine import Sampler
from ddb_fast.recipes import ERM
from ddb_fast.scoring import logits_of, read_scores
from ddb_fast.verdict import agreed, at_odds, standing

logger = logging.getLogger(__name__)

FOLDS = 4
AT_ODDS = ("index", "path", "y", "predicted", "standing")
"""Columns of `audit/at_odds.csv`."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Opinions:
    """What networks say of the N real training images, each (N,).

    amplifier, again: int64, classes that the run's amplifier names and one of other first weights
    and order, both trained on the synthetic images; erm: int64, classes that networks trained on
    real images name, each image judged by one that has not seen it. standing: fp32 in 0..1, where
    an image at odds stands (`ddb_fast.verdict.standing`) with such networks that met images at odds
    as often as the others of their class; gain: fp32, by how much that is higher than with erm.
    Both are NaN for other images.
    """

    amplifier: Tensor
    again: Tensor
    erm: Tensor
    standing: Tensor
    gain: Tensor


def folds(y: Tensor, seed: int) -> Tensor:
    """Parts of the training images, (N,) int64 of 0..FOLDS-1, every class dealt out evenly."""
    rank = torch.from_numpy(np.random.Philox(key=seed).random_raw(len(y)).astype(np.float64))
    shuffled = rank.argsort(stable=True)
    fold = torch.empty_like(y)
    fold[shuffled[y[shuffled].argsort(stable=True)]] = torch.arange(len(y)) % FOLDS
    return fold


def halves(odd: Tensor, y: Tensor) -> Tensor:
    """Positions, (2 N,) int64: of a class of n images, n at odds and n of its others.

    odd: (N,) bool, y: (N,). So the classes are as frequent as before, and an image at odds is met
    as often as the others of its class together divided by those at odds. A class that has only
    one kind has that twice.
    """
    positions = []
    for label in y.unique():
        members = y == label
        count = int(members.sum())
        for kind in (members & odd, members & ~odd):
            found = (kind if kind.any() else members).nonzero()[:, 0]
            positions.append(found.repeat(-(-count // len(found)))[:count])
    return torch.cat(positions)


def gather_opinions(
    context: Context, *, synthetic: Path, amplifier: Path, folder: Path, parts: Path
) -> None:
    """Train what the verdict needs and write `folder/predictions.safetensors`; resumable.

    synthetic, amplifier: the run's folders; what the amplifier says is in its scores. parts: where
    each other network's answers are kept meanwhile.
    """
    config, accelerator, data = context.config, context.accelerator, context.data
    train, classes, y = data.splits["train"], len(data.classes), data.splits["train"].y

    def kept(
        name: str,
        asked: Callable[[], nn.Module],
        rows: Tensor,
        said_of: Callable[[Tensor], dict[str, Tensor]],
    ) -> dict[str, Tensor]:
        """`said_of` the logits of training images `rows`; all processes read what one wrote."""
        path = parts / f"{name}.safetensors"
        accelerator.wait_for_everyone()
        there = path.exists()
        accelerator.wait_for_everyone()  # nobody writes before all have looked
        if not there:
            network = asked()
            if accelerator.is_main_process:
                logits = logits_of(
                    network,
                    train.small,
                    config.amplifier,
                    device=context.device,
                    crop=False,
                    rows=rows,
                )
                checkpoint.save_tensors(path, said_of(logits), {})
            accelerator.wait_for_everyone()
        return checkpoint.load_tensors(path)[0]

    def trained(name: str, images: Tensor, y: Tensor, sampler: Sampler, seed: int) -> nn.Module:
        network = first_network(config.amplifier, classes, seed=seed)
        train_classifier(
            context,
            network,
            config.amplifier,
            images,
            y,
            whole=True,
            recipe=ERM(),
            sampler=sampler,
            stage=f"verdict, {name}",
            seed=seed,
            resume=parts / f"{name}.checkpoint.safetensors",
        )
        return network

    def another() -> nn.Module:
        tensors, _ = checkpoint.load_tensors(synthetic / "images.safetensors")
        images, labels = tensors["images"].permute(0, 2, 3, 1).contiguous(), tensors["labels"]
        # The amplifier's own seed is the run's. Networks from the same first weights agree more.
        seed = config.seed + 1
        return trained("again", images, labels, ShuffledSampler(len(labels), seed=seed), seed)

    again = kept("again", another, torch.arange(len(y)), lambda x: {"predicted": x.argmax(1)})
    said = {
        "amplifier": read_scores(amplifier / "scores.csv").predicted,
        "again": again["predicted"],
        "erm": torch.empty_like(y),
        "standing": torch.full(y.shape, torch.nan),
        "gain": torch.full(y.shape, torch.nan),
    }
    taken = agreed(said["amplifier"], said["again"])
    odd = at_odds(y, taken)

    def judged(name: str, positions: Tensor, seed: int, rows: Tensor) -> dict[str, Tensor]:
        sampler = Lookup(ShuffledSampler(len(positions), seed=seed), positions)

        def said_of(logits: Tensor) -> dict[str, Tensor]:
            stand = standing(logits, y[rows], taken[rows])
            return {"predicted": logits.argmax(1), "standing": stand}

        return kept(name, lambda: trained(name, train.small, y, sampler, seed), rows, said_of)

    fold = folds(y, config.seed)
    for part in fold.unique().tolist():
        rows, others = (fold == part).nonzero()[:, 0], (fold != part).nonzero()[:, 0]
        seed = config.seed + 2 + part
        erm = judged(f"erm {part}", others, seed, rows)
        said["erm"][rows] = erm["predicted"]
        if not odd[rows].any():
            continue
        # From the same first weights: what differs is how often images at odds are met.
        positions = others[halves(odd[others], y[others])]
        stand = judged(f"rebalanced {part}", positions, seed, rows)["standing"]
        said["standing"][rows] = stand.float()
        said["gain"][rows] = (stand - erm["standing"]).float()
    if accelerator.is_main_process:
        checkpoint.save_tensors(folder / "predictions.safetensors", said, {})
        checkpoint.write_atomically(folder / "at_odds.csv", at_odds_table(said, y, train.paths))


def at_odds_table(said: Mapping[str, Tensor], y: Tensor, paths: Sequence[str]) -> str:
    """The images at odds as CSV: where they lie, their class, the one they look like, and standing.

    Those whose own class shows least come first: they are the likeliest to be mislabelled.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(AT_ODDS)
    found = (~said["standing"].isnan()).nonzero()[:, 0]
    for index in found[said["standing"][found].argsort(stable=True)].tolist():
        stand = f"{said['standing'][index]:.4f}"
        writer.writerow((index, paths[index], int(y[index]), int(said["amplifier"][index]), stand))
    return text.getvalue()


def read_opinions(folder: Path) -> Opinions | None:
    """What `gather_opinions` wrote; None, and a warning, where an older version did."""
    path = folder / "predictions.safetensors"
    said, _ = checkpoint.load_tensors(path)
    if "standing" not in said:
        logger.warning(
            "%s: of an older version, no verdict; a run with another --out has one", path
        )
        return None
    return Opinions(**said)
