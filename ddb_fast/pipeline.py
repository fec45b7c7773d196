"""The road from a biased image set to a debiased classifier, skipping what is done.

diffuse -> sample -> amplify -> score -> one classifier per method and seed -> results and report.
Stages that none of the methods needs are left out.
"""

import json
import logging
import platform
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ddb_fast import report
from ddb_fast.checkpoint import write_atomically
from ddb_fast.classification import (
    Scores,
    build_network,
    read_scores,
    score_images,
    train_amplifier,
)
from ddb_fast.config import ClassifierConfig, RunConfig
from ddb_fast.context import Context
from ddb_fast.data.listing import Listing
from ddb_fast.data.sources import open_listing
from ddb_fast.data.store import ImageData, open_images
from ddb_fast.diffusion.samplers import timesteps
from ddb_fast.generator import (
    build_unet,
    import_diffusion,
    import_synthetic,
    read_diffusion_config,
    synthesise,
    train_diffusion,
)
from ddb_fast.methods import identify_errors, retrain_last_layer, train_method
from ddb_fast.models.classifiers import linear_head
from ddb_fast.results import collect_results, table
from ddb_fast.run_folder import RunFolder
from ddb_fast.trackers import RunLog

logger = logging.getLogger(__name__)

AMPLIFIED = frozenset({"ddb-i", "ddb-i-error-set", "ddb-i-predicted", "ddb-ii"})
"""Methods that need the amplifier trained on synthetic images."""
CONTROLS = frozenset({"real-amplifier-i", "real-amplifier-ii"})
"""Methods that need the amplifier trained on the real images."""
_FEW = 10
"""A validation group of fewer images is warned of, where something is chosen by groups."""


def device_name(accelerator: Accelerator) -> str:
    """The devices of the run in words."""
    kind = accelerator.device.type
    name = torch.cuda.get_device_name(accelerator.device) if kind == "cuda" else platform.machine()
    return f"{accelerator.num_processes} x {kind} ({name}), {torch.get_num_threads()} threads"


def describe(data: ImageData) -> str:
    """The data in one line: name, classes, images of each split."""
    splits = ", ".join(f"{len(split)} {name}" for name, split in data.splits.items())
    return f"{data.name}: {len(data.classes)} classes, {splits} images"


def check_feasible(config: RunConfig, *, num_classes: int, world: int) -> None:
    """Refuse with ValueError, before anything is trained, what would only fail at its stage."""
    parts = {"classifier": config.classifier}
    if (AMPLIFIED | CONTROLS).intersection(config.methods):
        parts["amplifier"] = config.amplifier
    if AMPLIFIED.intersection(config.methods) and config.sampling.load is None:
        with torch.device("meta"):
            build_unet(config.diffusion, num_classes)
        if config.sampling.sampler != "ddpm-authors":
            timesteps(config.diffusion.timesteps, config.sampling.steps)
        if config.diffusion.load is None:
            parts["diffusion"] = config.diffusion
    for name, part in parts.items():
        if part.batch_size % (world * part.accumulate):
            raise ValueError(
                f"{name}.batch_size {part.batch_size} is not a multiple of {world} devices x "
                f"{part.accumulate} accumulated"
            )
        if isinstance(part, ClassifierConfig):
            with torch.device("meta"):
                network = build_network(replace(part, weights=None), num_classes)
            if name == "classifier" and "dfr" in config.methods:
                linear_head(network)
            if part.weights not in (None, "imagenet") and not Path(part.weights).is_file():
                raise ValueError(f"{name}.weights: no file {part.weights}")


