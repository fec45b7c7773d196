"""LfF against its published update rules, worked out in plain Python, and its edges."""

import math

import pytest
import torch
import torch.nn.functional as F

from ddb_fast.recipes import LfF

# Three samples, two of class 0 and one of class 1; each row is one epoch of them in some order:
# (sample, the biased network's cross-entropy, the debiased one's).
Y = [0, 0, 1]
EPOCHS = [
    [(0, 0.2, 0.6), (2, 1.5, 0.9), (1, 2.0, 1.0)],
    [(1, 2.4, 0.5), (0, 0.1, 0.3), (2, 1.1, 0.8)],
]


def logits_with_loss(losses: list[float], y: torch.Tensor) -> torch.Tensor:
    """Two-class logits whose cross-entropies on labels y are the given ones."""
    other = torch.tensor([math.log(math.exp(x) - 1) for x in losses], dtype=torch.float64)
    return torch.where(F.one_hot(y, 2) == 1, 0.0, other.unsqueeze(1))


def by_hand(q: float, keep: float) -> list[float]:
    """The loss of every sample, presented one at a time, from the paper's algorithm."""
    tables = [{}, {}]
    losses = []
    for epoch in EPOCHS:
        for sample, *pair in epoch:
            relative = []
            for table, loss in zip(tables, pair, strict=True):
                old = table.get(sample)
                table[sample] = loss if old is None else keep * old + (1 - keep) * loss
                largest = max(v for s, v in table.items() if Y[s] == Y[sample])
                relative.append(table[sample] / largest)
            weight = relative[0] / (relative[0] + relative[1] + 1e-8)
            biased, debiased = pair
            losses.append(q * math.exp(-biased) ** q * biased + weight * debiased)
    return losses


@pytest.mark.parametrize(("q", "keep"), [(0.7, 0.7), (0.3, 0.0), (1.0, 0.9)])
def test_two_epochs_of_three_samples_by_hand(q, keep):
    recipe = LfF(torch.tensor(Y), 2, q=q, moving_average=keep).double()
    found = []
    for epoch in EPOCHS:
        for sample, biased, debiased in epoch:
            y = torch.tensor([Y[sample]])
            logits = torch.stack([logits_with_loss([loss], y) for loss in (biased, debiased)], 1)
            found.append(recipe(logits, y, torch.tensor([sample])).item())
    assert found == pytest.approx(by_hand(q, keep), rel=1e-6)


def test_a_batch_enters_the_tables_before_it_is_weighed():
    """Both epochs as batches: maxima are over the whole set with this batch's losses in it."""
    recipe = LfF(torch.tensor(Y), 2).double()
    found = []
    for epoch in EPOCHS:
        index = torch.tensor([sample for sample, _, _ in epoch])
        y = torch.tensor(Y)[index]
        logits = torch.stack([logits_with_loss([row[k] for row in epoch], y) for k in (1, 2)], 1)
        found.append(recipe(logits, y, index).item())
    # First epoch: e_b = .2/2, 2/2, 1.5/1.5 and e_d = .6/1, 1/1, .9/.9 of samples 0, 1, 2.
    weights = [0.1 / (0.1 + 0.6), 1 / 2, 1 / 2]
    biased = [0.7 * math.exp(-0.7 * x) * x for x in (0.2, 2.0, 1.5)]
    debiased = [w * x for w, x in zip(weights, (0.6, 1.0, 0.9), strict=True)]
    assert found[0] == pytest.approx((sum(biased) + sum(debiased)) / 3, rel=1e-6)
    # Second: running .17, 2.12, 1.38 and .51, .85, .87.
    weights = [(0.17 / 2.12) / (0.17 / 2.12 + 0.51 / 0.85), 1 / 2, 1 / 2]
    biased = [0.7 * math.exp(-0.7 * x) * x for x in (0.1, 2.4, 1.1)]
    debiased = [w * x for w, x in zip(weights, (0.3, 0.5, 0.8), strict=True)]
    assert found[1] == pytest.approx((sum(biased) + sum(debiased)) / 3, rel=1e-6)


