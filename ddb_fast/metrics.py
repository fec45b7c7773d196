"""What a classifier got right, by group: the figures of results.json and how sure they are.

Everything is a fraction of 1. An accuracy over no sample is undefined and stays NaN, never 0;
`group_table`, `merge_group_tables` and `summarise` return what JSON can hold and turn NaN to None.
"""

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean, stdev
from typing import Any

import torch
from torch import Tensor

from ddb_fast.data.groups import Groups

NAN = float("nan")
_Z_95 = NormalDist().inv_cdf(0.975)
_CELL_IMAGES = 10
"""Fewest images of a (class, texture cluster) cell that counts, as published."""


def _booleans(name: str, values: Tensor, size: int | None = None) -> Tensor:
    if values.dtype != torch.bool or values.ndim != 1:
        raise ValueError(f"{name} must be (N,) bool, got {tuple(values.shape)} {values.dtype}")
    if size is not None and len(values) != size:
        raise ValueError(f"{name} has {len(values)} entries for {size} samples")
    return values


def _mean(correct: Tensor) -> float:
    return correct.double().mean().item()


def group_accuracy(correct: Tensor, groups: Groups) -> Tensor:
    """Return the share of correct samples in each group, NaN for an empty one.

    correct: (N,) bool. Returns (num_groups,) float64. ValueError for another type or length.
    """
    _booleans("correct", correct, len(groups))
    hits = torch.bincount(groups.ids, weights=correct.double(), minlength=groups.num_groups)
    return hits / groups.counts


def accuracies(
    correct: Tensor, groups: Groups | None = None, *, train_counts: Tensor | None = None
) -> dict[str, float]:
    """Return the named accuracies of one classifier on one split.

    With acc_g the accuracy of group g and the sums over the groups that have samples here:

    - average_accuracy: correct samples / samples.
    - adjusted_average_accuracy: sum_g n_g acc_g / sum_g n_g, n_g from `train_counts`: the average
      the Waterbirds literature prints (Sagawa et al. 2020, section 5).
    - unbiased_accuracy: the mean of acc_g.
    - worst_group_accuracy: the smallest acc_g.
    - aligned_accuracy, conflicting_accuracy: correct / all among the bias-aligned, and among the
      bias-conflicting samples.

    correct: (N,) bool; train_counts: (num_groups,), the training split's `Groups.counts`. What
    needs bias labels, training counts or samples that are not there is NaN. ValueError for shapes
    that do not fit.
    """
    _booleans("correct", correct)
    result = {
        "average_accuracy": _mean(correct),
        "adjusted_average_accuracy": NAN,
        "unbiased_accuracy": NAN,
        "worst_group_accuracy": NAN,
        "aligned_accuracy": NAN,
        "conflicting_accuracy": NAN,
    }
    if groups is None or len(groups) == 0:
        return result
    present = groups.counts > 0
    accuracy = group_accuracy(correct, groups)[present]
    result["unbiased_accuracy"] = accuracy.mean().item()
    result["worst_group_accuracy"] = accuracy.min().item()
    result["aligned_accuracy"] = _mean(correct[groups.bias_aligned])
    result["conflicting_accuracy"] = _mean(correct[~groups.bias_aligned])
    if train_counts is not None:
        if train_counts.shape != (groups.num_groups,):
            raise ValueError(
                f"train_counts has shape {tuple(train_counts.shape)}, "
                f"expected ({groups.num_groups},)"
            )
        share = train_counts.to(accuracy)[present]
        result["adjusted_average_accuracy"] = ((share * accuracy).sum() / share.sum()).item()
    return result


def factor_gaps(
    correct: Tensor,
    groups: Groups,
    factors: Sequence[tuple[str, int]],
    *,
    train_counts: Tensor,
) -> dict[str, float]:
    """Return how far accuracy falls where one bias of two, or both, break with the class.

    factors: (name, number of values) of two attributes that make up a = first * n_second + second.
    A sample breaks with its class in a factor where its value is not that of the class's aligned
    attribute. With the adjusted average of `accuracies` as in-distribution accuracy,
    <name>_gap is that minus the accuracy of the samples that break in this factor alone, and
    both_gap that minus the accuracy of those that break in both: points of 1, positive = worse.

    correct: (N,) bool; train_counts: (num_groups,). NaN where no sample is of the kind. ValueError
    for other than two factors, ones that do not make the attribute, and as `accuracies`.
    Source: UrbanCars (Li et al. 2023, "A Whac-A-Mole Dilemma"), with the sign of DDB's tables.
    """
    if len(factors) != 2 or math.prod(size for _, size in factors) != groups.num_biases:
        raise ValueError(
            f"factors {tuple(factors)}: two are needed whose numbers multiply to the "
            f"{groups.num_biases} bias attributes"
        )
    (first, _), (second, size) = factors
    usual = groups.aligned_bias[groups.y]
    breaks = {
        first: groups.a // size != usual // size,
        second: groups.a % size != usual % size,
    }
    kinds = {
        first: breaks[first] & ~breaks[second],
        second: breaks[second] & ~breaks[first],
        "both": breaks[first] & breaks[second],
    }
    values = accuracies(correct, groups, train_counts=train_counts)
    within = values["adjusted_average_accuracy"]
    return {f"{name}_gap": within - _mean(correct[kind]) for name, kind in kinds.items()}


