"""The benchmark suite: rows that survive, contenders that must be right, tables worked by hand."""

import fcntl
import json
import math
import sys
import threading
from dataclasses import replace
from functools import partial

import aligned
import closeness
import contenders
import correctness
import measure
import merge
import networks
import peak_memory
import pytest
import rows
import sampling_ways
import scaling
import shapes
import speed
import suite
import swapped
import torch
import tune
from accelerate.state import AcceleratorState
from torch._inductor.runtime.benchmarking import benchmarker

import authors_form
from ddb_fast.config import SamplingConfig
from ddb_fast.diffusion.guidance import guided
from ddb_fast.diffusion.samplers import sample_ddpm_authors
from ddb_fast.diffusion.schedule import Schedule
from ddb_fast.kernels import backends, tuned

CPU = torch.device("cpu")
HERE = {
    "device": "A Chip (TM) 2", "type": "cpu", "torch": "2", "cuda": None, "triton": "3",
    "python": "3.12",
}  # fmt: skip
SHAPE = shapes.GroupNorm(2, 16, 4, 4, 4)
HEADS = shapes.Attention(2, 2, 16, 16)


def keep(path, measured_on=HERE):
    return rows.Rows(path / "kernels.jsonl", measured_on)


def measured(path, items, seconds=60.0):
    kept = keep(path)
    left = rows.measure_all(kept, items, seconds=seconds, device=CPU)
    return kept, left


def test_a_row_is_on_the_disk_when_the_next_is_measured(tmp_path):
    def second():
        on_disk = rows.read(tmp_path / "kernels.jsonl")[1]
        return {"seen": list(on_disk)}

    kept, left = measured(tmp_path, [("a", lambda: {"us": 1.0}), ("b", second)])
    assert kept.rows["b"]["seen"] == ["a"]
    assert left == []


def test_a_repeated_call_continues_behind_a_torn_line(tmp_path):
    measured(tmp_path, [("a", lambda: {"us": 1.0})])
    path = tmp_path / "kernels.jsonl"
    path.write_text(path.read_text() + '{"key": "b", "us"')
    called = []
    items = [(key, lambda key=key: called.append(key) or {"us": 2.0}) for key in "abc"]
    kept, left = measured(tmp_path, items)
    assert called == ["b", "c"]
    assert (list(kept.rows), left) == (["a", "b", "c"], [])
    assert list(rows.read(path)[1]) == ["a", "b", "c"]


def test_rows_of_another_device_are_refused(tmp_path):
    keep(tmp_path)
    with pytest.raises(ValueError, match=r"device 'A Chip \(TM\) 2', here 'B'\); choose another"):
        keep(tmp_path, {**HERE, "device": "B"})
    (tmp_path / "other.jsonl").write_text('{"key": "a"}\n')
    with pytest.raises(ValueError, match="does not say what was measured on"):
        rows.read(tmp_path / "other.jsonl")


def endless():
    while True:
        pass


def test_what_is_not_done_in_time_is_left_or_given_up(tmp_path):
    """Left for the next call, but given up if it had a call's whole time."""
    items = [("fast", dict), ("endless", endless), ("last", dict)]
    kept, left = measured(tmp_path, items, seconds=0.3)
    assert (list(kept.rows), left) == (["fast"], ["endless", "last"])
    kept, left = measured(tmp_path, items, seconds=0.3)
    assert kept.rows["endless"]["error"] == "TimeoutError: not done after 0 s"
    assert left == ["last"]
    assert measured(tmp_path, items)[1] == []


def test_a_wrapped_timeout_is_no_failure(tmp_path):
    def wrapped():
        try:
            endless()
        except TimeoutError as error:
            raise RuntimeError("the compiler failed") from error

    kept, left = measured(tmp_path, [("fast", dict), ("wrapped", wrapped)], seconds=0.3)
    assert (list(kept.rows), left) == (["fast"], ["wrapped"])


def test_a_failure_is_a_row(tmp_path):
    def fail():
        raise RuntimeError("out of\n   memory")

    kept, _ = measured(tmp_path, [("a", fail), ("b", dict)])
    assert kept.rows["a"]["error"] == "RuntimeError: out of memory"
    assert "b" in kept


def norm_off(run, options=("silu",), direction="both"):
    contender = contenders.Contender("other", run)
    operands = contenders.norm_operands(SHAPE, torch.float32, options, contender, CPU)
    return speed.norm_off(SHAPE, options, contender, operands, direction)


