"""Every method, three steps on a tiny labelled set: whatever is listed in METHODS runs here."""

import csv
import json
import math
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

import small
from ddb_fast import methods, pipeline
from ddb_fast.classification import load_classifier, save_classifier
from ddb_fast.config import METHODS, from_json, with_fields
from ddb_fast.data.samplers import ShuffledSampler
from ddb_fast.data.store import ImageData, Split
from ddb_fast.methods import (
    build_method,
    first_networks,
    identify_errors,
    read_errors,
    retrain_last_layer,
    train_method,
)
from ddb_fast.models.classifiers import linear_head
from ddb_fast.presets import PRESETS
from ddb_fast.recipes import ERM, LfF, reweighted_last_layer
from ddb_fast.scoring import Scores
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


# --- what each is trained with -----------------------------------------------------------------

Y = torch.tensor([0, 0, 0, 1, 1, 2])
CHOSEN = {
    "classifier.model": "mlp",
    "classifier.width": "4",
    "classifier.image_size": "4",
    "classifier.images": "1000",
    "group_dro.step_size": "0.3",
    "group_dro.adjustment": "0.5",
    "lff.q": "0.4",
    "lff.moving_average": "0.6",
    "reweighting.moving_average": "0.8",
    "reweighting.class_maximum": "true",
    "jtt.first_share": "0.3",
    "jtt.upweight": "5",
    "selection": "worst_group_accuracy",
    "looks": "7",
}
"""Fields with other values than their own."""


def coded(y, a, predicted):
    """A split whose large images say by their first pixel what is predicted of them."""
    size, large = len(y), torch.zeros(len(y), 4, 4, 3, dtype=torch.uint8)
    large[:, 0, 0, 0] = torch.tensor(predicted)
    paths = tuple(f"{i}.png" for i in range(size))
    small = torch.full((size, 2, 2, 3), 9, dtype=torch.uint8)
    return Split(paths=paths, y=torch.tensor(y), a=torch.tensor(a), small=small, large=large)


@pytest.fixture
def context(monkeypatch):
    """Six training images in three classes, two biases; no network is asked, see `coded`."""
    splits = {
        "train": coded(Y.tolist(), [1, 0, 0, 0, 1, 1], [0, 1, 2, 1, 0, 2]),
        "val": coded([0, 1, 2, 2], [0, 0, 1, 1], [0, 1, 2, 0]),
        "test": coded([0, 1, 2, 2, 2], [0, 0, 1, 1, 1], [0, 0, 0, 0, 2]),
    }
    crops = []

    def logits(network, images, config, *, device, crop):
        crops.append(crop)
        return torch.eye(3)[images[:, 0, 0, 0].long()]

    monkeypatch.setattr(methods, "logits_of", logits)
    yield SimpleNamespace(
        config=with_fields(PRESETS["digits"](), CHOSEN),
        accelerator=SimpleNamespace(is_main_process=True),
        data=ImageData(
            name="n", classes=tuple("abc"), biases=("x", "y"), splits=splits, fingerprint="",
            aligned_bias=(0, 0, 1),
        ),
        device=torch.device("cpu"),
    )  # fmt: skip
    assert all(crops), "targets are asked of centre crops"


def scores():
    """Three of the six are wrong, and two of these are marked."""
    loss = torch.tensor([0.5, 2.0, 4.0, 1.0, 3.0, 0.25])
    marked = torch.tensor([False, False, True, False, True, False])
    return Scores(Y, torch.tensor([0, 1, 2, 1, 0, 2]), loss, 3 * loss - 2, marked)


