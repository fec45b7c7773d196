"""What a method of other people's networks reads, computes and calls, from its source."""

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterator, Set
from typing import Any, NamedTuple


class Known(NamedTuple):
    """What the code of a method that we know reads of its module, computes and may call."""

    reads: frozenset[str]
    computes: Set[str]
    calls: frozenset[str]


def why_not_ours(function: Callable[..., Any], ours: Known, position: int = 0) -> str | None:
    """Say why a function reads, computes or calls something else than we know.

    Its arithmetic, as `ast.unparse` writes it, has to be ours, no more and no less. What it reads
    is looked at in its argument number `position`.
    """
    _, reads, arithmetic, calls = code_of(function, position)
    if not reads:
        return "its source cannot be read"
    for does, unknown in (
        ("reads", reads - ours.reads),
        ("computes", arithmetic - ours.computes),
        ("calls", calls - ours.calls - ours.reads),
    ):
        if unknown:
            return f"its code {does} {', '.join(sorted(unknown))}, which we do not know"
    if missing := sorted(ours.computes - arithmetic):
        return f"its code does not compute {', '.join(missing)}"
    if "softmax" in ours.calls - calls:
        return "its code does not call softmax"
    return None


@functools.lru_cache(maxsize=128)
def code_of(
    function: Callable[..., Any], position: int = 0
) -> tuple[str, frozenset[str], frozenset[str], frozenset[str]]:
    """Return a function's code, what it reads of one argument, its arithmetic and what it calls."""
    nothing = "", frozenset(), frozenset(), frozenset()
    try:
        # Not of the function itself: that would be what a wrapper says that it wraps.
        code = inspect.getsource(function.__code__)
        definition = ast.parse(textwrap.dedent(code)).body[0]
    except (OSError, TypeError, SyntaxError, AttributeError):
        return nothing
    if not isinstance(definition, ast.FunctionDef) or len(definition.args.args) <= position:
        return nothing
    subject = definition.args.args[position].arg
    reads = {
        node.attr
        for node in ast.walk(definition)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == subject
    }
    arithmetic = {part for statement in definition.body for part in _arithmetic(statement)}
    called = [node.func for node in ast.walk(definition) if isinstance(node, ast.Call)]
    calls = {f.attr if isinstance(f, ast.Attribute) else f.id for f in called
             if isinstance(f, ast.Attribute | ast.Name)}  # fmt: skip
    return ast.unparse(definition), frozenset(reads), frozenset(arithmetic), frozenset(calls)


def _arithmetic(node: ast.AST) -> Iterator[str]:
    """Yield the outermost arithmetic expressions below a node."""
    if isinstance(node, ast.BinOp | ast.AugAssign):
        yield ast.unparse(node)
    else:
        for child in ast.iter_child_nodes(node):
            yield from _arithmetic(child)
