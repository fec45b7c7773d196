"""The road from a biased image set to a debiased classifier, skipping what is done.

diffuse -> sample -> amplify -> score -> one classifier per method and seed -> results and report.
"""

import json
import logging
import platform
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ddb_fast import report
from ddb_fast.checkpoint import write_atomically
from ddb_fast.classification import (
    Scores,
    read_scores,
    score_images,
    train_amplifier,
    train_method,
)
from ddb_fast.config import RunConfig
from ddb_fast.context import Context
from ddb_fast.data.sources import open_listing
from ddb_fast.data.store import ImageData, open_images
from ddb_fast.generator import (
    import_diffusion,
    import_synthetic,
    read_diffusion_config,
    synthesise,
    train_diffusion,
)
from ddb_fast.results import collect_results, table
from ddb_fast.run_folder import RunFolder
from ddb_fast.trackers import RunLog

logger = logging.getLogger(__name__)

UNAIDED = frozenset({"erm", "group-dro"})
"""Methods that need no amplifier."""


def device_name(accelerator: Accelerator) -> str:
    """The devices of the run in words."""
    kind = accelerator.device.type
    name = torch.cuda.get_device_name(accelerator.device) if kind == "cuda" else platform.machine()
    return f"{accelerator.num_processes} x {kind} ({name}), {torch.get_num_threads()} threads"


def describe(data: ImageData) -> str:
    """The data in one line: name, classes, images of each split."""
    splits = ", ".join(f"{len(split)} {name}" for name, split in data.splits.items())
    return f"{data.name}: {len(data.classes)} classes, {splits} images"


def run_pipeline(config: RunConfig, accelerator: Accelerator, *, machine: str) -> dict[str, Any]:
    """Run every stage of `config` that is not done and write the report; return the results.

    machine: a line on devices and precision, shown once the folder has accepted the run.

    Raises:
        ValueError: the data, the folder or a field does not allow the run; nothing is lost.
        OSError: a file could not be written; what was complete stays trusted, the rest is redone.
    """
    main = accelerator.is_main_process
    if config.diffusion.load is not None:
        loaded = read_diffusion_config(Path(config.diffusion.load))
        config = replace(config, diffusion=replace(loaded, load=config.diffusion.load))
    listing = open_listing(config.data)
    folder = RunFolder(
        config, fingerprint=listing.fingerprint, device=device_name(accelerator), writes=main
    )
    accelerator.wait_for_everyone()
    folder.open()
    accelerator.wait_for_everyone()
    logger.info("%s", machine)
    path = folder.path
    log = RunLog(accelerator, path / "log.jsonl", mirror=config.tracker != "none")
    if config.tracker != "none":
        accelerator.init_trackers("ddb_fast", config={"preset": config.preset})

    def stage(key: str, work: Callable[[], float | None]) -> None:
        if folder.done(key):
            logger.info("%s: done before", key)
            return
        folder.begin(key)
        began = time.monotonic()
        try:
            seconds = work()
        except ValueError:
            folder.forget(key)
            raise
        accelerator.wait_for_everyone()
        folder.finish(key, time.monotonic() - began if seconds is None else seconds)

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
    if "group-dro" in config.methods and data.groups("train") is None:
        raise ValueError("method group-dro needs bias labels: a CSV with a column `a`")

    scores: Scores | None = None
    if not UNAIDED.issuperset(config.methods):
        synthetic, amplifier = path / "synthetic", path / "amplifier"
        if config.sampling.load is not None:
            stage("synthetic", lambda: import_synthetic(context, synthetic))
        else:
            diffusion = path / "diffusion"
            if config.diffusion.load is not None:
                stage("diffusion", lambda: import_diffusion(context, diffusion))
            else:
                stage("diffusion", lambda: train_diffusion(context, diffusion))
            stage("synthetic", lambda: synthesise(context, diffusion, synthetic))
        images = synthetic / "images.safetensors"
        stage("amplifier", lambda: train_amplifier(context, images, amplifier))
        table_path, model = amplifier / "scores.csv", amplifier / "model.safetensors"
        stage("scores", lambda: score_images(context, model, table_path) if main else None)
        scores = read_scores(table_path)

    for seed in config.seeds:
        for method in config.methods:
            target = path / "classifiers" / method / f"seed{seed}"
            stage(
                f"{method}/seed{seed}",
                lambda method=method, seed=seed, target=target: train_method(
                    context, method, seed, target, scores
                ),
            )

    results = collect_results(path, config, data, scores, folder.seconds())
    if main:
        write_atomically(path / "results.json", json.dumps(results, indent=2) + "\n")
        report.write(path, config, data, results)
        print(table(results))
        print(f"results: {path / 'results.json'}\nreport:  {path / 'report.html'}")
    accelerator.wait_for_everyone()
    return results
