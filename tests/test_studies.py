"""The studies behind the documentation's tables, on a short run: what they write, what it says."""

import json
import shutil

import amplification
import cost_quality
import epochs
import memorisation
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

import small
from ddb_fast import checkpoint
from ddb_fast.data.digits import nearest_colour


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """A process has one state of accelerate, and another test's may be of another precision."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished short run of the digits, one method."""
    out = tmp_path_factory.mktemp("studies") / "run"
    changes = {
        "seeds": "0",
        "methods": "ddb-ii",
        "diffusion__images": "3200",
        "sampling__steps": "5",
    }
    answer = small.ddb_fast(out, **changes)
    assert answer.returncode == 0, answer.stderr
    return out


def test_aligned_shares_are_those_of_the_runs_own_images(run, tmp_path):
    """At the run's own scale and count, its synthetic set is drawn again."""
    out = tmp_path / "amplification"
    words = [str(run), "--out", str(out), "--count", "120", "--scales", "1", "2", "--threads", "1"]
    assert amplification.main(words) == 0
    rows = json.loads(out.with_suffix(".json").read_text())
    assert [row["guidance_scale"] for row in rows] == [1.0, 2.0]
    tensors, _ = checkpoint.load_tensors(run / "synthetic" / "images.safetensors")
    share = (nearest_colour(tensors["images"]) == tensors["labels"]).double().mean().item()
    # The run is fp32, the study takes what the machine has: colours may cross a border.
    assert rows[1]["aligned_share"] == pytest.approx(share, abs=0.05)
    assert rows[1]["low"] <= rows[1]["aligned_share"] <= rows[1]["high"]
    assert rows[1]["real_aligned_share"] == pytest.approx(0.9, abs=0.01)
    assert out.with_suffix(".png").stat().st_size > 5000
    assert "| digits | 89.9 |" in out.with_suffix(".md").read_text()
    written = out.with_suffix(".json").stat().st_mtime_ns
    assert amplification.main(words) == 0
    assert out.with_suffix(".json").stat().st_mtime_ns == written, "measured before"


def test_curves_of_both_amplifiers(run, tmp_path):
    out = tmp_path / "memorisation"
    words = [str(run), "--out", str(out), "--images", "1920", "--looks", "3", "--threads", "1"]
    assert memorisation.main(words) == 0
    rows = json.loads(out.with_suffix(".json").read_text())
    assert [(row["trained_on"], row["images"]) for row in rows] == [
        (source, images) for source in ("synthetic", "real") for images in (640, 1280, 1920)
    ]
    assert all(0 <= row["auroc"] <= 1 and row["scored"] == 10_000 for row in rows)
    assert rows[0]["auroc"] != rows[3]["auroc"]
    assert out.with_suffix(".png").stat().st_size > 5000


def test_cost_and_quality_of_the_runs_own_setting_and_others(run, tmp_path, monkeypatch, capsys):
    """At the run's own setting, with its generator, its figures are found again."""
    own = tmp_path / "work" / "digits" / "generator-3200"
    shutil.copytree(run / "diffusion", own)
    (own / "seconds.json").write_text(json.dumps({"cpu": 100.0, "wall": 200.0}))
    points = [{}, {"guidance_scale": 1.0}, {"length": 0.1, "steps": 3}]
    monkeypatch.setattr(cost_quality, "MAPS", {"full": points})
    out = tmp_path / "map"
    words = [str(run / "config.json"), "--work", str(tmp_path / "work"), "--out", str(out)]
    words += ["--seeds", "0", "1"]
    assert cost_quality.main(words) == 0
    rows = json.loads(out.with_suffix(".json").read_text())
    results = json.loads((run / "results.json").read_text())
    # The run is fp32, the study takes what the machine has.
    assert rows[0]["aligned_share"] == pytest.approx(
        results["synthetic"]["aligned_share"], abs=0.05
    )
    assert rows[0]["auroc"][0] == pytest.approx(results["amplifier"]["auroc"], abs=0.05)
    assert [row["changed"] for row in rows] == [[], ["guidance_scale"], ["length", "steps"]]
    assert [row["images"] for row in rows] == [3200, 3200, 320]
    assert all(len(row["recall"]) == len(row["seconds"]["amplifier"]) == 2 for row in rows)
    assert rows[1]["seconds"]["training"] == {"cpu": 100.0, "wall": 200.0}
    assert 0 < rows[2]["seconds"]["training"]["cpu"] < 50
    lines = out.with_suffix(".md").read_text().splitlines()
    assert len(lines) == 2 + len(rows) and " | 100 | " in lines[2]
    assert out.with_suffix(".png").stat().st_size > 5000
    # The mean of equal figures is not always one of them, and a bar's length never negative.
    for value in (0.003, 0.173):
        equal = {name: [value] * 3 for name in cost_quality.FIGURES}
        cost_quality.plot([row | equal for row in rows], tmp_path / "equal.png")
    written = out.with_suffix(".json").stat().st_mtime_ns
    assert cost_quality.main(words) == 0
    assert out.with_suffix(".json").stat().st_mtime_ns == written, "measured before"
    assert cost_quality.main(["no-preset", *words[1:]]) == 2
    assert "unknown preset" in capsys.readouterr().err


