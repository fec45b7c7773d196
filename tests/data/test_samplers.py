"""Samplers: addressable, resumable, and fair to groups and images."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

from ddb_fast.data.samplers import DataLoaderBatches, GroupBalancedSampler, ShuffledSampler

# Sizes 1000, 10, 0 and 3: group 2 is empty.
GROUPS = torch.tensor([0] * 1000 + [1] * 10 + [3] * 3)[
    torch.randperm(1013, generator=torch.Generator().manual_seed(0))
]


def samplers():
    return [
        ShuffledSampler(37, seed=5),
        GroupBalancedSampler(GROUPS, num_groups=4, seed=5),
    ]


@given(n=st.integers(1, 40), batch_size=st.integers(1, 90), seed=st.integers(0, 2**64 - 1))
@settings(max_examples=60, deadline=None)
def test_every_epoch_is_a_permutation_whatever_the_batch_size(n, batch_size, seed):
    sampler = ShuffledSampler(n, seed=seed)
    steps = math.ceil(3 * n / batch_size)
    stream = torch.cat([sampler.batch(step, batch_size) for step in range(steps)])
    for epoch in range(3):
        assert sorted(stream[epoch * n : (epoch + 1) * n].tolist()) == list(range(n))


def test_epochs_and_seeds_differ():
    first, second = ShuffledSampler(100, seed=0).batch(0, 200).split(100)
    assert not torch.equal(first, second)
    assert not torch.equal(first, ShuffledSampler(100, seed=1).batch(0, 100))
    # No epoch of one seed may be an epoch of the next.
    assert not torch.equal(second, ShuffledSampler(100, seed=1).batch(0, 100))


def test_first_images_of_epochs_are_uniform():
    sampler = ShuffledSampler(5, seed=3)
    stream = sampler.batch(0, 5 * 2000).view(2000, 5)
    counts = torch.bincount(stream[:, 0], minlength=5)
    # Binomial(2000, 1/5): mean 400, standard deviation 17.9.
    assert (counts - 400).abs().max() < 5 * 17.9


@pytest.mark.parametrize("sampler", samplers(), ids=lambda s: type(s).__name__)
def test_a_resumed_run_sees_the_same_stream(sampler):
    stream = [sampler.batch(step, 16) for step in range(9)]
    fresh = next(s for s in samplers() if type(s) is type(sampler))
    # Backwards, so nothing can depend on what was drawn before.
    for step in reversed(range(9)):
        assert torch.equal(fresh.batch(step, 16), stream[step])


@pytest.mark.parametrize("sampler", samplers(), ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("world", [2, 3])
def test_rank_slices_make_up_the_global_batch(sampler, world):
    for step in range(4):
        whole = sampler.batch(step, 8 * world)
        slices = [sampler.batch(step * world + rank, 8) for rank in range(world)]
        assert torch.equal(torch.cat(slices), whole)


def test_the_streams_are_pinned():
    """A change of these figures would make resumed runs disagree with their first half."""
    assert ShuffledSampler(6, seed=0).batch(0, 12).tolist() == [0, 2, 1, 5, 4, 3, 5, 3, 2, 4, 1, 0]
    groups = torch.tensor([0, 0, 0, 1, 1, 2])
    drawn = GroupBalancedSampler(groups, num_groups=3, seed=0).batch(0, 8)
    assert drawn.tolist() == [0, 3, 0, 3, 0, 0, 5, 4]


def test_groups_and_their_images_are_drawn_uniformly():
    sampler = GroupBalancedSampler(GROUPS, num_groups=4, seed=11)
    drawn = torch.cat([sampler.batch(step, 300) for step in range(100)])
    group_of_draw = GROUPS[drawn]
    share = torch.bincount(group_of_draw, minlength=4) / 30000
    assert share[2] == 0
    # Binomial(30000, 1/3): five standard deviations are 0.0136.
    assert (share[[0, 1, 3]] - 1 / 3).abs().max() < 0.0136
    for group, size in ((1, 10), (3, 3)):
        images, counts = drawn[group_of_draw == group].unique(return_counts=True)
        assert len(images) == size
        # Five standard deviations of the image's share, and of the group's (82 draws).
        deviation = math.sqrt(10000 / size * (1 - 1 / size)) + 82 / size
        assert (counts - 10000 / size).abs().max() < 5 * deviation
    # 10,000 draws from 1,000 images miss one with probability e^-10.
    assert len(drawn[group_of_draw == 0].unique()) > 990


def test_group_streams_differ_between_seeds():
    one, other = (GroupBalancedSampler(GROUPS, num_groups=4, seed=s).batch(0, 64) for s in (0, 1))
    assert not torch.equal(one, other)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ShuffledSampler(0, seed=0), "n must be at least 1, got 0"),
        (lambda: ShuffledSampler(3, seed=-1), "seed must be in"),
        (lambda: ShuffledSampler(3, seed=0).batch(-1, 2), "step -1"),
        (lambda: ShuffledSampler(3, seed=0).batch(0, 0), "size 0"),
        (lambda: GroupBalancedSampler(GROUPS, num_groups=3, seed=0), "0..3 outside 0..2"),
        (lambda: GroupBalancedSampler(GROUPS[:0], num_groups=3, seed=0), r"got \(0,\)"),
        (lambda: GroupBalancedSampler(GROUPS, num_groups=4, seed=2**64), "seed must be in"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_data_loader_takes_batches_and_goes_on_in_the_next_epoch():
    sampler = GroupBalancedSampler(GROUPS, num_groups=4, seed=3)
    data = TensorDataset(torch.arange(len(GROUPS)))
    batches = DataLoaderBatches(sampler, batch_size=6, steps=4)
    loader = DataLoader(data, batch_sampler=batches)
    epochs = [[index for (index,) in loader] for _ in range(2)]
    assert len(loader) == 4 and [len(epoch) for epoch in epochs] == [4, 4]
    for step, index in enumerate(epochs[0] + epochs[1]):
        assert torch.equal(index, sampler.batch(step, 6)), step
    again = DataLoaderBatches(sampler, batch_size=6, steps=4, step=4)
    assert [torch.tensor(index).tolist() for index in again] == [i.tolist() for i in epochs[1]]
