"""`accelerate launch ddb_fast/train.py PRESET_OR_CONFIG [...]`: the same run on any devices.

`ddb-fast run` calls `main` too, so both roads share every line from here on.
"""

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # the launcher puts this file's folder first; our modules are not its
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).parent]

from ddb_fast.arguments import parse_run
from ddb_fast.config import RunConfig, to_json


def choose_precision(asked: str, *, exported: str | None) -> tuple[str, str]:
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
    elif torch.cuda.is_available():
        native = torch.cuda.get_device_capability() >= (8, 0)
        chosen, reason = ("bf16", "the GPU has it") if native else ("fp16", "the GPU has no bf16")
    else:
        capability = torch.backends.cpu.get_cpu_capability()
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        chosen = "bf16" if native else "no"
        reason = f"the CPU has {'' if native else 'no '}bf16 instructions ({capability})"
    if chosen == "fp16" and not torch.cuda.is_available():
        raise ValueError("precision fp16 needs a GPU (its loss scaling); use bf16 or fp32")
    return chosen, reason


def set_threads(threads: int | None) -> int:
    """Use `threads` CPU threads, or this process's share of the cores; launchers export 1."""
    import torch

    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    count = threads or max(1, len(os.sched_getaffinity(0)) // here)
    torch.set_num_threads(count)
    return count


def run(config: RunConfig) -> None:
    """Build the Accelerator and run the pipeline."""
    from accelerate import Accelerator

    from ddb_fast.pipeline import run_pipeline

    exported = os.environ.get("ACCELERATE_MIXED_PRECISION")
    precision, reason = choose_precision(config.precision, exported=exported)
    threads = set_threads(config.threads)
    tracker = None if config.tracker == "none" else config.tracker
    accelerator = Accelerator(
        mixed_precision=precision, log_with=tracker, project_dir=config.out if tracker else None
    )
    if not accelerator.is_main_process:
        logging.getLogger("ddb_fast").setLevel(logging.WARNING)
    machine = (
        f"{accelerator.num_processes} x {accelerator.device.type}, {threads} threads each; "
        f"{'fp32' if precision == 'no' else precision}: {reason}"
    )
    try:
        run_pipeline(config, accelerator, machine=machine)
    finally:
        accelerator.end_training()


def main(argv: Sequence[str] | None = None, *, prog: str = "train.py") -> int:
    """Run from arguments; a user's error is one line and exit 2."""
    config, dry_run = parse_run(sys.argv[1:] if argv is None else argv, prog=prog)
    if dry_run:
        sys.stdout.write(to_json(config))
        return 0
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        run(config)
    except (ValueError, OSError, FloatingPointError) as error:
        if os.environ.get("DDB_FAST_TRACEBACK"):
            raise
        print(f"{prog}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