def texture_unbiased_accuracy(correct: Tensor, y: Tensor, clusters: Tensor) -> float:
    """Return the mean accuracy over (class, cluster) cells, averaged over several clusterings.

    Cells with fewer than 10 images do not count. correct: (N,) bool; y: (N,) classes; clusters:
    (R, N), each sample's cluster in each of R clusterings, all integers from 0 on. NaN where a
    clustering has no cell of 10. ValueError for other shapes, types and negative numbers.
    Source: ReBias (Bahng et al. 2020), "unbiased" accuracy on ImageNet-9.
    """
    _booleans("correct", correct, len(y))
    if clusters.ndim != 2 or clusters.shape[1] != len(y) or len(clusters) == 0:
        raise ValueError(f"clusters has shape {tuple(clusters.shape)}, expected (R, {len(y)})")
    for name, labels in (("y", y), ("clusters", clusters)):
        if labels.is_floating_point() or labels.dtype == torch.bool or (labels < 0).any():
            raise ValueError(f"{name} must hold integers from 0 on, got {labels.dtype}")
    averages = []
    for cluster in clusters:
        _, cell = torch.stack([y, cluster]).unique(dim=1, return_inverse=True)
        counts = torch.bincount(cell)
        hits = torch.bincount(cell, weights=correct.double())
        averages.append(_mean((hits / counts)[counts >= _CELL_IMAGES]))
    return fmean(averages)


def wilson_interval(successes: float, n: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a proportion, NaN and NaN for n = 0.

    successes may be fractional (a mean over seeds). ValueError unless 0 <= successes <= n.
    Source: Wilson 1927, without continuity correction.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes among {n}")
    if n == 0:
        return NAN, NAN
    share, z2 = successes / n, _Z_95**2
    centre = share + z2 / (2 * n)
    half = _Z_95 * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    scale = 1 + z2 / n
    # Exactly 0 and 1 at the ends, where rounding would leave the share outside of its interval.
    low = 0.0 if successes == 0 else (centre - half) / scale
    high = 1.0 if successes == n else (centre + half) / scale
    return low, high


def null(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else float(value)


def group_table(correct: Tensor, groups: Groups) -> list[dict[str, Any]]:
    """Return one row a group: name, y, a, n, accuracy and its 95 % interval low..high.

    correct: (N,) bool. Accuracy, low and high are None for an empty group. ValueError as
    `group_accuracy`.
    """
    accuracy = group_accuracy(correct, groups).tolist()
    columns = (groups.names, groups.y_of.tolist(), groups.a_of.tolist(), groups.counts.tolist())
    rows = []
    for g, (name, y, a, n) in enumerate(zip(*columns, strict=True)):
        low, high = wilson_interval(accuracy[g] * n if n else 0, n)
        rows.append(
            {
                "name": name,
                "y": y,
                "a": a,
                "n": n,
                "accuracy": null(accuracy[g]),
                "low": null(low),
                "high": null(high),
            }
        )
    return rows


def merge_group_tables(tables: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Join the tables of several seeds on one split: accuracy becomes a list, a value per seed.

    The interval is that of the mean accuracy with the n of one seed: the seeds see the same images,
    so they say nothing about other images. ValueError for no table or tables of other groups.
    """
    keys = ("name", "y", "a", "n")
    if not tables or any(
        [[row[k] for k in keys] for row in table] != [[row[k] for k in keys] for row in tables[0]]
        for table in tables
    ):
        raise ValueError(f"{len(tables)} group tables that are not of the same groups")
    merged = []
    for rows in zip(*tables, strict=True):
        values = [row["accuracy"] for row in rows]
        n = rows[0]["n"]
        low, high = wilson_interval(fmean(values) * n if n else 0, n)
        seeds = {"accuracy": values, "low": null(low), "high": null(high)}
        merged.append({k: rows[0][k] for k in keys} | seeds)
    return merged


def summarise(values: Sequence[float | None]) -> dict[str, Any]:
    """Return {"mean", "std", "seeds"} of one metric over seeds, undefined values as None.

    std has ddof 1 and is None for one seed. Where a seed is undefined, so are mean and std: a mean
    over fewer seeds would look like one over all. ValueError for no value.
    """
    if len(values) == 0:
        raise ValueError("no seed to summarise")
    seeds = [null(value) for value in values]
    defined = [value for value in seeds if value is not None]
    complete = len(defined) == len(seeds)
    return {
        "mean": fmean(defined) if complete else None,
        "std": stdev(defined) if complete and len(defined) > 1 else None,
        "seeds": seeds,
    }


def auroc(score: Tensor, positive: Tensor) -> float:
    """Return the chance that a positive scores above a negative, a tie counting one half.

    score: (N,), higher = more positive; positive: (N,) bool. NaN where one class is missing.
    ValueError for other shapes or types and for scores that are not finite.
    """
    _booleans("positive", positive, len(score))
    if positive.all() or not positive.any():
        return NAN
    from sklearn.metrics import roc_auc_score  # a second to import, and most need none of it

    return float(roc_auc_score(positive.cpu().numpy(), score.detach().double().cpu().numpy()))


def average_precision(score: Tensor, positive: Tensor) -> float:
    """Return sum_k (recall_k - recall_(k-1)) precision_k over the distinct scores, descending.

    Equal scores form one step, so their order does not matter. Shapes, NaN and errors as `auroc`.
    """
    _booleans("positive", positive, len(score))
    if positive.all() or not positive.any():
        return NAN
    from sklearn.metrics import average_precision_score

    return float(
        average_precision_score(positive.cpu().numpy(), score.detach().double().cpu().numpy())
    )


def precision_recall(predicted: Tensor, actual: Tensor) -> tuple[float, float]:
    """Return precision and recall of a yes/no prediction, NaN where undefined.

    predicted, actual: (N,) bool. ValueError for other types or lengths.
    """
    _booleans("predicted", predicted)
    _booleans("actual", actual, len(predicted))
    # The mean over no sample is the NaN that is wanted.
    return _mean(actual[predicted]), _mean(predicted[actual])
