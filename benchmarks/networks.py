"""What the part `step` measures: whole networks, ours beside the authors' form.

Between the two stand what plain torch gives for a few lines (bf16, channels_last, fused attention)
and torch.compile on top of that. On a GPU each form has a row of its own; on a CPU, which others
may be using, the forms take turns within one row, and their ratio is what counts.
"""

import functools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import measure
import torch
from contenders import compile_options
from measure import Call, Timing
from rows import Item, Row
from torch import Tensor, nn

from authors_form import Authors, WithSDPA
from ddb_fast.config import DiffusionConfig
from ddb_fast.costs import flop_counter, matmul_ceiling
from ddb_fast.diffusion.losses import diffusion_loss
from ddb_fast.diffusion.schedule import make_schedule
from ddb_fast.engine import EMA, build_optimizer
from ddb_fast.graphs import Step
from ddb_fast.models.unet import UNet
from ddb_fast.presets import PRESETS

CLASSES = 2


# max-autotune also compares templates of its own with cuBLAS and cuDNN, which took more than 220 s
# for a part of the network: of 22 products it had kept the libraries' for 11 by then.
_LIBRARIES = {"max_autotune_gemm_backends": "ATEN", "max_autotune_conv_backends": "ATEN"}


@dataclass(frozen=True)
class Form:
    """How a network is run: which one, in what precision and layout, compiled in which mode.

    attention: of our network run on torch's own operators, the backend of its attention.
    graph: on a GPU a training step and a forward pass are one CUDA graph each, as in a run.
    """

    name: str
    network: type[nn.Module]
    bf16: bool
    channels_last: bool
    tf32: bool = True
    compiled: str | None = None
    attention: str | None = None
    graph: bool = False


FORMS = (
    Form("ours", UNet, True, True, graph=True),
    Form("authors", Authors, False, False),
    Form("authors, TF32 off", Authors, False, False, tf32=False),
    Form("eager bf16, channels_last, SDPA", WithSDPA, True, True),
    Form("ours, op by op", UNet, True, True),
    Form("compile max-autotune, libraries' products, no descent, bf16, channels_last, SDPA",
         WithSDPA, True, True, compiled="max-autotune"),
    Form("compile bf16, channels_last, SDPA", WithSDPA, True, True, compiled="default"),
    Form("ours, compiled", UNet, True, True, compiled="default", graph=True),
)  # fmt: skip
# Without TF32, which is a GPU's; max-autotune gains a CPU nothing and takes minutes to compile.
CPU_FORMS = (
    FORMS[0],
    FORMS[1],
    FORMS[3],
    FORMS[6],
)


def build(form: Form, config: DiffusionConfig, device: torch.device) -> nn.Module:
    """The network of a form, with weights that no layer of it ignores."""
    torch.manual_seed(0)
    # Made there: drawing the weights of `ddb` on a GPU machine's CPU takes seconds.
    with device:
        network = _made(form.network, config)
    return network.to(memory_format=torch.channels_last) if form.channels_last else network


def _made(network: type[nn.Module], config: DiffusionConfig) -> nn.Module:
    unet = config.unet
    if network is UNet:
        return UNet(unet, num_classes=CLASSES, timesteps=config.timesteps)
    levels = range(len(unet.channel_multipliers))
    made = network(
        timesteps=config.timesteps,
        classes=CLASSES,
        channels=unet.channels,
        multipliers=unet.channel_multipliers,
        blocks=unet.blocks_per_level,
        attends=[level in unet.attention_levels for level in levels],
    )
    # Theirs keeps the null class in row 0, ours in the last; any row costs the same.
    made.null_class = CLASSES
    return made


def compiled(network: nn.Module, form: Form) -> nn.Module:
    if form.compiled is None:
        return network
    if form.compiled != "max-autotune":
        return torch.compile(network, mode=form.compiled)
    return torch.compile(network, options={**compile_options(form.compiled), **_LIBRARIES})


@functools.cache
def forward_flops(config: DiffusionConfig) -> int:
    """Floating-point operations of a forward pass for one image, products only."""
    meta = torch.device("meta")
    network = build(FORMS[1], config, meta).eval()
    with meta:
        x = torch.empty(1, 3, config.image_size, config.image_size)
        t = torch.zeros(1, dtype=torch.int64)
        counter = flop_counter()
        with counter, torch.no_grad():
            network(x, t, t)
    return counter.get_total_flops()


@contextmanager
def precision(form: Form, device: torch.device) -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = form.tf32
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=form.bf16):
            yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def seconds_of(device: torch.device, call: Call, rounds: int) -> Timing:
    """Wall-clock time of a call that is waited for, after two that are not counted."""
    seconds = []
    for _ in range(rounds + 2):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    how = f"{rounds} calls, waited for; the first took {seconds[0]:.1f} s"
    return Timing.of(seconds[2:], how)


@functools.cache
def bf16_ceiling(device: torch.device, size: int) -> float:
    """FLOP/s of a bf16 matrix product of `size` squared, measured once in this process."""
    return matmul_ceiling(device, torch.bfloat16, size)


