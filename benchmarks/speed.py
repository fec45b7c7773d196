"""What the parts `kernels` and `cpu` of the suite measure: ops side by side, forward and backward.

CE, copy-equivalent, is a call's time over that of y.copy_(x) on a tensor of the same size in the
same process. GB/s counts every operand and result once, however often a contender moves them.
"""

import contextlib
import functools
import itertools
import mmap
from collections.abc import Iterable, Iterator, Sequence

import closeness
import contenders
import measure
import shapes
import torch
from contenders import Contender
from rows import Item, Row
from torch import Tensor

from ddb_fast.kernels import dispatch, tuned
from ddb_fast.train import keep_freed_memory

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Tensors of x's size that have to be moved, without and with a residual whose sum is returned.
MOVED = {"forward": (2, 4), "backward": (3, 4), "both": (5, 8)}
# q, k, v, o; and q, k, v, do, dq, dk, dv.
ATTENTION_MOVED = {"forward": 4, "backward": 7, "both": 11}
# Contenders that take seconds to be compiled, or to run.
_SLOW = ("compile", "flex", "sdpa-math")
# Two products forward, five backward.
PRODUCTS = {"forward": 1.0, "backward": 2.5, "both": 3.5}


def settings() -> None:
    """Let torch.compile fall back to nothing silently, and its graphs run backward twice."""
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    torch._functorch.config.donated_buffer = False


def norm_items(
    device: torch.device,
    dtype: str,
    options: str,
    groups: Iterable[tuple[str, shapes.GroupNorm]],
    directions: Sequence[str] = ("forward", "backward", "both"),
) -> Iterator[Item]:
    """A row for every shape, contender and direction."""
    # Inside our own graph of the calls; the mode's CUDA graphs would be a second one.
    mode = "max-autotune-no-cudagraphs" if device.type == "cuda" else "default"
    for group, shape in groups:
        found, missing = contenders.norm_contenders(shape, shapes.OPTIONS[options], device, mode)
        yield from _absent("group_norm", missing)
        for contender in found:
            # Eager does the same.
            if contender.name.startswith("torch/"):
                continue
            for direction in directions:
                key = f"group_norm {shape} {dtype} {options} {direction} {contender.name}"
                yield (
                    key,
                    functools.partial(
                        _norm_row, device, dtype, options, group, shape, contender, direction
                    ),
                )


def _norm_row(
    device: torch.device,
    dtype: str,
    options: str,
    group: str,
    shape: shapes.GroupNorm,
    contender: Contender,
    direction: str,
) -> Row:
    names = shapes.OPTIONS[options]
    _compile_afresh(shape, options)

    def operands(seed: int) -> dict[str, Tensor]:
        return contenders.norm_operands(shape, DTYPES[dtype], names, contender, device, seed)

    off = norm_off(shape, names, contender, operands(0), direction)
    size = shape.elements * DTYPES[dtype].itemsize
    tensors = MOVED[direction]["residual" in names]
    timing = time_contender(device, contender, direction, operands, tensors * size)
    return {
        "op": "group_norm", "group": group, "shape": str(shape), "dtype": dtype,
        "options": options, "direction": direction, "contender": contender.name,
        **timing.row(), "off": off,
        "CE": timing.median / copy_seconds(device, shape.elements, DTYPES[dtype]),
        "GB/s": tensors * size / timing.median / 1e9,
    }  # fmt: skip


def norm_off(
    shape: shapes.GroupNorm,
    options: tuple[str, ...],
    contender: Contender,
    operands: contenders.Operands,
    direction: str,
) -> float:
    """Assert that a group norm is close to the reference; how far off it is."""
    return _off(
        contender,
        operands,
        direction,
        closeness.reference_norm(shape, options),
        dropout_p=contenders.DROPOUT if "dropout" in options else 0.0,
    )


def time_contender(
    device: torch.device, contender: Contender, direction: str, operands, footprint: int
) -> measure.Timing:
    """Time a direction of a contender; operands(seed) draws what it is called with."""
    return measure.timed(
        device,
        lambda i: contenders.DIRECTIONS[direction](contender, operands(i)),
        measure.rotation(device, footprint),
    )


@functools.lru_cache(maxsize=1)
def _compile_afresh(*what: object) -> None:
    # All shapes share one function, whose compiled versions are searched one after the other.
    torch.compiler.reset()


