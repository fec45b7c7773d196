"""Which code of other people's networks we know: whole methods, by their fingerprints.

A fingerprint stands for every statement of a method in its order, with all constants, keywords and
operators, and every name that is not a local variable's. It does not depend on the names of those,
on how a module was imported, on annotations, docstrings, or messages of errors.
"""

import ast
import builtins
import functools
import hashlib
import inspect
import textwrap
from collections.abc import Callable
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

# Each was read and does what the forward of ours that takes its place does. The sources are
# diffusers, guided-diffusion (latent-diffusion took it over as it is) and improved-diffusion;
# "tests" is the same work in the words of tests/foreign_networks.py. The fingerprint of another
# version, once it was read, is `code_of(function).fingerprint`, for a processor with position 1.
KNOWN: dict[str, dict[str, str]] = {
    "ResnetBlock2D": {
        "87cca5a860ff5177": "diffusers 0.30.3",
        "9a2997e85d0dd756": "diffusers 0.33.1, 0.35.2",
        "a3443c909e54e6e9": "diffusers 0.38.0, 0.42.1",
    },
    "AttnProcessor2_0": {"cfce5faa78fad4f3": "diffusers 0.30.3 to 0.42.1"},
    "GroupNorm32": {"5454f3c2613d5b5d": "all of them", "6ed07a18b477c373": "with to for type"},
    "ResBlock": {
        "44dc6a741745dd39": "guided-diffusion",
        "4ab8210abaa77b1f": "improved-diffusion",
        "1af279a9264e10db": "tests",
    },
    "QKVAttentionLegacy": {"a9d983259dba639d": "guided-diffusion", "a86acc92419fb64a": "tests"},
    "QKVAttention": {
        "186f527030c1b14b": "guided-diffusion",
        "ac6564d8b7332bc7": "tests",
        "f6d173397b8643fb": "improved-diffusion",
        "9ccd8440a77a5099": "tests, of one head",
    },
}
# Of those called QKVAttention, the ones whose caller deals the heads out.
ONE_HEAD = frozenset({"f6d173397b8643fb", "9ccd8440a77a5099"})


class Code(NamedTuple):
    """A method's fingerprint, and the attributes that it reads of one of its arguments."""

    fingerprint: str
    reads: frozenset[str]


@functools.lru_cache(maxsize=128)
def code_of(function: Callable[..., Any], position: int = 0) -> Code | None:
    """Fingerprint a function and say what it reads of its argument number `position`.

    None: its source cannot be read, or it is no plain function.
    """
    if not isinstance(function, FunctionType):
        return None
    try:
        # Not of the function itself: that would be what a wrapper says that it wraps.
        definition = ast.parse(textwrap.dedent(inspect.getsource(function.__code__))).body[0]
    except (OSError, SyntaxError):
        return None
    if not isinstance(definition, ast.FunctionDef) or len(definition.args.args) <= position:
        return None
    subject = definition.args.args[position].arg
    reads = {
        node.attr
        for node in ast.walk(definition)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == subject
    }
    text = _Writer(definition, function.__globals__).text(definition)
    return Code(hashlib.sha256(text.encode()).hexdigest()[:16], frozenset(reads))


def why_not_known(function: Callable[..., Any], name: str, position: int = 0) -> str | None:
    """Say why a function is no version of the one that `KNOWN` has under a name."""
    code = code_of(function, position)
    if code is None:
        return "its source cannot be read"
    return None if code.fingerprint in KNOWN[name] else "its code is no version that we know"


class _Writer:
    """Writes the tree of a function out, alike for all that computes alike."""

    # Not ast.dump, which leaves out other fields in other versions of Python.
    _SILENT = frozenset({"annotation", "ctx", "kind", "msg", "returns", "type_comment"})

    def __init__(self, definition: ast.FunctionDef, scope: dict[str, Any]):
        self.definition, self.scope = definition, scope
        self.numbers: dict[str, str] = {}
        self.local = {
            node.arg if isinstance(node, ast.arg) else node.id
            for node in ast.walk(definition)
            if isinstance(node, ast.arg)
            or (isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load))
        }

    def text(self, node: Any) -> str:
        if isinstance(node, list):
            return f"[{' '.join(self.text(item) for item in node if not _is_text(item))}]"
        if not isinstance(node, ast.AST):
            return repr(node)
        if isinstance(node, ast.Constant):
            return repr(node.value)
        if isinstance(node, ast.Name):
            return self._name(node.id)
        if isinstance(node, ast.arg):
            return self._name(node.arg)
        if isinstance(node, ast.Raise):
            return "raise"
        fields = (
            f"{name}={self.text(value)}"
            for name, value in ast.iter_fields(node)
            if name not in self._SILENT and value is not None and value != []
            if not (node is self.definition and name == "name")
        )
        return f"({type(node).__name__} {' '.join(fields)})"

    def _name(self, name: str) -> str:
        if name in self.local:
            return self.numbers.setdefault(name, f"local{len(self.numbers)}")
        value = self.scope.get(name)
        if isinstance(value, ModuleType):
            return f"module {value.__name__}"
        known = name not in self.scope and hasattr(builtins, name)
        return f"builtin {name}" if known else f"global {name}"


def _is_text(node: Any) -> bool:
    """Tell whether a statement is a docstring, or a string in the place of a comment."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
