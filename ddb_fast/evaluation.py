"""`ddb-fast evaluate`: a run's classifiers on any labelled images, by class and by group."""

import logging
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddb_fast.classification import load_classifier
from ddb_fast.config import METHODS, DataConfig
from ddb_fast.data.groups import Groups, training_groups
from ddb_fast.data.listing import SPLITS, Entry, Listing, real_file
from ddb_fast.data.sources import open_listing
from ddb_fast.data.store import centre_square
from ddb_fast.data.unseen import Images, batches, list_images
from ddb_fast.methods import measure
from ddb_fast.metrics import group_table, merge_group_tables, summarise
from ddb_fast.provenance import FinishedRun
from ddb_fast.scoring import EVALUATION_BATCH, logits_of

logger = logging.getLogger(__name__)

ALIGNMENT = ("aligned_accuracy", "conflicting_accuracy")
"""Metrics that need to be told which bias goes with which class."""


def evaluate(
    run: FinishedRun,
    data: DataConfig,
    *,
    methods: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    splits: Sequence[str] = ("test",),
    corrupt: str = "error",
    device: torch.device,
) -> dict[str, Any]:
    """A run's classifiers on labelled images: results.json's form, with figures of each class.

    methods, seeds: all that are finished, unless given. What is aligned and what conflicts is as in
    the run's own training images; where these have no such bias labels, only what needs none of
    that is measured, and a warning says so. ValueError, one line, for everything a user can get
    wrong.
    """
    methods, seeds = _chosen(run, methods, seeds)
    networks = {}
    for method in methods:
        for seed in seeds:
            file = run.path / "classifiers" / method / f"seed{seed}" / "model.safetensors"
            network, config, classes = load_classifier(file)
            networks[method, seed] = network.to(device), config
    images = list_images(data, classes)
    if not images.labelled:
        raise ValueError(
            f"{images.name}: no labels, which accuracies need; `ddb-fast score` predicts"
        )
    entries: list[Entry] = []
    answers: dict[tuple[str, int], list[Tensor]] = {key: [] for key in networks}
    fitted = partial(centre_square, size=run.config.data.cache_size)
    for split in splits:
        for part, pixels in batches(
            images.split(split),
            fitted,
            size=EVALUATION_BATCH,
            corrupt=corrupt,
            title=f"evaluate {split}",
        ):
            entries += part
            for key, (network, config) in networks.items():
                logits = logits_of(network, pixels, config, device=device, crop=True)
                answers[key].append(logits.argmax(1) == _labels(part))
    if not entries:
        there = [split for split in SPLITS if images.split(split)]
        raise ValueError(
            f"{images.name}: no {' or '.join(splits)} images; it has {', '.join(there)}"
        )
    own = cache(partial(open_listing, run.config.data))  # once: it may be of 200,000 files
    if data != run.config.data:
        _warn_of_trained(run, own, images.name, entries)
    correct = {key: torch.cat(parts) for key, parts in answers.items()}
    measured = _measure(run, own, images, entries, classes, correct)
    return {
        "format": 1,
        "run": str(run.path),
        "dataset": images.name,
        "data": data.path,
        "preset": run.config.preset,
        "split": ", ".join(splits),
        "images": len(entries),
        "selection": run.config.selection,
        "seeds": list(seeds),
        "methods": {
            method: _merged([measured[method, seed] for seed in seeds], classes)
            for method in methods
        },
    }


def _chosen(
    run: FinishedRun, methods: Sequence[str] | None, seeds: Sequence[int] | None
) -> tuple[list[str], list[int]]:
    """The methods, in their usual order, and the seeds that all of them have."""
    found = run.classifiers
    if not found:
        raise ValueError(f"{run.path}: no finished classifier")
    for method in methods or ():
        if method not in found:
            raise ValueError(f"{run.path}: no classifier of {method}, only of {', '.join(found)}")
    chosen = [method for method in METHODS if method in (methods or found)]
    common = sorted(set.intersection(*(set(found[method]) for method in chosen)))
    for seed in common if seeds is None else seeds:
        if seed not in common:
            raise ValueError(
                f"{run.path}: not every one of {', '.join(chosen)} has seed {seed}; all have "
                f"{', '.join(map(str, common)) or 'none'}"
            )
    if not common:
        raise ValueError(f"{run.path}: no seed is common to {', '.join(chosen)}; give --methods")
    return chosen, sorted(set(common if seeds is None else seeds))


