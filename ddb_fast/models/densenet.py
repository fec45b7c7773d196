"""DenseNet-121, with timm's parameter names so that its ImageNet weights load as is.

The paper's bias amplifier. Written here for the same reason as the ResNets: timm cannot be a
dependency.
"""

import torch
from torch import Tensor, nn

GROWTH = 32
DEPTHS = (6, 12, 24, 16)


class DenseLayer(nn.Module):
    """The GROWTH new channels that one layer adds: (N, in, H, W) -> (N, GROWTH, H, W).

    Source: Huang et al. 2017, "Densely Connected Convolutional Networks", DenseNet-B.
    """

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        bottleneck = 4 * GROWTH
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, bottleneck, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(bottleneck)
        self.conv2 = nn.Conv2d(bottleneck, GROWTH, 3, padding=1, bias=False)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(self.relu(self.norm1(x)))
        return self.conv2(self.relu(self.norm2(h)))


class DenseBlock(nn.Module):
    """Layers that each see all channels before them: in -> in + depth * GROWTH channels."""

    def __init__(self, in_channels: int, depth: int) -> None:
        super().__init__()
        for index in range(depth):
            layer = DenseLayer(in_channels + index * GROWTH)
            self.add_module(f"denselayer{index + 1}", layer)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.children():
            x = torch.cat([x, layer(x)], 1)
        return x


class Transition(nn.Module):
    """Halve the channels and the side: (N, in, H, W) -> (N, in / 2, H / 2, W / 2)."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(in_channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(in_channels, in_channels // 2, 1, bias=False)
        self.pool = nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.conv(self.relu(self.norm(x))))


class DenseNet121(nn.Module):
    """A stride-4 stem, four dense blocks with transitions between, a linear head `classifier`.

    forward: x (N, 3, H, W) normalised float, H and W >= 32 -> logits (N, num_classes).
    The feature map before the pooling has 1,024 channels and 1/32 of the side.
    Source: Huang et al. 2017, "Densely Connected Convolutional Networks", table 1.
    """

    def __init__(self, *, num_classes: int) -> None:
        super().__init__()
        channels = 2 * GROWTH
        self.features = nn.Sequential()
        self.features.add_module(
            "conv0", nn.Conv2d(3, channels, 7, stride=2, padding=3, bias=False)
        )
        self.features.add_module("norm0", nn.BatchNorm2d(channels))
        self.features.add_module("relu0", nn.ReLU(inplace=True))
        self.features.add_module("pool0", nn.MaxPool2d(3, stride=2, padding=1))
        for stage, depth in enumerate(DEPTHS, start=1):
            self.features.add_module(f"denseblock{stage}", DenseBlock(channels, depth))
            channels += depth * GROWTH
            if stage < len(DEPTHS):
                self.features.add_module(f"transition{stage}", Transition(channels))
                channels //= 2
        self.features.add_module("norm5", nn.BatchNorm2d(channels))
        self.features.add_module("relu5", nn.ReLU(inplace=True))
        self.classifier = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))
