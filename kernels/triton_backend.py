"""The Triton kernels as a backend: where they can run, imported when they are first used.

On a CPU they run in Triton's interpreter, for tests, when TRITON_INTERPRET=1 is in the environment.
"""

import os
from importlib.util import find_spec
from typing import Any

import torch

from . import tuned
from .tracing import assume_constant_result, torch_operators_only

_INSTALLED = find_spec("triton") is not None
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def _why_no_interpreter() -> str | None:
    """Triton 3.6's takes arrays with a dimension for numbers, which NumPy 2.4 no longer does."""
    import numpy
    import triton

    has = [tuple(map(int, m.__version__.split(".")[:2])) for m in (triton, numpy)]
    if has[0] < (3, 7) and has[1] >= (2, 4):
        return "the interpreter of Triton before 3.7 needs NumPy before 2.4"
    return None


_NO_INTERPRETER = _why_no_interpreter() if _INSTALLED and _INTERPRETED else None


def why_not(op: str, *arguments: Any) -> list[str]:
    """List the reasons why Triton cannot run `op`, see `dispatch.Backend`."""
    if not _INSTALLED:
        return ["triton is not installed"]
    if _INTERPRETED and _NO_INTERPRETER is not None:
        return [_NO_INTERPRETER]
    if not arguments:
        if _INTERPRETED:
            return []
        if not torch.cuda.is_available():
            return ["there is no GPU, and TRITON_INTERPRET=1 is not set"]
        old = _too_old(op, torch.device("cuda", torch.cuda.current_device()))
        return [] if old is None else [old]
    device = arguments[0].device.type
    if device != ("cpu" if _INTERPRETED else "cuda"):
        where = "the interpreter takes CPU tensors" if _INTERPRETED else "it takes CUDA tensors"
        return [f"{where}, this one is on {device}"]
    if reasons := torch_operators_only(arguments[0]):
        return reasons
    if op == "group_norm":
        from . import triton_group_norm

        return triton_group_norm.why_not(*arguments)
    if device == "cuda" and (old := _too_old(op, arguments[0].device)):
        return [old]
    from . import triton_attention

    return triton_attention.why_not(op, *arguments)


# Dynamo cannot trace the question; as a constant of the trace it costs no graph break.
@assume_constant_result
def _too_old(op: str, device: torch.device) -> str | None:
    """Say why a GPU is too old for `op`: Triton knows no tensor cores before Ampere's."""
    kind, _, capability = tuned.architecture(device).partition("_")
    if op == "group_norm" or kind != "sm" or int(capability) >= 80:
        return None
    has = f"{capability[:-1]}.{capability[-1]}"
    return f"its products need tensor cores of compute capability 8.0, this GPU has {has}"


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
