"""How the cost grows with the batch and with the number of images: speed and anonymous memory.

    python benchmarks/scaling.py --images 100000 --batch 32

One process for a pair of the two, so that what it has allocated is its own: `suite.py --part
scaling` calls it for all of them. Random 64-pixel images are memory-mapped from a file in a
temporary folder, as a set that does not fit in memory is; networks are so small that work which
grows with the set would show. Linux only.
"""

import argparse
import functools
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import checkout  # noqa: F401 - before everything that imports ddb_fast
import numpy as np
import torch
from finished import start
from peak_memory import resident
from rows import Item, Row, in_own_process
from torch import Tensor, nn

from ddb_fast.config import ClassifierConfig, DiffusionConfig, Optimisation, UNetConfig
from ddb_fast.data.augment import augment
from ddb_fast.data.pixels import normalise
from ddb_fast.data.samplers import GroupBalancedSampler, ShuffledSampler
from ddb_fast.data.store import gather
from ddb_fast.diffusion.losses import diffusion_loss
from ddb_fast.diffusion.schedule import make_schedule
from ddb_fast.engine import EMA, Checkpoints, Sampler, fit
from ddb_fast.models.pair import NetworkPair
from ddb_fast.models.small import SmallCNN
from ddb_fast.models.unet import UNet
from ddb_fast.recipes import ERM, GroupDRO, LfF, ReweightedLoss
from ddb_fast.trackers import RunLog

IMAGES, BATCHES = (1_000, 10_000, 100_000), (8, 32, 128)
SIDE, CLASSES, CPU = 64, 10, torch.device("cpu")
METHODS = ("erm", "lff", "ddb-i", "ddb-ii")
_WARM = 5


@dataclass
class _Clock:
    """A sampler that notes when each step begins."""

    sampler: Sampler
    began: list[float] = field(default_factory=list)
    anonymous: list[int] = field(default_factory=list)

    def batch(self, step: int, batch_size: int) -> Tensor:
        self.began.append(time.perf_counter())
        self.anonymous.append(resident("RssAnon"))
        return self.sampler.batch(step, batch_size)


def mapped_images(folder: Path, count: int) -> Tensor:
    """Random images (count, SIDE, SIDE, 3) uint8, on the disk."""
    path, rng = folder / "images.u8", np.random.default_rng(0)
    with path.open("wb") as file:
        for first in range(0, count, 1000):
            file.write(rng.bytes(min(1000, count - first) * SIDE * SIDE * 3))
    flat = torch.from_file(str(path), size=count * SIDE * SIDE * 3, dtype=torch.uint8)
    return flat.view(count, SIDE, SIDE, 3)


@dataclass(frozen=True)
class _Training:
    """What `fit` is given."""

    network: nn.Module
    loss_of: Callable[[nn.Module, Tensor], Tensor]
    config: Optimisation
    sampler: Sampler
    more: dict[str, Any]


def _generator(images: Tensor, y: Tensor, batch: int, steps: int) -> _Training:
    unet = UNetConfig(
        channels=16, channel_multipliers=(1, 2), blocks_per_level=1, norm_groups=8,
        attention_levels=(), embedding=64, time_table=False, resample="conv",
    )  # fmt: skip
    config = DiffusionConfig(
        images=steps * batch, batch_size=batch, image_size=SIDE, target="v", schedule="cosine",
        unet=unet,
    )  # fmt: skip
    network, schedule = UNet(unet, num_classes=CLASSES, timesteps=1000), make_schedule(config)

    def loss_of(model: nn.Module, index: Tensor) -> Tensor:
        x0 = normalise(gather(images, index, CPU), config.pixel_norm)
        return diffusion_loss(
            model, x0, y[index], schedule=schedule, null_class=network.null_class,
            target=config.target, class_dropout=config.class_dropout,
        )  # fmt: skip

    ema = EMA(network, half_life=5_000, rampup=0.05)
    return _Training(network, loss_of, config, ShuffledSampler(len(y), seed=0), {"ema": ema})


