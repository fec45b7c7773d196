"""The verdict: hand-worked votes, and what is trained for it."""

import json

import numpy as np
import pytest
import torch

from ddb_fast.opinions import folds
from ddb_fast.verdict import as_data, judge

NETWORKS = ("amplifier", "again", "erm")
Y = torch.zeros(100, dtype=torch.int64)


def votes(**wrong):
    """Opinions on 100 images of class 0; `name=(positions, class)` are those called another."""
    said = {name: Y.clone() for name in NETWORKS}
    for name, (positions, label) in wrong.items():
        said[name][list(positions)] = label
    return said


def everyone(positions, label):
    return dict.fromkeys(NETWORKS, (positions, label))


def test_errors_that_all_networks_share_are_a_bias():
    verdict = judge(Y, **votes(**everyone(range(8), 3)))
    unanimous, generator = verdict.checks
    assert verdict.found and unanimous.passed and unanimous.value == 1.0
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
    assert verdict.checks[0].value == pytest.approx(value)
    assert verdict.found is False and verdict.at_odds.sum() == odd


def test_no_error_at_all_is_no_bias():
    verdict = judge(Y, **votes())
    assert verdict.found is False and verdict.checks[0].value is None


def test_a_poor_generator_says_nothing_unless_a_bias_shows_all_the_same():
    verdict = judge(Y, **votes(amplifier=(range(40), 2), again=(range(30), 3)))
    assert verdict.found is None and verdict.checks[1].value == pytest.approx(0.35)
    assert "too poor" in as_data(verdict, Y, ("cat", "dog"))["sentences"][0]
    better = votes(amplifier=(range(25), 2), again=(range(15), 3))
    assert judge(Y, **better).found is False, "a fifth is the limit"
    shared = everyone(range(60), 1) | {"erm": (range(35), 1)}
    assert judge(Y, **votes(**shared)).found is True, "35 of 60: Wilson's lower bound is .46"


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
        said = {
            name: torch.from_numpy(
                np.where(generator.random(400) < 0.15, generator.integers(1, 10, 400), 0)
            )
            for name in NETWORKS
        }
        found += judge(torch.zeros(400, dtype=torch.int64), **said).found is True
    assert found <= 1


def test_data_for_the_report():
    y = Y.clone()
    y[50:] = 1
    said = votes(**everyone(range(8), 1))
    said = {name: torch.where(y == 1, 1, value) for name, value in said.items()}
    data = as_data(judge(y, **said), y, ("cat", "dog"))
    assert json.loads(json.dumps(data)) == data
    assert data["suspicious"] == {"count": 8, "share": 0.08}
    assert data["classes"][0] == {"name": "cat", "count": 50, "suspicious": 8}
    assert "8 of 100" in data["sentences"][0]
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
