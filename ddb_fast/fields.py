"""Dataclasses as flat fields, as JSON, and back: what a configuration is read from and written as.

Only the standard library is imported, and no configuration is known here.
"""

import dataclasses
import hashlib
import json
import types
import typing
from dataclasses import fields
from typing import Any, Literal

T = typing.TypeVar("T")


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of a dataclass as {"section.field": value}, tuples as lists (JSON's types)."""
    leaves = {}
    for f in fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            leaves |= flatten(value, f"{prefix}{f.name}.")
        else:
            leaves[prefix + f.name] = list(value) if isinstance(value, tuple) else value
    return leaves


def fields_hash(values: dict[str, Any]) -> str:
    """A short stable name of a set of fields."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def coerce(value: Any, hint: Any, name: str) -> Any:
    """`value`, from JSON or typed, as the type a field declares; ValueError names the field."""
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, prefix=f"{name}.")
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null")):
            return None
        return coerce(value, next(o for o in options if o is not type(None)), name)
    if origin is Literal:
        if value not in options:
            raise ValueError(f"{name}: {value!r} is none of {', '.join(map(str, options))}")
        return value
    if origin is tuple:
        items = value if isinstance(value, list | tuple) else str(value).replace(",", " ").split()
        return tuple(coerce(item, options[0], name) for item in items)
    if hint is bool:
        known = {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}
        if isinstance(value, bool):
            return value
        if str(value).lower() in known:
            return known[str(value).lower()]
        raise ValueError(f"{name}: {value!r} is not true or false")
    if hint is str:
        return str(value)
    number = value.replace("_", "") if isinstance(value, str) else value
    try:
        if isinstance(number, bool):
            raise ValueError
        converted = float(number)
        if hint is int:
            if converted != int(converted):
                raise ValueError
            return int(number) if isinstance(number, str) and number.isdigit() else int(converted)
    except (TypeError, ValueError, OverflowError):
        kind = "a whole number" if hint is int else "a number"
        raise ValueError(f"{name}: {value!r} is not {kind}") from None
    return converted


def from_dict(cls: type[T], values: dict[str, Any], *, prefix: str = "") -> T:
    """A dataclass from nested dictionaries; unknown and missing fields are ValueErrors."""
    if not isinstance(values, dict):
        raise ValueError(f"{prefix.rstrip('.') or cls.__name__}: expected fields, got {values!r}")
    hints = typing.get_type_hints(cls)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise ValueError(f"unknown field: {', '.join(prefix + name for name in unknown)}")
    none = dataclasses.MISSING
    needed = [f.name for f in fields(cls) if f.default is none and f.default_factory is none]
    missing = [prefix + name for name in needed if name not in values]
    if missing:
        raise ValueError(
            f"missing field: {', '.join(missing)}; needed are all that --dry-run prints"
        )
    return cls(**{k: coerce(v, hints[k], prefix + k) for k, v in values.items()})


def to_json(config: Any) -> str:
    """Any configuration dataclass as JSON text."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"
