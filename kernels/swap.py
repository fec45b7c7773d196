"""Swaps group norms, their activations and attention of other people's networks for our ops.

In place; every parameter, buffer and name of the state_dict stays what it was. `swap_rules`
says what is recognised, `swap_forwards` what runs instead.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from .swap_rules import CHAIN, NORM, RULES, Keep, Swap, name_of, norms_alone


class Entry(NamedTuple):
    """A module by its name in the model, the kind of work it does, and what was done or why not."""

    name: str
    kind: str
    what: str


@dataclass(frozen=True)
class Report:
    """What `optimize` swapped and what it left, in the order of `named_modules`.

    Printed, it counts both by kind and reason and names the first module of each.
    """

    swapped: tuple[Entry, ...]
    left: tuple[Entry, ...]

    def __str__(self) -> str:
        rows = [*_rows("swapped", self.swapped), *_rows("left", self.left)]
        title = f"{len(self.swapped)} swapped, {len(self.left)} left"
        if not rows:
            return title
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(
                cell.rjust(width) if column == 1 else cell.ljust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        return "\n".join([title, *lines])


def optimize(model: nn.Module) -> Report:
    """Swap the ops of this package into a network, in place, and say what was swapped and left.

    Recognised are the U-Nets of diffusers (ResnetBlock2D, Attention), networks with the code of
    guided-diffusion (ResBlock, GroupNorm32, QKVAttention), and in any network every nn.GroupNorm,
    with the SiLU behind it where both stand in an nn.Sequential.

    Outputs and gradients stay the same up to rounding, except for the masks of dropout, which other
    random numbers draw. Call it before torch.compile. A second call finds nothing left to do.

    Raises:
        ValueError: `model` is no nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"optimize takes an nn.Module, got {type(model).__name__}")
    found: list[tuple[str, nn.Module, Swap | Keep]] = []
    fused: dict[nn.Module, str] = {}
    # Parents come before their children, so what a block says of a norm counts before its parts.
    for name, module in list(model.named_modules()):
        results = (result for rule in RULES if (result := rule(module)) is not None)
        if (result := next(results, None)) is None:
            continue
        found.append((name, module, result))
        if isinstance(result, Swap):
            result.install()
            fused = {**result.fused, **fused}
    swapped, left = [], []
    # Only now, as a norm may stand in the network before the chain that takes it, or in several.
    alone = {norm for module in model.modules() for norm in norms_alone(module)}
    for name, module, result in found:
        if module in fused and module in alone:
            swapped.append(Entry(name, NORM, f"{name_of(module)}; with SiLU {fused[module]}"))
        elif module in fused:
            swapped.append(Entry(name, CHAIN, fused[module]))
        elif isinstance(result, Keep):
            left.append(Entry(name, *result))
        elif not result.fused:
            swapped.append(Entry(name, result.kind, result.what))
        if isinstance(result, Swap) and result.left is not None:
            left.append(Entry(name, result.kind, result.left))
    return Report(tuple(swapped), tuple(left))


def _rows(title: str, entries: Iterable[Entry]) -> list[tuple[str, str, str, str, str]]:
    groups: dict[tuple[str, str], list[str]] = {}
    for name, kind, what in entries:
        groups.setdefault((kind, what), []).append(name or "(the model)")
    return [
        (title, str(len(names)), kind, what, names[0] + (", ..." if len(names) > 1 else ""))
        for (kind, what), names in sorted(groups.items())
    ]
