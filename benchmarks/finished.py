"""A finished run's configuration, data and models, for studies that go on from it."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator

from ddb_fast.config import RunConfig, from_json
from ddb_fast.context import Context
from ddb_fast.data.sources import open_listing
from ddb_fast.data.store import open_images
from ddb_fast.trackers import RunLog
from ddb_fast.train import choose_precision


def start(threads: int) -> Accelerator:
    """An Accelerator in the precision that a run takes on this machine, with so many threads."""
    torch.set_num_threads(threads)
    cuda = torch.cuda.is_available()
    precision, _ = choose_precision("auto", exported=None, cuda=cuda)
    return Accelerator(mixed_precision=precision)


def read_config(run: Path) -> RunConfig:
    """The configuration of a run's folder; ValueError if it is none."""
    try:
        return from_json((run / "config.json").read_text("utf-8"))
    except OSError as error:
        raise ValueError(f"{run}: not a run's folder ({error.strerror})") from None


def open_run(run: Path, accelerator: Accelerator) -> Context:
    """What the stages of the run in this folder were given, its decoded images among it.

    Only the cache of decoded images is written, where it is gone. ValueError if it is no run or its
    data has changed.
    """
    config = replace(read_config(run), out=str(run), progress=False)
    listing = open_listing(config.data)
    data = open_images(
        listing,
        image_size=config.diffusion.image_size,
        cache_size=config.data.cache_size,
        cache_dir=run / "cache",
        corrupt=config.data.corrupt,
        progress=False,
    )
    return Context(config=config, accelerator=accelerator, data=data, log=RunLog(accelerator, None))


def write_rows(path: Path, rows: list[dict]) -> None:
    """Write all rows measured so far as JSON, one a line, so that a diff shows what changed."""
    lines = ",\n".join(json.dumps(row) for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"[\n{lines}\n]\n", "utf-8")


def read_rows(path: Path) -> list[dict]:
    """Rows that an earlier call wrote; none where there is no file."""
    return json.loads(path.read_text("utf-8")) if path.exists() else []
