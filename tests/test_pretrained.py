"""Models taken away from a run: the same answers, honest cards, one line for what is wrong."""

import csv
import errno
import html
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import constants, hub_mixin
from PIL import Image
from torch.nn import functional as F

import small
from ddb_fast import checkpoint, pretrained
from ddb_fast.checkpoint import load_tensors
from ddb_fast.classification import load_classifier, logits_of
from ddb_fast.data.store import squash
from ddb_fast.diffusion.generate import generate_batch, plan
from ddb_fast.diffusion.schedule import make_schedule
from ddb_fast.generator import load_diffusion
from ddb_fast.model_card import plain
from ddb_fast.pretrained import BiasAmplifier, Classifier, Generator
from ddb_fast.provenance import shown_command

LARGE, SMALL = 20, 16
KINDS = [Classifier, BiasAmplifier, Generator]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of seconds whose networks see other sizes than its copies of the images have."""
    out = tmp_path_factory.mktemp("secret-place") / "run"
    short = {f"{part}__images": "128" for part in ("diffusion", "amplifier", "classifier")}
    sizes = {"data__cache_size": str(LARGE), "amplifier__image_size": "12"}
    answer = small.ddb_fast(out, **short, **sizes, methods="erm ddb-ii", audit="false")
    assert answer.returncode == 0, answer.stderr
    return out


@pytest.fixture(scope="module")
def folders(run, tmp_path_factory):
    """Each kind saved once."""
    root = tmp_path_factory.mktemp("models")
    for kind in KINDS:
        kind.from_run(run).save_pretrained(root / kind.__name__)
    return root


@pytest.fixture
def copy(run, tmp_path):
    """The run's folder, to be damaged."""
    return Path(shutil.copytree(run, tmp_path / "run"))


def cached(run, name, size):
    """The run's decoded images, (N, size, size, 3) uint8."""
    pixels = np.fromfile(run / "cache" / f"{name}.u8", dtype=np.uint8)
    return torch.from_numpy(pixels.reshape(-1, size, size, 3))


