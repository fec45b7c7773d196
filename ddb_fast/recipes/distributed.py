"""Sums and tables over every rank's part of a batch; the identity outside of a process group.

The convention of all recipes: each rank passes its own samples of one global batch, equally many on
every rank, and the *mean* over ranks of the losses they return is the loss of the whole batch.
DistributedDataParallel averages gradients, so they too are those of the whole batch on one rank.
"""

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Return the number of ranks that share a batch, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_ranks(x: Tensor) -> Tensor:
    """Return the elementwise sum of x over ranks; the same shape everywhere; no gradient."""
    total = x.detach().clone()
    if world_size() > 1:
        dist.all_reduce(total)
    return total


def gather_over_ranks(x: Tensor) -> Tensor:
    """Return every rank's x, joined along the first axis; the same shape everywhere; no gradient.

    x: (n, ...). Returns (world_size * n, ...).
    """
    x = x.detach().contiguous()
    if world_size() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(parts, x)
    return torch.cat(parts)
