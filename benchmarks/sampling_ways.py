"""What the part `sampling` measures: images from noise, ours beside the authors' way.

With `networks.py`'s forms of a network; with random weights, so only speed can be told.
"""

import functools
import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace

import torch
from measure import Call
from networks import CLASSES, FORMS, Form, build, compiled, in_turns, precision, seconds_of
from rows import Item, Row
from torch import Tensor, nn

from authors_form import ancestral_steps
from ddb_fast.config import DiffusionConfig, SamplingConfig
from ddb_fast.diffusion.generate import generate_batch, sampling_options
from ddb_fast.diffusion.schedule import make_schedule
from ddb_fast.graphs import Forward
from ddb_fast.kernels import use_backend
from ddb_fast.models.unet import UNet

# The authors' steps that a CPU is timed on, of the 999 they take.
_TIMED_STEPS = 20
# The authors' way with our network: the presets' smaller ones are no shape that theirs can have.
AUTHORS_WAY = Form("authors' way", UNet, False, True, attention="reference")
BF16_WAY = Form("authors' way in bf16", UNet, True, True, attention="torch")
COMPILED_WAY = Form("compiled", UNet, True, True, compiled="default", attention="torch")
CPU_WAYS = ("ours", "ours, fp32", "authors", "authors' steps in bf16",
            "authors' steps in bf16, compiled")  # fmt: skip


def our_sampling(
    network: nn.Module, config: DiffusionConfig, sampling: SamplingConfig, y: Tensor, seeds: Tensor
) -> Tensor:
    """A batch of images of the classes y from noise, as the repository samples them."""
    options = sampling_options(config, sampling)
    return generate_batch(network, y, seeds, pad_to=len(y), **options)


def _our_call(
    network: nn.Module, form: Form, config: DiffusionConfig, sampling: SamplingConfig, batch: int
) -> Call:
    y, seeds = torch.arange(batch) % CLASSES, torch.arange(batch)
    device = next(network.parameters()).device

    def call() -> Tensor:
        with precision(form, device):
            return our_sampling(network, config, sampling, y, seeds)

    return call


def authors_sampling(
    network: nn.Module, form: Form, config: DiffusionConfig, y: Tensor, steps: int | None
) -> Call:
    """Images of the classes y by the first steps of the authors' loop, or all, with any network."""
    model = compiled(network, form)
    schedule = make_schedule(config)

    def predict(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        prediction = model(x, t, y).float()
        return prediction if config.target == "eps" else schedule.eps_from_v(x, prediction, t)

    def call() -> Tensor:
        plain = nullcontext()
        if form.attention is not None:
            plain = use_backend(group_norm="torch", attention=form.attention)
        x = torch.randn(len(y), 3, config.image_size, config.image_size, device=y.device)
        with precision(form, y.device), plain:
            return ancestral_steps(
                predict, x, y, null_class=network.null_class, alpha_bar=schedule.alpha_bar,
                steps=steps,
            )  # fmt: skip

    return call


def sampling_row(
    device: torch.device, form: Form, config: DiffusionConfig, batch: int, timed: int
) -> Row:
    """Time images from noise: ours with the repository's sampler, else `timed` authors' steps."""
    torch.compiler.reset()
    network = build(form, config, device).eval()
    if form.network is UNet:
        sampling = SamplingConfig()
        if form.graph and device.type == "cuda":
            network = Forward(network)
        what = f"{sampling.sampler}, {sampling.steps} steps, guidance 2, both branches in one pass"
        timing = seconds_of(device, _our_call(network, form, config, sampling, batch), 3)
        seconds = timing.median
    else:
        walk = config.timesteps - 1
        y = torch.arange(batch, device=device) % CLASSES
        what = f"ancestral, {walk} steps, two passes; {timed} steps timed, the rest extrapolated"
        timing = seconds_of(device, authors_sampling(network, form, config, y, timed), 3)
        seconds = timing.median * walk / timed
    return {
        "form": form.name, "batch": batch, "images/s": batch / seconds,
        "s per 1000 images": 1000 * seconds / batch, "sampler": what,
        "quality": "weights are random: speed only, no aligned share", "how": timing.how,
    }  # fmt: skip


def sampling_items(
    device: torch.device, config: DiffusionConfig, batch: int = 128, timed: int = 5
) -> Iterator[Item]:
    """Images per second of ours, and of the authors' loop with forms of their network."""
    for form in FORMS[:4]:
        yield (
            f"sampling {form.name} {batch}",
            functools.partial(sampling_row, device, form, config, batch, timed),
        )


def cpu_ways(
    config: DiffusionConfig, sampling: SamplingConfig, batch: int, *, steps: int = _TIMED_STEPS
) -> tuple[dict[str, Call], dict[str, float]]:
    """Ways to draw a batch with one network, ours, and how often each has to be called for it.

    Their ways take `steps` of their steps a call. In fp32 they run torch's own operators, attention
    through explicit maps: their form of a network whose shape theirs cannot have.
    """
    torch.compiler.reset()
    network = build(FORMS[0], config, torch.device("cpu")).eval()
    y = torch.arange(batch) % CLASSES
    calls = {
        name: _our_call(network, replace(FORMS[0], bf16=bf16), config, sampling, batch)
        for name, bf16 in zip(CPU_WAYS[:2], (True, False), strict=True)
    }
    for name, form in zip(CPU_WAYS[2:], (AUTHORS_WAY, BF16_WAY, COMPILED_WAY), strict=True):
        calls[name] = authors_sampling(network, form, config, y, steps)
    walk = (config.timesteps - 1) / steps
    return calls, {name: 1.0 if name in CPU_WAYS[:2] else walk for name in CPU_WAYS}


def cpu_sampling_items(
    config: DiffusionConfig, sampling: SamplingConfig, steps: int = _TIMED_STEPS, rounds: int = 3
) -> Iterator[Item]:
    """1,000 images in batches of the configured size, the ways in turns within one row."""

    def row() -> Row:
        calls, walks = cpu_ways(config, sampling, sampling.batch_size, steps=steps)
        batches = math.ceil(1000 / sampling.batch_size)
        what = f"1,000 images of {config.image_size} pixels, {batches} x {sampling.batch_size}"
        times = {name: batches * walk for name, walk in walks.items()}
        return {
            **in_turns(what, calls, rounds, times),
            "extrapolated": f"from one batch, and {config.timesteps - 1} steps from {steps}",
        }

    yield f"sampling 1000 images {config.image_size} pixels", row