def rows(run):
    with (run / "amplifier" / "scores.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@torch.inference_mode()
def answers(model, images):
    """Logits of NHWC images in the batches of the run's evaluation."""
    return torch.cat([model(part.permute(0, 3, 1, 2)) for part in images.split(256)])


def refused(error, call, *arguments, **options):
    """The one line with which a call is refused."""
    with pytest.raises(error) as caught:
        call(*arguments, **options)
    line = str(caught.value)
    assert line and "\n" not in line
    return line


def same_weights(one, other):
    """Assert that two files hold the same tensors and metadata, which safetensors writes anyhow."""
    (first, about), (second, also) = (load_tensors(path) for path in (one, other))
    assert first.keys() == second.keys() and about == also
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def same_folder(one, other):
    """Assert that two folders hold the same model."""
    assert {path.name for path in one.iterdir()} == {path.name for path in other.iterdir()}
    same_weights(one / "model.safetensors", other / "model.safetensors")
    for name in ("README.md", "config.json"):
        assert (one / name).read_bytes() == (other / name).read_bytes()


def rewritten(folder, to, **changes):
    """A copy of a model's folder with another config.json."""
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text()) | changes
    (to / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return to


# --- the same answers --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Classifier, BiasAmplifier])
def test_logits_are_those_of_the_evaluation_bit_for_bit(kind, run, folders):
    target = kind is Classifier
    where = "classifiers/ddb-ii/seed0" if target else "amplifier"
    images = cached(run, "large", LARGE) if target else cached(run, "small", SMALL)
    network, config, classes = load_classifier(run / where / "model.safetensors")
    expected = logits_of(network, images, config, device=CPU, crop=target)
    model = kind.from_pretrained(folders / kind.__name__)
    assert not model.training and model.classes == classes
    assert torch.equal(answers(model, images), expected)
    assert torch.equal(answers(model, images.float() / 255), expected)
    assert torch.equal(answers(model, images.double() / 255), expected)
    names = model.predict(images[:300].permute(0, 3, 1, 2))
    assert names == [classes[label] for label in expected[:300].argmax(1)]


@pytest.mark.parametrize("seed", [0, 1])
def test_predictions_give_the_accuracy_of_the_results(seed, run):
    model = Classifier.from_run(run, method="erm", seed=seed)
    table = rows(run)
    test = [i for i, row in enumerate(table) if row["split"] == "test"]
    names = model.predict(cached(run, "large", LARGE)[test].permute(0, 3, 1, 2))
    correct = [name == table[i]["y"] for name, i in zip(names, test, strict=True)]
    metrics = small.results(run)["methods"]["erm"]["metrics"]
    assert sum(correct) / len(test) == metrics["average_accuracy"]["seeds"][seed]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_network_in_another_number_format_takes_images_all_the_same(dtype, run):
    images = torch.randint(0, 256, (40, SMALL, SMALL, 3), dtype=torch.uint8)
    model = Classifier.from_run(run, method="erm", seed=0)
    expected = answers(model, images)
    logits = answers(model.to(dtype), images)
    assert logits.dtype == torch.float32
    bound = 1e-5 if dtype == torch.float64 else 5e-2
    torch.testing.assert_close(logits, expected, rtol=bound, atol=bound)


def test_the_amplifiers_losses_are_those_of_the_scores(run):
    table = rows(run)
    logits = answers(BiasAmplifier.from_run(run), cached(run, "small", SMALL))
    y = torch.tensor([int(row["y"]) for row in table])
    loss = F.cross_entropy(logits.double(), y, reduction="none")
    expected = torch.tensor([float(row["loss"]) for row in table], dtype=torch.float64)
    assert torch.allclose(loss, expected, rtol=1e-6, atol=1e-7)


def test_the_generator_draws_the_runs_own_images_again(run, folders):
    generator = Generator.from_pretrained(folders / "Generator")
    tensors, _ = load_tensors(run / "synthetic" / "images.safetensors")
    images = generator.sample(tensors["labels"][:40], tensors["seeds"][:40], batch_size=16)
    assert torch.equal(images, tensors["images"][:40])
    assert len(images.unique(dim=0)) == 40


def test_sampling_takes_other_guidance_steps_and_samplers(run, folders):
    unet, config, _ = load_diffusion(run / "diffusion")
    labels, seeds = plan(3, 2, 5)
    expected = generate_batch(
        unet,
        labels,
        seeds,
        schedule=make_schedule(config),
        target=config.target,
        sampler="ddim",
        steps=3,
        guidance_scale=1.5,
        clip_x0=True,
        pixel_norm=config.pixel_norm,
        image_size=SMALL,
        pad_to=6,
    )
    generator = Generator.from_pretrained(folders / "Generator")
    asked = {"guidance_scale": 1.5, "steps": 3, "sampler": "ddim"}
    drawn = generator.sample(labels.tolist(), seeds.tolist(), **asked)
    assert torch.equal(drawn, expected)
    assert not torch.equal(generator.sample(labels, seeds), expected)
    x, t = torch.randn(6, 3, SMALL, SMALL), torch.arange(6)
    assert torch.equal(generator(x, t, labels), unet(x, t, labels))


def test_every_batch_is_padded_to_one_size(folders, monkeypatch):
    sizes = []

    def drawn(unet, y, seeds, *, pad_to, **_):
        sizes.append((len(y), pad_to))
        return torch.zeros(len(y), 3, SMALL, SMALL, dtype=torch.uint8)

    monkeypatch.setattr("ddb_fast.diffusion.generate.generate_batch", drawn)
    generator = Generator.from_pretrained(folders / "Generator")
    assert len(generator.sample([0] * 20, range(20), batch_size=8)) == 20
    generator.sample([0] * 5, range(5))
    generator.sample([0] * 20, range(20))
    assert sizes == [(8, 8), (8, 8), (4, 8), (5, 5), (16, 16), (4, 16)]


def test_images_of_any_size_are_seen_as_the_view_says(run, folders):
    images = torch.randint(0, 256, (5, 3, 31, 44), dtype=torch.uint8)
    classifier = Classifier.from_pretrained(folders / "Classifier")
    square = images[:, :, :, 6:37].permute(0, 2, 3, 1)
    expected = logits_of(
        classifier.network, square, classifier.config, device=CPU, crop=True
    )  # of the centre, 31 pixels wide
    with torch.inference_mode():
        assert torch.equal(classifier(images), expected)
        amplifier = BiasAmplifier.from_pretrained(folders / "BiasAmplifier")
        whole = F.interpolate(images.float(), (12, 12), mode="bilinear", antialias=True)
        whole = (whole / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        assert torch.allclose(amplifier(images), amplifier.network(whole), atol=1e-5)
    assert amplifier.predict(images[:0]) == []


def test_files_become_the_runs_pixels(run, folders, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (50, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    kept = cached(run, "large", LARGE)[7]
    Image.fromarray(kept.numpy()).save(tmp_path / "b.png")
    classifier = Classifier.from_pretrained(folders / "Classifier")
    read = classifier.read(tmp_path / "a.png", str(tmp_path / "b.png"))
    centre = Image.fromarray(pixels).resize(
        (LARGE, LARGE), Image.Resampling.BICUBIC, box=(0, 5, 40, 45)
    )
    assert read.dtype == torch.uint8 and read.shape == (2, 3, LARGE, LARGE)
    assert np.array_equal(read[0].permute(1, 2, 0), np.array(centre))
    assert torch.equal(read[1].permute(1, 2, 0), kept)
    amplifier = BiasAmplifier.from_pretrained(folders / "BiasAmplifier")
    assert torch.equal(
        amplifier.read(tmp_path / "a.png")[0], squash(Image.open(tmp_path / "a.png"), SMALL)
    )
    (tmp_path / "c.png").write_bytes(b"nothing")
    assert "c.png" in refused(ValueError, classifier.read, tmp_path / "c.png")


def test_gradients_reach_the_pixels(folders):
    model = Classifier.from_pretrained(folders / "Classifier")
    images = torch.rand(2, 3, 24, 24, requires_grad=True)
    model(images).sum().backward()
    assert images.grad.abs().sum() > 0


def test_a_compiler_takes_the_model_whole(folders):
    model = Classifier.from_pretrained(folders / "Classifier")
    images = torch.rand(2, 3, 24, 30)
    with torch.inference_mode():
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert torch.equal(compiled(images), model(images))


# --- folders and the Hub -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_is_readable_and_comes_out_the_same_again(kind, folders, tmp_path):
    folder = folders / kind.__name__
    names = {"README.md", "config.json", "model.safetensors"}
    assert {path.name for path in folder.iterdir()} == names
    config = json.loads((folder / "config.json").read_text())
    assert config["format"] == 1 and config["kind"] == kind.kind
    assert config["classes"] == [str(digit) for digit in range(10)]
    kind.from_pretrained(folder).save_pretrained(tmp_path / "again")
    same_folder(tmp_path / "again", folder)


def test_weights_are_files_that_runs_read_too(run, folders):
    pairs = {
        run / "classifiers" / "ddb-ii" / "seed0": folders / "Classifier",
        run / "amplifier": folders / "BiasAmplifier",
        run / "diffusion": folders / "Generator",
    }
    for there, here in pairs.items():
        same_weights(there / "model.safetensors", here / "model.safetensors")


def test_a_place_in_the_configuration_stays_behind(copy):
    path = copy / "classifiers" / "ddb-ii" / "seed0" / "model.safetensors"
    network, config, classes = load_classifier(path)
    config = pretrained.replace(config, weights="/home/me/weights.safetensors")
    pretrained.save_classifier(path, network, config, classes)
    model = Classifier.from_run(copy)
    model.save_pretrained(copy.parent / "model")
    for file in (copy.parent / "model").iterdir():
        assert b"/home/me" not in file.read_bytes()
    assert "first weights were not random" in (copy.parent / "model/README.md").read_text()
    assert Classifier.from_pretrained(copy.parent / "model").config.weights == "file"


def test_another_models_card_is_not_left_beside_the_weights(run, tmp_path):
    folder = tmp_path / "model"
    first = Classifier.from_run(run, method="erm")
    first.save_pretrained(folder)
    first.save_pretrained(folder)
    shutil.copytree(folder, tmp_path / "before")
    line = refused(ValueError, Classifier.from_run(run).save_pretrained, folder)
    assert "README.md" in line
    same_folder(folder, tmp_path / "before")


def test_a_full_disk_leaves_no_half_card_which_would_be_anothers(
    run, folders, tmp_path, monkeypatch
):
    folder, own = tmp_path / "model", checkpoint._replace

    def full(temporary, path):
        if path.name == "README.md":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        own(temporary, path)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "_replace", full)
        with pytest.raises(OSError, match=r"No space left .*README\.md"):
            BiasAmplifier.from_run(run).save_pretrained(folder)
    assert not (folder / "README.md").exists()
    BiasAmplifier.from_run(run).save_pretrained(folder)
    same_folder(folder, folders / "BiasAmplifier")


def test_pushing_uploads_the_folder_and_loading_asks_for_two_files(folders, tmp_path, monkeypatch):
    uploaded, asked = tmp_path / "uploaded", []

    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, **_):
            return type("Url", (), {"repo_id": repo_id})

        def upload_folder(self, *, folder_path, repo_id, **_):
            shutil.copytree(folder_path, uploaded)
            return repo_id

    monkeypatch.setattr(hub_mixin, "HfApi", Api)
    folder = folders / "BiasAmplifier"
    assert BiasAmplifier.from_pretrained(folder).push_to_hub("me/amplifier") == "me/amplifier"
    same_folder(uploaded, folder)

    def download(repo_id, name, **options):
        asked.append((repo_id, name, options["revision"]))
        return str(folder / name)

    monkeypatch.setattr(pretrained, "hf_hub_download", download)
    model = BiasAmplifier.from_pretrained("me/amplifier", revision="v1")
    names = ("config.json", "model.safetensors")
    assert asked == [("me/amplifier", name, "v1") for name in names]
    assert model.description == BiasAmplifier.from_pretrained(folder).description


# --- what is wrong is said in a line -----------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_no_run_there(kind, run, tmp_path):
    assert "no run" in refused(ValueError, kind.from_run, tmp_path / "nothing")
    assert "no run" in refused(ValueError, kind.from_run, run / "amplifier")


def test_the_classifier_meant_has_to_be_there(copy):
    assert Classifier.from_run(copy).description["run"]["method"] == "ddb-ii"
    assert "only of ddb-ii, erm" in refused(ValueError, Classifier.from_run, copy, method="lff")
    assert "only 0, 1" in refused(ValueError, Classifier.from_run, copy, method="erm", seed=7)
    manifest = json.loads((copy / "manifest.json").read_text())
    stages = manifest["stages"]
    stages["ddb-i/seed1"] = stages["ddb-ii/seed1"]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    line = refused(ValueError, Classifier.from_run, copy)
    assert "say which method" in line and "ddb-i, ddb-ii, erm" in line
    stages["ddb-i/seed1"] = {**stages["ddb-i/seed1"], "done": False}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    assert Classifier.from_run(copy).description["run"]["method"] == "ddb-ii"


def test_only_erm_is_taken_where_there_is_nothing_else(copy):
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["stages"] = {k: v for k, v in manifest["stages"].items() if k.startswith("erm")}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    assert Classifier.from_run(copy).description["run"]["method"] == "erm"
    assert "no finished bias amplifier" in refused(ValueError, BiasAmplifier.from_run, copy)
    assert "no finished generator" in refused(ValueError, Generator.from_run, copy)
    manifest["stages"] = {}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    assert "no finished classifier" in refused(ValueError, Classifier.from_run, copy)


@pytest.mark.parametrize("name", ["config.json", "manifest.json", "results.json"])
def test_damaged_files_of_a_run(name, copy):
    text = (copy / name).read_text()
    (copy / name).write_text(text[: len(text) // 2])
    assert "cut short" in refused(ValueError, Classifier.from_run, copy)
    (copy / name).write_text("{}")
    assert str(copy) in refused(ValueError, Classifier.from_run, copy)


def test_a_run_without_results_says_so(copy, tmp_path):
    (copy / "results.json").unlink()
    (copy / "amplifier" / "scores.csv").unlink()
    Classifier.from_run(copy).save_pretrained(tmp_path / "model")
    card = (tmp_path / "model" / "README.md").read_text()
    assert "None recorded" in card and "is not recorded" in card
    Generator.from_run(copy).save_pretrained(tmp_path / "generator")
    assert "Not measured" in (tmp_path / "generator" / "README.md").read_text()
    (copy / "cache" / "meta.json").unlink()
    line = refused(ValueError, BiasAmplifier.from_run, copy)
    assert "meta.json" in line and "makes it again" in line


def test_a_folder_of_another_kind_names_the_class_to_use(folders):
    for kind in KINDS:
        for other in KINDS:
            if kind is not other:
                line = refused(ValueError, kind.from_pretrained, folders / other.__name__)
                assert f"use {other.__name__}.from_pretrained" in line


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": 2}, "format 2"),
        ({"format": True}, "format True"),
        ({"kind": "poem"}, "holds a poem"),
        ({"kind": None}, "holds a None"),
        ({"run": None}, "run is missing"),
        ({"run": 5}, "run holds no fields"),
        ({"extra": 1}, "extra is missing or unknown"),
        ({"classes": "abc"}, "classes"),
        ({"classes": ["a", 3]}, "classes"),
        ({"network": {"model": "cnn"}}, "network"),
        ({"network": 3}, "network"),
        ({"images": {"size": "large", "fit": "squash"}}, "images.size"),
        ({"classes": ["a", "b"]}, "another shape"),
    ],
)
def test_a_description_that_is_wrong(changes, words, folders, tmp_path):
    folder = rewritten(folders / "Classifier", tmp_path / "model", **changes)
    assert words in refused(ValueError, Classifier.from_pretrained, folder)


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_folders(kind, folders, tmp_path):
    folder = Path(shutil.copytree(folders / kind.__name__, tmp_path / "model"))
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    assert "model.safetensors" in refused(ValueError, kind.from_pretrained, folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "model.safetensors" in refused(ValueError, kind.from_pretrained, folder)
    config = (folder / "config.json").read_text()
    for text in (config[:50], "[]", "", "\udcff"):
        (folder / "config.json").write_text(text, errors="surrogateescape")
        assert "config.json" in refused(ValueError, kind.from_pretrained, folder)
    (folder / "config.json").unlink()
    assert "config.json" in refused(ValueError, kind.from_pretrained, folder)


def test_names_that_are_nowhere(monkeypatch, tmp_path):
    line = refused(ValueError, Classifier.from_pretrained, tmp_path / "no" / "such")
    assert "no such folder" in line
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    line = refused(OSError, Classifier.from_pretrained, "nobody/nothing", cache_dir=tmp_path)
    assert "nobody/nothing: no such folder" in line


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (torch.zeros(3, 8, 8), "(3, 8, 8)"),
        (torch.zeros(2, 1, 8, 8), "(2, 1, 8, 8)"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.int64), "int64"),
        (torch.full((2, 3, 8, 8), 255.0), "[255, 255]"),
        (torch.full((2, 3, 8, 8), -0.5), "[-0.5, -0.5]"),
        (torch.full((2, 3, 8, 8), torch.nan), "nan"),
        (torch.zeros(2, 3, 0, 8), "(2, 3, 0, 8)"),
        (np.zeros((2, 3, 8, 8), np.uint8), "a tensor (N, 3, H, W) that has pixels, got ndarray"),
        ([torch.zeros(3, 8, 8)], "got list"),
        (Image.new("RGB", (8, 8)), "got Image"),
    ],
)
def test_images_that_are_none(images, words, folders):
    model = Classifier.from_pretrained(folders / "Classifier")
    assert words in refused(ValueError, model, images)
    assert words in refused(ValueError, model.predict, images)


