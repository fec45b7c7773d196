"""Just Train Twice: what a briefly trained network gets wrong is shown more often to the next."""

import torch
from torch import Tensor


def repeated_errors(error: Tensor, *, upweight: int) -> Tensor:
    """Return the positions of the second training's set: each image once, errors `upweight` times.

    Plain cross-entropy on that set is the paper's objective, in which errors weigh `upweight`; 1
    leaves the set as it is.
    error: (N,) bool, what the identification model gets wrong. Returns (N + (upweight - 1) * E,)
    int64 into the training images for E errors. ValueError for another shape, dtype or weight.
    Source: Liu et al. 2021, "Just Train Twice", equation 2; its authors' code adds `upweight`
    copies to the image that is there, one more than the paper.
    """
    if error.ndim != 1 or error.dtype != torch.bool:
        raise ValueError(f"error must be (N,) bool, got {tuple(error.shape)} {error.dtype}")
    if upweight < 1:
        raise ValueError(f"upweight must be >= 1, got {upweight}")
    copies = error.nonzero().squeeze(1).repeat(upweight - 1)
    return torch.cat([torch.arange(len(error), device=error.device), copies])