def _warn_of_trained(
    run: FinishedRun, own_images: Callable[[], Listing], name: str, entries: Sequence[Entry]
) -> None:
    """A warning where images that are not called train are files that the run was trained on.

    What is held out goes by the spelling of paths, so the same files in another table or folder are
    divided in another way. Where images came or went since, it is nearly those that the run would
    be trained on now: new ones move few old ones.
    """
    try:
        own = own_images()
    except (ValueError, OSError):
        return
    changed = own.fingerprint != run.fingerprint
    folders: dict[str, str] = {}
    files = [(e.split, e.pixels) for e in own.entries if isinstance(e.pixels, Path)]
    trained = {real_file(file, folders)[0] for split, file in files if split == "train"}
    files = [e.pixels for e in entries if e.split != "train" and isinstance(e.pixels, Path)]
    if count := sum(real_file(file, folders)[0] in trained for file in files):
        logger.warning(
            "%s: the run was %strained on %d of the %d images evaluated, so figures flatter; "
            "evaluate its own images without --data, or name the splits",
            name,
            "probably (its own images have changed) " if changed else "",
            count,
            len(entries),
        )


def _measure(
    run: FinishedRun,
    own_images: Callable[[], Listing],
    images: Images,
    entries: Sequence[Entry],
    classes: Sequence[str],
    correct: dict[tuple[str, int], Tensor],
) -> dict[tuple[str, int], dict[str, Any]]:
    y = _labels(entries)
    groups, train_counts, factors = _groups(run, own_images, images, entries, classes)
    by_class, whole = (_plain(labels, names) for labels, names in ((y, classes), (y * 0, ["all"])))
    clusters = None
    if len({len(entry.clusters) for entry in entries}) == 1 and entries[0].clusters:
        clusters = torch.tensor([entry.clusters for entry in entries]).T
    answer = {}
    for key, own in correct.items():
        answer[key] = measure(
            own, y, groups=groups, train_counts=train_counts, factors=factors, clusters=clusters
        )
        if groups is not None and train_counts is None:
            answer[key]["metrics"] |= dict.fromkeys(ALIGNMENT)
        answer[key]["classes"] = group_table(own, by_class) + group_table(own, whole)
    return answer


def _labels(entries: Sequence[Entry]) -> Tensor:
    return torch.tensor([entry.y for entry in entries])


def _plain(y: Tensor, classes: Sequence[str]) -> Groups:
    """Classes as groups of one bias, so that they are counted and measured as groups are."""
    none = torch.zeros_like(y)
    return Groups.from_labels(
        y, none, class_names=classes, bias_names=("",), aligned_bias=[0] * len(classes)
    )


def _groups(
    run: FinishedRun,
    own_images: Callable[[], Listing],
    images: Images,
    entries: Sequence[Entry],
    classes: Sequence[str],
) -> tuple[Groups | None, Tensor | None, tuple[tuple[str, int], ...]]:
    """Groups of these images aligned as the run's training images, whose counts come second.

    None, None without bias labels; no counts where the alignment is not known.
    """
    if images.biases is None:
        return None, None, ()
    y, a = _labels(entries), torch.tensor([entry.a for entry in entries])
    try:
        own = own_images()
    except (ValueError, OSError) as error:
        unknown = f"the run's own images: {error}"
    else:
        same = run.fingerprint == own.fingerprint
        if same and set(images.biases) <= set(own.biases or ()):
            number = torch.tensor([own.biases.index(name) for name in images.biases])
            trained = torch.tensor([split == "train" for split in own.split])
            training = training_groups(
                own.y[trained],
                own.a[trained],
                class_names=classes,
                bias_names=own.biases,
                aligned_bias=own.aligned_bias,
            )
            return training.with_labels(y, number[a]), training.counts, own.factors
        unknown = "the run's own images have " + (
            f"the bias labels {', '.join(own.biases or ()) or 'none'}" if same else "changed"
        )
    logger.warning(
        "%s: what is aligned and what conflicts is not known (%s); accuracies that need it are "
        "left out",
        images.name,
        unknown,
    )
    groups = Groups.from_labels(
        y, a, class_names=classes, bias_names=images.biases, aligned_bias=[0] * len(classes)
    )
    return groups, None, ()


def _merged(seeds: Sequence[dict[str, Any]], classes: Sequence[str]) -> dict[str, Any]:
    """What the seeds of a method got, as results.json has it, and the same of each class."""
    metrics = {
        name: summarise([one["metrics"][name] for one in seeds]) for name in seeds[0]["metrics"]
    }
    rows = merge_group_tables([one["classes"] for one in seeds])
    kept = ("n", "accuracy", "low", "high")
    return {
        "metrics": metrics,
        "groups": merge_group_tables([one["groups"] for one in seeds])
        if seeds[0]["groups"]
        else [],
        "classes": [
            {"name": name} | {key: row[key] for key in kept}
            for name, row in zip((*classes, "all"), rows, strict=True)
        ],
    }
