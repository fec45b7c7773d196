"""`accelerate launch ddb_fast/train.py PRESET_OR_CONFIG [...]`: the same run on any devices.

`ddb-fast run` calls `main` too, so both roads share every line from here on.
"""

import contextlib
import ctypes
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":  # the launcher puts this file's folder first; our modules are not its
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).parent]

from ddb_fast.arguments import parse_run
from ddb_fast.config import RunConfig
from ddb_fast.fields import to_json
from ddb_fast.streams import log_to_stderr, printing

if TYPE_CHECKING:
    import torch


def own_device() -> "torch.device":
    """The GPU where there is one, unless accelerate is told to leave it (ACCELERATE_USE_CPU)."""
    import torch

    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "0") not in ("0", "false")
    return torch.device("cuda" if torch.cuda.is_available() and not on_cpu else "cpu")


def choose_precision(asked: str, *, exported: str | None, cuda: bool) -> tuple[str, str]:
    """(accelerate's name for the precision, why): `auto` takes bf16 where the hardware has it.

    `accelerate launch` exports `no` unless told otherwise, so an exported `no` is not a wish; an
    exported bf16 or fp16 is. ValueError for fp16 without a GPU.
    """
    import torch

    names = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
    if asked in names:
        chosen, reason = names[asked], "asked for"
    elif exported in ("bf16", "fp16"):
        chosen, reason = exported, "chosen at launch"
    elif cuda:
        native = torch.cuda.get_device_capability() >= (8, 0)
        chosen, reason = ("bf16", "the GPU has it") if native else ("fp16", "the GPU has no bf16")
    else:
        capability = torch.backends.cpu.get_cpu_capability()
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        chosen = "bf16" if native else "no"
        reason = f"the CPU has {'' if native else 'no '}bf16 instructions ({capability})"
    if chosen == "fp16" and not cuda:
        raise ValueError("precision fp16 needs a GPU (its loss scaling); use bf16 or fp32")
    return chosen, reason


def set_threads(threads: int | None) -> int:
    """Use `threads` CPU threads, or this process's share of the cores; launchers export 1."""
    import torch

    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    # Linux knows which cores this process may use; elsewhere all count.
    known = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1
    count = threads or max(1, cores // here)
    torch.set_num_threads(count)
    return count


def keep_freed_memory() -> None:
    """Have glibc, where there is one, keep what a step frees for the next one.

    Otherwise a CPU's activations go back to the kernel at each step and come anew, a page fault for
    4 KiB: 2,000 in a step of preset digits, a twelfth of its time. Blocks from 32 MiB on, which is
    as far as it goes, are returned all the same. For the whole process.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of malloc.h.
        for option, value in ((-3, 2**25), (-1, 2**31 - 1)):
            mallopt(option, value)


@contextlib.contextmanager
def _apart() -> Iterator[None]:
    """Give back accelerate's state, torch's random numbers and threads as they were, to a notebook.

    Gradients that the caller switched off are on meanwhile. accelerate has one state a process:
    without this a second run could have no other precision, and an Accelerator of the caller's own
    would take over a run's.
    """
    import torch
    from accelerate.state import AcceleratorState, GradientState, PartialState

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # the processes' connection is part of it
        yield
        return
    states = [kind._shared_state for kind in (PartialState, AcceleratorState, GradientState)]
    kept = [dict(state) for state in states]
    for state in states:
        state.clear()
    gpus = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    threads = torch.get_num_threads()
    try:
        with torch.random.fork_rng(gpus), torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        torch.set_num_threads(threads)
        for state, before in zip(states, kept, strict=True):
            state.clear()
            state.update(before)


@_apart()
def run(config: RunConfig, *, profile: bool = False) -> None:
    """Build the Accelerator and run the pipeline; `profile`: then show where its time goes."""
    from accelerate import Accelerator, DistributedType, InitProcessGroupKwargs
    from accelerate.tracking import get_available_trackers

    from ddb_fast.pipeline import run_pipeline

    exported = os.environ.get("ACCELERATE_MIXED_PRECISION")
    cuda = own_device().type == "cuda"
    precision, reason = choose_precision(config.precision, exported=exported, cuda=cuda)
    # Results depend on what was chosen, not on having left the choice open.
    config = replace(config, precision={"no": "fp32"}.get(precision, precision))
    threads = set_threads(config.threads)
    keep_freed_memory()
    tracker = None if config.tracker == "none" else config.tracker
    if tracker is not None and tracker not in {str(t.value) for t in get_available_trackers()}:
        raise ValueError(f"tracker {tracker}: install the package {tracker} first")
    # Other processes wait while the main one decodes images, which may take hours.
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=12))
    accelerator = Accelerator(
        mixed_precision=precision,
        log_with=tracker,
        project_dir=config.out if tracker else None,
        kwargs_handlers=[patience],
    )
    known = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
    if accelerator.distributed_type not in known or accelerator.gradient_accumulation_steps != 1:
        raise ValueError(
            f"launched as {accelerator.distributed_type.value} with gradient accumulation "
            f"{accelerator.gradient_accumulation_steps}: only plain data parallelism is supported; "
            "accumulate with --diffusion.accumulate and its like"
        )
    if not accelerator.is_main_process:
        logging.getLogger("ddb_fast").setLevel(logging.WARNING)
    machine = (
        f"{accelerator.num_processes} x {accelerator.device.type}, {threads} threads each; "
        f"{config.precision}: {reason}"
    )
    try:
        run_pipeline(config, accelerator, machine=machine)
        if profile:
            from ddb_fast.profiling import profile_run

            profile_run(config.out, accelerator)
    finally:
        accelerator.end_training()


def main(argv: Sequence[str] | None = None, *, prog: str = "train.py") -> int:
    """Run from arguments; a user's error is one line and exit 2."""
    return printing(lambda: _main(argv, prog), prog=prog)


def _main(argv: Sequence[str] | None, prog: str) -> int:
    config, dry_run, profile = parse_run(sys.argv[1:] if argv is None else argv, prog=prog)
    if dry_run:
        sys.stdout.write(to_json(config))
        return 0
    from torch import OutOfMemoryError

    log_to_stderr()
    try:
        run(config, profile=profile)
    except KeyboardInterrupt:
        print(f"{prog}: interrupted; the same command continues", file=sys.stderr)
        return 130
    except BrokenPipeError:  # an OSError, but nothing to tell: nobody reads
        raise
    except (ValueError, OSError, FloatingPointError, OutOfMemoryError) as error:
        if os.environ.get("DDB_FAST_TRACEBACK"):
            raise
        print(f"{prog}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        compiler = type(error).__module__.startswith(("torch._inductor.", "torch._dynamo."))
        if not compiler or os.environ.get("DDB_FAST_TRACEBACK"):
            raise
        reason = str(error).partition("\n")[0]
        print(f"{prog}: torch.compile: {reason}; --step eager goes without", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
