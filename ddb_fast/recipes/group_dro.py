"""GroupDRO: lower the worst group's loss by weighting groups with an adversary's distribution q."""

import torch
from torch import Tensor, nn

from ddb_fast.recipes.distributed import sum_over_ranks, world_size
from ddb_fast.recipes.erm import sample_losses, without_rounding


class GroupDRO(nn.Module):
    """Online group-adjusted robust loss; each call of it is one step of the adversary.

    With L_g the mean loss of group g in the batch of all ranks, 0 for a group that is absent, and
    A_g = L_g + adjustment / sqrt(n_g), n_g the training samples of the group:
    q_g <- q_g * exp(step_size * A_g), renormalised over all groups; loss = sum_g q_g * A_g.
    q starts uniform over the groups that have samples; the others keep weight 0, otherwise their
    share of the loss would be lost.

    groups: (N,) int64, the group of each training sample; step_size, adjustment >= 0, in 1 / nats
    and nats. forward(logits (n, num_classes), y (n,), index (n,) into `groups`) -> scalar.
    The checkpointed state is q; the groups are the caller's. ValueError for arguments outside
    their range.
    Source: Sagawa et al. 2020, "Distributionally Robust Neural Networks for Group Shifts",
    algorithm 1 and equation 5; absent groups and the adjustment as in the authors' code.
    """

    def __init__(
        self,
        groups: Tensor,
        num_groups: int,
        *,
        step_size: float = 0.01,
        adjustment: float = 0.0,
    ) -> None:
        super().__init__()
        if groups.ndim != 1 or len(groups) == 0:
            raise ValueError(f"groups must be (N,) with N >= 1, got {tuple(groups.shape)}")
        if groups.min() < 0 or groups.max() >= num_groups:
            raise ValueError(f"groups {groups.min()}..{groups.max()} outside 0..{num_groups - 1}")
        if not (step_size >= 0 and adjustment >= 0):
            raise ValueError(f"step_size {step_size} and adjustment {adjustment} must be >= 0")
        self.step_size = step_size
        counts = torch.bincount(groups, minlength=num_groups)
        present = counts > 0
        self.register_buffer("groups", groups, persistent=False)
        margin = torch.where(present, adjustment * counts.clamp_min(1).rsqrt(), 0.0)
        self.register_buffer("margin", margin, persistent=False)
        # Logarithms, because q of an easy group underflows within one ordinary training run, and a
        # weight that has become 0 can never grow again.
        self.register_buffer("log_weights", (present / present.sum()).log())

    def _apply(self, fn, recurse: bool = True):
        return super()._apply(without_rounding(fn), recurse)

    @property
    def group_weights(self) -> Tensor:
        """The adversary's distribution q, (num_groups,), summing to 1."""
        return self.log_weights.exp()

    def forward(self, logits: Tensor, y: Tensor, index: Tensor) -> Tensor:
        losses = sample_losses(logits, y)
        sums, counts = _by_group(losses, self.groups[index], len(self.log_weights))
        totals, counts = sum_over_ranks(torch.stack([sums, counts]))
        counts = counts.clamp_min(1)
        gain = self.step_size * (totals / counts + self.margin)
        self.log_weights.copy_((self.log_weights + gain).log_softmax(dim=0))
        q = self.group_weights
        # Times the number of ranks, because gradients are averaged over ranks.
        return world_size() * (q / counts * sums).sum() + (q * self.margin).sum()


def _by_group(losses: Tensor, own: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Sum of the losses (n,) and count of the samples in each of `number` groups, `own` (n,)."""
    # Dense masks: unlike index_add of the losses they are deterministic on every device.
    groups = torch.arange(number, device=own.device) if number <= len(own) else own
    member = own == groups.unsqueeze(1)
    if number > len(own):
        # A row a sample, for 1,000 classes x predictions are 1,000,000 groups. A group's first
        # sample stands for it, so whatever else is added to its sum below is 0.
        member &= ~member.tril(-1).any(dim=1, keepdim=True)
    sums = torch.where(member, losses, 0.0).sum(dim=1)
    counts = member.sum(dim=1).to(sums)
    if number > len(own):
        sums, counts = (x.new_zeros(number).index_add(0, own, x) for x in (sums, counts))
    return sums, counts
