"""The forwards and the attention processor that `optimize` puts in the place of other people's.

Each looks again at every call whether it still may do several modules' work in one op: if a norm or
an activation has since got a hook or been exchanged, the class's own forward runs. So it does where
that is not `own` any more, the one in whose place ours was put. Sub-modules are called as modules,
so that their hooks, adapters and offloading work as before.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .ops import MAX_HEAD_DIM, attention, attention_qkv, group_norm
from .tracing import transforming

# Torch's own, in whose place a tool that scales, logs or quantises may put others at any time.
_GROUP_NORM, _SILU, _DROPOUT = nn.GroupNorm.forward, nn.SiLU.forward, nn.Dropout.forward

Own = Callable[..., Any]


def norm(
    self: nn.GroupNorm,
    own: Own,
    input: Tensor | None = None,
    *,
    keep_layout: bool = False,
    **fused: Any,
) -> Tensor:
    """nn.GroupNorm, with its result's layout; keywords are from the forwards below.

    keep_layout: leave it to `group_norm`, where nobody else sees the result. `fused` is handed on.
    """
    if input is None:  # it has the name that the class's own forward gives it
        return type(self).forward(self, **fused)
    if (
        type(self).forward is not own
        or nn.GroupNorm.forward is not _GROUP_NORM  # what GroupNorm32's calls
        or (input.numel() == 0 and input.shape[0] > 0)  # no pixels: our op refuses, torch's not
    ):
        return type(self).forward(self, input)
    if not (keep_layout or input.is_contiguous()):
        input = _as_torch_lays(input)
    return group_norm(input, self.num_groups, self.weight, self.bias, self.eps, **fused)


def sequential(self: nn.Sequential, own: Own, input: Tensor) -> Tensor:
    """nn.Sequential with each group norm and the SiLU that follows it in one op."""
    if type(self).forward is not own:
        return type(self).forward(self, input)
    layers = list(self)
    while layers:
        layer = layers.pop(0)
        if layers and fuses(layer, layers[0]):
            layers.pop(0)
            input = layer(input, activation="silu")
        else:
            input = layer(input)
    return input


def resnet_block(
    self: nn.Module, own: Own, input_tensor: Tensor, temb: Tensor | None, *args: Any, **kwargs: Any
) -> Tensor:
    """ResnetBlock2D of diffusers; further arguments are deprecated there, theirs says so."""
    usual = fuses(self.norm1, self.nonlinearity) and fuses(
        self.norm2, self.nonlinearity, self.dropout
    )
    if args or kwargs or not usual or type(self).forward is not own:
        return type(self).forward(self, input_tensor, temb, *args, **kwargs)

    x, h = input_tensor, self.norm1(input_tensor, keep_layout=True, activation="silu")
    if self.upsample is not None:
        if h.shape[0] >= 64:  # torch's channels_last upsampling fails on large tensors
            x, h = x.contiguous(), h.contiguous()
        x, h = self.upsample(x), self.upsample(h)
    elif self.downsample is not None:
        x, h = self.downsample(x), self.downsample(h)
    h = self.conv1(h)

    fused: dict[str, Any] = {"keep_layout": True, "activation": "silu"}
    fused["dropout_p"] = _probability(self.dropout)
    kind = self.time_embedding_norm
    if self.time_emb_proj is not None and kind in ("default", "scale_shift"):
        temb = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))
        h, embedding = _embedded(h, temb, kind == "scale_shift")
        fused |= embedding
    elif temb is not None and kind == "default":
        h = h + temb
    h = self.conv2(self.norm2(h, **fused))

    # Theirs makes x contiguous first when training, a copy of every channels_last input.
    x = x if self.conv_shortcut is None else self.conv_shortcut(x)
    y = x + h
    return y if self.output_scale_factor == 1 else y / self.output_scale_factor


def res_block(self: nn.Module, own: Own, x: Tensor, emb: Tensor) -> Tensor:
    """ResBlock of guided-diffusion: (N, C, *spatial) and (N, E)."""
    # The checkpointed half of their forward, where there is one.
    cls = type(self)
    theirs = getattr(cls, "_forward", cls.forward)
    first, second = list(self.in_layers), list(self.out_layers)
    usual = len(first) == 3 and len(second) == 4 and not hooked(self.in_layers, self.out_layers)
    if theirs is not own or not (usual and fuses(*first[:2]) and fuses(*second[:3])):
        return theirs(self, x, emb)

    (norm1, _, conv1), (norm2, _, dropout, conv2) = first, second
    h = norm1(x, keep_layout=True, activation="silu")
    if getattr(self, "updown", False):
        h, x = self.h_upd(h), self.x_upd(x)
    h, embedding = _embedded(conv1(h), self.emb_layers(emb), self.use_scale_shift_norm)
    p = _probability(dropout)
    h = norm2(h, **embedding, keep_layout=True, activation="silu", dropout_p=p)
    return self.skip_connection(x) + conv2(h)


def qkv_attention(self: nn.Module, own: Own, qkv: Tensor) -> Tensor:
    """QKVAttention of guided-diffusion: (N, 3 * H * D, T), packed [3, H, D], -> (N, H * D, T)."""
    if type(self).forward is not own or qkv.shape[1] // (3 * self.n_heads) > MAX_HEAD_DIM:
        return type(self).forward(self, qkv)
    return attention_qkv(qkv.mT.contiguous(), self.n_heads).mT.contiguous()


def qkv_attention_of_one_head(self: nn.Module, own: Own, qkv: Tensor) -> Tensor:
    """QKVAttention of improved-diffusion, whose caller has dealt the heads out to N."""
    if type(self).forward is not own or qkv.shape[1] // 3 > MAX_HEAD_DIM or qkv.shape[2] == 0:
        return type(self).forward(self, qkv)
    return attention_qkv(qkv.mT.contiguous(), 1).mT.contiguous()


def qkv_attention_legacy(self: nn.Module, own: Own, qkv: Tensor) -> Tensor:
    """QKVAttentionLegacy of guided-diffusion: the same, packed [H, 3, D]."""
    if type(self).forward is not own or qkv.shape[1] // (3 * self.n_heads) > MAX_HEAD_DIM:
        return type(self).forward(self, qkv)
    heads = qkv.mT.contiguous().unflatten(2, (self.n_heads, 3, -1))
    q, k, v = heads.permute(3, 0, 2, 1, 4).unbind(0)
    return attention(q, k, v).transpose(1, 2).flatten(2).mT.contiguous()


class KernelAttnProcessor:
    """AttnProcessor2_0 of diffusers with this package's attention; `owner` is what it replaced.

    A call with a mask, without tokens, with arguments that are deprecated there, or of an attention
    that has got more norms since goes to the owner. Without one, as diffusers makes processors anew
    when it loads an IP-Adapter, the owner is AttnProcessor2_0.
    """

    def __init__(self, owner: Callable[..., Tensor] | None = None):
        if owner is None:
            from diffusers.models.attention_processor import AttnProcessor2_0

            owner = AttnProcessor2_0()
        self.owner, self.own = owner, type(owner).__call__

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        context = encoder_hidden_states
        if (
            attention_mask is not None
            or args
            or kwargs.get("scale") is not None
            or (hidden_states.numel() == 0 and hidden_states.shape[0] > 0)
            or (context is not None and context.numel() == 0 and context.shape[0] > 0)
            or attn.norm_q is not None
            or attn.norm_k is not None
            or attn.norm_cross is not None
            or attn.spatial_norm is not None
            or type(self.owner).__call__ is not self.own
        ):
            return self.owner(
                attn, hidden_states, encoder_hidden_states, attention_mask, temb, *args, **kwargs
            )
        is_image = hidden_states.dim() == 4
        tokens = hidden_states.flatten(2).mT if is_image else hidden_states
        before, out = attn.group_norm, attn.to_out  # each costs half a microsecond
        if before is not None:
            # Torch's would move the tokens apart, which is for hooks to see.
            ours = _is_ours(before) and not _has_hooks(before)
            tokens = (before(tokens.mT, keep_layout=True) if ours else before(tokens.mT)).mT
        tokens = tokens.contiguous()  # of an image that is not channels_last: once, not thrice
        context = tokens if context is None else context
        q, k, v = (
            projection(source).unflatten(2, (attn.heads, -1)).transpose(1, 2)
            for projection, source in (
                (attn.to_q, tokens),
                (attn.to_k, context),
                (attn.to_v, context),
            )
        )
        o = attention(q, k, v).transpose(1, 2).flatten(2)
        o = out[1](out[0](o))
        if is_image:
            o = o.mT.unflatten(2, hidden_states.shape[2:])
        if attn.residual_connection:
            # The sum has the layout of the first: an image that of the input, tokens lie together.
            o = hidden_states + o if is_image else o + hidden_states
        return o if attn.rescale_output_factor == 1 else o / attn.rescale_output_factor


def installed(module: nn.Module, method: str = "forward") -> bool:
    """Tell whether the module's method is one of this file's."""
    return getattr(vars(module).get(method), "func", None) in _FORWARDS


def hooked(*modules: nn.Module) -> bool:
    """Tell whether any module has a hook of any kind, or a forward put on it that is not ours."""
    return any([("forward" in vars(m) and not installed(m)) or _has_hooks(m) for m in modules])


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


_FORWARDS = (
    norm,
    sequential,
    resnet_block,
    res_block,
    qkv_attention,
    qkv_attention_of_one_head,
    qkv_attention_legacy,
)


def fuses(layer: nn.Module, activation: nn.Module, dropout: nn.Module | None = None) -> bool:
    """Tell whether a norm and what follows it run as one op, in a forward of ours."""
    if not (_is_ours(layer) and type(activation) is nn.SiLU and nn.SiLU.forward is _SILU):
        return False
    # Nothing of ours is ever put on these two, so any forward of their own is another's.
    if _has_hooks(layer) or _has_hooks(activation) or "forward" in vars(activation):
        return False
    return dropout is None or (
        type(dropout) is nn.Dropout
        and nn.Dropout.forward is _DROPOUT
        and 0 <= dropout.p < 1
        and not (_has_hooks(dropout) or "forward" in vars(dropout))
    )


def _is_ours(layer: nn.Module) -> bool:
    """Tell whether `norm` runs, in the place of what is still the class's own."""
    forward = vars(layer).get("forward")
    return (
        getattr(forward, "func", None) is norm
        and type(layer).forward is forward.args[1]
        and nn.GroupNorm.forward is _GROUP_NORM
    )


