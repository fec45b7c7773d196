"""Four lines of Python: the same files and figures as the command line's."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import ddb_fast
import small
from ddb_fast import apply, scoring
from ddb_fast.data.unseen import list_images
from ddb_fast.facade import Amplifier
from ddb_fast.provenance import FinishedRun

FIELDS = {k: v for k, v in small.FIELDS.items() if k not in ("methods", "seeds", "data.rho")}
FIELDS |= {"audit": False, "classifier.images": 640}


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    data = ddb_fast.load_data("digits", rho=0.9)
    out = tmp_path_factory.mktemp("facade") / "run"
    amplifier = ddb_fast.fit_amplifier(data, preset="digits", out=out, fields=FIELDS)
    return data, amplifier


def test_importing_the_package_imports_no_torch():
    code = "import sys, ddb_fast; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    with pytest.raises(AttributeError, match="no attribute 'fit'"):
        _ = ddb_fast.fit


def test_the_kernels_are_found_by_whoever_stands_in_a_checkout():
    """The sources come before an installed package; an editable install has a finder of its own."""
    code = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f)];"
        "import ddb_fast.kernels; print(ddb_fast.kernels.__file__)"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=small.ROOT
    )
    assert answer.returncode == 0, answer.stderr
    assert Path(answer.stdout.strip()) == small.ROOT / "kernels" / "__init__.py"


def test_scores_are_the_runs_own(fitted, monkeypatch):
    data, amplifier = fitted
    scores = amplifier.score(data.train)
    kept = scoring.read_scores(str(amplifier.finished.path / "amplifier" / "scores.csv"))
    assert list(scores.path) == list(data.train.paths) and len(scores) == len(data.train) == 1164
    assert torch.equal(torch.from_numpy(scores.y), data.train.y)
    np.testing.assert_allclose(scores.score, kept.score, rtol=1e-6)
    np.testing.assert_array_equal(scores.conflicting, kept.conflicting)
    with monkeypatch.context() as patch:
        asked = []
        patch.setattr(
            apply,
            "batches",
            lambda entries, *_, **k: asked.append((k["title"], k["progress"])) or (),
        )
        for images in (data.test, data):
            with pytest.raises(ValueError, match="can be read"):
                amplifier.score(images)
    assert asked == [(f"score {split}", False) for split in ("test", "train", "val", "test", "")]
    assert len(amplifier.score(data)) == 6333
    assert amplifier.report.exists() and amplifier.results["methods"] == {}
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    assert amplifier.model()(images).shape == (2, 10)


def test_a_classifier_is_trained_from_scores_changed_by_hand(fitted, tmp_path):
    data, amplifier = fitted
    scores = amplifier.score(data.train)
    truth = torch.tensor([e.a != e.y for e in data.listing.entries if e.split == "train"])
    scores.conflicting[:] = truth.numpy()
    out = tmp_path / "ddb-i"
    call = {"method": "ddb-i", "preset": "digits", "out": out, "fields": FIELDS}
    model = ddb_fast.debias(data, scores, **call)
    assert model(torch.zeros(1, 3, 16, 16, dtype=torch.uint8)).shape == (1, 10)
    kept = scoring.read_scores(out / "amplifier" / "scores.csv")
    assert torch.equal(kept.conflicting, truth)
    assert not (out / "diffusion").exists()
    results = (out / "results.json").read_text()
    assert json.loads(results)["amplifier"]["pseudo_recall"] == 1.0
    weights = (out / "classifiers/ddb-i/seed0/model.safetensors").stat().st_mtime_ns

    ddb_fast.debias(data, scores, **call)
    again = (out / "classifiers/ddb-i/seed0/model.safetensors").stat().st_mtime_ns
    assert again == weights, "the same scores from another file: nothing is trained again"

    scores.conflicting[0] ^= True
    with pytest.raises(ValueError, match=r"pseudo_labels\.load is"):
        ddb_fast.debias(data, scores, **call)


def test_what_a_notebook_shows_is_a_line(fitted):
    data, amplifier = fitted
    assert repr(data) == "Data(digits: 10 classes, 1164 train, 129 val, 5040 test images)"
    assert repr(data.val) == "Part(digits: 129 val images)"
    assert repr(amplifier) == f"Amplifier({amplifier.finished.path})"
    scores = amplifier.score(data.val)
    assert repr(scores) == "ScoreTable(129 images, 10 classes)"
    assert repr(replace(scores, y=None)) == "ScoreTable(129 images, 10 classes)"


def test_columns_of_a_table_are_as_long_as_it(fitted):
    scores = fitted[1].score(fitted[0].val)
    with pytest.raises(ValueError, match="conflicting has 3 values for 129 images"):
        replace(scores, conflicting=np.zeros(3, bool))


def test_refusals(fitted, tmp_path):
    data, amplifier = fitted
    scores = amplifier.score(data.train)
    with pytest.raises(ValueError, match="takes no scores; one of ddb-i"):
        ddb_fast.debias(data, scores, method="erm")
    half = scores.where(np.arange(len(scores)) % 2 == 0)
    with pytest.raises(ValueError, match="no row of training image"):
        ddb_fast.debias(data, half, preset="digits", out=tmp_path / "half", fields=FIELDS)
    with pytest.raises(ValueError, match="nowhere"):
        ddb_fast.load_data(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"unknown field: diffusion\.imagez"):
        ddb_fast.fit_amplifier(data, preset="digits", fields={"diffusion.imagez": 3})
    assert FinishedRun.open(amplifier.finished.path).classifiers == {}


@pytest.fixture
def folder(tmp_path):
    """Two classes of ten files, which nothing here decodes."""
    for name in ("disc", "square"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(10):
            (tmp_path / "photos" / name / f"{i}.png").touch()
    return tmp_path / "photos"


def test_the_split_is_chosen_where_the_images_are_listed(folder, monkeypatch):
    plain = ddb_fast.load_data(folder)
    assert [len(part) for part in (plain.train, plain.val, plain.test)] == [14, 2, 4]
    data = ddb_fast.load_data(folder, validation_share=0, test_share=0.5)
    assert [len(part) for part in (data.train, data.val, data.test)] == [10, 0, 10]
    for share in (1.5, -0.1, float("nan")):
        with pytest.raises(ValueError, match=r"data\.test_share: .* is outside 0\.0 to 1\.0"):
            ddb_fast.load_data(folder, test_share=share)
    with pytest.raises(ValueError, match=r"data\.validation_share: 'half' is not a number"):
        ddb_fast.load_data(folder, validation_share="half")

    configs = []
    monkeypatch.setattr("ddb_fast.facade.run", configs.append)
    with pytest.raises(ValueError, match="absent"):
        ddb_fast.fit_amplifier(data, out=folder.parent / "absent")
    assert (configs[0].data.validation_share, configs[0].data.test_share) == (0, 0.5)
    for name in ("data.test_share", "data.corrupt"):
        with pytest.raises(ValueError, match=f"fields: {name}: the images are as load_data"):
            ddb_fast.fit_amplifier(data, fields={name: 0.5})
    assert len(configs) == 1


def test_what_is_not_loaded_data_is_refused(folder):
    data = ddb_fast.load_data(folder)
    amplifier = Amplifier(finished=None, device=torch.device("cpu"))
    for wrong in (str(folder), folder, None):
        with pytest.raises(ValueError, match="score takes what load_data gives"):
            amplifier.score(wrong)
        with pytest.raises(ValueError, match="data: give what load_data gives"):
            ddb_fast.fit_amplifier(wrong)
        with pytest.raises(ValueError, match="scores: a table, as score gives, is needed"):
            ddb_fast.debias(data, wrong)
    with pytest.raises(ValueError, match="all of it"):
        ddb_fast.fit_amplifier(data.train)


@pytest.fixture
def asked(monkeypatch):
    """Without training: the configurations of the runs, and an amplifier of one with classes."""
    configs = []
    monkeypatch.setattr("ddb_fast.facade.run", configs.append)
    monkeypatch.setattr("ddb_fast.facade.FinishedRun.open", lambda path: path)
    config = SimpleNamespace(data=SimpleNamespace(corrupt="error"), progress=False)
    amplifier = Amplifier(SimpleNamespace(config=config), torch.device("cpu"))
    return configs, amplifier


def test_rows_are_in_the_order_of_what_was_given(tmp_path, monkeypatch, asked):
    """The run numbers its classes 0, 1, 2, 10; a folder sorts them 0, 1, 10, 2."""
    for name in ("2", "10"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(10):
            (tmp_path / "photos" / name / f"{i}.png").touch()
    data = ddb_fast.load_data(tmp_path / "photos")
    assert data.train.paths[0].startswith("10/")

    def score(run, config, **_):
        entries = list_images(config, [str(i) for i in range(11)]).entries
        y, paths = (np.array([getattr(e, name) for e in entries]) for name in ("y", "path"))
        split = np.array([e.split for e in entries])
        shown = {"path": paths, "split": split, "y": y, "predicted": y}
        return scoring.ScoreTable(classes=(), probabilities=np.zeros((len(y), 0)), **shown)

    monkeypatch.setattr("ddb_fast.apply.score", score)
    for part in (data.train, data.val, data.test):
        scores = asked[1].score(part)
        assert tuple(scores.path) == part.paths
        assert [data.classes[y] for y in part.y] == [str(y) for y in scores.y]
    assert tuple(asked[1].score(data).path) == data.listing.paths


def test_images_that_have_changed_since_they_were_listed_are_refused(folder, asked):
    data = ddb_fast.load_data(folder)
    ddb_fast.fit_amplifier(data)
    (folder / "disc" / "0.png").rename(folder / "square" / "00.png")
    for call in (ddb_fast.fit_amplifier, asked[1].score):
        with pytest.raises(ValueError, match="have changed since load_data; load them again"):
            call(data)
    assert len(asked[0]) == 1


def test_a_process_may_change_its_folder(folder, asked, monkeypatch):
    monkeypatch.chdir(folder.parent)
    data = ddb_fast.load_data("photos")
    amplifier = ddb_fast.fit_amplifier(data, out="out")
    assert amplifier.finished == folder.parent / "out"
    (folder.parent / "other").mkdir()
    monkeypatch.chdir(folder.parent / "other")
    ddb_fast.fit_amplifier(data, out="out")
    assert [config.data.path for config in asked[0]] == [str(folder)] * 2


def test_only_the_word_digits_is_the_embedded_set(folder, monkeypatch):
    named = folder.rename(folder.parent / "digits")
    monkeypatch.chdir(named.parent)
    for path in (Path("digits"), Path("./digits"), "./digits"):
        data = ddb_fast.load_data(path)
        assert (data.config.path, data.classes) == (str(named), ("disc", "square"))
    assert ddb_fast.load_data("digits").config.source == "digits"


def test_the_device_is_the_one_that_the_run_takes(folder, asked, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    data = ddb_fast.load_data(folder)
    for exported, device in (("1", "cpu"), ("true", "cpu"), ("0", "cuda"), ("false", "cuda")):
        monkeypatch.setenv("ACCELERATE_USE_CPU", exported)
        assert ddb_fast.fit_amplifier(data).device == torch.device(device)


def test_what_is_no_path_and_no_fields_is_refused(folder):
    for wrong in (np.zeros((4, 8, 8, 3)), ["a.png"], None):
        with pytest.raises(ValueError, match="load_data takes the path of a folder or a CSV; got"):
            ddb_fast.load_data(wrong)
    data = ddb_fast.load_data(folder)
    with pytest.raises(ValueError, match="fields: names and values are needed"):
        ddb_fast.fit_amplifier(data, fields=["a"])
    with pytest.raises(ValueError, match=r"fields: diffusion: .* diffusion\.FIELD"):
        ddb_fast.fit_amplifier(data, fields={"diffusion": {"images": 3}})


def test_a_refusal_does_not_name_the_file_that_scores_pass_through(folder, monkeypatch):
    data = ddb_fast.load_data(folder)

    def refuse(config):
        raise ValueError(f"{config.pseudo_labels.load}: no row of training image disc/1.png")

    monkeypatch.setattr("ddb_fast.facade.run", refuse)
    y = data.train.y.numpy()
    shown = {"path": np.array(data.train.paths), "split": np.full(len(y), "train"), "y": y}
    scores = scoring.ScoreTable(
        classes=(), predicted=y, probabilities=np.zeros((len(y), 0)), **shown, loss=y.astype("f4")
    )
    with pytest.raises(ValueError, match=r"^scores: no row of training image disc/1\.png$"):
        ddb_fast.debias(data, scores)


def test_fields_that_the_call_itself_decides_are_refused(folder):
    data = ddb_fast.load_data(folder)
    with pytest.raises(ValueError, match=r"fields: methods: the call itself decides it"):
        ddb_fast.fit_amplifier(data, fields={"methods": ["erm"]})
    with pytest.raises(ValueError, match=r"fields: out: the call itself decides it"):
        ddb_fast.fit_amplifier(data, out=folder / "out", fields={"out": "elsewhere"})
