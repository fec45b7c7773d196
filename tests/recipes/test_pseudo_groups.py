"""Pseudo bias labels against hand-worked figures, and the degenerate classes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddb_fast.recipes import conflicting_groups, predicted_groups, pseudo_groups
from ddb_fast.recipes.pseudo_groups import STD_FLOOR

# Class 0: correct losses 1, 1, 3, 3 (mean 2, std 1), wrong ones 4 and 6. Class 1: correct .5 and
# 1.5 (mean 1, std .5), wrong 2.
Y = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 1])
PREDICTED = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 0])
LOSS = torch.tensor([1.0, 1.0, 3.0, 3.0, 4.0, 6.0, 0.5, 1.5, 2.0])


def test_threshold_rule_and_score_by_hand():
    pseudo = pseudo_groups(LOSS, PREDICTED, Y, 2, gamma=3.0)
    assert pseudo.mean.tolist() == pytest.approx([2, 1])
    assert pseudo.std.tolist() == pytest.approx([1, 0.5])
    assert pseudo.threshold.tolist() == pytest.approx([5, 2.5])
    # Class 1: 2 is not above 2.5, so its error set takes over.
    assert pseudo.conflicting.tolist() == [False] * 5 + [True, False, False, True]
    assert pseudo.fallback_classes == (1,)
    assert pseudo.score.tolist() == pytest.approx([-1, -1, 1, 1, 2, 4, -1, 1, 2])


def test_a_loss_at_the_threshold_is_not_above_it():
    pseudo = pseudo_groups(LOSS, PREDICTED, Y, 2, gamma=2.0)
    assert pseudo.conflicting.tolist() == [False] * 5 + [True, False, False, True]
    assert pseudo.fallback_classes == (1,)
    assert pseudo_groups(LOSS, PREDICTED, Y, 2, gamma=1.9).fallback_classes == ()


def test_the_error_set():
    pseudo = pseudo_groups(LOSS, PREDICTED, Y, 2, filter="none")
    assert torch.equal(pseudo.conflicting, PREDICTED != Y)
    assert pseudo.fallback_classes == ()


@pytest.mark.parametrize(
    ("stats_over", "mean", "variance"),
    [
        ("all", 3.0, (4 + 4 + 0 + 0 + 1 + 9) / 6),
        ("correct", 2.0, 1.0),
        ("wrong", 5.0, 1.0),
    ],
)
def test_statistics_are_over_the_images_asked_for(stats_over, mean, variance):
    pseudo = pseudo_groups(LOSS, PREDICTED, Y, 2, stats_over=stats_over)
    assert pseudo.mean[0].item() == pytest.approx(mean)
    assert pseudo.std[0].item() == pytest.approx(math.sqrt(variance))


@pytest.mark.parametrize("stats_over", ["correct", "wrong"])
def test_fewer_than_two_images_of_the_kind_mean_the_whole_class(stats_over):
    predicted = torch.tensor([0, 1, 1]) if stats_over == "correct" else torch.tensor([1, 0, 0])
    loss = torch.tensor([1.0, 2.0, 6.0])
    y = torch.zeros(3, dtype=torch.int64)
    pseudo = pseudo_groups(loss, predicted, y, 2, stats_over=stats_over)
    assert pseudo.mean[0].item() == pytest.approx(3)
    assert pseudo.std[0].item() == pytest.approx(math.sqrt(14 / 3))


def test_equal_losses_have_the_floor_as_their_spread():
    y = torch.tensor([0, 0, 0, 1])
    pseudo = pseudo_groups(torch.tensor([0.5, 0.5, 2.0, 0.3]), torch.tensor([0, 0, 1, 1]), y, 2)
    assert pseudo.std.tolist() == [STD_FLOOR, STD_FLOOR]
    assert pseudo.conflicting.tolist() == [False, False, True, False]
    assert pseudo.score.isfinite().all()


def test_a_class_without_errors_or_without_images_has_no_conflicting_image():
    y = torch.tensor([0, 0])
    pseudo = pseudo_groups(torch.tensor([0.1, 0.2]), torch.tensor([0, 0]), y, 2)
    assert not pseudo.conflicting.any()
    assert pseudo.fallback_classes == ()
    assert pseudo.mean[1].isnan()
    assert pseudo.score.isfinite().all()


rows = st.lists(
    st.tuples(
        st.integers(0, 2), st.integers(0, 2), st.floats(0, 30, width=32, allow_subnormal=False)
    ),
    min_size=1,
    max_size=30,
)


@given(rows, st.sampled_from(["all", "correct", "wrong"]), st.floats(0, 4))
@settings(max_examples=80, deadline=None)
def test_rule_holds_for_any_amplifier(cases, stats_over, gamma):
    y, predicted, loss = (torch.tensor(column) for column in zip(*cases, strict=True))
    pseudo = pseudo_groups(loss, predicted, y, 3, gamma=gamma, stats_over=stats_over)
    wrong = predicted != y
    assert pseudo.score.isfinite().all()
    assert not (pseudo.conflicting & ~wrong).any()
    for n in range(3):
        of_class = y == n
        above = of_class & wrong & (loss.double() > pseudo.threshold[n])
        expected = above if above.any() else of_class & wrong
        assert torch.equal(pseudo.conflicting & of_class, expected)
        assert (n in pseudo.fallback_classes) == (not above.any() and bool(expected.any()))
        # Within a class the score orders images as the loss does.
        order = loss[of_class].double().argsort(stable=True)
        assert (pseudo.score[of_class][order].diff() >= 0).all()


def test_group_ids():
    pseudo = pseudo_groups(LOSS, PREDICTED, Y, 2)
    assert conflicting_groups(pseudo.conflicting, Y).tolist() == [0, 0, 0, 0, 0, 1, 2, 2, 3]
    y, predicted = torch.tensor([0, 2, 1]), torch.tensor([1, 2, 0])
    assert predicted_groups(predicted, y, 3).tolist() == [1, 8, 3]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pseudo_groups(LOSS[:3], PREDICTED, Y, 2), r"\(3,\), \(9,\), \(9,\)"),
        (lambda: pseudo_groups(LOSS / 0 - LOSS / 0, PREDICTED, Y, 2), "9 values like nan"),
        (lambda: pseudo_groups(LOSS, PREDICTED, Y, 1), "y outside 0..0: 1"),
        (lambda: pseudo_groups(LOSS, PREDICTED - 1, Y, 2), "predicted outside 0..1: -1"),
        (lambda: pseudo_groups(LOSS, PREDICTED, Y, 2, stats_over="right"), "got 'right'"),
        (lambda: pseudo_groups(LOSS, PREDICTED, Y, 2, filter="off"), "got 'off'"),
        (lambda: pseudo_groups(LOSS, PREDICTED, Y, 2, gamma=math.nan), "got nan"),
        (lambda: conflicting_groups(PREDICTED != Y, Y[:2]), r"y \(2,\)"),
        (lambda: conflicting_groups(Y + 1, PREDICTED != Y), "they come before y"),
        (lambda: predicted_groups(PREDICTED, Y[:2], 2), "differ"),
        (lambda: predicted_groups(PREDICTED + 1, Y, 2), "predicted outside 0..1: 2"),
        (lambda: predicted_groups(PREDICTED, Y + 1, 2), "y outside 0..1: 2"),
        (lambda: pseudo_groups(LOSS[None], PREDICTED[None], Y[None], 2), r"must be \(N,\)"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
