"""A run may continue on another number of devices than it was started on."""

import functools
import json
import math
import signal

import pytest
import torch
from safetensors.torch import load_file

import small

SHORT = {
    "diffusion__images": "640",
    "checkpoint_images": "128",
    "sampling__per_class": "5",
    "amplifier__images": "256",
    "classifier__images": "256",
    "methods": "ddb-ii",
    "seeds": "0",
}


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_killed_run_continues_on_another_number_of_devices(tmp_path, before, after):
    """Killed just after the second checkpoint of the diffusion model is in place."""
    out = tmp_path / "run"
    kill = functools.partial(small.kill_at, str(out), "diffusion/checkpoints/last", 2, "after")
    words = ["run", *small.arguments(out, **SHORT)]
    assert small.ranks(before, words, before=kill).returncode == -signal.SIGKILL
    checkpoint = out / "diffusion" / "checkpoints" / "last.safetensors"
    first = load_file(checkpoint)
    assert not json.loads((out / "manifest.json").read_text())["stages"]["diffusion"]["done"]

    answer = small.ranks(after, words)
    assert answer.returncode == 0, answer.stderr
    assert f"{after} x cpu" in answer.stderr
    assert "diffusion: continues after 256 images" in answer.stderr
    manifest = json.loads((out / "manifest.json").read_text())
    assert all(stage["done"] for stage in manifest["stages"].values())
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    seen = [row["images"] for row in rows if row["stage"] == "diffusion"]
    assert seen == sorted(set(seen)) and seen[-1] == 640, "no image was shown twice"
    model = load_file(out / "diffusion" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in model.values())
    moved = [name for name, t in model.items() if not torch.equal(t, first[f"ema.{name}"])]
    assert moved, "training went on after the checkpoint"
    results = json.loads((out / "results.json").read_text())
    metrics = results["methods"]["ddb-ii"]["metrics"].values()
    assert all(math.isfinite(metric["mean"]) for metric in metrics)
    assert not checkpoint.exists()
