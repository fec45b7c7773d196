"""Generation addressed by seed: image k is the same on any device count, batch and interruption.

Each image draws from its own random stream on the CPU, and batches are padded to one size, so that
a convolution's algorithm, which may depend on the batch size, cannot change a bit either.
"""

import logging
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ddb_fast.config import DiffusionConfig, SamplingConfig
from ddb_fast.data.pixels import denormalise, value_range
from ddb_fast.diffusion.guidance import guided
from ddb_fast.diffusion.samplers import (
    sample_ddim,
    sample_ddpm,
    sample_ddpm_authors,
    sample_dpm_solver_pp_2m,
    sample_unipc,
    timesteps,
)
from ddb_fast.diffusion.schedule import Schedule, make_schedule

SAMPLERS = ("ddpm", "ddpm-authors", "ddim", "dpm-solver-pp-2m", "unipc")

logger = logging.getLogger(__name__)


def image_seed(run_seed: int, k: int) -> int:
    """Seed of image k of a run, 0..2^63 - 1; runs with neighbouring seeds share none.

    ValueError for a negative run_seed or k.
    """
    if run_seed < 0 or k < 0:
        raise ValueError(f"no image {k} of a run with seed {run_seed}: both must be >= 0")
    # One bit less, so that seeds fit int64 tensors.
    return int(
        np.random.SeedSequence(run_seed, spawn_key=(k,)).generate_state(1, np.uint64)[0] >> 1
    )


def plan(num_classes: int, per_class: int, run_seed: int) -> tuple[Tensor, Tensor]:
    """Labels and seeds of a synthetic set, (num_classes * per_class,) int64 each.

    Classes take turns, so a set cut short is balanced. ValueError for counts below 1.
    """
    if num_classes < 1 or per_class < 1:
        raise ValueError(f"{per_class} images of {num_classes} classes: both must be at least 1")
    total = num_classes * per_class
    seeds = torch.tensor([image_seed(run_seed, k) for k in range(total)])
    return torch.arange(total) % num_classes, seeds


class PerImageNoise:
    """Standard normal noise whose row i depends on image i's seed and the number of calls only.

    seeds: int each, >= 0; shape: of one image. A call returns (len(seeds), *shape) float32, on the
    CPU. NumPy's generators, because torch's on the CPU uses 32 bits of its seed: among 100,000
    images two would likely be the same.
    """

    def __init__(self, seeds: Iterable[int], shape: tuple[int, ...]) -> None:
        self.streams = [np.random.Generator(np.random.PCG64(int(seed))) for seed in seeds]
        self.shape = shape

    def __call__(self) -> Tensor:
        noise = np.empty((len(self.streams), *self.shape), dtype=np.float32)
        for stream, row in zip(self.streams, noise, strict=True):
            stream.standard_normal(dtype=np.float32, out=row)
        return torch.from_numpy(noise)


def sampling_options(diffusion: DiffusionConfig, sampling: SamplingConfig) -> dict[str, Any]:
    """How a configuration draws images, as `generate_batch` takes it; not which and how many."""
    counts = ("load", "per_class", "batch_size")
    return {name: value for name, value in vars(sampling).items() if name not in counts} | {
        "schedule": make_schedule(diffusion),
        "target": diffusion.target,
        "pixel_norm": diffusion.pixel_norm,
        "image_size": diffusion.image_size,
    }


@torch.inference_mode()
def generate_batch(
    unet: nn.Module,
    y: Tensor,
    seeds: Tensor,
    *,
    schedule: Schedule,
    target: str,
    sampler: str,
    steps: int,
    guidance_scale: float,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    clip_x0: bool,
    clip_percentile: float | None = None,
    pixel_norm: str,
    image_size: int,
    pad_to: int,
) -> Tensor:
    """Images of the classes y from their seeds, (B, 3, image_size, image_size) uint8 on the CPU.

    unet(x, t, y) with an attribute null_class; evaluation mode and autocast are the caller's.
    y, seeds: (B,) int64, B <= pad_to; the batch is filled up to pad_to by repeating the last image.
    sampler: one of SAMPLERS; ddpm-authors walks every timestep whatever `steps`. clip_x0: bring the
    predicted x0 into the range of real pixels; clip_percentile and guidance_interval: see guidance.
    ValueError for unknown names, sizes that do not fit, or images that are not finite.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler {sampler!r} is none of {', '.join(SAMPLERS)}")
    if y.shape != seeds.shape or not 1 <= len(y) <= pad_to:
        raise ValueError(
            f"{tuple(y.shape)} labels and {tuple(seeds.shape)} seeds: must be 1 to {pad_to} of both"
        )
    device = next(unet.parameters()).device
    rows = torch.arange(pad_to).clamp_max(len(y) - 1)
    stream = PerImageNoise(seeds.cpu()[rows].tolist(), (3, image_size, image_size))

    def noise() -> Tensor:
        return stream().to(device, memory_format=torch.channels_last)

    low, high = value_range(pixel_norm)
    denoise = guided(
        unet,
        y.cpu()[rows].to(device),
        guidance_scale=guidance_scale,
        null_class=unet.null_class,
        target=target,
        schedule=schedule,
        guidance_interval=guidance_interval,
        clip=(low.to(device), high.to(device)) if clip_x0 else None,
        clip_percentile=clip_percentile,
    )
    x = noise()
    if sampler == "ddpm-authors":
        x = sample_ddpm_authors(denoise, x, schedule=schedule, noise=noise)
    else:
        walk = timesteps(schedule.timesteps, steps)
        if sampler == "ddpm":
            x = sample_ddpm(denoise, x, schedule=schedule, timesteps=walk, noise=noise)
        elif sampler == "ddim":
            x = sample_ddim(denoise, x, schedule=schedule, timesteps=walk)
        elif sampler == "unipc":
            x = sample_unipc(denoise, x, schedule=schedule, timesteps=walk)
        else:
            x = sample_dpm_solver_pp_2m(denoise, x, schedule=schedule, timesteps=walk)
    x = x[: len(y)]
    if not x.isfinite().all():
        raise ValueError(f"{sampler}: the images are not finite; the diffusion model has diverged")
    return denormalise(x, pixel_norm).cpu().contiguous()


def generate_within_memory(
    unet: nn.Module, y: Tensor, seeds: Tensor, *, at_once: int, **options: Any
) -> tuple[Tensor, int]:
    """`generate_batch`, at_once images at a time and half as many whenever memory does not suffice.

    options: of `generate_batch`, without pad_to. Returns the images and the number that went
    through at once, to begin with next time; all of them were made with it. Smaller batches may
    change images by rounding, where an algorithm depends on the size; each halving is logged.
    ValueError if not even one image fits.
    """
    while True:
        try:
            parts = torch.arange(len(y)).split(at_once)
            images = [
                generate_batch(unet, y[p], seeds[p], pad_to=at_once, **options) for p in parts
            ]
            return torch.cat(images), at_once
        except torch.OutOfMemoryError as error:
            reason = ". ".join(str(error).split(". ")[:2])
        # Below the handler, because until its end the error holds the tensors that filled memory.
        if at_once == 1:
            raise ValueError(f"not even one image can be sampled at once: {reason}")
        logger.warning(
            "sampling %d images at once instead of %d, which may change them by rounding: %s",
            at_once // 2, at_once, reason,
        )  # fmt: skip
        at_once //= 2
        torch.cuda.empty_cache()
