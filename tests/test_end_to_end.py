"""The whole road on the embedded digits: its files, its launchers, and killing it at any point."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import small

ARTEFACTS = [
    "diffusion/model.safetensors",
    "synthetic/images.safetensors",
    "amplifier/model.safetensors",
    "classifiers/erm/seed0/model.safetensors",
    "classifiers/ddb-i/seed1/model.safetensors",
    "classifiers/ddb-ii/seed1/model.safetensors",
]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """One run from start to end, that every other road is compared with."""
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    answer = small.ddb_fast(out)
    assert answer.returncode == 0, answer.stderr
    return out, answer


def same_run(one: Path, other: Path) -> None:
    """Assert that two runs hold the same numbers, bit for bit."""
    for name in ARTEFACTS:
        first, second = load_file(one / name), load_file(other / name)
        assert first.keys() == second.keys()
        for key, tensor in first.items():
            assert torch.equal(second[key], tensor), f"{name}: {key}"
    assert (one / "amplifier/scores.csv").read_text() == (
        other / "amplifier/scores.csv"
    ).read_text()
    assert small.results(one) == small.results(other)


def test_the_folder_holds_what_the_design_says(undisturbed):
    out, _ = undisturbed
    expected = {
        ".lock",
        "config.json",
        "manifest.json",
        "log.jsonl",
        "results.json",
        "report.html",
        "cache",
        "diffusion",
        "synthetic",
        "amplifier",
        "classifiers",
    }
    assert {p.name for p in out.iterdir()} == expected
    assert {p.name for p in (out / "synthetic").iterdir()} == {"images.safetensors", "grid.png"}
    assert {p.name for p in (out / "amplifier").iterdir()} == {"model.safetensors", "scores.csv"}
    seed = out / "classifiers" / "ddb-i" / "seed1"
    assert {p.name for p in seed.iterdir()} == {"model.safetensors", "metrics.json"}
    assert not list(out.rglob("*.part")), "no temporary file is left"
    manifest = json.loads((out / "manifest.json").read_text())
    assert all(entry["done"] for entry in manifest["stages"].values())
    assert manifest["versions"]["torch"] == torch.__version__


def test_results_have_the_documented_form(undisturbed):
    out, answer = undisturbed
    results = json.loads((out / "results.json").read_text())
    assert list(results) == [
        "format",
        "dataset",
        "preset",
        "split",
        "selection",
        "seeds",
        "methods",
        "synthetic",
        "amplifier",
        "verdict",
        "memorisation",
        "real_amplifier",
        "seconds",
    ]
    assert (results["format"], results["split"], results["selection"]) == (1, "test", "last")
    assert list(results["methods"]) == ["erm", "ddb-i", "ddb-ii"]
    erm = results["methods"]["erm"]
    assert set(erm["metrics"]) == {
        "average_accuracy",
        "adjusted_average_accuracy",
        "unbiased_accuracy",
        "worst_group_accuracy",
        "aligned_accuracy",
        "conflicting_accuracy",
    }
    for metric in erm["metrics"].values():
        assert len(metric["seeds"]) == 2 and metric["std"] is not None
        assert metric["mean"] == pytest.approx(sum(metric["seeds"]) / 2)
    assert len(erm["groups"]) == 100
    assert set(erm["groups"][0]) == {"name", "y", "a", "n", "accuracy", "low", "high"}
    assert results["synthetic"]["count"] == 120
    assert 0 <= results["synthetic"]["aligned_share"] <= 1
    assert set(results["amplifier"]) == {
        "split",
        "auroc",
        "average_precision",
        "pseudo_precision",
        "pseudo_recall",
        "aligned_accuracy",
        "conflicting_accuracy",
    }
    assert "conflicting" in answer.stdout and str(out / "results.json") in answer.stdout


def test_scores_cover_every_image_once(undisturbed):
    out, _ = undisturbed
    with (out / "amplifier/scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [
        "index",
        "split",
        "path",
        "y",
        "predicted",
        "loss",
        "probability_y",
        "score",
        "pseudo_conflicting",
    ]
    assert [int(r["index"]) for r in rows] == list(range(len(rows)))
    assert len({r["path"] for r in rows}) == len(rows)
    assert {r["split"] for r in rows} == {"train", "val", "test"}
    for row in rows[:50]:
        probability = torch.tensor(-float(row["loss"]), dtype=torch.float64).exp()
        assert float(row["probability_y"]) == pytest.approx(float(probability), rel=1e-5)


def test_the_same_command_again_changes_nothing_and_trains_nothing(undisturbed):
    out, _ = undisturbed
    before = {p: p.stat().st_mtime_ns for p in out.rglob("model.safetensors")}
    kept = small.results(out)
    again = small.ddb_fast(out)
    assert again.returncode == 0, again.stderr
    assert {p: p.stat().st_mtime_ns for p in out.rglob("model.safetensors")} == before
    assert small.results(out) == kept
    assert "diffusion: done before" in again.stderr


def test_another_configuration_is_refused_and_nothing_is_lost(undisturbed):
    out, _ = undisturbed
    kept = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    answer = small.ddb_fast(out, classifier__lr="0.5", diffusion__target="eps")
    assert answer.returncode == 2
    assert len(answer.stderr.strip().splitlines()) == 1
    assert "classifier.lr is 0.001 there, 0.5 here" in answer.stderr
    assert "diffusion.target is v there, eps here" in answer.stderr
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == kept


KILLS = [
    ("cache/", 1, "before"),
    ("cache/", 2, "after"),
    ("diffusion/checkpoints/last", 1, "before"),
    ("diffusion/checkpoints/last", 1, "after"),
    ("diffusion/checkpoints/last", 1, "before"),
    ("diffusion/model", 1, "after"),
    ("synthetic/shards/", 3, "before"),
    ("synthetic/shards/", 2, "after"),
    ("synthetic/images", 1, "before"),
    ("synthetic/images", 1, "after"),
    ("amplifier/checkpoint", 2, "after"),
    ("amplifier/model", 1, "before"),
    ("amplifier/scores.csv", 1, "before"),
    ("amplifier/scores.csv", 1, "after"),
    ("erm/seed0/checkpoint", 1, "after"),
    ("ddb-i/seed0/checkpoint", 2, "after"),
    ("ddb-ii/seed0/model", 1, "after"),
    ("ddb-i/seed1/metrics.json", 1, "before"),
    ("results.json", 1, "before"),
]


@pytest.mark.timeout(900)
def test_kill_9_in_every_stage_then_the_same_command_gives_the_same_numbers(undisturbed, tmp_path):
    out = tmp_path / "killed"
    small.killed(small.arguments(out), KILLS)
    same_run(undisturbed[0], out)
    assert not list(out.rglob("*.part"))


AUDIT_KILLS = [
    ("memorisation.json", 1, "before"),
    ("parts/again.checkpoint", 1, "after"),
    ("parts/rebalanced 1.safetensors", 1, "after"),
]


@pytest.mark.timeout(600)
def test_the_audit_grows_on_a_finished_run_and_survives_kill_9(undisturbed, tmp_path):
    """The same seven files whatever happened, and nothing of the run before is made anew."""
    one, two = tmp_path / "one", tmp_path / "two"
    for out in (one, two):
        shutil.copytree(undisturbed[0], out)
    answer = small.ddb_fast(one, audit="true")
    assert answer.returncode == 0, answer.stderr
    small.killed(small.arguments(two, audit="true"), AUDIT_KILLS)
    same_run(one, two)
    for name in ("audit/predictions.safetensors", "memorisation.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    assert not (two / "audit" / "parts").exists()
    said = small.results(one)
    assert said["verdict"]["found"] is None, "the short generator is too poor"
    assert said["memorisation"]["generated"]["total"] == 120
    before = small.results(undisturbed[0])
    assert before["verdict"] is None and before["memorisation"] is None
    assert {**said, "verdict": None, "memorisation": None} == before
    manifests = [json.loads((p / "manifest.json").read_text()) for p in (undisturbed[0], one)]
    for key, seconds in manifests[0]["seconds"].items():
        assert manifests[1]["seconds"][key] == seconds, key


def launched(prefix: list[str], out: Path, **changes: str):
    return small.run(
        [*prefix, "ddb_fast/train.py", *small.arguments(out, **changes)], cwd=small.ROOT
    )


def test_accelerate_launch_gives_the_same_results(undisturbed, tmp_path):
    out = tmp_path / "launched"
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--cpu"]
    answer = launched(launcher, out)
    assert answer.returncode == 0, answer.stderr
    same_run(undisturbed[0], out)


def test_an_installed_wheel_gives_the_same_results_outside_the_checkout(undisturbed, tmp_path):
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    source = tmp_path / "source"  # without what an earlier build left in the checkout
    shutil.copytree(
        small.ROOT,
        source,
        ignore=shutil.ignore_patterns(".*", "build", "*.egg-info", "runs", "tests", "docs"),
    )
    # The operators of this checkout, where it has them: they were compiled a moment ago.
    path = os.environ["PATH"]
    if (library := small.ROOT / "kernels" / "_native.so").exists():
        cmake = tmp_path / "bin" / "cmake"
        cmake.parent.mkdir()
        cmake.write_text(f"""#!/bin/sh
