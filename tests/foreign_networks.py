"""Networks that `optimize` meets, and what compares one with a twin that was left alone."""

import copy
import importlib.util
import inspect
import math
import textwrap
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ddb_fast.kernels.swap import Report

TOLERANCE = 1e-5


def randomised(model: nn.Module) -> nn.Module:
    """Give norms, biases and zero-initialised layers values that cannot hide a mistake."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.normal_(1.0 if name.endswith("weight") else 0.0, 0.2)
            elif not parameter.any():
                parameter.normal_(0, 0.05)
    return model


def another_version(cls: type, old: str, new: str, folder: Path) -> type:
    """The class as a release with another source would have it."""
    source = textwrap.dedent(inspect.getsource(cls))
    assert old in source
    path = folder / "another_version.py"
    path.write_text("from __future__ import annotations\n" + source.replace(old, new))
    spec = importlib.util.spec_from_file_location(f"another_version_{id(path)}", path)
    module = importlib.util.module_from_spec(spec)
    vars(module).update(torch=torch, nn=nn, F=F, math=math)
    spec.loader.exec_module(module)
    return getattr(module, cls.__name__)


def error(actual: Tensor, truth: Tensor, floor: Tensor | None = None) -> float:
    """RMS of the difference over RMS of the truth, or of the floor where the truth vanishes."""
    norm = torch.linalg.vector_norm
    return (norm(actual - truth) / norm(truth if floor is None else floor)).item()


def gradients(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the output and the gradients of all parameters and differentiable inputs, by name."""
    model.zero_grad()
    leaves = {
        name: x.clone().requires_grad_()
        for name, x in inputs.items()
        if x.is_floating_point() and "mask" not in name
    }
    y = model(**{**inputs, **leaves})
    y = y if isinstance(y, Tensor) else y.sample
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    (y * weights).sum().backward()
    named = [*model.named_parameters(), *leaves.items()]
    return {"output": y.detach(), **{name: x.grad for name, x in named if x.grad is not None}}


def assert_equal_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, truth in expected.items():
        # A shift of all keys changes no softmax: this gradient is zero, rounded.
        floor = expected[name.replace("to_k", "to_q")] if name.endswith("to_k.bias") else None
        assert error(actual[name], truth, floor) <= TOLERANCE, name


def assert_same(model: nn.Module, original: nn.Module, **inputs) -> None:
    """Both compute the same, forward and backward, when training and when not."""
    for training in (True, False):
        expected = gradients(original.train(training), inputs)
        actual = gradients(model.train(training), inputs)
        assert_equal_gradients(actual, expected)


