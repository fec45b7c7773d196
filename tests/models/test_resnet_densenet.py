"""ResNets and DenseNet against published tables, functional forward passes, and timm if here."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ddb_fast.models.classifiers import build_classifier
from ddb_fast.models.densenet import DenseBlock
from ddb_fast.models.resnet import BasicBlock, Bottleneck

LARGE = ("resnet18", "resnet50", "densenet121")


def network(name, num_classes=5, **arguments):
    torch.manual_seed(0)
    return build_classifier(name, num_classes, **{"image_size": 32} | arguments)


def trained_looking(model):
    """Statistics and scales away from 0 and 1, so that no batch norm is an identity."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.0)
            module.bias.data.normal_(0, 0.1)
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model


# The published tables: names and shapes written from them, not from the code.


def batch_norm(prefix, channels):
    yield from ((f"{prefix}.{part}", (channels,)) for part in ("weight", "bias"))
    yield from ((f"{prefix}.running_{part}", (channels,)) for part in ("mean", "var"))
    yield f"{prefix}.num_batches_tracked", ()


def conv_and_norm(conv, norm, out_channels, in_channels, side):
    yield f"{conv}.weight", (out_channels, in_channels, side, side)
    yield from batch_norm(norm, out_channels)


def resnet_table(convolutions, stages, head):
    """convolutions: kernel sides in a block; stages: (blocks, in, inner width, out) of each."""
    yield from conv_and_norm("conv1", "bn1", 64, 3, 7)
    for stage, (blocks, entering, inner, leaving) in enumerate(stages, start=1):
        for block in range(blocks):
            at = f"layer{stage}.{block}"
            before = entering if block == 0 else leaving
            widths = [before, *[inner] * (len(convolutions) - 1), leaving]
            for number, side in enumerate(convolutions, start=1):
                i, o = widths[number - 1], widths[number]
                yield from conv_and_norm(f"{at}.conv{number}", f"{at}.bn{number}", o, i, side)
            if before != leaving:
                at = f"{at}.downsample"
                yield from conv_and_norm(f"{at}.0", f"{at}.1", leaving, before, 1)
    yield "fc.weight", (1000, head)
    yield "fc.bias", (1000,)