def check_labels(config: RunConfig, data: ImageData) -> None:
    """Refuse with ValueError methods that need labels or splits which the data lacks."""
    for method in ("group-dro", "dfr"):
        if method in config.methods and data.groups("train") is None:
            raise ValueError(f"method {method} needs bias labels: a CSV with a column `a`")
    if config.selection != "last":
        if "val" not in data.splits:
            raise ValueError(f"selection {config.selection} needs a validation split; use last")
        if config.selection != "average_accuracy" and data.groups("train") is None:
            raise ValueError(f"selection {config.selection} needs bias labels; use last")
    if "dfr" in config.methods:
        present = set(data.splits["val"].y.tolist()) if "val" in data.splits else set()
        absent = [name for c, name in enumerate(data.classes) if c not in present]
        if absent:
            raise ValueError(
                f"method dfr needs a validation split with every class: none of {absent[0]}"
            )
    _check_validation_groups(config, data)


def _check_validation_groups(config: RunConfig, data: ImageData) -> None:
    """Refuse with ValueError what chooses by groups where validation lacks one side of the bias.

    A warning names the smallest validation group of those in training, where it is small.
    """
    choosing = []
    if config.selection in ("unbiased_accuracy", "worst_group_accuracy"):
        choosing.append((f"selection {config.selection}", "use last"))
    if "dfr" in config.methods:
        choosing.append(("method dfr", "leave it out"))
    for what, instead in choosing:
        groups, trained = data.groups("val"), data.groups("train").counts > 0
        for aligned, lacking in ((True, "aligned"), (False, "conflicting")):
            if not (groups.bias_aligned == aligned).any():
                raise ValueError(
                    f"{what} needs bias-aligned and bias-conflicting images in the validation "
                    f"split: none of its {len(groups)} is {lacking}; {instead}"
                )
        size, group = min((groups.counts[g].item(), g) for g in trained.nonzero()[:, 0].tolist())
        if size < _FEW:
            noun = "image" if size == 1 else "images"
            logger.warning(
                "%s rests on small groups of the validation split: %s has %d %s",
                what, groups.names[group], size, noun,
            )  # fmt: skip


def run_pipeline(config: RunConfig, accelerator: Accelerator, *, machine: str) -> dict[str, Any]:
    """Run every stage of `config` that is not done and write the report; return the results.

    machine: a line on devices and precision, shown once the folder has accepted the run.

    Raises:
        ValueError: the data, the folder or a field does not allow the run; nothing is lost.
        OSError: a file could not be written; what was complete stays trusted, the rest is redone.
    """
    main = accelerator.is_main_process
    if config.diffusion.load is not None:
        source = Path(config.diffusion.load).resolve()
        loaded = read_diffusion_config(source)
        config = replace(config, diffusion=replace(loaded, load=str(source)))
    if config.sampling.load is not None:
        source = Path(config.sampling.load).resolve()
        config = replace(config, sampling=replace(config.sampling, load=str(source)))
    if "dfr" in config.methods and "erm" not in config.methods:
        logger.info("dfr gives erm's network another last layer: erm is trained and reported too")
        config = replace(config, methods=("erm", *config.methods))
    listing = open_listing(config.data)
    folder = RunFolder(
        config, fingerprint=listing.fingerprint, device=device_name(accelerator), writes=main
    )
    config = folder.extended()
    check_feasible(config, num_classes=len(listing.classes), world=accelerator.num_processes)
    accelerator.wait_for_everyone()
    try:
        folder.open()
        accelerator.wait_for_everyone()
        logger.info("%s", machine)
        return _run_stages(config, accelerator, listing, folder)
    finally:
        folder.close()


