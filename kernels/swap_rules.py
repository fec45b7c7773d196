"""How `optimize` recognises a module, one rule for each kind, and judges whether it may be swapped.

A module is known by the names of its classes and by the whole code of its forward (`swap_code`), so
no library is imported, and a version or a copy that computes something else is left alone.

Sources: Hugging Face diffusers (`models/resnet.py`, `models/attention_processor.py`); Dhariwal and
Nichol 2021, guided-diffusion (`unet.py`, `nn.py`), which latent-diffusion took over.
"""

import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from itertools import pairwise
from typing import Any, NamedTuple

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from . import swap_forwards as forwards
from .ops import MAX_HEAD_DIM
from .swap_code import ONE_HEAD, code_of, why_not_known

NORM = "group norm"
CHAIN = "group norm + SiLU"
ATTENTION = "attention"
ALREADY = "already optimised"


# What tells this ResBlock from others of that name.
_RES_BLOCK = {"in_layers", "emb_layers", "use_scale_shift_norm", "out_layers", "skip_connection"}


class Swap(NamedTuple):
    """What `install` puts in: at the module itself or, if any are `fused`, into its group norms.

    `left` says why others of its norms are not fused.
    """

    kind: str
    what: str
    install: Callable[[], None]
    fused: Mapping[nn.Module, str] = {}
    left: str | None = None


class Keep(NamedTuple):
    """Why a module that looks like one of ours is left as it is."""

    kind: str
    why: str


def norm(module: nn.Module) -> Swap | Keep | None:
    """nn.GroupNorm and guided-diffusion's GroupNorm32."""
    if not isinstance(module, nn.GroupNorm):
        return None
    if forwards.installed(module):
        return Keep(NORM, ALREADY)
    if why := _why_norm_stays(module):
        return Keep(NORM, why)
    return Swap(NORM, name_of(module), lambda: _put(module, forwards.norm))


def sequential(module: nn.Module) -> Swap | Keep | None:
    """nn.Sequential with a group norm directly before a SiLU."""
    if not isinstance(module, nn.Sequential) or forwards.installed(module):
        return None
    layers = list(module._modules.items())  # named_children leaves out what stands there twice
    reasons = [
        (a, _why_not_fused([(i, a, nn.GroupNorm), (j, b, nn.SiLU)]))
        for (i, a), (j, b) in pairwise(layers)
        if isinstance(a, nn.GroupNorm) and isinstance(b, nn.SiLU)
    ]
    if not reasons:
        return None
    if why := _why_method_stays(module, "forward", nn.Sequential):
        return Keep(CHAIN, why)
    # Slices, and loops over its layers, call each for itself.
    what = "in nn.Sequential, where it is called as a whole"
    fused = {layer: what for layer, reason in reasons if reason is None}
    left = "; ".join(reason for _, reason in reasons if reason is not None) or None
    if not fused:
        return Keep(CHAIN, left)
    return Swap(CHAIN, "", lambda: _put(module, forwards.sequential), fused, left)


def resnet_block(module: nn.Module) -> Swap | Keep | None:
    """The ResnetBlock2D of diffusers."""
    if not _is_a(module, "ResnetBlock2D") or forwards.installed(module):
        return None
    why = _why_method_stays(module, "forward", "ResnetBlock2D")
    why = why or _missing(module, code_of(type(module).forward).reads)
    if why is None:
        expected = {
            "norm1": nn.GroupNorm,
            "norm2": nn.GroupNorm,
            "nonlinearity": nn.SiLU,
            "dropout": nn.Dropout,
        }
        why = _why_not_fused([(name, getattr(module, name), cls) for name, cls in expected.items()])
    if why is not None:
        return Keep(CHAIN, why)
    kind = module.time_embedding_norm
    if module.time_emb_proj is None:
        if kind == "scale_shift":
            return Keep(CHAIN, "it has no projection to scale and shift")
        embedded = ""
    else:
        embedded = _embedded(kind == "scale_shift")
    fused = {
        module.norm1: "in ResnetBlock2D",
        module.norm2: f"in ResnetBlock2D, with {embedded}dropout",
    }
    return Swap(CHAIN, "", lambda: _put(module, forwards.resnet_block), fused)


