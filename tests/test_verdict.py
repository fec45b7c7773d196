"""The verdict: hand-worked votes, and what is trained for it."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ddb_fast import checkpoint, opinions
from ddb_fast.config import with_fields
from ddb_fast.opinions import folds, gather_opinions, read_opinions
from ddb_fast.presets import PRESETS
from ddb_fast.verdict import as_data, judge

NETWORKS = ("amplifier", "again", "erm")
Y = torch.arange(100) // 80 * 5
"""80 images of class 0, then 20 of class 5."""


def votes(**wrong):
    """Opinions on Y; `name=(positions, class)` are those called another."""
    said = {name: Y.clone() for name in NETWORKS}
    for name, (positions, label) in wrong.items():
        said[name][list(positions)] = label
    return said


def everyone(positions, label):
    return dict.fromkeys(NETWORKS, (positions, label))


def test_errors_that_all_networks_share_are_a_bias():
    verdict = judge(Y, **votes(**everyone(range(8), 3)))
    learnt, unanimous, generator, shared = verdict.checks
    assert (shared.value, shared.limit, shared.passed) == (1.0, 0.5, False)
    assert verdict.found and learnt.passed and (learnt.value, learnt.limit) == (0.08, 0.2)
    assert unanimous.passed and unanimous.value == 1.0
    assert generator.value == 0.0 and generator.passed
    assert verdict.at_odds.nonzero()[:, 0].tolist() == list(range(8))


@pytest.mark.parametrize(
    ("change", "value", "odd"),
    [
        ({"erm": (range(0), 3)}, 0.0, 8),
        ({"erm": (range(8), 2)}, 0.0, 8),
        ({"again": (range(8), 2)}, 0.0, 0),
        ({"again": (range(4, 12), 3)}, 4 / 12, 4),
    ],
    ids=["the ERM is right", "the ERM errs otherwise", "other wrong classes", "other images"],
)
def test_errors_that_are_not_shared_are_none(change, value, odd):
    verdict = judge(Y, **votes(**everyone(range(8), 3) | change))
    assert verdict.checks[1].value == pytest.approx(value)
    assert verdict.found is False and verdict.at_odds.sum() == odd


def test_no_error_at_all_is_no_bias():
    verdict = judge(Y, **votes())
    assert verdict.found is False and verdict.checks[1].value is None


def test_a_poor_generator_says_nothing_unless_a_bias_shows_all_the_same():
    """The worse of the two amplifiers counts: one may have failed."""
    verdict = judge(Y, **votes(amplifier=(range(25), 2), again=(range(3), 3)))
    assert verdict.found is None and verdict.checks[2].value == pytest.approx(0.25)
    first, why, _ = as_data(verdict, Y, ("cat",) * 6)["sentences"]
    assert "too poor" in first and "25 points more often" in why
    better = votes(amplifier=(range(10), 2), again=(range(5), 3))
    assert judge(Y, **better).found is False, "half of what the ERM learnt is the limit"
    assert judge(Y, **better | votes(again=(range(11), 3))).found is None
    shared = everyone(range(40), 1) | {"erm": (range(8), 1)}
    assert judge(Y, **votes(**shared)).found is None, "8 of 40: Wilson's lower bound is .11"
    y = torch.arange(100) // 60 * 5
    said = {name: y.clone() for name in NETWORKS}
    said["amplifier"][:49] = said["again"][:49] = said["erm"][:28] = 1
    verdict = judge(y, **said)
    assert verdict.found is True, "28 of 49: Wilson's lower bound is .43"
    assert not verdict.checks[2].passed
    said = {name: y.clone() for name in NETWORKS}
    said["amplifier"][:20] = 1
    assert judge(y, **said).found is False, "a fifth is the limit where the ERM learnt more"
    said["amplifier"][20] = 1
    assert judge(y, **said).found is None


def test_a_bias_behind_other_errors_is_not_called_none():
    """The ERM errs on 12 images, the amplifiers on most of these and on as many again."""
    y = torch.arange(100) // 60 * 5
    said = {name: y.clone() for name in NETWORKS}
    said["erm"][:12] = said["amplifier"][:26] = said["again"][:26] = 1
    verdict = judge(y, **said)
    assert [c.passed for c in verdict.checks] == [True, False, True, False]
    assert verdict.checks[1].value == pytest.approx(12 / 26), "Wilson's lower bound is .29"
    assert verdict.found is None and verdict.checks[3].value == 1.0
    first, why, _ = as_data(verdict, y, ("cat",) * 6)["sentences"]
    assert "There may be a bias" in first and "100 % are" in why and "only 46 % are" in why
    said["amplifier"][:2] = 0
    assert judge(y, **said).found is None, "10 of 12: Wilson's lower bound is .55"
    said["amplifier"][2] = 0
    assert judge(y, **said).found is False, "9 of 12: .47"


def test_networks_that_learnt_nothing_say_nothing():
    """All name class 0: their errors agree, and none errs more often than the ERM."""
    constant = dict.fromkeys(NETWORKS, torch.zeros_like(Y))
    verdict = judge(Y, **constant)
    assert verdict.found is None and not verdict.checks[0].passed
    first, why, _ = as_data(verdict, Y, ("cat",) * 6)["sentences"]
    assert "too little was learnt" in first and why.count("errs on 20 %") == 2
    better = constant | {"erm": torch.where(torch.arange(100) < 90, 0, 5)}
    verdict = judge(Y, **better)
    assert verdict.checks[0].passed, "10 errors of 100: Wilson's upper bound is .17"
    assert verdict.found is None and not verdict.checks[2].passed, "the amplifiers still guess"


def test_most_images_at_odds_are_no_bias():
    """What most images are is the rule and not its exception."""
    y = torch.arange(100) // 20
    said = {name: y.clone() for name in NETWORKS}
    said["amplifier"][:51] = said["again"][:51] = said["erm"][:30] = 5
    verdict = judge(y, **said)
    assert verdict.found is None and not verdict.checks[1].passed
    said["amplifier"][:2] = said["again"][:2] = 0
    assert judge(y, **said).found is True, "28 of 49"


def test_amplifiers_that_guess_find_no_bias():
    """Both name the larger of two classes: a weak ERM agrees with half of their errors."""
    y = (torch.arange(100) >= 52).long()
    said = {name: torch.zeros_like(y) for name in NETWORKS}
    said["erm"] = torch.where(torch.arange(100) < 79, 0, 1)
    verdict = judge(y, **said)
    assert verdict.checks[0].passed and verdict.checks[1].value == 27 / 48
    assert verdict.found is None
    assert "the generator is too poor" in as_data(verdict, y, ("cat", "dog"))["sentences"][0]
    said["amplifier"][60:] = said["again"][60:] = 1
    assert judge(y, **said).found is True, "8 of 8, where the ERM errs on 19 more"


def test_few_images_do_not_suffice():
    """Unanimous or not: fewer than five are as likely to be mislabelled."""
    assert not judge(Y, **votes(**everyone(range(4), 1))).found
    assert judge(Y, **votes(**everyone(range(5), 1))).found
    half = everyone(range(10), 1) | {"erm": (range(5), 1)}
    assert not judge(Y, **votes(**half)).found, "five of ten: Wilson's lower bound is .24"


def test_chance_alone_is_seldom_a_bias():
    """Networks that err independently, 15 % of the images each: no verdict in 200 sets."""
    generator = np.random.default_rng(0)
    found = 0
    for _ in range(200):
        y = generator.integers(0, 10, 400)
        said = {
            name: torch.from_numpy(
                np.where(generator.random(400) < 0.15, (y + generator.integers(1, 10, 400)) % 10, y)
            )
            for name in NETWORKS
        }
        found += judge(torch.from_numpy(y), **said).found is True
    assert found <= 1


def test_data_for_the_report():
    y = Y.clone()
    y[50:] = 1
    said = votes(**everyone(range(8), 1))
    said = {name: torch.where(y == 1, 1, value) for name, value in said.items()}
    data = as_data(judge(y, **said), y, ("cat", "dog"))
    assert json.loads(json.dumps(data)) == data
    assert data["suspicious"] == {"count": 8, "share": 0.08}
    assert data["classes"] == [
        {"name": "cat", "count": 50, "suspicious": 8},
        {"name": "dog", "count": 50, "suspicious": 0},
    ]
    assert "8 of 100 training images (8.0 %)" in data["sentences"][0]
    assert "On 100 % of all images" in data["sentences"][1]
    partly = said | {"again": torch.where(torch.arange(100) < 4, y, said["again"])}
    found = as_data(judge(y, **partly), y, ("cat", "dog"))
    assert "100 training images" in found["sentences"][0]
    assert "only 50 % of these" in found["sentences"][1]
    nothing = as_data(judge(y, **{n: y for n in said}), y, ("cat", "dog"))
    assert nothing["sentences"][0].startswith("No bias was found")


def test_shapes_are_refused():
    with pytest.raises(ValueError, match="again"):
        judge(Y, **votes() | {"again": Y[:5]})


def test_folds_halve_every_class():
    y = torch.tensor([0] * 7 + [1] * 4 + [2])
    half = folds(y, seed=3)
    for label, sizes in ((0, {4, 3}), (1, {2}), (2, {1, 0})):
        members = half[y == label]
        assert {int((members == 0).sum()), int((members == 1).sum())} == sizes
    assert not torch.equal(half, folds(y, seed=4))
    order = torch.randperm(len(y))
    assert set(folds(y[order], seed=3).tolist()) == {0, 1}


def test_each_opinion_is_of_a_network_that_saw_none_of_the_images(monkeypatch, tmp_path):
    """Networks that remember: what they say of an image is whether they were trained on it."""
    config = with_fields(PRESETS["digits"](), {"seed": "1"})
    y = torch.arange(12) % 2
    small = torch.arange(12, dtype=torch.uint8).view(12, 1, 1, 1).repeat(1, 2, 2, 3)
    made = 100 + torch.arange(8, dtype=torch.uint8).view(8, 1, 1, 1).repeat(1, 3, 2, 2)
    labels = torch.arange(8) % 2
    checkpoint.save_tensors(tmp_path / "images.safetensors", {"images": made, "labels": labels}, {})
    trained = []

    def network(given, classes, *, seed):
        assert given is config.amplifier and classes == 2
        return SimpleNamespace(seed=seed, seen={}, to=lambda device: None)

    def train(context, network, given, images, y, *, whole, recipe, sampler, seed, **options):
        assert given is config.amplifier and whole and seed == sampler.seed == network.seed
        assert sampler.n == len(images)
        network.seen = dict(zip(images[:, 0, 0, 0].tolist(), y.tolist(), strict=True))
        trained.append(network)

    def logits(network, images, given, *, device, crop):
        assert images is small and given is config.amplifier and not crop
        said = [network.seen.get(i, 2) for i in images[:, 0, 0, 0].tolist()]
        return torch.eye(5)[[4 if network.seed is None else x for x in said]]

    amplifier = SimpleNamespace(seed=None, seen={}, to=lambda device: amplifier)
    monkeypatch.setattr(opinions, "first_network", network)
    monkeypatch.setattr(opinions, "train_classifier", train)
    monkeypatch.setattr(opinions, "logits_of", logits)
    monkeypatch.setattr(opinions, "load_classifier", lambda path: (amplifier, None, None))
    context = SimpleNamespace(
        config=config,
        accelerator=SimpleNamespace(is_main_process=True, wait_for_everyone=nullcontext),
        data=SimpleNamespace(
            splits={"train": SimpleNamespace(small=small, y=y)}, classes=("a", "b")
        ),
        device=None,
    )
    folder = tmp_path / "audit"
    places = {"synthetic": tmp_path, "amplifier": tmp_path, "folder": folder}
    gather_opinions(context, **places, parts=tmp_path / "parts")
    said = read_opinions(folder)
    assert (said.amplifier == 4).all() and (said.again == 2).all() and (said.erm == 2).all()
    again, first, second = trained
    assert again.seen == dict(zip(range(100, 108), labels.tolist(), strict=True))
    assert first.seen | second.seen == dict(enumerate(y.tolist()))
    assert len(first.seen) == len(second.seen) == 6
    # First weights of their own: the amplifier's are those of the run's seed.
    assert len({1, again.seed, first.seed, second.seed}) == 4