@pytest.mark.parametrize(
    ("files", "got"),
    [((), "none"), ((["a.png"],), "list"), (("a.png", Image.new("RGB", (8, 8))), "Image")],
)
def test_files_that_are_none(files, got, folders):
    model = Classifier.from_pretrained(folders / "Classifier")
    assert "read takes paths, as in" in refused(ValueError, model.read, *files)
    assert f"got {got}" in refused(ValueError, model.read, *files)


@pytest.mark.parametrize(
    ("labels", "seeds", "options", "words"),
    [
        ([0, 10], [1, 2], {}, "label 10"),
        ([-1], [1], {}, "label -1"),
        ([0], [-4], {}, "seed -4"),
        ([0.5], [1], {}, "whole numbers"),
        (["0"], [1], {}, "whole numbers"),
        ([0], [2**63], {}, "whole numbers"),
        ([0, 1], [1], {}, "as many"),
        ([], [], {}, "at least one"),
        ([[0]], [[0]], {}, "as many"),
        ([0], [0], {"sampler": "magic"}, "magic"),
        ([0], [0], {"batch_size": 0}, "batch_size 0"),
        ([0], [0], {"steps": 0}, "0"),
    ],
)
def test_samples_that_cannot_be_drawn(labels, seeds, options, words, folders):
    generator = Generator.from_pretrained(folders / "Generator")
    assert words in refused(ValueError, generator.sample, labels, seeds, **options)


