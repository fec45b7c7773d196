"""Deep Feature Reweighting: a new last layer, from held-out images in which the groups balance.

The features of a network that learnt the shortcut hold what is needed without it; only the last
layer, which relies on the shortcut, is trained again.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class LastLayer:
    """Weight (K, D) and bias (K,), float32, of K classes on raw features, and the C chosen."""

    weight: Tensor
    bias: Tensor
    inverse_strength: float


def reweighted_last_layer(
    features: Tensor,
    y: Tensor,
    groups: Tensor,
    num_classes: int,
    *,
    inverse_strengths: Sequence[float],
    draws: int = 10,
    seed: int = 0,
) -> LastLayer:
    """Fit a last layer by L1 logistic regression to group-balanced draws; average it over draws.

    A draw takes from every group as many images as the smallest one that is not empty has, without
    replacement, and standardises features by their mean and deviation within the draw. C is the
    first of `inverse_strengths` with the best worst-group accuracy on one half of the images after
    a draw from the other; each group is halved by chance, an odd image goes to the half that
    trains. Then every draw is from all images. More than two classes: one against the rest, as
    liblinear did for the authors; the largest logit decides, their softmax is no probability.

    features: (N, D) finite; y: (N,) int64 in 0..num_classes-1, every class there; groups: (N,)
    int64, the group of each image. A function of its arguments. ValueError for other shapes, fewer
    than two classes, a class without images, or no strength or draw.
    Source: Kirichenko et al. 2023, "Last Layer Re-Training is Sufficient for Robustness to Spurious
    Correlations", DFR on validation data, and its authors' code, which halves all images at once
    and standardises by statistics of the training images.
    """
    _check(features, y, groups, num_classes)
    if not inverse_strengths or min(inverse_strengths) <= 0 or draws < 1:
        raise ValueError(f"inverse_strengths {inverse_strengths} and draws {draws} must be > 0")
    x, labels, ids = features.double().cpu().numpy(), y.cpu().numpy(), groups.cpu().numpy()

    def layer(members: np.ndarray, strength: float) -> tuple[np.ndarray, np.ndarray]:
        return _fit(x[members], labels[members], num_classes, strength=strength, seed=seed)

    strength = inverse_strengths[0]
    if len(inverse_strengths) > 1:
        order = _permutation(len(x), seed=seed, stream=0)
        rank, counts = _ranks(ids, order)
        training = rank < (counts[ids] + 1) // 2
        training_half, other = order[training[order]], order[~training[order]]
        members = training_half[_balanced(ids[training_half])]
        accuracies = [
            _worst_group_accuracy(layer(members, c), x[other], labels[other], ids[other])
            for c in inverse_strengths
        ]
        strength = inverse_strengths[int(np.argmax(accuracies))]
    layers = []
    for draw in range(draws):
        order = _permutation(len(x), seed=seed, stream=1 + draw)
        layers.append(layer(order[_balanced(ids[order])], strength))
    weight, bias = (torch.from_numpy(np.mean(part, axis=0)) for part in zip(*layers, strict=True))
    return LastLayer(weight.float(), bias.float(), strength)


def _check(features: Tensor, y: Tensor, groups: Tensor, num_classes: int) -> None:
    if features.ndim != 2 or not len(features) == len(y) == len(groups) > 0:
        shapes = [tuple(t.shape) for t in (features, y, groups)]
        raise ValueError(f"features (N, D), y (N,) and groups (N,) expected, got {shapes}")
    if not features.isfinite().all():
        raise ValueError("features are not finite")
    if num_classes < 2 or y.min() < 0 or y.max() >= num_classes:
        raise ValueError(f"y {y.min()}..{y.max()} for {num_classes} classes")
    if groups.min() < 0:
        raise ValueError(f"groups has a negative id: {groups.min()}")
    absent = (torch.bincount(y, minlength=num_classes) == 0).nonzero().flatten().tolist()
    if absent:
        raise ValueError(f"no image of class {absent[0]}")


def _permutation(n: int, *, seed: int, stream: int) -> np.ndarray:
    # Raw words of a counter generator, which NumPy keeps the same across its versions.
    words = np.random.Philox(key=np.array([seed, stream], dtype=np.uint64)).random_raw(n)
    return np.argsort(words, kind="stable")


def _ranks(ids: np.ndarray, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many of its group precede each image in `order`, and the size of each group."""
    rank, counts = np.empty(len(ids), np.int64), np.bincount(ids)
    for group in np.flatnonzero(counts):
        members = order[ids[order] == group]
        rank[members] = np.arange(len(members))
    return rank, counts


def _balanced(ids: np.ndarray) -> np.ndarray:
    """Positions of the first images of each group, as many as the smallest group has."""
    rank, counts = _ranks(ids, np.arange(len(ids)))
    return np.flatnonzero(rank < counts[counts > 0].min())


def _fit(
    x: np.ndarray, y: np.ndarray, num_classes: int, *, strength: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Weight (K, D) and bias (K,) on features as they come, from a fit to standardised ones."""
    # A second to import, which no other recipe needs.
    import sklearn
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    version = tuple(int(part) for part in sklearn.__version__.split(".")[:2])
    # scikit-learn 1.8 renamed the choice of an L1 penalty.
    l1 = {"l1_ratio": 1.0} if version >= (1, 8) else {"penalty": "l1"}
    scaler = StandardScaler().fit(x)
    z = scaler.transform(x)
    weight, bias = np.zeros((num_classes, x.shape[1])), np.zeros(num_classes)
    # Two classes need one regression: logits 0 and w z + b have its sigmoid for their softmax.
    for c in range(num_classes) if num_classes > 2 else [1]:
        regression = LogisticRegression(
            **l1, C=strength, solver="liblinear", random_state=seed % 2**32, max_iter=1000
        ).fit(z, y == c)
        weight[c] = regression.coef_[0] / scaler.scale_
        bias[c] = regression.intercept_[0] - weight[c] @ scaler.mean_
    return weight, bias


def _worst_group_accuracy(
    layer: tuple[np.ndarray, np.ndarray], x: np.ndarray, y: np.ndarray, ids: np.ndarray
) -> float:
    weight, bias = layer
    correct = (x @ weight.T + bias).argmax(1) == y
    return min((correct[ids == group].mean() for group in np.unique(ids)), default=0.0)
