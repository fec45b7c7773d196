"""Recipe II of Diffusing DeBias: weight each sample by the frozen amplifier's loss on it."""

from torch import Tensor, nn

from ddb_fast.recipes.erm import sample_losses, without_rounding
from ddb_fast.recipes.loss_table import EPS, LossTable, largest_per_class


class ReweightedLoss(nn.Module):
    """Mean of r_i * L_f(x_i, y_i) with r_i = L_BA / (L_BA + L_f + 1e-8), r_i a constant.

    What the amplifier finds hard and the classifier does not yet master counts most. L_BA is the
    amplifier's cross-entropy, computed once. In r, L_f is the loss in this batch or, with a
    moving average m, the sample's running loss m * old + (1 - m) * new (first visit: the loss
    itself). With class_maximum, both are divided by their largest value within the class y, for
    L_f among the running losses of the whole training set.

    amplifier_loss: (N,), finite and not negative, nats; y: (N,) int64, the training labels;
    moving_average in [0, 1). forward(logits (n, num_classes), y (n,), index (n,) into
    `amplifier_loss`) -> scalar. The checkpointed state is the running loss. ValueError for
    arguments outside their range.
    Source: Ciranni et al. 2025 (arXiv 2502.09564), Recipe II; moving average (0.7), class maximum
    and 1e-8 from Nam et al. 2020, "Learning from Failure".
    """

    def __init__(
        self,
        amplifier_loss: Tensor,
        y: Tensor,
        *,
        moving_average: float | None = None,
        class_maximum: bool = False,
    ) -> None:
        super().__init__()
        if amplifier_loss.shape != y.shape or y.ndim != 1 or len(y) == 0:
            raise ValueError(
                f"amplifier_loss {tuple(amplifier_loss.shape)} and y {tuple(y.shape)} must be (N,)"
            )
        invalid = amplifier_loss[~(amplifier_loss.isfinite() & (amplifier_loss >= 0))]
        if len(invalid) > 0:
            raise ValueError(f"amplifier_loss has {len(invalid)} values like {invalid[0]}")
        if y.min() < 0:
            raise ValueError(f"y has a negative label: {y.min()}")
        num_classes = int(y.max()) + 1
        self.class_maximum = class_maximum
        # The class maximum is over running losses, so it needs the table: 0 keeps the latest loss.
        self.table = None
        if moving_average is not None or class_maximum:
            self.table = LossTable(y, num_classes=num_classes, moving_average=moving_average or 0.0)
        if class_maximum:
            largest = largest_per_class(amplifier_loss, y, num_classes=num_classes)
            amplifier_loss = amplifier_loss / largest[y]
        self.register_buffer("amplifier_loss", amplifier_loss.detach().clone(), persistent=False)

    def _apply(self, fn, recurse: bool = True):
        return super()._apply(without_rounding(fn), recurse)

    def forward(self, logits: Tensor, y: Tensor, index: Tensor) -> Tensor:
        losses = sample_losses(logits, y)
        amplifier, target = self.amplifier_loss[index].to(losses), losses.detach()
        if self.table is not None:
            target = self.table.update(index, losses)
            if self.class_maximum:
                target = target / self.table.class_maximum()[y]
        weight = amplifier / (amplifier + target + EPS)
        return (weight * losses).mean()
