"""What was measured: the fastest backend per shape class, and launch configurations.

One file per architecture in tuned/, written by `benchmarks/suite.py`:
{"device", "torch", "triton", "command", "winners": {op: {class: backend}}, "configurations":
{kernel: {key: {name: number}}}}. Without a file, the winners of the nearest measured architecture
of the same kind count: the newest one not newer, else the oldest. Configurations count on their own
architecture only: what fits into its registers and shared memory need not fit elsewhere.
"""

import functools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent / "tuned"

_DTYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float64: "fp64",
}
_CPU_LEVELS = {"AVX512": "cpu-avx512", "AVX2": "cpu-avx2"}


def architecture(device: torch.device) -> str:
    """Name the device's architecture: "sm_90", "cpu-avx512", "cpu-avx2", "cpu", or its type."""
    return _architecture(device.type, device.index)


@functools.cache
def _architecture(kind: str, index: int | None) -> str:
    if kind == "cpu":
        return _CPU_LEVELS.get(torch.backends.cpu.get_cpu_capability(), "cpu")
    if kind == "cuda" and torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability(index)
        return f"sm_{major}{minor}"
    return kind


def group_norm_class(
    dtype: torch.dtype, contiguous: bool, shape: Sequence[int], differentiable: bool
) -> str:
    """layout/dtype/direction/log2 of the bytes of one sample (C, H, W), rounded up.

    The time of every backend grows with the batch; what differs is what fits in a cache.
    """
    layout = "nchw" if contiguous else "nhwc"
    direction = "backward" if differentiable else "forward"
    size = _log2(math.prod(shape) * dtype.itemsize)
    return f"{layout}/{_DTYPES[dtype]}/{direction}/{size}"


def attention_class(dtype: torch.dtype, length: int, head_dim: int, differentiable: bool) -> str:
    """dtype/direction/S/D; S, the longer of the two lengths, and D rounded up to powers of two."""
    direction = "backward" if differentiable else "forward"
    return f"{_DTYPES[dtype]}/{direction}/S{1 << _log2(length)}/D{1 << _log2(head_dim)}"


def _log2(size: int) -> int:
    # By comparisons, which a trace with symbolic sizes turns into guards.
    power = 0
    while size > 1 << power:
        power += 1
    return power


def winner(op: str, device: torch.device, shape_class: str) -> str | None:
    """Name the backend that was measured fastest, None where nothing was."""
    table = measured(architecture(device))
    winners = {} if table is None else table["winners"].get(op, {})
    if device.type == "cuda" and shape_class not in winners:
        # The same bytes and, in a GPU's matrix units, the same speed.
        shape_class = shape_class.replace("fp16/", "bf16/")
    return winners.get(shape_class)


def configuration(kernel: str, device: torch.device, key: str) -> Mapping[str, int] | None:
    """Return the launch configuration measured on this architecture, None where there is none."""
    arch = architecture(device)
    if nearest(arch) != arch:
        return None
    return measured(arch)["configurations"].get(kernel, {}).get(key)


def describe(device: torch.device) -> str:
    """Say in a line which measurements decide on this device, or "unmeasured"."""
    arch = architecture(device)
    name = nearest(arch)
    if name is None:
        return f"{arch}: unmeasured"
    where = f"measured on {measured(name)['device']}"
    return f"{arch}: {where}" if name == arch else f"{arch}: unmeasured, as {name}, {where}"


@functools.cache
def measured(arch: str) -> Mapping[str, Any] | None:
    """Read the table of an architecture or of the nearest measured one."""
    name = nearest(arch)
    return None if name is None else json.loads((FOLDER / f"{name}.json").read_text("utf-8"))


def nearest(arch: str) -> str | None:
    """Name the measured architecture that stands for this one."""
    names = sorted(path.stem for path in FOLDER.glob("*.json"))
    if arch in names:
        return arch
    if arch.startswith("cpu"):
        return next((name for name in names if name.startswith("cpu")), None)
    if not arch.startswith("sm_"):
        return None
    versions = sorted(int(name[3:]) for name in names if name.startswith("sm_"))
    older = [version for version in versions if version <= int(arch[3:])]
    return f"sm_{(older[-1:] or versions[:1])[0]}" if versions else None
