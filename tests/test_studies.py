"""The studies behind the documentation's tables, on a short run: what they write, what it says."""

import json

import amplification
import memorisation
import pytest
import torch

import small
from ddb_fast import checkpoint
from ddb_fast.data.digits import nearest_colour


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
    assert all(0 <= row["auroc"] <= 1 and row["scored"] == 1164 for row in rows)
    assert rows[0]["auroc"] != rows[3]["auroc"]
    assert out.with_suffix(".png").stat().st_size > 5000


@pytest.mark.parametrize("study", [amplification, memorisation])
def test_a_folder_that_is_no_run_is_one_line(study, tmp_path, capsys):
    torch.set_num_threads(1)
    assert study.main([str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "not a run's folder" in capsys.readouterr().err