def test_a_wrong_contender_is_not_timed():
    """Among the wrong ones: right output with a wrong gradient, NaN, and too little dropout."""
    right = contenders.ours("torch", SHAPE.g, ("silu",))
    assert norm_off(right) < 1e-6
    with pytest.raises(closeness.NotClose, match="other: y is off by"):
        norm_off(contenders.ours("torch", SHAPE.g, ()))
    with pytest.raises(closeness.NotClose, match="y is off by nan"):
        norm_off(lambda operands: right(operands) * float("nan"))

    def wrong_gradient(operands):
        return right({**operands, "x": torch.lerp(operands["x"].detach(), operands["x"], 0.5)})

    norm_off(wrong_gradient, direction="forward")
    with pytest.raises(closeness.NotClose, match="d_x is off by"):
        norm_off(wrong_gradient)
    dropping = ("silu", "dropout")
    with pytest.raises(closeness.NotClose, match=r"keeps 1\.000, dropout 0\.15"):
        norm_off(
            lambda operands: right({k: x for k, x in operands.items() if k != "seed"}), dropping
        )


def test_a_wrong_attention_is_not_timed():
    operands = contenders.attention_operands(HEADS, torch.float32, CPU)
    assert speed.attention_off(contenders.our_attention("torch"), operands, "both") < 1e-5
    swapped = contenders.Contender("swapped", lambda given: contenders.our_attention("torch").run(
        {**given, "q": given["k"], "k": given["q"]}))  # fmt: skip
    with pytest.raises(closeness.NotClose, match="swapped: y is off by"):
        speed.attention_off(swapped, operands, "forward")


def test_the_fastest_wins_unless_it_is_noise():
    pair = ("triton", "torch")
    assert tune.best([{"triton": 102.0, "torch": 100.0}], pair) == "triton"
    assert tune.best([{"triton": 104.0, "torch": 100.0}], pair) == "torch"
    # Geometric means: 2 and 8 give 4, less than 5; and 20 times 0.2 is no more than 4.
    assert (
        tune.best([{"triton": 5.0, "torch": 2.0}, {"triton": 5.0, "torch": 8.0}], pair) == "torch"
    )
    assert tune.best([{"a": 20.0, "b": 2.0}, {"a": 0.2, "b": 2.0}], ("a", "b")) == "a"
    # What is missing for one shape takes no part.
    assert tune.best([{"triton": 5.0, "torch": 2.0}, {"triton": 5.0}], pair) == "triton"
    assert tune.best([{"torch": 5.0}, {"triton": 5.0}], pair) is None
    assert tune.best([], pair) is None


def tuned_row(shape, direction, backend, us, **configuration):
    asked = [["group_norm", f"key {direction}"]] if backend == "triton" else []
    return {
        "op": "group_norm", "shape": shape, "class": f"nhwc/bf16/{direction}/20", "dtype": "bf16",
        "backend": backend, "asked": asked, "configuration": configuration, "us": us,
    }  # fmt: skip


def test_the_table_of_a_gpu(tmp_path, monkeypatch):
    """A configuration must win over all shapes; a backward class counts its forward pass."""
    table = tune.from_gpu(
        [
            tuned_row("a", "forward", "torch", 10.0),
            tuned_row("a", "forward", "triton", 20.0),
            tuned_row("a", "forward", "triton", 12.0, num_warps=8),
            tuned_row("b", "forward", "torch", 10.0),
            tuned_row("b", "forward", "triton", 20.0),
            tuned_row("b", "forward", "triton", 13.0, num_warps=8),
            tuned_row("b", "forward", "triton", 1.0, num_warps=16),
            tuned_row("a", "backward", "torch", 30.0),
            tuned_row("a", "backward", "triton", 29.0),
            tuned_row("b", "backward", "torch", 30.0),
            tuned_row("b", "backward", "triton", 29.0),
            tuned_row("b", "backward", "triton", 27.5, num_warps=4),
            {"key": "a failure", "error": "out of memory"},
        ]
    )
    # 27.5 is no more than noise. Forward 12 and 13 lose to 10. Backward 29 wins against 30, but not
    # with them: 41 and 42 to 40.
    assert table == (
        {"group_norm": {"nhwc/bf16/forward/20": "torch", "nhwc/bf16/backward/20": "torch"}},
        {"group_norm": {"key forward": {"num_warps": 8}}},
    )
    monkeypatch.setattr(tuned, "architecture", lambda device: "cpu-avx2")
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    tuned.measured.cache_clear()
    tune.write(HERE, "a command", table, tmp_path)
    assert tuned.winner("group_norm", CPU, "nhwc/bf16/forward/20") == "torch"
    assert tuned.configuration("group_norm", CPU, "key forward") == {"num_warps": 8}
    assert tuned.describe(CPU) == "cpu-avx2: measured on A Chip (TM) 2"
    tuned.measured.cache_clear()


