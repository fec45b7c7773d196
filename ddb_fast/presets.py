"""The presets: complete configurations a person starts from, and where a configuration is found.

ddb is the authors' generator with our corrections; lean, tiny and digits are ours, ever cheaper.
Those of the published data sets are in `benchmark_presets`.
"""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from ddb_fast.benchmark_presets import OF_THE_PAPER, colored_mnist, small_generator
from ddb_fast.config import (
    ClassifierConfig,
    DataConfig,
    DiffusionConfig,
    GroupDROConfig,
    ReweightingConfig,
    RunConfig,
    SamplingConfig,
    UNetConfig,
    from_json,
)


def _ddb() -> RunConfig:
    """The authors' network, schedule and length, with our corrections (each one a field).

    Theirs, to switch back on: `diffusion.pixel_norm imagenet`, `diffusion.class_dropout_per batch`,
    `diffusion.loss_scale authors`, `diffusion.ema_half_life none`, `precision fp32`,
    `sampling.sampler ddpm-authors`, `sampling.clip_x0 false`. They start classifiers from ImageNet:
    `classifier.weights imagenet`, `amplifier.weights imagenet`. 100,000 amplifier images are their
    50 epochs for two classes.
    """
    return RunConfig(
        preset="ddb",
        out="runs/ddb",
        diffusion=DiffusionConfig(
            images=3_200_000,
            batch_size=32,
            lr=2.5e-4,
            warmup=0.1,
            warmup_from=0.4,
            weight_decay=1e-4,
            lr_schedule="cosine-cut",
            grad_clip=1.0,
        ),
        amplifier=ClassifierConfig(
            model="densenet121",
            images=100_000,
            batch_size=64,
            lr=1e-4,
            weight_decay=1e-2,
            image_size=64,
            augment="flip",
        ),
        classifier=ClassifierConfig(
            model="resnet18",
            images=200_000,
            batch_size=64,
            lr=1e-4,
            weight_decay=1e-2,
        ),
        seeds=(0, 1, 2),
    )


def _lean() -> RunConfig:
    """64 pixels, a twentieth of ddb's arithmetic: 15 and not 74 GFLOP an image, a quarter as many.

    Attention where it is cheap (16 and 8 pixels, heads of 64), and what lets a short training
    suffice: v-prediction on the cosine schedule (Salimans & Ho 2022), twice the batch and rate.
    """
    base = _ddb()
    return replace(
        base,
        preset="lean",
        out="runs/lean",
        diffusion=DiffusionConfig(
            unet=UNetConfig(
                channels=64,
                channel_multipliers=(1, 2, 3, 4),
                dropout=0.1,
                attention_levels=(2, 3),
                attention_up=True,
                head_channels=64,
                embedding=256,
                time_table=False,
                resample="conv",
            ),
            images=800_000,
            batch_size=64,
            lr=4e-4,
            warmup=0.02,
            grad_clip=1.0,
            schedule="cosine",
            target="v",
            ema_half_life=50_000,
        ),
    )


def _tiny() -> RunConfig:
    """32 pixels, everything from scratch, about an hour on two CPU cores."""
    return RunConfig(
        preset="tiny",
        out="runs/tiny",
        data=DataConfig(cache_size=40),
        diffusion=DiffusionConfig(
            image_size=32,
            unet=UNetConfig(
                channels=32,
                channel_multipliers=(1, 2, 4),
                blocks_per_level=1,
                dropout=0.1,
                norm_groups=8,
                attention_levels=(2,),
                attention_up=True,
                head_channels=32,
                embedding=128,
                time_table=False,
                resample="conv",
            ),
            images=128_000,
            batch_size=64,
            lr=1e-3,
            warmup=0.02,
            grad_clip=1.0,
            schedule="cosine",
            target="v",
            ema_half_life=10_000,
        ),
        sampling=SamplingConfig(per_class=500),
        amplifier=ClassifierConfig(
            model="cnn",
            images=64_000,
            batch_size=64,
            weight_decay=1e-2,
            image_size=32,
            pixel_norm="symmetric",
            augment="shift-flip",
        ),
        classifier=ClassifierConfig(
            model="cnn",
            images=128_000,
            batch_size=64,
            weight_decay=1e-2,
            image_size=32,
            pixel_norm="symmetric",
            augment="crop-flip",
        ),
    )


def _digits() -> RunConfig:
    """The embedded Colored Digits: 16 pixels, ten classes, two CPU cores, minutes."""
    return RunConfig(
        preset="digits",
        out="runs/digits",
        data=DataConfig(source="digits", cache_size=16),
        diffusion=small_generator(image_size=16, images=48_000),
        # Half the default's steps: every figure the same to one image (docs/cost-quality.md).
        sampling=SamplingConfig(per_class=100, steps=10),
        amplifier=ClassifierConfig(
            model="cnn",
            width=24,
            images=16_000,
            batch_size=64,
            weight_decay=1e-2,
            image_size=16,
            pixel_norm="symmetric",
            augment="shift",
        ),
        classifier=ClassifierConfig(
            model="cnn",
            width=24,
            images=48_000,
            batch_size=64,
            weight_decay=1e-2,
            image_size=16,
            pixel_norm="symmetric",
            augment="none",
        ),
        # Chosen on the validation digits rendered in every colour, after network and length were
        # fixed on ERM alone; the test split took no part.
        group_dro=GroupDROConfig(adjustment=1.0),
        reweighting=ReweightingConfig(moving_average=0.7, class_maximum=True),
        seeds=(0, 1, 2),
    )


def _of_the_paper(make: Callable[[RunConfig], RunConfig]) -> RunConfig:
    return make(_ddb())


PRESETS: dict[str, Callable[[], RunConfig]] = {
    "ddb": _ddb,
    "lean": _lean,
    "tiny": _tiny,
    "digits": _digits,
    "colored-mnist": colored_mnist,
    **{name: partial(_of_the_paper, make) for name, make in OF_THE_PAPER.items()},
}


def load_config(preset_or_path: str) -> RunConfig:
    """A preset by name, or a configuration (or a run's `config.json`) from a JSON file.

    Raises ValueError for a name that is neither, with the presets listed.
    """
    if preset_or_path in PRESETS:
        return PRESETS[preset_or_path]()
    if preset_or_path.endswith(".json") or os.path.isfile(preset_or_path):
        try:
            with open(preset_or_path, encoding="utf-8") as file:
                return from_json(file.read())
        except OSError as error:
            raise ValueError(f"{preset_or_path}: {error.strerror}") from None
        except json.JSONDecodeError as error:
            raise ValueError(f"{preset_or_path}: not JSON ({error})") from None
    raise ValueError(
        f"unknown preset {preset_or_path!r}; known: {', '.join(PRESETS)}, or a .json file"
    )
