"""Which images make up step s: samplers without state, addressed by position.

The stream of image indices is a function of the seed alone and entry p of it can be computed
directly, so a resumed run needs no generator state, and rank r of W ranks gets its part of every
step with `batch(step * W + r, batch_size_per_rank)`. Randomness is the raw output of the Philox
counter generator, which NumPy keeps the same across its versions.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_WORDS_PER_COUNTER = 4


def _check(seed: int, step: int = 0, batch_size: int = 1) -> None:
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must be in 0..2**64-1, got {seed}")
    if step < 0 or batch_size < 1:
        raise ValueError(f"no batch of size {batch_size} at step {step}")


def _philox(seed: int, stream: int, counter: int = 0) -> np.random.Philox:
    return np.random.Philox(key=np.array([seed, stream], dtype=np.uint64), counter=counter)


class ShuffledSampler:
    """Epochs of n images, each a permutation of its own, back to back.

    Entry p of the stream is entry p % n of the permutation of epoch p // n: batches run across the
    border between epochs, and no image is dropped or repeated within an epoch. ValueError for
    n < 1 or a seed outside 0..2**64-1.
    """

    def __init__(self, n: int, *, seed: int) -> None:
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}")
        _check(seed)
        self.n, self.seed = n, seed
        self._permutations: dict[int, np.ndarray] = {}

    def batch(self, step: int, batch_size: int) -> Tensor:
        """Return entries step * batch_size and following of the stream, (batch_size,) int64."""
        _check(self.seed, step, batch_size)
        start = step * batch_size
        epochs = range(start // self.n, (start + batch_size - 1) // self.n + 1)
        # Sorting once an epoch, not once a batch; only the epochs of this batch are kept.
        self._permutations = {
            e: self._permutations[e] if e in self._permutations else self._permutation(e)
            for e in epochs
        }
        # Only the batch's own pieces are touched: the cost of a step must not grow with n.
        pieces = [
            permutation[max(0, start - e * self.n) : start + batch_size - e * self.n]
            for e, permutation in self._permutations.items()
        ]
        return torch.from_numpy(np.concatenate(pieces))

    def _permutation(self, epoch: int) -> np.ndarray:
        return np.argsort(_philox(self.seed, epoch).random_raw(self.n), kind="stable")


class GroupBalancedSampler:
    """Images drawn with replacement: a non-empty group uniformly, then an image of it uniformly.

    groups: (N,) int64 in 0..num_groups-1. Groups without images are never drawn. ValueError for an
    empty or misshapen `groups`, ids outside the range, or a seed outside 0..2**64-1.
    Source: the reweighted sampling of GroupDRO, Sagawa et al. 2020, section 3.
    """

    def __init__(self, groups: Tensor, *, num_groups: int, seed: int) -> None:
        if groups.ndim != 1 or len(groups) == 0:
            raise ValueError(f"groups must be (N,) with N >= 1, got {tuple(groups.shape)}")
        if groups.min() < 0 or groups.max() >= num_groups:
            raise ValueError(f"groups {groups.min()}..{groups.max()} outside 0..{num_groups - 1}")
        _check(seed)
        self.seed = seed
        ids = groups.cpu().numpy()
        self._order = np.argsort(ids, kind="stable")
        counts = np.bincount(ids, minlength=num_groups)
        starts = np.cumsum(counts) - counts
        self._counts, self._starts = counts[counts > 0], starts[counts > 0]

    def batch(self, step: int, batch_size: int) -> Tensor:
        """Return entries step * batch_size and following of the stream, (batch_size,) int64."""
        _check(self.seed, step, batch_size)
        # One counter value per entry of the stream is what makes it addressable by position.
        words = _philox(self.seed, 0, counter=step * batch_size).random_raw(
            _WORDS_PER_COUNTER * batch_size
        )
        uniform = (words.reshape(batch_size, _WORDS_PER_COUNTER)[:, :2] >> 11) * 2.0**-53
        group = (uniform[:, 0] * len(self._counts)).astype(np.int64)
        member = (uniform[:, 1] * self._counts[group]).astype(np.int64)
        return torch.from_numpy(self._order[self._starts[group] + member])


@dataclass(frozen=True)
class Lookup:
    """Entries of a sampler looked up in a list of images, in which one may stand often."""

    sampler: ShuffledSampler
    positions: Tensor

    def batch(self, step: int, batch_size: int) -> Tensor:
        """Return positions of images, (batch_size,) int64."""
        return self.positions[self.sampler.batch(step, batch_size)]


@dataclass
class DataLoaderBatches:
    """A sampler of this module as the `batch_sampler` of a torch DataLoader.

    An epoch is `steps` batches of indices; the next one goes on where it ended, at batch `step`.
    """

    sampler: ShuffledSampler | GroupBalancedSampler
    batch_size: int
    steps: int
    step: int = 0

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(self.steps):
            self.step += 1
            yield self.sampler.batch(self.step - 1, self.batch_size).tolist()