def training_step(
    device: torch.device, form: Form, config: DiffusionConfig, batch: int
) -> tuple[nn.Module, Call]:
    """A network and its step: loss, backward, clipping, optimiser and, in ours, moving average."""
    network = build(form, config, device).train()
    model = compiled(network, form)
    schedule = make_schedule(config)
    parameters = list(network.parameters())
    if form.network is Authors:
        # As they call it; the others have the fused one.
        optimizer = torch.optim.AdamW(parameters, config.lr, weight_decay=config.weight_decay)
    else:
        optimizer = build_optimizer(config, parameters)
    ema = EMA(network, half_life=100_000, rampup=0.05) if form.network is UNet else None
    x0 = torch.randn(batch, 3, config.image_size, config.image_size, device=device)
    y = torch.arange(batch, device=device) % CLASSES

    def run(index: Tensor) -> Tensor:
        with precision(form, device):
            loss = diffusion_loss(
                model, x0[index], y[index], schedule=schedule, null_class=network.null_class,
                target=config.target, class_dropout=config.class_dropout,
            )  # fmt: skip
        # Convolutions of the backward pass obey the same switch.
        with precision(replace(form, bf16=False), device):
            loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    graph = form.graph and device.type == "cuda"
    launched = Step(run, device=device, how="graph" if graph else "eager")
    index = torch.arange(batch, device=device)

    def step() -> None:
        launched(index)
        if ema is not None:
            ema.update(100_000, batch)

    if graph:
        for _ in range(Step.WARM + 1):
            step()
    return network, step


def forward_pass(device: torch.device, form: Form, config: DiffusionConfig, batch: int) -> Call:
    """A forward pass in evaluation mode, as sampling makes it."""
    network = build(form, config, device).eval()
    model = compiled(network, form)
    x = torch.randn(batch, 3, config.image_size, config.image_size, device=device)
    t = torch.arange(batch, device=device) * (config.timesteps // batch)
    y = torch.arange(batch, device=device) % CLASSES

    @torch.no_grad()
    def forward() -> Tensor:
        with precision(form, device):
            return model(x, t, y)

    return forward


def step_row(
    device: torch.device, form: Form, config: DiffusionConfig, batch: int, ceiling: int
) -> Row:
    """Time a training step, and its peak memory on a GPU."""
    torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    _, step = training_step(device, form, config, batch)
    timing = seconds_of(device, step, 10 if device.type == "cuda" else 3)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    flops = 3 * forward_flops(config) * batch
    return {
        "form": form.name, "batch": batch, "ms": timing.median * 1e3,
        "ms_10": timing.low * 1e3, "ms_90": timing.high * 1e3,
        "images/s": batch / timing.median, "GFLOP/image": flops / batch / 1e9,
        "share of matmul": flops / timing.median / bf16_ceiling(device, ceiling),
        "matmul TFLOP/s": bf16_ceiling(device, ceiling) / 1e12,
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


def cpu_step_items(config: DiffusionConfig, batch: int = 4, rounds: int = 7) -> Iterator[Item]:
    """A forward pass and a training step, every form in turns within one row."""
    device = torch.device("cpu")
    makers = {"forward": forward_pass, "training step": lambda *a: training_step(*a)[1]}
    flops = forward_flops(config) * batch
    for (what, make), times in zip(makers.items(), (1, 3), strict=True):

        def row(what: str = what, make: Callable = make, times: int = times) -> Row:
            torch.compiler.reset()
            calls = {form.name: make(device, form, config, batch) for form in CPU_FORMS}
            title, once = f"{what}, batch {batch}", dict.fromkeys(calls, 1)
            return {
                **in_turns(title, calls, rounds, once),
                "GFLOP": times * flops / 1e9,
                "matmul GFLOP/s": bf16_ceiling(device, 2048) / 1e9,
            }

        yield f"{what} {batch}", row


def in_turns(what: str, calls: Mapping[str, Call], rounds: int, times: Mapping[str, float]) -> Row:
    """A row of forms measured side by side: seconds by form for so many `times` its call.

    "core seconds" are those of the process on all cores, which count no waiting for a core.
    """
    spent: dict[str, list[float]] = {name: [] for name in calls}

    def noting(name: str) -> None:
        start = time.process_time()
        calls[name]()
        spent[name].append(time.process_time() - start)

    noted = {name: functools.partial(noting, name) for name in calls}
    timings = measure.interleaved(noted, rounds=rounds)
    return {
        "what": what,
        "seconds": {name: t.median * times[name] for name, t in timings.items()},
        "spread": {n: [t.low * times[n], t.high * times[n]] for n, t in timings.items()},
        # As there, the first two calls are not counted.
        "core seconds": {n: statistics.median(s[2:]) * times[n] for n, s in spent.items()},
        "how": next(iter(timings.values())).how,
    }


def preset(name: str = "ddb") -> DiffusionConfig:
    """A preset's generator; `ddb` is the one whose figures are published."""
    return PRESETS[name]().diffusion
