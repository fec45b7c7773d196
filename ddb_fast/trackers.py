"""Where a run reports while it works: progress bars, `log.jsonl`, and accelerate's trackers.

Losses stay on the device and are drained every few seconds: reading one each step would stall it.
"""

import contextlib
import json
import logging
import math
import os
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

logger = logging.getLogger(__name__)

_DRAIN = 5.0
"""Seconds between two readings of the loss."""


def read_log(path: Path) -> dict[str, list[tuple[float, float]]]:
    """(images, loss) of each stage in `log.jsonl`, of its last attempt where there were several."""
    stages: dict[str, list[tuple[float, float]]] = {}
    damaged = 0
    text = path.read_text("utf-8", errors="replace") if path.exists() else ""
    for line in text.splitlines():
        try:
            row = json.loads(line)
            if "loss" in row:
                points = stages.setdefault(row["stage"], [])
                # An attempt that was given up had come further, or was continued from before.
                while points and points[-1][0] >= row["images"]:
                    points.pop()
                points.append((row["images"], row["loss"]))
        except (ValueError, TypeError, KeyError):
            damaged += 1
    if damaged:
        logger.warning("%s: %d lines are cut off or no records, left out", path, damaged)
    return stages


class RunLog:
    """Appends one JSON object a line to `log.jsonl`, mirrored to the chosen accelerate tracker."""

    def __init__(self, accelerator: Accelerator, path: Path | None, *, mirror: bool = False):
        self._accelerator = accelerator
        self._path = path if accelerator.is_main_process else None
        self._mirror = mirror
        earlier = read_log(self._path) if mirror and self._path is not None else {}
        self._earlier = {stage: points[-1][0] for stage, points in earlier.items() if points}
        self._stage: str | None = None
        self._before = self._step = 0

    def write(self, stage: str, *, images: int, loss: float) -> None:
        """Record the loss after so many images of a stage; the tracker's are `stage/loss`, ...

        A tracker's step is the images of all stages up to there, of finished ones too: wandb leaves
        out what does not come after its last step. One that fails is left alone, with a warning.
        """
        if self._path is not None:
            row = {"time": round(time.time(), 3), "stage": stage, "images": images, "loss": loss}
            self._append(json.dumps(row) + "\n")
        if self._mirror:
            if stage != self._stage:
                # At first, what earlier processes showed in stages other than this one.
                others = sum(n for name, n in self._earlier.items() if name != stage)
                self._stage, self._before = stage, self._step or others
            self._step = self._before + images
            numbers = {f"{stage}/images": images, f"{stage}/loss": loss}
            try:
                self._accelerator.log(numbers, step=self._step)
            except Exception as error:  # whatever a tracker raises: a full disk, files gone
                logger.warning("the tracker gets nothing more, the run goes on: %s", error)
                self._mirror, self._accelerator.trackers = False, []

    def _append(self, line: str) -> None:
        """A whole line or nothing; OSError, which names the log, when the disk refuses."""
        before = self._path.stat().st_size if self._path.exists() else 0
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            # Half a line would spoil the next one too, which is put behind it.
            with contextlib.suppress(OSError):
                os.truncate(self._path, before)
            raise OSError(error.errno, error.strerror, str(self._path)) from error


class Progress:
    """A bar in images with the recent loss, on the main process only.

    `update(images, loss)` takes the loss as a device tensor and reads it at most every
    `_DRAIN` seconds, when it also writes a line to the log.
    """

    def __init__(
        self,
        log: RunLog,
        stage: str,
        *,
        total: int,
        start: int = 0,
        shown: bool = True,
    ):
        self._log, self._stage, self._images = log, stage, start
        self._sum: torch.Tensor | None = None
        self._steps = 0
        self._last = time.monotonic()
        self._bar = tqdm(
            total=total,
            initial=start,
            desc=f"{stage:>24}",
            unit="img",
            unit_scale=True,
            disable=not shown,
            mininterval=0.5,
            dynamic_ncols=True,
        )

    def update(self, images: int, loss: torch.Tensor | None = None) -> None:
        self._images += images
        self._bar.update(images)
        if loss is not None:
            detached = loss.detach()
            self._sum = detached if self._sum is None else self._sum + detached
            self._steps += 1
            if time.monotonic() - self._last > _DRAIN:
                self.flush()

    def flush(self) -> None:
        """Read the losses so far; FloatingPointError if their mean is not finite."""
        if self._sum is not None:
            mean = float(self._sum) / self._steps
            if not math.isfinite(mean):
                raise FloatingPointError(
                    f"{self._stage}: the loss is {mean} after {self._images} images; "
                    "a lower learning rate or `--precision fp32`, under another --out, may help"
                )
            self._bar.set_postfix(loss=f"{mean:.4g}", refresh=False)
            self._log.write(self._stage, images=self._images, loss=mean)
        self._sum, self._steps, self._last = None, 0, time.monotonic()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            self.flush()
        finally:
            self._bar.close()
