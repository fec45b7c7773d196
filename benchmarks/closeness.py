"""Before anything is timed: does the contender compute what the reference computes?

This tells a wrong contender from a right one; how exact ours are is `ddb_fast.kernels.check`'s.
"""

import contenders
import shapes
import torch
from contenders import Contender, Operands

from ddb_fast.kernels.check import error

# Twice what plain torch is off by in half precision, and far above TF32 in none of them.
BOUNDS = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 2e-2}
_PER_SAMPLE = {"x", "dy", "pre_bias", "scale", "shift", "residual", "d_sum", "q", "k", "v"}
# Of these the gradients are compared; the others are sums over samples.
_INPUTS = {"x", "residual", "q", "k", "v"}


class NotClose(AssertionError):
    """A contender computes something else than the reference."""


def assert_close(
    contender: Contender,
    operands: Operands,
    reference: Contender,
    *,
    gradients: bool,
    dropout_p: float = 0.0,
) -> float:
    """Compare the first and the last sample, return the largest error, RMS relative to RMS.

    reference: computes the same, without dropout, on fp32 operands. With dropout every contender
    draws its own mask: what is kept is compared, and how much is; gradients are not.

    Raises NotClose, with the name of what differs.
    """
    first = next(iter(operands.values()))
    bound = BOUNDS[first.dtype]
    picks = sorted({0, len(first) - 1})
    few = {
        k: x[picks].float() if k in _PER_SAMPLE else x.float()
        for k, x in operands.items()
        if k != "seed"
    }
    y = contenders.first(contenders.forward(contender, operands)())[picks].float()
    truth = contenders.first(contenders.forward(reference, few)())
    if dropout_p:
        kept = y != 0
        share = kept.float().mean().item()
        # Five standard deviations of a fair draw.
        if abs(share - (1 - dropout_p)) > 5 * (dropout_p * (1 - dropout_p) / y.numel()) ** 0.5:
            raise NotClose(f"{contender.name}: keeps {share:.3f}, dropout {dropout_p}")
        y, truth = y * (1 - dropout_p), truth * kept
    compared = {"y": (y, truth)}
    if gradients and not dropout_p:
        found = contenders.gradients(contender, operands)
        expected = contenders.gradients(reference, few)
        compared |= {f"d_{k}": (found[k][picks], expected[k]) for k in _INPUTS & found.keys()}
    worst = 0.0
    for name, (actual, expected) in compared.items():
        off = error(actual, expected.double())
        # Not `off > bound`, which a NaN would pass.
        if not off <= bound:
            raise NotClose(f"{contender.name}: {name} is off by {off:.2g}, allowed {bound:g}")
        worst = max(worst, off)
    return worst


def reference_norm(shape: shapes.GroupNorm, options: tuple[str, ...]) -> Contender:
    """Ours on the reference backend, without dropout."""
    plain = tuple(name for name in options if name != "dropout")
    return Contender("reference", contenders.ours("reference", shape.g, plain))
