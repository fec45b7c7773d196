"""Peak memory of a training step on a CPU beyond what training keeps: a process for each form.

    python benchmarks/peak_memory.py NAME --batch 4

Kept, and so not counted: parameters, gradients, the optimiser's state and the moving average. Two
steps are taken first, then the gradients are allocated, unused heap is given back and the kernel's
record of the largest resident set (VmHWM of /proc/self/status) reset; the figure is what that
record shows after one more step beyond what was resident before it. NAME is one of the forms in
networks.py. Linux only.
"""

import argparse
import ctypes
import functools
import gc
import json
from collections.abc import Iterator
from pathlib import Path

import checkout  # noqa: F401 - before everything that imports ddb_fast
import networks
import torch
from measure import Call
from rows import Item, Row, in_own_process

from ddb_fast.config import DiffusionConfig


def resident(name: str) -> int:
    """A field of /proc/self/status in bytes: VmRSS, VmHWM, RssAnon, ..."""
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    line = next(line for line in lines if line.startswith(f"{name}:"))
    return 1024 * int(line.split()[1])


def peak_of(call: Call) -> tuple[int, int]:
    """Bytes that a call needed for its time beyond what was resident, and what was."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", "utf-8")
    before = resident("VmRSS")
    call()
    return resident("VmHWM") - before, before


def peak_of_step(form: networks.Form, config: DiffusionConfig, batch: int) -> Row:
    """The peak of a training step: the median of three."""
    network, step = networks.training_step(torch.device("cpu"), form, config, batch)
    for _ in range(2):
        step()
    peaks = []
    for _ in range(3):
        for parameter in network.parameters():
            parameter.grad = torch.zeros_like(parameter)
        peaks.append(peak_of(step))
    peak, kept = sorted(peaks)[1]
    return {"form": form.name, "batch": batch, "peak MB": peak / 1e6, "kept MB": kept / 1e6}


def items(batch: int = 4) -> Iterator[Item]:
    """Every form that a CPU runs, each in a process of its own."""
    for form in networks.CPU_FORMS:
        row = functools.partial(in_own_process, __file__, form.name, "--batch", batch)
        yield f"memory {form.name} {batch}", row


def main() -> None:
    forms = {form.name: form for form in networks.CPU_FORMS}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("form", choices=forms)
    parser.add_argument("--batch", type=int, default=4)
    given = parser.parse_args()
    print(json.dumps(peak_of_step(forms[given.form], networks.preset(), given.batch)))


if __name__ == "__main__":
    main()