def pair(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The network to be optimised, and a copy."""
    model = randomised(model)
    return model, copy.deepcopy(model)


def count(report: Report, kind: str) -> int:
    return sum(entry.kind == kind for entry in report.swapped)


def unet_2d(**changes) -> nn.Module:
    diffusers = pytest.importorskip("diffusers")
    arguments = {
        "sample_size": 8,
        "layers_per_block": 1,
        "block_out_channels": (16, 32),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "norm_num_groups": 4,
    }
    return diffusers.UNet2DModel(**{**arguments, **changes})


def conditional(**changes) -> nn.Module:
    diffusers = pytest.importorskip("diffusers")
    arguments = {
        "sample_size": 8,
        "layers_per_block": 1,
        "block_out_channels": (16, 32),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "norm_num_groups": 4,
        "attention_head_dim": 4,
        "cross_attention_dim": 12,
    }
    return diffusers.UNet2DConditionModel(**{**arguments, **changes})


def image(channels: int = 3, size: int = 8) -> dict[str, Tensor]:
    return {"sample": torch.randn(2, channels, size, size), "timestep": torch.tensor([3, 700])}


def text() -> dict[str, Tensor]:
    return {**image(4), "encoder_hidden_states": torch.randn(2, 5, 12)}


# In the style of guided-diffusion: its names and its work, written for these tests.


class GroupNorm32(nn.GroupNorm):
    def forward(self, x):
        return super().forward(x.float()).type(x.dtype)


class ResBlock(nn.Module):
    def __init__(self, channels, out_channels, *, shifted, resample=False, dropout=0.0):
        super().__init__()
        self.use_scale_shift_norm, self.updown = shifted, resample
        self.in_layers = nn.Sequential(
            GroupNorm32(4, channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1)
        )
        self.h_upd = self.x_upd = nn.AvgPool2d(2) if resample else nn.Identity()
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(6, out_channels * (1 + shifted)))
        self.out_layers = nn.Sequential(
            GroupNorm32(4, out_channels),
            nn.SiLU(),
            nn.Dropout(dropout),
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
        )
        same = channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x, emb):
        return checkpoint(self._forward, x, emb, use_reentrant=False)

    def _forward(self, x, emb):
        h = self.in_layers[:-1](x)
        if self.updown:
            h, x = self.h_upd(h), self.x_upd(x)
        h = self.in_layers[-1](h)
        emb_out = self.emb_layers(emb).type(h.dtype)[:, :, None, None]
        if self.use_scale_shift_norm:
            out_norm, out_rest = self.out_layers[0], self.out_layers[1:]
            scale, shift = emb_out.chunk(2, dim=1)
            h = out_norm(h) * (1 + scale) + shift
            h = out_rest(h)
        else:
            h = self.out_layers(h + emb_out)
        return self.skip_connection(x) + h


class QKVAttentionLegacy(nn.Module):
    def __init__(self, n_heads):
        super().__init__()
        self.n_heads = n_heads

    def forward(self, qkv):
        bs, width, length = qkv.shape
        assert width % (3 * self.n_heads) == 0
        ch = width // (3 * self.n_heads)
        q, k, v = qkv.reshape(bs * self.n_heads, ch * 3, length).split(ch, dim=1)
        scale = 1 / math.sqrt(math.sqrt(ch))
        weight = torch.einsum("bct,bcs->bts", q * scale, k * scale).softmax(dim=-1)
        return torch.einsum("bts,bcs->bct", weight, v).reshape(bs, -1, length)


class QKVAttention(nn.Module):
    def __init__(self, n_heads):
        super().__init__()
        self.n_heads = n_heads

    def forward(self, qkv):
        bs, width, length = qkv.shape
        assert width % (3 * self.n_heads) == 0
        ch = width // (3 * self.n_heads)
        q, k, v = (t.reshape(bs * self.n_heads, ch, length) for t in qkv.chunk(3, dim=1))
        scale = 1 / math.sqrt(math.sqrt(ch))
        weight = torch.einsum("bct,bcs->bts", q * scale, k * scale).softmax(dim=-1)
        return torch.einsum("bts,bcs->bct", weight, v).reshape(bs, -1, length)


class OneHeadAttention(nn.Module):
    """As in improved-diffusion, where it has the name QKVAttention too and reads nothing."""

    def forward(self, qkv):
        q, k, v = qkv.chunk(3, dim=1)
        scale = 1 / math.sqrt(math.sqrt(q.shape[1]))
        weight = torch.einsum("bct,bcs->bts", q * scale, k * scale).softmax(dim=-1)
        return torch.einsum("bts,bcs->bct", weight, v)


OneHeadAttention.__name__ = "QKVAttention"


class AttentionBlock(nn.Module):
    def __init__(self, channels, attention):
        super().__init__()
        self.norm = GroupNorm32(4, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.attention = attention
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x):
        n, c, *spatial = x.shape
        x = x.reshape(n, c, -1)
        h = self.proj_out(self.attention(self.qkv(self.norm(x))))
        return (x + h).reshape(n, c, *spatial)


class Guided(nn.Module):
    def __init__(self, *, shifted=True, attention=QKVAttentionLegacy, dropout=0.0):
        super().__init__()
        self.first = ResBlock(8, 16, shifted=shifted, dropout=dropout)
        self.second = ResBlock(16, 16, shifted=shifted, resample=True)
        self.attention = AttentionBlock(16, attention(2))
        self.out = nn.Sequential(GroupNorm32(4, 16), nn.SiLU(), nn.Conv2d(16, 3, 3, padding=1))

    def forward(self, x, emb):
        return self.out(self.attention(self.second(self.first(x, emb), emb)))


def guided_inputs() -> dict[str, Tensor]:
    return {"x": torch.randn(2, 8, 6, 8), "emb": torch.randn(2, 6)}


def plain() -> nn.Sequential:
    shared = nn.SiLU(inplace=True)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.GroupNorm(2, 8),
        shared,
        nn.Conv2d(8, 8, 3, padding=1),
        nn.GroupNorm(4, 8, affine=False, eps=1e-3),
        shared,
        nn.GroupNorm(8, 8),
        nn.Conv2d(8, 8, 1),
        nn.SiLU(),
        nn.BatchNorm2d(8),
        nn.Sequential(nn.GroupNorm(2, 8), nn.ReLU()),
    )
