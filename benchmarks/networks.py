"""What the parts `step` and `sampling` measure: whole networks, ours beside the authors' form.

The authors' form is the network of their generator in fp32 and NCHW with explicit attention,
trained with the same optimiser and sampled in two forward passes a step. The network itself is
`tests/authors_network.py`, which our U-Net is tested against.
"""

import functools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from checkout import ROOT
from measure import Timing
from rows import Item, Row
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ddb_fast.config import DiffusionConfig
from ddb_fast.diffusion.generate import generate_batch
from ddb_fast.diffusion.guidance import guided
from ddb_fast.diffusion.losses import diffusion_loss
from ddb_fast.diffusion.schedule import make_schedule
from ddb_fast.engine import EMA, build_optimizer
from ddb_fast.models.unet import UNet
from ddb_fast.presets import PRESETS

sys.path.append(str(ROOT / "tests"))
from authors_network import Authors

CLASSES = 2
# The authors' steps that are timed, of the 999 they take.
_TIMED_STEPS = 20


class WithSDPA(Authors):
    """The authors' network with torch's fused attention, for channels_last and torch.compile."""

    @staticmethod
    def res(block: nn.ModuleDict, x: Tensor, time: Tensor, label: Tensor) -> Tensor:
        h = block["block1"](x)
        h = h + block["temb_proj"](time)[:, :, None, None]
        h = h + block["cond_proj"](label)[:, :, None, None]
        h = block["block2"](h) + block["shortcut"](x)
        if isinstance(block["attn"], nn.Identity):
            return h
        normed = block["attn"]["group_norm"](h)
        q, k, v = (
            block["attn"][f"proj_{letter}"](normed).flatten(2).mT[:, None] for letter in "qkv"
        )
        o = F.scaled_dot_product_attention(q, k, v)[:, 0]
        return h + block["attn"]["proj"](o.mT.unflatten(2, h.shape[2:]))


@dataclass(frozen=True)
class Form:
    """How a network is run: which one, in what precision and layout, compiled in which mode."""

    name: str
    network: type[nn.Module]
    bf16: bool
    channels_last: bool
    tf32: bool = True
    compiled: str | None = None


FORMS = (
    Form("ours", UNet, True, True),
    Form("authors", Authors, False, False),
    Form("authors, TF32 off", Authors, False, False, tf32=False),
    Form("eager bf16, channels_last, SDPA", WithSDPA, True, True),
    Form("ours, compiled", UNet, True, True, compiled="default"),
    Form("compile max-autotune, bf16, channels_last, SDPA", WithSDPA, True, True,
         compiled="max-autotune"),
)  # fmt: skip


def build(form: Form, config: DiffusionConfig, device: torch.device) -> nn.Module:
    """The network of a form, with weights that no layer of it ignores."""
    torch.manual_seed(0)
    if form.network is UNet:
        network = UNet(config.unet, num_classes=CLASSES, timesteps=config.timesteps)
    else:
        unet = config.unet
        network = form.network(
            timesteps=config.timesteps,
            classes=CLASSES,
            channels=unet.channels,
            multipliers=unet.channel_multipliers,
            blocks=unet.blocks_per_level,
            attends=[
                level in unet.attention_levels for level in range(len(unet.channel_multipliers))
            ],
        )
        # Theirs keeps the null class in row 0, ours in the last; any row costs the same.
        network.null_class = CLASSES
    network.to(device)
    return network.to(memory_format=torch.channels_last) if form.channels_last else network


def forward_flops(config: DiffusionConfig) -> int:
    """Floating-point operations of a forward pass for one image, products only."""
    with torch.device("meta"):
        network = build(FORMS[1], config, torch.device("meta")).eval()
        x = torch.empty(1, 3, config.image_size, config.image_size)
        t = torch.zeros(1, dtype=torch.int64)
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            network(x, t, t)
    return counter.get_total_flops()


@contextmanager
def _precision(form: Form, device: torch.device) -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = form.tf32
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=form.bf16):
            yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def seconds_of(device: torch.device, call: Callable[[], object], rounds: int) -> Timing:
    """Wall-clock time of a call that is waited for, after two that are not counted."""
    seconds = []
    for i in range(rounds + 2):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if i >= 2:
            seconds.append(time.perf_counter() - start)
    return Timing.of(seconds, f"{rounds} calls, waited for")


