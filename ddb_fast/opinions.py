"""What is trained for the verdict: a second amplifier, and an ERM for each half of the images.

All have the amplifier's network, recipe and length, and first weights of their own. What each says
of the real training images is kept in `audit/predictions.safetensors`; `ddb_fast.verdict` judges.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ddb_fast import checkpoint
from ddb_fast.classification import (
    first_network,
    load_classifier,
    train_classifier,
)
from ddb_fast.context import Context
from ddb_fast.data.samplers import ShuffledSampler
from ddb_fast.recipes import ERM
from ddb_fast.scoring import logits_of

FOLDS = 2


@dataclass(frozen=True, eq=False, kw_only=True)
class Opinions:
    """Classes predicted for the N real training images, each (N,) int64.

    amplifier, again: the run's amplifier and one of other first weights and order, both trained on
    the synthetic images; erm: trained on real images, each image judged by the one of two networks
    that has not seen it.
    """

    amplifier: Tensor
    again: Tensor
    erm: Tensor


def folds(y: Tensor, seed: int) -> Tensor:
    """Halves of the training images, (N,) int64 of 0 and 1, every class dealt out evenly."""
    half = torch.zeros_like(y)
    rank = torch.from_numpy(np.random.Philox(key=seed).random_raw(len(y)).astype(np.float64))
    for label in y.unique():
        members = (y == label).nonzero()[:, 0]
        half[members[rank[members].argsort(stable=True)][1::FOLDS]] = 1
    return half


def gather_opinions(
    context: Context, *, synthetic: Path, amplifier: Path, folder: Path, parts: Path
) -> None:
    """Train what the verdict needs and write `folder/predictions.safetensors`; resumable.

    synthetic, amplifier: the run's. parts: where each network's answers are kept meanwhile.
    """
    config, accelerator, data = context.config, context.accelerator, context.data
    train, classes = data.splits["train"], len(data.classes)

    def answers(network: torch.nn.Module) -> Tensor:
        return logits_of(
            network, train.small, config.amplifier, device=context.device, crop=False
        ).argmax(1)

    def opinion(name: str, images: Tensor, y: Tensor, seed: int) -> Tensor:
        kept = parts / f"{name}.safetensors"
        accelerator.wait_for_everyone()
        if not kept.exists():
            network = first_network(config.amplifier, classes, seed=seed)
            train_classifier(
                context,
                network,
                config.amplifier,
                images,
                y,
                whole=True,
                recipe=ERM(),
                sampler=ShuffledSampler(len(y), seed=seed),
                stage=f"verdict, {name}",
                seed=seed,
                resume=parts / f"{name}.checkpoint.safetensors",
            )
            if accelerator.is_main_process:
                checkpoint.save_tensors(kept, {"predicted": answers(network)}, {})
            accelerator.wait_for_everyone()
        return checkpoint.load_tensors(kept)[0]["predicted"]

    network, _, _ = load_classifier(amplifier / "model.safetensors")
    said = {"amplifier": answers(network.to(context.device))}
    tensors, _ = checkpoint.load_tensors(synthetic / "images.safetensors")
    images = tensors["images"].permute(0, 2, 3, 1).contiguous()
    # The amplifier's own seed is the run's. Networks from the same first weights agree more often.
    said["again"] = opinion("again", images, tensors["labels"], config.seed + 1)
    half, said["erm"] = folds(train.y, config.seed), torch.empty_like(train.y)
    for part in range(FOLDS):
        own = (half != part).nonzero()[:, 0]
        seed = config.seed + 2 + part
        judged = opinion(f"erm half {part}", train.small[own], train.y[own], seed)
        said["erm"] = torch.where(half == part, judged, said["erm"])
    if accelerator.is_main_process:
        checkpoint.save_tensors(folder / "predictions.safetensors", said, {})


def read_opinions(folder: Path) -> Opinions:
    """What `gather_opinions` wrote."""
    return Opinions(**checkpoint.load_tensors(folder / "predictions.safetensors")[0])
