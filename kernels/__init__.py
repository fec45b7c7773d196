"""Group norm and attention for diffusion U-Nets, each with several backends behind one function.

Imported as `ddb_fast.kernels`; knows torch and nothing of ddb_fast.
"""

from .dispatch import backends, use_backend
from .ops import attention, attention_qkv, group_norm
from .swap import optimize

__all__ = ["attention", "attention_qkv", "backends", "group_norm", "optimize", "use_backend"]
