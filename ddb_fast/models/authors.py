"""Checkpoints of the paper's public generator: read safely, described, renamed to ours.

`models.unet.from_authors` builds the network. What differs is bookkeeping: their null class is row
0 of the class table; the time and class projections of every block, and q, k and v, are layers of
their own; and biases that are added to the same sum are kept apart.
"""

import itertools
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddb_fast.config import UNetConfig
from ddb_fast.data.files import few

Join = Callable[[list[Tensor]], Tensor]

_LAYERS = {
    "time_table": "time_embedding.timembedding.0",
    "time_mlp.0": "time_embedding.timembedding.1",
    "time_mlp.2": "time_embedding.timembedding.3",
    "class_table": "cond_embedding.condEmbedding.0",
    "class_mlp.0": "cond_embedding.condEmbedding.1",
    "class_mlp.2": "cond_embedding.condEmbedding.3",
    "head": "head",
    "tail_norm": "tail.0",
    "tail": "tail.2",
}
_PATHS = {"down": "downblocks", "middle": "middleblocks", "up": "upblocks"}
# Within a block of a path; 0 and 1 are the two convolutions of an upsampling.
_PARTS = {
    "norm1": "block1.0",
    "conv1": "block1.2",
    "norm2": "block2.0",
    "conv2": "block2.3",
    "shortcut": "shortcut",
    "attention.norm": "attn.group_norm",
    "attention.out": "attn.proj",
    "c1": "c1",
    "c2": "c2",
    "0": "t",
    "1": "c",
}
# Where the layer on the right exists, our bias of the layer on the left is the sum of both.
_ABSORBED_BIAS = {"conv2": "shortcut", "c2": "c1"}


class _Dropped:
    """Stands in for their optimiser and schedule, so that reading a file makes neither."""


def _plain_dict(factory: type) -> dict:
    # torch's safe reader fills no defaultdict, which is what an optimiser keeps its state in.
    return {}


_STAND_INS = [
    (_Dropped, "torch.optim.adamw.AdamW"),
    (_Dropped, "torch.optim.lr_scheduler.CosineAnnealingLR"),
    (_plain_dict, "collections.defaultdict"),
    (dict, "builtins.dict"),
]


def read_authors_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file of the authors' training, or a bare state dict, without running its code.

    Returns the state dict, on the CPU, and the file's plain entries (numbers, text), such as the
    epoch; optimiser and schedule, which their files carry as objects, are dropped.
    ValueError, one line, for a file that is missing, damaged, of another kind, or that holds other
    objects.
    """
    try:
        with torch.serialization.safe_globals(_STAND_INS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from None
    except Exception as error:  # torch does not say what a damaged or foreign file may raise
        kind = type(error).__name__
        raise ValueError(f"{path}: not a checkpoint that can be read safely ({kind})") from None
    nested = isinstance(content, dict) and "model_state_dict" in content
    state = content["model_state_dict"] if nested else content
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in state.items()
    ):
        raise ValueError(f"{path}: neither a state dict nor a checkpoint with model_state_dict")
    info = {k: v for k, v in content.items() if isinstance(v, str | int | float)}
    return dict(state), info


def describe(state: Mapping[str, Tensor]) -> tuple[UNetConfig, dict[str, int]]:
    """The configuration, and num_classes, timesteps and in_channels, of their state dict.

    Read off the few tensors that show them; `rename` then checks that everything else agrees.
    ValueError if those are missing.
    """
    head, times, classes, mlp = needed = [
        "head.weight",
        "time_embedding.timembedding.0.weight",
        "cond_embedding.condEmbedding.0.weight",
        "time_embedding.timembedding.1.weight",
    ]
    _refuse(missing=[name for name in (*needed, _conv1(0)) if name not in state])
    channels = len(state[head])
    levels: list[list[int]] = [[]]
    for index in itertools.count():
        if _conv1(index) in state:
            levels[-1].append(index)
        elif f"downblocks.{index}.c1.weight" in state:
            levels.append([])
        else:
            break
    first = [blocks[0] for blocks in levels if blocks]
    config = UNetConfig(
        channels=channels,
        channel_multipliers=tuple(len(state[_conv1(block)]) // channels for block in first),
        blocks_per_level=len(levels[0]),
        attention_levels=tuple(
            level
            for level, block in enumerate(first)
            if f"downblocks.{block}.attn.proj.weight" in state
        ),
        embedding=len(state[mlp]),
    )
    sizes = {
        "num_classes": len(state[classes]) - 1,
        "timesteps": len(state[times]),
        "in_channels": state[head].shape[1],
    }
    return config, sizes


def _conv1(index: int) -> str:
    return f"downblocks.{index}.block1.2.weight"


def rename(state: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their tensors under our names, as new tensors.

    ours: the state dict of our network, of which only shapes, names and their order are used.
    ValueError, one line, naming tensors that are missing, unknown or of another shape.
    """
    sources = {name: _source(name, ours) for name in ours}
    expected = {name for names, _ in sources.values() for name in names}
    _refuse(missing=sorted(expected - state.keys()), unknown=sorted(state.keys() - expected))
    renamed, misshapen = {}, []
    for name, (names, join) in sources.items():
        parts = [state[theirs].detach() for theirs in names]
        try:
            # Where ours is a matrix, theirs may be a 1x1 convolution.
            joined = join([p.flatten(1) for p in parts] if ours[name].dim() == 2 else parts)
            renamed[name] = joined
            fits = joined.shape == ours[name].shape
        except (RuntimeError, IndexError):
            fits = False
        if not fits:
            misshapen += [f"{n} {tuple(p.shape)}" for n, p in zip(names, parts, strict=True)]
    _refuse(misshapen=misshapen)
    return renamed


