"""Did the generator copy training images? The generated ones and fresh real ones, side by side.

A copy lies much nearer to one training image than to the next ones. Distances alone do not show
it: a blurred image is near to everything. So for each image of a class its distance, in pixels, to
the nearest training image of that class is divided by the mean distance to the next ten (Carlini
et al. 2023, arXiv 2301.13188, section 5, who take fifty). The training images themselves, each
against the others, say which ratios are unusual: a share LEVEL of them lies below the limit. An
image is flagged when its ratio is below that limit and the amplifier's features, too, differ no
more between the two than between half of the training images and their nearest: a rare image with
one relative stands alone in pixels as well. A generator that copies nothing is flagged at about
LEVEL or less, where a class is large enough; `chance` says how much more happens by chance, and
images held out of training what likeness does.

Copies that are mirrored, cropped or recoloured are not searched for, nor those of another class.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ddb_fast import checkpoint
from ddb_fast.classification import features_of, load_classifier
from ddb_fast.context import Context
from ddb_fast.metrics import wilson_interval

LEVEL = 0.01
"""Share of the training images whose ratio is below their class's limit."""
NEXT = 10
"""How many images after the nearest one the ratio compares with."""
SIDE = 32
"""Larger images are averaged down to so many pixels a side before they are compared."""
QUERIES, REAL = 2_000, 20_000
"""Images of a class that are compared, and real images that they are compared with, at most."""
PAIRS = 50
DRAWS = 10_000
CHUNK = 2_048
"""Rows of a block of distances: 2 x 50 MB at 32 pixels."""
BINS, WIDTH = 40, 0.1
"""Of the histograms, in multiples of the limit; the last bin holds what is beyond it, too."""