def test_what_was_not_reached_does_not_decide_and_what_failed_does():
    """Of shape b the time allowed torch only; Triton fails at c, which is alone in its class."""
    failed = tuned_row("c", "forward", "triton", 0.0)
    del failed["us"]
    rows = [
        tuned_row("a", "forward", "torch", 10.0),
        tuned_row("a", "forward", "triton", 5.0),
        tuned_row("b", "forward", "torch", 10.0),
        {**tuned_row("c", "forward", "torch", 10.0), "class": "nhwc/bf16/forward/21"},
        {**failed, "class": "nhwc/bf16/forward/21", "error": "OutOfResources"},
    ]
    winners, configurations = tune.from_gpu(rows)
    names = {"nhwc/bf16/forward/20": "triton", "nhwc/bf16/forward/21": "torch"}
    assert winners == {"group_norm": names}
    assert configurations == {}
    assert tune.best([{"triton": math.inf}], ("triton",)) is None


def test_two_kernels_of_a_call_are_tuned_one_by_one():
    """What each saves is added up; what spills in 16 bits is not taken, however fast."""
    queries, keys = ["attention_backward_queries", "k"], ["attention_backward_keys", "k"]
    about = {"op": "attention", "shape": "a", "class": "bf16/backward/S256/D64", "dtype": "bf16"}
    default = {**about, "backend": "triton", "asked": [queries, keys], "configuration": {}}
    rows = [
        {**about, "backend": "torch", "asked": [], "configuration": {}, "us": 97.0},
        {**default, "us": 100.0, "spills": 0},
        {**default, "asked": [queries], "configuration": {"block_m": 64}, "us": 93.0, "spills": 0},
        {**default, "asked": [keys], "configuration": {"block_n": 64}, "us": 91.0, "spills": 0},
        {**default, "asked": [keys], "configuration": {"block_n": 128}, "us": 80.0, "spills": 2},
    ]
    # A call that is differentiated is a forward pass too: of torch 1, of Triton 5.
    for backend, us in (("torch", 1.0), ("triton", 5.0)):
        forward = {**about, "class": "bf16/forward/S256/D64", "asked": [], "configuration": {}}
        rows.append({**forward, "backend": backend, "us": us})
    winners, configurations = tune.from_gpu(rows)
    assert configurations == {
        "attention_backward_queries": {"k": {"block_m": 64}},
        "attention_backward_keys": {"k": {"block_n": 64}},
    }
    # 100 - 7 - 9 + 5 against 97 + 1, which either alone would not beat.
    names = {"bf16/backward/S256/D64": "triton", "bf16/forward/S256/D64": "torch"}
    assert winners == {"attention": names}


def test_a_failing_measurement_says_what_it_was_of():
    def fail(row):
        raise RuntimeError("no\n memory")

    row = tune._row(tuned_row("a", "forward", "torch", 0.0), fail)
    assert row["error"] == "RuntimeError: no memory"
    assert row["class"] == "nhwc/bf16/forward/20"


def test_the_table_of_a_cpu():
    names = {"nhwc": "nhwc/fp32/forward/20", "nchw": "nchw/fp32/forward/20"}
    us = {"native/nhwc": 5.0, "torch/nhwc": 9.0, "native/nchw": 7.0, "torch/nchw": 6.0}
    winners, configurations = tune.from_cpu([{"classes": names, "us": {**us, "compile/nchw": 1.0}}])
    assert winners == {"group_norm": {names["nhwc"]: "native", names["nchw"]: "torch"}}
    assert configurations == {}


