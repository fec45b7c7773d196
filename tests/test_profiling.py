"""`run --profile`: shares of hand-made events, products counted by hand, a run left as it was."""

import hashlib
import json
import re
from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import small
from ddb_fast import classification, costs, generator, profiling
from ddb_fast.data.samplers import ShuffledSampler
from ddb_fast.kernels import attention, use_backend
from ddb_fast.train import main

Kernel = namedtuple("Kernel", "name duration")


def event(name, own=0.0, children=(), *, kernels=(), device="CPU", annotation=False):
    """A profiler's function event as far as it is looked at; `own` microseconds of its own."""
    total = own + sum(child.total for child in children)
    made = SimpleNamespace(
        name=name,
        self_cpu_time_total=own,
        total=total,
        cpu_children=list(children),
        cpu_parent=None,
        kernels=list(kernels),
        device_type=SimpleNamespace(name=device),
        is_user_annotation=annotation,
        time_range=SimpleNamespace(elapsed_us=lambda: total),
    )
    for child in children:
        child.cpu_parent = made
    return made


def flat(made):
    return [made, *(inner for child in made.cpu_children for inner in flat(child))]


def test_the_outermost_name_that_tells_has_the_time():
    data = event(costs.DATA, 2, [event("aten::mm", 3)])
    attention = event("aten::scaled_dot_product_attention", 1, [event("aten::bmm", 7)])
    backward = event(
        "autograd::engine::evaluate_function: ConvolutionBackward0", 1,
        [event("aten::convolution_backward", 20, [event("aten::empty", 1)])],
    )  # fmt: skip
    step = event("Optimizer.step#AdamW.step", 1, [event("aten::_fused_adamw_", 4)])
    alone = event("aten::cat", 5, [event("aten::addmm", 6)])
    window = event(costs.WINDOW, 10, [data, attention, backward, step, alone])
    found = costs.time_shares([*flat(window), event("aten::conv2d", 99)], cuda=False)
    assert list(found) == list(costs.CATEGORIES)
    assert found == {
        "data": 5 / 61, "attention": 8 / 61, "convolution": 22 / 61, "optimiser": 5 / 61,
        "other": 5 / 61, "matmul": 6 / 61, "idle": 10 / 61, "norm": 0,
    }  # fmt: skip


def test_on_cuda_the_kernels_have_the_time():
    """Those that an operator launched go to it, those that none did by their own names."""
    conv = event("aten::conv2d", 1, [event("aten::cudnn_convolution", 1,
                 kernels=[Kernel("sm90_xmma", 30)])])  # fmt: skip
    norm = event("_GroupNorm", 5, kernels=[Kernel("forward_fused", 8)])
    window = event(costs.WINDOW, 43, [conv, norm])
    device = [
        event("sm90_xmma", 30, device="CUDA"),
        event("forward_fused", 8, device="CUDA"),
        event("forward_fused", 4, device="CUDA"),  # launched where no operator was
        event("backward_keys", 3, device="CUDA"),
        event(costs.DATA, 40, device="CUDA", annotation=True),
    ]
    found = costs.time_shares([*flat(window), *device], cuda=True)
    assert found["convolution"] == 30 / 50
    assert found["norm"] == 12 / 50
    assert found["attention"] == 3 / 50
    assert found["idle"] == pytest.approx(5 / 50)
    assert sum(found.values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aten::normal_", None),
        ("aten::linalg_vector_norm", "optimiser"),
        ("aten::_foreach_lerp_", "optimiser"),
        ("ddb_fast_native::group_norm_backward", "norm"),
        ("NativeBatchNormBackward0", "norm"),
        ("_AttentionBackward", "attention"),
        ("ddb_fast_native::attention", "attention"),
        ("aten::conv_transpose2d", "convolution"),
        ("aten::linear", "matmul"),
        ("autograd::engine::evaluate_function: AddmmBackward0", "matmul"),
        ("forward_apply", "norm"),
        ("forward_tile", "attention"),
        ("aten::add", None),
    ],
)
def test_names(name, kind):
    assert costs.category(name) == kind


def test_attention_is_counted_on_a_cpu():
    q, k, v = (torch.randn(2, 3, 8, 4, requires_grad=True) for _ in range(3))
    counter = costs.flop_counter()
    with use_backend(attention="torch"), counter:
        attention(q, k, v).sum().backward()
    # Two products forward, and five backward: one of them is computed again.
    assert costs.counted(counter) == {"attention": 7 * 2 * (2 * 3 * 8 * 8 * 4)}


def test_a_counter_works_in_inference_mode_with_parameters_as_arguments():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.weight = Inner(), nn.Parameter(torch.randn(5, 4))

        def forward(self, x):
            return self.inner(x, self.weight)

    class Inner(nn.Module):
        def forward(self, x, weight):
            return nn.functional.linear(x, weight)

    counter = costs.flop_counter()
    with torch.inference_mode(), counter:
        Outer()(torch.randn(3, 4))
    assert costs.counted(counter) == {"matmul": 2 * 3 * 4 * 5}