[ "$1" != --build ] || {{ mkdir -p "$2" && cp '{library}' "$2"; }}
""")
        cmake.chmod(0o755)
        path = f"{cmake.parent}:{path}"
    built = small.run(
        [*pip, "wheel", "--no-build-isolation", "--no-deps", "-w", str(tmp_path), str(source)],
        PATH=path,
    )
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True)
    assert not (site / "kernels").exists()
    place = "find_spec('ddb_fast.kernels').origin"
    where = small.run(
        [sys.executable, "-c", f"from importlib.util import find_spec; print({place})"],
        cwd=tmp_path,
        PYTHONPATH=str(site),
    )
    assert where.stdout.strip().startswith(str(site / "ddb_fast" / "kernels")), where
    out = tmp_path / "wheel"
    command = [sys.executable, "-m", "ddb_fast.cli", "run", *small.arguments(out)]
    answer = small.run(command, cwd=tmp_path, PYTHONPATH=str(site))
    assert answer.returncode == 0, answer.stderr
    same_run(undisturbed[0], out)


def test_two_ranks_generate_what_one_does(undisturbed, tmp_path):
    """From one trained generator; a batch is padded to its size, so the split does not matter."""
    out = tmp_path / "ranks"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    words = small.arguments(out, generator=undisturbed[0] / "diffusion", seeds="0")
    command = [*torchrun, "ddb_fast/train.py", *words]
    answer = small.run(command, cwd=small.ROOT, ACCELERATE_USE_CPU="1")
    assert answer.returncode == 0, answer.stderr
    assert "2 x cpu" in answer.stderr
    one = load_file(undisturbed[0] / "synthetic/images.safetensors")
    two = load_file(out / "synthetic/images.safetensors")
    assert two.keys() == one.keys()
    for key, tensor in one.items():
        assert torch.equal(two[key], tensor), key
    assert json.loads((out / "results.json").read_text())["seeds"] == [0]