def test_merge_writes_tables(tmp_path):
    kept = keep(tmp_path)
    about = {"op": "group_norm", "dtype": "bf16", "options": "silu", "shape": "2x16x4x4/4"}
    for name, us in (("triton/nhwc", 10.0), ("triton/nchw", 16.0), ("eager/nhwc", 40.0),
                     ("compile/nhwc", 25.0)):  # fmt: skip
        extra = {"CE": us / 8, "GB/s": 1000 / us}
        kept.add(name, {**about, "direction": "forward", "contender": name, "us": us, **extra})
    kept.add("host", {"host": "group_norm", "contender": "triton", "direction": "both", "us": 18.4})
    kept.add("liger", {"absent": "group_norm: liger", "why": "not | installed"})
    kept.add("lost", {"error": "out of memory"})
    (path,) = merge.merge(tmp_path, "suite.py --merge", tmp_path / "results")
    assert path == tmp_path / "results" / "a-chip-tm-2" / "kernels.md"
    text = path.read_text()
    assert "A Chip (TM) 2; torch 2, triton 3, cuda None, python 3.12." in text
    # 10 us are 1.25 copies of 8 us; 25 us, the best of the others, are 2.5 times as much.
    assert "| 2x16x4x4/4 | 10 | 16 | 40 | 25 | 1.25 | 100 | - | 2.5 |" in text
    assert "| group_norm | triton | both | 18.4 |" in text
    assert "| group_norm: liger | not \\| installed |" in text
    assert "| lost | out of memory |" in text
    with pytest.raises(ValueError, match="no rows"):
        merge.merge(tmp_path / "results", "", tmp_path)


def test_merge_of_networks_and_cpu():
    step = {"ms": 10.0, "images/s": 3200.0, "share of matmul": 0.5}
    slow = {"ms": 60.0, "images/s": 533.333, "peak GB": 9.0}
    text = merge.page(HERE, "step", [{"form": "ours", "batch": 32, **step},
                                     {"form": "authors", "batch": 32, **slow}], "")  # fmt: skip
    assert "| form | batch | ms | images/s | share of matmul | peak GB | ours is faster |" in text
    assert "| authors | 32 | 60 | 533 | - | 9 | 6 |" in text
    us = {"native/nhwc": 4000.0, "native/nchw": 1000.0, "torch/nhwc": 9000.0, "torch/nchw": 6000.0}
    row = {"op": "group_norm", "shape": "s", "dtype": "fp32", "direction": "both", "us": us}
    text = merge.page(HERE, "cpu", [row], "")
    assert "| s | 4 | 1 | 9 | 6 | 2.25 | 1.5 |" in text
    assert "eager / native: median 2.25, least 2.25." in text
    assert "best / native: median 1.50, least 1.50." in text


def test_merge_of_correctness_and_tune():
    good = {"key": "group_norm triton bf16 channels_last 1x2", "ok": True, "output": 1e-3,
            "output bound": 3e-3, "gradient": 1e-3, "gradient bound": 4e-3}  # fmt: skip
    bad = {**good, "key": "group_norm triton bf16 channels_last 3x4", "ok": False, "gradient": 1.0}
    text = merge.page(HERE, "correctness", [good, bad, {"key": "twice", "ok": True, "n": 3}], "")
    assert "2 ok, 1 FAILED" in text
    assert "| group_norm triton bf16 channels_last | 1.0e-03 | 3.0e-03 | 1.0e+00 |" in text
    assert "| group_norm triton bf16 channels_last 3x4 | False |" in text
    assert "| twice | True | n 3 |" in text
    found = [{**tuned_row("a", "forward", "torch", 10.0), "dtype": "bf16", "direction": "forward"},
             {**tuned_row("a", "forward", "triton", 20.0), "dtype": "bf16", "direction": "forward"},
             {**tuned_row("a", "forward", "triton", 12.0, num_warps=8), "dtype": "bf16",
              "direction": "forward"}]  # fmt: skip
    text = merge.page(HERE, "tune", found, "")
    assert "| nhwc/bf16/forward/20 | 10 | 20 | 12 | num_warps=8 |" in text


@pytest.fixture
def quick(monkeypatch):
    """One round instead of a measurement."""
    monkeypatch.setattr(
        speed.measure, "interleaved", partial(speed.measure.interleaved, rounds=2, shortest=0)
    )
    monkeypatch.setattr(
        speed.measure, "host_cost", partial(speed.measure.host_cost, calls=1, rounds=2)
    )


def run(items, *keys):
    """Run the items that have one of the keys, all of which must exist; returns their rows."""
    found = dict(items)
    return [found[key]() for key in keys]


def test_the_part_kernels_runs(quick):
    eager = f"group_norm {SHAPE} bf16 silu+pre_bias+dropout both eager/nchw"
    ours = f"group_norm {SHAPE} bf16 silu+pre_bias+dropout both triton/nhwc"
    items = speed.norm_items(CPU, "bf16", "silu+pre_bias+dropout", [("t", SHAPE)])
    for row in run(items, eager, ours):
        # x, dy, s read and y, dx written.
        assert row["GB/s"] == pytest.approx(5 * 512 * 2 / (row["us"] * 1e3))
        assert row["off"] < 1e-2
    (row,) = run(
        speed.attention_items(CPU, "bf16", [("t", HEADS)]), f"attention {HEADS} bf16 both sdpa"
    )
    # 4 products' FLOPs times 16 tokens and 1024 elements, and 2.5 times that backward.
    assert row["TFLOP/s"] == pytest.approx(3.5 * 4 * 16 * 1024 / (row["us"] * 1e6))
    assert row["GB/s"] == pytest.approx(11 * 1024 * 2 / (row["us"] * 1e3))
    assert run(speed.host_items(CPU), "host group_norm both torch/nhwc")[0]["us"] > 0


