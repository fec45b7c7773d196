"""The one training loop: every network of a run is trained by `fit`.

A step is a pure function of (weights, seed, step number, rank): the images of a batch come from a
sampler addressed by step and the random numbers are reseeded for each step. A run continued from a
checkpoint therefore takes the very steps the undisturbed run takes, with no generator to restore.
"""

import contextlib
import hashlib
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ddb_fast import checkpoint
from ddb_fast.config import Optimisation
from ddb_fast.graphs import Step, why_no_graph
from ddb_fast.trackers import Progress, RunLog

logger = logging.getLogger(__name__)


class Sampler(Protocol):
    """Which samples a step sees; a pure function of the step, so that nothing needs resuming."""

    def batch(self, step: int, batch_size: int) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """Where and how often `fit` saves what it needs to continue."""

    path: Path
    minutes: float = 5.0
    images: int | None = None


def step_seed(*parts: object) -> int:
    """A 63-bit seed from names and numbers: other names, an unrelated stream."""
    text = "/".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def seed_step(seed: int, device: torch.device) -> None:
    """Seed the default generators of the CPU and of the device, as `torch.manual_seed` does.

    That one formats the stack for every accelerator which is not there: 0.3 ms a call.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    elif device.type != "cpu":
        torch.manual_seed(seed)


def learning_rate(config: Optimisation, images: int) -> float:
    """The rate after `images` of `config.images` images: linear warm-up, then the schedule."""
    progress = images / config.images
    if progress < config.warmup:
        rise = progress / config.warmup
        return config.lr * (config.warmup_from + (1 - config.warmup_from) * rise)
    if config.lr_schedule == "constant":
        return config.lr
    span = 1 - config.warmup if config.lr_schedule == "cosine" else 1.0
    return config.lr * 0.5 * (1 + math.cos(math.pi * (progress - config.warmup) / span))


def build_optimizer(config: Optimisation, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW (fused) or SGD over all parameters, as the configuration says.

    On a GPU the rate is a tensor there, which a recorded step reads anew each time.
    """
    device = parameters[0].device
    cuda = device.type == "cuda"
    options = {
        "lr": torch.tensor(config.lr, device=device) if cuda else config.lr,
        "weight_decay": config.weight_decay,
    }
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, momentum=config.momentum, fused=cuda, **options)
    return torch.optim.AdamW(parameters, fused=True, capturable=cuda, **options)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Use this rate from now on."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def agree(accelerator: Accelerator, seen: object, what: str) -> None:
    """Compare what each process read of a file; ValueError, one line, on all where it differs.

    Each decides by it how it goes on, and would wait for ever for those that go another way.
    """
    if accelerator.num_processes > 1:
        number = torch.tensor([step_seed(seen)], device=accelerator.device)
        if len(accelerator.gather(number).unique()) > 1:
            raise ValueError(
                f"{what}: not the same for every process; the folder has to be one that all of "
                "them share, up to date: wait a minute, and run the same command again"
            )


class EMA:
    """Exponential moving average of a module's parameters; buffers are copied.

    The half-life is counted in images and is at most `rampup` of the images seen so far (EDM,
    Karras et al. 2022), so that the first weights are forgotten early in training.
    """

    def __init__(self, module: nn.Module, *, half_life: int, rampup: float):
        self._module, self._half_life, self._rampup = module, half_life, rampup
        self.tensors = {k: t.detach().clone() for k, t in module.state_dict().items()}
        names = dict(module.named_parameters())
        self._averaged = [self.tensors[name] for name in names]
        self._live = list(names.values())
        self._copied = [name for name in self.tensors if name not in names]

    def weight(self, images: int, batch_size: int) -> float:
        """How far the average moves after a batch that ends at `images` images."""
        half_life = min(self._half_life, self._rampup * images)
        return 1.0 - 0.5 ** (batch_size / half_life)

    @torch.no_grad()
    def update(self, images: int, batch_size: int) -> None:
        torch._foreach_lerp_(self._averaged, self._live, self.weight(images, batch_size))
        if self._copied:
            state = self._module.state_dict()
            for name in self._copied:
                self.tensors[name].copy_(state[name])


