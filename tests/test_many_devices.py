"""A run may continue on another number of devices than it was started on."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import small

# Runs the pipeline, and kills its own process just after the second checkpoint of the diffusion
# model is in place. Under torchrun that is rank 0; the launcher then ends the other.
KILLED = """
import os, signal, sys
import ddb_fast.train
rename, seen = os.replace, []
def replace(source, target):
    rename(source, target)
    if "diffusion/checkpoints/last" in str(target):
        seen.append(target)
        if len(seen) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
os.replace = replace
sys.exit(ddb_fast.train.main())
"""
SHORT = {
    "diffusion__images": "640",
    "checkpoint_images": "128",
    "sampling__per_class": "5",
    "amplifier__images": "256",
    "classifier__images": "256",
    "methods": "ddb-ii",
    "seeds": "0",
}


def on(ranks: int, script: Path, out: Path):
    """Run `script` with the short configuration on one process, or on several with torchrun."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [*launcher, str(script), *small.arguments(out, **SHORT)]
    environment = {"ACCELERATE_USE_CPU": "1", "PYTHONPATH": str(small.ROOT)}
    return small.run(command, cwd=small.ROOT, **environment)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_killed_run_continues_on_another_number_of_devices(tmp_path, before, after):
    out, script = tmp_path / "run", tmp_path / "killed.py"
    script.write_text(KILLED)
    assert on(before, script, out).returncode != 0
    checkpoint = out / "diffusion" / "checkpoints" / "last.safetensors"
    first = load_file(checkpoint)
    assert not json.loads((out / "manifest.json").read_text())["stages"]["diffusion"]["done"]

    answer = on(after, small.ROOT / "ddb_fast" / "train.py", out)
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