def test_the_part_tune_tries_every_different_plan(quick):
    """In the interpreter; a configuration that changes nothing is measured once."""
    large = shapes.GroupNorm(1, 64, 12, 12, 2)
    pairs = [("t", SHAPE), ("t", large)]
    items = dict(tune.norm_items(CPU, ("bf16",), pairs, ("nhwc",)))
    head = f"group_norm {SHAPE} bf16 nhwc forward"
    # 16 pixels of 16 channels are one tile whatever is asked.
    assert [k for k in items if head in k] == [f"{head} torch {{}}", f"{head} triton {{}}"]
    torchs, triton = run(items, f"{head} torch {{}}", f"{head} triton {{}}")
    assert torchs["asked"] == []
    assert triton["asked"] == [("group_norm", "nhwc/bf16/forward/9/4")]
    # So few programs are split in any case, with four warps and one tile at a time.
    head = f"group_norm {large} bf16 nhwc forward triton"
    found = [json.loads(k.removeprefix(head)) for k in items if head in k]
    assert found[0] == {} and {x for c in found for x in c} == {"split", "num_warps", "unroll"}
    (forced,) = run(items, f"{head} {json.dumps(found[1])}")
    assert forced["configuration"]["split"] == 1
    assert forced["us"] > 0
    assert tuned.configuration.__module__ == "ddb_fast.kernels.tuned"


def test_the_part_correctness_runs():
    items = correctness.case_items(CPU, [(1, 6, 3, 2, 2)], [(1, 1, 5, 16, 5)])
    norm, heads = run(
        items,
        "group_norm torch bf16 channels_last 1x6x3x2x2",
        "attention torch fp32 packed 1x1x5x16x5",
    )
    assert norm["ok"] and heads["ok"]
    assert 1e-4 < norm["output"] <= norm["output bound"]
    assert heads["gradient"] <= 6e-6


@pytest.mark.parametrize("backend", ("triton", "native"))
@pytest.mark.parametrize("dtype", ("fp32", "bf16", "fp16"))
def test_silus_derivative(backend, dtype):
    if backends()["group_norm"][backend]:
        pytest.skip(f"{backend} is not available here")
    row = correctness._derivative(CPU, backend, dtype)
    assert row["ok"] and row["off"] > 0


def small_generator():
    """The `ddb` generator, cut down to milliseconds; both networks can have its shape."""
    config = networks.preset()
    unet = replace(config.unet, channels=32, channel_multipliers=(1, 2), blocks_per_level=1,
                   attention_levels=(0, 1))  # fmt: skip
    return replace(config, image_size=8, unet=unet)


def test_the_parts_of_networks_run():
    # 222 GFLOP for a training step of an image, as the roofline has it.
    assert 3 * networks.forward_flops(networks.preset()) == pytest.approx(222e9, rel=1e-3)
    small = small_generator()
    for name in ("ours", "authors", "eager bf16, channels_last, SDPA"):
        (row,) = run(networks.step_items(CPU, small, (2,), 64), f"step {name} 2")
        assert row["images/s"] == pytest.approx(2 / (row["ms"] / 1e3))
    sampled = run(
        sampling_ways.sampling_items(CPU, small, 2, 3), "sampling ours 2", "sampling authors 2"
    )
    assert "999 steps" in sampled[1]["sampler"] and "extrapolated" in sampled[1]["sampler"]


def uncompiled(form):
    return replace(form, compiled=None)


def test_forms_take_turns_on_a_cpu(monkeypatch):
    monkeypatch.setattr(networks, "CPU_FORMS", tuple(map(uncompiled, networks.CPU_FORMS)))
    monkeypatch.setattr(networks, "bf16_ceiling", lambda device, size: 1e9)
    small = small_generator()
    forward, step = run(networks.cpu_step_items(small, 2, 2), "forward 2", "training step 2")
    for row in (forward, step):
        assert list(row["seconds"]) == [form.name for form in networks.CPU_FORMS]
        for name, seconds in row["seconds"].items():
            assert row["spread"][name][0] <= seconds <= row["spread"][name][1]
            assert row["core seconds"][name] > 0
    assert forward["GFLOP"] == pytest.approx(2 * networks.forward_flops(small) / 1e9)
    assert step["GFLOP"] == 3 * forward["GFLOP"]