class Selection:
    """Looks at a network while it trains and keeps the weights that look best.

    score(network) -> named figures, higher is better; `by` names the one that decides. `times`
    looks are spread evenly over the training, the last after its last step. NaN is never best. Of
    equals the last stays: a figure that tells nothing, a worst group of four images at 0, must not
    end a training when it has hardly begun. `curve` has a row a look: {"images": n, **figures}.
    """

    def __init__(self, score: Callable[[nn.Module], dict[str, float]], *, by: str, times: int):
        self._score, self._by, self._times = score, by, times
        self.curve: list[dict[str, float]] = []
        self.best: dict[str, Tensor] = {}

    def due(self, before: int, after: int, total: int) -> bool:
        """Whether a look falls between `before` and `after` images of `total`."""
        return after * self._times // total > before * self._times // total

    @property
    def images(self) -> int | None:
        """After how many images the best look was; None where none had a figure."""
        rows = [row for row in self.curve if not math.isnan(row[self._by])]
        return max(rows, key=lambda row: (row[self._by], row["images"]))["images"] if rows else None

    def look(self, network: nn.Module, images: int) -> None:
        network.eval()
        # Accelerate put its autocast around this one's forward; results are taken without it.
        patched = network.__dict__.pop("forward", None)
        self.curve.append({"images": images, **self._score(network)})
        if patched is not None:
            network.forward = patched
        network.train()
        if self.images == images:
            self.best = {name: t.detach().clone() for name, t in network.state_dict().items()}


