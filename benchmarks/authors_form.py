"""The authors' form, in plain torch from its description: their network, and how they sample.

fp32, NCHW, attention through explicit maps, two forward passes for each of 999 ancestral steps, no
moving average. The network shares nothing with our U-Net: it is the baseline of the benchmarks and
what the tests compare ours with. Names are those of their files.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

GROUPS = 32


def embedding_mlp(table, channels):
    width = 4 * channels
    return nn.Sequential(table, nn.Linear(channels, width), nn.SiLU(), nn.Linear(width, width))


class Authors(nn.Module):
    """The network of the authors' generator: names of its state dict, forward as described."""

    def __init__(self, timesteps, classes, channels, multipliers, blocks, attends=None):
        super().__init__()
        self.channels, width = channels, channels
        attends = [True] * len(multipliers) if attends is None else attends
        frequency = 10_000.0 ** (-torch.arange(0, channels, 2, dtype=torch.float64) / channels)
        angle = torch.arange(timesteps, dtype=torch.float64).outer(frequency)
        table = torch.zeros(timesteps, channels, dtype=torch.float64)
        table[:, 0::2], table[:, 1::2] = angle.sin(), angle.cos()
        time = nn.Embedding(timesteps, channels, _weight=table.float())
        label = nn.Embedding(classes + 1, channels, padding_idx=0)
        self.time_embedding = nn.ModuleDict({"timembedding": embedding_mlp(time, channels)})
        self.cond_embedding = nn.ModuleDict({"condEmbedding": embedding_mlp(label, channels)})
        self.head = nn.Conv2d(3, channels, 3, padding=1)
        self.downblocks, self.middleblocks = nn.ModuleList(), nn.ModuleList()
        self.upblocks = nn.ModuleList()
        widths = [width]
        for level, multiplier in enumerate(multipliers):
            for _ in range(blocks):
                wider = channels * multiplier
                self.downblocks.append(self.res_block(width, wider, attends[level]))
                widths.append(width := wider)
            if level + 1 < len(multipliers):
                layers = {
                    "c1": nn.Conv2d(width, width, 3, stride=2, padding=1),
                    "c2": nn.Conv2d(width, width, 5, stride=2, padding=2),
                }
                self.downblocks.append(nn.ModuleDict(layers))
                widths.append(width)
        self.middleblocks.append(self.res_block(width, width, True))
        self.middleblocks.append(self.res_block(width, width, False))
        for level in range(len(multipliers) - 1, -1, -1):
            for _ in range(blocks + 1):
                joined, width = width + widths.pop(), channels * multipliers[level]
                self.upblocks.append(self.res_block(joined, width, False))
            if level:
                layers = {
                    "t": nn.ConvTranspose2d(width, width, 5, 2, 2, 1),
                    "c": nn.Conv2d(width, width, 3, padding=1),
                }
                self.upblocks.append(nn.ModuleDict(layers))
        self.tail = nn.Sequential(
            nn.GroupNorm(GROUPS, width), nn.SiLU(), nn.Conv2d(width, 3, 3, padding=1)
        )

    def res_block(self, before, after, attends):
        parts = {
            "block1": nn.Sequential(
                nn.GroupNorm(GROUPS, before), nn.SiLU(), nn.Conv2d(before, after, 3, padding=1)
            ),
            "temb_proj": nn.Sequential(nn.SiLU(), nn.Linear(4 * self.channels, after)),
            "cond_proj": nn.Sequential(nn.SiLU(), nn.Linear(4 * self.channels, after)),
            "block2": nn.Sequential(
                nn.GroupNorm(GROUPS, after),
                nn.SiLU(),
                nn.Dropout(0.15),
                nn.Conv2d(after, after, 3, padding=1),
            ),
            "shortcut": nn.Identity() if before == after else nn.Conv2d(before, after, 1),
            "attn": nn.Identity(),
        }
        if attends:
            names = ("proj_q", "proj_k", "proj_v", "proj")
            parts["attn"] = nn.ModuleDict({name: nn.Conv2d(after, after, 1) for name in names})
            parts["attn"]["group_norm"] = nn.GroupNorm(GROUPS, after)
        return nn.ModuleDict(parts)

    def forward(self, x, t, y):
        time = self.time_embedding["timembedding"](t)
        label = self.cond_embedding["condEmbedding"](y)
        h = self.head(x)
        skips = [h]
        for block in self.downblocks:
            if "c1" in block:
                h = block["c1"](h) + block["c2"](h)
            else:
                h = self.res(block, h, time, label)
            skips.append(h)
        for block in self.middleblocks:
            h = self.res(block, h, time, label)
        for block in self.upblocks:
            if "t" in block:
                h = block["c"](block["t"](h))
            else:
                h = self.res(block, torch.cat((h, skips.pop()), dim=1), time, label)
        return self.tail(h)

    @staticmethod
    def res(block, x, time, label):
        h = block["block1"](x)
        h = h + block["temb_proj"](time)[:, :, None, None]
        h = h + block["cond_proj"](label)[:, :, None, None]
        h = block["block2"](h) + block["shortcut"](x)
        if isinstance(block["attn"], nn.Identity):
            return h
        normed = block["attn"]["group_norm"](h)
        q, k, v = (block["attn"][f"proj_{letter}"](normed).flatten(2) for letter in "qkv")
        weights = torch.softmax(torch.einsum("ncs,nct->nst", q, k) * q.shape[1] ** -0.5, dim=-1)
        o = torch.einsum("nst,nct->ncs", weights, v)
        return h + block["attn"]["proj"](o.unflatten(2, h.shape[2:]))