def test_a_thousand_images_are_extrapolated_as_said(monkeypatch):
    """Eight batches of 128; of the authors' 999 steps three were timed."""
    sampling = SamplingConfig(steps=2)
    called = []

    def interleaved(calls, *, rounds):
        for name, call in calls.items():
            called.extend([name] * 3)
            for _ in range(3):
                call()
        return {name: networks.Timing(2.0, 1.0, 4.0, "timed") for name in calls}

    way = uncompiled(sampling_ways.COMPILED_WAY)
    monkeypatch.setattr(sampling_ways, "COMPILED_WAY", way)
    monkeypatch.setattr(networks.measure, "interleaved", interleaved)
    tiny = replace(small_generator(), target="v", schedule="cosine")
    (row,) = run(
        sampling_ways.cpu_sampling_items(tiny, replace(sampling, batch_size=128), 3),
        "sampling 1000 images 8 pixels",
    )
    assert called == [name for name in sampling_ways.CPU_WAYS for _ in range(3)]
    assert row["seconds"]["ours"] == row["seconds"]["ours, fp32"] == 16
    assert row["seconds"]["authors"] == pytest.approx(2 * 8 * 333)
    assert row["spread"]["authors"] == pytest.approx([8 * 333, 4 * 8 * 333])


def test_the_authors_loop_is_their_sampler():
    """Against the library's, which is written from equations; and cut after some steps."""
    schedule, y = Schedule.linear(12, 1e-4, 0.05), torch.tensor([0, 1])
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(3, 3, 3, padding=1).double()

    def predict(x, t, y):
        return layer(x) * (1 + 0.1 * t + y).view(-1, 1, 1, 1)

    def noises():
        generator = torch.Generator().manual_seed(1)
        return lambda: torch.randn(2, 3, 4, 4, generator=generator, dtype=torch.float64)

    x = noises()()
    denoise = guided(predict, y, guidance_scale=2.0, null_class=5, target="eps", schedule=schedule)
    with torch.no_grad():
        expected = sample_ddpm_authors(denoise, x, schedule=schedule, noise=noises())
    found = authors_form.ancestral_steps(
        predict, x, y, null_class=5, alpha_bar=schedule.alpha_bar, noise=noises()
    )
    torch.testing.assert_close(found, expected)
    called = []
    authors_form.ancestral_steps(
        lambda x, t, y: called.append((t[0].item(), y.tolist())) or x,
        x, y, null_class=5, alpha_bar=schedule.alpha_bar, steps=2,
    )  # fmt: skip
    assert called == [(t, labels) for t in (11, 10) for labels in ([0, 1], [5, 5])]


def test_the_forms_compute_the_same():
    """Explicit and fused attention."""
    config = small_generator()
    explicit, fused = (
        networks.build(f, config, CPU).eval() for f in (networks.FORMS[1], networks.FORMS[3])
    )
    x, t, y = torch.randn(2, 3, 8, 8), torch.tensor([3, 900]), torch.tensor([0, 1])
    with torch.no_grad():
        torch.testing.assert_close(fused(x, t, y), explicit(x, t, y), rtol=1e-4, atol=1e-5)


linux = pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's record of a process")