def fit(
    accelerator: Accelerator,
    network: nn.Module,
    loss_of: Callable[[nn.Module, Tensor], Tensor],
    *,
    config: Optimisation,
    sampler: Sampler,
    stage: str,
    seed: int,
    log: RunLog,
    checkpoints: Checkpoints,
    recipe: nn.Module | None = None,
    clipped: Sequence[nn.Module] = (),
    stop_at: int | None = None,
    ema: EMA | None = None,
    selection: Selection | None = None,
    step_mode: str = "auto",
    images_on_host: bool = False,
    show_progress: bool = True,
) -> float:
    """Train `network` in place for `config.images` images; return the seconds it took in all.

    It ends with the weights of the last step or, with a `selection`, with the best it found.

    Args:
        loss_of: (model, index (b,) int64 on the device) -> the scalar loss of this device's share
            of the batch. The model it is given may be wrapped for mixed precision and DDP.
        recipe: a module whose buffers are part of the training state (group weights, tables).
        clipped: parts of `network` whose gradients `grad_clip` bounds each by its own norm, as if
            each had an optimiser of its own; none given: the network as a whole.
        stop_at: stop early, after so many of `config.images`, whose learning rates stay as they
            are.
        ema: moving average updated after each step; its tensors are saved with the checkpoint.
        selection: which weights are kept; each rank looks for itself, at the same weights.
        step_mode: how a step is launched, `RunConfig.step`.
        images_on_host: `loss_of` takes its images from there, though the device is a GPU.

    Raises:
        ValueError: `batch_size` is not a multiple of devices x `accumulate`, the checkpoint found
            belongs to another network, or a graph is asked for where there can be none.
    """
    world, rank = accelerator.num_processes, accelerator.process_index
    size, parts = config.batch_size, config.accumulate
    if size % (world * parts):
        raise ValueError(
            f"{stage}: batch_size {size} is not a multiple of {world} devices x {parts} accumulated"
        )
    scaled = accelerator.scaler is not None
    no_graph = why_no_graph(
        accelerator.device, processes=world, scaled=scaled, on_host=images_on_host
    )
    if step_mode == "graph" and no_graph:
        raise ValueError(f"{stage}: a step cannot be one graph (--step graph): {no_graph}")
    optimizer = build_optimizer(config, [p for p in network.parameters() if p.requires_grad])
    start, seconds = 0, 0.0
    if scaled:
        # One scaler serves all stages; what an earlier one did to it must not reach this one.
        accelerator.scaler.load_state_dict(type(accelerator.scaler)().state_dict())
    if checkpoints.path.exists():
        tensors, metadata = checkpoint.load_tensors(checkpoints.path)
        checkpoint.load_into(
            network, checkpoint.select(tensors, "model"), source=str(checkpoints.path)
        )
        checkpoint.load_optimizer(optimizer, checkpoint.select(tensors, "optimizer"))
        if recipe is not None:
            recipe.load_state_dict(checkpoint.select(tensors, "recipe"))
        if ema is not None:
            for name, tensor in checkpoint.select(tensors, "ema").items():
                ema.tensors[name].copy_(tensor)
        if selection is not None:
            selection.best = checkpoint.select(tensors, "best")
            selection.curve = metadata["curve"]
        start, seconds = metadata["step"], metadata["seconds"]
        if scaled:
            accelerator.scaler.load_state_dict(metadata["scaler"])
        logger.info("%s: continues after %d images", stage, start * size)

    agree(accelerator, start, str(checkpoints.path))
    model, prepared = accelerator.prepare(network, optimizer)
    called = torch.compile(model) if step_mode == "compile" else model
    # Only loss scaling needs accelerate's wrapper, which searches the disk for a package at each
    # step: 0.4 ms, a tenth of a small classifier's.
    step_optimizer = prepared.step if scaled else optimizer.step
    model.train()
    steps = math.ceil((config.images if stop_at is None else stop_at) / size)
    began = saved_at = time.monotonic()
    images_saved = start * size

    def save(step: int) -> None:
        tensors = checkpoint.with_prefix("model", network.state_dict())
        tensors |= checkpoint.with_prefix("optimizer", checkpoint.optimizer_tensors(optimizer))
        if recipe is not None:
            tensors |= checkpoint.with_prefix("recipe", recipe.state_dict())
        if ema is not None:
            tensors |= checkpoint.with_prefix("ema", ema.tensors)
        metadata = {"step": step, "seconds": seconds + time.monotonic() - began}
        if selection is not None:
            tensors |= checkpoint.with_prefix("best", selection.best)
            metadata["curve"] = selection.curve
        if scaled:
            metadata["scaler"] = accelerator.scaler.state_dict()
        checkpoint.save_tensors(checkpoints.path, tensors, metadata)

    def run(shares: Tensor) -> Tensor:
        """One step on this device's share of the batch, in parts; the loss."""
        total = torch.zeros((), device=accelerator.device)
        try:
            for part, share in enumerate(shares):
                last = part == parts - 1
                with accelerator.no_sync(model) if not last else contextlib.nullcontext():
                    loss = loss_of(called, share) / parts
                    accelerator.backward(loss)
                total += loss.detach()
            if config.grad_clip is not None:
                # Once for all parts: accelerate's own clipping would unscale fp16 at each.
                accelerator.unscale_gradients()
                for module in clipped or (network,):
                    nn.utils.clip_grad_norm_(module.parameters(), config.grad_clip)
            step_optimizer()
        finally:
            # Also where a recording breaks off: its gradients are no numbers.
            optimizer.zero_grad(set_to_none=True)
        return total

    how = "eager" if no_graph else "auto" if step_mode == "compile" else step_mode
    one_step = Step(run, device=accelerator.device, how=how)
    shown = show_progress and accelerator.is_main_process
    bar = Progress(log, stage, total=steps * size, start=start * size, shown=shown)
    with bar:
        for step in range(start, steps):
            seed_step(step_seed(seed, stage, step, rank), accelerator.device)
            shares = sampler.batch(step, size).view(world, parts, -1)[rank]
            set_learning_rate(optimizer, learning_rate(config, step * size))
            total = one_step(shares.to(accelerator.device))
            images = (step + 1) * size
            if ema is not None:
                ema.update(images, size)
            if selection is not None and selection.due(images - size, images, steps * size):
                selection.look(network, images)
            bar.update(size, total)
            due = time.monotonic() - saved_at > 60 * checkpoints.minutes or (
                checkpoints.images is not None and images - images_saved >= checkpoints.images
            )
            if due and accelerator.is_main_process and step + 1 < steps:
                bar.flush()  # raises rather than save weights that have diverged
                save(step + 1)
                saved_at, images_saved = time.monotonic(), images
    # Gives the network its own forward back, and lets go of the optimiser.
    accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    accelerator.free_memory()
    if selection is not None and selection.best:
        network.load_state_dict(selection.best)
    return seconds + time.monotonic() - began
