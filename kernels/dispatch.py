"""Which backend runs an op: one choice, by a list of reasons.

Order of precedence: the `backend=` argument, `use_backend(...)`, the environment variable
`DDB_FAST_BACKEND` ("group_norm=torch,attention=reference", read at the first call), automatic. A
backend asked for by name runs or raises ValueError with its reasons. Automatic takes what was
measured fastest for the class of shapes (`tuned.py`), else the first of a fixed order; in either
case one that has no reason not to. Under `torch.export` it takes torch's own operators.

`torch.compile` resolves the choice while it traces: a compiled graph keeps the backends it was
traced with, so `use_backend` belongs around the first call.
"""

import functools
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from . import native, reference, torch_backend, triton_backend, tuned, xformers_backend
from .tracing import assume_constant_result, exporting

ENVIRONMENT_VARIABLE = "DDB_FAST_BACKEND"

# An op, and the name under which its backend is chosen.
OPS = {"group_norm": "group_norm", "attention": "attention", "attention_qkv": "attention"}

_log = logging.getLogger("ddb_fast.kernels")
_logged: set[tuple[str, str, str]] = set()
_context: ContextVar[Mapping[str, str]] = ContextVar(
    "ddb_fast_backends", default=MappingProxyType({})
)


@dataclass(frozen=True)
class Backend:
    """One way to run the ops.

    `why_not(op, *arguments)` lists the reasons why it cannot run `op` (a key of `OPS`) on these
    arguments, the positional ones of the op (x and num_groups; q, k and v; qkv and num_heads);
    without arguments, the reasons why it cannot run `op` on this machine at all; [] means that it
    can. `ops` maps the name of an op to its function, which is called with arguments that `ops.py`
    has checked and brought into the shape it documents.
    """

    name: str
    why_not: Callable[..., list[str]]
    ops: Mapping[str, Callable[..., Any]]


BACKENDS = (
    Backend("native", native.why_not, native.OPS),
    Backend("triton", triton_backend.why_not, triton_backend.OPS),
    Backend("torch", torch_backend.why_not, torch_backend.OPS),
    Backend("xformers", xformers_backend.why_not, xformers_backend.OPS),
    Backend("reference", reference.why_not, reference.OPS),
)
# Above this length torch's own attention is near what a GPU gives (on an H100 it is faster at 256),
# and in fp32, which takes three products of parts, Triton's spills.
_SHORT = 128
# torch's bf16 products run on a CPU's matrix tiles where it has them, ours in its vectors. On a
# Xeon with tiles torch is 1.2 to 7 times as fast, but not at gradients while sequences are short.
_TILES = torch.cpu._is_amx_tile_supported()
_LONG, _LARGE = 64, 2**14


@contextmanager
def use_backend(*, group_norm: str | None = None, attention: str | None = None) -> Iterator[None]:
    """Choose backends by name for the calls inside; a context manager and a decorator.

    None leaves an op to the enclosing choice. The choice belongs to the current thread or task.

    Raises:
        ValueError: no backend has that name.
    """
    asked = {"group_norm": group_norm, "attention": attention}
    asked = {op: name for op, name in asked.items() if name is not None}
    for name in asked.values():
        _backend(name)
    token = _context.set({**_context.get(), **asked})
    try:
        yield
    finally:
        _context.reset(token)


def backends() -> dict[str, dict[str, list[str]]]:
    """List, for each op and backend, the reasons why it is not available here; [] = available."""
    return {
        op: {backend.name: backend.why_not(op) for backend in BACKENDS}
        for op in dict.fromkeys(OPS.values())
    }


