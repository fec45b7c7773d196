"""Metrics against scikit-learn, hand-worked figures and brute force."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from sklearn import metrics as sk

from ddb_fast.data.groups import Groups
from ddb_fast.metrics import (
    accuracies,
    auroc,
    average_precision,
    factor_gaps,
    group_accuracy,
    group_table,
    merge_group_tables,
    precision_recall,
    summarise,
    texture_unbiased_accuracy,
    wilson_interval,
)

# Groups (0, 0), (0, 1), (1, 0), (1, 1) hold 4, 1, 0 and 3 samples with 3, 0, - and 2 correct.
GROUPS = Groups.from_labels([0, 0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 1, 1, 1, 1], num_biases=2)
CORRECT = torch.tensor([1, 1, 1, 0, 0, 1, 1, 0], dtype=torch.bool)


def test_hand_worked_accuracies():
    result = accuracies(CORRECT, GROUPS, train_counts=torch.tensor([60, 20, 100, 20]))
    assert result == pytest.approx(
        {
            "average_accuracy": 5 / 8,
            # The empty group's training share of 100 is left out: (60, 20, 20) / 100.
            "adjusted_average_accuracy": 0.6 * 3 / 4 + 0.2 * 0 + 0.2 * 2 / 3,
            "unbiased_accuracy": (3 / 4 + 0 + 2 / 3) / 3,
            "worst_group_accuracy": 0.0,
            "aligned_accuracy": 5 / 7,
            "conflicting_accuracy": 0.0,
        }
    )


def test_an_empty_group_is_nan_and_never_the_worst():
    accuracy = group_accuracy(CORRECT, GROUPS)
    assert accuracy[2].isnan()
    assert accuracy[[0, 1, 3]].tolist() == pytest.approx([3 / 4, 0, 2 / 3])
    all_right = accuracies(torch.ones(8, dtype=torch.bool), GROUPS)
    assert all_right["worst_group_accuracy"] == 1.0


def test_without_bias_labels_only_the_average_is_defined():
    result = accuracies(CORRECT)
    assert result.pop("average_accuracy") == 5 / 8
    assert len(result) == 5
    assert all(math.isnan(value) for value in result.values())


def test_without_training_counts_or_conflicting_samples_those_averages_are_undefined():
    groups = Groups.from_labels([0, 1], [0, 1])
    result = accuracies(torch.tensor([True, False]), groups)
    assert math.isnan(result["adjusted_average_accuracy"])
    assert math.isnan(result["conflicting_accuracy"])
    assert result["aligned_accuracy"] == 0.5


def test_no_sample_at_all_is_undefined_throughout():
    empty = torch.empty(0, dtype=torch.int64)
    groups = Groups.from_labels(empty, empty, num_classes=2, num_biases=2)
    result = accuracies(torch.empty(0, dtype=torch.bool), groups, train_counts=torch.ones(4))
    assert all(math.isnan(value) for value in result.values())


samples = st.lists(
    st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=60
)


@given(samples)
@settings(deadline=None)
def test_accuracies_agree_with_scikit_learn(rows):
    y, a, predicted = np.array(rows).T
    groups = Groups.from_labels(y, a, num_classes=3, num_biases=3)
    result = accuracies(torch.tensor(predicted == y), groups, train_counts=groups.counts)
    assert result["average_accuracy"] == pytest.approx(sk.accuracy_score(y, predicted))
    # Weighted by its own group counts the adjusted average is the plain one.
    assert result["adjusted_average_accuracy"] == pytest.approx(result["average_accuracy"])
    # A prediction as a group: the sample's own when right, one that no sample has when wrong.
    g = y * 3 + a
    as_group = np.where(predicted == y, g, -1)
    recalls = sk.recall_score(g, as_group, labels=np.unique(g), average=None, zero_division=0)
    assert result["unbiased_accuracy"] == pytest.approx(recalls.mean())
    assert result["worst_group_accuracy"] == pytest.approx(recalls.min())
    for key, of_kind in (("aligned_accuracy", y == a), ("conflicting_accuracy", y != a)):
        if of_kind.any():
            expected = sk.accuracy_score(y[of_kind], predicted[of_kind])
            assert result[key] == pytest.approx(expected)
        else:
            assert math.isnan(result[key])


def test_one_bias_makes_the_unbiased_accuracy_the_balanced_accuracy():
    rng = np.random.default_rng(0)
    y, predicted = rng.integers(0, 4, 200), rng.integers(0, 4, 200)
    groups = Groups.from_labels(y, np.zeros_like(y))
    result = accuracies(torch.tensor(predicted == y), groups)
    assert result["unbiased_accuracy"] == pytest.approx(sk.balanced_accuracy_score(y, predicted))


FACTORS = (("background", 2), ("co_object", 2))


def test_hand_worked_gaps_of_urban_cars():
    """The official training counts; ten test images a group, of which so many are right."""
    # Class 0 goes with background 0 and co-object 0 (a = 0), class 1 with 1 and 1 (a = 3).
    right = {0: (10, 8, 6, 2), 1: (1, 5, 7, 9)}
    rows = [(y, a, i < right[y][a]) for y in (0, 1) for a in range(4) for i in range(10)]
    y, a, correct = zip(*rows, strict=True)
    groups = Groups.from_labels(y, a, num_biases=4, aligned_bias=[0, 3])
    train = torch.tensor([3610, 190, 190, 10, 10, 190, 190, 3610])
    gaps = factor_gaps(torch.tensor(correct), groups, FACTORS, train_counts=train)
    # Usual 19/20, background alone (groups (0, 2) and (1, 1)) 11/20, co-object alone 15/20, both
    # 3/20; in distribution .9025 * .95 + .0475 * .55 + .0475 * .75 + .0025 * .15 = .9195.
    within = 0.9025 * 0.95 + 0.0475 * 0.55 + 0.0475 * 0.75 + 0.0025 * 0.15
    assert within == pytest.approx(0.9195)
    assert gaps == pytest.approx(
        {
            "background_gap": 0.9195 - 0.55,
            "co_object_gap": 0.9195 - 0.75,
            "both_gap": 0.9195 - 0.15,
        }
    )
    average = accuracies(torch.tensor(correct), groups, train_counts=train)
    assert average["adjusted_average_accuracy"] == pytest.approx(0.9195)


@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 1), st.integers(0, 2), st.booleans()),
        min_size=1,
        max_size=60,
    ),
    st.lists(st.integers(1, 50), min_size=18, max_size=18),
)
@settings(deadline=None)
def test_gaps_agree_with_numpy_for_factors_of_other_names_and_sizes(rows, train):
    y, place, season, correct = (np.array(column) for column in zip(*rows, strict=True))
    usual = np.array([[0, 0], [1, 2], [0, 1]])
    groups = Groups.from_labels(
        y, place * 3 + season, num_classes=3, num_biases=6, aligned_bias=usual @ [3, 1]
    )
    factors = (("place", 2), ("season", 3))
    gaps = factor_gaps(torch.tensor(correct), groups, factors, train_counts=torch.tensor(train))
    assert list(gaps) == ["place_gap", "season_gap", "both_gap"]
    weights = np.array([train[k] for k in y * 6 + place * 3 + season], dtype=float)
    weights /= np.bincount(y * 6 + place * 3 + season, minlength=18)[y * 6 + place * 3 + season]
    within = np.average(correct, weights=weights)
    odd = np.stack([place, season], 1) != usual[y]
    kinds = {"place_gap": (True, False), "season_gap": (False, True), "both_gap": (True, True)}
    for name, kind in kinds.items():
        of_kind = (odd == kind).all(1)
        if of_kind.any():
            assert gaps[name] == pytest.approx(within - correct[of_kind].mean())
        else:
            assert math.isnan(gaps[name])


def test_hand_worked_texture_unbiased_accuracy():
    """Two clusterings of 30 images; cells of ten count, the one of nine does not."""
    y = torch.tensor([0] * 20 + [1] * 10)
    correct = torch.tensor([True] * 15 + [False] * 5 + [True] * 4 + [False] * 6)
    # First: class 0 in clusters 0 and 1, ten each: 10/10 and 5/10; class 1 in cluster 0: 4/10.
    # Second: class 0 in cluster 7: 15/20; class 1 in cluster 7 (nine: 3/9, out) and 2 (one, out).
    first = torch.tensor([0] * 10 + [1] * 10 + [0] * 10)
    second = torch.tensor([7] * 20 + [2] + [7] * 9)
    one = texture_unbiased_accuracy(correct, y, first[None])
    assert one == pytest.approx((1.0 + 0.5 + 0.4) / 3)
    two = texture_unbiased_accuracy(correct, y, second[None])
    assert two == pytest.approx(0.75)
    both = texture_unbiased_accuracy(correct, y, torch.stack([first, second]))
    assert both == pytest.approx((one + two) / 2)
    sparse = torch.stack([first, torch.arange(30)])
    assert math.isnan(texture_unbiased_accuracy(correct, y, sparse)), "a clustering without cells"


def test_texture_unbiased_accuracy_agrees_with_scikit_learn():
    rng = np.random.default_rng(0)
    y, clusters = rng.integers(0, 3, 400), rng.integers(0, 9, (3, 400))
    correct = rng.random(400) < 0.6
    expected = []
    for cluster in clusters:
        cell = y * 9 + cluster
        large = np.isin(cell, [c for c in range(27) if (cell == c).sum() >= 10])
        as_cell = np.where(correct, cell, -1)[large]
        recalls = sk.recall_score(
            cell[large], as_cell, labels=np.unique(cell[large]), average=None, zero_division=0
        )
        expected.append(recalls.mean())
        assert 0 < large.sum() < 400, "some cells count and some do not"
    got = texture_unbiased_accuracy(*map(torch.tensor, (correct, y, clusters)))
    assert got == pytest.approx(np.mean(expected))


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    # By hand from the formula, four digits.
    [
        (8, 10, 0.4902, 0.9433),
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (50, 100, 0.4038, 0.5962),
    ],
)
def test_wilson_interval_known_values(successes, n, low, high):
    assert wilson_interval(successes, n) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
@settings(max_examples=60, deadline=None)
def test_wilson_interval_agrees_with_scipy(case):
    successes, n = case
    low, high = wilson_interval(successes, n)
    expected = binomtest(successes, n).proportion_ci(0.95, method="wilson")
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert 0 <= low <= successes / n + 1e-12
    assert successes / n - 1e-12 <= high <= 1


def test_wilson_interval_of_nothing_is_nan_and_bad_counts_are_named():
    assert all(math.isnan(bound) for bound in wilson_interval(0, 0))
    with pytest.raises(ValueError, match="11 successes among 10"):
        wilson_interval(11, 10)
    with pytest.raises(ValueError, match="-1 successes"):
        wilson_interval(-1, 10)


def test_group_table_is_json_and_complete():
    table = group_table(CORRECT, GROUPS)
    low, high = wilson_interval(3, 4)
    assert table[0] == {
        "name": "y=0 a=0",
        "y": 0,
        "a": 0,
        "n": 4,
        "accuracy": 0.75,
        "low": low,
        "high": high,
    }
    assert [row["n"] for row in table] == [4, 1, 0, 3]
    assert [table[2][key] for key in ("accuracy", "low", "high")] == [None, None, None]
    assert json.loads(json.dumps(table, allow_nan=False)) == table


def test_merged_tables_keep_every_seed_and_the_n_of_one():
    tables = [group_table(CORRECT, GROUPS), group_table(~CORRECT, GROUPS)]
    merged = merge_group_tables(tables)
    assert merged[0]["accuracy"] == [0.75, 0.25]
    assert (merged[0]["low"], merged[0]["high"]) == wilson_interval(2, 4)
    assert merged[2]["accuracy"] == [None, None]
    assert merged[2]["low"] is None
    assert merged[0]["name"] == "y=0 a=0"
    other = group_table(CORRECT, Groups.from_labels([0] * 8, [0] * 8, num_biases=2))
    with pytest.raises(ValueError, match="not of the same groups"):
        merge_group_tables([tables[0], other])
    with pytest.raises(ValueError, match="0 group tables"):
        merge_group_tables([])


def test_summarise():
    assert summarise([0.5, 0.7, 0.9]) == {
        "mean": pytest.approx(0.7),
        "std": pytest.approx(0.2),
        "seeds": [0.5, 0.7, 0.9],
    }
    assert summarise([0.5]) == {"mean": 0.5, "std": None, "seeds": [0.5]}
    assert summarise([0.5, float("nan")]) == {"mean": None, "std": None, "seeds": [0.5, None]}
    assert summarise([None, None]) == {"mean": None, "std": None, "seeds": [None, None]}
    with pytest.raises(ValueError, match="no seed"):
        summarise([])


scored = st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=1, max_size=40)


@given(scored)
@settings(deadline=None)
def test_auroc_counts_pairs_with_a_tie_as_one_half(rows):
    score = torch.tensor([float(s) for s, _ in rows])
    positive = torch.tensor([p for _, p in rows])
    wins = [
        1.0 if s > t else 0.5 if s == t else 0.0 for s, p in rows if p for t, q in rows if not q
    ]
    if wins:
        assert auroc(score, positive) == pytest.approx(sum(wins) / len(wins))
    else:
        assert math.isnan(auroc(score, positive))


@given(scored)
@settings(deadline=None)
def test_average_precision_sums_over_thresholds(rows):
    score = torch.tensor([float(s) for s, _ in rows])
    positive = torch.tensor([p for _, p in rows])
    positives = sum(p for _, p in rows)
    if positives in (0, len(rows)):
        assert math.isnan(average_precision(score, positive))
        return
    expected, recalled = 0.0, 0.0
    for threshold in sorted({s for s, _ in rows}, reverse=True):
        above = [p for s, p in rows if s >= threshold]
        recall = sum(above) / positives
        expected += (recall - recalled) * sum(above) / len(above)
        recalled = recall
    assert average_precision(score, positive) == pytest.approx(expected)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
@settings(deadline=None)
def test_precision_and_recall_agree_with_scikit_learn(rows):
    predicted, actual = (torch.tensor(column) for column in zip(*rows, strict=True))
    precision, recall = precision_recall(predicted, actual)
    expected = sk.precision_score(actual, predicted, zero_division=np.nan)
    assert precision == pytest.approx(expected, nan_ok=True)
    expected = sk.recall_score(actual, predicted, zero_division=np.nan)
    assert recall == pytest.approx(expected, nan_ok=True)


def gaps_of(factors):
    return factor_gaps(CORRECT, GROUPS, factors, train_counts=GROUPS.counts)


def textures_of(clusters):
    return texture_unbiased_accuracy(CORRECT, GROUPS.y, clusters)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: accuracies(torch.ones(8)), r"must be \(N,\) bool, got \(8,\) torch.float32"),
        (lambda: accuracies(CORRECT[:3], GROUPS), "3 entries for 8 samples"),
        (lambda: accuracies(CORRECT, GROUPS, train_counts=torch.ones(3)), r"shape \(3,\)"),
        (lambda: auroc(torch.ones(3), CORRECT), "positive has 8 entries for 3 samples"),
        (lambda: auroc(torch.full((8,), float("nan")), CORRECT), "NaN"),
        (lambda: average_precision(torch.ones(8), torch.ones(8)), "positive must be"),
        (lambda: precision_recall(CORRECT, CORRECT[:2]), "actual has 2 entries"),
        (lambda: gaps_of((("background", 2),)), "factors .*background.*: two are needed"),
        (lambda: gaps_of(FACTORS), "multiply to the 2 bias attributes"),
        (lambda: textures_of(torch.zeros(8)), r"shape \(8,\), expected \(R, 8\)"),
        (lambda: textures_of(torch.zeros(1, 8)), "clusters must hold integers .* torch.float32"),
        (lambda: textures_of(-torch.ones(1, 8).long()), "clusters must hold integers from 0 on"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("n", [1, 7, 300, 9999])
def test_an_interval_holds_its_share_at_both_ends(n):
    assert wilson_interval(n, n)[1] == 1.0 and wilson_interval(0, n)[0] == 0.0
    assert all(low <= k / n <= high for k in range(n + 1) for low, high in [wilson_interval(k, n)])