def _source(name: str, ours: Mapping[str, Tensor]) -> tuple[list[str], Join]:
    """The names of their tensors that make up ours of this name, and how they are joined."""
    layer, kind = name.rsplit(".", 1)
    if layer == "projection":
        blocks = [_block(*n.split(".")[:2]) for n in ours if n.endswith(".norm1.weight")]
        parts = ("temb_proj.1", "cond_proj.1", *(["block1.2"] if kind == "bias" else []))
        names = [f"{block}.{part}.{kind}" for part in parts for block in blocks]
        return names, _side_by_side if kind == "weight" else partial(_added, terms=3)
    if layer == "class_table":
        return [f"{_LAYERS[layer]}.{kind}"], _null_class_last
    if layer in _LAYERS:
        return [f"{_LAYERS[layer]}.{kind}"], torch.cat
    path, index, part = layer.split(".", 2)
    block = _block(path, index)
    if part == "attention.qkv":
        return [f"{block}.attn.proj_{letter}.{kind}" for letter in "qkv"], torch.cat
    names = [f"{block}.{_PARTS[part]}.{kind}"]
    absorbed = _ABSORBED_BIAS.get(part)
    if kind == "bias" and absorbed and f"{path}.{index}.{absorbed}.weight" in ours:
        return [*names, f"{block}.{_PARTS[absorbed]}.bias"], partial(_added, terms=2)
    return names, torch.cat


def _block(path: str, index: str) -> str:
    return f"{_PATHS[path]}.{index}"


def _added(parts: list[Tensor], *, terms: int) -> Tensor:
    """The parts laid end to end, in `terms` equal stretches, which are added up."""
    return torch.cat(parts).unflatten(0, (terms, -1)).sum(0)


def _side_by_side(parts: list[Tensor]) -> Tensor:
    """The first half of the parts below each other, and to the right of it the second half."""
    return torch.cat(torch.cat(parts).chunk(2), 1)


def _null_class_last(parts: list[Tensor]) -> Tensor:
    return parts[0].roll(-1, 0)


def _refuse(**problems: list[str]) -> None:
    """Raise ValueError if any kind of problem has names; the first few are told."""
    told = [f"{kind} {few(names, 3)}" for kind, names in problems.items() if names]
    if told:
        raise ValueError(f"not a state dict of the authors' generator: {'; '.join(told)}")