def test_a_row_of_a_process_of_its_own(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import sys; print('a note'); print('{\"n\": ' + sys.argv[1] + '}')")
    assert rows.in_own_process(str(script), 7) == {"n": 7}
    with pytest.raises(RuntimeError, match="IndexError"):
        rows.in_own_process(str(script))


@linux
def test_the_peak_of_a_call_is_what_it_needs_for_its_time():
    kept = []

    def call():
        kept.append(torch.ones(10, 2**20))  # 42 MB stay
        torch.ones(25, 2**20).sum()  # 105 MB do not

    peak, before = peak_memory.peak_of(call)
    assert peak == pytest.approx(4 * 35 * 2**20, rel=0.05)
    assert before > 50e6
    # What is resident before does not count.
    again, later = peak_memory.peak_of(lambda: torch.ones(25, 2**20).sum())
    assert again == pytest.approx(4 * 25 * 2**20, rel=0.05)
    assert later - before == pytest.approx(4 * 10 * 2**20, rel=0.2)


@linux
def test_the_peak_of_a_step():
    row = peak_memory.peak_of_step(networks.FORMS[1], small_generator(), 2)
    assert (row["form"], row["batch"]) == ("authors", 2)
    assert row["peak MB"] >= 0
    assert row["kept MB"] > 50
    assert [key for key, _ in peak_memory.items()] == [
        f"memory {form.name} 4" for form in networks.CPU_FORMS
    ]


@linux
def test_scaling_measures_every_method(tmp_path, monkeypatch):
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        row = scaling.measure(60, 4, steps=1)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert list(row["images/s"]) == ["generator", *scaling.METHODS]
    assert min(row["images/s"].values()) > 0
    assert list(row["lookups us"]) == list(scaling.METHODS)
    assert row["anonymous MB"] > 50
    assert [key for key, _ in scaling.items()][:3] == [
        "scaling 1000 8", "scaling 10000 8", "scaling 100000 8",
    ]  # fmt: skip
    first, second = (scaling.mapped_images(tmp_path, n) for n in (3, 3))
    assert first.shape == (3, 64, 64, 3) and torch.equal(first, second)


def test_the_difference_of_two_shares():
    # Newcombe 1998, table II, case (a), method 10.
    found = aligned.difference_interval(56, 70, 48, 80)
    assert found == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)
    rows = [{"way": "ours", "images": 50, "aligned": 50, "seconds": 5.0},
            {"way": "ours", "images": 20, "aligned": 6, "seconds": 2.0},
            {"way": "authors", "images": 80, "aligned": 48, "seconds": 8.0}]  # fmt: skip
    text = aligned.summary(rows, SamplingConfig(steps=7))
    assert "56 of 70 aligned" in text and "7 steps" in text and "0.1000 s an image" in text
    assert text.endswith(
        "ours - authors: +20.0 points, 95 % interval +5.2 to +33.4: does NOT hold 0"
    )


def test_the_suite_takes_the_cpu_where_there_is_no_gpu():
    keys = [key for key, _ in suite.items("step", CPU)]
    assert keys[:2] == ["forward 4", "training step 4"]
    assert keys[2] == "memory ours 4"
    assert [k for k, _ in suite.items("sampling", CPU)] == ["sampling 1000 images 32 pixels"]


def test_merge_of_forms_in_turns():
    turns = {"key": "forward 4", "what": "forward, batch 4", "how": "7 rounds", "took": 3.0,
             "seconds": {"ours": 0.5, "authors": 1.5}, "core seconds": {"ours": 1, "authors": 4.5},
             "spread": {"ours": [0.25, 0.75], "authors": [1.0, 2.0]}}  # fmt: skip
    memory = [{"key": n, "form": n, "batch": 4, "peak MB": mb, "kept MB": 900.0}
              for n, mb in (("ours", 1000.0), ("authors", 2500.0))]  # fmt: skip
    text = merge.page(HERE, "step", [turns, *memory], "")
    assert "## forward, batch 4" in text
    assert "| authors | 1.5 | 1 to 2 | 3 | 4.5 | 4.5 |" in text
    assert "| authors | 4 | 2500 | 900 | 2.5 |" in text
    row = {"key": "s", "images": 1000, "batch": 8, "images/s": {"erm": 7.0},
           "lookups us": {"erm": 40.0}, "anonymous MB": 400.0,
           "grown MB": {"erm": 0.25, "lff": 0.5}}  # fmt: skip
    text = merge.page(HERE, "scaling", [row], "")
    assert "| 8 | 1000 | 7 |" in text and "| 8 | 1000 | 40 |" in text
    assert "| 8 | 1000 | 400 | 0.5 |" in text


def test_misuse_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert suite.main(["--part", "kernels", "--out", str(tmp_path)]) == 2
    assert suite.main(["--merge", str(tmp_path)]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "suite.py: part kernels needs a GPU, and torch finds none",
        f"suite.py: {tmp_path}: no rows of the suite in it",
    ]


def test_the_part_cpu_writes_rows_and_winners(tmp_path, monkeypatch, quick):
    pytest.importorskip("triton")
    if contenders.backends()["group_norm"]["native"]:
        pytest.skip("the C++ operators were not built")
    heads = shapes.Attention(2, 1, 8, 16)
    monkeypatch.setattr(
        suite, "items", lambda *_: speed.cpu([("t", SHAPE)], [("t", heads)], samples=(2, 2))
    )
    monkeypatch.setattr(tuned, "FOLDER", tmp_path / "tuned")
    plain = contenders.norm_contenders

    def uncompiled(*arguments):
        found, missing = plain(*arguments)
        return [c for c in found if not c.name.startswith("compile")], missing

    monkeypatch.setattr(contenders, "norm_contenders", uncompiled)
    assert suite.main(["--part", "cpu", "--out", str(tmp_path / "rows")]) == 0
    (path,) = (tmp_path / "tuned").iterdir()
    winners = json.loads(path.read_text())["winners"]["group_norm"]
    assert len(winners) == 8
    assert set(winners.values()) <= {"native", "torch"}
    (page,) = merge.merge(tmp_path / "rows", "", tmp_path / "results")
    text = page.read_text()
    assert text.count(f"| {SHAPE} |") == text.count(f"| {heads} |") == 4
    assert "| torch / native | automatic | GFLOP/s |" in text


