"""Empirical risk minimisation: plain cross-entropy, what every debiasing method is held against."""

from collections.abc import Callable

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


def without_rounding(move: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return what `nn.Module._apply` is given, but that floats stay float32 at least.

    `.half()` of all that is trained would round what a recipe keeps: steps of GroupDRO's weights
    are smaller than bfloat16 can tell apart, and these would never move.
    """

    def moved(x: Tensor) -> Tensor:
        answer = move(x)
        small = answer.is_floating_point() and answer.itemsize < 4 <= x.itemsize
        return x.to(answer.device) if small else answer

    return moved


class ERM(nn.Module):
    """Mean cross-entropy of the batch; `index` is unused, there so that recipes can be swapped.

    forward(logits (n, num_classes), y (n,), index (n,)) -> scalar.
    """

    def forward(self, logits: Tensor, y: Tensor, index: Tensor) -> Tensor:
        return sample_losses(logits, y).mean()
