"""Images of preset `tiny` from noise: `pytest benchmarks -k "sampling"`.

Ours (20 steps, both branches in a pass, bf16) beside the authors' way with the same network: 20 of
their 999 steps, in two passes each. On a CPU; ratios are better taken from `suite.py --part
sampling`, where the ways take turns.
"""

import pytest
import sampling_ways

from ddb_fast.presets import PRESETS


@pytest.mark.parametrize("way", sampling_ways.CPU_WAYS)
def bench_sampling(benchmark, way, batch=32):
    benchmark.group = f"tiny, {batch} images"
    tiny = PRESETS["tiny"]()
    calls, walks = sampling_ways.cpu_ways(tiny.diffusion, tiny.sampling, batch, steps=20)
    benchmark.pedantic(calls[way], rounds=3, warmup_rounds=1)
    # Their whole walk is extrapolated from the steps that were taken.
    benchmark.extra_info["images/s"] = batch / (benchmark.stats.stats.median * walks[way])
