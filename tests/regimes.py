"""Triton's group norm cut up in every way, with blocks so small that it takes all its loops."""

import dataclasses

import pytest
import torch

from ddb_fast.kernels import group_norm

LAYOUTS = (torch.contiguous_format, torch.channels_last)
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=("contiguous", "channels_last"))
# Two chunks of pixels and four tiles, the last of each not full; every program takes milliseconds.
SHAPE = (2, 12, 5, 3)


def fused_loop(cut, hw):
    """Tiles of four pixels, two at a time, so that even a small image takes several and a tail."""
    return dataclasses.replace(cut, splits=0, one_tile=False, block_p=4, chunk=hw, unroll=2)


def split(cut, hw):
    """Chunks of one or three tiles of four pixels, of which two are taken at a time."""
    chunk = 12 if hw > 12 else 4
    return dataclasses.replace(
        cut, splits=-(-hw // chunk), one_tile=False, block_p=4, chunk=chunk, unroll=2
    )


@pytest.fixture(params=("one_tile", "fused_loop", "split"))
def regime(request, monkeypatch):
    """Force a regime on every call."""
    from ddb_fast.kernels import triton_group_norm as module

    usual = module.plan

    def plan(x, num_groups, **options):
        hw, c = x.shape[2] * x.shape[3], x.shape[1]
        cut = usual(x, num_groups, **options)
        assert not cut.splits and cut.one_tile, "small enough to be cut in any way"
        if request.param == "one_tile":
            return cut
        if request.param == "fused_loop":
            return fused_loop(cut, hw)
        blocks = dataclasses.replace(cut, slab_groups=0, slabs=-(-c // 8), block_c=8)
        return split(blocks, hw)

    monkeypatch.setattr(module, "plan", plan)
    return request.param


def operands(n, c, h, w, layout, dtype=torch.float32):
    x, residual = (torch.randn(n, c, h, w).to(dtype).contiguous(memory_format=layout) for _ in "xr")
    vectors = {"weight": (c,), "bias": (c,), "pre_bias": (n, c), "scale": (n, c), "shift": (n, c)}
    return {
        "x": x,
        **{name: torch.randn(size).to(dtype) for name, size in vectors.items()},
        "residual": residual,
    }


def run(tensors, num_groups, backend, *, dropout_p=0.0, dtype=None, return_sum=True):
    """y, the sum and every gradient, for a loss that weighs each element differently."""
    tensors = {
        name: t.detach().to(dtype or t.dtype).requires_grad_() for name, t in tensors.items()
    }
    options = {name: t for name, t in tensors.items() if name != "x"}
    results = group_norm(
        tensors["x"],
        num_groups,
        **options,
        activation="silu",
        dropout_p=dropout_p,
        seed=torch.tensor(9),
        return_sum=return_sum,
        backend=backend,
    )
    results = results if return_sum else (results,)
    weights = torch.linspace(-2, 3, tensors["x"].numel(), dtype=torch.float64).view(
        results[0].shape
    )
    loss = sum((r.double() * weights.roll(i, 0)).sum() for i, r in enumerate(results))
    return (*results, *torch.autograd.grad(loss, list(tensors.values())))


def errors(actual, truth):
    return [
        ((a.double() - t).square().mean().sqrt() / t.square().mean().sqrt()).item()
        for a, t in zip(actual, truth, strict=True)
    ]
