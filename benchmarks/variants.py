"""The Triton kernels that the launchers would launch, as compilable variants; nothing runs.

`recorded()` calls the real launchers with meta tensors inside `launch.recording()` and lets Triton
itself specialise each launch as its JIT does: pointers and integers divisible by 16, integers equal
to 1 and absent tensors as constants.
"""

import functools
import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import shapes
import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature
from tune import forget

from ddb_fast.kernels import tuned
from ddb_fast.kernels.launch import Launch, recording

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Specialisation depends on the kind of GPU only, not on its architecture.
_BACKEND = make_backend(GPUTarget("cuda", 90, 32))


@dataclass(frozen=True, eq=False)
class Variant:
    """One kernel as it would be compiled; `wide` are the operands to be moved 16 bytes at a time.

    `half`: it computes on bf16 or fp16, for which spills are forbidden. `arch`: the only
    architecture that it is launched on, None for every one.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attrs: dict[tuple[int, ...], Any]
    num_warps: int
    num_stages: int
    half: bool
    wide: frozenset[str]
    labels: list[str] = field(default_factory=list)
    arch: str | None = None

    @property
    def key(self) -> tuple:
        """What Triton's cache distinguishes."""
        return (
            self.name, *self.signature.items(), str(self.constants), str(self.attrs),
            self.num_warps, self.num_stages,
        )  # fmt: skip

    @property
    def blocks(self) -> str:
        """The tile and the number of warps, for the table."""
        named = {list(self.signature)[i]: v for (i, *_), v in self.constants.items()}
        tile = "x".join(
            f"{name.removeprefix('BLOCK_')}{value}"
            for name, value in named.items()
            if name.startswith("BLOCK_")
        )
        return f"{tile} w{self.num_warps} s{self.num_stages}"


def variant(
    launch: Launch, label: str, wide: Callable[[Tensor], bool], arch: str | None = None
) -> Variant:
    """Specialise a launch; `wide` tells for a tensor whether it must be moved in 16 bytes."""
    kernel = launch.kernel
    given = {
        **launch.arguments,
        **launch.constants,
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
    }
    bind = create_function_from_signature(kernel.signature, kernel.params, _BACKEND)
    bound, specialization, options = bind(**given)
    _, signature, constants, attrs = kernel._pack_args(
        _BACKEND, given, bound, specialization, options
    )
    tensors = {name: x for name, x in launch.arguments.items() if isinstance(x, Tensor)}
    return Variant(
        kernel.__name__,
        kernel,
        signature,
        constants,
        attrs,
        launch.num_warps,
        launch.num_stages,
        any(x.dtype in (torch.bfloat16, torch.float16) for x in tensors.values()),
        frozenset(name for name, x in tensors.items() if wide(x)),
        [label],
        arch,
    )


def recorded() -> list[Variant]:
    """Every different variant of the shipped kernels, with the calls that lead to it."""
    found: dict[tuple, Variant] = {}
    # Those for every architecture first: they stand for the same ones of a single architecture.
    for one in (*_group_norms(), *_attentions(), *_tuned()):
        known = found.setdefault(one.key, one)
        if known is not one and one.labels[0] not in known.labels:
            known.labels.append(one.labels[0])
    return list(found.values())


# One shape for each branch: fused in a loop, fused in one tile, split for want of programs.
_BRANCHES = (
    shapes.GroupNorm(128, 256, 32, 32, 32),
    shapes.GroupNorm(128, 512, 8, 8, 32),
    shapes.GroupNorm(2, 256, 32, 32, 32),
)
# Large slabs, which channels_last splits; C / G of 18 and 14, pixels that no vector divides, and
# groups too wide for one program.
_ODD = (
    shapes.GroupNorm(128, 128, 64, 64, 32),
    shapes.GroupNorm(64, 576, 16, 16, 32),
    shapes.GroupNorm(64, 448, 8, 8, 32),
    shapes.GroupNorm(64, 960, 15, 15, 32),
    shapes.GroupNorm(64, 1024, 16, 16, 1),
)
# Slabs so large that a program has 16 warps, whose registers and shared memory are scarcest.
_LARGE = {
    "bf16": (shapes.GroupNorm(16, 256, 128, 128, 32), ("silu+pre_bias+dropout",)),
    "fp32": (shapes.GroupNorm(16, 384, 64, 64, 32), ("silu",)),
}
_LAYOUTS = ("nhwc", "nchw")
# With dropout the pre_bias is added too.
_OPTIONS = tuple(name for name in shapes.OPTIONS if name != "silu+pre_bias")
# Those that add most to a kernel: what the others have beside them are vectors.
_MOST = ("silu+pre_bias+dropout", "residual+return_sum")
_ANY = {name: shapes.OPTIONS[name] for name in ("silu", *_MOST)} | {
    "all": ("silu", "pre_bias", "scale", "shift", "residual", "return_sum")
}


