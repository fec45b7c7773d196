"""Empirical risk minimisation: plain cross-entropy, what every debiasing method is held against."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def sample_losses(logits: Tensor, y: Tensor) -> Tensor:
    """Return the cross-entropy of each sample, in float32 at least.

    logits: (n, num_classes); y: (n,) int64. Returns (n,), nats. Half-precision logits are widened,
    because recipes sum, compare and keep these losses.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(dtype), y, reduction="none")


class ERM(nn.Module):
    """Mean cross-entropy of the batch; `index` is unused, there so that recipes can be swapped.

    forward(logits (n, num_classes), y (n,), index (n,)) -> scalar.
    """

    def forward(self, logits: Tensor, y: Tensor, index: Tensor) -> Tensor:
        return sample_losses(logits, y).mean()