def _run_stages(
    config: RunConfig, accelerator: Accelerator, listing: Listing, folder: RunFolder
) -> dict[str, Any]:
    main, path = accelerator.is_main_process, folder.path
    log = RunLog(accelerator, path / "log.jsonl", mirror=config.tracker != "none")
    if config.tracker != "none":
        accelerator.init_trackers("ddb_fast", config={"preset": config.preset})

    def stage(key: str, work: Callable[[], float | None], unfinished: Path | None = None) -> None:
        """Run a stage that is not done; `unfinished` is where it keeps its work meanwhile."""
        if folder.done(key):
            logger.info("%s: done before", key)
            return
        first = folder.begin(key)
        began = time.monotonic()
        try:
            seconds = work()
        except ValueError:
            # A stage that refused its input binds nobody; one with unfinished work on disk does.
            if first and not (unfinished is not None and unfinished.exists()):
                folder.forget(key)
            raise
        accelerator.wait_for_everyone()
        folder.finish(key, time.monotonic() - began if seconds is None else seconds)
        if main and unfinished is not None and unfinished.exists():
            shutil.rmtree(unfinished) if unfinished.is_dir() else unfinished.unlink()

    began = time.monotonic()
    with accelerator.main_process_first():
        data = open_images(
            listing,
            image_size=config.diffusion.image_size,
            cache_size=config.data.cache_size,
            cache_dir=path / "cache",
            corrupt=config.data.corrupt,
            progress=config.progress and main,
        )
    if not folder.done("data"):
        folder.begin("data")
        folder.finish("data", time.monotonic() - began)
    context = Context(config=config, accelerator=accelerator, data=data, log=log)
    logger.info("%s", describe(data))
    check_labels(config, data)
    folder.record()

    scores: Scores | None = None
    if AMPLIFIED.intersection(config.methods):
        synthetic, amplifier = path / "synthetic", path / "amplifier"
        if config.sampling.load is not None:
            stage("synthetic", lambda: import_synthetic(context, synthetic))
        else:
            diffusion = path / "diffusion"
            if config.diffusion.load is not None:
                stage("diffusion", lambda: import_diffusion(context, diffusion))
            else:
                resume = diffusion / "checkpoints"
                stage("diffusion", lambda: train_diffusion(context, diffusion, resume), resume)
            shards = synthetic / "shards"
            stage("synthetic", lambda: synthesise(context, diffusion, synthetic, shards), shards)
        images = synthetic / "images.safetensors"
        resume = amplifier / "checkpoint.safetensors"
        stage("amplifier", lambda: train_amplifier(context, images, amplifier, resume), resume)
        table_path, model = amplifier / "scores.csv", amplifier / "model.safetensors"
        stage("scores", lambda: score_images(context, model, table_path) if main else None)
        scores = read_scores(table_path)
    real_scores: Scores | None = None
    if CONTROLS.intersection(config.methods):
        amplifier = path / "real_amplifier"
        resume = amplifier / "checkpoint.safetensors"
        work = partial(train_amplifier, context, None, amplifier, resume)
        stage("real-amplifier", work, resume)
        files = amplifier / "model.safetensors", amplifier / "scores.csv"
        stage("real-scores", lambda: score_images(context, *files) if main else None)
        real_scores = read_scores(amplifier / "scores.csv")

    for seed in config.seeds:
        for method in config.methods:
            target = path / "classifiers" / method / f"seed{seed}"
            if method == "jtt":
                resume = target / "identification_checkpoint.safetensors"
                work = partial(identify_errors, context, seed, target, resume)
                stage(f"jtt-identification/{seed}", work, resume)
            resume = target / "checkpoint.safetensors"
            verdict = real_scores if method in CONTROLS else scores
            work = partial(train_method, context, method, seed, target, resume, verdict)
            if method == "dfr":  # after erm, which METHODS names first
                erm = path / "classifiers" / "erm" / f"seed{seed}"
                work = partial(retrain_last_layer, context, seed, erm, target)
            stage(f"{method}/seed{seed}", work, resume)

    results = collect_results(path, config, data, scores, folder.seconds(), real_scores=real_scores)
    if main:
        write_atomically(path / "results.json", json.dumps(results, indent=2) + "\n")
        report.write(path, config, data, results)
        print(table(results))
        print(f"results: {path / 'results.json'}")
        for shown, name in ((scores, "amplifier"), (real_scores, "real_amplifier")):
            if shown is not None:
                print(f"scores:  {path / name / 'scores.csv'}")
        print(f"report:  {path / 'report.html'}")
    accelerator.wait_for_everyone()
    return results
