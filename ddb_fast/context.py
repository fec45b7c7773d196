"""What every stage of a run is given."""

from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator

from ddb_fast.config import RunConfig
from ddb_fast.data.store import ImageData
from ddb_fast.engine import Checkpoints
from ddb_fast.trackers import RunLog


@dataclass(frozen=True, kw_only=True)
class Context:
    """What every stage is given."""

    config: RunConfig
    accelerator: Accelerator
    data: ImageData
    log: RunLog

    def checkpoints(self, path: Path) -> Checkpoints:
        return Checkpoints(
            path=path,
            minutes=self.config.checkpoint_minutes,
            images=self.config.checkpoint_images,
        )

    @property
    def device(self) -> torch.device:
        return self.accelerator.device
