"""A run's classifiers on its own and on other images: the same figures, aligned as in training."""

import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from sklearn.metrics import accuracy_score
from three_digits import near, read_table, train, write_photos, write_table

from ddb_fast import use_run
from ddb_fast.classification import load_classifier
from ddb_fast.config import DataConfig
from ddb_fast.data.sources import open_listing
from ddb_fast.evaluation import _warn_of_trained
from ddb_fast.metrics import wilson_interval
from ddb_fast.presets import PRESETS
from ddb_fast.scoring import logits_of


@pytest.fixture(autouse=True)
def one_process_many_runs(monkeypatch):
    monkeypatch.setattr("logging.basicConfig", lambda **_: None)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("three digits") / "photos")


@pytest.fixture(scope="module")
def run(photos, tmp_path_factory):
    """A run on the table, with amplifier and classifiers."""
    out = tmp_path_factory.mktemp("runs") / "three"
    train("--data", photos / "table.csv", "--out", out)
    return out


def evaluated(capsys, *words):
    capsys.readouterr()
    assert use_run.evaluate([*map(str, words), "--format", "json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("split", ["test", "val"])
def test_a_runs_own_images_get_its_own_metrics(run, photos, capsys, split):
    for data in ([], ["--data", photos / "table.csv"]):
        results = evaluated(capsys, run, *data, "--split", split)
        assert list(results["methods"]) == ["erm", "ddb-ii"] and results["seeds"] == [0, 1]
        for method, entry in results["methods"].items():
            for i, seed in enumerate((0, 1)):
                file = run / "classifiers" / method / f"seed{seed}" / "metrics.json"
                own = json.loads(file.read_text())[split]
                for name, value in own["metrics"].items():
                    assert entry["metrics"][name]["seeds"][i] == value, name
                for group, theirs in zip(entry["groups"], own["groups"], strict=True):
                    assert group["name"] == theirs["name"] and group["n"] == theirs["n"]
                    assert group["accuracy"][i] == theirs["accuracy"]
    whole = json.loads((run / "results.json").read_text())["methods"]
    if split == "test":
        averages = {m: e["metrics"]["average_accuracy"]["seeds"] for m, e in whole.items()}
        assert averages["erm"] != averages["ddb-ii"], "else they might be mixed up"
        assert {m: e["metrics"] for m, e in results["methods"].items()} == {
            m: e["metrics"] for m, e in whole.items()
        }


def test_classes_are_counted_as_scikit_learn_counts(run, photos, capsys):
    """From the run's own decoded pixels, network by network."""
    words = ["--data", photos, "--methods", "ddb-ii", "--seeds", "1", "--split", "val", "test"]
    results = evaluated(capsys, run, *words)
    assert results["methods"]["ddb-ii"]["groups"] == [], "folders know no bias"
    assert results["methods"]["ddb-ii"]["metrics"]["worst_group_accuracy"]["mean"] is None
    file = run / "classifiers/ddb-ii/seed1/model.safetensors"
    network, config, _ = load_classifier(file)
    size = PRESETS["digits"]().data.cache_size
    pixels = np.fromfile(run / "cache/large.u8", dtype=np.uint8).reshape(-1, size, size, 3)
    splits = [row["split"] for row in read_table(run / "amplifier/scores.csv")]
    chosen = torch.tensor([split != "train" for split in splits])
    images = torch.from_numpy(pixels)[chosen]
    logits = logits_of(network, images, config, device=torch.device("cpu"), crop=True)
    rows = read_table(run / "amplifier/scores.csv")
    y = torch.tensor([int(row["y"]) for row in rows])[chosen]
    predicted = logits.argmax(1)
    found = results["methods"]["ddb-ii"]["classes"]
    assert [row["name"] for row in found] == ["0", "1", "2", "all"]
    for label, row in enumerate(found):
        members = (y == label) if row["name"] != "all" else torch.ones_like(y, dtype=torch.bool)
        expected = accuracy_score(y[members], predicted[members])
        assert row["accuracy"] == [pytest.approx(expected)] and row["n"] == int(members.sum())
        interval = wilson_interval(expected * row["n"], row["n"])
        assert (row["low"], row["high"]) == pytest.approx(interval)
    assert results["images"] == len(y) and results["split"] == "val, test"


def test_the_tables_are_for_people(run, capsys):
    assert use_run.evaluate([str(run), "--methods", "erm"]) == 0
    text = capsys.readouterr().out
    assert "| method | average " in text and "| class | n " in text and "| group " in text
    assert "### table\n" in text and "### table, classes\n" in text
    assert "on the test split" in text and "Wilson interval" in text
    erm = json.loads((run / "results.json").read_text())["methods"]["erm"]["metrics"]
    assert f"| erm    | {100 * erm['average_accuracy']['mean']:.1f} ±" in text


def test_what_is_aligned_is_what_was_aligned_in_training(
    run, photos, tmp_path, capsys, monkeypatch
):
    """A table of conflicting images only, two biases of three, where its own majority differs."""
    listed = []
    monkeypatch.setattr(
        "ddb_fast.evaluation.open_listing", lambda data: listed.append(data) or open_listing(data)
    )
    rows = read_table(photos / "table.csv")
    rows = [row for row in rows if row["split"] == "test" and row["a"] in "12"]
    rows = [row for row in rows if row["a"] != row["y"]]
    few = write_table(tmp_path / "few.csv", near(photos, tmp_path, rows))
    results = evaluated(capsys, run, "--data", few)
    assert len(listed) == 1, "the run's own images may be 200,000 files"
    metrics = results["methods"]["erm"]["metrics"]
    assert metrics["aligned_accuracy"]["mean"] is None
    assert metrics["conflicting_accuracy"] == metrics["average_accuracy"]
    assert metrics["adjusted_average_accuracy"]["mean"] is not None
    counts = {(g["y"], g["a"]): g["n"] for g in results["methods"]["erm"]["groups"]}
    assert set(counts) == {(y, a) for y in range(3) for a in range(3)}
    assert counts[0, 1] == sum((row["y"], row["a"]) == ("0", "1") for row in rows) > 0
    assert counts[1, 1] == 0


def test_biases_that_the_run_does_not_know_have_no_alignment(run, photos, tmp_path, capsys, caplog):
    rows = read_table(photos / "table.csv")
    rows = [row | {"a": "dark" if i % 3 else "bright"} for i, row in enumerate(rows)]
    light = write_table(tmp_path / "light.csv", near(photos, tmp_path, rows))
    results = evaluated(capsys, run, "--data", light)
    assert "what is aligned and what conflicts is not known" in caplog.text
    assert "the bias labels 0, 1, 2" in caplog.text
    metrics = results["methods"]["erm"]["metrics"]
    for name in ("aligned", "conflicting", "adjusted_average"):
        assert metrics[f"{name}_accuracy"]["mean"] is None
    groups = results["methods"]["erm"]["groups"]
    assert [group["name"] for group in groups[:2]] == ["y=0 a=dark", "y=0 a=bright"]
    accuracies = [group["accuracy"] for group in groups]
    assert metrics["worst_group_accuracy"]["seeds"] == [
        min(seed) for seed in zip(*accuracies, strict=True)
    ]


def test_training_images_under_another_name_are_told_of(run, photos, capsys, caplog):
    rows = read_table(photos / "table.csv")
    for name, changed, count in (
        ("same", {}, 0),
        ("tested", {"split": "test"}, sum(row["split"] == "train" for row in rows)),
    ):
        (photos.parent / name).mkdir()
        again = [row | changed for row in near(photos, photos.parent / name, rows)]
        caplog.clear()
        evaluated(
            capsys, run, "--data", write_table(photos.parent / name / "again.csv", again),
            "--methods", "erm", "--seeds", "0", "--split", "train", "test",
        )  # fmt: skip
        told = f"again: the run was trained on {count} of the {len(rows)} images"
        assert (told in caplog.text) == (count > 0) == ("flatter" in caplog.text)


def test_they_are_told_of_where_images_were_added_since(tmp_path, caplog):
    for i in range(20):
        file = tmp_path / "ab"[i % 2] / f"{i}.png"
        file.parent.mkdir(exist_ok=True)
        file.touch()
    data = DataConfig(source="folder", path=str(tmp_path))
    own = open_listing(data)
    run = SimpleNamespace(config=SimpleNamespace(data=data), fingerprint="of those before")
    _warn_of_trained(run, lambda: own, "table", [e._replace(split="test") for e in own.entries])
    assert f"trained on {own.split.count('train')} of the 20 images" in caplog.text
    assert "have changed" in caplog.text


def test_a_run_whose_images_have_changed_knows_no_alignment(run, photos, tmp_path, capsys, caplog):
    copy = tmp_path / "run"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("cache", "synthetic", "diffusion"))
    config = json.loads((copy / "config.json").read_text())
    shorter = near(photos, tmp_path, read_table(photos / "table.csv")[1:])
    for path, told in (("gone.csv", "no such file"), ("shorter.csv", "have changed")):
        write_table(tmp_path / "shorter.csv", shorter)
        config["data"]["path"] = str(tmp_path / path)
        (copy / "config.json").write_text(json.dumps(config))
        caplog.clear()
        results = evaluated(capsys, copy, "--data", photos / "table.csv")
        assert told in caplog.text
        assert results["methods"]["erm"]["metrics"]["aligned_accuracy"]["mean"] is None


def test_help_does_not_wait_for_torch():
    code = (
        "import sys, contextlib\nfrom ddb_fast import use_run\n"
        "for command in (use_run.score, use_run.evaluate, use_run.sample):\n"
        "    with contextlib.suppress(SystemExit): command(['--help'])\n"
        "sys.exit('torch' in sys.modules)"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert answer.returncode == 0 and answer.stdout.count("usage: ddb-fast") == 3