def densenet_table():
    yield from conv_and_norm("features.conv0", "features.norm0", 64, 3, 7)
    for block, (layers, entering) in enumerate([(6, 64), (12, 128), (24, 256), (16, 512)], start=1):
        for layer in range(1, layers + 1):
            at = f"features.denseblock{block}.denselayer{layer}"
            yield from batch_norm(f"{at}.norm1", entering + 32 * (layer - 1))
            widths = (128, entering + 32 * (layer - 1), 1)
            yield from conv_and_norm(f"{at}.conv1", f"{at}.norm2", *widths)
            yield f"{at}.conv2.weight", (32, 128, 3, 3)
    for number, channels in enumerate([256, 512, 1024], start=1):
        yield from batch_norm(f"features.transition{number}.norm", channels)
        yield f"features.transition{number}.conv.weight", (channels // 2, channels, 1, 1)
    yield from batch_norm("features.norm5", 1024)
    yield "classifier.weight", (1000, 1024)
    yield "classifier.bias", (1000,)


TABLES = {
    "resnet18": lambda: resnet_table(
        (3, 3), [(2, 64, 64, 64), (2, 64, 128, 128), (2, 128, 256, 256), (2, 256, 512, 512)], 512
    ),
    "resnet50": lambda: resnet_table(
        (1, 3, 1),
        [(3, 64, 64, 256), (4, 256, 128, 512), (6, 512, 256, 1024), (3, 1024, 512, 2048)],
        2048,
    ),
    "densenet121": densenet_table,
}


@pytest.mark.parametrize("name", LARGE)
def test_names_and_shapes_are_those_of_the_published_tables(name):
    with torch.device("meta"):
        state = network(name, 1000, image_size=224).state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == dict(TABLES[name]())


@pytest.mark.parametrize(
    ("name", "parameters", "giga_macs"),
    # torchvision's table of weights, 224 pixels.
    [
        ("resnet18", 11_689_512, 1.81),
        ("resnet50", 25_557_032, 4.09),
        ("densenet121", 7_978_856, 2.83),
    ],
)
def test_published_parameters_and_operations(name, parameters, giga_macs):
    with torch.device("meta"):
        model = network(name, 1000, image_size=224).eval()
        image = torch.empty(1, 3, 224, 224)
    assert sum(p.numel() for p in model.parameters()) == parameters
    with FlopCounterMode(display=False) as counter:
        model(image)
    assert counter.get_total_flops() / 2e9 == pytest.approx(giga_macs, abs=0.0101)


# The forward passes, written again with functions over a state dict.


def normalise(x, state, at):
    mean, var = state[f"{at}.running_mean"], state[f"{at}.running_var"]
    x = (x - mean[:, None, None]) / (var + 1e-5).sqrt()[:, None, None]
    return x * state[f"{at}.weight"][:, None, None] + state[f"{at}.bias"][:, None, None]


def stem(x, state, conv, norm):
    x = F.conv2d(x, state[f"{conv}.weight"], stride=2, padding=3)
    return F.max_pool2d(normalise(x, state, norm).relu(), 3, 2, padding=1)


def resnet_forward(x, state):
    x = stem(x, state, "conv1", "bn1")
    for at in dict.fromkeys(key[: len("layer1.0")] for key in state if key.startswith("layer")):
        stride = 2 if at in ("layer2.0", "layer3.0", "layer4.0") else 1
        bottleneck = f"{at}.conv3.weight" in state
        # The 3x3 convolution strides: the first of a basic block, the second of a bottleneck.
        plan = [(1, 1), (2, stride), (3, 1)] if bottleneck else [(1, stride), (2, 1)]
        h = x
        for number, step in plan:
            weight = state[f"{at}.conv{number}.weight"]
            h = F.conv2d(h.relu() if number > 1 else h, weight, None, step, weight.shape[-1] // 2)
            h = normalise(h, state, f"{at}.bn{number}")
        if f"{at}.downsample.0.weight" in state:
            x = F.conv2d(x, state[f"{at}.downsample.0.weight"], stride=stride)
            x = normalise(x, state, f"{at}.downsample.1")
        x = (x + h).relu()
    return x.mean((2, 3)) @ state["fc.weight"].T + state["fc.bias"]


def densenet_forward(x, state):
    x = stem(x, state, "features.conv0", "features.norm0")
    for block, layers in ((1, 6), (2, 12), (3, 24), (4, 16)):
        for layer in range(1, layers + 1):
            at = f"features.denseblock{block}.denselayer{layer}"
            h = F.conv2d(normalise(x, state, f"{at}.norm1").relu(), state[f"{at}.conv1.weight"])
            h = normalise(h, state, f"{at}.norm2").relu()
            x = torch.cat([x, F.conv2d(h, state[f"{at}.conv2.weight"], padding=1)], 1)
        if block < 4:
            at = f"features.transition{block}"
            x = normalise(x, state, f"{at}.norm").relu()
            x = F.avg_pool2d(F.conv2d(x, state[f"{at}.conv.weight"]), 2)
    x = normalise(x, state, "features.norm5").relu().mean((2, 3))
    return x @ state["classifier.weight"].T + state["classifier.bias"]


@pytest.mark.parametrize("name", LARGE)
def test_forward_is_the_published_one_in_float64(name):
    model = trained_looking(network(name)).double().eval()
    images = torch.randn(2, 3, 45, 38, dtype=torch.float64)
    forward = densenet_forward if name == "densenet121" else resnet_forward
    with torch.no_grad():
        torch.testing.assert_close(
            model(images), forward(images, model.state_dict()), rtol=1e-9, atol=1e-9
        )


@pytest.fixture
def timm():
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision of another build
        pytest.skip(f"timm does not import: {error}")
    return timm


@pytest.mark.parametrize("name", LARGE)
def test_equals_timm(name, timm):
    theirs = timm.create_model(name, num_classes=5)
    ours = network(name)
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 64, 64)
    for training in (True, False):
        expected = theirs.train(training)(images)
        torch.testing.assert_close(ours.train(training)(images), expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(network(f"timm:{name}").eval()(images).shape, expected.shape)


# The parts, where the answer is known.


@pytest.mark.parametrize("block", [BasicBlock(64, 64, stride=1), Bottleneck(256, 64, stride=1)])
def test_a_new_residual_block_is_relu_of_its_input(block):
    x = torch.randn(2, block.conv1.in_channels, 5, 5)
    torch.testing.assert_close(block(x), x.clamp(min=0), rtol=0, atol=0)


def test_dense_block_keeps_its_input_and_adds_32_channels_a_layer():
    x = torch.randn(2, 64, 4, 4)
    out = DenseBlock(64, 6)(x)
    assert out.shape == (2, 64 + 6 * 32, 4, 4)
    assert torch.equal(out[:, :64], x)
    assert out[:, 64:].std((0, 2, 3)).min() > 0


def test_initialisation_of_the_residual_networks():
    model = network("resnet18")
    # He et al. 2015 with fan-out, 3 * 3 * 512; the fan-in is half of it.
    weight = model.layer4[0].conv1.weight
    assert weight.std().item() == pytest.approx((2 / (9 * 512)) ** 0.5, rel=0.01)
    assert weight.mean().abs() < 1e-4
    assert model.layer4[0].bn2.weight.count_nonzero() == 0
    assert torch.equal(model.layer4[0].bn1.weight, torch.ones(512))


def test_initialisation_of_densenet():
    model = network("densenet121")
    # He et al. 2015 with fan-in: 2 / 1024 input channels of a 1x1 convolution.
    weight = model.features.transition3.conv.weight
    assert weight.std().item() == pytest.approx((2 / 1024) ** 0.5, rel=0.01)
    assert torch.equal(model.features.norm5.weight, torch.ones(1024))
    assert model.classifier.bias.count_nonzero() == 0
