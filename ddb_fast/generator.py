"""The generator's two stages: training the diffusion model and sampling the synthetic set."""

import contextlib
import io
import logging
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from ddb_fast import checkpoint
from ddb_fast.config import DiffusionConfig
from ddb_fast.context import Context
from ddb_fast.data.files import few
from ddb_fast.data.pixels import normalise
from ddb_fast.data.samplers import ShuffledSampler
from ddb_fast.data.sources import list_folder
from ddb_fast.data.store import FITS, gather, in_order, resident
from ddb_fast.diffusion.generate import generate_within_memory, plan, sampling_options
from ddb_fast.diffusion.losses import diffusion_loss
from ddb_fast.diffusion.schedule import make_schedule
from ddb_fast.engine import EMA, fit, step_seed
from ddb_fast.fields import from_dict, to_json
from ddb_fast.graphs import Forward
from ddb_fast.models.authors import read_authors_checkpoint
from ddb_fast.models.unet import UNet, from_authors
from ddb_fast.presets import PRESETS
from ddb_fast.trackers import Progress

logger = logging.getLogger(__name__)

_NAMED = 8


def build_unet(config: DiffusionConfig, num_classes: int) -> UNet:
    """The network of a diffusion configuration."""
    return UNet(config.unet, num_classes=num_classes, timesteps=config.timesteps)


def train_diffusion(context: Context, folder: Path, resume: Path) -> float:
    """Train the class-conditional generator; write `model.safetensors`; return seconds."""
    config, accelerator = context.config.diffusion, context.accelerator
    train = context.data.splits["train"]
    torch.manual_seed(step_seed(context.config.seed, "diffusion", "weights"))
    unet = build_unet(config, len(context.data.classes)).to(context.device)
    images = resident(train.small, context.device)
    y = train.y.to(context.device)
    schedule = make_schedule(config)
    ema = None
    if config.ema_half_life is not None:
        ema = EMA(unet, half_life=config.ema_half_life, rampup=config.ema_rampup)

    def loss_of(model: nn.Module, index: Tensor) -> Tensor:
        x0 = normalise(gather(images, index, context.device), config.pixel_norm)
        return diffusion_loss(
            model,
            x0,
            y[index],
            schedule=schedule,
            null_class=unet.null_class,
            target=config.target,
            class_dropout=config.class_dropout,
            class_dropout_per=config.class_dropout_per,
            loss_scale=config.loss_scale,
            loss_weight=config.loss_weight,
            min_snr_gamma=config.min_snr_gamma,
            batch_size=config.batch_size,
        )

    seconds = fit(
        accelerator,
        unet,
        loss_of,
        config=config,
        sampler=ShuffledSampler(len(train), seed=context.config.seed),
        stage="diffusion",
        seed=context.config.seed,
        log=context.log,
        checkpoints=context.checkpoints(resume / "last.safetensors"),
        ema=ema,
        step_mode=context.config.step,
        images_on_host=images.device.type != context.device.type,
        show_progress=context.config.progress,
    )
    if accelerator.is_main_process:
        save_diffusion(
            folder, ema.tensors if ema else unet.state_dict(), config, context.data.classes
        )
    return seconds


def save_diffusion(
    folder: Path, tensors: dict[str, Tensor], config: DiffusionConfig, classes: tuple[str, ...]
) -> None:
    """Write a generator with everything needed to sample from it."""
    metadata = {"diffusion": asdict(replace(config, load=None)), "classes": list(classes)}
    checkpoint.save_tensors(folder / "model.safetensors", tensors, metadata)


def _description(path: Path) -> tuple[DiffusionConfig, tuple[str, ...]]:
    metadata = checkpoint.read_metadata(path)
    if not {"diffusion", "classes"} <= set(metadata):
        raise ValueError(f"{path}: not a diffusion model written by ddb_fast")
    config = from_dict(DiffusionConfig, metadata["diffusion"], prefix="diffusion.")
    return config, tuple(metadata["classes"])


def read_diffusion_config(folder: Path) -> DiffusionConfig:
    """The configuration of the generator saved in `folder`; ValueError if none is."""
    return _description(folder / "model.safetensors")[0]


def load_diffusion(folder: Path) -> tuple[UNet, DiffusionConfig, tuple[str, ...]]:
    """The generator saved in `folder`, its configuration and class names; ValueError if none is."""
    path = folder / "model.safetensors"
    config, classes = _description(path)
    unet = build_unet(config, len(classes))
    checkpoint.load_into(unet, checkpoint.load_tensors(path)[0], source=str(path))
    return unet.eval(), config, classes


