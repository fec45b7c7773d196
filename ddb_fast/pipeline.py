"""The road from a biased image set to a debiased classifier, skipping what is done.

diffuse -> sample -> amplify -> score -> one classifier per method and seed -> results and report.
Stages that none of the methods needs are left out.
"""

import json
import logging
import platform
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ddb_fast import report
from ddb_fast.checkpoint import write_atomically
from ddb_fast.classification import (
    import_scores,
    score_images,
    train_amplifier,
)
from ddb_fast.config import CONTROLS, RunConfig
from ddb_fast.context import Context
from ddb_fast.data.listing import Listing
from ddb_fast.data.sources import check_outside, open_listing
from ddb_fast.data.store import ImageData, open_images
from ddb_fast.engine import agree
from ddb_fast.feasible import check_feasible, check_labels
from ddb_fast.fields import flatten
from ddb_fast.generator import (
    import_diffusion,
    import_synthetic,
    read_diffusion_config,
    synthesise,
    train_diffusion,
)
from ddb_fast.memorisation import memorisation
from ddb_fast.methods import identify_errors, retrain_last_layer, train_method
from ddb_fast.opinions import gather_opinions
from ddb_fast.results import collect_results, table
from ddb_fast.run_folder import GIVEN, PRETRAINED, RunFolder, is_copied
from ddb_fast.scoring import Scores, read_scores
from ddb_fast.trackers import RunLog

logger = logging.getLogger(__name__)


def device_name(accelerator: Accelerator) -> str:
    """The devices of the run in words."""
    kind = accelerator.device.type
    name = torch.cuda.get_device_name(accelerator.device) if kind == "cuda" else platform.machine()
    return f"{accelerator.num_processes} x {kind} ({name}), {torch.get_num_threads()} threads"


def describe(data: ImageData) -> str:
    """The data in one line: name, classes, images of each split."""
    splits = ", ".join(f"{len(split)} {name}" for name, split in data.splits.items())
    return f"{data.name}: {len(data.classes)} classes, {splits} images"


def read_data(
    config: RunConfig, path: Path, listing: Listing | None = None, *, progress: bool = False
) -> ImageData:
    """The decoded images of the run in `path`; listing: of its data, where it was made before."""
    return open_images(
        open_listing(config.data) if listing is None else listing,
        image_size=config.diffusion.image_size,
        cache_size=config.data.cache_size,
        cache_dir=path / "cache",
        corrupt=config.data.corrupt,
        progress=progress,
    )


def run_pipeline(config: RunConfig, accelerator: Accelerator, *, machine: str) -> dict[str, Any]:
    """Run every stage of `config` that is not done and write the report.

    Returns the results on the main process, nothing on others. machine: a line on devices and
    precision, shown once the folder has accepted the run.

    Raises:
        ValueError: the data, the folder or a field does not allow the run; nothing is lost.
        OSError: a file could not be written; what was complete stays trusted, the rest is redone.
    """
    main = accelerator.is_main_process
    config = _located(config)
    if "dfr" in config.methods and "erm" not in config.methods:
        logger.info("dfr gives erm's network another last layer: erm is trained and reported too")
        config = replace(config, methods=("erm", *config.methods))
    check_outside(config.data, config.out)
    listing = open_listing(config.data)
    folder = RunFolder(
        config, fingerprint=listing.fingerprint, device=device_name(accelerator), writes=main
    )
    classes, world = len(listing.classes), accelerator.num_processes
    check_feasible(folder.extended(), num_classes=classes, world=world, done=folder.done)
    try:
        folder.lock()
        accelerator.wait_for_everyone()
        folder.open()
        agree(accelerator, folder.known, str(folder.path / "manifest.json"))
        config = folder.extended()
        # Another command may have added methods since; the weights have just been read.
        check_feasible(config, num_classes=classes, world=world, done=lambda stage: True)
        logger.info("%s", machine)
        return _run_stages(config, accelerator, listing, folder)
    finally:
        folder.close()