@pytest.mark.parametrize("q", [0.2, 0.7, 1.0])
def test_the_biased_gradient_is_that_of_generalised_cross_entropy(q):
    """q times the gradient of (1 - p^q) / q, Zhang & Sabuncu 2018, whatever the debiased does."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 2, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([1, 3, 0])
    recipe = LfF(y, 4, q=q).double()
    (gradient,) = torch.autograd.grad(recipe(logits, y, torch.arange(3)), logits)
    probability = logits[:, 0].softmax(1).gather(1, y[:, None])
    generalised = ((1 - probability**q) / q).mean()
    (expected,) = torch.autograd.grad(generalised, logits)
    torch.testing.assert_close(gradient[:, 0], q * expected[:, 0], rtol=1e-10, atol=1e-12)


def test_the_debiased_gradient_has_constant_weights():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(3, 2, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([1, 1, 0])
    recipe = LfF(y, 4).double()
    (gradient,) = torch.autograd.grad(recipe(logits, y, torch.arange(3)), logits)
    biased, debiased = (F.cross_entropy(logits[:, k], y, reduction="none") for k in (0, 1))
    e_b, e_d = (
        x.detach() / torch.stack([x[:2].max(), x[:2].max(), x[2]]).detach()
        for x in (biased, debiased)
    )
    (expected,) = torch.autograd.grad((e_b / (e_b + e_d + 1e-8) * debiased).mean(), logits)
    torch.testing.assert_close(gradient[:, 1], expected[:, 1], rtol=1e-7, atol=1e-12)


def test_a_sample_both_networks_master_weighs_nothing():
    """Cross-entropies that are exactly 0 in the whole class: 0 / 0 counts as 0."""
    y = torch.tensor(Y)
    sure = 500.0 * F.one_hot(y, 2).unsqueeze(1).repeat(1, 2, 1)
    assert LfF(y, 2)(sure, y, torch.arange(3)).item() == 0.0


def test_state_dict_resumes_both_tables():
    y = torch.tensor(Y)
    logits = torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(2))
    recipe, resumed = LfF(y, 2), LfF(y, 2)
    recipe(logits, y, torch.arange(3))
    assert sorted(recipe.state_dict()) == [
        "biased.loss",
        "biased.visited",
        "debiased.loss",
        "debiased.visited",
    ]
    resumed.load_state_dict(recipe.state_dict())
    index = torch.tensor([2, 0, 1])
    assert torch.equal(resumed(logits, y[index], index), recipe(logits, y[index], index))


def test_a_step_reads_no_value_back_to_the_host():
    """Tensors on the meta device have no values: reading one raises."""
    recipe = LfF(torch.tensor(Y), 2).to("meta")
    logits = torch.empty(4, 2, 2, device="meta", requires_grad=True)
    index = torch.empty(4, dtype=torch.int64, device="meta")
    recipe(logits, index, index).backward()
    assert logits.grad.shape == (4, 2, 2)


@pytest.mark.parametrize(
    ("y", "options", "message"),
    [
        ([0, 3], {}, "0..3 outside 0..2"),
        ([-1, 2], {}, "-1..2 outside 0..2"),
        ([], {}, r"got \(0,\)"),
        ([0], {"q": 0.0}, "got 0.0"),
        ([0], {"q": float("nan")}, "got nan"),
        ([0], {"moving_average": 1.0}, "got 1.0"),
    ],
)
def test_bad_arguments_are_named(y, options, message):
    with pytest.raises(ValueError, match=message):
        LfF(torch.tensor(y, dtype=torch.int64), 3, **options)


def test_logits_of_one_network_are_refused():
    y = torch.tensor(Y)
    with pytest.raises(ValueError, match=r"\(3, 2\)"):
        LfF(y, 2)(torch.zeros(3, 2), y, torch.arange(3))
