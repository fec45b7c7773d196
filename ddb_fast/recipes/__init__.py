"""Debiasing recipes for any training loop: tensors and modules in, tensors out.

A training loss is a module called as `recipe(logits, y, index)`, with `index` the position of each
sample in the training set. What it learns while training is in its buffers, so `state_dict` saves
it. Under DistributedDataParallel each is exact as long as every rank passes equally many samples:
the mean over ranks of the losses, and so the averaged gradient, is that of the whole batch.
"""

from ddb_fast.recipes.dfr import LastLayer, reweighted_last_layer
from ddb_fast.recipes.erm import ERM
from ddb_fast.recipes.group_dro import GroupDRO
from ddb_fast.recipes.jtt import repeated_errors
from ddb_fast.recipes.lff import LfF
from ddb_fast.recipes.loss_table import LossTable
from ddb_fast.recipes.pseudo_groups import (
    PseudoGroups,
    conflicting_groups,
    predicted_groups,
    pseudo_groups,
)
from ddb_fast.recipes.reweighting import ReweightedLoss

__all__ = [
    "ERM",
    "GroupDRO",
    "LastLayer",
    "LfF",
    "LossTable",
    "PseudoGroups",
    "ReweightedLoss",
    "conflicting_groups",
    "predicted_groups",
    "pseudo_groups",
    "repeated_errors",
    "reweighted_last_layer",
]
