"""The C++ group norm for CPUs, see csrc/: loads the library that setup.py builds, at its first use.

The library registers `torch.ops.ddb_fast_native` with the stable ABI of torch 2.10; the operators
check nothing that `ops.py` has checked before.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .fused_group_norm import Fused, Gradients, group_norm_with, register

LIBRARY = Path(__file__).with_name("_native.so")

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_unavailable: str | None = "not tried yet"


def why_not(op: str, *arguments: Any) -> list[str]:
    """List the reasons why the C++ operator cannot run `op` on (x, num_groups), or at all."""
    if op != "group_norm":
        return ["the C++ operators are group norms only"]
    if _unavailable is not None and (reason := _load()) is not None:
        return [reason]
    if not arguments:
        return []
    x = arguments[0]
    if x.device.type != "cpu":
        return [f"the C++ operators run on CPUs, not on {x.device.type}"]
    if x.dtype not in _DTYPES:
        return [f"the C++ operators take fp32, bf16, fp16 and fp64, not {x.dtype}"]
    return []


# A constant of the trace: torch.compile cannot trace the loading of a library.
@torch.compiler.assume_constant_result
def _load() -> str | None:
    global _unavailable
    if not LIBRARY.exists():
        _unavailable = (
            "the C++ operators were not built: install again with --no-build-isolation where cmake "
            "3.22 and gcc 12 are, and see what the build says (pip install -v)"
        )
    else:
        try:
            torch.ops.load_library(LIBRARY)
            _unavailable = None
        except OSError as error:
            _unavailable = f"the C++ operators do not fit this torch, install again: {error}"
    return _unavailable


def _forward(*arguments: Any) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    return torch.ops.ddb_fast_native.group_norm.default(*arguments)


def _backward(*arguments: Any) -> Gradients:
    *others, needs = arguments
    return Gradients(*torch.ops.ddb_fast_native.group_norm_backward.default(*others, *needs))


fused = Fused(_forward, _backward)

OPS = {"group_norm": group_norm_with(fused, register("native", fused))}
