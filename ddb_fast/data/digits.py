"""Colored Digits: an embedded biased set, so that everything runs offline and in minutes.

scikit-learn's 1,797 handwritten 8x8 digits, enlarged to 16x16, white on a coloured background;
colour i goes with digit i in most training images. Every number is drawn from the raw output of
the Philox counter generator, which NumPy keeps the same, so the set is the same on every machine.
"""

from fractions import Fraction
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

from ddb_fast.data.listing import Entry, Listing

# Mean colours of the Colored MNIST protocol of LfF (Nam et al. 2020); row i goes with digit i.
COLOURS = np.array(
    [
        [0.9837, 0.3125, 0.1686],
        [0.9905, 0.9156, 0.3515],
        [0.6730, 0.4611, 0.5798],
        [0.7833, 0.8316, 0.6013],
        [0.0880, 0.7780, 0.9818],
        [0.3214, 0.9611, 0.4464],
        [0.0246, 0.2357, 0.7587],
        [0.5552, 0.1016, 0.7618],
        [0.2077, 0.3929, 0.0187],
        [0.8337, 0.2024, 0.2669],
    ]
)
_NOISE = 0.05
_TEST_SHARE, _VALIDATION_SHARE = Fraction(28, 100), Fraction(1, 10)
_NOISE_STREAM, _RANK_STREAM = 0, 1


def _raw(stream: int, count: int, draw: int) -> np.ndarray:
    return np.random.Philox(key=np.array([draw, stream], dtype=np.uint64)).random_raw(count)


def _enlarge(images: np.ndarray) -> np.ndarray:
    """(N, 8, 8) to (N, 16, 16), bilinear, pixel centres aligned (align_corners=False).

    Multiples of 1/16 of small integers: exact in floating point whatever the order of summation.
    """
    weights = np.zeros((16, 8))
    for row in range(16):
        position = (row + 0.5) / 2 - 0.5
        low = int(np.floor(position))
        weights[row, max(low, 0)] += low + 1 - position
        weights[row, min(low + 1, 7)] += position - low
    return weights @ images @ weights.T


def _backgrounds(count: int, draw: int) -> np.ndarray:
    """(count, 10, 3): the background of each digit in each colour, drawn once for all rho."""
    uniform = ((_raw(_NOISE_STREAM, count * 30, draw) >> 11) + 0.5) * 2.0**-53
    normal = np.array([NormalDist().inv_cdf(u) for u in uniform.tolist()])
    return np.clip(COLOURS + _NOISE * normal.reshape(count, 10, 3), 0, 1)


def _colours_of(members: np.ndarray, y: int, rho: Fraction, rank: np.ndarray) -> np.ndarray:
    """A colour for each of a class's images: round(n (1 - rho)) in others than y, in turn."""
    colours = np.full(len(members), y)
    conflicting = np.argsort(rank[members], kind="stable")[: round(len(members) * (1 - rho))]
    colours[conflicting] = (y + 1 + np.arange(len(conflicting)) % 9) % 10
    return colours


def digits(rho: float = 0.95, *, draw: int = 0) -> Listing:
    """Render Colored Digits with a share rho of bias-aligned training and validation images.

    Per class, in the order of `load_digits`, the last round(0.28 n) are test and the last
    round(0.1 rest) of the rest validation. In each of training and validation
    round(n_c (1 - rho)) images of a class conflict, rho taken as the decimal it is written as and
    halves rounded to even: those of lowest random rank, a number drawn once for each digit, get
    colours y+1, y+2, ... (mod 10, never y) in turn. Every test digit comes in all ten colours.
    draw: another number draws other ranks and other noise, for studies over many sets.
    ValueError for rho outside [0, 1].
    """
    if not 0 <= rho <= 1:
        raise ValueError(f"rho is {rho}, a share in [0, 1] is needed")
    # scikit-learn takes a second to import, and who only wants the colours needs none of it.
    from sklearn.datasets import load_digits

    share, data = Fraction(str(rho)), load_digits()
    strength = _enlarge(data.images)[..., None] / 16
    background = _backgrounds(len(data.target), draw)
    rank = _raw(_RANK_STREAM, len(data.target), draw)

    chosen = []  # (split, y, digit, colour)
    for y in range(10):
        members = np.flatnonzero(data.target == y)
        n_test = round(len(members) * _TEST_SHARE)
        n_val = round((len(members) - n_test) * _VALIDATION_SHARE)
        train, val, test = np.split(members, [-n_test - n_val, -n_test])
        for split, part in (("train", train), ("val", val)):
            colours = _colours_of(part, y, share, rank)
            chosen += [(split, y, i, c) for i, c in zip(part, colours, strict=True)]
        chosen += [("test", y, i, c) for i in test for c in range(10)]

    entries = []
    for split, y, i, c in chosen:
        image = background[i, c] * (1 - strength[i]) + strength[i]
        pixels = np.rint(255 * image).astype(np.uint8)
        entries.append(Entry(f"{split}/{y}/{i:04d}_c{c}.png", y, split, pixels, int(c)))
    return Listing(
        name="digits",
        classes=tuple(str(y) for y in range(10)),
        entries=tuple(entries),
        biases=tuple(f"colour {c}" for c in range(10)),
        aligned_bias=tuple(range(10)),
        bias_of=nearest_colour,
    )


def nearest_colour(images: Tensor) -> Tensor:
    """The mean colour nearest to each image's background, (N,) int64.

    images: (N, 3, H, W) uint8, any size. The digit is white, so the darkest quarter of the pixels
    is background; their median per channel stands for it. ValueError for another shape or dtype.
    """
    if images.ndim != 4 or images.shape[1] != 3 or images.dtype != torch.uint8:
        raise ValueError(
            f"images must be (N, 3, H, W) uint8, got {tuple(images.shape)} {images.dtype}"
        )
    pixels = images.flatten(2).float()
    quarter = max(1, pixels.shape[2] // 4)
    darkest = pixels.sum(1).topk(quarter, largest=False).indices
    background = pixels.gather(2, darkest[:, None].expand(-1, 3, -1)).median(2).values
    colours = torch.tensor(255 * COLOURS, dtype=torch.float32, device=images.device)
    return (background[:, None] - colours).square().sum(2).argmin(1)