@pytest.mark.parametrize(
    ("method", "fields", "ids", "count"),
    [
        ("group-dro", {}, [1, 0, 0, 2, 3, 5], 6),
        ("ddb-i", {}, [0, 0, 1, 2, 3, 4], 6),
        ("real-amplifier-i", {}, [0, 0, 1, 2, 3, 4], 6),
        ("ddb-i-error-set", {}, [0, 1, 1, 2, 3, 4], 6),
        ("ddb-i-predicted", {}, [0, 1, 2, 4, 3, 8], 9),
        ("ddb-i", {"pseudo_labels.pseudo_groups": "predicted"}, [0, 1, 2, 4, 3, 8], 9),
        ("ddb-i-error-set", {"pseudo_labels.pseudo_groups": "predicted"}, [0, 1, 1, 2, 3, 4], 6),
    ],
)
def test_groups_of_each_method(context, tmp_path, method, fields, ids, count):
    """By hand: class and bias, class and pseudo label, class and error, class and prediction."""
    context.config = with_fields(context.config, fields)
    recipe, sampler = build_method(context, method, 4, scores=scores(), folder=tmp_path)
    assert recipe.groups.tolist() == ids and len(recipe.group_weights) == count
    assert recipe.step_size == 0.3
    sizes = Counter(ids)
    margin = [0.5 / math.sqrt(sizes[g]) if sizes[g] else 0.0 for g in range(count)]
    assert recipe.margin.tolist() == pytest.approx(margin)
    drawn = Counter(ids[i] for i in sampler.batch(0, 6000).tolist())
    assert drawn.keys() == sizes.keys()
    # Binomial(6000, 1 / groups): a deviation of at most 31.
    assert all(abs(n - 6000 / len(sizes)) < 5 * 31 for n in drawn.values())
    other = build_method(context, method, 5, scores=scores(), folder=tmp_path)[1]
    assert not torch.equal(other.batch(0, 60), sampler.batch(0, 60))


def test_losses_of_the_other_methods(context, tmp_path):
    (tmp_path / "error_set.csv").write_text("path,y,predicted,error\n" + "".join(
        f"{i}.png,0,0,{int(i in (1, 4))}\n" for i in range(6)
    ))  # fmt: skip

    def built(method, seed=4):
        return build_method(context, method, seed, scores=scores(), folder=tmp_path)

    for method in ("ddb-ii", "real-amplifier-ii"):
        recipe, sampler = built(method)
        # Divided by the largest of the class: 4, 3 and .25.
        assert recipe.amplifier_loss.tolist() == pytest.approx([1 / 8, 1 / 2, 1, 1 / 3, 1, 1])
        assert recipe.table.moving_average == 0.8 and recipe.class_maximum
        assert sorted(sampler.batch(0, 6).tolist()) == list(range(6))
    recipe, _ = built("lff")
    assert (recipe.q, recipe.biased.moving_average, recipe.debiased.moving_average) == (
        0.4,
        0.6,
        0.6,
    )
    recipe, sampler = built("jtt")
    assert isinstance(recipe, ERM)
    for epoch in range(2):
        dealt = Counter(sampler.batch(epoch, 4 + 2 * 5).tolist())
        assert dealt == {0: 1, 1: 5, 2: 1, 3: 1, 4: 5, 5: 1}
    for method in ("erm", "lff", "jtt", "ddb-ii"):
        order = [built(method, seed)[1].batch(0, 60).tolist() for seed in (4, 4, 5)]
        assert order[0] == order[1] != order[2], method


def trained(monkeypatch):
    """Stand in for the training; what it was given. It looks once, after 10 images."""
    seen = SimpleNamespace()

    def train_classifier(context, network, config, images, y, **options):
        vars(seen).update(options, network=network, images=images, y=y, config=config)
        if options.get("selection") is not None:
            options["selection"].look(network, 10)
        return 1.0

    monkeypatch.setattr(methods, "train_classifier", train_classifier)
    return seen


