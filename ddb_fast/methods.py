"""The methods that are compared: how each trains a classifier, and how all are evaluated.

Every method of a seed has the same network, the same first weights and the same number of images.
"""

import csv
import io
import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddb_fast import checkpoint
from ddb_fast.classification import (
    features_of,
    first_network,
    load_classifier,
    save_classifier,
    train_classifier,
)
from ddb_fast.config import ClassifierConfig
from ddb_fast.context import Context
from ddb_fast.data.groups import Groups
from ddb_fast.data.samplers import GroupBalancedSampler, Lookup, ShuffledSampler
from ddb_fast.engine import Sampler, Selection, step_seed
from ddb_fast.metrics import (
    accuracies,
    factor_gaps,
    group_table,
    texture_unbiased_accuracy,
)
from ddb_fast.models.classifiers import linear_head
from ddb_fast.models.pair import NetworkPair
from ddb_fast.recipes import (
    ERM,
    GroupDRO,
    LfF,
    ReweightedLoss,
    conflicting_groups,
    predicted_groups,
    repeated_errors,
    reweighted_last_layer,
)
from ddb_fast.scoring import Scores, logits_of

logger = logging.getLogger(__name__)


def build_method(
    context: Context, method: str, seed: int, *, scores: Scores | None, folder: Path
) -> tuple[nn.Module, Sampler]:
    """The loss and the sampler that make a method; `scores` is needed by the amplified ones.

    folder: of this method and seed, where jtt finds its error set.
    """
    config, train = context.config, context.data.splits["train"]
    classes = len(context.data.classes)
    if method == "erm":
        return ERM(), ShuffledSampler(len(train), seed=seed)
    if method == "lff":
        rule = config.lff
        recipe = LfF(train.y, classes, q=rule.q, moving_average=rule.moving_average)
        return recipe, ShuffledSampler(len(train), seed=seed)
    if method == "jtt":
        positions = repeated_errors(read_errors(folder), upweight=config.jtt.upweight)
        return ERM(), Lookup(ShuffledSampler(len(positions), seed=seed), positions)
    if method in ("ddb-ii", "real-amplifier-ii"):
        rule = config.reweighting
        recipe = ReweightedLoss(
            scores.loss,
            train.y,
            moving_average=rule.moving_average,
            class_maximum=rule.class_maximum,
        )
        return recipe, ShuffledSampler(len(train), seed=seed)
    if method == "group-dro":
        groups = context.data.groups("train")
        ids, num_groups = groups.ids, groups.num_groups
    elif method == "ddb-i-predicted" or (
        method in ("ddb-i", "real-amplifier-i")
        and config.pseudo_labels.pseudo_groups == "predicted"
    ):
        ids, num_groups = predicted_groups(scores.predicted, train.y, classes), classes**2
    elif method in ("ddb-i", "ddb-i-error-set", "real-amplifier-i"):
        wrong = scores.predicted != train.y
        conflicting = wrong if method == "ddb-i-error-set" else scores.conflicting
        ids, num_groups = conflicting_groups(conflicting, train.y), 2 * classes
    else:
        raise ValueError(f"no loss and sampler make the method {method!r}")
    recipe = GroupDRO(
        ids,
        num_groups,
        step_size=config.group_dro.step_size,
        adjustment=config.group_dro.adjustment,
    )
    return recipe, GroupBalancedSampler(ids, num_groups=num_groups, seed=seed)


def first_networks(
    config: ClassifierConfig, num_classes: int, method: str, seed: int
) -> tuple[nn.Module, nn.Module]:
    """A method's classifier before training, and what is trained: itself, or lff's pair with it."""
    network = first_network(config, num_classes, seed=seed)
    if method != "lff":
        return network, network
    biased = first_network(config, num_classes, seed=step_seed(seed, "lff", "biased"))
    return network, NetworkPair(biased=biased, debiased=network)


def train_method(
    context: Context, method: str, seed: int, folder: Path, resume: Path, scores: Scores | None
) -> float:
    """Train and evaluate one method with one seed; write its model and metrics; return seconds."""
    config, data = context.config.classifier, context.data
    train, classes = data.splits["train"], len(data.classes)
    recipe, sampler = build_method(context, method, seed, scores=scores, folder=folder)
    network, trained = first_networks(config, classes, method, seed)
    selection = None
    if context.config.selection != "last":

        def score(_: nn.Module) -> dict[str, float]:
            metrics = evaluate(context, network, config, "val")["metrics"]
            return {name: math.nan if v is None else v for name, v in metrics.items()}

        selection = Selection(score, by=context.config.selection, times=context.config.looks)
    seconds = train_classifier(
        context,
        trained,
        config,
        train.large,
        train.y,
        recipe=recipe,
        sampler=sampler,
        stage=f"{method} seed {seed}",
        seed=seed,
        resume=resume,
        clipped=tuple(trained.children()) if method == "lff" else (),
        selection=selection,
    )
    if context.accelerator.is_main_process:
        chosen = {} if selection is None else {"images": selection.images}
        save_and_evaluate(context, method, seed, network, folder, **chosen)
        if selection is not None:
            rows = [to_null(row) for row in selection.curve]
            text = json.dumps({"by": context.config.selection, "curve": rows}, indent=2)
            checkpoint.write_atomically(folder / "selection.json", text + "\n")
    return seconds


