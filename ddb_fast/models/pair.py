"""Two networks that are trained side by side, of which one is kept."""

import torch
from torch import Tensor, nn


class NetworkPair(nn.Module):
    """A biased and a debiased network that see the same batches and share no parameter.

    forward: x -> (N, 2, num_classes) logits in training, biased then debiased, as `recipes.LfF`
    takes them; (N, num_classes) of the debiased network in eval mode, so that the pair is evaluated
    as the classifier that comes out of it.
    """

    def __init__(self, *, biased: nn.Module, debiased: nn.Module) -> None:
        super().__init__()
        self.biased, self.debiased = biased, debiased

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return self.debiased(x)
        return torch.stack([self.biased(x), self.debiased(x)], dim=1)
