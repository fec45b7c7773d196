"""The small convolutional net and the MLP against formulas and plain matrix products."""

import pytest
import torch
from torch import nn

from ddb_fast.models.classifiers import build_classifier


def network(name, num_classes=5, **arguments):
    torch.manual_seed(0)
    return build_classifier(name, num_classes, **{"image_size": 32} | arguments)


@pytest.mark.parametrize(
    ("width", "parameters"),
    [
        # Convolutions 3w + 2w^2 + 4w^2 + 4w^2 of nine taps, batch norms 2 * 7w, head 2w * 10 + 10.
        (None, 9 * (3 * 48 + 10 * 48**2) + 14 * 48 + 970),
        (24, 9 * (3 * 24 + 10 * 24**2) + 14 * 24 + 490),
    ],
)
def test_cnn_parameters(width, parameters):
    model = network("cnn", 10, image_size=16, width=width)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_cnn_feature_sees_38_pixels():
    model = network("cnn", image_size=64).double().eval()
    # Averages instead of maxima let a gradient reach everything a maximum could choose from.
    layers = [nn.AvgPool2d(2) if isinstance(m, nn.MaxPool2d) else m for m in model.features]
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            layer.weight.data.abs_()
    images = torch.ones(1, 3, 64, 64, dtype=torch.float64, requires_grad=True)
    nn.Sequential(*layers)(images)[0, 0, 4, 4].backward()
    seen = images.grad[0, 0].nonzero()
    assert (seen.max(0).values - seen.min(0).values + 1).tolist() == [38, 38]


def test_mlp_is_three_hidden_layers_on_planes_in_order():
    model = network("mlp", 10, image_size=28).double()
    assert sum(p.numel() for p in model.parameters()) == 2352 * 100 + 100 + 2 * 10_100 + 1010
    images = torch.rand(3, 3, 28, 28, dtype=torch.float64)
    h = torch.cat([images[:, channel].reshape(3, 784) for channel in range(3)], 1)
    *hidden, head = (m for m in model.modules() if isinstance(m, nn.Linear))
    for layer in hidden:
        h = (h @ layer.weight.T + layer.bias).clamp(min=0)
    expected = h @ head.weight.T + head.bias
    for memory_format in (torch.contiguous_format, torch.channels_last):
        torch.testing.assert_close(model(images.to(memory_format=memory_format)), expected)
    with pytest.raises(ValueError, match=r"got \(2, 3, 28, 32\)"):
        model(torch.rand(2, 3, 28, 32, dtype=torch.float64))