@pytest.fixture(scope="module")
def colored_run(tmp_path_factory):
    """A finished run on forty made-up images of each digit, a fifth of them for validation."""
    folder = tmp_path_factory.mktemp("mnist")
    labels = np.tile(np.arange(10), 40)
    strokes = np.random.default_rng(0).integers(0, 256, (400, 28, 28))
    for part in ("train", "t10k"):
        for name, array in (("images-idx3", strokes), ("labels-idx1", labels)):
            sizes = b"".join(n.to_bytes(4, "big") for n in array.shape)
            content = bytes((0, 0, 8, array.ndim)) + sizes + array.astype(np.uint8).tobytes()
            (folder / f"{part}-{name}-ubyte").write_bytes(content)
    out = folder / "run"
    words = ["run", "colored-mnist", "--data", str(folder), "--out", str(out), "--methods", "erm"]
    fields = {"data.validation_share": "0.2", "data.rho": "0.9", "classifier.images": "512"}
    for name, value in {**fields, "threads": "1", "progress": "false", "seeds": "0"}.items():
        words += [f"--{name}", value]
    answer = small.forked(words)
    assert answer.returncode == 0, answer.stderr
    return out


def test_epochs_of_each_method_on_recoloured_digits(colored_run, tmp_path, capsys):
    out = tmp_path / "epochs"
    methods = ["erm", "lff", "jtt", "group-dro"]
    words = [str(colored_run), "--out", str(out), "--epochs", "4", "--looks", "2"]
    words += ["--jtt", "1", "5", "--threads", "1", "--methods", *methods]
    assert epochs.main([*words, "--seeds", "0", "1"]) == 0
    rows = json.loads(out.with_suffix(".json").read_text())
    assert len(rows) == len(methods) * 2 * 2 and {row["seed"] for row in rows} == {0, 1}
    erm = [row["accuracy"] for row in rows if row["method"] == "erm" and row["epochs"] > 3]
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines()]
    (last,) = [line[-1] for line in lines if line[0] == "| erm"]
    assert last.rstrip(" |") == f"{100 * sum(erm) / 2:.1f}"
    # ERM's first epochs are those of a shorter training.
    short = tmp_path / "short"
    words[2], words[4], words[6] = str(short), "2", "1"
    assert epochs.main([*words[:-3]]) == 0
    (row,) = [r for r in json.loads(short.with_suffix(".json").read_text())]
    same = next(r for r in rows if r["method"] == "erm" and r["images"] == row["images"])
    assert row["accuracy"] == same["accuracy"]


def test_epochs_need_a_validation_split(run, tmp_path, capsys):
    words = [str(run), "--out", str(tmp_path / "out"), "--methods", "erm"]
    assert epochs.main(words) == 2
    assert "not Colored MNIST with a validation split" in capsys.readouterr().err


@pytest.mark.parametrize("study", [amplification, memorisation])
def test_a_folder_that_is_no_run_is_one_line(study, tmp_path, capsys):
    torch.set_num_threads(1)
    assert study.main([str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "no run; name a folder" in capsys.readouterr().err