class WithSDPA(Authors):
    """Their network with torch's fused attention, for channels_last and torch.compile."""

    @staticmethod
    def res(block, x, time, label):
        h = block["block1"](x)
        h = h + block["temb_proj"](time)[:, :, None, None]
        h = h + block["cond_proj"](label)[:, :, None, None]
        h = block["block2"](h) + block["shortcut"](x)
        if isinstance(block["attn"], nn.Identity):
            return h
        normed = block["attn"]["group_norm"](h)
        q, k, v = (
            block["attn"][f"proj_{letter}"](normed).flatten(2).mT[:, None] for letter in "qkv"
        )
        o = F.scaled_dot_product_attention(q, k, v)[:, 0]
        return h + block["attn"]["proj"](o.mT.unflatten(2, h.shape[2:]))


def authors_network(seed=0, *, dtype=torch.float64, **changes):
    """A random one in eval mode; every parameter is visible, the null row included."""
    torch.manual_seed(seed)
    sizes = dict(timesteps=20, classes=3, channels=32, multipliers=(1, 2), blocks=2) | changes
    network = Authors(**sizes).to(dtype).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return network


@torch.inference_mode()
def ancestral_steps(predict, x, y, *, null_class, alpha_bar, steps=None, noise=None):
    """The first `steps` of their walk from noise x, or all of it, with their guidance w = 1.

    predict(x, t, y) -> eps with t (N,) int64, called for the conditional and for the null branch;
    alpha_bar: (T,) float64. Timesteps T-1 to 1, t = 0 left out, variance beta_t, nothing clipped.
    noise(): like x, drawn anew at every step; without it from the default generator.
    """
    alpha_bar = alpha_bar.tolist()
    null = torch.full_like(y, null_class)
    last = len(alpha_bar) - 1
    for t in range(last, 0 if steps is None else last - steps, -1):
        times = torch.full_like(y, t)
        eps = 2 * predict(x, times, y) - predict(x, times, null)
        beta = 1 - alpha_bar[t] / alpha_bar[t - 1]
        x = (x - beta / math.sqrt(1 - alpha_bar[t]) * eps) / math.sqrt(1 - beta)
        x = x + math.sqrt(beta) * (torch.randn_like(x) if noise is None else noise())
    return x
