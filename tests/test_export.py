"""`ddb-fast export`: folders that go without the run, checked, whole or not there."""

import importlib.util
import json
import re
import shlex
import shutil
import zipfile
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import small
from ddb_fast import export as module
from ddb_fast.checkpoint import load_tensors
from ddb_fast.classification import load_classifier, logits_of
from ddb_fast.cli import export as main
from ddb_fast.config import ClassifierConfig
from ddb_fast.export import export
from ddb_fast.generator import read_diffusion_config
from ddb_fast.pretrained import BiasAmplifier, Classifier, Generator

PAGE = small.ROOT / "docs" / "models.md"
HAS_ONNX = all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript"))
HAS_RUNTIME = importlib.util.find_spec("onnxruntime") is not None
needs_onnx = pytest.mark.skipif(not HAS_ONNX, reason="onnx and onnxscript are not installed")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of seconds, with two debiased classifiers."""
    out = tmp_path_factory.mktemp("reader") / "runs" / "demo"
    short = {f"{part}__images": "64" for part in ("diffusion", "amplifier", "classifier")}
    answer = small.ddb_fast(out, **short, audit="false")
    assert answer.returncode == 0, answer.stderr
    return out


def refused(*words):
    """The one line with which the command refuses."""
    with pytest.raises(ValueError) as caught:
        main([str(word) for word in words])
    line = str(caught.value)
    assert line and "\n" not in line
    return line


def names(folder):
    return {path.name for path in folder.iterdir()}


def python(page):
    """The examples of a page that are whole, as one script."""
    return "\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL))


@pytest.mark.parametrize(
    ("words", "kind", "where"),
    [
        (["--method", "ddb-i", "--seed", "1"], Classifier, "classifiers/ddb-i/seed1"),
        (["--method", "erm"], Classifier, "classifiers/erm/seed0"),
        (["--model", "amplifier"], BiasAmplifier, "amplifier"),
        (["--model", "diffusion"], Generator, "diffusion"),
    ],
)
def test_the_model_asked_for_is_exported(words, kind, where, run, tmp_path, capsys):
    assert main([str(run), "--out", str(tmp_path / "new" / "model"), *words]) == 0
    assert f"{kind.__name__}.from_pretrained reads it" in capsys.readouterr().out
    assert names(tmp_path / "new") == {"model"}
    assert names(tmp_path / "new" / "model") == {"README.md", "config.json", "model.safetensors"}
    model = kind.from_pretrained(tmp_path / "new" / "model")
    expected = load_tensors(run / where / "model.safetensors")[0]
    assert model.network.state_dict().keys() == expected.keys()
    for name, tensor in model.network.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    if kind is Generator:
        assert read_diffusion_config(tmp_path / "new" / "model") == model.config


@pytest.mark.parametrize("model", ["classifier", "amplifier"])
def test_a_program_answers_as_the_run_did(model, run, tmp_path, capsys, monkeypatch):
    words = ["--method", "ddb-ii"] if model == "classifier" else ["--model", "amplifier"]
    out = tmp_path / "program"
    assert main([str(run), "--out", str(out), "--format", "torch-export", *words]) == 0
    said = capsys.readouterr().out
    difference = float(re.search(r"largest difference to the model's logits: (\S+)", said)[1])
    assert 0 <= difference <= 1e-5
    assert names(out) == {"README.md", "config.json", "model.pt2"}
    where = "classifiers/ddb-ii/seed0" if model == "classifier" else "amplifier"
    network, config, _ = load_classifier(run / where / "model.safetensors")
    program = torch.export.load(str(out / "model.pt2")).module()
    for count in (1, 3, 9):
        images = torch.randint(0, 256, (count, 16, 16, 3), dtype=torch.uint8)
        logits = program(images.permute(0, 3, 1, 2) / 255)
        expected = logits_of(network, images, config, device=torch.device("cpu"), crop=True)
        assert torch.allclose(logits, expected, atol=1e-5)
    with zipfile.ZipFile(out / "model.pt2") as archive:
        for entry in archive.namelist():
            assert not archive.read(entry).startswith((b"PK\x03\x04", b"\x80\x02")), "a pickle"
            assert not places(archive.read(entry))
    monkeypatch.chdir(out)
    exec(python((out / "README.md").read_text()), {})
    assert "tensor" in capsys.readouterr().out


def places(content):
    """What of this machine a file names."""
    folders = (Path(torch.__file__).parents[1], Path(module.__file__).parents[1])
    return [str(folder) for folder in folders if str(folder).encode() in content]


@pytest.mark.parametrize(("name", "pixel_norm"), [("mlp", "double-255"), ("resnet18", "imagenet")])
def test_other_networks_and_normalisations_are_programs_too(name, pixel_norm):
    config = ClassifierConfig(
        images=1, batch_size=1, model=name, image_size=32, pixel_norm=pixel_norm
    )
    torch.manual_seed(0)
    model = Classifier(
        format=1,
        kind="classifier",
        classes=["a", "b"],
        network=asdict(config),
        images={"size": 32, "fit": "squash"},
        run={},
    ).eval()
    _, program = module.torch_program(model)
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    with torch.inference_mode():
        assert torch.allclose(program(images / 255), model(images), atol=1e-5)
        assert module.largest_difference(model, program) <= 1e-5


@needs_onnx
def test_onnx_answers_as_the_run_did(run, tmp_path, capsys, monkeypatch):
    out = tmp_path / "onnx"
    words = [str(run), "--out", str(out), "--format", "onnx", "--method", "ddb-ii"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert names(out) == {"README.md", "config.json", "model.onnx"}
    assert ("largest difference" in said) == HAS_RUNTIME
    assert ("not checked" in said) != HAS_RUNTIME
    assert not places((out / "model.onnx").read_bytes())
    if not HAS_RUNTIME:
        return
    import onnxruntime

    network, config, _ = load_classifier(run / "classifiers/ddb-ii/seed0/model.safetensors")
    images = torch.randint(0, 256, (7, 16, 16, 3), dtype=torch.uint8)
    pixels = (images.permute(0, 3, 1, 2) / 255).contiguous().numpy()
    session = onnxruntime.InferenceSession(out / "model.onnx")
    logits = torch.from_numpy(session.run(["logits"], {"images": pixels})[0])
    expected = logits_of(network, images, config, device=torch.device("cpu"), crop=True)
    assert torch.allclose(logits, expected, atol=1e-5)
    monkeypatch.chdir(out)
    exec(python((out / "README.md").read_text()), {})
    assert capsys.readouterr().out


@needs_onnx
def test_onnx_without_a_runtime_is_said_to_be_unchecked(run, tmp_path, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n == "onnxruntime" else find(n, *a)
    )
    out = str(tmp_path / "onnx")
    assert main([str(run), "--out", out, "--format", "onnx", "--model", "amplifier"]) == 0
    assert "not checked: onnxruntime is not installed" in capsys.readouterr().out


def test_onnx_without_its_packages_says_what_to_install(run, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    line = refused(run, "--out", tmp_path / "x", "--format", "onnx", "--model", "amplifier")
    assert "pip install onnx onnxscript" in line
    assert names(tmp_path) == set()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "say which method"),
        (["--method", "lff"], "no classifier of lff"),
        (["--method", "erm", "--seed", "3"], "no seed 3"),
        (["--model", "amplifier", "--method", "erm"], "are of classifiers"),
        (["--model", "diffusion", "--seed", "0"], "are of classifiers"),
        (["--model", "diffusion", "--format", "onnx"], "only classifier and amplifier"),
        (["--model", "diffusion", "--format", "torch-export"], "only classifier and amplifier"),
    ],
)
def test_what_cannot_be_exported_is_refused_and_leaves_nothing(words, told, run, tmp_path):
    assert told in refused(run, "--out", tmp_path / "x", *words)
    assert names(tmp_path) == set()


def test_what_is_there_is_left_alone(run, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    for name in ("full", "file"):
        line = refused(run, "--out", tmp_path / name, "--model", "amplifier")
        assert name in line and "not an empty folder" in line
    assert names(tmp_path / "full") == {"mine.txt"}
    assert (tmp_path / "file").read_text() == "mine"
    assert main([str(run), "--out", str(tmp_path / "empty"), "--model", "amplifier"]) == 0
    assert names(tmp_path) == {"full", "file", "empty"}
    assert "no run" in refused(tmp_path / "full", "--out", tmp_path / "x")


@pytest.mark.parametrize("wrong", [2e-5, float("nan"), float("inf")])
def test_a_program_that_answers_otherwise_is_not_written(wrong, run, tmp_path, monkeypatch):
    def planted(model):
        return b"program", lambda images: model(images) + wrong

    monkeypatch.setattr(module, "torch_program", planted)
    model = BiasAmplifier.from_run(run)
    with torch.no_grad():
        model.network.fc.weight.mul_(1e-3)  # logits below 1, where the bound is absolute
    with pytest.raises(ValueError, match=r"differ from the model's by .* nothing was written"):
        export(model, tmp_path / "x", format="torch-export")
    assert names(tmp_path) == set()
    monkeypatch.setattr(module, "torch_program", lambda m: (b"", lambda images: m(images)[:1]))
    with pytest.raises(ValueError, match="the program answers"):
        export(model, tmp_path / "x", format="torch-export")
    monkeypatch.setattr(module, "torch_program", lambda m: (b"", lambda images: m(images) + 5e-6))
    assert "difference" in export(model, tmp_path / "x", format="torch-export")


def test_a_killed_export_is_not_believed_and_is_cleared_away(run, tmp_path, monkeypatch):
    model, out = BiasAmplifier.from_run(run), tmp_path / "model"

    class Killed(BaseException):
        pass

    def kill(*_):
        raise Killed

    with monkeypatch.context() as patched:
        # As SIGKILL leaves it: the folder under its other name, without what cleans up.
        patched.setattr(BiasAmplifier, "save_description", kill)
        patched.setattr(shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(Killed):
            export(model, out, format="pretrained")
    assert names(tmp_path) == {".model.part"}
    with pytest.raises(ValueError, match=r"config\.json"):
        BiasAmplifier.from_pretrained(tmp_path / ".model.part")
    (tmp_path / ".model.part" / "stale").write_text("")
    export(model, out, format="pretrained")
    assert names(tmp_path) == {"model"}
    assert names(out) == {"README.md", "config.json", "model.safetensors"}


def test_a_full_disk_leaves_nothing(run, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_atomically", full)
    with pytest.raises(OSError, match="No space left"):
        export(BiasAmplifier.from_run(run), tmp_path / "x", format="torch-export")
    assert names(tmp_path) == set()


def test_the_page_about_models_is_true(run, monkeypatch, capsys):
    """Its commands of export, then its examples, in the folder where `runs/demo` lies."""
    monkeypatch.chdir(run.parents[1])
    page = PAGE.read_text()
    commands = [line for line in page.splitlines() if line.startswith("ddb-fast export ")]
    assert len(commands) == 4
    for command in commands:
        assert main(shlex.split(command)[2:]) == 0
    space = {}
    exec(python(page), space)
    assert space["drawn"].shape == (3, 3, 16, 16)
    assert space["loss"].shape == (4,) and space["logits"].shape == (5, 10)
    assert space["model"].description["run"]["seed"] == 1
    images, _ = load_tensors(Path("runs/demo/synthetic/images.safetensors"))
    assert torch.equal(space["again"], images["images"][:16])
    assert json.loads(Path("models/program/config.json").read_text())["kind"] == "classifier"
    assert capsys.readouterr().out