def nearest(
    queries: Tensor, real: Tensor, k: int, *, own: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Euclidean distances (Q, k) float64 to the k nearest rows, nearest first, and their numbers.

    queries: (Q, D), real: (N, D), of any type; uint8 is exact. own: (Q,) the row of `real` that a
    query is itself, which is left out. Works in blocks: memory does not grow with N.
    """
    distances, numbers = [], []
    for part in torch.arange(len(queries)).split(CHUNK):
        block = queries[part].double()
        lengths = block.square().sum(1, keepdim=True)
        best = block.new_full((len(part), 0), 0.0)
        found = torch.empty((len(part), 0), dtype=torch.int64)
        for start in range(0, len(real), CHUNK):
            rows = real[start : start + CHUNK].double()
            square = torch.addmm(lengths + rows.square().sum(1), block, rows.T, alpha=-2)
            here = torch.arange(start, start + len(rows)).expand(len(part), -1)
            if own is not None:
                square[here == own[part, None]] = float("inf")
            square, here = torch.cat([best, square], 1), torch.cat([found, here], 1)
            best, kept = square.topk(min(k, square.shape[1]), largest=False)
            found = here.gather(1, kept)
        distances.append(best.clamp_min(0).sqrt())
        numbers.append(found)
    return torch.cat(distances), torch.cat(numbers)


def chance(counts: Sequence[tuple[int, int, int]]) -> tuple[float, float]:
    """(mean, 97.5 % quantile) of the share that is flagged where nothing is a copy.

    counts: of each class the images compared, the rank r of its limit, and the n training images
    that it is the r-th smallest ratio of. All images of a class share that limit, which is a chance
    find itself: of n + 1 alike images the share below it is Beta(r, n + 1 - r), so that a small
    class may have many at once. From DRAWS draws, always the same.
    """
    generator, flagged = np.random.default_rng(0), np.zeros(DRAWS)
    for compared, rank, n in counts:
        flagged += generator.binomial(compared, generator.beta(rank, n + 1 - rank, DRAWS))
    total = sum(compared for compared, _, _ in counts)
    mean = sum(compared * rank / (n + 1) for compared, rank, n in counts) / total
    return mean, float(np.quantile(flagged, 0.975, method="higher")) / total


class _Compared(NamedTuple):
    """Images against the training images of their class, all (Q,)."""

    index: Tensor  # the image's number in its own set
    real: Tensor  # the nearest training image's number
    distance: Tensor  # to it in pixels: root mean square, grey levels
    ratio: Tensor  # that, of the mean distance to the next ones
    feature: Tensor  # to it in the amplifier's features, Euclidean

    def flagged(self, limits: tuple[float, float]) -> Tensor:
        return (self.ratio < limits[0]) & (self.feature <= limits[1])


def _spread(count: int, most: int) -> Tensor:
    """At most so many of 0..count-1, evenly spread."""
    return torch.linspace(0, count - 1, most).long() if count > most else torch.arange(count)


def _pixels(images: Tensor) -> Tensor:
    """(N, H, W, 3) uint8 as rows (N, D) uint8, averaged down to at most SIDE pixels a side."""
    if max(images.shape[1:3]) > SIDE:
        parts = []
        for part in images.split(CHUNK):
            small = F.interpolate(part.permute(0, 3, 1, 2).float(), size=(SIDE, SIDE), mode="area")
            parts.append(small.round().to(torch.uint8).permute(0, 2, 3, 1))
        images = torch.cat(parts)
    return images.flatten(1)


def _distinct(pixels: Tensor) -> Tensor:
    """The rows that are no repetition of an earlier one."""
    first: dict[bytes, int] = {}
    for number, row in enumerate(pixels.numpy()):
        first.setdefault(row.tobytes(), number)
    return torch.tensor(list(first.values()))


class _Class:
    """The training images of one class, which others are compared with."""

    def __init__(self, images: Tensor, numbers: Tensor, features: Callable[[Tensor], Tensor]):
        self.numbers, self._features = numbers, features
        shown = images[numbers]
        self._pixels, self._seen = _pixels(shown), features(shown)

    def compare(self, images: Tensor, index: Tensor) -> _Compared:
        """Images `index` of another set."""
        shown = images[index].contiguous()
        return self._compare(index, _pixels(shown), self._features(shown))

    def compare_own(self) -> _Compared:
        """Its own images, at most QUERIES of them, each with all the others."""
        own = _spread(len(self.numbers), QUERIES)
        return self._compare(self.numbers[own], self._pixels[own], self._seen[own], own=own)

    def _compare(
        self, index: Tensor, pixels: Tensor, seen: Tensor, *, own: Tensor | None = None
    ) -> _Compared:
        # As many neighbours for other images as its own have, so that the ratios are alike.
        k = min(NEXT + 1, len(self.numbers) - 1)
        distances, rows = nearest(pixels, self._pixels, k, own=own)
        first = rows[:, 0]
        return _Compared(
            index=index,
            real=self.numbers[first],
            distance=distances[:, 0] / pixels.shape[1] ** 0.5,
            ratio=distances[:, 0] / distances[:, 1:].mean(1),
            feature=(seen.double() - self._seen[first].double()).norm(dim=1),
        )


def check_memorisation(
    synthetic: Tensor,
    labels: Tensor,
    train: Tensor,
    y: Tensor,
    *,
    paths: Sequence[str],
    classes: Sequence[str],
    features: Callable[[Tensor], Tensor],
    held_out: tuple[str, Tensor, Tensor] | None = None,
) -> dict[str, Any]:
    """Compare every generated image with the training images of its class; JSON-able.

    synthetic: (M, 3, H, W), train: (N, H, W, 3), both uint8 of one size; labels (M,), y (N,);
    paths: of the training images. features: (n, H, W, 3) uint8 -> (n, D). held_out: name, images
    and labels of a split that no network was trained on, the control. ValueError for images of
    different sizes.

    Returns, shares as fractions of 1:
    {"level": LEVEL, "expected_share", "chance_share": mean and upper bound of a generator that
     copies nothing (see `chance`), None where nothing could be compared, "excess": whether
     "generated" is above that bound and above "held_out", where there is one, with intervals
     apart; None where they are not, for want of images held out,
     "generated", "held_out": {"split", "total", "compared", "flagged", "share", "low", "high"},
     low and high the 95 % Wilson interval; held_out is None where there is none,
     "real": {"total", "compared", "duplicates": repeated pixel for pixel, "left_out": beyond REAL
     of a class}, "side": pixels compared,
     "classes_skipped": names of those with fewer than three distinct training images,
     "pairs": at most PAIRS, flagged ones first, then by "ratio": {"synthetic", "real": numbers,
     "path", "class", "flagged", "distance": root mean square in grey levels, "ratio",
     "ratio_limit", "feature", "feature_limit"},
     "bin": WIDTH, "histograms": {"ratio", "feature": {"generated", "held_out", "train": [images a
     bin]}}, in multiples of the class's limit}
    """
    if synthetic.shape[2:] != train.shape[1:3]:
        raise ValueError(
            f"generated images of {tuple(synthetic.shape[2:])} pixels, real ones of "
            f"{tuple(train.shape[1:3])}"
        )
    others = {"generated": (synthetic.permute(0, 2, 3, 1), labels)}
    if held_out is not None:
        others["held_out"] = held_out[1:]
    counts = {name: {"compared": 0, "flagged": 0} for name in others}
    histograms = {
        kind: {name: torch.zeros(BINS, dtype=torch.int64) for name in ("train", *others)}
        for kind in ("ratio", "feature")
    }
    real = {"total": len(train), "compared": 0, "duplicates": 0, "left_out": 0}
    skipped, pairs, sizes = [], [], []
    for label, name in enumerate(classes):
        members = (y == label).nonzero()[:, 0]
        distinct = members[_distinct(_pixels(train[members]))]
        kept = distinct[_spread(len(distinct), REAL)]
        real["duplicates"] += len(members) - len(distinct)
        real["left_out"] += len(distinct) - len(kept)
        if len(kept) < 3:
            skipped.append(name)
            continue
        real["compared"] += len(kept)
        own_class = _Class(train, kept, features)
        own = own_class.compare_own()
        # Of n + 1 alike images the last is among the r smallest with a chance of r / (n + 1).
        rank = max(1, int(LEVEL * (len(own.index) + 1)))
        limits = own.ratio.sort().values[rank - 1].item(), own.feature.median().item()
        _count(histograms, "train", own, limits)
        for kind, (images, numbers) in others.items():
            index = (numbers == label).nonzero()[:, 0]
            if len(index) == 0:
                continue
            compared = own_class.compare(images, index[_spread(len(index), QUERIES)])
            flagged = compared.flagged(limits)
            _count(histograms, kind, compared, limits)
            counts[kind]["compared"] += len(flagged)
            counts[kind]["flagged"] += int(flagged.sum())
            if kind == "generated":
                sizes.append((len(flagged), rank, len(own.index)))
                pairs += _pairs(compared, flagged, limits, name, paths)
    result = {kind: _shares(count) for kind, count in counts.items()}
    generated, control = result["generated"], result.get("held_out")
    generated["total"] = len(labels)
    if control is not None:
        control |= {"split": held_out[0], "total": len(held_out[2])}
        control = control if control["compared"] else None
    expected, most = chance(sizes) if sizes else (None, None)
    excess: bool | None = most is not None and generated["share"] > most
    if excess and control is not None and generated["low"] <= control["high"]:
        # What is like the training images without being copies may explain it.
        excess = None if generated["low"] > control["share"] else False
    return {
        "level": LEVEL,
        "expected_share": expected,
        "chance_share": most,
        "excess": excess,
        "generated": generated,
        "held_out": control,
        "real": real,
        "side": min(SIDE, train.shape[1]),
        "classes_skipped": skipped,
        "pairs": sorted(pairs, key=_order)[:PAIRS],
        "bin": WIDTH,
        "histograms": {
            kind: {name: bins.tolist() for name, bins in of_sets.items()}
            for kind, of_sets in histograms.items()
        },
    }


def _count(
    histograms: dict[str, dict[str, Tensor]],
    name: str,
    compared: _Compared,
    limits: tuple[float, float],
) -> None:
    """Add to the histograms of one set."""
    for kind, limit in zip(("ratio", "feature"), limits, strict=True):
        # Features that are the same for all images have a limit of 0.
        multiples = getattr(compared, kind) / max(limit, 1e-12)
        bins = (multiples / WIDTH).clamp(0, BINS - 1).long()
        histograms[kind][name] += torch.bincount(bins, minlength=BINS)


def _shares(count: dict[str, int]) -> dict[str, Any]:
    flagged, compared = count["flagged"], count["compared"]
    if compared == 0:
        return {**count, "share": None, "low": None, "high": None}
    low, high = wilson_interval(flagged, compared)
    return {**count, "share": flagged / compared, "low": low, "high": high}


def _order(pair: dict[str, Any]) -> tuple[bool, float, int]:
    return not pair["flagged"], pair["ratio"], pair["synthetic"]


def _pairs(
    compared: _Compared,
    flagged: Tensor,
    limits: tuple[float, float],
    name: str,
    paths: Sequence[str],
) -> list[dict[str, Any]]:
    """The first PAIRS of a class."""
    answer = []
    columns = (*compared, flagged)
    for index, real, distance, ratio, feature, is_flagged in zip(
        *(column.tolist() for column in columns), strict=True
    ):
        answer.append(
            {
                "synthetic": index,
                "real": real,
                "path": paths[real],
                "class": name,
                "flagged": is_flagged,
                "distance": distance,
                "ratio": ratio,
                "ratio_limit": limits[0],
                "feature": feature,
                "feature_limit": limits[1],
            }
        )
    return sorted(answer, key=_order)[:PAIRS]


def memorisation(context: Context, synthetic: Path, amplifier: Path, path: Path) -> None:
    """The stage: compare a run's synthetic images as `check_memorisation` says; write `path`.

    synthetic: images.safetensors, amplifier: model.safetensors. The control is the validation
    split, or the test split, which may be made differently, where there is none.
    """
    tensors, _ = checkpoint.load_tensors(synthetic)
    network, config, _ = load_classifier(amplifier)
    network.to(context.device)
    splits, train = context.data.splits, context.data.splits["train"]
    name = next((name for name in ("val", "test") if name in splits), None)

    def features(images: Tensor) -> Tensor:
        return features_of(network, images, config, device=context.device, crop=False)

    answer = check_memorisation(
        tensors["images"],
        tensors["labels"],
        train.small,
        train.y,
        paths=train.paths,
        classes=context.data.classes,
        features=features,
        held_out=None if name is None else (name, splits[name].small, splits[name].y),
    )
    checkpoint.write_atomically(path, json.dumps(answer, indent=1) + "\n")
