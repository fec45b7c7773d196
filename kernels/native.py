"""The C++ operators for CPUs, see csrc/: loads the library that setup.py builds, at its first use.

The library registers `torch.ops.ddb_fast_native` with the stable ABI of torch 2.10; the operators
check nothing that `ops.py` has checked before.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import fused_attention
from .fused_attention import attention_with, empty_like_tokens
from .fused_group_norm import Fused, Gradients, group_norm_with, register
from .tracing import assume_constant_result, torch_operators_only

LIBRARY = Path(__file__).with_name("_native.so")

_unavailable: str | None = "not tried yet"


def why_not(op: str, *arguments: Any) -> list[str]:
    """List the reasons why the C++ operators cannot run `op`, see `dispatch.Backend`."""
    if _unavailable is not None and (reason := _load()) is not None:
        return [reason]
    if not arguments:
        return []
    x = arguments[0]
    if x.device.type != "cpu":
        return [f"the C++ operators run on CPUs, not on {x.device.type}"]
    if x.dtype == torch.float64 and op != "group_norm":
        return ["the C++ attention computes in fp32, these tensors are fp64"]
    return torch_operators_only(x)


_OPERATORS = ("group_norm", "group_norm_backward", "attention", "attention_backward")


# A constant of the trace: torch.compile cannot trace the loading of a library.
@assume_constant_result
def _load() -> str | None:
    global _unavailable
    if not LIBRARY.exists():
        _unavailable = (
            "the C++ operators were not built: install again with --no-build-isolation where cmake "
            "3.22 and gcc 12 or clang are, and see what the build says (pip install -v)"
        )
    else:
        try:
            torch.ops.load_library(LIBRARY)
            there = all(hasattr(torch.ops.ddb_fast_native, name) for name in _OPERATORS)
            other = "the C++ operators are those of another version, install again"
            _unavailable = None if there else other
        except OSError as error:
            _unavailable = f"the C++ operators do not fit this torch, install again: {error}"
    return _unavailable


def _need() -> None:
    """Load the library for a program that was exported, which nobody asks first whether it can run.

    A backward follows its forward.
    """
    if (reason := _load()) is not None:
        raise RuntimeError(reason)


def _forward(*arguments: Any) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    if _unavailable is not None:
        _need()
    return torch.ops.ddb_fast_native.group_norm.default(*arguments)


def _backward(*arguments: Any) -> Gradients:
    *others, needs = arguments
    return Gradients(*torch.ops.ddb_fast_native.group_norm_backward.default(*others, *needs))


def _attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    o = empty_like_tokens(*q.shape, q)
    # Of each row its largest score, and the sum of the exponentials below it.
    statistics = q.new_empty((*q.shape[:3], 2), dtype=torch.float32)
    if _unavailable is not None:
        _need()
    torch.ops.ddb_fast_native.attention.default(q, k, v, o, statistics, scale)
    return o, statistics


def _attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    statistics: Tensor,
    scale: float,
    gradients: Sequence[Tensor],
) -> None:
    torch.ops.ddb_fast_native.attention_backward.default(
        do, q, k, v, o, statistics, *gradients, scale
    )


fused = Fused(_forward, _backward)

OPS = {
    "group_norm": group_norm_with(fused, register("native", fused)),
    **attention_with("native", fused_attention.Fused(_attention, _attention_backward, (2,))),
}