@functools.lru_cache(maxsize=64)
def copy_seconds(device: torch.device, elements: int, dtype: torch.dtype) -> float:
    """Time of y.copy_(x), measured once in this process for a size."""

    def build(i: int) -> measure.Call:
        x = torch.randn(elements, device=device, dtype=torch.float32).to(dtype)
        y = torch.empty_like(x)
        return lambda: y.copy_(x)

    sets = measure.rotation(device, 2 * elements * dtype.itemsize)
    return measure.timed(device, build, sets).median


def attention_items(
    device: torch.device,
    dtype: str,
    groups: Iterable[tuple[str, shapes.Attention]],
    directions: Sequence[str] = ("forward", "backward", "both"),
) -> Iterator[Item]:
    """As `norm_items`."""
    found, missing = contenders.attention_contenders(device)
    yield from _absent("attention", missing)
    for group, shape in groups:
        for contender in found:
            for direction in directions:
                key = f"attention {shape} {dtype} {direction} {contender.name}"
                yield (
                    key,
                    functools.partial(
                        _attention_row, device, dtype, group, shape, contender, direction
                    ),
                )


def _attention_row(
    device: torch.device,
    dtype: str,
    group: str,
    shape: shapes.Attention,
    contender: Contender,
    direction: str,
) -> Row:
    _compile_afresh(shape)

    def operands(seed: int) -> dict[str, Tensor]:
        return contenders.attention_operands(shape, DTYPES[dtype], device, seed)

    off = attention_off(contender, operands(0), direction)
    moved = ATTENTION_MOVED[direction] * shape.elements * DTYPES[dtype].itemsize
    timing = time_contender(device, contender, direction, operands, moved)
    return {
        "op": "attention", "group": group, "shape": str(shape), "dtype": dtype, "options": "",
        "direction": direction, "contender": contender.name, **timing.row(), "off": off,
        "CE": timing.median / copy_seconds(device, shape.elements, DTYPES[dtype]),
        "GB/s": moved / timing.median / 1e9,
        "TFLOP/s": PRODUCTS[direction] * shape.flops / timing.median / 1e12,
    }  # fmt: skip


def attention_off(contender: Contender, operands: contenders.Operands, direction: str) -> float:
    """Assert that an attention is close to the reference; how far off it is."""
    return _off(contender, operands, direction, contenders.our_attention("reference"))


def _off(
    contender: Contender,
    operands: contenders.Operands,
    direction: str,
    truth: Contender,
    dropout_p: float = 0.0,
) -> float:
    # Compiles, beside others.
    contenders.DIRECTIONS[direction](contender, operands)()
    gradients = direction != "forward"
    with measure.alone():
        return closeness.assert_close(
            contender, operands, truth, gradients=gradients, dropout_p=dropout_p
        )


def _absent(op: str, missing: dict[str, str]) -> Iterator[Item]:
    for name, reason in missing.items():
        yield f"{op} without {name}", functools.partial(dict, absent=f"{op}: {name}", why=reason)


def host_items(device: torch.device) -> Iterator[Item]:
    """What an eager call costs the host, with tensors so small that no device is ever late."""
    norm, heads = shapes.GroupNorm(2, 64, 8, 8, 32), shapes.Attention(2, 1, 64, 64)
    found, _ = contenders.norm_contenders(norm, shapes.OPTIONS["silu"], device, "default")
    for contender in found:
        if contender.name.endswith("/nhwc") and not contender.name.startswith("compile"):
            drawn = functools.partial(
                contenders.norm_operands, norm, DTYPES["bf16"], shapes.OPTIONS["silu"], contender
            )
            yield from _host("group_norm", contender, drawn, device)
    found, _ = contenders.attention_contenders(device)
    for contender in found:
        if contender.name not in ("flex", "sdpa-math"):
            drawn = functools.partial(contenders.attention_operands, heads, DTYPES["bf16"])
            yield from _host("attention", contender, drawn, device)


def _host(op: str, contender: Contender, draw, device: torch.device) -> Iterator[Item]:
    for direction in ("forward", "both"):

        def row(direction: str = direction) -> Row:
            call = contenders.DIRECTIONS[direction](contender, draw(device))
            return {
                "host": op, "direction": direction, "contender": contender.name,
                **measure.host_cost(device, call).row(),
            }  # fmt: skip

        yield f"host {op} {direction} {contender.name}", row