# How memory is walked through in channels_last, from its innermost axis on.
_OUTWARD = {4: (1, 3, 2, 0), 5: (1, 4, 3, 2, 0)}


def _as_torch_lays(x: Tensor) -> Tensor:
    """Bring (N, C, *spatial) into the layout in which torch's group norm on CPUs returns it.

    That is channels_last where there is one and the strides are of that order, as
    Tensor::suggest_memory_format looks at them, and contiguous otherwise.
    """
    sizes, strides, least = x.shape, x.stride(), 1
    for axis in _OUTWARD.get(len(sizes), ()):
        if strides[axis] < least:
            return x.contiguous()
        least = strides[axis] * sizes[axis]
    if len(sizes) == 4 and strides[1] == 1:
        return x  # which `group_norm` keeps
    if len(sizes) not in _OUTWARD or transforming():
        return x.contiguous()
    return x.contiguous(
        memory_format=torch.channels_last if len(sizes) == 4 else torch.channels_last_3d
    )


def _probability(dropout: nn.Dropout) -> float:
    return dropout.p if dropout.training else 0.0


def _embedded(h: Tensor, emb: Tensor, scaled_and_shifted: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Bring h and its projected embedding, (N, C or 2 * C), to one N, for what the norm of h takes.

    Where theirs add, either may have N = 1.
    """
    if h.shape[0] == 1 != emb.shape[0]:
        h = h.expand(emb.shape[0], *h.shape[1:])
    emb = emb.to(h.dtype).expand(h.shape[0], -1)
    if not scaled_and_shifted:
        return h, {"pre_bias": emb}
    scale, shift = emb.chunk(2, dim=1)
    return h, {"scale": scale, "shift": shift}
