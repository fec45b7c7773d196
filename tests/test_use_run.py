"""A finished run used: scores of its own and of other images, its generator, and refusals."""

import csv
import io
import json
import logging
import shutil
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file
from three_digits import read_table, train, write_photos, write_table

from ddb_fast import use_run
from ddb_fast.checkpoint import load_tensors, save_tensors
from ddb_fast.classification import load_classifier
from ddb_fast.config import DataConfig
from ddb_fast.data.store import pad, squash
from ddb_fast.data.unseen import batches, list_images
from ddb_fast.presets import PRESETS
from ddb_fast.scoring import COLUMNS, logits_of


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


def scored(capsys, *words):
    capsys.readouterr()
    assert use_run.score(list(map(str, words))) == 0
    return list(csv.DictReader(io.StringIO(capsys.readouterr().out, newline="")))


# --- score -------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [None, "table.csv", "."], ids=["own", "table", "folder"])
def test_a_runs_own_images_get_its_own_scores(run, photos, capsys, data):
    """To the last digit, from the table and from the same files as folders."""
    rows = scored(capsys, run, *([] if data is None else ["--data", photos / data]))
    with (run / "amplifier/scores.csv").open(newline="") as file:
        own = list(csv.DictReader(file))
    assert len(own) > 300 and {row["split"] for row in own} == {"train", "val", "test"}
    assert [{name: row[name] for name in COLUMNS} for row in rows] == own


def test_pixels_are_those_that_the_run_decoded(run, photos):
    size = PRESETS["digits"]().diffusion.image_size
    images = list_images(DataConfig(path=str(photos)), ("0", "1", "2"))
    train_images = images.split("train")
    parts = list(batches(train_images, partial(squash, size=size), size=50))
    pixels = torch.cat([part for _, part in parts])
    cached = np.fromfile(run / "cache/small.u8", dtype=np.uint8).reshape(-1, size, size, 3)
    assert np.array_equal(cached[: len(pixels)], pixels.numpy())
    assert {len(part) for part, _ in parts[:-1]} == {50}


def test_other_images_are_measured_against_the_runs_training_split(run, photos, tmp_path, capsys):
    """Another folder with one class: no statistic of its own takes part."""
    with (run / "amplifier/scores.csv").open(newline="") as file:
        own = {row["path"]: row for row in csv.DictReader(file)}
    names = [name for name in own if name.startswith("test/2/")][:7]
    for name in names:
        (tmp_path / "2").mkdir(exist_ok=True)
        shutil.copy(photos / name, tmp_path / "2")
    rows = scored(capsys, run, "--data", tmp_path)
    assert len(rows) == 7 and {row["y"] for row in rows} == {"2"}
    for row in rows:
        theirs = own[f"test/{row['path']}"]
        assert float(row["score"]) == pytest.approx(float(theirs["score"]), rel=1e-4, abs=1e-4)
        assert row["pseudo_conflicting"] == theirs["pseudo_conflicting"]


def test_a_class_of_one_training_image_is_warned_of(run, photos, tmp_path, capsys, caplog):
    copy = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("*.u8", "diff*"))
    rows = read_table(copy / "amplifier/scores.csv")
    train_2 = [row for row in rows if row["split"] == "train" and row["y"] == "2"]
    kept = [row for row in rows if row not in train_2[1:]]
    write_table(copy / "amplifier/scores.csv", kept)
    (tmp_path / "inbox" / "2").mkdir(parents=True)
    shutil.copy(photos / rows[-1]["path"], tmp_path / "inbox" / "2")
    scored(capsys, copy, "--data", tmp_path / "inbox")
    assert "class 2: one training image" in caplog.text


