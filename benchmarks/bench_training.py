"""Forward pass and training step of whole networks: `pytest benchmarks -k "training and ddb"`.

The authors' form (fp32, NCHW, explicit attention), plain torch with bf16, channels_last and SDPA,
the same compiled, and ours. On a CPU; ratios are better taken from `suite.py --part step`, where
the forms take turns.
"""

import networks
import pytest
import torch

CPU = torch.device("cpu")
FORMS = {form.name: form for form in networks.CPU_FORMS}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("what", ("forward", "step"))
def bench_training(benchmark, what, form, batch=4):
    benchmark.group = f"ddb {what}, batch {batch}"
    torch.compiler.reset()
    config = networks.preset("ddb")
    if what == "forward":
        call = networks.forward_pass(CPU, FORMS[form], config, batch)
    else:
        call = networks.training_step(CPU, FORMS[form], config, batch)[1]
    benchmark.pedantic(call, rounds=3, warmup_rounds=1)
    flops = (1 if what == "forward" else 3) * networks.forward_flops(config) * batch
    benchmark.extra_info["images/s"] = batch / benchmark.stats.stats.median
    benchmark.extra_info["GFLOP/s"] = flops / benchmark.stats.stats.median / 1e9
