"""What is computed and what it costs: time by what it is for, products counted, and the ceiling."""

import re
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

DATA, WINDOW = "ddb_fast: data", "ddb_fast: recorded steps"

CATEGORIES = (
    "convolution", "norm", "attention", "matmul", "optimiser", "data", "other", "idle",
)  # fmt: skip
COUNTED = ("convolution", "attention", "matmul")
# Names of operators, autograd nodes and ranges, and of GPU kernels, ours in Triton among them.
_NAMES = {
    "data": re.compile(re.escape(DATA)),
    "optimiser": re.compile(r"^Optimizer\.|_foreach_|_fused_(adam|sgd)|linalg_vector_norm"),
    "attention": re.compile(
        r"attention|flash|fmha|^(forward|backward)_tile$|^backward_(queries|keys)$", re.IGNORECASE
    ),
    "norm": re.compile(
        r"(group|batch|layer)_?norm"
        r"|^forward_(fused|statistics|groups|apply)$|^backward_(fused|sums|groups|apply)$",
        re.IGNORECASE,
    ),
    "convolution": re.compile(r"conv", re.IGNORECASE),
    "matmul": re.compile(
        r"::(mm|addmm|bmm|baddbmm|mv|addmv|linear|matmul)$"
        r"|(Mm|Addmm|Bmm|Baddbmm|Linear|Mv)Backward|gemm",
    ),
}
# torch's counter has no formula for its attention on a CPU.
_ON_CPU = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda do, q, k, v, *_, **__: sdpa_backward_flop_count(do, q, k, v)
    ),
}


def category(name: str) -> str | None:
    """What an operator, range or kernel of this name is for; None if its name does not tell."""
    return next((kind for kind, pattern in _NAMES.items() if pattern.search(name)), None)


def time_shares(events: Iterable[Any], *, cuda: bool) -> dict[str, float]:
    """Shares by category of the time in the range WINDOW, from the profiler's function events.

    The outermost operator or range whose name tells decides for all that is inside. On a CPU
    operators count with their own time, on CUDA with that of the kernels they launched; kernels
    that no operator launched are told by their names. What is left of the range is idle.
    """
    events = list(events)
    window = next(e for e in events if e.name == WINDOW and e.device_type.name == "CPU")
    spent: dict[str, float] = defaultdict(float)
    if cuda:
        launched: Counter[str] = Counter()
        for event in events:
            for kernel in event.kernels:
                spent[_outermost(event) or category(kernel.name) or "other"] += kernel.duration
                launched[kernel.name] += kernel.duration
        run: Counter[str] = Counter()
        for event in events:
            if event.device_type.name == "CUDA" and not event.is_user_annotation:
                run[event.name] += event.time_range.elapsed_us()
        for name, duration in (run - launched).items():
            spent[category(name) or "other"] += duration
    else:
        for child in window.cpu_children:
            _own_time(child, None, spent)
    whole = max(window.time_range.elapsed_us(), sum(spent.values()))
    spent["idle"] = whole - sum(spent.values())
    return {kind: spent[kind] / whole for kind in CATEGORIES}


def _own_time(event: Any, inherited: str | None, spent: dict[str, float]) -> None:
    kind = inherited or category(event.name)
    spent[kind or "other"] += event.self_cpu_time_total
    for child in event.cpu_children:
        _own_time(child, kind, spent)


def _outermost(event: Any) -> str | None:
    kind = None
    while event is not None:
        kind = category(event.name) or kind
        event = event.cpu_parent
    return kind


class _WholeNetwork(nullcontext):
    """Stands for the counter's record of modules, whose hooks fail in inference mode."""

    parents = ("Global",)


def flop_counter() -> FlopCounterMode:
    """torch's counter of products, with attention on a CPU, which it leaves out."""
    counter = FlopCounterMode(display=False, custom_mapping=_ON_CPU)
    counter.mod_tracker = _WholeNetwork()
    return counter


def counted(counter: FlopCounterMode) -> dict[str, int]:
    """What a counter has counted so far, by category: convolution, attention, matmul."""
    totals: dict[str, int] = defaultdict(int)
    for packet, flops in counter.get_flop_counts().get("Global", {}).items():
        kind = category(str(packet))
        totals[kind if kind in COUNTED else "matmul"] += flops
    return dict(totals)


def matmul_ceiling(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """FLOP/s of a product of two matrices of `size` squared: the median of five."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    cuda, seconds = device.type == "cuda", []
    repeats = 20 if cuda else 1
    for _ in range(7):
        if cuda:
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        for _ in range(repeats):
            a @ b
        if cuda:
            torch.cuda.synchronize(device)
        seconds.append((time.perf_counter() - began) / repeats)
    return 2 * size**3 / statistics.median(seconds[2:])
