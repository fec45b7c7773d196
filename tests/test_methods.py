"""Every method, three steps on a tiny labelled set: whatever is listed in METHODS runs here."""

import csv
import json

import numpy as np
import pytest
from accelerate.state import AcceleratorState
from PIL import Image

import small
from ddb_fast.classification import load_classifier
from ddb_fast.config import METHODS
from ddb_fast.train import main

THREE_STEPS = {
    "diffusion.images": "192",
    "amplifier.images": "192",
    "classifier.images": "192",
    "sampling.per_class": "4",
    "seeds": "0",
    "jtt.first_share": "0.5",
    "dfr.draws": "2",
}


@pytest.fixture(autouse=True)
def one_process_many_runs(monkeypatch):
    monkeypatch.setattr("logging.basicConfig", lambda **_: None)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """Two classes by brightness, the bias a colour: 40 training, 16 validation, 8 test images."""
    root = tmp_path_factory.mktemp("labelled")
    random = np.random.default_rng(0)
    rows = []
    for split, copies, conflicting in (("train", 16, 4), ("val", 4, 4), ("test", 2, 2)):
        for y in range(2):
            for a in range(2):
                for i in range(copies if a == y else conflicting):
                    pixels = random.integers(0, 60, (16, 16, 3)) + 100 * y
                    pixels[..., a] += 90
                    name = f"{split}_{y}{a}_{i}.png"
                    Image.fromarray(pixels.astype(np.uint8)).save(root / name)
                    rows.append({"path": name, "y": y, "a": a, "split": split})
    with (root / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["path", "y", "a", "split"])
        writer.writeheader()
        writer.writerows(rows)
    return root / "table.csv"


def run(data, out, **changes):
    fields = small.FIELDS | THREE_STEPS | {k.replace("__", "."): v for k, v in changes.items()}
    del fields["data.rho"]
    words = ["digits", "--data", str(data), "--out", str(out)]
    for name, value in fields.items():
        words += [f"--{name}", *value.split()]
    AcceleratorState._reset_state(reset_partial_state=True)
    return main(words, prog="ddb-fast run")


@pytest.mark.parametrize("method", METHODS)
def test_every_method_takes_three_steps(labelled, tmp_path, method):
    assert run(labelled, tmp_path, methods=method) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    metrics = results["methods"][method]["metrics"]
    assert all(
        0 <= metrics[name]["mean"] <= 1 for name in ("average_accuracy", "worst_group_accuracy")
    )
    folder = tmp_path / "classifiers" / method / "seed0"
    network, _, classes = load_classifier(folder / "model.safetensors")
    assert len(classes) == 2
    assert all(p.isfinite().all() for p in network.parameters())
    generated = (tmp_path / "diffusion").exists()
    assert generated == method.startswith("ddb-")
    assert (results["amplifier"] is not None) == generated
    assert (results["real_amplifier"] is not None) == method.startswith("real-amplifier-")
    assert not list(tmp_path.rglob("*checkpoint*")), "nothing unfinished is left"