def _group_norms() -> Iterator[Variant]:
    cases = [
        *itertools.product(("bf16",), _BRANCHES, ("nhwc",), _OPTIONS),
        *itertools.product(("bf16",), _BRANCHES, ("nchw",), _MOST),
        *itertools.product(("bf16",), _ODD, _LAYOUTS, ("silu",)),
        # One option set that has most of what the others have; fp16 shares every line with bf16.
        *itertools.product(("fp32",), _BRANCHES, _LAYOUTS, ("silu+pre_bias+dropout",)),
        *itertools.product(("fp16",), _BRANCHES[:1], _LAYOUTS, ("silu+pre_bias+dropout",)),
        *((dtype, shape, "nchw", name)
          for dtype, (shape, names) in _LARGE.items()
          for name in (*names, "residual+return_sum")),
    ]  # fmt: skip
    for dtype, shape, layout, options in cases:
        label = f"group_norm {dtype} {layout} {options} {shape}"
        for launch in _group_norm(shape, DTYPES[dtype], layout, shapes.OPTIONS[options]):
            yield variant(launch, label, functools.partial(_wide_image, shape))


def _wide_image(shape: shapes.GroupNorm, x: Tensor) -> bool:
    if x.shape != (shape.n, shape.c, shape.h, shape.w) or x.element_size() != 2:
        return False
    channels_last = not x.is_contiguous() or shape.h * shape.w == 1
    return (shape.c if channels_last else shape.h * shape.w) % 8 == 0