def save_and_evaluate(
    context: Context, method: str, seed: int, network: nn.Module, folder: Path, **chosen: float
) -> None:
    """Write a method's classifier and its metrics on what there is of test and validation.

    chosen: what the method itself chose, noted beside the metrics.
    """
    config, data = context.config.classifier, context.data
    save_classifier(folder / "model.safetensors", network, config, data.classes)
    results = {
        name: evaluate(context, network, config, name)
        for name in ("test", "val")
        if len(data.splits.get(name, ()))
    }
    text = json.dumps({"method": method, "seed": seed, **chosen, **results}, indent=2)
    checkpoint.write_atomically(folder / "metrics.json", text + "\n")


def evaluate(
    context: Context, network: nn.Module, config: ClassifierConfig, split: str
) -> dict[str, Any]:
    """Metrics and group table of a classifier on one split; {"metrics", "groups"}."""
    data = context.data
    images, train_groups = data.splits[split], data.groups("train")
    logits = logits_of(network, images.large, config, device=context.device, crop=True)
    return measure(
        logits.argmax(1) == images.y,
        images.y,
        groups=data.groups(split),
        train_counts=None if train_groups is None else train_groups.counts,
        factors=data.factors,
        clusters=images.clusters,
    )


def measure(
    correct: Tensor,
    y: Tensor,
    *,
    groups: Groups | None = None,
    train_counts: Tensor | None = None,
    factors: Sequence[tuple[str, int]] = (),
    clusters: Tensor | None = None,
) -> dict[str, Any]:
    """Every metric that the labels allow, and the group table; {"metrics", "groups"}.

    correct: (N,) bool; y: (N,). train_counts: as `metrics.accuracies`; factors and clusters as
    ImageData and Split have them.
    """
    values, table = accuracies(correct, groups, train_counts=train_counts), []
    if groups is not None:
        table = group_table(correct, groups)
        if factors:
            values |= factor_gaps(correct, groups, factors, train_counts=train_counts)
    if clusters is not None:
        values["texture_unbiased_accuracy"] = texture_unbiased_accuracy(correct, y, clusters)
    return {"metrics": to_null(values), "groups": table}


def to_null(values: dict[str, float]) -> dict[str, float | None]:
    """NaN as None, which JSON can hold."""
    return {name: None if math.isnan(value) else value for name, value in values.items()}


# --- jtt ---------------------------------------------------------------------------------------


def identify_errors(context: Context, seed: int, folder: Path, resume: Path) -> float:
    """Train JTT's first network, stopped early, and write which images it gets wrong; seconds.

    It is trained as erm of the same seed is, up to `jtt.first_share` of the images (rates as over
    all of them); its verdict is taken in eval mode, without augmentation. One process gives it, so
    that all have the same.
    """
    config, data = context.config.classifier, context.data
    train = data.splits["train"]
    network = first_network(config, len(data.classes), seed=seed)
    seconds = train_classifier(
        context,
        network,
        config,
        train.large,
        train.y,
        recipe=ERM(),
        sampler=ShuffledSampler(len(train), seed=seed),
        stage=f"jtt identification seed {seed}",
        seed=seed,
        resume=resume,
        stop_at=math.ceil(config.images * context.config.jtt.first_share),
    )
    if not context.accelerator.is_main_process:
        return seconds
    save_classifier(folder / "identification.safetensors", network, config, data.classes)
    logits = logits_of(network, train.large, config, device=context.device, crop=True)
    predicted = logits.argmax(1)
    error = predicted != train.y
    if not error.any():
        logger.warning("jtt seed %d: no training image is an error; it will equal erm", seed)
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(("path", "y", "predicted", "error"))
    columns = (train.y, predicted, error.int())
    writer.writerows(zip(train.paths, *(c.tolist() for c in columns), strict=True))
    checkpoint.write_atomically(folder / "error_set.csv", text.getvalue())
    return seconds


def read_errors(folder: Path) -> Tensor:
    """What JTT's first network gets wrong, (N,) bool in the order of the training images."""
    with (folder / "error_set.csv").open(newline="", encoding="utf-8") as file:
        return torch.tensor([row["error"] == "1" for row in csv.DictReader(file)])


# --- dfr ---------------------------------------------------------------------------------------


def retrain_last_layer(context: Context, seed: int, erm: Path, folder: Path) -> None:
    """Replace the last layer of erm's network by DFR's, evaluate and write it; one process does.

    erm: folder of erm with this seed. The layer is trained on the validation split, so the metrics
    on that split are of images it has seen.
    """
    if not context.accelerator.is_main_process:
        return
    data, rule = context.data, context.config.dfr
    network, config, _ = load_classifier(erm / "model.safetensors")
    network.to(context.device)
    val = data.splits["val"]
    layer = reweighted_last_layer(
        features_of(network, val.large, config, device=context.device),
        val.y,
        data.groups("val").ids,
        len(data.classes),
        inverse_strengths=rule.inverse_strengths,
        draws=rule.draws,
        seed=seed,
    )
    head = linear_head(network)
    with torch.no_grad():
        head.weight.copy_(layer.weight)
        head.bias.copy_(layer.bias)
    strength = layer.inverse_strength
    save_and_evaluate(context, "dfr", seed, network, folder, inverse_strength=strength)
