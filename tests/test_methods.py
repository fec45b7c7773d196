"""Every method, three steps on a tiny labelled set: whatever is listed in METHODS runs here."""

import csv
import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

import small
from ddb_fast.classification import load_classifier
from ddb_fast.config import METHODS, from_json
from ddb_fast.methods import first_networks
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


def refused(capsys, data, out, **changes):
    assert run(data, out, **changes) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def without(table, path, **conditions):
    """The table without the rows that meet all conditions, or without a column."""
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    columns = [name for name in rows[0] if name != conditions.get("column")]
    conditions.pop("column", None)
    if conditions:
        rows = [r for r in rows if any(r[name] != value for name, value in conditions.items())]
    for row in rows:
        row["path"] = str(table.parent / row["path"])
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_dfr_is_refused_before_anything_is_trained(labelled, tmp_path, capsys):
    out = tmp_path / "out"
    unlabelled = without(labelled, tmp_path / "unlabelled.csv", column="a")
    assert "needs bias labels" in refused(capsys, unlabelled, out, methods="dfr")
    one_class = without(labelled, tmp_path / "one_class.csv", split="val", y="1")
    line = refused(capsys, one_class, tmp_path / "other", methods="dfr")
    assert "a validation split with every class: none of 1" in line
    assert not list(tmp_path.rglob("*.safetensors"))


def test_dfr_changes_the_last_layer_alone_and_brings_erm(labelled, tmp_path):
    assert run(labelled, tmp_path, methods="dfr") == 0
    first = small.results(tmp_path)
    assert list(first["methods"]) == ["erm", "dfr"]
    erm, dfr = (
        load_file(tmp_path / "classifiers" / method / "seed0" / "model.safetensors")
        for method in ("erm", "dfr")
    )
    changed = {name for name, tensor in erm.items() if not torch.equal(tensor, dfr[name])}
    assert changed == {"fc.weight", "fc.bias"}
    chosen = json.loads((tmp_path / "classifiers/dfr/seed0/metrics.json").read_text())
    assert chosen["inverse_strength"] in (1.0, 0.7, 0.3, 0.1, 0.07, 0.03, 0.01)
    assert run(labelled, tmp_path, methods="dfr") == 0
    assert small.results(tmp_path) == first


def test_jtt_shows_the_errors_of_its_first_network_more_often(labelled, tmp_path, monkeypatch):
    """What the second training's sampler deals out in whole epochs, counted."""
    dealt = Counter()

    def counted(fit):
        def wrapped(*arguments, sampler, stage, config, **options):
            if stage == "jtt seed 0":
                size = config.batch_size
                for step in range(config.images // size):
                    dealt.update(sampler.batch(step, size).tolist())
            return fit(*arguments, sampler=sampler, stage=stage, config=config, **options)

        return wrapped

    from ddb_fast import classification

    monkeypatch.setattr(classification, "fit", counted(classification.fit))
    assert run(labelled, tmp_path, methods="jtt", jtt__upweight="5") == 0
    folder = tmp_path / "classifiers" / "jtt" / "seed0"
    with (folder / "error_set.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 40
    assert all((row["predicted"] != row["y"]) == (row["error"] == "1") for row in rows)
    times = [5 if row["error"] == "1" else 1 for row in rows]
    assert 1 in times and 5 in times
    epochs = 192 / sum(times)
    for image, n in enumerate(times):
        assert math.floor(epochs) * n <= dealt[image] <= math.ceil(epochs) * n
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["stages"]["jtt-identification/0"]["done"]
    assert not {p.name for p in folder.iterdir()} ^ {
        "identification.safetensors",
        "error_set.csv",
        "model.safetensors",
        "metrics.json",
    }


def test_lff_starts_the_kept_network_where_erm_starts(labelled, tmp_path):
    """At rate zero the debiased network is erm's first one; the biased is another, and unsaved."""
    assert run(labelled, tmp_path, methods="erm lff", classifier__lr="0") == 0
    erm, lff = (
        load_file(tmp_path / "classifiers" / method / "seed0" / "model.safetensors")
        for method in ("erm", "lff")
    )
    assert erm.keys() == lff.keys()
    assert all(torch.equal(erm[name], tensor) for name, tensor in lff.items())
    config = from_json((tmp_path / "config.json").read_text()).classifier
    _, pair = first_networks(config, 2, "lff", 0)
    assert torch.equal(pair.debiased.fc.weight.detach(), erm["fc.weight"])
    assert not torch.equal(pair.biased.fc.weight, pair.debiased.fc.weight)


BASELINES = "erm lff jtt dfr real-amplifier-i real-amplifier-ii"
KILLS = [
    ("lff/seed0/checkpoint", 1, "after"),
    ("lff/seed0/checkpoint", 1, "before"),
    ("lff/seed0/model", 1, "before"),
    ("jtt/seed0/identification_checkpoint", 1, "after"),
    ("jtt/seed0/identification.safetensors", 1, "after"),
    ("jtt/seed0/error_set.csv", 1, "after"),
    ("jtt/seed0/checkpoint", 1, "before"),
    ("jtt/seed0/checkpoint", 2, "after"),
    ("dfr/seed0/model", 1, "after"),
    ("real_amplifier/checkpoint", 1, "after"),
    ("real_amplifier/scores.csv", 1, "before"),
    ("real-amplifier-i/seed0/checkpoint", 1, "after"),
]


@pytest.mark.timeout(900)
def test_kill_9_between_and_within_the_phases_gives_the_same_numbers(tmp_path):
    one, two = tmp_path / "undisturbed", tmp_path / "killed"
    changes = {"methods": BASELINES, "seeds": "0", "jtt__first_share": "0.5"}
    answer = small.ddb_fast(one, **changes)
    assert answer.returncode == 0, answer.stderr
    # Real stages come before the classifiers', so kills are in the order in which files appear.
    order = sorted(KILLS, key=lambda kill: not kill[0].startswith("real_amplifier/"))
    small.killed(small.arguments(two, **changes), order)
    models = sorted(p.relative_to(one) for p in one.rglob("*.safetensors"))
    models = [p for p in models if "cache" not in p.parts]
    assert len(models) == 1 + 1 + len(BASELINES.split())
    for path in models:
        first, second = load_file(one / path), load_file(two / path)
        assert first.keys() == second.keys()
        for name, tensor in first.items():
            assert torch.equal(second[name], tensor), f"{path}: {name}"
    for name in ("real_amplifier/scores.csv", "classifiers/jtt/seed0/error_set.csv"):
        assert (one / name).read_text() == (two / name).read_text()
    assert small.results(one) == small.results(two)


@pytest.mark.timeout(600)
def test_two_ranks_finish_every_baseline(tmp_path):
    words = small.arguments(
        tmp_path, methods=BASELINES, seeds="0", classifier__images="640", amplifier__images="640"
    )
    answer = small.ranks(2, ["run", *words])
    assert answer.returncode == 0, answer.stderr
    assert "2 x cpu" in answer.stderr
    results = small.results(tmp_path)
    assert list(results["methods"]) == BASELINES.split()
