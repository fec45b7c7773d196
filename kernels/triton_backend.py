"""The Triton kernels as a backend: where they can run, imported when they are first used.

On a CPU they run in Triton's interpreter, for tests, when TRITON_INTERPRET=1 is in the environment.
"""

import os
from importlib.util import find_spec
from typing import Any

import torch

from .tracing import torch_operators_only

_INSTALLED = find_spec("triton") is not None
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def why_not(op: str, *arguments: Any) -> list[str]:
    """List the reasons why Triton cannot run `op`, see `dispatch.Backend`."""
    if not _INSTALLED:
        return ["triton is not installed"]
    if not arguments:
        if _INTERPRETED or torch.cuda.is_available():
            return []
        return ["there is no GPU, and TRITON_INTERPRET=1 is not set"]
    device = arguments[0].device.type
    if device != ("cpu" if _INTERPRETED else "cuda"):
        where = "the interpreter takes CPU tensors" if _INTERPRETED else "it takes CUDA tensors"
        return [f"{where}, this one is on {device}"]
    if reasons := torch_operators_only():
        return reasons
    if op == "group_norm":
        from . import triton_group_norm

        return triton_group_norm.why_not(*arguments)
    from . import triton_attention

    return triton_attention.why_not(op, *arguments)


def _group_norm(*arguments: Any, **options: Any) -> Any:
    from . import triton_group_norm

    return triton_group_norm.OPS["group_norm"](*arguments, **options)


def _attention(*arguments: Any, **options: Any) -> Any:
    from . import triton_attention

    return triton_attention.OPS["attention"](*arguments, **options)


def _attention_qkv(*arguments: Any, **options: Any) -> Any:
    from . import triton_attention

    return triton_attention.OPS["attention_qkv"](*arguments, **options)


OPS = {"group_norm": _group_norm, "attention": _attention, "attention_qkv": _attention_qkv}
