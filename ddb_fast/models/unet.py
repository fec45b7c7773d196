"""The class-conditional U-Net of the diffusion model, in channels_last from head to tail.

Preset `ddb` is the network of the paper's public generator: it computes the same functions, only
arranged so that less goes through memory. The time and class projections of all blocks are one
matrix product, whose result is added inside the second norm, as is dropout. q, k and v are one
product too. Where several layers' biases are added up, one layer keeps a bias: the projection
(theirs: conv1, time and class), conv2 (and the shortcut), the 5x5 down-convolution (and the 3x3).
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddb_fast.config import UNetConfig
from ddb_fast.kernels import attention_qkv, group_norm
from ddb_fast.models import authors


def sinusoids(t: Tensor, width: int) -> Tensor:
    """sin and cos of t times 10000^(-2i/width), interleaved: (N,) of any type -> (N, width) fp32.

    Source: Vaswani et al. 2017, section 3.5. `width` must be even.
    """
    rates = torch.exp(torch.arange(0, width, 2, device=t.device) * (-math.log(10_000) / width))
    angles = t.float()[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(1)


class Norm(nn.Module):
    """Group norm with trained weight and bias; keywords as `ddb_fast.kernels.group_norm`."""

    def __init__(self, num_groups: int, channels: int):
        super().__init__()
        if channels % num_groups:
            raise ValueError(f"norm_groups {num_groups} does not divide {channels} channels")
        self.num_groups = num_groups
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, **fused: Any) -> Tensor | tuple[Tensor, Tensor]:
        return group_norm(x, self.num_groups, self.weight, self.bias, **fused)


class Attention(nn.Module):
    """Self-attention over the pixels of x + bias + shortcut, added to that sum."""

    def __init__(self, config: UNetConfig, channels: int):
        super().__init__()
        head_channels = config.head_channels or channels
        if channels % head_channels:
            raise ValueError(f"head_channels {head_channels} does not divide {channels} channels")
        self.heads = channels // head_channels
        self.norm = Norm(config.norm_groups, channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor, shortcut: Tensor, bias: Tensor) -> Tensor:
        h, x = self.norm(x, pre_bias=bias, residual=shortcut, return_sum=True)
        tokens = h.flatten(2).mT  # (N, H * W, C): in channels_last a view, as is the way back
        o = self.out(attention_qkv(self.qkv(tokens), self.heads))
        return x + o.mT.view_as(x)


class ResidualBlock(nn.Module):
    """Two norms and convolutions around a shortcut, then attention if it attends.

    forward(x, embedding): (N, in_channels, H, W), (N, out_channels) -> (N, out_channels, H, W).
    """

    def __init__(self, config: UNetConfig, in_channels: int, out_channels: int, *, attends: bool):
        super().__init__()
        self.out_channels = out_channels
        self.dropout = config.dropout
        self.norm1 = Norm(config.norm_groups, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = Norm(config.norm_groups, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = (
            nn.Identity()
            if in_channels == out_channels
            else nn.Conv2d(in_channels, out_channels, 1, bias=False)
        )
        self.attention = Attention(config, out_channels) if attends else None

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        dropout_p = self.dropout if self.training else 0.0
        h = self.conv1(self.norm1(x, activation="silu"))
        h = self.norm2(h, pre_bias=embedding, activation="silu", dropout_p=dropout_p)
        if self.attention is None:
            return self.conv2(h) + self.shortcut(x)
        # The norm adds conv2's bias on its way, and has its gradient from sums it takes anyway; on
        # its own either would be one more pass over the tensor.
        h = F.conv2d(h, self.conv2.weight, padding=1)
        return self.attention(h, self.shortcut(x), self.conv2.bias)


class _Join(torch.autograd.Function):
    """torch.cat along the channels, whose gradients lie in memory as their operands do.

    Those of torch.cat are windows of one tensor, which every convolution that receives one copies
    for itself and every sum walks through with gaps.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, skip: Tensor) -> Tensor:
        ctx.sizes = x.shape[1], skip.shape[1]
        return torch.cat([x, skip], 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        parts = gradient.split(ctx.sizes, 1)
        return tuple(part.contiguous(memory_format=torch.channels_last) for part in parts)


def join(x: Tensor, skip: Tensor) -> Tensor:
    """The channels of x, then those of skip: (N, C, H, W) and (N, D, H, W) -> (N, C + D, H, W)."""
    # A compiler sees through torch.cat and plans such copies itself.
    return torch.cat([x, skip], 1) if torch.compiler.is_compiling() else _Join.apply(x, skip)


class SumDownsample(nn.Module):
    """The authors' way down: a 3x3 and a 5x5 convolution of stride 2, added."""

    def __init__(self, channels: int):
        super().__init__()
        self.c1 = nn.Conv2d(channels, channels, 3, stride=2, padding=1, bias=False)
        self.c2 = nn.Conv2d(channels, channels, 5, stride=2, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.c1(x) + self.c2(x)


def _downsample(config: UNetConfig, channels: int) -> nn.Module:
    if config.resample == "authors":
        return SumDownsample(channels)
    return nn.Conv2d(channels, channels, 3, stride=2, padding=1)


def _upsample(config: UNetConfig, channels: int) -> nn.Module:
    if config.resample == "authors":
        enlarge = nn.ConvTranspose2d(channels, channels, 5, stride=2, padding=2, output_padding=1)
    else:
        enlarge = nn.Upsample(scale_factor=2, mode="nearest")
    return nn.Sequential(enlarge, nn.Conv2d(channels, channels, 3, padding=1))


def _embedding_mlp(config: UNetConfig) -> nn.Module:
    # SiLU at the end, once, is what the authors apply at the head of every block's projection.
    width = config.embedding
    return nn.Sequential(
        nn.Linear(config.channels, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()
    )


class UNet(nn.Module):
    """Predict noise (or v) from a noisy image, its timestep and its class.

    unet(x, t, y): x (N, in_channels, H, W), H and W divisible by 2^(levels - 1); t (N,) int64 in
    0..timesteps-1, or any real number without a time table; y (N,) int64 in 0..num_classes-1, or
    `null_class` for the unconditional branch, whose row of the table is zero and stays zero.
    Returns (N, in_channels, H, W), channels_last as the weights are; under autocast in its dtype.

    Weights start Xavier-uniform, biases at zero, and the last layer of every residual branch and of
    the network near zero. ValueError for sizes that do not fit together.
    Source: Ho et al. 2020, appendix B; the authors of DDB; Ho & Salimans 2022 for the null class.
    """

    def __init__(
        self, config: UNetConfig, *, num_classes: int, timesteps: int, in_channels: int = 3
    ):
        super().__init__()
        _check(config, num_classes, timesteps)
        self.config = config
        self.num_classes = self.null_class = num_classes
        self.timesteps = timesteps
        channels = config.channels
        self.time_table = None
        if config.time_table:
            table = sinusoids(torch.arange(timesteps), channels)
            self.time_table = nn.Embedding.from_pretrained(table, freeze=False)
        self.class_table = nn.Embedding(num_classes + 1, channels, padding_idx=num_classes)
        self.time_mlp = _embedding_mlp(config)
        self.class_mlp = _embedding_mlp(config)

        self.head = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.down, self.middle, self.up = (nn.ModuleList() for _ in range(3))
        levels = list(enumerate(config.channel_multipliers))
        skips = [channels]
        for level, multiplier in levels:
            attends = level in config.attention_levels
            if level > 0:
                self.down.append(_downsample(config, skips[-1]))
                skips.append(skips[-1])
            for _ in range(config.blocks_per_level):
                width = channels * multiplier
                self.down.append(ResidualBlock(config, skips[-1], width, attends=attends))
                skips.append(width)
        width = skips[-1]
        for attends in (True, False):
            self.middle.append(ResidualBlock(config, width, width, attends=attends))
        for level, multiplier in reversed(levels):
            attends = config.attention_up and level in config.attention_levels
            for _ in range(config.blocks_per_level + 1):
                joined, width = width + skips.pop(), channels * multiplier
                self.up.append(ResidualBlock(config, joined, width, attends=attends))
            if level > 0:
                self.up.append(_upsample(config, width))
        self.tail_norm = Norm(config.norm_groups, width)
        self.tail = nn.Conv2d(width, in_channels, 3, padding=1)

        self.block_channels = [block.out_channels for block in self.residual_blocks()]
        self.projection = nn.Linear(2 * config.embedding, sum(self.block_channels))
        self._initialise()
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        height, width = x.shape[2:]
        step = 2 ** (len(self.config.channel_multipliers) - 1)
        if height % step or width % step:
            raise ValueError(
                f"images of {height}x{width} pixels: sides must be multiples of {step}"
            )
        embeddings = iter(self._embed(t, y))
        h = self.head(x.contiguous(memory_format=torch.channels_last))
        skips = [h]
        for block in self.down:
            h = block(h, next(embeddings)) if isinstance(block, ResidualBlock) else block(h)
            skips.append(h)
        for block in self.middle:
            h = block(h, next(embeddings))
        for block in self.up:
            if isinstance(block, ResidualBlock):
                h = block(join(h, skips.pop()), next(embeddings))
            else:
                h = block(h)
        return self.tail(self.tail_norm(h, activation="silu"))

    def _embed(self, t: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        """What each residual block adds to its channels: (N, C) each, in the blocks' order."""
        if self.time_table is None:
            time = sinusoids(t, self.config.channels).to(self.projection.weight.dtype)
        else:
            time = self.time_table(t)
        both = torch.cat([self.time_mlp(time), self.class_mlp(self.class_table(y))], 1)
        return self.projection(both).split(self.block_channels, 1)

    def residual_blocks(self) -> Iterator[ResidualBlock]:
        """The residual blocks in the order in which they run."""
        for path in (self.down, self.middle, self.up):
            yield from (block for block in path if isinstance(block, ResidualBlock))

    @torch.no_grad()
    def _initialise(self) -> None:
        xavier = nn.init.xavier_uniform_
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
                xavier(module.weight)
                if module.bias is not None:
                    module.bias.zero_()
        # What packs several layers into one starts as those layers would.
        for rows in self.projection.weight.split(self.block_channels):
            for part in rows.chunk(2, 1):
                xavier(part)
        for block in self.residual_blocks():
            xavier(block.conv2.weight, gain=1e-5)
            if block.attention is not None:
                for part in block.attention.qkv.weight.chunk(3):
                    xavier(part)
                xavier(block.attention.out.weight, gain=1e-5)
        xavier(self.tail.weight, gain=1e-5)


def _check(config: UNetConfig, num_classes: int, timesteps: int) -> None:
    if num_classes < 1 or timesteps < 1:
        raise ValueError(f"{num_classes} classes and {timesteps} timesteps: at least one of each")
    if config.channels % 2:
        raise ValueError(f"channels {config.channels}: sines and cosines need an even number")
    levels = len(config.channel_multipliers)
    if not levels:
        raise ValueError("channel_multipliers (): at least one level")
    beyond = [level for level in config.attention_levels if not 0 <= level < levels]
    if beyond:
        raise ValueError(f"attention_levels {beyond} are not among the {levels} levels")


def from_authors(state_dict: Mapping[str, Tensor]) -> UNet:
    """Build the network that a state dict of the authors' generator describes, with its weights.

    Classes, timesteps, widths, levels and attention follow from names and shapes; their null class,
    row 0, becomes `null_class`. Dropout is not in the weights: it is theirs, 0.15. The network has
    the dtype and device of the state dict and shares no memory with it.
    ValueError, one line, for names or shapes that are not of their network.
    """
    state = {name.removeprefix("module."): tensor for name, tensor in state_dict.items()}
    config, sizes = authors.describe(state)
    with torch.device("meta"):
        unet = UNet(config, **sizes)
    unet.load_state_dict(authors.rename(state, unet.state_dict()), assign=True)
    return unet.to(memory_format=torch.channels_last)