@functools.cache
def matmul_ceiling(device: torch.device, size: int) -> float:
    """FLOP/s of a bf16 matrix product of `size` squared, measured once in this process."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = statistics.median(
        seconds_of(device, lambda: [a @ b for _ in range(20)], 5).median / 20 for _ in range(3)
    )
    return 2 * size**3 / seconds


def step_row(
    device: torch.device, form: Form, config: DiffusionConfig, batch: int, ceiling: int
) -> Row:
    """Time a training step: loss, backward, clipping, optimiser and, in ours, moving average."""
    torch.compiler.reset()
    network = build(form, config, device).train()
    model = torch.compile(network, mode=form.compiled) if form.compiled else network
    schedule = make_schedule(config)
    optimizer = build_optimizer(config, list(network.parameters()))
    ema = EMA(network, half_life=100_000, rampup=0.05) if form.network is UNet else None
    x0 = torch.randn(batch, 3, config.image_size, config.image_size, device=device)
    y = torch.arange(batch, device=device) % CLASSES

    def step() -> None:
        with _precision(form, device):
            loss = diffusion_loss(
                model, x0, y, schedule=schedule, null_class=network.null_class,
                target=config.target, class_dropout=config.class_dropout,
            )  # fmt: skip
        # Convolutions of the backward pass obey the same switch.
        with _precision(replace(form, bf16=False), device):
            loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if ema is not None:
            ema.update(100_000, batch)

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    timing = seconds_of(device, step, 10 if device.type == "cuda" else 3)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    flops = 3 * forward_flops(config) * batch
    return {
        "form": form.name, "batch": batch, "ms": timing.median * 1e3,
        "images/s": batch / timing.median, "GFLOP/image": flops / batch / 1e9,
        "share of matmul": flops / timing.median / matmul_ceiling(device, ceiling),
        "matmul TFLOP/s": matmul_ceiling(device, ceiling) / 1e12,
        "peak GB": peak and peak / 1e9, "how": timing.how,
    }  # fmt: skip


def step_items(
    device: torch.device,
    config: DiffusionConfig,
    batches: tuple[int, ...] = (128, 32),
    ceiling: int = 8192,
) -> Iterator[Item]:
    """A training step of every form; what takes minutes to compile last."""
    for form in FORMS:
        for batch in batches:
            yield (
                f"step {form.name} {batch}",
                functools.partial(step_row, device, form, config, batch, ceiling),
            )


def sampling_row(
    device: torch.device, form: Form, config: DiffusionConfig, batch: int, steps: int
) -> Row:
    """Time images from noise: ours with the repository's sampler, else the authors' loop."""
    network = build(form, config, device).eval()
    y = torch.arange(batch) % CLASSES
    if form.network is UNet:
        what = f"dpm-solver-pp-2m, {steps} steps, guidance 2, both branches in one pass"

        def call() -> None:
            with _precision(form, device):
                generate_batch(
                    network, y, torch.arange(batch), schedule=make_schedule(config),
                    target=config.target, sampler="dpm-solver-pp-2m", steps=steps,
                    guidance_scale=2.0, clip_x0=True, pixel_norm=config.pixel_norm,
                    image_size=config.image_size, pad_to=batch,
                )  # fmt: skip

        timing = seconds_of(device, call, 3)
        seconds = timing.median
    else:
        walk = config.timesteps - 1
        what = f"ancestral, {walk} steps, two passes; {steps} steps timed, the rest extrapolated"
        timing = seconds_of(device, functools.partial(
            _authors_steps, network, config, y.to(device), steps, form), 3)  # fmt: skip
        seconds = timing.median * walk / steps
    return {
        "form": form.name, "batch": batch, "images/s": batch / seconds,
        "s per 1000 images": 1000 * seconds / batch, "sampler": what,
        "quality": "weights are random: speed only, no aligned share", "how": timing.how,
    }  # fmt: skip


@torch.inference_mode()
def _authors_steps(
    network: nn.Module, config: DiffusionConfig, y: Tensor, steps: int, form: Form
) -> Tensor:
    """The first steps of their loop: conditional and null branch apart, noise drawn each step."""
    schedule = make_schedule(config)
    one = functools.partial(
        guided, network, guidance_scale=1, null_class=CLASSES, target=config.target,
        schedule=schedule,
    )  # fmt: skip
    conditional, null = one(y), one(torch.full_like(y, CLASSES))
    alpha_bar = schedule.alpha_bar.tolist()
    x = torch.randn(len(y), 3, config.image_size, config.image_size, device=y.device)
    with _precision(form, y.device):
        for t in range(config.timesteps - 1, config.timesteps - 1 - steps, -1):
            eps = 2 * conditional(x, t)[1] - null(x, t)[1]
            beta = 1 - alpha_bar[t] / alpha_bar[t - 1]
            x = (x - beta / (1 - alpha_bar[t]) ** 0.5 * eps) / (1 - beta) ** 0.5
            x = x + beta**0.5 * torch.randn_like(x)
    return x


def sampling_items(
    device: torch.device, config: DiffusionConfig, batch: int = 128, steps: int = _TIMED_STEPS
) -> Iterator[Item]:
    """Images per second of ours, and of the authors' form with TF32 in convolutions and without."""
    for form in FORMS[:3]:
        yield (
            f"sampling {form.name} {batch}",
            functools.partial(sampling_row, device, form, config, batch, steps),
        )


def preset() -> DiffusionConfig:
    """The configuration whose figures are published: `ddb`."""
    return PRESETS["ddb"]().diffusion
