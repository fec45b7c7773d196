"""The verdict: hand-worked votes, and what is trained for it."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from ddb_fast import checkpoint, opinions
from ddb_fast.config import with_fields
from ddb_fast.opinions import (
    AT_ODDS,
    FOLDS,
    at_odds_table,
    folds,
    gather_opinions,
    halves,
    read_opinions,
)
from ddb_fast.presets import PRESETS
from ddb_fast.verdict import NONE, agreed, as_data, judge, standing

NETWORKS = ("amplifier", "again", "erm")
Y = torch.arange(100) // 80 * 5
"""80 images of class 0, then 20 of class 5."""


def votes(**wrong):
    """Opinions on Y; `name=(positions, class)` are those called another."""
    said = {name: Y.clone() for name in NETWORKS}
    for name, (positions, label) in wrong.items():
        said[name][list(positions)] = label
    return said


def gains(y, amplifier, again, mean=0.2, spread=0.1, **_):
    """Of what both amplifiers call the same other class, `mean` +- spread in turns."""
    odd = ((amplifier == again) & (amplifier != y)).nonzero()[:, 0]
    gain = torch.full(y.shape, torch.nan)
    gain[odd] = mean + spread * torch.where(torch.arange(len(odd)) % 2 == 0, 1.0, -1.0)
    return gain


def judged(y, said, **gained):
    """The verdict where images at odds gain by being met more often, unless told otherwise."""
    return judge(y, **said, gain=gains(y, **said, **gained))


def checks(verdict):
    return {check.name: check for check in verdict.checks}


def everyone(positions, label):
    return dict.fromkeys(NETWORKS, (positions, label))


def test_errors_that_all_networks_share_are_a_bias():
    verdict = judged(Y, votes(**everyone(range(8), 3)))
    learnt, unanimous, separable, generator, shared = verdict.checks
    assert separable.passed and separable.value == pytest.approx(0.2)
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
    verdict = judged(Y, votes(**everyone(range(8), 3) | change))
    assert checks(verdict)["unanimous"].value == pytest.approx(value)
    assert verdict.found is False and verdict.at_odds.sum() == odd


def test_no_error_at_all_is_no_bias():
    verdict = judged(Y, votes())
    assert verdict.found is False and checks(verdict)["unanimous"].value is None


def test_a_poor_generator_says_nothing_unless_a_bias_shows_all_the_same():
    """The worse of the two amplifiers counts: one may have failed."""
    verdict = judged(Y, votes(amplifier=(range(25), 2), again=(range(3), 3)))
    assert verdict.found is None and checks(verdict)["generator"].value == pytest.approx(0.25)
    first, why, _ = as_data(verdict, Y, ("cat",) * 6)["sentences"]
    assert "too poor" in first and "25 points more often" in why
    better = votes(amplifier=(range(10), 2), again=(range(5), 3))
    assert judged(Y, better).found is False, "half of what the ERM learnt is the limit"
    assert judged(Y, better | votes(again=(range(11), 3))).found is None
    shared = everyone(range(40), 1) | {"erm": (range(8), 1)}
    assert judged(Y, votes(**shared)).found is None, "8 of 40: Wilson's lower bound is .11"
    y = torch.arange(100) // 60 * 5
    said = {name: y.clone() for name in NETWORKS}
    said["amplifier"][:49] = said["again"][:49] = said["erm"][:28] = 1
    verdict = judged(y, said)
    assert verdict.found is True, "28 of 49: Wilson's lower bound is .43"
    assert not checks(verdict)["generator"].passed
    said = {name: y.clone() for name in NETWORKS}
    said["amplifier"][:14] = 1
    assert judged(y, said).found is False, ".14 is the limit where the ERM learnt more"
    said["amplifier"][14] = 1
    assert judged(y, said).found is None


def test_a_bias_behind_other_errors_is_not_called_none():
    """The ERM errs on 12 images, the amplifiers on most of these and on as many again."""
    y = torch.arange(100) // 60 * 5
    said = {name: y.clone() for name in NETWORKS}
    said["erm"][:12] = said["amplifier"][:26] = said["again"][:26] = 1
    verdict = judged(y, said)
    assert [c.passed for c in verdict.checks] == [True, False, True, True, False]
    assert checks(verdict)["unanimous"].value == pytest.approx(12 / 26), (
        "Wilson's lower bound is .29"
    )
    assert verdict.found is None and checks(verdict)["shared"].value == 1.0
    first, why, _ = as_data(verdict, y, ("cat",) * 6)["sentences"]
    assert "There may be a bias" in first and "100 % are" in why and "only 46 % are" in why
    said["amplifier"][:2] = 0
    assert judged(y, said).found is None, "10 of 12: Wilson's lower bound is .55"
    said["amplifier"][2] = 0
    assert judged(y, said).found is False, "9 of 12: .47"


def test_networks_that_learnt_nothing_say_nothing():
    """All name class 0: their errors agree, and none errs more often than the ERM."""
    constant = dict.fromkeys(NETWORKS, torch.zeros_like(Y))
    verdict = judged(Y, constant)
    assert verdict.found is None and not checks(verdict)["learnt"].passed
    first, why, _ = as_data(verdict, Y, ("cat",) * 6)["sentences"]
    assert "too little was learnt" in first and why.count("errs on 20 %") == 2
    better = constant | {"erm": torch.where(torch.arange(100) < 90, 0, 5)}
    verdict = judged(Y, better)
    assert checks(verdict)["learnt"].passed, "10 errors of 100: Wilson's upper bound is .17"
    assert verdict.found is None and not checks(verdict)["generator"].passed, (
        "the amplifiers still guess"
    )


def test_most_images_at_odds_are_no_bias():
    """What most images are is the rule and not its exception."""
    y = torch.arange(100) // 20
    said = {name: y.clone() for name in NETWORKS}
    said["amplifier"][:51] = said["again"][:51] = said["erm"][:30] = 5
    verdict = judged(y, said)
    assert verdict.found is None and not checks(verdict)["unanimous"].passed
    said["amplifier"][:2] = said["again"][:2] = 0
    assert judged(y, said).found is True, "28 of 49"


def test_amplifiers_that_guess_find_no_bias():
    """Both name the larger of two classes: a weak ERM agrees with half of their errors."""
    y = (torch.arange(100) >= 52).long()
    said = {name: torch.zeros_like(y) for name in NETWORKS}
    said["erm"] = torch.where(torch.arange(100) < 79, 0, 1)
    verdict = judged(y, said)
    assert checks(verdict)["learnt"].passed and checks(verdict)["unanimous"].value == 27 / 48
    assert verdict.found is None
    assert "the generator is too poor" in as_data(verdict, y, ("cat", "dog"))["sentences"][0]
    said["amplifier"][60:] = said["again"][60:] = 1
    assert judged(y, said).found is True, "8 of 8, where the ERM errs on 19 more"


def test_few_images_do_not_suffice():
    """Unanimous or not: fewer than five are as likely to be mislabelled."""
    assert not judged(Y, votes(**everyone(range(4), 1))).found
    assert judged(Y, votes(**everyone(range(5), 1))).found
    half = everyone(range(10), 1) | {"erm": (range(5), 1)}
    assert not judged(Y, votes(**half)).found, "five of ten: Wilson's lower bound is .24"


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
        found += judged(torch.from_numpy(y), said).found is True
    assert found <= 1


def test_data_for_the_report():
    y = Y.clone()
    y[50:] = 1
    said = votes(**everyone(range(8), 1))
    said = {name: torch.where(y == 1, 1, value) for name, value in said.items()}
    data = as_data(judged(y, said), y, ("cat", "dog"))
    assert json.loads(json.dumps(data)) == data
    assert data["suspicious"] == {"count": 8, "share": 0.08}
    assert data["classes"] == [
        {"name": "cat", "count": 50, "suspicious": 8},
        {"name": "dog", "count": 50, "suspicious": 0},
    ]
    assert "8 of 100 training images (8.0 %)" in data["sentences"][0]
    assert "On 100 % of all images" in data["sentences"][1]
    partly = said | {"again": torch.where(torch.arange(100) < 4, y, said["again"])}
    found = as_data(judged(y, partly), y, ("cat", "dog"))
    assert "100 training images" in found["sentences"][0]
    assert "only 50 % of these" in found["sentences"][1]
    nothing = as_data(judged(y, dict.fromkeys(said, y)), y, ("cat", "dog"))
    assert nothing["sentences"][0].startswith("No bias was found")


def test_a_bias_is_found_only_where_its_images_gain_by_being_met_more_often():
    """Ten images, gains m +- .1: their standard error is .1 * sqrt(10 / 9) / sqrt(10) = 1 / 30."""
    said = votes(**everyone(range(10), 3))
    for mean, found, first in (
        (0.068, True, "A bias was found: 10 of 100"),
        (0.066, None, "There may be a bias: 10 of 100"),
        (0.001, None, "There may be a bias: 10 of 100"),
        (-0.066, None, "There may be a bias: 10 of 100"),
        (-0.068, None, "No bias is shown, though 10 of 100"),
    ):
        verdict = judged(Y, said, mean=mean)
        assert verdict.found is found
        assert checks(verdict)["separable"].limit == pytest.approx(2 / 30)
        assert as_data(verdict, Y, ("cat",) * 6)["sentences"][0].startswith(first)
    unknown = judge(Y, **said, gain=torch.full((100,), torch.nan))
    assert unknown.found is None and checks(unknown)["separable"].value is None
    first, _, why = as_data(unknown, Y, ("cat",) * 6)["sentences"]
    assert first.startswith("There may be") and "not certain" in why
    assert judged(Y, votes(), mean=1).found is False, "nothing is at odds"
    assert judged(Y, said, mean=0.001, spread=0).found is None, "ten equal gains are no ten"


def test_a_gain_of_four_images_is_none():
    """Six are unanimous, but two of them have nothing to be compared with."""
    said = votes(**everyone(range(6), 3))
    gain = gains(Y, **said)
    gain[4] = torch.nan
    assert judge(Y, **said, gain=gain).found is True
    gain[5] = torch.nan
    assert judge(Y, **said, gain=gain).found is None


def test_a_standing_is_a_share_of_an_area_under_the_curve():
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(90) % 3
    taken = torch.randint(-1, 3, (90,), generator=generator)
    logits = torch.randn(90, 3, generator=generator).round(decimals=1)
    stand = standing(logits, y, taken)
    odd = (taken != NONE) & (taken != y)
    assert torch.equal(stand.isnan(), ~odd)
    for own in range(3):
        for other in {0, 1, 2} - {own}:
            rows = (y == own) & (taken == other)
            typical = (y == other) & (taken == other)
            margins = logits[:, own].double() - logits[:, other].double()
            area = roc_auc_score(rows[rows | typical], margins[rows | typical])
            assert stand[rows].mean().item() == pytest.approx(area)
    assert standing(logits[:1], y[:1], torch.tensor([1])).isnan().all(), "nothing to compare with"


def test_no_network_orders_images_better_than_their_likelihood_ratio():
    """Overlapping classes: an ERM that knows all there is cannot be bettered, a shortcut's can.

    Two classes, N(-1, 1) and N(1, 1). Amplifiers cut at 0, so those at odds lie beyond it; the best
    margin rises with x. Then a second feature tells the classes apart, and the ERM does not use it.
    """
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(20_000) % 2
    x = torch.randn(len(y), generator=generator) + 2.0 * y - 1
    cue = torch.randn(len(y), generator=generator) + 4.0 * y - 2
    amplifier = (x > 0).long()
    taken = agreed(amplifier, amplifier)

    def stand(margin):
        return standing(torch.stack((-margin, margin), 1), y, taken).nanmean().item()

    noisy = x + 0.3 * torch.randn(len(y), generator=generator)
    assert stand(3 * x + 1) == stand(x) > 0.6, "only the order counts"
    assert max(stand(noisy), stand(x.sin()), stand(-x)) < stand(x)
    assert stand(x + cue) > stand(x) + 0.1


def test_shapes_are_refused():
    with pytest.raises(ValueError, match="again"):
        judge(Y, **votes() | {"again": Y[:5]}, gain=torch.zeros(100))


def test_folds_deal_every_class_out():
    y = torch.tensor([0] * 9 + [1] * 4 + [2] + [3] * 2)
    fold = folds(y, seed=3)
    assert sorted(fold.tolist()) == sorted(4 * [0, 1, 2, 3]) and FOLDS == 4
    for label, most in ((0, 3), (1, 1), (2, 1), (3, 1)):
        counts = fold[y == label].bincount(minlength=4)
        assert counts.max() == most and counts.min() >= most - 1
    assert not torch.equal(fold, folds(y, seed=4))
    order = torch.randperm(len(y))
    assert folds(y[order], seed=3).bincount().tolist() == [4] * 4
    assert folds(torch.tensor([0, 1]), seed=0).tolist() == [0, 1]


def test_images_at_odds_are_half_of_their_class():
    y = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 2])
    odd = torch.tensor([1, 0, 0, 1, 0, 0, 0, 0, 1]).bool()
    counts = halves(odd, y).bincount(minlength=9)
    assert counts[[0, 3]].tolist() == [3, 2] and counts[[1, 2, 4]].tolist() == [2, 2, 1]
    assert counts[5:].tolist() == [2, 2, 2, 2], "of one kind only"
    assert [int(counts[y == label].sum()) for label in range(3)] == [10, 6, 2]


def test_each_opinion_is_of_a_network_that_saw_none_of_the_images(monkeypatch, tmp_path):
    """Networks that remember: what they say of an image is whether they were trained on it.

    Both amplifiers take images 0 and 3 for the other class, and one alone image 5. Networks that
    met those as often as the others of their class know them afterwards, others rank all alike.
    """
    config = with_fields(PRESETS["digits"](), {"seed": "1"})
    y = torch.arange(16) % 2
    small = torch.arange(16, dtype=torch.uint8).view(16, 1, 1, 1).repeat(1, 2, 2, 3)
    made = 100 + torch.arange(8, dtype=torch.uint8).view(8, 1, 1, 1).repeat(1, 3, 2, 2)
    labels, paths = torch.arange(8) % 2, [f"a, {i}.png" for i in range(16)]
    checkpoint.save_tensors(tmp_path / "images.safetensors", {"images": made, "labels": labels}, {})
    trained, asked = {}, []

    def network(given, classes, *, seed):
        assert given is config.amplifier and classes == 2
        return SimpleNamespace(seed=seed, name=None, seen=None, to=lambda device: None)

    def train(
        context, network, given, images, y, *, whole, recipe, sampler, seed, stage, **options
    ):
        assert given is config.amplifier and whole and seed == network.seed
        epoch = len(getattr(sampler, "positions", images))
        index = sampler.batch(0, epoch)
        network.seen = images[index][:, 0, 0, 0].long().bincount(minlength=16)
        network.name = stage.removeprefix("verdict, ")
        assert torch.equal(images[index][:, 0, 0, 0] % 2, y[index])
        trained[network.name] = network

    def logits(network, images, given, *, device, crop, rows):
        assert images is small and given is config.amplifier and not crop
        asked.append((network.name, rows.tolist()))
        if network.name == "again":
            wrong = (rows == 0) | (rows == 3) | (rows == 5)
            return torch.eye(3)[torch.where(wrong, 1 - y[rows], y[rows])]
        said = torch.eye(3)[torch.where(network.seen[rows] > 0, y[rows], 2)]
        if network.name.startswith("rebalanced"):
            said[:, 0] += ((rows == 0) | (rows == 3)) * torch.where(y[rows] == 0, 0.1, -0.1)
        return said

    table = ["split,y,predicted,loss,score,pseudo_conflicting"]
    table += [f"train,{k},{1 - k if i in (0, 3) else k},0,0,0" for i, k in enumerate(y.tolist())]
    (tmp_path / "scores.csv").write_text("\n".join(table) + "\n", "utf-8")
    monkeypatch.setattr(opinions, "first_network", network)
    monkeypatch.setattr(opinions, "train_classifier", train)
    monkeypatch.setattr(opinions, "logits_of", logits)
    context = SimpleNamespace(
        config=config,
        accelerator=SimpleNamespace(is_main_process=True, wait_for_everyone=nullcontext),
        data=SimpleNamespace(
            splits={"train": SimpleNamespace(small=small, y=y, paths=paths)}, classes=("a", "b")
        ),
        device=None,
    )
    folder = tmp_path / "audit"
    places = {"synthetic": tmp_path, "amplifier": tmp_path, "folder": folder}
    gather_opinions(context, **places, parts=tmp_path / "parts")
    said = read_opinions(folder)
    assert (said.amplifier != y).nonzero()[:, 0].tolist() == [0, 3]
    assert (said.again != y).nonzero()[:, 0].tolist() == [0, 3, 5] and (said.erm == 2).all()
    assert said.gain[[0, 3]].tolist() == [0.5, 0.5], "from half of all to above all"
    assert said.gain.isnan().sum() == 14 and torch.equal(said.gain.isnan(), said.standing.isnan())
    assert said.standing[[0, 3]].tolist() == [1, 1]
    assert (folder / "at_odds.csv").read_text("utf-8").splitlines() == [
        "index,path,y,predicted,standing",
        '0,"a, 0.png",0,1,1.0000',
        '3,"a, 3.png",1,0,1.0000',
    ]
    assert trained["again"].seen[100:].tolist() == [1] * 8
    fold = folds(y, seed=1)
    for part in range(FOLDS):
        others = fold != part
        erm = trained[f"erm {part}"]
        assert torch.equal(erm.seen, others.long())
        rows = (fold == part).nonzero()[:, 0].tolist()
        assert (f"erm {part}", rows) in asked
        if not {0, 3} & set(rows):
            assert f"rebalanced {part}" not in trained, "nobody to judge"
            continue
        rebalanced = trained[f"rebalanced {part}"]
        assert rebalanced.seed == erm.seed and (f"rebalanced {part}", rows) in asked
        assert rebalanced.seen[~others].sum() == 0 and rebalanced.seen.sum() == 2 * others.sum()
        for image in {0, 3} - set(rows):
            assert rebalanced.seen[image] == (others & (y == y[image])).sum()
    # First weights of their own: the amplifier's are those of the run's seed.
    assert len({1, trained["again"].seed, *(trained[f"erm {i}"].seed for i in range(4))}) == 6
    # What is there is not trained again.
    trained.clear()
    gather_opinions(context, **places, parts=tmp_path / "parts")
    assert not trained
    assert torch.equal(read_opinions(folder).gain.nan_to_num(-1), said.gain.nan_to_num(-1))


def test_images_at_odds_are_listed_the_likeliest_mislabelled_first():
    said = {"standing": torch.tensor([0.5, torch.nan, 0.25, 0.75]), "amplifier": Y[[9, 0, 90, 0]]}
    text = at_odds_table(said, torch.tensor([1, 0, 2, 3]), ["p", "q", "r", "s"])
    rows = [row.split(",") for row in text.splitlines()]
    assert rows[0] == list(AT_ODDS)
    assert rows[1:] == [
        ["2", "r", "2", "5", "0.2500"],
        ["0", "p", "1", "0", "0.5000"],
        ["3", "s", "3", "0", "0.7500"],
    ]


def test_opinions_of_an_older_version_give_no_verdict(tmp_path, caplog):
    older = {name: Y for name in NETWORKS}
    checkpoint.save_tensors(tmp_path / "predictions.safetensors", older, {})
    assert read_opinions(tmp_path) is None
    assert "of an older version, no verdict" in caplog.text
