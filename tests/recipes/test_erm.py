"""ERM: the cross-entropy, whatever the precision of the logits."""

import torch
import torch.nn.functional as F

from ddb_fast.recipes.erm import ERM, sample_losses


def test_erm_is_the_mean_cross_entropy():
    logits = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([0, 1, 2, 3, 3, 0, 1])
    by_hand = -(logits.exp() / logits.exp().sum(dim=1, keepdim=True)).log()[torch.arange(7), y]
    torch.testing.assert_close(ERM()(logits, y, torch.arange(7)), by_hand.mean())


def test_half_precision_logits_give_float32_losses():
    logits = torch.tensor([[12.0, 0.0], [0.5, -0.5]], dtype=torch.bfloat16, requires_grad=True)
    y = torch.tensor([0, 1])
    losses = sample_losses(logits, y)
    assert losses.dtype == torch.float32
    # In bfloat16 the first loss, 6.1e-6, would be rounded to 0.
    torch.testing.assert_close(losses, F.cross_entropy(logits.float(), y, reduction="none"))
    assert losses[0] > 0
    losses.sum().backward()
    assert logits.grad.dtype == torch.bfloat16
