"""Where a run's time goes: a few steps of its stages under torch's profiler (`run --profile`).

The steps are the run's own, with its functions, data and configuration, but nothing that they train
or draw is kept. Each stage runs twice: once while its arithmetic is counted, once to be timed and
then recorded.
"""

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import (
    FlopCounterMode,
)

from ddb_fast import checkpoint, classification, generator
from ddb_fast.classification import first_network, train_classifier
from ddb_fast.config import from_json
from ddb_fast.context import Context
from ddb_fast.costs import (
    CATEGORIES,
    COUNTED,
    DATA,
    WINDOW,
    counted,
    flop_counter,
    matmul_ceiling,
    time_shares,
)
from ddb_fast.data.samplers import ShuffledSampler
from ddb_fast.engine import Sampler
from ddb_fast.generator import synthesise, train_diffusion
from ddb_fast.kernels import use_backend
from ddb_fast.models.unet import UNet
from ddb_fast.pipeline import read_data
from ddb_fast.recipes import ERM
from ddb_fast.run_folder import lock_folder
from ddb_fast.tabular import markdown
from ddb_fast.trackers import RunLog

# Steps of a stage: not looked at, timed, recorded; one more begins, which is where the last ends.
WARM, TIMED, RECORDED = 1, 3, 2
STEPS = WARM + TIMED + RECORDED + 1


@dataclass(frozen=True)
class StageProfile:
    """A stage's steps: shares of their time by category, and what they compute.

    shares: of the recorded steps' time, all of CATEGORIES, with sum 1. seconds: of a step, timed
    without the profiler. flops: of a step, by category, products only, two for each multiplication
    and addition.
    """

    name: str
    shares: dict[str, float]
    seconds: float
    flops: dict[str, int]

    @property
    def flops_per_second(self) -> float:
        return sum(self.flops.values()) / self.seconds


# --- watching a stage --------------------------------------------------------------------------


@dataclass(eq=False)
class _Watch:
    """Told where each step begins, it counts the steps' arithmetic, or times and records them.

    active: not where another process does it.
    """

    device: torch.device
    active: bool = True
    counter: FlopCounterMode | None = None
    counts: list[dict[str, int]] = field(default_factory=list)
    seconds: float | None = None
    shares: dict[str, float] | None = None
    trace: dict[str, Any] | None = None
    _step: int = 0
    _began: float = 0.0
    _profiler: profile | None = None
    _window: record_function | None = None

    def begin(self) -> None:
        step, self._step = self._step, self._step + 1
        if not self.active:
            return
        if self.counter is not None:
            if step in (WARM, WARM + TIMED):
                self.counts.append(counted(self.counter))
        elif step == WARM:
            self._synchronise()
            self._began = time.perf_counter()
        elif step == WARM + TIMED:
            self._synchronise()
            self.seconds = (time.perf_counter() - self._began) / TIMED
            self._record()
        elif step == STEPS - 1:
            self._stop()

    def _record(self) -> None:
        kinds = [ProfilerActivity.CPU]
        if self.device.type == "cuda":
            kinds.append(ProfilerActivity.CUDA)
        self._profiler, self._window = profile(activities=kinds), record_function(WINDOW)
        self._profiler.start()
        self._window.__enter__()

    def _stop(self) -> None:
        self._synchronise()
        self._window.__exit__(None, None, None)
        self._profiler.stop()
        cuda = self.device.type == "cuda"
        self.shares = time_shares(self._profiler.events(), cuda=cuda)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "trace.json"
            self._profiler.export_chrome_trace(str(file))
            self.trace = json.loads(file.read_text("utf-8"))

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@dataclass(frozen=True)
class _Steps:
    """A sampler that tells the watch where steps begin and marks its own time as data."""

    sampler: Sampler
    watch: _Watch

    def batch(self, step: int, batch_size: int) -> Tensor:
        self.watch.begin()
        with record_function(DATA):
            return self.sampler.batch(step, batch_size)


def _as_data(function: Callable[..., Any]) -> Callable[..., Any]:
    def marked(*arguments: Any, **named: Any) -> Any:
        with record_function(DATA):
            return function(*arguments, **named)

    return marked


@contextmanager
def _marked(watch: _Watch) -> Iterator[None]:
    """What the stages make batches with is a range of the profile for as long as this lasts.

    Put around the functions here, because a range costs microseconds that no other run should pay.
    """
    places = [(generator, "gather"), (generator, "normalise")]
    places += [(classification, name) for name in ("gather", "normalise", "augment")]
    with ExitStack() as stack:
        for module, name in places:
            stack.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, _as_data(getattr(module, name)))
        stack.callback(setattr, generator, "ShuffledSampler", ShuffledSampler)
        generator.ShuffledSampler = lambda *a, **named: _Steps(ShuffledSampler(*a, **named), watch)
        yield


# --- stages ------------------------------------------------------------------------------------


def _training(context: Context, watch: _Watch, folder: Path) -> None:
    diffusion = context.config.diffusion
    short = replace(diffusion, images=STEPS * diffusion.batch_size)
    config = replace(context.config, diffusion=short)
    with _marked(watch):
        train_diffusion(replace(context, config=config), folder, folder / "checkpoints")


def _sampling(run: Path, context: Context, watch: _Watch, folder: Path) -> None:
    """One batch, in so many steps as are looked at; ddpm where the authors' would walk all."""
    sampling, classes = context.config.sampling, len(context.data.classes)
    sampler = "ddpm" if sampling.sampler == "ddpm-authors" else sampling.sampler
    size = max(sampling.batch_size, classes)
    short = replace(
        sampling, steps=STEPS, sampler=sampler, per_class=size // classes, batch_size=size
    )
    config = replace(context.config, sampling=short)

    def begins(module: nn.Module, _: tuple[Any, ...]) -> None:
        if isinstance(module, UNet):
            watch.begin()

    hook = nn.modules.module.register_module_forward_pre_hook(begins)
    try:
        synthesise(replace(context, config=config), run / "diffusion", folder, folder / "shards")
    finally:
        hook.remove()