def _located(config: RunConfig) -> RunConfig:
    """Absolute paths, and the configuration of a generator that was given; ValueError for none."""
    if config.data.path is not None:
        # Links stay: the paths in a table are relative to the folder where the table is named.
        config = replace(
            config, data=replace(config.data, path=str(Path(config.data.path).absolute()))
        )
    for name in GIVEN:
        section = name.partition(".")[0]
        part = getattr(config, section)
        if part.load is None:
            continue
        source = Path(part.load).resolve()
        config = replace(config, **{section: replace(part, load=str(source))})
        copied = is_copied(config, name)
        if copied:
            logger.info("%s: is gone; the run has a copy of its own", source)
        if name == "diffusion.load":
            loaded = read_diffusion_config(Path(config.out, "diffusion") if copied else source)
            config = replace(config, diffusion=replace(loaded, load=str(source)))
        elif name == "pseudo_labels.load" and not copied and not source.is_file():
            raise ValueError(f"{source}: no such file; name a run's amplifier/scores.csv")
    return config


@dataclass(frozen=True)
class Stages:
    """Runs the stages that are not done."""

    folder: RunFolder
    accelerator: Accelerator

    def __call__(
        self, key: str, work: Callable[[], float | None], unfinished: Path | None = None
    ) -> None:
        """Run stage `key` if it is not done; `unfinished` is where it keeps its work meanwhile.

        work returns its seconds, or None to have them measured here.
        """
        folder = self.folder
        main = self.accelerator.is_main_process
        if folder.done(key):
            logger.info("%s: done before", key)
            if main:  # a process that was killed had not come to it
                _remove(unfinished)
            return
        folder.begin(key)
        began = time.monotonic()
        try:
            seconds = work()
        except (ValueError, FloatingPointError, torch.OutOfMemoryError):
            # A stage that refused its input, diverged or found no room binds nobody; one with
            # unfinished work on disk does.
            if unfinished is None or not unfinished.exists():
                folder.forget(key)
            raise
        self.accelerator.wait_for_everyone()
        folder.finish(key, time.monotonic() - began if seconds is None else seconds)
        if main:
            _remove(unfinished)


def _remove(unfinished: Path | None) -> None:
    if unfinished is not None and unfinished.exists():
        shutil.rmtree(unfinished) if unfinished.is_dir() else unfinished.unlink()


def _run_stages(
    config: RunConfig, accelerator: Accelerator, listing: Listing, folder: RunFolder
) -> dict[str, Any]:
    main, path = accelerator.is_main_process, folder.path
    log = RunLog(accelerator, path / "log.jsonl", mirror=config.tracker != "none")
    if config.tracker != "none":
        _init_tracker(config, accelerator)
    began = time.monotonic()
    meta = path / "cache" / "meta.json"
    with accelerator.main_process_first():
        # What was decoded for a command that was refused: nothing else rests on it.
        unbound = main and meta.exists() and not folder.done("data")
        if unbound and listing.fingerprint not in meta.read_text("utf-8", errors="replace"):
            shutil.rmtree(meta.parent)
        data = read_data(config, path, listing, progress=config.progress and main)
    seconds = time.monotonic() - began
    context = Context(config=config, accelerator=accelerator, data=data, log=log)
    logger.info("%s", describe(data))
    check_labels(config, data)
    if not folder.done("data"):
        folder.begin("data")
        folder.finish("data", seconds)
    folder.record()

    stage = Stages(folder, accelerator)
    scores = real_scores = None
    if config.amplifies:
        scores = _amplify(context, stage, path)
        if config.audit:
            _audit(context, stage, path)
    elif config.scored:
        given = path / "amplifier" / "scores.csv"
        stage("scores", lambda: import_scores(context, given))
        scores = read_scores(given, images=len(data.splits["train"]))
    if CONTROLS.intersection(config.methods):
        real_scores = _amplify_real(context, stage, path / "real_amplifier")
    _train_methods(context, stage, path / "classifiers", scores, real_scores)

    results = write_results(path, config, data, folder.seconds()) if main else {}
    if main:
        print(table(results))
        print(f"results: {path / 'results.json'}")
        for shown, name in ((scores, "amplifier"), (real_scores, "real_amplifier")):
            if shown is not None:
                print(f"scores:  {path / name / 'scores.csv'}")
        print(f"report:  {path / 'report.html'}")
    accelerator.wait_for_everyone()
    return results


# By itself it notes the command, the folders and what is printed.
_WANDB = {"settings": {"console": "off", "x_disable_meta": True, "disable_git": True}}


