"""The running loss of every sample: first visit, average, repeats, class maxima."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddb_fast.recipes.loss_table import EPS, LossTable, largest_per_class

Y = torch.tensor([0, 0, 1, 1, 2])


def table(moving_average: float) -> LossTable:
    return LossTable(Y, num_classes=3, moving_average=moving_average).double()


def update(losses: LossTable, index: list[int], values: list[float]) -> list[float]:
    return losses.update(torch.tensor(index), torch.tensor(values, dtype=torch.float64)).tolist()


def test_first_visit_enters_as_it_is_and_later_ones_are_averaged():
    losses = table(0.7)
    assert update(losses, [3, 0], [2.0, 4.0]) == [2.0, 4.0]
    assert update(losses, [0, 1], [1.0, 5.0]) == pytest.approx([0.7 * 4 + 0.3 * 1, 5.0])
    assert losses.loss.tolist() == pytest.approx([3.1, 5.0, 0.0, 2.0, 0.0])
    assert losses.visited.tolist() == [True, True, False, True, False]
    assert losses.class_maximum().tolist() == pytest.approx([5.0, 2.0, EPS])


def test_without_averaging_the_latest_loss_stays():
    losses = table(0.0)
    update(losses, [0, 1], [4.0, 3.0])
    assert update(losses, [0], [1.0]) == [1.0]
    # The class maximum goes down with it.
    assert losses.class_maximum()[0] == 3.0


@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 4), st.floats(0, 50)), min_size=1, max_size=8),
        min_size=1,
        max_size=4,
    ),
    st.randoms(use_true_random=False),
)
@settings(max_examples=50, deadline=None)
def test_batches_agree_with_a_dictionary_in_any_order(batches, random):
    losses, expected = table(0.7), {}
    for batch in batches:
        shuffled = random.sample(batch, len(batch))
        update(losses, [i for i, _ in shuffled], [v for _, v in shuffled])
        entered = {}
        for i, value in batch:
            new = 0.7 * expected[i] + 0.3 * value if i in expected else value
            entered[i] = max(new, entered.get(i, 0.0))
        expected |= entered
    for i in range(5):
        assert losses.loss[i].item() == pytest.approx(expected.get(i, 0.0), abs=1e-12)


def test_largest_per_class_may_be_divided_by():
    values = torch.tensor([0.0, 0.0, 1.0, 7.0, 2.0])
    assert largest_per_class(values, Y, num_classes=4).tolist() == pytest.approx([EPS, 7, 2, EPS])


@pytest.mark.parametrize("moving_average", [-0.1, 1.0, float("nan")])
def test_moving_average_outside_its_range_is_named(moving_average):
    with pytest.raises(ValueError, match=f"got {moving_average}"):
        table(moving_average)