# --- the card ----------------------------------------------------------------------------------


def front_matter(card):
    """The metadata of a card, and the page below it."""
    _, metadata, page = card.split("---\n", 2)
    return yaml.safe_load(metadata), page


def tables(page):
    """Tables of a page as cells, split where no backslash stands before the pipe."""
    found, table = [], []
    for line in [*page.splitlines(), ""]:
        if line.startswith("|"):
            table.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
        elif table:
            found.append(table)
            table = []
    return found


def block(page, language="python"):
    (code,) = re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)
    return code


@pytest.mark.parametrize("kind", KINDS)
def test_a_cards_metadata_and_code_are_good(kind, folders, monkeypatch, capsys):
    metadata, page = front_matter((folders / kind.__name__ / "README.md").read_text())
    assert metadata["library_name"] == "ddb-fast" and "license" not in metadata
    assert "ddb-fast" in metadata["tags"] and kind.kind in metadata["tags"]
    assert ("pipeline_tag" in metadata) == (kind is Classifier)
    monkeypatch.chdir(folders / kind.__name__)
    exec(block(page), {})
    assert capsys.readouterr().out


def test_a_classifiers_card_tells_the_results(run, folders):
    _, page = front_matter((folders / "Classifier" / "README.md").read_text())
    metrics, groups, counts = tables(page)
    told = small.results(run)["methods"]["ddb-ii"]
    for heading, name in (("average", "average_accuracy"), ("conflicting", "conflicting_accuracy")):
        summary = told["metrics"][name]
        first, second = (f"{100 * value:.1f}" for value in summary["seeds"])
        spread = f"{100 * summary['mean']:.1f} ± {100 * summary['std']:.1f}"
        assert [heading, first, spread, f"{first} {second}"] in metrics
    assert len(groups) == 2 + len(told["groups"])
    for row, group in zip(groups[2:], told["groups"], strict=True):
        assert row == [group["name"], str(group["n"]), f"{100 * group['accuracy'][0]:.1f}"]
    splits = [row["split"] for row in rows(run)]
    assert counts[-1] == ["all", *(str(splits.count(s)) for s in ("train", "val", "test"))]
    versions = json.loads((run / "manifest.json").read_text())["versions"]
    assert f"torch {versions['torch']}" in page
    assert f"git {versions['git']}" in page or versions["git"] is None
    assert "ddb-fast run digits --out ..." in block(page, "sh")


