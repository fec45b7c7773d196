"""Classifiers: built, trained, saved and asked; the amplifier and its scores of real images."""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from ddb_fast import checkpoint
from ddb_fast.config import ClassifierConfig
from ddb_fast.context import Context
from ddb_fast.data.augment import augment
from ddb_fast.data.files import read_table
from ddb_fast.data.pixels import normalise
from ddb_fast.data.samplers import ShuffledSampler
from ddb_fast.data.store import gather, resident
from ddb_fast.engine import Sampler, Selection, fit, step_seed
from ddb_fast.fields import from_dict
from ddb_fast.models.classifiers import (
    build_classifier,
    channels_last,
    linear_head,
    load_pretrained,
)
from ddb_fast.recipes import ERM
from ddb_fast.scoring import (
    COLUMNS,
    EVALUATION_BATCH,
    joined,
    logits_of,
    loss_of_label,
    table_of,
    training_statistics,
)


def bare_network(config: ClassifierConfig, num_classes: int) -> nn.Module:
    """The network of a classifier's configuration, channels_last, with random weights."""
    network = build_classifier(
        config.model, num_classes, image_size=config.image_size, width=config.width
    )
    return channels_last(network)


def build_network(config: ClassifierConfig, num_classes: int) -> nn.Module:
    """The same with the weights that are configured."""
    network = bare_network(config, num_classes)
    if config.weights is not None:
        load_pretrained(network, config.weights, name=config.model, image_size=config.image_size)
    return network


def first_network(config: ClassifierConfig, num_classes: int, *, seed: int) -> nn.Module:
    """A network before training, a function of the seed: every method of one starts from it."""
    torch.manual_seed(step_seed(seed, "classifier", "weights"))
    return build_network(config, num_classes)


def train_classifier(
    context: Context,
    network: nn.Module,
    config: ClassifierConfig,
    images: Tensor,
    y: Tensor,
    *,
    recipe: nn.Module,
    sampler: Sampler,
    stage: str,
    seed: int,
    resume: Path,
    clipped: Sequence[nn.Module] = (),
    stop_at: int | None = None,
    selection: Selection | None = None,
    whole: bool = False,
) -> float:
    """Train a network in place on uint8 NHWC images; leave it in eval mode, return the seconds.

    `recipe(logits, y, index)` is the loss; `resume` is where the training state is kept meanwhile;
    `clipped`, `stop_at` and `selection` are the engine's.
    whole: images are resized, never cropped to their centre, as the amplifier's are when scored.
    ValueError, and no state kept, for a network that diverged.
    """
    device = context.device
    network.to(device)
    images, y = resident(images, device), y.to(device)
    recipe.to(device)

    def loss_of(model: nn.Module, index: Tensor) -> Tensor:
        batch = gather(images, index, device)
        pixels = augment(batch, config.augment, size=config.image_size, whole=whole)
        return recipe(model(normalise(pixels, config.pixel_norm)).float(), y[index], index)

    seconds = fit(
        context.accelerator,
        network,
        loss_of,
        config=config,
        sampler=sampler,
        stage=stage,
        seed=seed,
        log=context.log,
        checkpoints=context.checkpoints(resume),
        recipe=recipe,
        clipped=clipped,
        stop_at=stop_at,
        selection=selection,
        step_mode=context.config.step,
        images_on_host=images.device.type != device.type,
        show_progress=context.config.progress,
    )
    # The last step's loss is that of the weights before it, and batch norm hides much from it.
    answers = logits_of(network, images[:EVALUATION_BATCH], config, device=device, crop=not whole)
    if not answers.isfinite().all():
        if context.accelerator.is_main_process:
            resume.unlink(missing_ok=True)
        part = "amplifier" if whole else "classifier"
        raise ValueError(f"{stage}: the {part} diverged; lower --{part}.lr")
    return seconds


def save_classifier(
    path: Path, network: nn.Module, config: ClassifierConfig, classes: Sequence[str]
) -> None:
    """Write a classifier with what is needed to use it."""
    metadata = {"classifier": asdict(config), "classes": list(classes)}
    checkpoint.save_tensors(path, network.state_dict(), metadata)


def load_classifier(path: Path) -> tuple[nn.Module, ClassifierConfig, tuple[str, ...]]:
    """A saved classifier in eval mode, its configuration and class names; ValueError if none is."""
    tensors, metadata = checkpoint.load_tensors(path)
    if not {"classifier", "classes"} <= set(metadata):
        raise ValueError(f"{path}: not a classifier written by ddb_fast")
    config = from_dict(ClassifierConfig, metadata["classifier"], prefix="classifier.")
    network = bare_network(config, len(metadata["classes"]))
    checkpoint.load_into(network, tensors, source=str(path))
    return network.eval(), config, tuple(metadata["classes"])


