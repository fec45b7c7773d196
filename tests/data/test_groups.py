"""Groups: numbering, names, alignment and the errors of bad labels."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddb_fast.data.groups import Groups, majority_bias


def waterbirds() -> Groups:
    return Groups.from_labels(
        [0, 0, 1, 1, 1, 0],
        [0, 1, 1, 0, 1, 0],
        class_names=["landbird", "waterbird"],
        bias_names=["land", "water"],
    )


def test_numbering_counts_and_names():
    groups = waterbirds()
    assert groups.ids.tolist() == [0, 1, 3, 2, 3, 0]
    assert groups.counts.tolist() == [2, 1, 1, 2]
    assert groups.names == (
        "y=landbird a=land",
        "y=landbird a=water",
        "y=waterbird a=land",
        "y=waterbird a=water",
    )
    assert groups.y_of.tolist() == [0, 0, 1, 1]
    assert groups.a_of.tolist() == [0, 1, 0, 1]
    assert groups.bias_aligned.tolist() == [True, False, True, False, True, True]
    assert (len(groups), groups.num_groups) == (6, 4)


def test_names_default_to_the_numbers():
    assert Groups.from_labels([0, 1], [0, 2]).names[-1] == "y=1 a=2"


def test_alignment_is_the_diagonal_even_against_the_majority_when_counts_match():
    groups = Groups.from_labels([0, 0, 0, 1], [1, 1, 0, 1])
    assert groups.aligned_bias.tolist() == [0, 1]
    assert groups.bias_aligned.tolist() == [False, False, True, True]


def test_alignment_is_the_majority_of_the_class_for_other_attribute_counts():
    groups = Groups.from_labels([0, 0, 0, 1, 1, 1], [2, 2, 0, 0, 1, 1])
    assert groups.aligned_bias.tolist() == [2, 1]
    assert groups.bias_aligned.tolist() == [True, True, False, False, True, True]


def test_another_split_keeps_the_training_alignment_names_and_group_count():
    train = Groups.from_labels([0, 0, 0, 1, 1], [2, 2, 0, 1, 1], class_names=["cat", "dog"])
    test = train.with_labels([0, 0, 1], [0, 0, 1])
    # Its own majority of class 0 would be 0.
    assert test.bias_aligned.tolist() == [False, False, True]
    assert test.names == train.names
    assert test.counts.tolist() == [2, 0, 0, 0, 1, 0]
    assert train.counts.tolist() == [1, 0, 2, 0, 2, 0]


def test_majority_takes_the_lowest_attribute_on_a_tie_and_zero_for_an_absent_class():
    majority = majority_bias([0, 0, 2, 2, 2], [1, 2, 0, 2, 2], num_classes=3, num_biases=3)
    assert majority.tolist() == [1, 0, 2]


def test_an_explicit_alignment_wins():
    groups = Groups.from_labels([0, 1], [1, 0], aligned_bias=[1, 0])
    assert groups.bias_aligned.all()


def test_labels_of_few_bits_number_many_groups():
    """Group 29 * 10 + 9 does not fit the eight bits that the labels come in."""
    y, a = torch.tensor([29, 2], dtype=torch.uint8), torch.tensor([9, 3], dtype=torch.uint8)
    groups = Groups.from_labels(y, a, num_classes=30, num_biases=10)
    assert groups.ids.tolist() == [299, 23] and groups.ids.dtype == torch.int64
    assert majority_bias(y, a, num_classes=30, num_biases=10)[29] == 9


def test_an_empty_split_has_groups_without_samples():
    empty = torch.empty(0, dtype=torch.int64)
    groups = Groups.from_labels(empty, empty, num_classes=2, num_biases=2)
    assert groups.counts.tolist() == [0, 0, 0, 0]


@settings(deadline=None)
@given(
    st.integers(1, 5).flatmap(
        lambda k: st.integers(1, 4).flatmap(
            lambda b: st.tuples(
                st.just(k),
                st.just(b),
                st.lists(st.tuples(st.integers(0, k - 1), st.integers(0, b - 1)), min_size=1),
            )
        )
    )
)
def test_every_sample_is_in_the_group_of_its_labels(case):
    num_classes, num_biases, pairs = case
    y, a = (torch.tensor(column) for column in zip(*pairs, strict=True))
    groups = Groups.from_labels(y, a, num_classes=num_classes, num_biases=num_biases)
    assert torch.equal(groups.y_of[groups.ids], y)
    assert torch.equal(groups.a_of[groups.ids], a)
    assert groups.counts.tolist() == [
        pairs.count((c, b)) for c in range(num_classes) for b in range(num_biases)
    ]
    for label, attribute, aligned in zip(y, a, groups.bias_aligned, strict=True):
        assert aligned == (attribute == groups.aligned_bias[label])


@pytest.mark.parametrize(
    ("y", "a", "options", "message"),
    [
        ([0, -1], [0, 0], {}, "y has 1 values outside 0..0: -1"),
        ([0, 1], [0, 5], {"num_biases": 2}, "a has 1 values outside 0..1: 5"),
        ([0, 1], [0], {}, r"a has shape \(1,\), expected \(2,\)"),
        ([0, 1], [0], {"num_biases": 2}, r"a has shape \(1,\), expected \(2,\)"),
        ([[0, 1]], [[0, 1]], {}, r"y has shape \(1, 2\), expected \(N,\)"),
        ([0.5, 1.0], [0, 1], {}, "y must hold integers, got torch.float32"),
        ([0, 1], [True, False], {}, "a must hold integers, got torch.bool"),
        ([0, 1], [0, 1], {"class_names": ["a"], "num_classes": 2}, "2 class labels"),
        ([0, 1], [0, 1], {"num_biases": 0}, "0 bias labels"),
        ([0, 1], [0, 1], {"aligned_bias": [0]}, r"aligned_bias has shape \(1,\)"),
        ([0, 1], [0, 1], {"aligned_bias": [0, 2]}, "aligned_bias has 1 values outside 0..1: 2"),
        ([], [], {}, "no samples"),
    ],
)
def test_bad_labels_are_named(y, a, options, message):
    with pytest.raises(ValueError, match=message):
        Groups.from_labels(y, a, **options)
