"""A running loss for every training sample, the same on every rank."""

import torch
from torch import Tensor, nn

from ddb_fast.recipes.distributed import gather_over_ranks

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
        self.register_buffer("y", y, persistent=False)
        self.register_buffer("loss", torch.zeros(len(y), device=y.device))
        self.register_buffer("visited", torch.zeros(len(y), dtype=torch.bool, device=y.device))

    def update(self, index: Tensor, losses: Tensor) -> Tensor:
        """Enter the losses (n,) of samples `index` (n,) of every rank; return this rank's averages.

        Every rank must pass equally many samples. No gradient flows through the table.
        """
        visits, new = gather_over_ranks(index), gather_over_ranks(losses)
        keep = self.moving_average * self.visited[visits].to(self.loss)
        average = keep * self.loss[visits] + (1 - keep) * new
        self.loss.scatter_reduce_(0, visits, average.to(self.loss), "amax", include_self=False)
        self.visited.index_fill_(0, visits, True)
        return self.loss[index]

    def class_maximum(self) -> Tensor:
        """Return the largest running loss of each class, (num_classes,), at least EPS."""
        return largest_per_class(self.loss, self.y, num_classes=self.num_classes)