def features_of(
    network: nn.Module,
    images: Tensor,
    config: ClassifierConfig,
    *,
    device: torch.device,
    crop: bool = True,
) -> Tensor:
    """What a classifier's last layer is given, (N, D) fp32 on the CPU; images, crop: `logits_of`'s.

    ValueError where the last layer is given anything but a row an image.
    """
    batches = []

    def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        batches.append(inputs[0].float().cpu())

    hook = linear_head(network).register_forward_pre_hook(keep)
    try:
        logits_of(network, images, config, device=device, crop=crop)
    finally:
        hook.remove()
    features = torch.cat(batches)
    if features.ndim != 2:
        raise ValueError(f"{config.model}: features {tuple(features.shape)} have no one row each")
    return features


# --- amplifier ---------------------------------------------------------------------------------


def train_amplifier(context: Context, synthetic: Path | None, folder: Path, resume: Path) -> float:
    """Train the bias amplifier on synthetic images alone; write it; return seconds.

    synthetic: None for the paper's control, an amplifier of the same recipe, length and view of the
    images that is trained on the real training images instead.
    """
    if synthetic is None:
        train = context.data.splits["train"]
        images, y, stage = train.small, train.y, "real amplifier"
    else:
        tensors, _ = checkpoint.load_tensors(synthetic)
        images, y = tensors["images"].permute(0, 2, 3, 1).contiguous(), tensors["labels"]
        stage = "amplifier"
    config, seed = context.config.amplifier, context.config.seed
    network = first_network(config, len(context.data.classes), seed=seed)
    seconds = train_classifier(
        context,
        network,
        config,
        images,
        y,
        whole=True,
        recipe=ERM(),
        sampler=ShuffledSampler(len(y), seed=seed),
        stage=stage,
        seed=seed,
        resume=resume,
    )
    if context.accelerator.is_main_process:
        save_classifier(folder / "model.safetensors", network, config, context.data.classes)
    return seconds


def score_images(context: Context, amplifier: Path, path: Path) -> None:
    """Score every real image of every split; write `scores.csv`.

    Score and threshold use the statistics of the training split.
    """
    network, config, classes = load_classifier(amplifier)
    data = context.data
    if classes != tuple(data.classes):
        raise ValueError(f"{amplifier}: its classes {classes} are not those of the data")
    network.to(context.device)
    logits = {
        name: logits_of(network, split.small, config, device=context.device, crop=False)
        for name, split in data.splits.items()
    }
    y = data.splits["train"].y
    statistics = training_statistics(
        loss_of_label(logits["train"], y),
        logits["train"].argmax(1),
        y,
        classes,
        context.config.pseudo_labels,
    )
    tables = [
        table_of(logits[name], statistics, paths=split.paths, split=name, y=split.y)
        for name, split in data.splits.items()
    ]
    joined(tables).write(path, probabilities=False)


def import_scores(context: Context, path: Path) -> None:
    """Take over scores of the training images (`--scores FILE`), after a look at what they are of.

    Every training image needs one row with its path and class; rows of other images are left out.
    ValueError as `read_table`, and it names the first that is missing, doubled or of another class.
    """
    source, train = Path(context.config.pseudo_labels.load), context.data.splits["train"]
    rows, known = {}, dict(zip(train.paths, train.y.tolist(), strict=True))
    for where, row in read_table(source, COLUMNS[2:]):
        if row["path"] in rows:
            raise ValueError(f"{where}: {row['path']} stands there twice")
        if row["path"] in known:
            rows[row["path"]] = row
    for name, y in known.items():
        if name not in rows:
            raise ValueError(f"{source}: no row of training image {name}")
        if rows[name]["y"] != str(y):
            raise ValueError(f"{source}: {name} is of class {rows[name]['y']} there, {y} here")
    valid = {
        "loss": lambda text: 0 <= float(text) < math.inf,
        "score": lambda text: math.isfinite(float(text)),
        "predicted": lambda text: 0 <= int(text) < len(context.data.classes),
        "pseudo_conflicting": lambda text: text in ("0", "1"),
    }
    for name, row in rows.items():
        for column, holds in valid.items():
            try:
                fine = holds(row[column])
            except (TypeError, ValueError):
                fine = False
            if not fine:
                told = f"a figure is missing or out of range: {column} is {row[column]!r}"
                raise ValueError(f"{source}: {name}: {told}")
    if context.accelerator.is_main_process:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        for index, name in enumerate(train.paths):
            writer.writerow({**rows[name], "index": index, "split": "train"})
        checkpoint.write_atomically(path, text.getvalue())
