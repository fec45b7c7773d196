"""Recipe I of Diffusing DeBias, first half: pseudo groups from one verdict of the amplifier.

The amplifier has learnt the shortcut and nothing else, so the images it gets wrong are the ones
that the shortcut does not explain.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

StatsOver = Literal["all", "correct", "wrong"]
Filter = Literal["threshold", "none"]

STD_FLOOR = 1e-6
"""Nats; about what rounding does to a float32 cross-entropy, so a smaller spread means nothing."""


@dataclass(frozen=True, eq=False)
class PseudoGroups:
    """What the amplifier's losses say of each of N training images, in K classes.

    conflicting: (N,) bool, the pseudo bias label. score: (N,) float64, (loss - mean_y) / std_y,
    higher = more conflicting. threshold, mean, std: (K,) float64, nats, NaN for a class without
    images. fallback_classes: where nothing passed the threshold and the class's error set was taken
    instead.
    """

    conflicting: Tensor
    score: Tensor
    threshold: Tensor
    mean: Tensor
    std: Tensor
    fallback_classes: tuple[int, ...]


def _check(loss: Tensor, predicted: Tensor, y: Tensor, num_classes: int) -> None:
    if y.ndim != 1 or not loss.shape == predicted.shape == y.shape:
        shapes = [tuple(x.shape) for x in (loss, predicted, y)]
        raise ValueError(f"loss, predicted and y must be (N,), got {shapes}")
    invalid = loss[~loss.isfinite()]
    if len(invalid) > 0:
        raise ValueError(f"loss has {len(invalid)} values like {invalid[0]}")
    _check_classes("y", y, num_classes)
    _check_classes("predicted", predicted, num_classes)


def _check_classes(name: str, labels: Tensor, num_classes: int) -> None:
    outside = labels[(labels < 0) | (labels >= num_classes)]
    if len(outside) > 0:
        raise ValueError(f"{name} outside 0..{num_classes - 1}: {outside[0]}")


def pseudo_groups(
    loss: Tensor,
    predicted: Tensor,
    y: Tensor,
    num_classes: int,
    *,
    gamma: float = 3.0,
    stats_over: StatsOver = "correct",
    filter: Filter = "threshold",
) -> PseudoGroups:
    """Call conflicting what the amplifier misclassifies with a loss > mean_y + gamma * std_y.

    Mean and standard deviation (ddof 0) of class y are taken over those of its images that
    `stats_over` names: all, the correctly classified or the wrongly classified ones. Fewer than two
    such images have no spread; then all images of the class are used. std is at least STD_FLOOR.
    A class in which nothing passes takes all its misclassified images, its error set; if that is
    empty too, it has no conflicting image. filter="none" takes the error set everywhere.

    loss: (N,), finite, nats; predicted, y: (N,) int64. ValueError for other shapes, labels outside
    0..num_classes-1, a gamma that is not finite or an unknown choice.
    Source: Ciranni et al. 2025 (arXiv 2502.09564), Recipe I and its error-set ablation.
    """
    _check(loss, predicted, y, num_classes)
    if not math.isfinite(gamma):
        raise ValueError(f"gamma must be finite, got {gamma}")
    if stats_over not in get_args(StatsOver):
        raise ValueError(f"stats_over must be one of {get_args(StatsOver)}, got {stats_over!r}")
    if filter not in get_args(Filter):
        raise ValueError(f"filter must be one of {get_args(Filter)}, got {filter!r}")
    loss = loss.double()
    wrong = predicted != y
    chosen = {"all": torch.ones_like(wrong), "correct": ~wrong, "wrong": wrong}[stats_over]
    mean = loss.new_full((num_classes,), float("nan"))
    std = mean.clone()
    for n in range(num_classes):
        of_class = y == n
        values = loss[of_class & chosen]
        if len(values) < 2:
            values = loss[of_class]
        if len(values) > 0:
            mean[n] = values.mean()
            std[n] = values.std(correction=0).clamp_min(STD_FLOOR)
    threshold = mean + gamma * std
    conflicting = wrong if filter == "none" else wrong & (loss > threshold[y])
    errors = torch.bincount(y[wrong], minlength=num_classes)
    passed = torch.bincount(y[conflicting], minlength=num_classes)
    fallback = (errors > 0) & (passed == 0)
    return PseudoGroups(
        conflicting=conflicting | (wrong & fallback[y]),
        score=(loss - mean[y]) / std[y],
        threshold=threshold,
        mean=mean,
        std=std,
        fallback_classes=tuple(fallback.nonzero().flatten().tolist()),
    )


def conflicting_groups(conflicting: Tensor, y: Tensor) -> Tensor:
    """Return the paper's groups (class, pseudo label) as ids y * 2 + conflicting, (N,) int64.

    conflicting: (N,) bool, or 0 and 1; y: (N,) int64. ValueError for another length or other
    pseudo labels, which the two in the wrong order give.
    """
    if y.shape != conflicting.shape:
        raise ValueError(f"y {tuple(y.shape)} for {tuple(conflicting.shape)} pseudo labels")
    if ((conflicting != 0) & (conflicting != 1)).any():
        raise ValueError(f"pseudo labels are 0 or 1, got {conflicting.max()}; they come before y")
    return y * 2 + conflicting


def predicted_groups(predicted: Tensor, y: Tensor, num_classes: int) -> Tensor:
    """Return the groups (class, predicted class) as ids y * num_classes + predicted, (N,) int64.

    Beyond the paper: with more than two classes the class that the amplifier predicts is itself a
    guess of the bias attribute. predicted, y: (N,) int64. ValueError for labels outside their range
    or different shapes.
    """
    if predicted.shape != y.shape:
        raise ValueError(f"predicted {tuple(predicted.shape)} and y {tuple(y.shape)} differ")
    _check_classes("y", y, num_classes)
    _check_classes("predicted", predicted, num_classes)
    return y * num_classes + predicted