def kernels(device: torch.device) -> Iterator[Item]:
    """All items of the part `kernels`, the most telling first, what has to be compiled last."""
    norms, heads = shapes.unique(shapes.GROUP_NORM), shapes.unique(shapes.ATTENTION)
    own = [(group, shape) for group, shape in norms if group == "ddb"]
    few = [("ddb", shape) for shape in shapes.OPTIONS_SHAPES]
    found = [
        *host_items(device),
        *norm_items(device, "bf16", "silu", own),
        *attention_items(device, "bf16", heads, ("forward", "both")),
    ]
    for options in shapes.OPTIONS:
        if options != "silu":
            found += norm_items(device, "bf16", options, few, ("forward", "both"))
    others = [pair for pair in norms if pair not in own]
    found += norm_items(device, "bf16", "silu", others, ("forward", "both"))
    yield from sorted(found, key=lambda item: item[0].split()[-1].split("/")[0] in _SLOW)


def cpu(
    norms: Iterable[tuple[str, shapes.GroupNorm]],
    heads: Iterable[tuple[str, shapes.Attention]],
    *,
    samples: tuple[int, int] = (16, 4),
) -> Iterator[Item]:
    """All items of the part `cpu`: contenders of a shape in turns, so one row holds them all."""
    # As a run has it; else it depends on the heap whether a call's results lie in fresh pages, and
    # then the call takes up to three times as long.
    keep_freed_memory()
    _fetch_memory()
    for name, row, pairs, n in (
        ("group_norm {} {} silu {}", _cpu_norm_row, norms, samples[0]),
        ("attention {} {} {}", _cpu_attention_row, heads, samples[1]),
    ):
        # Some differ in nothing but the number of samples.
        different: dict[object, str] = {}
        for group, shape in pairs:
            different.setdefault(shape.at(n), group)
        for (shape, group), dtype, direction in itertools.product(
            different.items(), ("fp32", "bf16"), ("forward", "both")
        ):
            key = name.format(shape, dtype, direction)
            yield key, functools.partial(row, group, shape, dtype, direction)


def _fetch_memory() -> None:
    """Have a virtual machine fetch memory from its host before anything is timed.

    A huge page takes 2 ms the first time and 0.1 ms from then on, and only the C++ operators ask
    for huge pages: the first row measured was up to five times too slow for them.
    """
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return
    size = 2**30
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        with contextlib.suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
        for page in range(0, size, 2**21):
            memory[page] = 1


def _cpu_norm_row(group: str, shape: shapes.GroupNorm, dtype: str, direction: str) -> Row:
    device, options = torch.device("cpu"), shapes.OPTIONS["silu"]
    _compile_afresh(shape, dtype)
    found, missing = contenders.norm_contenders(shape, options, device, "default")
    if "native" in missing:
        raise RuntimeError(missing["native"])
    calls, drawn = {}, {}
    for contender in found:
        # Eager does what our backend torch does, and Triton is here for tests only.
        if contender.name.startswith(("eager", "triton")):
            continue
        if contender.layout not in drawn:
            drawn[contender.layout] = contenders.norm_operands(
                shape, DTYPES[dtype], options, contender, device
            )
        operands = drawn[contender.layout]
        norm_off(shape, options, contender, operands, direction)
        calls[contender.name] = contenders.DIRECTIONS[direction](contender, operands)
    timings = measure.interleaved(calls, rounds=7)
    sample = (shape.c, shape.h, shape.w)
    return {
        "op": "group_norm", "group": group, "shape": str(shape), "dtype": dtype,
        "direction": direction,
        "classes": {
            layout: tuned.group_norm_class(
                DTYPES[dtype], layout == "nchw", sample, direction != "forward"
            )
            for layout in contenders.LAYOUTS
        },
        "us": {name: timing.median * 1e6 for name, timing in timings.items()},
    }  # fmt: skip


def _cpu_attention_row(group: str, shape: shapes.Attention, dtype: str, direction: str) -> Row:
    device = torch.device("cpu")
    if reasons := contenders.backends()["attention"]["native"]:
        raise RuntimeError("; ".join(reasons))
    operands = contenders.attention_operands(shape, DTYPES[dtype], device)
    calls = {}
    for backend in ("native", "torch"):
        contender = contenders.our_attention(backend)
        attention_off(contender, operands, direction)
        calls[backend] = contenders.DIRECTIONS[direction](contender, operands)
    timings = measure.interleaved(calls, rounds=7)
    taken = dispatch.automatic(
        "attention", *(operands[name] for name in "qkv"), gradients=direction != "forward"
    )
    return {
        "op": "attention", "group": group, "shape": str(shape), "dtype": dtype,
        "direction": direction, "automatic": taken[0],
        "us": {name: timing.median * 1e6 for name, timing in timings.items()},
        "GFLOP/s": PRODUCTS[direction] * shape.flops / timings["native"].median / 1e9,
    }  # fmt: skip
