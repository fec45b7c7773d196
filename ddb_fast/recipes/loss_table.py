"""A running loss for every training sample, the same on every rank."""

import math

import torch
from torch import Tensor, nn

from ddb_fast.recipes.distributed import gather_over_ranks
from ddb_fast.recipes.erm import without_rounding

# Of this size a step costs least; of others hardly more.
_BATCH = 64

EPS = 1e-8
"""What LfF adds to denominators, so that 0 / 0 is 0."""


def largest_per_class(values: Tensor, y: Tensor, *, num_classes: int) -> Tensor:
    """Return the largest value of each class, (num_classes,), at least EPS so one may divide by it.

    values: (N,), not negative; y: (N,) int64.
    """
    return values.new_full((num_classes,), EPS).scatter_reduce_(0, y, values, "amax")


class LossTable(nn.Module):
    """Exponential moving average of each sample's loss over its visits.

    A sample's first loss enters as it is, a later one as m * old + (1 - m) * new with
    m = moving_average; until then it counts as 0. Where one batch holds a sample several
    times, the largest result stays, so the order of samples and ranks does not matter.

    y: (N,) int64, the class of each training sample; moving_average in [0, 1). The checkpointed
    state is `loss`, (N,), and `visited`, (N,) bool. ValueError for a moving average outside.
    Source: Nam et al. 2020, "Learning from Failure", and its authors' code.
    """

    def __init__(self, y: Tensor, *, num_classes: int, moving_average: float) -> None:
        super().__init__()
        if not 0 <= moving_average < 1:
            raise ValueError(f"moving_average must be in [0, 1), got {moving_average}")
        self.num_classes, self.moving_average = num_classes, moving_average
        self.register_buffer("loss", torch.zeros(len(y), device=y.device))
        self.register_buffer("visited", torch.zeros(len(y), dtype=torch.bool, device=y.device))
        # The largest loss of a class changes with every step, up and down. So that a step's cost
        # grows with the root of the set only, maxima are kept of blocks of samples of one class.
        block_of, members, block_class = _blocks(y, size=max(1, math.isqrt(len(y) // _BATCH)))
        self.register_buffer("block_of", block_of, persistent=False)
        self.register_buffer("members", members, persistent=False)
        self.register_buffer("block_class", block_class, persistent=False)
        self.register_buffer("block_maximum", self.loss.new_zeros(len(members)), persistent=False)
        self.register_load_state_dict_post_hook(LossTable._measure_blocks)

    def _apply(self, fn, recurse: bool = True):
        return super()._apply(without_rounding(fn), recurse)

    def update(self, index: Tensor, losses: Tensor) -> Tensor:
        """Enter the losses (n,) of samples `index` (n,) of every rank; return this rank's averages.

        Every rank must pass equally many samples. No gradient flows through the table.
        """
        visits, new = gather_over_ranks(index), gather_over_ranks(losses)
        keep = self.moving_average * self.visited[visits].to(self.loss)
        average = keep * self.loss[visits] + (1 - keep) * new
        self.loss.scatter_reduce_(0, visits, average.to(self.loss), "amax", include_self=False)
        self.visited.index_fill_(0, visits, True)
        # A block that stands there twice is given the same value twice.
        blocks = self.block_of[visits]
        self.block_maximum.index_copy_(0, blocks, self.loss[self.members[blocks]].amax(1))
        return self.loss[index]

    def _measure_blocks(self, _: object = None) -> None:
        self.block_maximum.copy_(self.loss[self.members].amax(1))

    def class_maximum(self) -> Tensor:
        """Return the largest running loss of each class, (num_classes,), at least EPS."""
        return largest_per_class(self.block_maximum, self.block_class, num_classes=self.num_classes)


def _blocks(y: Tensor, *, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cut the samples of each class into blocks of at most `size`.

    Returns the block of each sample, (N,), the samples of each block, (B, size), where the first
    fills up what is missing, and the class of each block, (B,).
    """
    order = y.argsort(stable=True)
    classes, counts = y[order].unique_consecutive(return_counts=True)
    blocks = (counts + size - 1) // size
    first_sample, first_block = (n.cumsum(0) - n for n in (counts, blocks))
    # Of each sample in that order: its class, and its place there.
    own = torch.repeat_interleave(torch.arange(len(classes), device=y.device), counts)
    place = torch.arange(len(y), device=y.device) - first_sample[own]
    block = first_block[own] + place // size
    starts = torch.arange(len(y), device=y.device)[place % size == 0]
    members = order[starts].unsqueeze(1).repeat(1, size)
    members[block, place % size] = order
    return torch.empty_like(y).index_copy_(0, order, block), members, y[members[:, 0]]