def choose(
    op: str, name: str | None, *arguments: Any, gradients: bool | None = None
) -> Callable[..., Any]:
    """Return the function that runs `op` on these arguments.

    gradients: whether automatic takes what is fastest with them; None: if they are recorded now.

    Raises:
        ValueError: the backend asked for by name does not exist or cannot run the op, or automatic
            finds none that can; the message holds the reasons.
    """
    if name is None:
        name = _asked_for(OPS[op])
    if name is not None:
        backend = _backend(name)
        if reasons := backend.why_not(op, *arguments):
            raise ValueError(f"{op}: backend {name!r} cannot run this: {'; '.join(reasons)}")
        return backend.ops[op]
    if exporting():
        return _exported(op, arguments[0])
    refused = []
    for name in automatic(op, *arguments, gradients=gradients):
        backend = _backend(name)
        reasons = backend.why_not(op, *arguments)
        if not reasons:
            return backend.ops[op]
        for reason in reasons:
            _log_once(op, name, reason)
            refused.append(f"{name}: {reason}")
    raise ValueError(f"{op}: no backend can run this: {'; '.join(refused)}")


def _exported(op: str, x: torch.Tensor) -> Callable[..., Any]:
    """What automatic takes for a program that others load, in whatever sizes they have."""
    usual = "native" if x.device.type == "cpu" else "triton"
    _log_once(op, usual, "an exported program gets torch's own operators, which are everywhere")
    return _backend("torch").ops[op]


def automatic(op: str, *arguments: Any, gradients: bool | None = None) -> tuple[str, ...]:
    """Name the backends that automatic tries for `op` on these arguments, best first."""
    x = arguments[0]
    if gradients is None:
        gradients = torch.is_grad_enabled()
    if op == "group_norm":
        describe, details = tuned.group_norm_class, (x.dtype, x.is_contiguous(), x.shape[1:])
        usual = ("native" if x.device.type == "cpu" else "triton", "torch", "reference")
    else:
        if op == "attention":
            length, width = max(x.shape[2], arguments[1].shape[2]), x.shape[3]
        else:
            length, width = x.shape[1], x.shape[2] // (3 * arguments[1])
        describe, details = tuned.attention_class, (x.dtype, length, width)
        if x.device.type == "cpu":
            long = length * width >= _LARGE if gradients else length >= _LONG
            usual = ("native", "torch", "reference")
            if _TILES and long and x.dtype == torch.bfloat16:
                usual = ("torch", "native", "reference")
        elif x.dtype.itemsize == 2 and length <= _SHORT:
            usual = ("triton", "torch", "reference")
        else:
            usual = ("torch", "reference")
    find = _measured if torch.compiler.is_compiling() else _remembered
    measured = find(OPS[op], x.device, describe, *details, gradients)
    return usual if measured is None else (measured, *usual)


def _measured(
    op: str, device: torch.device, describe: Callable[..., str], *details: Any
) -> str | None:
    return _winner(op, device, describe(*details))


_remembered = functools.cache(_measured)


# Dynamo cannot trace how a file is read, and needs no more than the answer.
@assume_constant_result
def _winner(op: str, device: torch.device, shape_class: str) -> str | None:
    return tuned.winner(op, device, shape_class)


def _backend(name: str) -> Backend:
    for backend in BACKENDS:
        if backend.name == name:
            return backend
    names = ", ".join(backend.name for backend in BACKENDS)
    raise ValueError(f"no backend is called {name!r}; there are: {names}")


# Dynamo cannot trace a ContextVar; as a constant of the trace the choice costs no graph break.
@assume_constant_result
def _asked_for(op: str) -> str | None:
    return _context.get().get(op) or _environment().get(op)


@functools.cache
def _environment() -> dict[str, str]:
    text = os.environ.get(ENVIRONMENT_VARIABLE, "")
    chosen = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        op, _, name = part.partition("=")
        if op not in OPS.values() or not name:
            raise ValueError(
                f"{ENVIRONMENT_VARIABLE}={text!r}: {part!r} is not op=backend with op one of "
                f"{', '.join(dict.fromkeys(OPS.values()))}"
            )
        chosen[op] = _backend(name).name
    return chosen


@assume_constant_result
def _log_once(op: str, backend: str, reason: str) -> None:
    if (op, backend, reason) not in _logged:
        _logged.add((op, backend, reason))
        _log.info("%s: not %s, because %s", op, backend, reason)