@pytest.mark.parametrize("method", ["erm", "lff"])
def test_training_selection_and_figures_of_a_method(context, tmp_path, monkeypatch, method):
    """Weights are chosen by validation images, the figures are of the test images."""
    seen = trained(monkeypatch)
    train_method(context, method, 3, tmp_path, tmp_path / "resume", None)
    train = context.data.splits["train"]
    assert seen.images is train.large and seen.y is train.y
    assert seen.config is context.config.classifier and seen.seed == 3
    assert method in seen.stage and "3" in seen.stage and seen.resume == tmp_path / "resume"
    first, other = (first_networks(context.config.classifier, 3, "erm", s)[0] for s in (3, 4))
    assert isinstance(seen.recipe, ERM if method == "erm" else LfF)
    assert torch.equal(seen.sampler.batch(0, 9), ShuffledSampler(6, seed=3).batch(0, 9))
    parts = list(seen.network.children())
    kept = seen.network if method == "erm" else seen.network.debiased
    if method == "lff":
        assert not torch.equal(*(next(net.parameters()) for net in parts))
    assert list(seen.clipped) == (parts if method == "lff" else [])
    weights = [next(net.parameters()) for net in (kept, first, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    # Validation: 3 of 4 right, one of two in the worst group. Test: 2 of 5, none.
    chosen = json.loads((tmp_path / "selection.json").read_text())
    assert chosen["by"] == "worst_group_accuracy" and seen.selection._times == 7
    (row,) = chosen["curve"]
    assert (row["images"], row["average_accuracy"], row["worst_group_accuracy"]) == (10, 0.75, 0.5)
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert (written["method"], written["seed"], written["images"]) == (method, 3, 10)
    figures = {name: written[name]["metrics"] for name in ("test", "val")}
    assert figures["val"]["average_accuracy"] == 0.75 and figures["test"]["average_accuracy"] == 0.4
    assert figures["test"]["worst_group_accuracy"] == 0.0
    # Of the groups of the test images the training split has 2, 1 and 1; all of them are aligned.
    assert (
        figures["test"]["aligned_accuracy"] == 0.4
        and figures["test"]["conflicting_accuracy"] is None
    )
    expected = (2 * 1 + 1 * 0 + 1 * 1 / 3) / 4
    assert figures["test"]["adjusted_average_accuracy"] == pytest.approx(expected)
    network, _, classes = load_classifier(tmp_path / "model.safetensors")
    assert torch.equal(next(network.parameters()), weights[1]) and classes == tuple("abc")


def test_jtts_first_network_is_stopped_early_and_errs_on_training_images(
    context, tmp_path, monkeypatch
):
    seen = trained(monkeypatch)
    identify_errors(context, 3, tmp_path, tmp_path / "resume")
    train = context.data.splits["train"]
    assert seen.images is train.large and seen.y is train.y and seen.stop_at == 300
    assert isinstance(seen.recipe, ERM) and seen.seed == 3
    assert seen.resume == tmp_path / "resume"
    assert torch.equal(seen.sampler.batch(0, 9), ShuffledSampler(6, seed=3).batch(0, 9))
    assert read_errors(tmp_path).tolist() == [False, True, True, False, True, False]


def test_without_validation_images_there_are_no_figures_of_them(context, tmp_path):
    del context.data.splits["val"]
    network = first_networks(context.config.classifier, 3, "erm", 0)[0]
    methods.save_and_evaluate(context, "erm", 0, network, tmp_path)
    assert list(json.loads((tmp_path / "metrics.json").read_text())) == ["method", "seed", "test"]


def test_dfr_is_fitted_to_the_validation_images_groups(context, tmp_path, monkeypatch):
    """As the recipe is, asked by hand, of the features of erm's network; the rest stays erm's."""
    y, a = [0] * 20 + [1] * 20 + [2] * 20, [0, 1, 1, 1] * 15
    context.data.splits["val"] = coded(y, a, y)
    fields = {"dfr.draws": "3", "dfr.inverse_strengths": "0.5"}
    context.config = with_fields(context.config, fields)
    erm = tmp_path / "erm" / "seed3"
    network = first_networks(context.config.classifier, 3, "erm", 9)[0]
    save_classifier(erm / "model.safetensors", network, context.config.classifier, tuple("abc"))
    features = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    features[:, 0] += torch.tensor(y)

    def features_of(network, images, config, *, device, crop=True):
        assert images is context.data.splits["val"].large and crop
        return features

    monkeypatch.setattr(methods, "features_of", features_of)
    retrain_last_layer(context, 3, erm, tmp_path / "dfr")
    expected = reweighted_last_layer(
        features,
        torch.tensor(y),
        torch.tensor(y) * 2 + torch.tensor(a),
        3,
        inverse_strengths=(0.5,),
        draws=3,
        seed=3,
    )
    kept, _, _ = load_classifier(tmp_path / "dfr" / "model.safetensors")
    head = linear_head(kept)
    assert torch.equal(head.weight, expected.weight) and torch.equal(head.bias, expected.bias)
    assert torch.equal(next(kept.parameters()), next(network.parameters()))
    written = json.loads((tmp_path / "dfr" / "metrics.json").read_text())
    assert (written["method"], written["seed"], written["inverse_strength"]) == ("dfr", 3, 0.5)


def test_each_method_is_given_the_scores_of_its_own_amplifier(monkeypatch, tmp_path):
    done = []

    def note(name):
        return lambda context, *given: done.append((name, *given))

    for name in ("train_method", "identify_errors", "retrain_last_layer"):
        monkeypatch.setattr(pipeline, name, note(name))
    chosen = ("erm", "jtt", "dfr", "ddb-i", "ddb-ii", "real-amplifier-i", "real-amplifier-ii")
    context = SimpleNamespace(config=SimpleNamespace(seeds=(2, 7), methods=chosen))
    keys = []

    def stage(key, work, unfinished):
        keys.append(key)
        work()

    pipeline._train_methods(context, stage, tmp_path, "synthetic", "real")
    given = {(words[1], words[2]): words for words in done if words[0] == "train_method"}
    for seed in (2, 7):
        for method in chosen:
            folder = tmp_path / method / f"seed{seed}"
            if method == "dfr":
                erm = tmp_path / "erm" / f"seed{seed}"
                assert ("retrain_last_layer", seed, erm, folder) in done
                continue
            scores = "real" if method.startswith("real") else "synthetic"
            assert given[method, seed][3:] == (
                folder, folder / "checkpoint.safetensors", scores
            )  # fmt: skip
        folder = tmp_path / "jtt" / f"seed{seed}"
        resume = folder / "identification_checkpoint.safetensors"
        assert ("identify_errors", seed, folder, resume) in done
        assert keys.index(f"jtt-identification/{seed}") < keys.index(f"jtt/seed{seed}")
    assert len(keys) == len(set(keys)) == 2 * 8


def test_factors_and_clusters_are_measured(context):
    """Where the data has them: two attributes in one, and clusters of the images."""
    data, y = context.data, torch.arange(40) // 20
    right = torch.arange(40) % 20 < 12
    split = coded(
        y.tolist(), (torch.arange(40) % 4).tolist(), torch.where(right, y, 1 - y).tolist()
    )
    clusters = (torch.arange(40) % 20 // 10)[None]
    context.data = replace(
        data, classes=("a", "b"), biases=tuple("wxyz"), factors=(("bg", 2), ("object", 2)),
        aligned_bias=(0, 3), splits={"train": split, "test": replace(split, clusters=clusters)},
    )  # fmt: skip
    metrics = methods.evaluate(context, None, None, "test")["metrics"]
    # Of each class and attribute three of five are right; in the clusters 10 of 10 and 2 of 10.
    assert metrics["average_accuracy"] == metrics["adjusted_average_accuracy"] == 0.6
    assert [metrics[f"{name}_gap"] for name in ("bg", "object", "both")] == pytest.approx([0, 0, 0])
    assert metrics["texture_unbiased_accuracy"] == pytest.approx(0.6)
    assert (
        "texture_unbiased_accuracy" not in methods.evaluate(context, None, None, "train")["metrics"]
    )


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