def res_block(module: nn.Module) -> Swap | Keep | None:
    """The ResBlock of guided-diffusion and of its descendants."""
    if not _is_a(module, "ResBlock"):
        return None
    if _missing(module, _RES_BLOCK):
        return None
    # guided-diffusion's forward is a checkpoint around _forward; others have no such layer.
    method = "_forward" if hasattr(type(module), "_forward") else "forward"
    if forwards.installed(module, method):
        return None
    why = _why_method_stays(module, method, "ResBlock")
    why = why or _missing(module, reads := code_of(getattr(type(module), method)).reads)
    if why is None and "updown" not in reads and hasattr(module, "updown"):
        why = "it has updown, which its code does not read"
    sequences = [(n, getattr(module, n), nn.Sequential) for n in ("in_layers", "out_layers")]
    why = why or _why_not_fused(sequences)
    if why is not None:
        return Keep(CHAIN, why)
    first, second = list(module.in_layers), list(module.out_layers)
    if (len(first), len(second)) != (3, 4):
        why = "its layers are not norm, SiLU, conv and norm, SiLU, dropout, conv"
    if why is None:
        kinds = (nn.GroupNorm, nn.SiLU, nn.Dropout)
        parts = [
            (f"{name}.{i}", layer, kind)
            for name, layers in (("in_layers", first[:2]), ("out_layers", second[:3]))
            for i, (layer, kind) in enumerate(zip(layers, kinds, strict=False))
        ]
        why = _why_not_fused(parts)
    if why is not None:
        return Keep(CHAIN, why)
    embedded = _embedded(module.use_scale_shift_norm)
    fused = {first[0]: "in ResBlock", second[0]: f"in ResBlock, with {embedded}dropout"}
    return Swap(CHAIN, "", lambda: _put(module, forwards.res_block, method), fused)


