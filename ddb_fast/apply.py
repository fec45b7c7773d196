"""A finished run applied: scores of any images, and images of its generator."""

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from tqdm.auto import tqdm

from ddb_fast.checkpoint import whole_folder
from ddb_fast.classification import load_classifier
from ddb_fast.config import DataConfig, SamplingConfig
from ddb_fast.data.listing import SPLITS
from ddb_fast.data.store import FITS
from ddb_fast.data.unseen import batches, list_images
from ddb_fast.diffusion.generate import plan
from ddb_fast.generator import load_diffusion
from ddb_fast.pretrained import FORMAT, Generator
from ddb_fast.provenance import FinishedRun, read_json
from ddb_fast.scoring import (
    EVALUATION_BATCH,
    ScoreTable,
    joined,
    logits_of,
    read_scores,
    table_of,
    training_statistics,
)

logger = logging.getLogger(__name__)

_PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


# --- scores ------------------------------------------------------------------------------------


def score(
    run: FinishedRun,
    data: DataConfig,
    *,
    corrupt: str,
    device: torch.device,
    splits: Sequence[str] = (*SPLITS, ""),
    progress: bool = True,
) -> ScoreTable:
    """Score images with a run's amplifier, by the rule and statistics of its own scores.csv.

    splits: of which images, "" for those of none. progress: bars on terminals. corrupt: error, or
    skip to leave broken images out. ValueError, one line, for a run without an amplifier, images
    that are not there, and classes that it does not know.
    """
    if not {"amplifier", "scores"} <= run.done:
        raise ValueError(run.without("bias amplifier"))
    network, config, classes = load_classifier(run.path / "amplifier" / "model.safetensors")
    network.to(device)
    trained = read_scores(run.path / "amplifier" / "scores.csv", images=run.decoded)
    statistics = training_statistics(
        trained.loss, trained.predicted, trained.y, classes, run.config.pseudo_labels
    )
    if single := [name for c, name in enumerate(classes) if (trained.y == c).sum() == 1]:
        logger.warning(
            "class %s: one training image, whose loss has no deviation: scores of the class say "
            "nothing",
            ", ".join(single),
        )
    images = list_images(data, classes)
    if not images.labelled:
        logger.warning(
            "%s: no labels, so no scores: a score compares the loss of the label; predictions and "
            "probabilities are written",
            images.name,
        )
    fitted = partial(FITS[_fit(run)], size=run.config.diffusion.image_size)
    tables = []
    for split in splits:
        for part, pixels in batches(
            images.split(split),
            fitted,
            size=EVALUATION_BATCH,
            corrupt=corrupt,
            title=f"score {split}",
            progress=progress,
        ):
            logits = logits_of(network, pixels, config, device=device, crop=False)
            y = torch.tensor([entry.y for entry in part]) if images.labelled else None
            paths = [entry.path for entry in part]
            tables.append(table_of(logits, statistics, paths=paths, split=split, y=y))
    if not tables:
        raise ValueError(f"{images.name}: none of its {len(images)} images can be read")
    return joined(tables)


def _fit(run: FinishedRun) -> str:
    """How the run made the amplifier's pixels: a property of its data, noted beside them."""
    try:
        return read_json(run.path / "cache" / "meta.json").get("fit", "squash")
    except ValueError as error:
        raise ValueError(f"{error}; the run's own command makes it again") from None


# --- images ------------------------------------------------------------------------------------


def open_generator(path: Path) -> tuple[Generator, int, str]:
    """A generator, and the seed and precision to sample with.

    path: a run's folder; one that `Generator.save_pretrained` wrote; or any with model.safetensors,
    a run's `diffusion` or an import, for which the sampler's own defaults hold. ValueError if it is
    none of them.
    """
    if (path / "manifest.json").is_file():
        run = FinishedRun.open(path)
        return Generator.from_run(path), run.config.seed, run.config.precision
    if not (path / "model.safetensors").is_file():
        raise ValueError(f"{path}: no run, and no model.safetensors of a generator")
    described = path / "config.json"
    if described.is_file() and read_json(described).get("kind") is not None:
        return Generator.from_pretrained(path), 0, "fp32"
    unet, config, classes = load_diffusion(path)
    model = Generator(
        format=FORMAT,
        kind=Generator.kind,
        classes=classes,
        network=asdict(config),
        sampling=asdict(SamplingConfig()),
        run={},
    )
    model.network.load_state_dict(unet.state_dict())
    return model.eval(), 0, "fp32"


def sample(
    path: Path,
    out: Path,
    *,
    classes: Sequence[str] | None = None,
    per_class: int | None = None,
    seed: int | None = None,
    guidance_scale: float | None = None,
    steps: int | None = None,
    device: torch.device,
) -> int:
    """Draw images of a generator into `out`, a new folder with one a class; return how many.

    What is not given is as in the run, so that nothing given draws its synthetic set again, bit
    for bit. File k.png is image k of the set of this seed, whichever classes are asked for; fewer
    images than the run's fill smaller batches, so theirs may differ in rounding. `out` is as
    `whole_folder` has it. ValueError, one line, for everything a user can get wrong.
    """
    generator, own_seed, precision = open_generator(path)
    names, own = generator.classes, generator.sampling
    for name in classes or ():
        if name not in names:
            raise ValueError(f"{path}: generates no class {name!r}, only {', '.join(names)}")
    asked = set(classes or names)
    chosen = [name for name in names if name in asked]
    if guidance_scale is not None and not (math.isfinite(guidance_scale) and guidance_scale >= 0):
        raise ValueError(f"guidance scale {guidance_scale}: must be at least 0 (1: no guidance)")
    labels, seeds = plan(
        len(names),
        own.per_class if per_class is None else per_class,
        own_seed if seed is None else seed,
    )
    is_chosen = torch.tensor([name in asked for name in names])
    wanted = is_chosen[labels].nonzero()[:, 0]
    size = own.batch_size
    if len(wanted) < own.per_class * len(names):
        size = min(size, len(wanted))
    generator.to(device)
    with whole_folder(out) as temporary:
        for name in chosen:
            (temporary / name).mkdir(parents=True)
        with tqdm(total=len(wanted), desc=f"{'sample':>24}", unit="img", disable=None) as bar:
            for part in wanted.split(size):
                # As accelerate does in a run.
                with torch.autocast(
                    device.type, _PRECISIONS.get(precision), enabled=precision in _PRECISIONS
                ):
                    images = generator.sample(
                        labels[part],
                        seeds[part],
                        guidance_scale=guidance_scale,
                        steps=steps,
                        batch_size=size,
                    )
                for k, image in zip(part.tolist(), images.permute(0, 2, 3, 1), strict=True):
                    folder = temporary / names[labels[k]]
                    Image.fromarray(image.contiguous().numpy()).save(folder / f"{k:06d}.png")
                bar.update(len(part))
    return len(wanted)
