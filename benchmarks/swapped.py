"""What `optimize` gains on a GPU: a training step and a forward pass of diffusers' U-Net.

Measured where diffusers can be imported: as it is, under torch.compile in two modes, after
`optimize`, and both. bf16 autocast, channels_last, fused AdamW; every way eager but for what it
says.
"""

import functools
from collections.abc import Iterator
from importlib import import_module

import networks
import torch
from rows import Item, Row

from ddb_fast.kernels import optimize

WAYS = (
    "plain",
    "optimize",
    "compile",
    "optimize, compile",
    "compile reduce-overhead",
    "optimize, compile reduce-overhead",
)


def items(device: torch.device, batch: int = 32, size: int = 64) -> Iterator[Item]:
    """A row a way; one that says why, where diffusers is missing."""
    for way in WAYS:
        key = f"step diffusers UNet2DModel {way} {batch}"
        yield key, functools.partial(_row, device, way, batch, size)


def _row(device: torch.device, way: str, batch: int, size: int, **sizes) -> Row:
    diffusers = import_module("diffusers")
    torch.compiler.reset()
    torch.manual_seed(0)
    network = diffusers.UNet2DModel(sample_size=size, **sizes).to(device)
    network = network.to(memory_format=torch.channels_last).train()
    if way.startswith("optimize"):
        optimize(network)
    mode = "reduce-overhead" if way.endswith("reduce-overhead") else "default"
    model = torch.compile(network, mode=mode) if "compile" in way else network
    optimizer = torch.optim.AdamW(network.parameters(), 1e-4, fused=True)
    x = torch.randn(batch, 3, size, size, device=device)
    x = x.contiguous(memory_format=torch.channels_last)
    t = torch.arange(batch, device=device) * (1000 // batch)

    def forward() -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return model(x, t).sample

    def step() -> None:
        forward().float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    timing = networks.seconds_of(device, step, 10)
    peak = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None
    network.eval()
    with torch.inference_mode():
        sampled = networks.seconds_of(device, forward, 10)
    return {
        "what": "diffusers UNet2DModel", "way": way, "batch": batch, "ms": timing.median * 1e3,
        "ms_10": timing.low * 1e3, "ms_90": timing.high * 1e3,
        "images/s": batch / timing.median, "forward ms": sampled.median * 1e3,
        "peak GB": peak, "how": timing.how,
    }  # fmt: skip