def _classifier(context: Context, watch: _Watch, folder: Path) -> None:
    """The target's network as erm trains it; without methods, the amplifier's."""
    config, train = context.config, context.data.splits["train"]
    target = bool(config.methods)
    asked = config.classifier if target else config.amplifier
    # Weights to start from cost a step nothing, and might be fetched.
    asked = replace(asked, images=STEPS * asked.batch_size, weights=None)
    with _marked(watch):
        train_classifier(
            context,
            first_network(asked, len(context.data.classes), seed=config.seed),
            asked,
            train.large if target else train.small,
            train.y,
            recipe=ERM(),
            sampler=_Steps(ShuffledSampler(len(train), seed=config.seed), watch),
            stage="profile",
            seed=config.seed,
            resume=folder / "checkpoint.safetensors",
            whole=not target,
        )


def profile_stage(
    name: str, context: Context, work: Callable[[_Watch, Path], None]
) -> tuple[StageProfile, dict[str, Any]] | None:
    """Profile a stage and return its chrome trace too; work(watch, folder) runs STEPS steps.

    All processes run them, the main one looks on; elsewhere None. ValueError for fewer steps.
    """
    # torch's own attention, because the counter does not know what is inside ours.
    counter = flop_counter()
    main = context.accelerator.is_main_process
    counting, watch = (_Watch(context.device, main, c) for c in (counter, None))
    with tempfile.TemporaryDirectory() as folder:
        with use_backend(attention="torch"), counter:
            work(counting, Path(folder) / "counted")
        work(watch, Path(folder) / "timed")
    if not main:
        return None
    if watch.shares is None:
        raise ValueError(f"{name}: fewer than {STEPS} steps, too few to profile")
    before, after = counting.counts
    flops = {kind: (n - before.get(kind, 0)) // TIMED for kind, n in after.items()}
    return StageProfile(name, watch.shares, watch.seconds, flops), watch.trace


def tables(stages: Sequence[StageProfile], ceiling: float, what: str) -> str:
    """Where the time goes and what is computed in it, as Markdown; `what` says what the ceiling is.

    ceiling: FLOP/s.
    """
    shares, speeds = [["share of time", *CATEGORIES]], [["a step", "ms"]]
    speeds[0] += [f"{kind}, GFLOP" for kind in COUNTED] + ["GFLOP/s", "of the ceiling"]
    for stage in stages:
        shares.append([stage.name, *(f"{100 * stage.shares[kind]:.1f} %" for kind in CATEGORIES)])
        speed = stage.flops_per_second
        counts = [f"{stage.flops.get(kind, 0) / 1e9:.6g}" for kind in COUNTED]
        achieved = [f"{speed / 1e9:.4g}", f"{100 * speed / ceiling:.1f} %"]
        speeds.append([stage.name, f"{1e3 * stage.seconds:.4g}", *counts, *achieved])
    return (
        f"{markdown(shares)}\n\nOf {RECORDED} steps recorded on one device.\n\n"
        f"{markdown(speeds)}\n\nms: of {TIMED} steps without the profiler. GFLOP: products only, "
        "of a forward pass and, in training, its backward pass. "
        f"Ceiling: {ceiling / 1e9:.4g} GFLOP/s, {what}.\n"
    )


def profile_run(run: str | Path, accelerator: Any) -> list[StageProfile]:
    """Profile the stages of a finished run; write profile/trace.json and profile/table.md there.

    Called on every process of the run; the main one writes, prints and returns them. ValueError,
    one line, where data has changed since.
    """
    run = Path(run)
    config = from_json((run / "config.json").read_text("utf-8"))
    config = replace(
        config, progress=False, step="eager", checkpoint_images=None, checkpoint_minutes=1e9
    )
    data, log = read_data(config, run), RunLog(accelerator, None)
    context = Context(config=config, accelerator=accelerator, data=data, log=log)
    work: dict[str, Callable[[_Watch, Path], None]] = {}
    if config.amplifies and config.sampling.load is None:
        if config.diffusion.load is None:
            work["diffusion training"] = partial(_training, context)
        work["sampling"] = partial(_sampling, run, context)
    name = config.classifier.model if config.methods else config.amplifier.model
    work[f"classifier ({name})"] = partial(_classifier, context)
    found = [profile_stage(name, context, job) for name, job in work.items()]
    profiled = [one for one in found if one is not None]
    if accelerator.is_main_process:
        with lock_folder(run):
            _write(run / "profile", profiled, context)
    accelerator.wait_for_everyone()
    return [stage for stage, _ in profiled]


def _write(
    folder: Path, profiled: Sequence[tuple[StageProfile, dict[str, Any]]], context: Context
) -> None:
    device, precision = context.device, context.accelerator.mixed_precision
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    size = 8192 if device.type == "cuda" else 2048
    what = f"a {str(dtype).removeprefix('torch.')} product of {size} x {size} matrices"
    text = tables([stage for stage, _ in profiled], matmul_ceiling(device, dtype, size), what)
    # One file: all were recorded by one clock.
    trace = {**profiled[0][1], "traceEvents": [e for _, t in profiled for e in t["traceEvents"]]}
    checkpoint.write_atomically(folder / "trace.json", json.dumps(trace))
    checkpoint.write_atomically(folder / "table.md", text)
    print(text, end="")
    print(f"trace:   {folder / 'trace.json'} (for ui.perfetto.dev or chrome://tracing)")