def _recipe(name: str, y: Tensor) -> tuple[Sampler, nn.Module]:
    """The sampler and the loss of a method, whose tables have an entry an image."""
    if name == "ddb-i":
        groups = 2 * y + (torch.arange(len(y)) % 20 == 0)
        sampler = GroupBalancedSampler(groups, num_groups=2 * CLASSES, seed=0)
        return sampler, GroupDRO(groups, 2 * CLASSES)
    sampler = ShuffledSampler(len(y), seed=0)
    if name == "lff":
        return sampler, LfF(y, CLASSES)
    if name == "ddb-ii":
        losses = torch.rand(len(y))
        return sampler, ReweightedLoss(losses, y, moving_average=0.7, class_maximum=True)
    return sampler, ERM()


def _classifier(name: str, images: Tensor, y: Tensor, batch: int, steps: int) -> _Training:
    sampler, recipe = _recipe(name, y)
    network: nn.Module = SmallCNN(num_classes=CLASSES, width=8)
    if name == "lff":
        network = NetworkPair(biased=SmallCNN(num_classes=CLASSES, width=8), debiased=network)

    def loss_of(model: nn.Module, index: Tensor) -> Tensor:
        view = augment(gather(images, index, CPU), "shift", size=SIDE)
        return recipe(model(normalise(view, "symmetric")).float(), y[index], index)

    config = ClassifierConfig(images=steps * batch, batch_size=batch, model="cnn")
    network = network.to(memory_format=torch.channels_last)
    return _Training(network, loss_of, config, sampler, {"recipe": recipe})


def lookup_seconds(name: str, images: Tensor, y: Tensor, batch: int, *, steps: int) -> float:
    """What a step spends on which images, on their pixels and on the method's tables: a median."""
    sampler, recipe = _recipe(name, y)
    logits, seconds = torch.zeros(batch, *((2,) if name == "lff" else ()), CLASSES), []
    for step in range(_WARM + steps):
        began = time.perf_counter()
        index = sampler.batch(step, batch)
        gather(images, index, CPU)
        recipe(logits, y[index], index)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[_WARM:])


def measure(count: int, batch: int, *, steps: int = 15) -> Row:
    """Images per second of the generator's training and of four methods', and anonymous memory."""
    accelerator = start(torch.get_num_threads())
    y = torch.arange(count) % CLASSES
    rates, grown, first = {}, {}, None
    with tempfile.TemporaryDirectory() as folder:
        images = mapped_images(Path(folder), count)
        lookups = {
            name: 1e6 * lookup_seconds(name, images, y, batch, steps=20 * steps) for name in METHODS
        }
        for name in ("generator", *METHODS):
            if name == "generator":
                training = _generator(images, y, batch, _WARM + steps + 1)
            else:
                training = _classifier(name, images, y, batch, _WARM + 4 * steps + 1)
            clock = _Clock(training.sampler)
            fit(
                accelerator, training.network, training.loss_of, config=training.config,
                sampler=clock, stage=name, seed=0, log=RunLog(accelerator, None),
                checkpoints=Checkpoints(path=Path(folder) / "none", minutes=1e9),
                show_progress=False, **training.more,
            )  # fmt: skip
            lasted = [after - before for before, after in itertools.pairwise(clock.began[_WARM:])]
            rates[name] = batch / statistics.median(lasted)
            grown[name] = (clock.anonymous[-1] - clock.anonymous[_WARM]) / 1e6
            first = clock.anonymous[_WARM] if first is None else first
    return {
        "images": count, "batch": batch, "images/s": rates, "lookups us": lookups,
        "anonymous MB": first / 1e6, "grown MB": grown,
    }  # fmt: skip


def items() -> Iterator[Item]:
    """Every pair of batch and number of images, each in a process of its own."""
    for batch, count in itertools.product(BATCHES, IMAGES):
        words = ("--images", count, "--batch", batch)
        yield f"scaling {count} {batch}", functools.partial(in_own_process, __file__, *words)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    given = parser.parse_args()
    print(json.dumps(measure(given.images, given.batch)))


if __name__ == "__main__":
    main()
