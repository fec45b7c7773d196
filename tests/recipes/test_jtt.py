"""JTT's second set against counts worked by hand, and its loss against the paper's objective."""

import pytest
import torch
import torch.nn.functional as F

from ddb_fast.recipes import ERM, repeated_errors


@pytest.mark.parametrize(
    ("error", "upweight", "counts"),
    [
        ([True, False, False], 3, [3, 1, 1]),
        ([True, False, True], 2, [2, 1, 2]),
        ([True, True, False], 1, [1, 1, 1]),
        ([False, False, False], 100, [1, 1, 1]),
        ([True, True, True], 4, [4, 4, 4]),
    ],
)
def test_how_often_each_image_stands_in_the_set(error, upweight, counts):
    positions = repeated_errors(torch.tensor(error), upweight=upweight)
    assert positions.dtype == torch.int64
    assert torch.bincount(positions, minlength=3).tolist() == counts


def test_two_epochs_of_three_samples_by_hand():
    """Epoch one finds the errors, epoch two takes a gradient step on the paper's objective.

    A linear classifier of one feature, p(1) = sigmoid(w x); samples x = 1, 1, -2 of classes 1, 1, 1
    and w = 0.5: only the third is an error. Its gradient weighs 5 in the second epoch.
    """
    x, y, w, upweight = [1.0, 1.0, -2.0], [1, 1, 1], 0.5, 5
    probabilities = [1 / (1 + 2.718281828459045 ** (-w * value)) for value in x]
    error = [p < 0.5 for p in probabilities]
    assert error == [False, False, True]
    weights = [upweight if wrong else 1 for wrong in error]
    slope = sum(a * (p - 1) * v for a, p, v in zip(weights, probabilities, x, strict=True))
    expected = w - 0.1 * slope / sum(weights)

    weight = torch.tensor(w, dtype=torch.float64, requires_grad=True)
    features, labels = torch.tensor(x, dtype=torch.float64), torch.tensor(y)
    logits = F.pad((weight * features)[:, None], (1, 0))
    positions = repeated_errors(logits.argmax(1) != labels, upweight=upweight)
    loss = ERM()(logits[positions], labels[positions], positions)
    loss.backward()
    assert (weight - 0.1 * weight.grad).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("error", "upweight", "message"),
    [
        (torch.tensor([0, 1]), 2, "int64"),
        (torch.zeros(2, 2, dtype=torch.bool), 2, r"\(2, 2\)"),
        (torch.tensor([True]), 0, "got 0"),
    ],
)
def test_bad_arguments_are_named(error, upweight, message):
    with pytest.raises(ValueError, match=message):
        repeated_errors(error, upweight=upweight)
