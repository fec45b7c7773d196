"""Everything worth measuring, in parts that continue where they were broken off.

    python benchmarks/suite.py --part correctness|kernels|tune|step|sampling|cpu|scaling --out DIR
    python benchmarks/suite.py --part kernels --share 1/8 --out DIR  # and 2/8, 3/8, ... beside it
    python benchmarks/suite.py --merge DIR

Runs from a checkout, installed or not. `cpu` and `scaling` are for a CPU, `correctness`, `kernels`
and `tune` for a GPU; `step` and `sampling` measure a GPU where there is one, else the CPU. A part
ends by itself in less than nine minutes; the same command again goes on, until it says that nothing
is left. Most of `correctness`, `tune` and `kernels` is compiling, which shares do side by side and
take turns on the GPU; the part without a share goes on from what they have measured. (What waits
for Python, which others at work slow down, is in no share.) `tune` and `cpu` write what they found
to kernels/tuned/, `--merge` the tables to benchmarks/results/.
"""

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

import checkout  # noqa: F401 - before everything that imports ddb_fast
import correctness
import measure
import merge
import networks
import peak_memory
import rows
import sampling_ways
import scaling
import shapes
import speed
import swapped
import torch
import tune
from rows import Item

from ddb_fast.kernels import tuned
from ddb_fast.presets import PRESETS

# What is left of nine minutes is for starting and for writing.
SECONDS = 520.0
GPU_ONLY, CPU_ONLY = ("correctness", "kernels", "tune"), ("cpu", "scaling")
SHARED = GPU_ONLY


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
        own, others = networks.step_items(device, networks.preset()), swapped.items(device)
        # What takes minutes to compile last.
        return iter(sorted([*own, *others], key=lambda item: "compile" in item[0]))
    if part == "step":
        return itertools.chain(networks.cpu_step_items(networks.preset()), peak_memory.items())
    if part == "sampling" and cuda:
        return sampling_ways.sampling_items(device, networks.preset())
    if part == "sampling":
        tiny = PRESETS["tiny"]()
        return sampling_ways.cpu_sampling_items(tiny.diffusion, tiny.sampling)
    if part == "scaling":
        return scaling.items()
    return speed.cpu(shapes.unique(shapes.GROUP_NORM), shapes.unique(shapes.ATTENTION))


def main(argv: Sequence[str] | None = None) -> int:
    """Run a part or merge: 0 if nothing is left, 3 if something is, 2 for misuse."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = (*GPU_ONLY, "step", "sampling", *CPU_ONLY)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--part", choices=parts)
    what.add_argument("--merge", type=Path, metavar="DIR", help="folder of measured rows")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where rows are kept")
    parser.add_argument("--share", metavar="I/N", default="1/1", help="every Nth item from the Ith")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="when a part ends")
    given = parser.parse_args(argv)
    try:
        if given.merge is not None:
            for path in merge.merge(given.merge, "benchmarks/suite.py --merge"):
                print(path)
            return 0
        if given.out is None:
            parser.error("--part needs --out")
        share = _share(given.share)
        return run(given.part, given.out, given.seconds, share)
    except ValueError as error:
        print(f"suite.py: {error}", file=sys.stderr)
        return 2


def _share(text: str) -> tuple[int, int]:
    first, _, shares = text.partition("/")
    if not (first.isdecimal() and shares.isdecimal() and 1 <= int(first) <= int(shares)):
        raise ValueError(f"--share {text} is not I/N with I from 1 to N")
    return int(first), int(shares)


def run(part: str, out: Path, seconds: float, share: tuple[int, int]) -> int:
    """Measure what is missing of a share of a part; see `main` for what is returned."""
    cuda = torch.cuda.is_available()
    first, shares = share
    if shares > 1 and part not in SHARED:
        raise ValueError(f"part {part} has no shares, only {', '.join(SHARED)} have")
    if part in GPU_ONLY and not cuda:
        raise ValueError(f"part {part} needs a GPU, and torch finds none")
    device = torch.device("cuda", 0) if cuda and part not in CPU_ONLY else torch.device("cpu")
    speed.settings()
    measured_on = rows.describe(device)
    name = part if shares == 1 else f"{part}-{first}-of-{shares}"
    kept = rows.Rows(out / f"{name}.jsonl", measured_on)
    if shares == 1:
        for key, row in rows.of_part(out, part)[1].items():
            if key not in kept and "error" not in row:
                kept.add(key, row)
    own = items(part, device)
    if shares > 1:
        own = (item for item in own if not item[0].startswith("host "))
        own = itertools.islice(own, first - 1, None, shares)
    with measure.taking_turns(out / "turns.lock") if shares > 1 else nullcontext():
        left = rows.measure_all(kept, own, seconds=seconds, device=device)
    if name in ("tune", "cpu"):
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