def _group_norm(
    shape: shapes.GroupNorm, dtype: torch.dtype, layout: str, options: tuple[str, ...]
) -> list[Launch]:
    from ddb_fast.kernels.triton_group_norm import fused

    n, c, h, w, g = shape.n, shape.c, shape.h, shape.w, shape.g
    memory_format = torch.channels_last if layout == "nhwc" else torch.contiguous_format

    def empty(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    def asked(name: str, *size: int, dtype: torch.dtype = dtype) -> Tensor | None:
        return empty(*size, dtype=dtype) if name in options else None

    x = torch.empty((n, c, h, w), dtype=dtype, device="meta", memory_format=memory_format)
    residual = torch.empty_like(x) if "residual" in options else None
    pre_bias, scale, shift = (asked(name, n, c) for name in ("pre_bias", "scale", "shift"))
    weight, bias = empty(c), empty(c)
    seed = asked("dropout", dtype=torch.int64)
    silu, dropout_p = "silu" in options, 0.1 if seed is not None else 0.0
    with recording() as launches:
        _, total, mean, rstd = fused.forward(
            x, residual, pre_bias, weight, bias, scale, shift, seed,
            g, 1e-5, silu, dropout_p, "return_sum" in options,
        )  # fmt: skip
        d_sum = torch.empty_like(x) if total is not None else None
        needs = (pre_bias is not None, True, True, scale is not None, shift is not None)
        fused.backward(
            torch.empty_like(x), d_sum, x if total is None else total,
            pre_bias if total is None else None, weight, bias, scale, shift, seed, mean, rstd,
            g, silu, dropout_p, needs,
        )  # fmt: skip
    return launches


# Lengths inside one block, of several blocks, and beyond; the head dimensions of the U-Nets.
ATTENTIONS = {
    "bf16": (
        shapes.Attention(128, 1, 64, 256),
        shapes.Attention(128, 1, 256, 256),
        shapes.Attention(32, 1, 1024, 256),
        shapes.Attention(32, 1, 4096, 128),
        shapes.Attention(128, 4, 64, 64),
        shapes.Attention(128, 3, 256, 64),
        shapes.Attention(128, 2, 1024, 64),
        shapes.Attention(64, 32, 256, 8),
        shapes.Attention(64, 4, 256, 40),
        shapes.Attention(64, 4, 100, 96),
        shapes.Attention(64, 4, 16, 64),
        shapes.Attention(64, 4, 128, 128),
    ),
    "fp16": (
        shapes.Attention(128, 1, 64, 256),
        shapes.Attention(128, 3, 256, 64),
        shapes.Attention(32, 1, 1024, 256),
    ),
    "fp32": (
        shapes.Attention(128, 1, 64, 256),
        shapes.Attention(128, 3, 256, 64),
        shapes.Attention(32, 1, 1024, 64),
    ),
}


def _attentions() -> Iterator[Variant]:
    for dtype, cases in ATTENTIONS.items():
        for shape in cases:
            for layout in ("packed", "separate"):
                label = f"attention {dtype} {layout} {shape}"
                for launch in _attention(shape, DTYPES[dtype], layout):
                    yield variant(launch, label, _wide_heads)


def _tuned() -> Iterator[Variant]:
    """What the tables of kernels/tuned/ put in the place of the kernels' own choice."""
    for path in sorted(tuned.FOLDER.glob("sm_*.json")):
        table = json.loads(path.read_text("utf-8"))["configurations"]
        norms = set(table.pop("group_norm", {}))
        known = set()
        for (_, shape), dtype, layout in itertools.product(
            shapes.unique(shapes.GROUP_NORM), DTYPES, _LAYOUTS
        ):
            keys = _norm_keys(shape, DTYPES[dtype], layout)
            known |= keys
            # A table is measured with SiLU alone and counts for every call of the class.
            for name, options in _ANY.items() if keys & norms else ():
                with _on(path.stem):
                    launches = _group_norm(shape, DTYPES[dtype], layout, options)
                label = f"{path.stem} group_norm {dtype} {layout} {name} {shape}"
                for launch in launches:
                    wide = functools.partial(_wide_image, shape)
                    yield variant(launch, label, wide, path.stem)
        if norms - known:
            raise ValueError(f"{path}: no shape is known for {sorted(norms - known)}")
        for key in sorted({key for kernel in table.values() for key in kernel}):
            dtype, _, length, width = key.split("/")
            shape = shapes.Attention(128, 1, int(length[1:]), int(width[1:]))
            with _on(path.stem):
                launches = _attention(shape, DTYPES[dtype], "packed")
            for launch in launches:
                yield variant(launch, f"{path.stem} {key}", _wide_heads, path.stem)


def _norm_keys(shape: shapes.GroupNorm, dtype: torch.dtype, layout: str) -> set[str]:
    """What a call and its gradients look up in a table."""
    size = (shape.c, shape.h, shape.w)
    return {
        f"{tuned.group_norm_class(dtype, layout == 'nchw', size, backward)}/{shape.c // shape.g}"
        for backward in (False, True)
    }


@contextmanager
def _on(arch: str) -> Iterator[None]:
    """Launch as on a device of this architecture."""
    before, tuned.architecture = tuned.architecture, lambda device: arch
    forget()
    try:
        yield
    finally:
        tuned.architecture = before
        forget()


def _wide_heads(x: Tensor) -> bool:
    if x.dim() != 4 or x.element_size() != 2 or x.stride(3) != 1:
        return False
    return all(size % 8 == 0 for size in (x.shape[3], *x.stride()[:3]))


def _attention(shape: shapes.Attention, dtype: torch.dtype, layout: str) -> list[Launch]:
    from ddb_fast.kernels import fused_attention, triton_attention

    b, h, s, d = shape.b, shape.h, shape.s, shape.d
    if layout == "packed":
        packed = torch.empty((b, s, 3, h, d), dtype=dtype, device="meta")
        gradients = q, k, v = packed.permute(2, 0, 3, 1, 4).unbind(0)
    else:
        q, k, v = (torch.empty((b, h, s, d), dtype=dtype, device="meta") for _ in range(3))
        gradients = [fused_attention.empty_like_tokens(*x.shape, x) for x in (q, k, v)]
    if triton_attention.why_not("attention", q, k, v):
        return []
    with recording() as launches:
        o, lse = triton_attention.forward(q, k, v, d**-0.5)
        triton_attention.backward(torch.empty_like(o), q, k, v, o, lse, d**-0.5, gradients)
    return launches
