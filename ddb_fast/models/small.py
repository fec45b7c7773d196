"""The small classifiers: a convolutional net for 16-64 pixel images and Colored MNIST's MLP."""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SmallCNN(nn.Module):
    """Four 3x3 convolutions with batch norm and ReLU, max-pooling between them, linear head `fc`.

    forward: x (N, 3, H, W) normalised float, H and W >= 8 -> logits (N, num_classes).
    Widths are width, then 2 * width three times: 210 k parameters at width 48 and ten classes. A
    feature sees 38 pixels, a whole 32-pixel image.
    """

    def __init__(self, *, num_classes: int, width: int = 48) -> None:
        super().__init__()
        channels = (3, width, 2 * width, 2 * width, 2 * width)
        layers = []
        for level, (before, after) in enumerate(pairwise(channels)):
            layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after)]
            # Only the first convolution, cheap with its few input channels, runs at full size: a
            # second one there doubles the time on a CPU. Strides in place of pooling are slower.
            # The maximum may come before ReLU, which then has a quarter of the pixels.
            if level < 3:
                layers.append(nn.MaxPool2d(2))
            layers.append(nn.ReLU(inplace=True))
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(channels[-1], num_classes)
        for module in self.features:
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).mean((2, 3)))


class MLP(nn.Module):
    """Three hidden layers of `width` with ReLU and a linear head `fc`.

    forward: x (N, 3, image_size, image_size) float, flattened channel by channel ->
    logits (N, num_classes). ValueError for images of another shape. Autocast is switched off: the
    network is too small to gain by half precision, and was published in single.
    Source: Nam et al. 2020, "Learning from Failure", the Colored MNIST network (28 pixels, 100).
    """

    def __init__(self, *, num_classes: int, image_size: int, width: int = 100) -> None:
        super().__init__()
        self.input_shape = (3, image_size, image_size)
        widths = (3 * image_size**2, width, width, width)
        layers = []
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after), nn.ReLU(inplace=True)]
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1:] != self.input_shape:
            raise ValueError(f"images must be (N, {self.input_shape}), got {tuple(x.shape)}")
        first = self.features[0]
        with torch.autocast(x.device.type, enabled=False):
            # Batches are channels_last: turning the first layer's few weights is cheaper than them.
            weight = first.weight.unflatten(1, self.input_shape).permute(0, 2, 3, 1).flatten(1)
            x = x.permute(0, 2, 3, 1).flatten(1).to(weight.dtype)
            return self.fc(self.features[1:](F.linear(x, weight, first.bias)))
