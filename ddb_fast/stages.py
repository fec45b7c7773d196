"""Which fields of a configuration the results of each stage depend on, and their defaults.

What the manifest binds a stage to, and what tells two runs of a comparison apart.
"""

import dataclasses
import typing
from dataclasses import fields
from typing import Any

from ddb_fast.config import RunConfig
from ddb_fast.fields import flatten

# `data.path` is left out (below): the contents of the data, not their place, are what matters.
_DATA = ("data",)
_DIFFUSION = (*_DATA, "diffusion", "seed", "precision")
_SAMPLING = (*_DIFFUSION, "sampling")
_AMPLIFIER = (*_SAMPLING, "amplifier")
_SCORES = (*_AMPLIFIER, "pseudo_labels")
_REAL_AMPLIFIER = (*_DATA, "diffusion.image_size", "amplifier", "seed", "precision")
_REAL_SCORES = (*_REAL_AMPLIFIER, "pseudo_labels")
_TARGET = (*_DATA, "classifier", "precision", "selection", "looks")
STAGE_FIELDS: dict[str, tuple[str, ...]] = {
    "data": (*_DATA, "diffusion.image_size"),
    "diffusion": _DIFFUSION,
    "synthetic": _SAMPLING,
    "amplifier": _AMPLIFIER,
    "scores": _SCORES,
    "verdict": _AMPLIFIER,
    "memorisation": _AMPLIFIER,
    "real-amplifier": _REAL_AMPLIFIER,
    "real-scores": _REAL_SCORES,
    "jtt-identification": (*_TARGET, "jtt.first_share"),
    "erm": _TARGET,
    "lff": (*_TARGET, "lff"),
    "jtt": (*_TARGET, "jtt"),
    "dfr": (*_TARGET, "dfr"),
    "group-dro": (*_TARGET, "group_dro"),
    "ddb-i": (*_TARGET, *_SCORES, "group_dro"),
    "ddb-i-error-set": (*_TARGET, *_SCORES, "group_dro"),
    "ddb-i-predicted": (*_TARGET, *_SCORES, "group_dro"),
    "ddb-ii": (*_TARGET, *_SCORES, "reweighting"),
    "real-amplifier-i": (*_TARGET, *_REAL_SCORES, "group_dro"),
    "real-amplifier-ii": (*_TARGET, *_REAL_SCORES, "reweighting"),
}


def stage_fields(config: RunConfig, stage: str) -> dict[str, Any]:
    """The flattened fields that the results of `stage` depend on."""
    names = STAGE_FIELDS[stage]
    return {
        key: value
        for key, value in flatten(config).items()
        if key != "data.path" and any(key == n or key.startswith(f"{n}.") for n in names)
    }


def default_fields(cls: type = RunConfig, prefix: str = "") -> dict[str, Any]:
    """The flattened fields that have a default, with it; `flatten` of the rest is a preset's."""
    leaves, hints = {}, typing.get_type_hints(cls)
    for f in fields(cls):
        if dataclasses.is_dataclass(hints[f.name]):
            leaves |= default_fields(hints[f.name], f"{prefix}{f.name}.")
        elif f.default is not dataclasses.MISSING:
            value = f.default
            leaves[prefix + f.name] = list(value) if isinstance(value, tuple) else value
    return leaves