def test_probabilities_are_the_softmax_of_the_amplifier(run, photos, capsys):
    rows = scored(capsys, run, "--data", photos)
    network, config, _ = load_classifier(run / "amplifier/model.safetensors")
    chosen = rows[:5] + rows[-5:]
    files = [Image.open(photos / row["path"]) for row in chosen]
    pixels = torch.from_numpy(np.stack([np.asarray(file) for file in files]))
    logits = logits_of(network, pixels, config, device=torch.device("cpu"), crop=False)
    given = [[float(row[f"probability_of_{k}"]) for k in range(3)] for row in chosen]
    torch.testing.assert_close(torch.tensor(given), torch.softmax(logits, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("table", [False, True], ids=["folder", "table"])
def test_images_without_labels_get_predictions_only(run, photos, tmp_path, capsys, caplog, table):
    labelled = scored(capsys, run, "--data", photos)
    by_path = {row["path"]: row for row in labelled}
    names = [row["path"] for row in labelled if row["split"] == "test"][::20]
    copied = {f"{i}.png": name for i, name in enumerate(names)}
    for short, name in copied.items():
        shutil.copy(photos / name, tmp_path / short)
    data = tmp_path
    if table:
        data = write_table(tmp_path / "table.csv", [{"path": short} for short in copied])
    with caplog.at_level(logging.INFO, logger="ddb_fast"):
        rows = scored(capsys, run, "--data", data)
    assert "no labels, so no scores: a score compares the loss of the label" in caplog.text
    assert len(rows) == len(names) and [row["path"] for row in rows] == sorted(copied)
    for row in rows:
        theirs = by_path[copied[row["path"]]]
        for name in ("split", "y", "loss", "probability_y", "score", "pseudo_conflicting"):
            assert row[name] == ""
        assert row["predicted"] == theirs["predicted"]
        same = [float(r["probability_of_1"]) for r in (row, theirs)]
        assert same[0] == pytest.approx(same[1], rel=1e-4)


def test_files_are_written_in_the_format_of_their_name(run, photos, tmp_path, capsys):
    out = tmp_path / "new" / "scores.json"
    assert use_run.score([str(run), "--data", str(photos), "--out", str(out)]) == 0
    assert capsys.readouterr().out == ""
    rows = json.loads(out.read_text())
    assert [row["index"] for row in rows] == list(range(len(rows)))
    own = read_table(run / "amplifier/scores.csv")
    assert [f"{row['score']:.9g}" for row in rows] == [row["score"] for row in own]


def test_a_place_that_cannot_be_written_is_told_before_the_work(run, tmp_path, monkeypatch):
    monkeypatch.setattr("ddb_fast.apply.score", lambda *_, **__: pytest.fail("scored"))
    (tmp_path / "file.csv").touch()
    for out, told in (
        (tmp_path / "file.csv" / "scores.csv", "no file can be written in .*file.csv$"),
        (tmp_path, "a folder; name a file"),
    ):
        with pytest.raises(ValueError, match=f"^{out}: {told}"):
            use_run.score([str(run), "--out", str(out), "--format", "csv"])


def test_images_that_have_moved(run, tmp_path):
    moved = tmp_path / "run"
    shutil.copytree(run, moved)
    config = json.loads((moved / "config.json").read_text())
    config["data"]["path"] = str(tmp_path / "gone")
    (moved / "config.json").write_text(json.dumps(config))
    told = r"gone: nothing is there; if the run's images lie elsewhere now, --data names the place"
    with pytest.raises(ValueError, match=told):
        use_run.score([str(moved)])


def test_a_broken_image_stops_or_is_left_out(run, photos, tmp_path, capsys, caplog):
    data = tmp_path / "0"
    data.mkdir()
    for i, name in enumerate(sorted((photos / "test/0").iterdir())[:6]):
        shutil.copy(name, data / f"{i}.png")
    before = scored(capsys, run, "--data", tmp_path, "--corrupt", "skip")
    (data / "3.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"3\.png: cannot be read .*--corrupt skip"):
        use_run.score([str(run), "--data", str(tmp_path)])
    caplog.clear()
    rows = scored(capsys, run, "--data", tmp_path, "--corrupt", "skip")
    assert "1 broken images left out: 0/3.png" in caplog.text
    kept = [row for row in before if row["path"] != "0/3.png"]
    assert [row["path"] for row in rows] == [row["path"] for row in kept]
    for path in data.iterdir():
        path.write_bytes(b"no image")
    with pytest.raises(ValueError, match="none of its 6 images can be read"):
        use_run.score([str(run), "--data", str(tmp_path), "--corrupt", "skip"])


def test_images_are_fitted_as_the_runs_were(run, tmp_path, capsys):
    """A run whose data is padded, on an image smaller than its pixels."""
    copy = tmp_path / "run"
    copy.mkdir()
    for name in ("config.json", "manifest.json", "amplifier"):
        whole = shutil.copytree if (run / name).is_dir() else shutil.copy
        whole(run / name, copy / name)
    grey = np.random.default_rng(0).integers(0, 255, (9, 7, 3), dtype=np.uint8)
    (tmp_path / "new").mkdir()
    Image.fromarray(grey).save(tmp_path / "new/a.png")
    words = [copy, "--data", tmp_path / "new"]
    with pytest.raises(ValueError, match=r"meta\.json: no such file; the run's own command"):
        scored(capsys, *words)
    network, config, _ = load_classifier(run / "amplifier/model.safetensors")
    meta = json.loads((run / "cache/meta.json").read_text())
    (copy / "cache").mkdir()
    for name, fitted in (("squash", squash), ("pad", pad)):
        (copy / "cache/meta.json").write_text(json.dumps(meta | {"fit": name}))
        (row,) = scored(capsys, *words)
        pixels = fitted(Image.fromarray(grey), 16).permute(1, 2, 0)[None]
        logits = logits_of(network, pixels, config, device=torch.device("cpu"), crop=False)
        expected = torch.softmax(logits, 1)[0, 1].item()
        assert float(row["probability_of_1"]) == pytest.approx(expected, rel=1e-4)


# --- which images are meant --------------------------------------------------------------------


def test_data_is_read_as_the_run_reads_its_own():
    own = DataConfig(path="photos", test_share=0.4, validation_share=0.3)
    assert use_run.data_config(own, None, None, None) == own
    other = use_run.data_config(own, "new", None, None)
    assert (other.path, other.source, other.test_share) == ("new", "auto", 0.4)
    assert use_run.data_config(own, "new.csv", "csv", None).validation_share == 0.3
    published = use_run.data_config(own, "mnist", "colored-mnist", None)
    assert published == replace(PRESETS["colored-mnist"]().data, path="mnist")
    embedded = use_run.data_config(own, "digits", None, 0.5)
    assert (embedded.source, embedded.path, embedded.rho) == ("digits", None, 0.5)
    assert use_run.data_config(own, "digits", "folder", None).path == "digits"
    own = DataConfig(source="digits", rho=0.8)
    assert use_run.data_config(own, "digits", None, None).rho == 0.8


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((None, "folder", None), "--as says what lies at --data"),
        (("photos", None, 0.9), "--rho: images are read as they are"),
        (("photos", "digits", None), "digits is embedded"),
        (("digits", None, 1.5), "a share in 0 to 1"),
    ],
)
def test_data_that_is_not_meant(words, told):
    with pytest.raises(ValueError, match=told):
        use_run.data_config(DataConfig(path="own"), *words)


# --- sample ------------------------------------------------------------------------------------


def pictures(folder):
    """{(class, number of the file): pixels}."""
    return {
        (file.parent.name, int(file.stem)): np.asarray(Image.open(file))
        for file in folder.rglob("*.png")
    }


@pytest.fixture(scope="module")
def synthetic(run):
    """{(class, k): pixels} of the run's own synthetic set."""
    tensors = load_file(run / "synthetic/images.safetensors")
    pixels = tensors["images"].permute(0, 2, 3, 1).numpy()
    labels = tensors["labels"].tolist()
    return {(str(y), k): pixels[k] for k, y in enumerate(labels)}


def same(found, expected):
    return found.keys() == expected.keys() and all(
        np.array_equal(found[key], expected[key]) for key in expected
    )


@pytest.fixture(scope="module")
def sampled(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("sampled") / "again"
    assert use_run.sample([str(run), "--out", str(out)]) == 0
    return out


def test_the_synthetic_set_is_drawn_again(sampled, synthetic):
    assert len(synthetic) == 36 and same(pictures(sampled), synthetic)
    assert [path.name for path in sampled.parent.iterdir()] == ["again"]


def test_it_goes_into_another_run(sampled, synthetic, photos, tmp_path):
    words = ["--data", photos / "table.csv", "--out", tmp_path / "run", "--synthetic", sampled]
    train(*words, methods="none", amplifier__images="64")
    tensors, _ = load_tensors(tmp_path / "run/synthetic/images.safetensors")
    taken = tensors["images"].permute(0, 2, 3, 1).numpy()
    for y in range(3):
        expected = [pixels for (name, _), pixels in sorted(synthetic.items()) if name == str(y)]
        own = taken[(tensors["labels"] == y).numpy()]
        assert len(own) == len(expected) == 12
        assert all(np.array_equal(a, b) for a, b in zip(own, expected, strict=True))


def test_some_classes_fewer_and_other_images(run, synthetic, tmp_path, capsys):
    words = [str(run), "--classes", "2", "0", "--per-class", "5", "--out", str(tmp_path / "few")]
    assert use_run.sample(words) == 0
    assert "10 images" in capsys.readouterr().out
    few = pictures(tmp_path / "few")
    expected = {key: pixels for key, pixels in synthetic.items() if key in few}
    assert few.keys() == {(str(k % 3), k) for k in range(15) if k % 3 != 1}
    for key, pixels in few.items():
        # The same images, in batches with other ones: to one grey level.
        assert np.abs(pixels.astype(int) - expected[key]).max() <= 1
    for number, option in enumerate((["--seed", "7"], ["--guidance-scale", "1"], ["--steps", "3"])):
        out = tmp_path / str(number)
        one = [str(run), "--classes", "1", "--per-class", "2", *option, "--out", str(out)]
        assert use_run.sample(one) == 0
        assert not np.array_equal(pictures(out)["1", 1], synthetic["1", 1]), option


def test_a_generator_without_its_run(run, synthetic, tmp_path):
    """Its own sampler's settings stay with the run: here the defaults hold, unless said."""
    words = ["--per-class", "2", "--steps", "4", "--guidance-scale"]
    scale = json.loads((run / "config.json").read_text())["sampling"]["guidance_scale"]
    out = tmp_path / "out"
    command = [str(run / "diffusion"), *words, str(scale), "--out", str(out)]
    assert use_run.sample(command) == 0
    for key, pixels in pictures(out).items():
        assert np.abs(pixels.astype(int) - synthetic[key]).max() <= 1


def test_what_is_there_is_left_alone(run, tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    for out in (tmp_path, tmp_path / "mine.txt"):
        with pytest.raises(ValueError, match="there already, and not an empty folder"):
            use_run.sample([str(run), "--out", str(out)])
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    (tmp_path / "empty").mkdir()
    use_run.sample([str(run), "--out", str(tmp_path / "empty"), "--per-class", "1"])
    assert len(pictures(tmp_path / "empty")) == 3


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--classes", "3"], "generates no class '3', only 0, 1, 2"),
        (["--guidance-scale", "nan"], "guidance scale nan"),
        (["--per-class", "0"], "must be at least 1"),
        (["--steps", "100000"], "100000"),
        (["--seed", "-1"], "seed -1"),
    ],
)
def test_wrong_wishes_leave_nothing(run, tmp_path, words, told):
    with pytest.raises(ValueError, match=told):
        use_run.sample([str(run), "--out", str(tmp_path / "out"), *words])
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_left_is_in_nobodys_way(run, tmp_path):
    left = tmp_path / ".out.part" / "1"
    left.mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(left / "999999.png")
    use_run.sample([str(run), "--out", str(tmp_path / "out"), "--per-class", "1"])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert set(pictures(tmp_path / "out")) == {("0", 0), ("1", 1), ("2", 2)}


# --- runs that cannot be used ------------------------------------------------------------------


def test_scores_that_were_cut_between_two_rows(run, tmp_path):
    """They would be other thresholds, and so other scores."""
    cut = tmp_path / "run"
    shutil.copytree(run, cut)
    table = cut / "amplifier" / "scores.csv"
    lines = table.read_text().splitlines(keepends=True)
    table.write_text("".join(lines[: len(lines) // 2]))
    with pytest.raises(ValueError, match=f"but the run has {len(lines) - 1} images"):
        use_run.score([str(cut), "--data", "digits"])


@pytest.mark.parametrize("command", ["score", "evaluate"])
def test_a_folder_without_a_run(command, tmp_path):
    with pytest.raises(ValueError, match="no run; name a folder that `ddb-fast run --out` made"):
        getattr(use_run, command)([str(tmp_path / "none")])


def test_a_folder_without_a_generator(tmp_path):
    with pytest.raises(ValueError, match=r"no run, and no model\.safetensors of a generator"):
        use_run.sample([str(tmp_path), "--out", str(tmp_path / "out")])
    save_tensors(tmp_path / "model.safetensors", {"x": torch.zeros(1)}, {})
    with pytest.raises(ValueError, match="not a diffusion model written by ddb_fast"):
        use_run.sample([str(tmp_path), "--out", str(tmp_path / "out")])


def test_a_run_that_lacks_what_is_asked(run, photos, tmp_path):
    out = tmp_path / "erm"
    train("--data", photos / "table.csv", "--out", out, methods="erm", classifier__images="64")
    with pytest.raises(ValueError, match="no finished bias amplifier: its methods need none"):
        use_run.score([str(out)])
    with pytest.raises(ValueError, match="no finished generator"):
        use_run.sample([str(out), "--out", str(tmp_path / "out")])
    tests = tmp_path / "tests"
    shutil.copytree(photos / "test", tests / "test")
    for words, told in (
        (["--methods", "jtt"], "no classifier of jtt, only of ddb-ii, erm"),
        (["--seeds", "0", "5"], "not every one of erm, ddb-ii has seed 5; all have 0, 1"),
        (["--data", str(photos / "test/1")], "no labels, which accuracies need"),
        (["--data", str(tests)], "no val images; it has test"),
    ):
        with pytest.raises(ValueError, match=told):
            use_run.evaluate([str(run), "--split", "val", *words])
    config = json.loads((out / "config.json").read_text()) | {"methods": ["ddb-ii"]}
    table = str(run / "amplifier/scores.csv")
    for load, told in ((None, "`ddb-fast run` goes on"), (table, f"of another run, {table}; name")):
        config["pseudo_labels"]["load"] = load
        (out / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=f"no finished bias amplifier: .*{told}"):
            use_run.score([str(out)])
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["stages"] = {"data": manifest["stages"]["data"]}
    (out / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="no finished classifier"):
        use_run.evaluate([str(out)])


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("score", ["run", "--corrupt", "maybe"]),
        ("evaluate", ["run", "--split", "all"]),
        ("sample", ["run"]),
        ("sample", ["run", "--out", "x", "--per-class", "many"]),
    ],
)
def test_wrong_words_are_one_line(command, words, capsys):
    with pytest.raises(SystemExit, match="2"):
        getattr(use_run, command)(words, prog=f"ddb-fast {command}")
    error = capsys.readouterr().err
    assert error.startswith(f"ddb-fast {command}: ") and error.count("\n") == 1