# Channels in and out, side of the filter and of the output, of the short run's generator.
HEAD = (3, 16, 3, 16)
UNET = [
    (16, 16, 3, 16), (16, 16, 3, 16),  # down, 16 pixels
    (16, 16, 3, 8), (16, 32, 3, 8), (32, 32, 3, 8), (16, 32, 1, 8),  # down, 8 pixels
    *[(32, 32, 3, 8)] * 4,  # middle
    (64, 32, 3, 8), (32, 32, 3, 8), (64, 32, 1, 8),  # up, 8 pixels
    (48, 32, 3, 8), (32, 32, 3, 8), (48, 32, 1, 8), (32, 32, 3, 16),
    (48, 16, 3, 16), (16, 16, 3, 16), (48, 16, 1, 16),  # up, 16 pixels
    (32, 16, 3, 16), (16, 16, 3, 16), (32, 16, 1, 16), (16, 3, 3, 16),
]  # fmt: skip
CNN = [(8, 16, 3, 8), (16, 16, 3, 4), (16, 16, 3, 2)]


def products(layers):
    return sum(2 * a * b * k * k * side * side for a, b, k, side in layers)


def cells(text):
    """Cells of the tables by (stage, heading)."""
    found = {}
    for part in re.split(r"\n\n", text):
        lines = [[c.strip() for c in line.strip("|").split("|")] for line in part.splitlines()]
        if part.startswith("|"):
            for row in lines[2:]:
                found |= {(row[0], name): value for name, value in zip(lines[0], row, strict=True)}
    return found


def digest(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and "profile" not in path.parts and path.name != "log.jsonl"
    }


def test_a_profiled_run(tmp_path, capsys):
    short = {f"{part}__images": "128" for part in ("diffusion", "amplifier", "classifier")}
    words = small.arguments(
        tmp_path / "run", **short, methods="ddb-ii", seeds="0", sampling__per_class="2",
        audit="false",
    )  # fmt: skip
    assert main(words, prog="run") == 0
    before = digest(tmp_path / "run")
    capsys.readouterr()
    assert main([*words, "--profile"], prog="run") == 0

    text = (tmp_path / "run" / "profile" / "table.md").read_text()
    assert text in capsys.readouterr().out
    found = cells(text)
    stages = ("diffusion training", "sampling", "classifier (cnn)")
    for stage in stages:
        shares = [float(found[stage, kind].removesuffix(" %")) for kind in costs.CATEGORIES]
        # Eight rounded to a tenth.
        assert sum(shares) == pytest.approx(100, abs=0.4)
        assert float(found[stage, "convolution"].removesuffix(" %")) > 0
        total = sum(float(found[stage, f"{kind}, GFLOP"]) for kind in costs.COUNTED)
        rate = total / float(found[stage, "ms"]) * 1e3
        assert float(found[stage, "GFLOP/s"]) == pytest.approx(rate, rel=2e-3)
    for stage in (stages[0], stages[2]):
        for kind in ("optimiser", "data"):
            assert float(found[stage, kind].removesuffix(" %")) > 0
    # Nothing needs the gradient of the images, so the first layer has two products, not three.
    counts = {
        stages[0]: 64 * (3 * products(UNET) + 2 * products([HEAD])),
        stages[1]: 2 * 16 * products([HEAD, *UNET]),
        stages[2]: 64 * (3 * products(CNN) + 2 * products([(3, 8, 3, 16)])),
    }
    for stage, flops in counts.items():
        assert found[stage, "convolution, GFLOP"] == f"{flops / 1e9:.6g}"

    trace = json.loads((tmp_path / "run" / "profile" / "trace.json").read_text())
    windows = [e for e in trace["traceEvents"] if e.get("name") == costs.WINDOW]
    assert len([e for e in windows if e["cat"] == "user_annotation"]) == len(stages)
    steps = [e for e in trace["traceEvents"] if e.get("name") == "Optimizer.step#AdamW.step"]
    assert len(steps) == 2 * profiling.RECORDED

    after = digest(tmp_path / "run")
    changed = {name for name in {*before, *after} if before.get(name) != after.get(name)}
    assert changed <= {"manifest.json", "results.json", "report.html", ".lock"}
    assert generator.gather is classification.gather
    assert generator.gather.__module__ == "ddb_fast.data.store"
    assert generator.ShuffledSampler is ShuffledSampler


def test_a_stage_with_too_few_steps_is_refused():
    main_process = SimpleNamespace(is_main_process=True)
    context = SimpleNamespace(device=torch.device("cpu"), accelerator=main_process)
    with pytest.raises(ValueError, match="sampling: fewer than 7 steps"):
        profiling.profile_stage("sampling", context, lambda watch, folder: watch.begin())
