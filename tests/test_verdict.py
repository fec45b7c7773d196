"""The verdict: hand-worked votes, the sign test against SciPy, what is trained for it."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from ddb_fast.opinions import folds
from ddb_fast.verdict import as_data, judge, sign_test

Y = torch.zeros(100, dtype=torch.int64)


def votes(**wrong):
    """Opinions on 100 images of class 0; `name=(positions, class)` are those called another."""
    said = {name: Y.clone() for name in ("guided", "again", "plain", "plain_again", "erm")}
    for name, (positions, label) in wrong.items():
        said[name][list(positions)] = label
    return said


def test_errors_that_all_networks_share_are_a_bias():
    everyone = {n: (range(8), 3) for n in ("guided", "again", "plain", "plain_again", "erm")}
    verdict = judge(Y, **votes(**everyone))
    unanimous, grown, generator = verdict.checks
    assert verdict.found and unanimous.passed and not grown.passed
    assert unanimous.value == 1.0 and grown.value == 1.0, "guidance changed nothing"
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
    everyone = {n: (range(8), 3) for n in ("guided", "again", "plain", "plain_again", "erm")}
    verdict = judge(Y, **votes(**everyone | change))
    assert verdict.checks[0].value == pytest.approx(value)
    assert not verdict.found and verdict.at_odds.sum() == odd


def test_errors_that_guidance_adds_are_a_bias_and_those_it_takes_away_none():
    added = votes(guided=(range(20), 1), again=(range(20), 1))
    verdict = judge(Y, **added)
    assert verdict.found and verdict.checks[1].passed
    assert verdict.checks[1].value == pytest.approx(2.0**-20)
    assert not verdict.checks[0].passed, "the ERM is right on all of them"
    taken = votes(plain=(range(20), 1), plain_again=(range(20), 1))
    assert not judge(Y, **taken).found
    few = votes(guided=(range(5), 1), again=(range(5), 1))
    assert not judge(Y, **few).found, "five of five is chance at p = 1/32"


def test_no_error_at_all_is_no_bias():
    verdict = judge(Y, **votes())
    assert not verdict.found and verdict.checks[0].value is None


def test_a_poor_generator_says_nothing_unless_a_bias_shows_all_the_same():
    poor = {name: (range(40), 1) for name in ("plain", "plain_again")}
    verdict = judge(Y, **votes(**poor, guided=(range(40), 2), again=(range(40), 3)))
    assert verdict.found is None and verdict.checks[2].value == pytest.approx(0.4)
    assert "too poor" in as_data(verdict, Y, ("cat", "dog"))["sentences"][0]
    better = {name: (range(20), 1) for name in ("plain", "plain_again")}
    assert judge(Y, **votes(**better)).found is False
    everyone = {n: (range(40), 1) for n in ("guided", "again", "plain", "plain_again")}
    assert judge(Y, **votes(**everyone, erm=(range(30), 1))).found is True


def test_few_images_do_not_suffice():
    """Unanimous or not: fewer than five are as likely to be mislabelled."""
    names = ("guided", "again", "erm")
    assert not judge(Y, **votes(**{n: (range(4), 1) for n in names})).found
    assert judge(Y, **votes(**{n: (range(5), 1) for n in names})).found
    half = dict.fromkeys(("guided", "again", "plain", "plain_again"), (range(10), 1))
    half["erm"] = (range(5), 1)
    assert not judge(Y, **votes(**half)).found, "five of ten: Wilson's lower bound is .24"


@given(st.integers(0, 300), st.integers(0, 300))
def test_sign_test_is_scipys(more, fewer):
    expected = 1.0 if more + fewer == 0 else binomtest(
        more, more + fewer, alternative="greater"
    ).pvalue  # fmt: skip
    assert sign_test(more, fewer) == pytest.approx(expected, rel=1e-9, abs=1e-300)


def test_chance_alone_is_seldom_a_bias():
    """Networks that err independently, 15 % of the images each: no verdict in 200 sets."""
    generator = np.random.default_rng(0)
    found = 0
    for _ in range(200):
        said = {
            name: torch.from_numpy(
                np.where(generator.random(400) < 0.15, generator.integers(1, 10, 400), 0)
            )
            for name in votes()
        }
        found += judge(torch.zeros(400, dtype=torch.int64), **said).found is True
    assert found <= 1


def test_data_for_the_report():
    everyone = {n: (range(8), 1) for n in ("guided", "again", "plain", "plain_again", "erm")}
    y = Y.clone()
    y[50:] = 1
    said = {name: torch.where(y == 1, 1, value) for name, value in votes(**everyone).items()}
    data = as_data(judge(y, **said), y, ("cat", "dog"))
    assert json.loads(json.dumps(data)) == data
    assert data["suspicious"] == {"count": 8, "share": 0.08}
    assert data["classes"][0] == {"name": "cat", "count": 50, "suspicious": 8}
    assert "8 of 100" in data["sentences"][0]
    nothing = as_data(judge(y, **{n: y for n in said}), y, ("cat", "dog"))
    assert nothing["sentences"][0].startswith("No bias was found")


def test_shapes_are_refused():
    with pytest.raises(ValueError, match="plain"):
        judge(Y, **votes() | {"plain": Y[:5]})


def test_folds_halve_every_class():
    y = torch.tensor([0] * 7 + [1] * 4 + [2])
    half = folds(y, seed=3)
    for label, sizes in ((0, {4, 3}), (1, {2}), (2, {1, 0})):
        members = half[y == label]
        assert {int((members == 0).sum()), int((members == 1).sum())} == sizes
    assert not torch.equal(half, folds(y, seed=4))
    order = torch.randperm(len(y))
    assert set(folds(y[order], seed=3).tolist()) == {0, 1}
