"""Where a run reports while it works: progress bars, `log.jsonl`, and accelerate's trackers.

Losses stay on the device and are drained every few seconds: reading one each step would stall it.
"""

import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

_DRAIN = 5.0
"""Seconds between two readings of the loss."""


class RunLog:
    """Appends one JSON object a line to `log.jsonl`, mirrored to the chosen accelerate tracker."""

    def __init__(self, accelerator: Accelerator, path: Path | None, *, mirror: bool = False):
        self._accelerator = accelerator
        self._path = path if accelerator.is_main_process else None
        self._mirror = mirror

    def write(self, stage: str, *, step: int | None = None, **values: Any) -> None:
        """Record values of a stage; numbers also go to the tracker as `stage/name`."""
        if self._path is not None:
            row = {"time": round(time.time(), 3), "stage": stage, **values}
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        if self._mirror:
            numbers = {
                f"{stage}/{name}": value
                for name, value in values.items()
                if isinstance(value, int | float)
            }
            self._accelerator.log(numbers, step=step)


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
            self._log.write(self._stage, step=self._images, images=self._images, loss=mean)
        self._sum, self._steps, self._last = None, 0, time.monotonic()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            self.flush()
        finally:
            self._bar.close()