def attention(module: nn.Module) -> Swap | Keep | None:
    """The Attention of diffusers, through its processor; nn.MultiheadAttention is only named."""
    if isinstance(module, nn.MultiheadAttention):
        return Keep(ATTENTION, "nn.MultiheadAttention takes masks and returns weights")
    # Of its class: a wrapper may hand on whatever is asked of it.
    if not (hasattr(type(module), "set_processor") and hasattr(module, "processor")):
        return None
    processor = module.processor
    cls = type(processor)
    if cls is forwards.KernelAttnProcessor:
        return Keep(ATTENTION, ALREADY)
    if cls.__name__ != "AttnProcessor2_0":
        return Keep(ATTENTION, f"its processor is {cls.__name__}")
    if why := why_not_known(cls.__call__, "AttnProcessor2_0", 1):
        return Keep(ATTENTION, f"{cls.__name__}: {why}")
    if why := _missing(module, code_of(cls.__call__, 1).reads | {"inner_dim", "inner_kv_dim"}):
        return Keep(ATTENTION, why)
    extras = ("spatial_norm", "norm_cross", "norm_q", "norm_k")
    if present := [name for name in extras if getattr(module, name) is not None]:
        return Keep(ATTENTION, f"it has {', '.join(present)}")
    if module.inner_kv_dim != module.inner_dim:
        return Keep(ATTENTION, "it has fewer heads for k and v than for q")
    if (width := module.inner_dim // module.heads) > MAX_HEAD_DIM:
        return Keep(ATTENTION, f"its head dimension {width} is above {MAX_HEAD_DIM}")
    return Swap(
        ATTENTION,
        f"{name_of(module)}; a call with a mask stays with {cls.__name__}",
        lambda: module.set_processor(forwards.KernelAttnProcessor(processor)),
    )


def qkv_attention(module: nn.Module) -> Swap | Keep | None:
    """The attention of guided-diffusion, which is handed q, k and v as (N, 3 * H * D, T)."""
    for name in ("QKVAttentionLegacy", "QKVAttention"):
        if not _is_a(module, name):
            continue
        if forwards.installed(module):
            return Keep(ATTENTION, ALREADY)
        if why := _why_method_stays(module, "forward", name):
            return Keep(ATTENTION, why)
        code = code_of(type(module).forward)
        if why := _missing(module, code.reads):
            return Keep(ATTENTION, why)
        forward = forwards.qkv_attention
        if name == "QKVAttentionLegacy":
            forward = forwards.qkv_attention_legacy
        elif code.fingerprint in ONE_HEAD:
            forward = forwards.qkv_attention_of_one_head
        what = f"{name}; heads wider than {MAX_HEAD_DIM} stay with it"
        return Swap(ATTENTION, what, functools.partial(_put, module, forward))
    return None


# The norm's own rule comes last, once every chain has said which norms it takes.
RULES = (resnet_block, res_block, sequential, attention, qkv_attention, norm)


def norms_alone(module: nn.Module) -> Iterator[nn.GroupNorm]:
    """The norms that a chain runs without the activation, once all that can be is swapped."""
    chain, block = isinstance(module, nn.Sequential), _is_a(module, "ResnetBlock2D")
    if not (chain or block):
        return
    for a, b in pairwise([*module._modules.values(), None]):
        if isinstance(a, nn.GroupNorm):
            fused = block or (b is not None and forwards.fuses(a, b))
            if not (fused and forwards.installed(module)):
                yield a


def _put(module: nn.Module, function: Callable[..., Any], method: str = "forward") -> None:
    # Unlike a bound method, a partial can be pickled; deepcopy binds both to the copy.
    setattr(module, method, functools.partial(function, module, getattr(type(module), method)))


def name_of(module: nn.Module) -> str:
    """Name its class, nn.GroupNorm for torch's."""
    cls = type(module)
    return f"nn.{cls.__name__}" if cls.__module__.startswith("torch.nn.") else cls.__name__


def _embedded(scaled_and_shifted: bool) -> str:
    return "scale, shift and " if scaled_and_shifted else "embedding and "


def _is_a(module: nn.Module, name: str) -> bool:
    return any(cls.__name__ == name for cls in type(module).__mro__)


def _missing(module: nn.Module, names: Set[str]) -> str | None:
    missing = sorted(name for name in names if not hasattr(module, name))
    return f"it has no {', '.join(missing)}" if missing else None


def _why_norm_stays(module: nn.GroupNorm) -> str | None:
    if is_parametrized(module):
        return "its weights are parametrised"
    if type(module).__call__ is not nn.Module.__call__:
        return "its class has a __call__ of its own"
    owner, *above = _owners(module, "forward")
    if owner.__name__ != "GroupNorm32":
        return _why_method_stays(module, "forward", nn.GroupNorm)
    why = _why_method_stays(module, "forward", "GroupNorm32")
    return why or _why_not_torchs(above[0], "forward", nn.GroupNorm)


def _why_layer_stays(module: nn.Module) -> str | None:
    return _why_method_stays(module, "forward", type(module))


def _why_not_fused(parts: Iterable[tuple[str, nn.Module, type]]) -> str | None:
    """Say why modules, given by (name, module, expected class), cannot become one op."""
    for name, module, expected in parts:
        is_norm = expected is nn.GroupNorm and isinstance(module, nn.GroupNorm)
        if not is_norm and type(module) is not expected:
            return f"{name} is {name_of(module)}"
        if not forwards.installed(module):
            stays = _why_norm_stays if is_norm else _why_layer_stays
            if why := stays(module):
                return f"{name}: {why}"
        if forwards.hooked(module):
            return f"{name} has a hook"
        if expected is nn.Dropout and module.p == 1:
            return f"{name} drops everything"
    return None


def _owners(module: nn.Module, method: str) -> list[type]:
    """The classes that define a method: the one that runs, then those it may call by super()."""
    return [cls for cls in type(module).__mro__ if method in vars(cls)]


def _why_method_stays(module: nn.Module, method: str, known: type | str) -> str | None:
    """Say why a method is not torch's, given its class, or no version in `swap_code.KNOWN`."""
    if method in vars(module):
        return f"its {method} was replaced on the instance"
    owner = _owners(module, method)[0]
    if isinstance(known, type):
        return _why_not_torchs(owner, method, known)
    if owner.__name__ != known:
        return f"{owner.__name__} overrides {method}"
    return why_not_known(getattr(owner, method), known)


def _why_not_torchs(owner: type, method: str, known: type) -> str | None:
    if owner is not known:
        return f"{owner.__name__} overrides {method}"
    code = getattr(getattr(owner, method), "__code__", None)
    if code is None or code.co_filename != sys.modules[owner.__module__].__file__:
        return f"{owner.__name__}.{method} was replaced"
    return None
