"""What evaluation writes, and how results.json and its table gather it."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import nn

from ddb_fast.checkpoint import save_tensors
from ddb_fast.config import ClassifierConfig
from ddb_fast.data.store import ImageData, Split
from ddb_fast.methods import evaluate
from ddb_fast.metrics import summarise
from ddb_fast.presets import PRESETS
from ddb_fast.results import collect_results, table
from ddb_fast.scoring import Scores

FACTORS = (("background", 2), ("co_object", 2))
CONFIG = ClassifierConfig(images=1, batch_size=1, image_size=8, pixel_norm="symmetric")


class Brightness(nn.Module):
    """Class 1 for bright images, class 0 for dark ones."""

    def forward(self, pixels):
        mean = pixels.mean((1, 2, 3))
        return torch.stack([-mean, mean], 1)


def split_of(y, a, bright, clusters=None):
    images = torch.where(torch.tensor(bright)[:, None, None, None], 255, 0).to(torch.uint8)
    images = images.expand(-1, 8, 8, 3).contiguous()
    return Split(
        paths=tuple(f"{i}.png" for i in range(len(y))),
        y=torch.tensor(y),
        a=None if a is None else torch.tensor(a),
        small=images,
        large=images,
        clusters=None if clusters is None else torch.tensor(clusters),
    )


def data_of(train, biases=None, factors=(), **splits):
    return ImageData(
        name="urbancars",
        classes=("urban", "country"),
        biases=biases,
        splits={"train": train, **splits},
        fingerprint="",
        aligned_bias=None if biases is None else (0, 3),
        factors=factors,
    )


def evaluated(data, split="test"):
    return evaluate(SimpleNamespace(data=data, device="cpu"), Brightness(), CONFIG, split)


def test_two_factors_are_measured_apart():
    """Two images a class and attribute; the dark country ones on an urban background are missed."""
    y, a = [0] * 8 + [1] * 8, [0, 0, 1, 1, 2, 2, 3, 3] * 2
    bright = [False] * 8 + [True, True, False, True, True, True, True, True]
    test = split_of(y, a, bright)
    names = tuple(f"{b} {c}" for b in ("urban", "country") for c in ("urban", "country"))
    data = data_of(test, names, FACTORS, test=test)
    answer = evaluated(data)
    # Equal training counts: 15 of 16. Background alone conflicts in (0, 2) and (1, 1): 3 of 4.
    assert answer["metrics"]["adjusted_average_accuracy"] == 15 / 16
    assert answer["metrics"]["background_gap"] == 15 / 16 - 3 / 4
    assert answer["metrics"]["co_object_gap"] == answer["metrics"]["both_gap"] == 15 / 16 - 1
    assert len(answer["groups"]) == 8
    assert "background_gap" not in evaluated(replace(data, factors=()))["metrics"]


def test_texture_clusters_need_no_bias_labels():
    y, bright = [0] * 10 + [1] * 10, [False] * 10 + [True] * 5 + [False] * 5
    test = split_of(y, None, bright, clusters=[[0] * 20, [0] * 10 + [1] * 10])
    answer = evaluated(data_of(test, test=test))
    assert answer["metrics"]["texture_unbiased_accuracy"] == 0.75
    assert answer["metrics"]["unbiased_accuracy"] is None and answer["groups"] == []
    plain = evaluated(data_of(test, test=replace(test, clusters=None)))
    assert "texture_unbiased_accuracy" not in plain["metrics"]


def gathered(folder, seeds, **changes):
    """collect_results over hand-made metrics.json files, one a seed, of erm."""
    for seed, written in enumerate(seeds):
        place = folder / "classifiers" / "erm" / f"seed{seed}"
        place.mkdir(parents=True)
        (place / "metrics.json").write_text(json.dumps(written))
    config = replace(PRESETS["tiny"](), methods=("erm",), seeds=tuple(range(len(seeds))))
    train = split_of([0, 1], None, [False, True])
    return collect_results(folder, replace(config, **changes), data_of(train), None, {})


def of_split(**metrics):
    return {"metrics": metrics, "groups": []}


def test_texture_accuracy_of_the_validation_images_counts_where_the_test_has_no_clusters(tmp_path):
    seeds = [
        {
            "test": of_split(average_accuracy=0.3),
            "val": of_split(average_accuracy=0.9, texture_unbiased_accuracy=value),
        }
        for value in (0.7, 0.8)
    ]
    results = gathered(tmp_path, seeds)
    metrics = results["methods"]["erm"]["metrics"]
    assert metrics["average_accuracy"] == summarise([0.3, 0.3])
    assert metrics["texture_unbiased_accuracy"] == summarise([0.7, 0.8])
    text = table(results)
    assert "| 30.0 ± 0.0 | 75.0 ± 7.1" in text
    assert "texture-unbiased: on the validation split" in text
    own = {"test": of_split(average_accuracy=0.3, texture_unbiased_accuracy=0.5)}
    results = gathered(tmp_path / "own", [{**own, "val": seeds[0]["val"]}])
    assert results["methods"]["erm"]["metrics"]["texture_unbiased_accuracy"]["mean"] == 0.5
    assert "validation split" not in table(results)


def test_what_is_said_of_amplifiers_generator_and_bias(tmp_path):
    """Of seven training images the third, fourth and last conflict; AUROC by scikit-learn."""
    y, a = torch.tensor([0, 0, 0, 1, 1, 1, 1]), [0, 0, 1, 2, 3, 3, 0]
    conflicting = [0, 0, 1, 1, 0, 0, 1]
    train = split_of(y.tolist(), a, [False] * 7)
    rising = torch.tensor([0.1, 0.7, 0.5, 0.9, 0.2, 0.3, 0.4])
    predicted = torch.tensor([0, 1, 1, 1, 1, 1, 0])
    marked = torch.tensor([False, True, True, True, True, False, False])
    scores = Scores(y, predicted, rising.flip(0), rising, marked)
    control = Scores(y, y, rising, -rising, ~marked)
    made = {"images": torch.zeros(5, 3, 2, 2), "labels": torch.tensor([0, 0, 1, 1, 1])}
    save_tensors(tmp_path / "synthetic" / "images.safetensors", made, {})
    erm, again = torch.tensor([[0, 0, 0, 1, 1, 1, 0], [1, 1, 0, 0, 1, 1, 0]])
    said = {"amplifier": predicted, "again": again, "erm": erm}
    said |= dict.fromkeys(("standing", "gain"), torch.full((7,), torch.nan))
    save_tensors(tmp_path / "audit" / "predictions.safetensors", said, {})
    (tmp_path / "memorisation.json").write_text('{"excess": false}')

    def colour(images):
        assert images.shape == (5, 3, 2, 2)
        return torch.tensor([0, 1, 3, 3, 0])

    data = data_of(train, tuple("abcd"), test=split_of([0, 1], [0, 0], [False, True]))
    config = replace(PRESETS["tiny"](), methods=())
    results = collect_results(
        tmp_path, config, replace(data, bias_of=colour), scores, {"s": 1.5}, real_scores=control
    )
    assert results["amplifier"] == {
        "split": "train",
        "auroc": pytest.approx(roc_auc_score(conflicting, rising)),
        "average_precision": pytest.approx(average_precision_score(conflicting, rising)),
        "pseudo_precision": 2 / 4,
        "pseudo_recall": pytest.approx(2 / 3),
        "aligned_accuracy": 3 / 4,
        "conflicting_accuracy": pytest.approx(1 / 3),
    }
    real = results["real_amplifier"]
    assert real["auroc"] == pytest.approx(roc_auc_score(conflicting, -rising))
    assert (real["pseudo_precision"], real["aligned_accuracy"]) == (pytest.approx(1 / 3), 1)
    assert results["synthetic"] == {"count": 5, "aligned_share": 3 / 5, "aligned_by": "colour"}
    # Both amplifiers call the second and the last another class, the ERM the last; five are wrong
    # for either. The worse amplifier errs on three more of the seven than the ERM, which makes the
    # one error that both make.
    assert results["verdict"]["suspicious"]["count"] == 2
    values = [check["value"] for check in results["verdict"]["checks"]]
    assert values[2] is None, "too few at odds"
    assert values[:2] + values[3:] == pytest.approx([1 / 7, 1 / 5, 3 / 7, 1])
    assert results["memorisation"] == {"excess": False}
    assert results["seconds"] == {"s": 1.5} and results["methods"] == {}
    blind = collect_results(tmp_path, config, replace(data, biases=None), scores, {})
    assert blind["amplifier"]["auroc"] is blind["synthetic"]["aligned_share"] is None
    assert blind["real_amplifier"] is None


def test_a_metric_that_some_seeds_lack_has_no_mean(tmp_path):
    older = {"test": of_split(average_accuracy=0.5)}
    newer = {"test": of_split(average_accuracy=0.5, both_gap=0.1)}
    metrics = gathered(tmp_path, [older, newer])["methods"]["erm"]["metrics"]
    assert metrics["both_gap"] == {"mean": None, "std": None, "seeds": [None, 0.1]}


def test_a_table_says_which_weights_were_kept_and_what_a_gap_is(tmp_path):
    seed = {"test": of_split(average_accuracy=0.5, adjusted_average_accuracy=0.9, both_gap=0.1)}
    text = table(gathered(tmp_path / "one", [seed], selection="worst_group_accuracy"))
    assert "best worst group accuracy on validation" in text
    assert "positive = worse" in text and "adjusted average" in text
    text = table(gathered(tmp_path / "two", [{"test": of_split(average_accuracy=0.5)}]))
    assert "validation" not in text and "worse" not in text


@pytest.mark.parametrize("content", [b"", b'{"test": ', b"\xff\xff"])
def test_a_damaged_file_is_named(tmp_path, content):
    gathered(tmp_path, [{"test": of_split(average_accuracy=0.5)}])
    file = tmp_path / "classifiers" / "erm" / "seed0" / "metrics.json"
    file.write_bytes(content)
    config = replace(PRESETS["tiny"](), methods=("erm",), seeds=(0,))
    train = split_of([0, 1], None, [False, True])
    with pytest.raises(ValueError, match=r"metrics\.json: not JSON, or cut short"):
        collect_results(tmp_path, config, data_of(train), None, {})
