"""Everything worth measuring, in parts that continue where they were broken off.

    python benchmarks/suite.py --part correctness|kernels|tune|step|sampling|cpu|scaling --out DIR
    python benchmarks/suite.py --merge DIR

Runs from a checkout, installed or not. `cpu` and `scaling` are for a CPU, `correctness`, `kernels`
and `tune` for a GPU; `step` and `sampling` measure a GPU where there is one, else the CPU. A part
ends by itself in less than nine minutes; the same command again goes on, until it says that nothing
is left. `tune` and `cpu` write what they found to kernels/tuned/, `--merge` the tables to
benchmarks/results/.
"""

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import checkout  # noqa: F401 - before everything that imports ddb_fast
import correctness
import merge
import networks
import peak_memory
import rows
import scaling
import shapes
import speed
import torch
import tune
from rows import Item

from ddb_fast.kernels import tuned
from ddb_fast.presets import PRESETS

# What is left of nine minutes is for starting and for writing.
SECONDS = 520.0
GPU_ONLY, CPU_ONLY = ("correctness", "kernels", "tune"), ("cpu", "scaling")


def items(part: str, device: torch.device) -> Iterator[Item]:
    """What a part measures."""
    if part == "correctness":
        return correctness.items(device)
    if part == "kernels":
        return speed.kernels(device)
    if part == "tune":
        return tune.items(device)
    cuda = device.type == "cuda"
    if part == "step" and cuda:
        return networks.step_items(device, networks.preset())
    if part == "step":
        return itertools.chain(networks.cpu_step_items(networks.preset()), peak_memory.items())
    if part == "sampling" and cuda:
        return networks.sampling_items(device, networks.preset())
    if part == "sampling":
        tiny = PRESETS["tiny"]()
        return networks.cpu_sampling_items(tiny.diffusion, tiny.sampling)
    if part == "scaling":
        return scaling.items()
    return speed.cpu(shapes.unique(shapes.GROUP_NORM))


def main(argv: Sequence[str] | None = None) -> int:
    """Run a part or merge: 0 if nothing is left, 3 if something is, 2 for misuse."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = (*GPU_ONLY, "step", "sampling", *CPU_ONLY)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--part", choices=parts)
    what.add_argument("--merge", type=Path, metavar="DIR", help="folder of measured rows")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where rows are kept")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="when a part ends")
    given = parser.parse_args(argv)
    try:
        if given.merge is not None:
            for path in merge.merge(given.merge, "benchmarks/suite.py --merge"):
                print(path)
            return 0
        if given.out is None:
            parser.error("--part needs --out")
        return run(given.part, given.out, given.seconds)
    except ValueError as error:
        print(f"suite.py: {error}", file=sys.stderr)
        return 2


def run(part: str, out: Path, seconds: float) -> int:
    """Measure what is missing of a part; see `main` for what is returned."""
    cuda = torch.cuda.is_available()
    if part in GPU_ONLY and not cuda:
        raise ValueError(f"part {part} needs a GPU, and torch finds none")
    device = torch.device("cuda", 0) if cuda and part not in CPU_ONLY else torch.device("cpu")
    speed.settings()
    kept = rows.Rows(out / f"{part}.jsonl", rows.describe(device))
    left = rows.measure_all(kept, items(part, device), seconds=seconds, device=device)
    if part in ("tune", "cpu"):
        print(_write_table(part, kept, device))
    failed = [row["key"] for row in kept if "error" in row or row.get("ok") is False]
    print(f"{part}: {len(kept.rows)} rows, {len(left)} left, {len(failed)} failed")
    for key in failed:
        print(f"failed: {key}")
    return 3 if left else 0


def _write_table(part: str, kept: rows.Rows, device: torch.device) -> Path:
    table = tune.from_gpu(kept) if part == "tune" else tune.from_cpu(kept)
    command = f"python benchmarks/suite.py --part {part}"
    return tune.write(rows.describe(device), command, table, tuned.FOLDER)


if __name__ == "__main__":
    sys.exit(main())
