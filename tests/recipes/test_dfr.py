"""DFR's last layer against scikit-learn used directly, and against a layer that is known."""

from collections import Counter

import numpy as np
import pytest
import sklearn
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from ddb_fast.recipes import dfr, reweighted_last_layer

L1 = (
    {"l1_ratio": 1.0} if int(sklearn.__version__.split(".")[1]) >= 8 else {"penalty": "l1"}
)  # of scikit-learn 1.x


def planted(
    counts: list[list[int]], *, noise_of_y: float = 0.25, seed: int = 0
) -> tuple[torch.Tensor, ...]:
    """Features, classes and groups: counts[y][a] images whose first columns say y, the next a.

    y is said faintly and a loudly, as a network that learnt the shortcut has them; twelve more
    columns are noise, of different scales, and one is constant.
    """
    generator = torch.Generator().manual_seed(seed)
    num_classes, num_biases = len(counts), len(counts[0])
    pairs = [(y, a) for y in range(num_classes) for a in range(num_biases)]
    y = torch.tensor([y for y, a in pairs for _ in range(counts[y][a])])
    a = torch.tensor([a for y, a in pairs for _ in range(counts[y][a])])
    noise = torch.randn(len(y), num_classes + num_biases + 12, generator=generator)
    core = torch.nn.functional.one_hot(y, num_classes) + noise_of_y * noise[:, :num_classes]
    loud = 5 * torch.nn.functional.one_hot(a, num_biases)
    rest = noise[:, num_classes:] * torch.linspace(0.1, 30, num_biases + 12)
    features = torch.cat([core, loud + 0.1 * rest[:, :num_biases], rest[:, num_biases:]], 1)
    return torch.cat([features, torch.full((len(y), 1), 3.0)], 1), y, y * num_biases + a


@pytest.mark.parametrize("num_classes", [2, 3])
def test_one_draw_of_equal_groups_is_scikit_learn_on_all_images(num_classes):
    features, y, groups = planted([[9] * num_classes] * num_classes)
    layer = reweighted_last_layer(
        features, y, groups, num_classes, inverse_strengths=[0.3], draws=1
    )
    regression = LogisticRegression(**L1, C=0.3, solver="liblinear", tol=1e-8, max_iter=10_000)
    if num_classes > 2:
        regression = OneVsRestClassifier(regression)
    theirs = make_pipeline(StandardScaler(), regression).fit(features.double().numpy(), y.numpy())
    logits = features.double() @ layer.weight.double().T + layer.bias.double()
    found = logits[:, 1] - logits[:, 0] if num_classes == 2 else logits
    expected = theirs.decision_function(features.double().numpy())
    np.testing.assert_allclose(found.numpy(), expected, rtol=2e-2, atol=2e-2)
    assert (logits.argmax(1).numpy() == theirs.predict(features.double().numpy())).all()
    assert layer.inverse_strength == 0.3


def test_two_class_logits_have_the_regressions_probability():
    features, y, groups = planted([[6, 6], [6, 6]])
    layer = reweighted_last_layer(features, y, groups, 2, inverse_strengths=[1.0], draws=1)
    assert not layer.weight[0].any() and layer.bias[0] == 0
    regression = LogisticRegression(**L1, C=1.0, solver="liblinear", tol=1e-8, max_iter=10_000)
    theirs = make_pipeline(StandardScaler(), regression).fit(features.double().numpy(), y.numpy())
    logits = features.double() @ layer.weight.double().T + layer.bias.double()
    expected = torch.from_numpy(theirs.predict_proba(features.double().numpy()))
    torch.testing.assert_close(logits.softmax(1), expected, rtol=0, atol=2e-3)


def test_the_shortcut_is_forgotten():
    """The images are 90 % aligned: a layer fitted to all of them uses the shortcut, DFR's not."""
    features, y, groups = planted([[90, 10], [10, 90]], noise_of_y=0.5)
    layer = reweighted_last_layer(
        features, y, groups, 2, inverse_strengths=[1.0, 0.3, 0.1, 0.03], draws=10
    )
    shift = 5 * (layer.weight[:, 3] - layer.weight[:, 2])  # what the loud attribute adds to logits
    core = layer.weight[1, 1] - layer.weight[1, 0]
    assert abs(shift[1] - shift[0]) < 0.1 * core
    fresh, labels, ids = planted([[100, 100], [100, 100]], noise_of_y=0.5, seed=1)
    correct = (fresh @ layer.weight.T + layer.bias).argmax(1) == labels
    biased = LogisticRegression(**L1, C=1.0, solver="liblinear").fit(features.numpy(), y.numpy())
    theirs = torch.from_numpy(biased.predict(fresh.numpy())) == labels
    worst, worst_of_all_images = (
        min(c[ids == g].double().mean().item() for g in range(4)) for c in (correct, theirs)
    )
    assert worst > 0.8 and worst > worst_of_all_images + 0.1, (worst, worst_of_all_images)


def test_a_separable_problem_gives_the_true_layer():
    """Three classes told by three of the columns alone: the others get no weight at strong L1."""
    features, y, groups = planted([[30] * 3] * 3)
    layer = reweighted_last_layer(features, y, groups, 3, inverse_strengths=[0.07], draws=10)
    weight = layer.weight * features.std(0).clamp_min(1e-6)
    assert (weight[:, :3].argmax(1) == torch.arange(3)).all()
    assert weight[:, 3:].abs().max() < 0.1 * weight.diagonal().min()
    assert ((features @ layer.weight.T + layer.bias).argmax(1) == y).double().mean() > 0.95


