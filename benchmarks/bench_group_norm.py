"""Group norm and SiLU, ours beside eager and torch.compile: `pytest benchmarks -k "ddb and both"`.

On a CPU with few samples. On a GPU pytest-benchmark would time launches; use `suite.py` there.
"""

import contenders
import pytest
import shapes
import speed
import torch

CPU = torch.device("cpu")
OPTIONS = shapes.OPTIONS["silu"]
# Of each network the shape nearest to a few milliseconds a call.
SHAPES = [
    (group, min(shapes.GROUP_NORM[group], key=lambda s: abs(s.c * s.h * s.w - 2**18)).at(2))
    for group in ("ddb", "lean", "adm64", "diffusers")
]


@pytest.mark.benchmark(max_time=0.3)
@pytest.mark.parametrize("contender", ("native", "eager", "compile"))
@pytest.mark.parametrize("layout", contenders.LAYOUTS)
@pytest.mark.parametrize("direction", ("forward", "both"))
@pytest.mark.parametrize("dtype", ("fp32", "bf16"))
@pytest.mark.parametrize(("group", "shape"), SHAPES, ids=[f"{g}-{s}" for g, s in SHAPES])
def bench_group_norm(benchmark, group, shape, dtype, direction, layout, contender):
    benchmark.group = f"group_norm {group} {shape} {dtype} {direction}"
    torch.compiler.reset()
    found, missing = contenders.norm_contenders(shape, OPTIONS, CPU, "default")
    if contender in missing:
        pytest.skip(missing[contender])
    one = next(c for c in found if c.name == f"{contender}/{layout}")
    kind = speed.DTYPES[dtype]
    operands = contenders.norm_operands(shape, kind, OPTIONS, one, CPU)
    speed.norm_off(shape, OPTIONS, one, operands, direction)
    benchmark(contenders.DIRECTIONS[direction](one, operands))
    moved = speed.MOVED[direction][0] * shape.elements * kind.itemsize
    seconds = benchmark.stats.stats.median
    benchmark.extra_info["CE"] = seconds / speed.copy_seconds(CPU, shape.elements, kind)
    benchmark.extra_info["GB/s"] = moved / seconds / 1e9
