"""xformers' memory efficient attention, by name only.

Its released wheels run the same kernels as torch's scaled dot product attention unless flash_attn_3
is installed, so automatic never prefers it unmeasured. Imported when first asked for: next to a
torch it was not built for, the import itself prints warnings.
"""

import functools
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from . import reference

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not(op: str, *arguments: Any) -> list[str]:
    """List the reasons why xformers cannot run `op`, see `dispatch.Backend`."""
    if op == "group_norm":
        return ["xformers has no group norm"]
    reasons = []
    if find_spec("xformers") is None:
        reasons.append("xformers is not installed")
    elif not torch.cuda.is_available():
        reasons.append("xformers' kernels need a GPU")
    elif (failure := _import_failure()) is not None:
        reasons.append(f"xformers cannot be used: {failure}")
    if not arguments:
        return reasons
    x = arguments[0]
    if x.device.type != "cuda":
        reasons.append(f"it takes CUDA tensors, this one is on {x.device.type}")
    if x.dtype not in _DTYPES:
        reasons.append(f"it takes fp32, bf16 and fp16, not {x.dtype}")
    width = x.shape[3] if op == "attention" else x.shape[2] // (3 * arguments[1])
    if width % 8:
        reasons.append(f"the head dimension must be a multiple of 8, it is {width}")
    return reasons


@functools.cache
def _import_failure() -> str | None:
    try:
        import_module("xformers.ops")
        # Beside another torch than its own it is imported with a warning, and without operators.
        failure = getattr(import_module("xformers._cpp_lib"), "_cpp_library_load_exception", None)
    except (ImportError, OSError, RuntimeError) as error:
        failure = error
    return None if failure is None else " ".join(str(failure).split())


def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None) -> Tensor:
    """`xformers.ops.memory_efficient_attention` on (B, S, H, D) views of (B, H, S, D)."""
    run = import_module("xformers.ops").memory_efficient_attention
    with reference.no_autocast(q.device):
        o = run(*(x.transpose(1, 2) for x in (q, k, v)), scale=scale)
    return o.transpose(1, 2)


def attention_qkv(qkv: Tensor, num_heads: int, *, scale: float | None) -> Tensor:
    """Attention on a packed (B, S, 3 * H * D) projection; returns (B, S, H * D)."""
    return reference.pack(attention(*reference.unpack(qkv, num_heads), scale=scale))


OPS = {"attention": attention, "attention_qkv": attention_qkv}