def _init_tracker(config: RunConfig, accelerator: Accelerator) -> None:
    plain = (bool, int, float, str)  # what every tracker takes
    places = {"out", "data.path", *GIVEN, *PRETRAINED}  # nobody's business
    fields = {
        name: value if isinstance(value, plain) else str(value)
        for name, value in flatten(config).items()
        if name not in places
    }
    # wandb holds one run a process: ours would end the caller's.
    if config.tracker == "wandb" and getattr(sys.modules.get("wandb"), "run", None) is not None:
        raise ValueError(
            "tracker wandb: a run of yours is going on in this process; finish it first"
        )
    try:
        accelerator.init_trackers("ddb_fast", config=fields, init_kwargs={"wandb": _WANDB})
    except Exception as error:  # whatever a tracker raises: not logged in, no network
        accelerator.trackers = []  # the end of one that never began hides the reason
        raise ValueError(f"tracker {config.tracker}: {error}") from error


def write_results(
    path: Path, config: RunConfig, data: ImageData, seconds: dict[str, float]
) -> dict[str, Any]:
    """Write results.json and report.html from what the stages left; return the results."""
    scores = real_scores = None
    if config.scored:
        # Those that were given are of the training images alone.
        images = data.count if config.amplifies else len(data.splits["train"])
        scores = read_scores(path / "amplifier" / "scores.csv", images=images)
    if CONTROLS.intersection(config.methods):
        real_scores = read_scores(path / "real_amplifier" / "scores.csv", images=data.count)
    results = collect_results(path, config, data, scores, seconds, real_scores=real_scores)
    write_atomically(path / "results.json", json.dumps(results, indent=2) + "\n")
    report.write(path, config, data, results)
    return results


def _amplify(context: Context, stage: Stages, path: Path) -> Scores:
    """Generator, synthetic images, the amplifier trained on them, its scores of real images."""
    config = context.config
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
    return _score(context, stage, "scores", amplifier)


def _audit(context: Context, stage: Stages, path: Path) -> None:
    """Did the generator copy images? And what the verdict rests on."""
    synthetic, amplifier, audit = path / "synthetic", path / "amplifier", path / "audit"
    images, model = synthetic / "images.safetensors", amplifier / "model.safetensors"
    work = partial(memorisation, context, images, model, path / "memorisation.json")
    main = context.accelerator.is_main_process
    stage("memorisation", lambda: work() if main else None)
    parts = audit / "parts"
    work = partial(
        gather_opinions,
        context,
        synthetic=synthetic,
        amplifier=amplifier,
        folder=audit,
        parts=parts,
    )
    stage("verdict", work, parts)


def _amplify_real(context: Context, stage: Stages, amplifier: Path) -> Scores:
    """The paper's control: the amplifier trained on the real images, and its scores of them."""
    resume = amplifier / "checkpoint.safetensors"
    work = partial(train_amplifier, context, None, amplifier, resume)
    stage("real-amplifier", work, resume)
    return _score(context, stage, "real-scores", amplifier)


def _score(context: Context, stage: Stages, key: str, amplifier: Path) -> Scores:
    model, table_path = amplifier / "model.safetensors", amplifier / "scores.csv"
    main = context.accelerator.is_main_process
    stage(key, lambda: score_images(context, model, table_path) if main else None)
    return read_scores(table_path, images=context.data.count)


def _train_methods(
    context: Context, stage: Stages, path: Path, scores: Scores | None, real_scores: Scores | None
) -> None:
    """One classifier for each method and seed."""
    for seed in context.config.seeds:
        for method in context.config.methods:
            target = path / method / f"seed{seed}"
            if method == "jtt":
                resume = target / "identification_checkpoint.safetensors"
                work = partial(identify_errors, context, seed, target, resume)
                stage(f"jtt-identification/{seed}", work, resume)
            resume = target / "checkpoint.safetensors"
            judged = real_scores if method in CONTROLS else scores
            work = partial(train_method, context, method, seed, target, resume, judged)
            if method == "dfr":  # after erm, which METHODS names first
                work = partial(
                    retrain_last_layer, context, seed, path / "erm" / target.name, target
                )
            stage(f"{method}/seed{seed}", work, resume)
