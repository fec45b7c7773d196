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


@pytest.mark.parametrize("count", (5, 63, 700))
@pytest.mark.parametrize("num_classes", (1, 3, 20))
def test_class_maxima_are_those_of_all_samples(count, num_classes):
    """Step by step, up and down, repeats included, and after a checkpoint; some classes empty."""
    generator = torch.Generator().manual_seed(count + num_classes)
    y = torch.randint(num_classes, (count,), generator=generator)
    losses = LossTable(y, num_classes=num_classes, moving_average=0.3)
    for step in range(30):
        index = torch.randint(count, (8,), generator=generator)
        losses.update(index, 10 * torch.rand(8, generator=generator))
        truth = largest_per_class(losses.loss, y, num_classes=num_classes)
        assert torch.equal(losses.class_maximum(), truth)
        if step == 10:
            state, losses = losses.state_dict(), LossTable(y, num_classes=num_classes,
                                                           moving_average=0.3)  # fmt: skip
            losses.load_state_dict(state)
            assert torch.equal(losses.class_maximum(), truth)


def test_a_step_looks_at_the_root_of_the_set():
    y = torch.arange(100_000) % 10
    losses = LossTable(y, num_classes=10, moving_average=0.7)
    blocks, size = losses.members.shape
    assert 64 * size + blocks < 100_000 / 10
    assert sorted(losses.members.unique().tolist()) == list(range(100_000))
    assert torch.equal(y[losses.members], losses.block_class.unsqueeze(1).expand(-1, size))
    block_of = losses.block_of.unsqueeze(1)
    assert (losses.members[losses.block_of] == torch.arange(100_000).unsqueeze(1)).any(1).all()
    assert (block_of >= 0).all() and (block_of < blocks).all()


def test_largest_per_class_may_be_divided_by():
    values = torch.tensor([0.0, 0.0, 1.0, 7.0, 2.0])
    assert largest_per_class(values, Y, num_classes=4).tolist() == pytest.approx([EPS, 7, 2, EPS])


@pytest.mark.parametrize("moving_average", [-0.1, 1.0, float("nan")])
def test_moving_average_outside_its_range_is_named(moving_average):
    with pytest.raises(ValueError, match=f"got {moving_average}"):
        table(moving_average)