def synthesise(context: Context, diffusion_folder: Path, folder: Path, shards: Path) -> float:
    """Sample the synthetic set, sharded over processes and resumable; return this run's seconds.

    Image k depends on the weights, its label and its own seed only: every batch is padded to the
    configured size, so world size and interruptions do not change a byte. Where memory does not
    suffice for that size, a smaller one is used; every shard's metadata holds its own.
    """
    began = time.monotonic()
    config, accelerator = context.config.sampling, context.accelerator
    unet, diffusion, _ = load_diffusion(diffusion_folder)
    unet.to(context.device)
    graphs = context.device.type == "cuda" and context.config.step != "eager"
    network = Forward(unet) if graphs else unet
    options = sampling_options(diffusion, config)
    labels, seeds = plan(len(context.data.classes), config.per_class, context.config.seed)
    parts = torch.arange(len(labels)).split(config.batch_size)
    shown = context.config.progress and accelerator.is_main_process
    own = range(accelerator.process_index, len(parts), accelerator.num_processes)
    missing = [b for b in own if not (shards / f"{b:06d}.safetensors").exists()]
    total = sum(len(parts[b]) for b in own)
    start = total - sum(len(parts[b]) for b in missing)
    bar = Progress(context.log, "synthetic", total=total, start=start, shown=shown)
    at_once = config.batch_size
    with bar:
        for b in missing:
            part = parts[b]
            with accelerator.autocast():
                images, at_once = generate_within_memory(
                    network, labels[part], seeds[part], at_once=at_once, **options
                )
            shard = {"images": images, "labels": labels[part], "seeds": seeds[part]}
            used = {"batch_size": at_once}
            checkpoint.save_tensors(shards / f"{b:06d}.safetensors", shard, used)
            bar.update(len(part))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        loaded = [
            checkpoint.load_tensors(shards / f"{b:06d}.safetensors")[0] for b in range(len(parts))
        ]
        merged = {name: torch.cat([shard[name] for shard in loaded]) for name in loaded[0]}
        save_synthetic(context, folder, merged)
    return time.monotonic() - began


def save_synthetic(context: Context, folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write `images.safetensors` and a picture of the first images of each class."""
    classes = context.data.classes
    checkpoint.save_tensors(folder / "images.safetensors", tensors, {"classes": list(classes)})
    rows = []
    for label in range(len(classes)):
        row = tensors["images"][tensors["labels"] == label][:10]
        blank = row.new_zeros((10 - len(row), *row.shape[1:]))
        rows.append(torch.cat([*row, *blank], dim=2))
    picture = Image.fromarray(torch.cat(rows, dim=1).permute(1, 2, 0).contiguous().numpy())
    scale = max(1, 48 // tensors["images"].shape[-1])
    picture = picture.resize(
        (picture.width * scale, picture.height * scale), Image.Resampling.NEAREST
    )
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    checkpoint.write_atomically(folder / "grid.png", buffer.getvalue())


def import_diffusion(context: Context, folder: Path) -> None:
    """Take over a trained generator (`--diffusion DIR`): a run's `diffusion/`, or an import."""
    source = Path(context.config.diffusion.load)
    unet, config, classes = load_diffusion(source)
    wanted = tuple(context.data.classes)
    number = _numbers(source, classes, wanted)
    tensors = unet.state_dict()
    table = tensors["class_table.weight"]
    tensors["class_table.weight"] = table[[*number, unet.null_class]]
    if context.accelerator.is_main_process:
        save_diffusion(folder, tensors, config, wanted)


def _numbers(source: Path, classes: tuple[str, ...], wanted: tuple[str, ...]) -> list[int]:
    """The generator's number of each wanted class; ValueError where it generates others."""
    if set(classes) == set(wanted):
        return [classes.index(name) for name in wanted]
    if len(classes) == len(wanted) and classes == tuple(map(str, range(len(classes)))):
        logger.info("%s: its classes have no names; they are taken in the data's order", source)
        return list(range(len(classes)))
    raise ValueError(
        f"{source} generates {len(classes)} classes: {_named(classes)}; the data has "
        f"{len(wanted)}: {_named(wanted)}"
    )


def _named(classes: tuple[str, ...]) -> str:
    """The first few names, shortened."""
    return few([repr(n if len(n) <= 20 else f"{n[:19]}…") for n in classes], _NAMED)


def import_synthetic(context: Context, folder: Path) -> None:
    """Take over synthetic images (`--synthetic DIR`, a folder per class), fitted as the data is."""
    source, classes = context.config.sampling.load, context.data.classes
    # Nothing is held out: every image is synthetic training material.
    listing = list_folder(source, validation_share=0, test_share=0)
    if set(listing.classes) != set(classes):
        raise ValueError(f"{source}: its classes {listing.classes} are not the data's {classes}")
    # By name: folders sort 0, 1, 10, 2 where a CSV's classes count 0, 1, 2.
    number = torch.tensor([classes.index(name) for name in listing.classes])
    size, fitted = context.config.diffusion.image_size, FITS[context.data.fit]
    if context.accelerator.is_main_process:
        decoded = in_order(lambda i: fitted(listing.read(i), size), len(listing))
        with contextlib.closing(decoded):  # its threads end with a file that is broken
            images = torch.stack(list(decoded))
        labels = number[listing.y]
        # No seed made these images; -1 says so where generated ones carry theirs.
        tensors = {"images": images, "labels": labels, "seeds": torch.full_like(labels, -1)}
        save_synthetic(context, folder, tensors)


def import_checkpoint(source: Path, folder: Path, image_size: int) -> str:
    """Convert a checkpoint of the authors' code into a folder for `--diffusion`; say what it is.

    Their weights live in ImageNet-normalised pixels, without a moving average; classes are numbered
    as theirs, which follow the sorted folder names. ValueError for any other file.
    """
    unet = from_authors(read_authors_checkpoint(source)[0])
    classes = tuple(str(label) for label in range(unet.num_classes))
    theirs = replace(
        PRESETS["ddb"]().diffusion,
        unet=unet.config,
        timesteps=unet.timesteps,
        image_size=image_size,
        pixel_norm="imagenet",
        ema_half_life=None,
        loss_scale="authors",
        class_dropout_per="batch",
    )
    save_diffusion(folder, unet.state_dict(), theirs, classes)
    checkpoint.write_atomically(folder / "config.json", to_json(theirs))
    parameters = sum(p.numel() for p in unet.parameters())
    return f"{folder}: {len(classes)} classes, {unet.timesteps} steps, {parameters / 1e6:.1f} M"