def test_an_amplifiers_card_warns(run, folders):
    page = (folders / "BiasAmplifier" / "README.md").read_text()
    assert "Not a classifier" in page and "never saw a real image" in page
    assert f"AUROC {small.results(run)['amplifier']['auroc']:.4f}" in page
    assert "may repeat training images" in (folders / "Generator" / "README.md").read_text()


def test_nothing_tells_where_files_lie(run, folders):
    paths = [row["path"] for row in rows(run)]
    for file in folders.rglob("*"):
        if file.is_file():
            text = file.read_bytes().decode(errors="replace")
            assert "secret-place" not in text and "ddb_fast/cli.py" not in text
            assert not any(path in text or Path(path).name in text for path in paths[:50])


HOSTILE = [
    "a|b",
    "---\nlicense: mit\n---",
    "<script>alert(1)</script>",
    "# heading\n\n- item",
    "[x](javascript:0) ![y](z)",
    "`code` **bold** _it_ ~~no~~ $x$ &amp;",
    "trailing \\",
    "{{ run }} {% raw %}",
    "\u202eevil\x00\x1b[31m",
    "日本 été",
]


def test_hostile_names_stay_names(folders, tmp_path):
    description = json.loads((folders / "Classifier" / "config.json").read_text())
    about = description["run"]
    about["groups"] = about["groups"][:10]
    for group, name in zip(about["groups"], HOSTILE, strict=True):
        group["name"] = name
    about |= {"dataset": HOSTILE[1], "preset": HOSTILE[3], "device": HOSTILE[2]}
    about["versions"]["torch"] = HOSTILE[0]
    model = Classifier(**description | {"classes": HOSTILE})
    model.save_pretrained(tmp_path / "model")
    assert Classifier.from_pretrained(tmp_path / "model").classes == tuple(HOSTILE)
    clean, _ = front_matter((folders / "Classifier" / "README.md").read_text())
    metadata, page = front_matter((tmp_path / "model" / "README.md").read_text())
    assert metadata == clean
    found = tables(page)
    assert len(found) == 3
    for table in found:
        assert len({len(row) for row in table}) == 1
    for name, group, count in zip(HOSTILE, found[1][2:], found[2][2:-1], strict=True):
        # What a renderer shows: entities first, for a backslash is none of what they stand for.
        shown = re.sub(r"\\(.)", r"\1", html.unescape(count[0]))
        wanted = "".join(c if c.isprintable() else "\ufffd" for c in " ".join(name.split()))
        assert group[0] == count[0] and shown == wanted
    headings = [line for line in page.splitlines() if line.startswith("#")]
    assert [line for line in headings if line.startswith("## ")] == [
        f"## {title}" for title in ("Use", "Results", "Limits", "Data", "Made by")
    ]
    assert len(headings) == 6 and "<script" not in page and "\nlicense" not in page
    _, start = front_matter((folders / "Classifier" / "README.md").read_text())
    assert page.count("\n- ") == start.count("\n- ")