def test_shares_of_a_part_make_it_up(tmp_path, monkeypatch, capsys):
    """Every item in one share, files of their own, one page; the part itself goes on from there."""
    with pytest.raises(ValueError, match="part scaling has no shares, only correctness, kernels,"):
        suite.run("scaling", tmp_path, 9.0, (1, 3))
    monkeypatch.setattr(suite, "SHARED", ("scaling",))
    monkeypatch.setattr(
        suite, "items", lambda *_: ((f"case {i}", partial(dict, ok=True, n=i)) for i in range(7))
    )
    for share in ("1/3", "2/3", "3/3"):
        words = ["--part", "scaling", "--out", str(tmp_path), "--share", share]
        assert suite.main(words) == 0
    sizes = [len(rows.read(tmp_path / f"scaling-{i}-of-3.jsonl")[1]) for i in (1, 2, 3)]
    assert sizes == [3, 2, 2]
    monkeypatch.setitem(merge._TABLES, "scaling", lambda found: str(sorted(r["n"] for r in found)))
    (path,) = merge.merge(tmp_path, "", tmp_path / "results")
    assert path.read_text().endswith("[0, 1, 2, 3, 4, 5, 6]")
    again = [(f"{name} 7", partial(dict, ok=True, n=7)) for name in ("case", "host")]
    monkeypatch.setattr(suite, "items", lambda *_: iter(again))
    failed = {"key": "case 7", "error": "ValueError: no"}
    with (tmp_path / "scaling-1-of-3.jsonl").open("a") as file:
        file.write(json.dumps(failed) + "\n")
    assert suite.main([*words[:-1], "2/3"]) == 0
    assert len(rows.read(tmp_path / "scaling-2-of-3.jsonl")[1]) == 2, "none that waits for Python"
    assert suite.main(words[:-2]) == 0
    found = rows.read(tmp_path / "scaling.jsonl")[1]
    assert sorted(row["n"] for row in found.values()) == [*range(8), 7]
    merge.merge(tmp_path, "", tmp_path / "results")
    assert path.read_text().endswith("[0, 1, 2, 3, 4, 5, 6, 7, 7]")
    capsys.readouterr()
    for share in ("0/3", "4/3", "1/2/3", "a/b"):
        assert suite.main([*words[:-1], share]) == 2
        assert share in capsys.readouterr().err


def test_who_times_has_the_device_to_itself(tmp_path, monkeypatch):
    """What torch.compile times too; without shares nobody waits. Whatever happens ends a turn."""
    lock, times = tmp_path / "lock", []
    monkeypatch.setattr(benchmarker, "benchmark_gpu", lambda call, **_: call())

    def time_twice():
        with measure.alone(), measure.alone():
            times.append("checked")
        benchmarker.benchmark_gpu(lambda: times.append("chosen"), rep=1)

    time_twice()
    assert times == ["checked", "chosen"]
    times.clear()
    with measure.taking_turns(lock), lock.open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        thread = threading.Thread(target=time_twice)
        thread.start()
        thread.join(0.3)
        assert thread.is_alive() and not times
        fcntl.flock(other, fcntl.LOCK_UN)
        thread.join(30)
        assert times == ["checked", "chosen"]
        with pytest.raises(RuntimeError, match="the device is gone"), measure.alone():
            raise RuntimeError("the device is gone")
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_another_librarys_network_is_timed_with_and_without_ours():
    pytest.importorskip("diffusers")
    small = dict(
        block_out_channels=(16, 32), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    found = [swapped._row(CPU, way, 2, 8, **small) for way in ("plain", "optimize")]
    for row in found:
        assert row["images/s"] == pytest.approx(2 / (row["ms"] / 1e3))
    text = merge.page(HERE, "step", found, "")
    assert "| diffusers UNet2DModel | optimize | 2 |" in text
    assert next(key for key, _ in swapped.items(CPU)) == "step diffusers UNet2DModel plain 32"
