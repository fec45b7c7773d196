"""GroupDRO against two steps worked in plain Python, and its edges."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ddb_fast.recipes import GroupDRO, LfF, ReweightedLoss, group_dro

# Three groups of 4, 2 and 1 training samples.
GROUPS = torch.tensor([0, 0, 0, 0, 1, 1, 2])


def logits_with_loss(losses: list[float]) -> torch.Tensor:
    """Two-class logits whose cross-entropy on label 0 is the given one."""
    return torch.tensor([[0.0, math.log(math.exp(x) - 1)] for x in losses], dtype=torch.float64)


@pytest.mark.parametrize("adjustment", [0.0, 0.5])
def test_two_steps_by_hand(adjustment):
    recipe = GroupDRO(GROUPS, 3, step_size=0.1, adjustment=adjustment).double()
    margin = [adjustment / math.sqrt(n) for n in (4, 2, 1)]
    # The second batch holds no sample of group 1.
    batches = [
        ([0, 1, 4, 6], [0.2, 0.4, 1.0, 3.0], [0.3, 1.0, 3.0]),
        ([2, 6, 6, 3], [0.1, 2.0, 4.0, 0.5], [0.3, 0.0, 3.0]),
    ]
    q = [1 / 3, 1 / 3, 1 / 3]
    for index, losses, group_means in batches:
        adjusted = [mean + m for mean, m in zip(group_means, margin, strict=True)]
        q = [weight * math.exp(0.1 * value) for weight, value in zip(q, adjusted, strict=True)]
        q = [weight / sum(q) for weight in q]
        expected = sum(weight * value for weight, value in zip(q, adjusted, strict=True))
        y = torch.zeros(4, dtype=torch.int64)
        loss = recipe(logits_with_loss(losses), y, torch.tensor(index))
        assert loss.item() == pytest.approx(expected, rel=1e-7)
        assert recipe.group_weights.tolist() == pytest.approx(q, rel=1e-7)


def test_the_published_step_size_and_no_adjustment_are_the_defaults():
    recipe = GroupDRO(torch.tensor([0, 1]), 2).double()
    y, index = torch.zeros(2, dtype=torch.int64), torch.arange(2)
    loss = recipe(logits_with_loss([1.0, 3.0]), y, index)
    # q is proportional to exp(.01 * 1), exp(.01 * 3): the second is the logistic function of .02.
    second = 1 / (1 + math.exp(-0.02))
    assert loss.item() == pytest.approx(1 + 2 * second, rel=1e-7)


def test_gradient_is_the_weighted_sum_of_group_gradients():
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(3, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    x = torch.randn(7, 5, generator=generator, dtype=torch.float64)
    y = torch.tensor([0, 1, 2, 0, 1, 2, 0])
    recipe = GroupDRO(GROUPS, 3, step_size=0.5, adjustment=2.0).double()
    loss = recipe(x @ weight.T, y, torch.arange(7))
    (gradient,) = torch.autograd.grad(loss, weight)
    expected = torch.zeros_like(weight)
    for g, q in enumerate(recipe.group_weights):
        of_group = g == GROUPS
        mean = F.cross_entropy(x[of_group] @ weight.T, y[of_group])
        expected += q * torch.autograd.grad(mean, weight)[0]
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)


def test_groups_without_samples_have_no_weight_and_take_none_of_the_loss():
    recipe = GroupDRO(torch.tensor([1, 1, 3]), 5, adjustment=1.0)
    assert recipe.group_weights.tolist() == pytest.approx([0, 0.5, 0, 0.5, 0])
    y = torch.zeros(3, dtype=torch.int64)
    for _ in range(3):
        loss = recipe(torch.zeros(3, 2), y, torch.arange(3))
        assert loss.isfinite()
    q = recipe.group_weights
    assert q[[0, 2, 4]].tolist() == [0, 0, 0]
    assert q.sum().item() == pytest.approx(1)
    # The rarer group has the larger margin, 1 against 1 / sqrt(2).
    assert q[3] > q[1]


def test_a_weight_that_underflows_comes_back():
    recipe = GroupDRO(torch.tensor([0, 1]), 2, step_size=1.0)
    hard, easy = logits_with_loss([60.0]), logits_with_loss([1e-3])
    y, index = torch.zeros(2, dtype=torch.int64), torch.arange(2)
    for _ in range(4):
        recipe(torch.cat([easy, hard]).float(), y, index)
    assert recipe.group_weights[0] == 0
    for _ in range(5):
        recipe(torch.cat([hard, easy]).float(), y, index)
    assert recipe.group_weights[0] == pytest.approx(1)


def test_state_dict_resumes_the_adversary():
    y = torch.zeros(7, dtype=torch.int64)
    logits = torch.randn(7, 2, generator=torch.Generator().manual_seed(2))
    recipe, resumed = GroupDRO(GROUPS, 3, step_size=0.3), GroupDRO(GROUPS, 3, step_size=0.3)
    recipe(logits, y, torch.arange(7))
    assert list(recipe.state_dict()) == ["log_weights"]
    resumed.load_state_dict(recipe.state_dict())
    assert torch.equal(resumed(logits, y, torch.arange(7)), recipe(logits, y, torch.arange(7)))
    assert torch.equal(resumed.group_weights, recipe.group_weights)


def test_autocast_does_not_round_the_group_means():
    logits = torch.randn(7, 3, generator=torch.Generator().manual_seed(3))
    y, index = torch.zeros(7, dtype=torch.int64), torch.arange(7)
    plain, cast = GroupDRO(GROUPS, 3), GroupDRO(GROUPS, 3)
    expected = plain(logits, y, index)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = cast(logits, y, index)
    assert torch.equal(loss, expected)


def test_a_network_that_is_moved_to_half_with_its_recipe_does_not_round_what_that_keeps():
    y, index = torch.zeros(7, dtype=torch.int64), torch.arange(7)
    logits = torch.tensor([[3.0, 0.0]] * 3 + [[2.0, 0.0]] * 4)
    recipes = [GroupDRO(GROUPS, 3, adjustment=0.3), LfF(y, 2), ReweightedLoss(logits[:, 0] / 3, y)]
    for recipe, shape in zip(recipes, ((7, 2), (7, 2, 2), (7, 2)), strict=True):
        given = logits if len(shape) == 2 else logits.unsqueeze(1).expand(shape)
        both = nn.ModuleDict({"network": nn.Linear(2, 2), "recipe": copy.deepcopy(recipe)})
        both.bfloat16()
        assert both["network"].weight.dtype is torch.bfloat16
        assert torch.equal(recipe(given, y, index), both["recipe"](given, y, index))
        for name, kept in recipe.state_dict().items():
            assert torch.equal(both["recipe"].state_dict()[name], kept)
        assert all(b.dtype is not torch.float32 for b in recipe.double().buffers())


def test_a_step_reads_no_value_back_to_the_host():
    """Tensors on the meta device have no values: reading one raises."""
    recipe = GroupDRO(GROUPS, 3).to("meta")
    logits = torch.empty(4, 2, device="meta", requires_grad=True)
    index = torch.empty(4, dtype=torch.int64, device="meta")
    loss = recipe(logits, index, index)
    loss.backward()
    assert logits.grad.shape == (4, 2)
    with pytest.raises(RuntimeError, match="meta"):
        loss.item()


@pytest.mark.parametrize(
    ("groups", "options", "message"),
    [
        (torch.tensor([0, 3]), {}, "0..3 outside 0..2"),
        (torch.tensor([-1, 2]), {}, "-1..2 outside 0..2"),
        (torch.empty(0, dtype=torch.int64), {}, r"got \(0,\)"),
        (torch.tensor([0]), {"step_size": -1.0}, "step_size -1.0"),
        (torch.tensor([0]), {"adjustment": float("nan")}, "adjustment nan"),
    ],
)
def test_bad_arguments_are_named(groups, options, message):
    with pytest.raises(ValueError, match=message):
        GroupDRO(groups, 3, **options)


def test_more_groups_than_samples_are_summed_as_few_are_without_a_mask_of_all(monkeypatch):
    generator = torch.Generator().manual_seed(3)
    losses = torch.rand(5, generator=generator, requires_grad=True)
    own = torch.tensor([6, 2, 6, 0, 2])
    cells, where = [], torch.where

    def counted(condition, *branches):
        cells.append(condition.numel())
        return where(condition, *branches)

    monkeypatch.setattr(torch, "where", counted)
    found = group_dro._by_group(losses, own, 1000)
    assert max(cells) <= 5 * 5
    dense = group_dro._by_group(losses, torch.tensor([2, 1, 2, 0, 1]), 3)
    for many, few in zip(found, dense, strict=True):
        assert many[[0, 2, 6]].equal(few)
        assert many.sum() == few.sum()
    weight = torch.rand(1000, generator=generator)
    (gradient,) = torch.autograd.grad(found[0] @ weight, losses)
    assert gradient.equal(weight[own])
