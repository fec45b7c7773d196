"""Recipe II: weights by hand, constant under the gradient, averaged and normalised as in LfF."""

import math

import pytest
import torch
import torch.nn.functional as F

from ddb_fast.recipes import ReweightedLoss

Y = torch.tensor([0, 0, 1, 1])
AMPLIFIER = torch.tensor([0.1, 3.0, 0.0, 2.0], dtype=torch.float64)


def logits_with_loss(losses: list[float], y: torch.Tensor) -> torch.Tensor:
    """Two-class logits whose cross-entropies on labels y are the given ones."""
    other = torch.tensor([math.log(math.exp(x) - 1) for x in losses], dtype=torch.float64)
    return torch.where(F.one_hot(y, 2) == 1, 0.0, other.unsqueeze(1))


def step(recipe: ReweightedLoss, index: list[int], losses: list[float]) -> float:
    at = torch.tensor(index)
    return recipe(logits_with_loss(losses, Y[at]), Y[at], at).item()


def test_weights_by_hand():
    recipe = ReweightedLoss(AMPLIFIER, Y)
    assert recipe.state_dict() == {}
    loss = step(recipe, [0, 1, 2, 3], [0.9, 1.0, 0.5, 2.0])
    # r = .1/1, 3/4, 0, 1/2.
    assert loss == pytest.approx((0.1 * 0.9 + 0.75 * 1.0 + 0 + 0.5 * 2.0) / 4, rel=1e-6)


def test_moving_average_by_hand():
    recipe = ReweightedLoss(AMPLIFIER, Y, moving_average=0.7).double()
    assert step(recipe, [1, 3], [1.0, 2.0]) == pytest.approx((0.75 * 1 + 0.5 * 2) / 2, rel=1e-6)
    # Sample 1's running loss is .7 * 1 + .3 * 3 = 1.6, sample 0 is new.
    loss = step(recipe, [1, 0], [3.0, 0.4])
    assert loss == pytest.approx((3 / 4.6 * 3.0 + 0.1 / 0.5 * 0.4) / 2, rel=1e-6)


def test_class_maximum_by_hand():
    recipe = ReweightedLoss(AMPLIFIER, Y, moving_average=0.7, class_maximum=True).double()
    step(recipe, [1, 3], [1.0, 2.0])
    # Running: 1.6 and .4 in class 0, 2.0 in class 1. Maxima: amplifier 3 and 2, running 1.6 and 2.
    loss = step(recipe, [1, 0], [3.0, 0.4])
    first = (3 / 3) / (3 / 3 + 1.6 / 1.6)
    second = (0.1 / 3) / (0.1 / 3 + 0.4 / 1.6)
    assert loss == pytest.approx((first * 3.0 + second * 0.4) / 2, rel=1e-6)


def test_class_maximum_without_averaging_uses_the_latest_losses():
    recipe = ReweightedLoss(AMPLIFIER, Y, class_maximum=True).double()
    step(recipe, [0, 1], [1.0, 4.0])
    loss = step(recipe, [0], [2.0])
    ratio = 0.1 / 3
    assert loss == pytest.approx(ratio / (ratio + 2 / 4) * 2.0, rel=1e-6)


@pytest.mark.parametrize("class_maximum", [False, True])
def test_weights_are_constants_under_the_gradient(class_maximum):
    recipe = ReweightedLoss(AMPLIFIER, Y, class_maximum=class_maximum).double()
    logits = logits_with_loss([0.9, 1.0, 0.5, 2.0], Y).requires_grad_()
    (gradient,) = torch.autograd.grad(recipe(logits, Y, torch.arange(4)), logits)
    losses = F.cross_entropy(logits, Y, reduction="none")
    amplifier, target = AMPLIFIER, losses.detach()
    if class_maximum:
        amplifier = amplifier / torch.tensor([3.0, 3.0, 2.0, 2.0])
        target = target / torch.tensor([1.0, 1.0, 2.0, 2.0])
    weighted = (amplifier / (amplifier + target) * losses).mean()
    (expected,) = torch.autograd.grad(weighted, logits)
    torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-9)


def test_the_amplifier_is_frozen():
    """Losses that still hang on its graph pull at nothing, and what becomes of them is not seen."""
    losses = AMPLIFIER.clone().requires_grad_()
    recipe = ReweightedLoss(losses, Y)
    with torch.no_grad():
        losses += 1
    logits = logits_with_loss([0.9, 1.0, 0.5, 2.0], Y).requires_grad_()
    loss = recipe(logits, Y, torch.arange(4))
    loss.backward()
    assert losses.grad is None
    assert loss.item() == pytest.approx((0.1 * 0.9 + 0.75 * 1.0 + 0 + 0.5 * 2.0) / 4, rel=1e-6)


def test_a_sample_both_nets_master_weighs_nothing():
    recipe = ReweightedLoss(torch.zeros(2), torch.tensor([0, 1]), class_maximum=True)
    logits = torch.tensor([[500.0, 0.0], [0.0, 500.0]])
    assert recipe(logits, torch.tensor([0, 1]), torch.arange(2)).item() == 0.0


def test_float64_amplifier_losses_do_not_widen_a_float32_run():
    loss = ReweightedLoss(AMPLIFIER, Y)(torch.zeros(4, 2), Y, torch.arange(4))
    assert loss.dtype == torch.float32


def test_state_dict_resumes_the_running_losses():
    recipe, resumed = (ReweightedLoss(AMPLIFIER, Y, moving_average=0.7) for _ in range(2))
    step(recipe, [0, 1, 2], [1.0, 2.0, 3.0])
    assert sorted(recipe.state_dict()) == ["table.loss", "table.visited"]
    resumed.load_state_dict(recipe.state_dict())
    again = ([0, 3], [0.5, 0.5])
    assert step(resumed, *again) == step(recipe, *again)


@pytest.mark.parametrize(("moving_average", "class_maximum"), [(None, False), (0.7, True)])
def test_a_step_reads_no_value_back_to_the_host(moving_average, class_maximum):
    """Tensors on the meta device have no values: reading one raises."""
    recipe = ReweightedLoss(
        AMPLIFIER, Y, moving_average=moving_average, class_maximum=class_maximum
    ).to("meta")
    logits = torch.empty(3, 2, device="meta", requires_grad=True)
    index = torch.empty(3, dtype=torch.int64, device="meta")
    recipe(logits, index, index).backward()
    assert logits.grad.shape == (3, 2)


@pytest.mark.parametrize(
    ("loss", "y", "options", "message"),
    [
        (torch.ones(3), Y, {}, r"amplifier_loss \(3,\) and y \(4,\)"),
        (torch.tensor([1.0, -0.5]), Y[:2], {}, "1 values like -0.5"),
        (torch.tensor([1.0, float("nan")]), Y[:2], {}, "1 values like nan"),
        (torch.tensor([1.0, float("inf")]), Y[:2], {}, "1 values like inf"),
        (torch.ones(2), torch.tensor([0, -1]), {}, "negative label: -1"),
        (torch.ones(2), Y[:2], {"moving_average": 1.0}, "got 1.0"),
    ],
)
def test_bad_arguments_are_named(loss, y, options, message):
    with pytest.raises(ValueError, match=message):
        ReweightedLoss(loss, y, **options)
