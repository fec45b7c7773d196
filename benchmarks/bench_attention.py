"""Attention, ours beside SDPA's backends: `pytest benchmarks -k "lean and forward"`.

On a CPU with one sample. On a GPU pytest-benchmark would time launches; use `suite.py` there.
"""

import contenders
import pytest
import shapes
import speed
import torch

CPU = torch.device("cpu")
SHAPES = [(g, shape.at(1)) for g, shape in shapes.unique(shapes.ATTENTION) if shape.s <= 256]


@pytest.mark.benchmark(max_time=0.3)
@pytest.mark.parametrize("contender", ("torch", "sdpa-math"))
@pytest.mark.parametrize("direction", ("forward", "both"))
@pytest.mark.parametrize("dtype", ("fp32", "bf16"))
@pytest.mark.parametrize(("group", "shape"), SHAPES, ids=[f"{g}-{s}" for g, s in SHAPES])
def bench_attention(benchmark, group, shape, dtype, direction, contender):
    benchmark.group = f"attention {group} {shape} {dtype} {direction}"
    found = [contenders.our_attention("torch"), *contenders.attention_contenders(CPU)[0]]
    one = next(c for c in found if c.name == contender)
    kind = speed.DTYPES[dtype]
    operands = contenders.attention_operands(shape, kind, CPU)
    speed.attention_off(one, operands, direction)
    benchmark(contenders.DIRECTIONS[direction](one, operands))
    moved = speed.ATTENTION_MOVED[direction] * shape.elements * kind.itemsize
    seconds = benchmark.stats.stats.median
    benchmark.extra_info["CE"] = seconds / speed.copy_seconds(CPU, shape.elements, kind)
    benchmark.extra_info["GB/s"] = moved / seconds / 1e9
    flops = speed.PRODUCTS[direction] * shape.flops
    benchmark.extra_info["TFLOP/s"] = flops / seconds / 1e12