def test_the_strength_with_the_best_worst_group_is_chosen():
    """At C = 1e-6 every weight is zero and one class is always wrong; noise asks for little C."""
    features, y, groups = planted([[20, 20], [20, 20]])
    options = [1e-6, 0.1]
    chosen = reweighted_last_layer(features, y, groups, 2, inverse_strengths=options, draws=1)
    assert chosen.inverse_strength == 0.1
    equal = reweighted_last_layer(features, y, groups, 2, inverse_strengths=[1e-6, 2e-6], draws=1)
    assert equal.inverse_strength == 1e-6, "of equals the first"
    # Features far from zero: what is chosen by has the bias that goes with the weights.
    far = reweighted_last_layer(features + 100, y, groups, 2, inverse_strengths=options, draws=1)
    assert far.inverse_strength == 0.1


def test_strengths_are_chosen_on_images_that_did_not_train(monkeypatch):
    """Groups of 5, 8 and 1 are halved to 3, 4 and 1 that train, and 2, 4 and none that decide."""
    y, groups = torch.tensor([0] * 5 + [1] * 9), torch.tensor([0] * 5 + [1] * 8 + [2])
    trained, asked = [], []

    def fit(x, labels, num_classes, *, strength, seed):
        trained.append(x[:, 0].astype(int).tolist())
        return np.full((2, 1), len(trained)), np.full(2, -2 * len(trained))

    def accuracy(layer, x, labels, ids):
        numbers = x[:, 0].astype(int)
        assert (labels == y.numpy()[numbers]).all() and (ids == groups.numpy()[numbers]).all()
        asked.append(numbers.tolist())
        return 0.5

    monkeypatch.setattr(dfr, "_fit", fit)
    monkeypatch.setattr(dfr, "_worst_group_accuracy", accuracy)
    number = torch.arange(14.0)[:, None]
    layer = reweighted_last_layer(number, y, groups, 2, inverse_strengths=[0.1, 0.2], draws=2)
    assert layer.weight.dtype == layer.bias.dtype == torch.float32
    # The mean of the third and the fourth fit, two having gone into the choice.
    assert layer.weight.flatten().tolist() == [3.5, 3.5] and layer.bias.tolist() == [-7, -7]
    assert trained[0] == trained[1] and asked[0] == asked[1] and len(asked) == 2
    assert Counter(groups[asked[0]].tolist()) == {0: 2, 1: 4}
    assert Counter(groups[trained[0]].tolist()) == {0: 1, 1: 1, 2: 1}
    assert not set(trained[0]) & set(asked[0])
    # Without the group of one all that is in the halves shows: a balanced draw is of three each.
    trained.clear()
    reweighted_last_layer(
        number[:13], y[:13], groups[:13], 2, inverse_strengths=[0.1, 0.2], draws=2
    )
    assert Counter(groups[trained[0]].tolist()) == {0: 3, 1: 3}
    assert not set(trained[0]) & set(asked[2])
    # The draws that make the layer are from all images, each its own.
    assert [Counter(groups[part].tolist()) for part in trained[2:]] == 2 * [{0: 5, 1: 5}]
    assert sorted(trained[2]) != sorted(trained[3])


def test_draws_take_the_smallest_group_and_skip_empty_ones():
    """One image of a group leaves one of each: with one draw the layer has seen three images."""
    features, y, groups = planted([[7, 0], [1, 5]])
    layer = reweighted_last_layer(features, y, groups, 2, inverse_strengths=[1.0], draws=1)
    alone = int((groups == 2).nonzero())
    fitted = []
    for i in (groups == 0).nonzero().flatten().tolist():
        for j in (groups == 3).nonzero().flatten().tolist():
            part = [i, alone, j]
            one = reweighted_last_layer(
                features[part], y[part], groups[part], 2, inverse_strengths=[1.0], draws=1
            )
            fitted.append(torch.allclose(one.weight, layer.weight, rtol=1e-2, atol=1e-3))
    assert sum(fitted) == 1


def test_it_is_a_function_of_its_arguments():
    arguments = (*planted([[12, 5], [5, 12]]), 2)
    options = {"inverse_strengths": [1.0, 0.1], "draws": 3}
    one, two = (reweighted_last_layer(*arguments, **options, seed=4) for _ in range(2))
    assert torch.equal(one.weight, two.weight) and torch.equal(one.bias, two.bias)
    other = reweighted_last_layer(*arguments, **options, seed=5)
    assert not torch.equal(one.weight, other.weight)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y": torch.tensor([0, 0, 0])}, "no image of class 1"),
        ({"y": torch.tensor([0, 2, 1])}, "0..2 for 2 classes"),
        ({"y": torch.tensor([0, 1])}, r"\(2,\)"),
        ({"groups": torch.tensor([0, -1, 1])}, "-1"),
        ({"features": torch.full((3, 2), float("nan"))}, "not finite"),
        ({"num_classes": 1}, "1 classes"),
        ({"inverse_strengths": []}, r"\[\]"),
        ({"inverse_strengths": [0.0]}, "0.0"),
        ({"draws": 0}, "draws 0"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    arguments = {
        "features": torch.eye(3)[:, :2],
        "y": torch.tensor([0, 1, 1]),
        "groups": torch.tensor([0, 1, 2]),
        "num_classes": 2,
        "inverse_strengths": [1.0],
    }
    with pytest.raises(ValueError, match=message):
        reweighted_last_layer(**(arguments | changes))
