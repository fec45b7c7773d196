"""Launching Triton kernels, or writing down what would be launched.

Inside `recording()` nothing runs: a launcher called with meta tensors yields the exact kernels,
signatures and configurations that it would launch on a GPU. The ahead-of-time gate compiles those.
"""

import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

if os.environ.get("TRITON_INTERPRET") == "1":
    from .interpreter import correct

    correct()


@dataclass(frozen=True)
class Launch:
    """One kernel launch: `arguments` in the kernel's order, `constants` are its constexprs."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Tensor | int | float | None]
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int


_recorded: ContextVar[list[Launch] | None] = ContextVar("ddb_fast_launches", default=None)


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Collect the launches of this context instead of running them."""
    launches: list[Launch] = []
    token = _recorded.set(launches)
    try:
        yield launches
    finally:
        _recorded.reset(token)


def launch(
    kernel: Any,
    grid: Sequence[int],
    arguments: Mapping[str, Tensor | int | float | None],
    constants: Mapping[str, Any],
    *,
    num_warps: int = 4,
    num_stages: int = 1,
) -> None:
    """Run kernel[grid] on the device of its tensors; a tensor that is None becomes a constant."""
    launches = _recorded.get()
    if launches is not None:
        launches.append(Launch(kernel, tuple(grid), arguments, constants, num_warps, num_stages))
        return
    device = next(a.device for a in arguments.values() if isinstance(a, Tensor))
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        # Triton launches on the current device, whatever the tensors' own.
        with torch.cuda.device(device):
            _launch(kernel, grid, arguments, constants, num_warps, num_stages)
    else:
        _launch(kernel, grid, arguments, constants, num_warps, num_stages)


# Triton finds out at every call which variant of a kernel is meant, which costs the host several
# times the launch itself. All that it looks at is in the key: types and alignment of tensors, the
# values of everything else.
_compiled: dict[tuple, tuple[Any, tuple[str, ...]]] = {}
# Sizes that never come back must not pile up.
_REMEMBERED = 2**14


def _launch(
    kernel: Any,
    grid: Sequence[int],
    arguments: Mapping[str, Tensor | int | float | None],
    constants: Mapping[str, Any],
    num_warps: int,
    num_stages: int,
) -> None:
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
    parts = [id(kernel), device, num_warps, num_stages, *constants.values()]
    for value in arguments.values():
        if isinstance(value, Tensor):
            parts.append(value.dtype)
            value = value.data_ptr() % 16 == 0
        parts.append(value)
    known = _compiled.get(key := tuple(parts))
    if known is not None:
        compiled, names = known
        given = {**arguments, **constants}
        compiled[(*grid, 1, 1)[:3]](*[given[name] for name in names])
        return
    compiled = kernel[tuple(grid)](
        **arguments, **constants, num_warps=num_warps, num_stages=num_stages
    )
    # The interpreter compiles nothing.
    if compiled is not None:
        if len(_compiled) >= _REMEMBERED:
            _compiled.clear()
        _compiled[key] = compiled, tuple(kernel.arg_names)


def power_of_two(n: int) -> int:
    """Round up to a power of two, which every block is."""
    return 1 << (n - 1).bit_length()


def multiprocessors(device: torch.device) -> int:
    """How many programs run side by side; 132, an H100's, where the device does not say."""
    return _multiprocessors(device.index) if device.type == "cuda" else 132


@functools.cache
def _multiprocessors(index: int | None) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count
