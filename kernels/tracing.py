"""Marks for torch.compile that do not import it, and what sees torch's own operators only."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch.autograd import forward_ad

F = TypeVar("F", bound=Callable)


def assume_constant_result(function: F) -> F:
    """What `torch.compiler.assume_constant_result` does to a function: a call is a constant.

    That one imports the compiler, half of this package's own start, for programs that compile
    nothing. A test holds the two together.
    """
    function._dynamo_marked_constant = True
    return function


def exporting() -> bool:
    """Whether torch.export is at work.

    The flag itself: torch 2.10 and 2.11 take `torch.compiler.is_exporting()` for true in whatever
    they compile.
    """
    return torch.compiler._is_exporting_flag


_transform, _trace = torch._C._functorch.peek_interpreter_stack, torch._C._get_tracing_state
_is_batch = torch._C._functorch.is_legacy_batchedtensor


def transforming() -> bool:
    """Whether a transform of torch.func is going on, which a compiler does not have to be asked."""
    return not torch.compiler.is_compiling() and _transform() is not None


def batched(dy: torch.Tensor | None) -> bool:
    """Whether a backward was given a batch of gradients, by torch.func or `is_grads_batched`."""
    return _transform() is not None or (dy is not None and _is_batch(dy))


def torch_operators_only(x: torch.Tensor) -> list[str]:
    """Say what is going on that needs torch's own operators; kernels would be left out unseen."""
    if torch.compiler.is_compiling():
        return []
    plain = type(x).__torch_dispatch__ is torch.Tensor.__torch_dispatch__
    # One question for all, as every call asks it.
    if plain and _transform() is None and forward_ad._current_level < 0 and _trace() is None:
        return []
    reasons = []
    if not plain:
        reasons.append(f"a {type(x).__name__} sees torch's own operators only")
    if _transform() is not None:
        reasons.append("the transforms of torch.func see through torch's own operators only")
    if forward_ad._current_level >= 0:
        reasons.append("it has no forward-mode derivatives")
    if _trace() is not None:
        reasons.append("torch.jit.trace records torch's own operators only")
    return reasons
