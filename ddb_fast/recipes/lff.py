"""Learning from Failure: a network that learns the shortcut, and one that learns from its errors.

The two are trained side by side on the same batches. What the biased network cannot learn and the
debiased one can is taken for bias-conflicting, and weighs most in the debiased network's loss.
"""

import torch
from torch import Tensor, nn

from ddb_fast.recipes.erm import sample_losses
from ddb_fast.recipes.loss_table import EPS, LossTable


class LfF(nn.Module):
    """Mean of q * p_y^q * L_b + W * L_d over the batch, for a biased and a debiased network.

    L_b and L_d are the networks' cross-entropies, p_y the biased network's probability of the class
    y. The biased network's share is generalised cross-entropy: with the factor constant its
    gradient is that of 1 - p_y^q, q times that of (1 - p_y^q) / q in Zhang & Sabuncu 2018, as in
    the authors' code (Adam does not see the factor). W = e_b / (e_b + e_d + 1e-8), a constant too,
    where e_b and e_d are each sample's moving averages of L_b and L_d, this batch's entered, each
    divided by the largest in the sample's class over the whole training set.

    The networks share no parameter, so one optimiser that treats each parameter by itself (SGD,
    Adam) trains them as two would; clipping has to be done for each apart.

    y: (N,) int64 in 0..num_classes-1, the training labels; q in (0, 1]; moving_average in [0, 1).
    forward(logits (n, 2, num_classes), biased then debiased; y (n,); index (n,)) -> scalar. The
    checkpointed state is both tables. ValueError for arguments outside their range or other logits.
    Source: Nam et al. 2020, "Learning from Failure", algorithm 1 (q = moving_average = 0.7), moving
    averages and class maxima as in its authors' code.
    """

    def __init__(
        self, y: Tensor, num_classes: int, *, q: float = 0.7, moving_average: float = 0.7
    ) -> None:
        super().__init__()
        if y.ndim != 1 or len(y) == 0:
            raise ValueError(f"y must be (N,) with N >= 1, got {tuple(y.shape)}")
        if y.min() < 0 or y.max() >= num_classes:
            raise ValueError(f"y {y.min()}..{y.max()} outside 0..{num_classes - 1}")
        if not 0 < q <= 1:
            raise ValueError(f"q must be in (0, 1], got {q}")
        self.q = q
        sizes = {"num_classes": num_classes, "moving_average": moving_average}
        self.biased, self.debiased = LossTable(y, **sizes), LossTable(y, **sizes)

    def forward(self, logits: Tensor, y: Tensor, index: Tensor) -> Tensor:
        if logits.ndim != 3 or logits.shape[1] != 2:
            raise ValueError(f"logits must be (n, 2, num_classes), got {tuple(logits.shape)}")
        biased, debiased = (sample_losses(part, y) for part in logits.unbind(1))
        e_b, e_d = (
            table.update(index, losses) / table.class_maximum()[y]
            for table, losses in ((self.biased, biased), (self.debiased, debiased))
        )
        weight = e_b / (e_b + e_d + EPS)
        trusted = self.q * torch.exp(-self.q * biased.detach())
        return (trusted * biased + weight * debiased).mean()