@pytest.mark.parametrize(
    ("text", "markdown"),
    [
        ("y=0 a=colour 3", "y=0 a=colour 3"),
        ("# a #", r"\# a \#"),  # a heading drops its last ones
        (r"a\|b|", r"a\\&#124;b&#124;"),
        ("<b>&lt;", r"&lt;b&gt;&amp;lt;"),
        ("a_b*c`d~e$f![g]{h}", r"a\_b\*c\`d\~e\$f\!\[g\]\{h\}"),
        (" x \n\t y\u2028z\u200b", "x y z\ufffd"),
    ],
)
def test_text_is_escaped_for_markdown(text, markdown):
    assert plain(text) == markdown


def test_names_without_tables_are_escaped_too(folders, tmp_path):
    description = json.loads((folders / "Generator" / "config.json").read_text())
    description["run"] |= {"counts": None}
    Generator(**description | {"classes": HOSTILE}).save_pretrained(tmp_path / "model")
    _, page = front_matter((tmp_path / "model" / "README.md").read_text())
    assert plain(HOSTILE[2]) in page and "<script" not in page and tables(page) == []


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["/home/me/bin/ddb-fast", "run", "digits"], "ddb-fast run digits"),
        (
            ["x/train.py", "tiny", "--data", "/my/photos", "--seeds", "0", "1", "--out=/x/y"],
            "ddb-fast run tiny --data ... --seeds 0 1 --out=...",
        ),
        (
            ["ddb-fast", "run", "my/config.json", "--methods", "erm", "ddb-ii", "--data", "a b"],
            "ddb-fast run ... --methods erm ddb-ii --data ...",
        ),
        (
            ["ddb-fast", "run", "ddb", "--classifier.weights", "w.safetensors", "--secret/x"],
            "ddb-fast run ddb --classifier.weights ... ...",
        ),
        (
            ["ddb-fast", "run", "ddb", "--diffusion.lr", "3e-4", "--classifier.model=resnet50"],
            "ddb-fast run ddb --diffusion.lr 3e-4 --classifier.model=resnet50",
        ),
        (
            [
                "ddb-fast",
                "run",
                "ddb",
                "--amplifier.model",
                "timm:test_vit.r160_in1k",
            ],
            "ddb-fast run ddb --amplifier.model timm:test_vit.r160_in1k",
        ),
        (["ddb-fast", "run", "timm:my/photos"], "ddb-fast run ..."),
        (["/home/me/my_script.py", "digits"], None),
        ([], None),
    ],
)
def test_a_command_is_shown_without_places(words, shown):
    assert shown_command(words) == shown
