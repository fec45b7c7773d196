"""The classifiers against published tables, plain functional forward passes, and timm if here."""

import logging
import sys
import types

import huggingface_hub
import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ddb_fast.models.classifiers import build_classifier, load_pretrained
from ddb_fast.models.densenet import DenseBlock
from ddb_fast.models.resnet import BasicBlock, Bottleneck

LARGE = ("resnet18", "resnet50", "densenet121")
ALL = (*LARGE, "cnn", "mlp")


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


# Sizes.


@pytest.mark.parametrize("name", [*LARGE, "cnn"])
@pytest.mark.parametrize("size", [32, 47])
def test_any_image_size_gives_a_row_of_logits(name, size):
    model = network(name, 7, image_size=size, in_channels=4)
    assert model(torch.randn(2, 4, size, size + 3)).shape == (2, 7)


@pytest.mark.parametrize(
    ("name", "size", "shape"),
    [
        ("resnet18", 64, (512, 2, 2)),
        ("resnet50", 64, (2048, 2, 2)),
        ("resnet18", 65, (512, 3, 3)),  # strided convolutions round up
        ("densenet121", 64, (1024, 2, 2)),
        ("densenet121", 96, (1024, 3, 3)),
        ("cnn", 16, (96, 2, 2)),
        ("cnn", 8, (96, 1, 1)),
    ],
)
def test_feature_map(name, size, shape):
    with torch.device("meta"):
        features = network(name, image_size=size).features(torch.empty(2, 3, size, size))
    assert features.shape == (2, *shape)


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
    # He et al. 2015 with fan-out: 2 / (3 * 3 * 512).
    weight = model.layer4[1].conv2.weight
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


# Training and inference.


@pytest.mark.parametrize("name", ALL)
def test_every_parameter_gets_a_gradient(name):
    model = trained_looking(network(name))
    F.cross_entropy(model(torch.randn(8, 3, 32, 32)), torch.arange(8) % 5).backward()
    dead = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not dead


@pytest.mark.parametrize("name", ALL)
def test_eval_is_deterministic_and_apart_from_the_batch(name):
    model = trained_looking(network(name)).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        logits = model(images)
        assert torch.equal(model(images), logits)
        torch.testing.assert_close(model(images[:1]), logits[:1], rtol=1e-4, atol=1e-4)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ALL)
def test_bf16_autocast_is_close_to_float32(name):
    model = network(name).eval()
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        expected = model(images)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(images)
    assert logits.dtype == torch.bfloat16
    error = (logits.float() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert 0 < error < 0.05


# Arguments.


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        (
            "resnet34",
            {},
            "'resnet34'; there are resnet18, resnet50, densenet121, cnn, mlp and timm:",
        ),
        ("cnn", {"num_classes": 0}, "num_classes must be >= 1, got 0"),
        ("resnet18", {"width": 32}, "width 32 given to resnet18"),
        ("mlp", {"width": 0}, "width must be >= 1, got 0"),
        ("densenet121", {"image_size": 31}, "32 pixels or more, got 31"),
        ("cnn", {"image_size": 7}, "8 pixels or more, got 7"),
    ],
)
def test_wrong_arguments_are_named(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        network(name, **arguments)


def test_timm_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match=r"timm:vit_tiny needs timm.*ddb-fast\[timm\]"):
        network("timm:vit_tiny")


def test_timm_beside_a_broken_torchvision(monkeypatch, tmp_path):
    (tmp_path / "timm.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')\n", "utf-8"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    with pytest.raises(ValueError, match="operator torchvision::nms does not exist") as error:
        network("timm:vit_tiny")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("fixed", [True, False])
def test_timm_gets_an_image_size_only_where_it_is_fixed(monkeypatch, fixed):
    """`img_size` is an error for timm's convolutional networks and needed for its transformers."""
    stand_in = types.ModuleType("timm")
    stand_in.__version__ = "0"
    stand_in.is_model = lambda name: name == "known.tag"
    stand_in.get_pretrained_cfg = lambda name: types.SimpleNamespace(fixed_input_size=fixed)
    stand_in.create_model = lambda name, **arguments: (name, arguments)
    monkeypatch.setitem(sys.modules, "timm", stand_in)
    name, arguments = network("timm:known.tag", 7, in_channels=1, image_size=64)
    assert name == "known.tag"
    assert arguments.pop("img_size", None) == (64 if fixed else None)
    assert arguments == {"num_classes": 7, "in_chans": 1}
    with pytest.raises(ValueError, match="no network 'other'"):
        network("timm:other")


# Pretrained weights.


def weights_file(path, name, num_classes):
    torch.manual_seed(1)
    model = trained_looking(build_classifier(name, num_classes, image_size=32))
    save_file(model.state_dict(), path)
    return str(path), model.eval()


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "cnn", "mlp"])
def test_weights_round_trip(name, tmp_path):
    path, source = weights_file(tmp_path / "weights.safetensors", name, 5)
    model = network(name)
    assert load_pretrained(model, path, name=name) is True
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.eval()(images), source(images))


@pytest.mark.parametrize(("name", "head"), [("resnet18", "fc"), ("densenet121", "classifier")])
def test_head_of_other_classes_keeps_its_initialisation(name, head, tmp_path, caplog):
    path, source = weights_file(tmp_path / "weights.safetensors", name, 9)
    model = network(name)
    own = {key: value.clone() for key, value in model.state_dict().items()}
    with caplog.at_level(logging.INFO):
        assert load_pretrained(model, path, name=name) is False
    assert "head for another number of classes" in caplog.text
    loaded, theirs = model.state_dict(), source.state_dict()
    for key, value in loaded.items():
        assert torch.equal(value, (own if key.startswith(f"{head}.") else theirs)[key]), key


def test_files_without_batch_counters_load(tmp_path):
    path, source = weights_file(tmp_path / "weights.safetensors", "cnn", 5)
    tensors = load_file(path)
    save_file({k: v for k, v in tensors.items() if not k.endswith("num_batches_tracked")}, path)
    model = network("cnn")
    assert load_pretrained(model, path, name="cnn") is True
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(model.eval()(images), source(images))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("fc.bias"), "missing: fc.bias$"),
        (lambda t: t.pop("features.1.running_var"), "missing: features.1.running_var$"),
        (lambda t: t.update(extra=torch.zeros(1)), "unexpected: extra$"),
        (
            lambda t: t.update({"features.0.weight": torch.zeros(48, 1, 3, 3)}),
            r"of another shape: features.0.weight \(48, 1, 3, 3\) for \(48, 3, 3, 3\)$",
        ),
        (
            lambda t: t.update({"fc.weight": torch.zeros(5, 7)}),
            r"of another shape: fc.weight \(5, 7\) for \(5, 96\)$",
        ),
    ],
)
def test_a_file_that_does_not_fit_is_refused_whole(change, message, tmp_path):
    path, _ = weights_file(tmp_path / "weights.safetensors", "cnn", 5)
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    model = network("cnn")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_pretrained(model, path, name="cnn")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_weights_of_another_network_are_refused(tmp_path):
    path, _ = weights_file(tmp_path / "weights.safetensors", "cnn", 5)
    with pytest.raises(
        ValueError, match=r"missing: conv1\.weight.*unexpected: features\.0\.weight"
    ):
        load_pretrained(network("resnet18"), path, name="resnet18")


def test_a_path_that_is_no_safetensors_file(tmp_path):
    (tmp_path / "weights.pth").write_bytes(b"PK\x03\x04 not tensors at all")
    with pytest.raises(ValueError, match=r"weights\.pth is not a safetensors file"):
        load_pretrained(network("cnn"), str(tmp_path / "weights.pth"), name="cnn")
    with pytest.raises(FileNotFoundError, match="absent"):
        load_pretrained(network("cnn"), str(tmp_path / "absent"), name="cnn")


def test_imagenet_comes_from_timms_repository(monkeypatch, tmp_path):
    path, source = weights_file(tmp_path / "model.safetensors", "resnet18", 1000)
    asked = []

    def hf_hub_download(repo_id, filename):
        asked.append((repo_id, filename))
        return path

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    model = network("resnet18")
    assert load_pretrained(model, "imagenet", name="resnet18") is False
    assert asked == [("timm/resnet18.tv_in1k", "model.safetensors")]
    assert torch.equal(model.layer4[1].conv2.weight, source.layer4[1].conv2.weight)


@pytest.mark.parametrize("name", LARGE)
def test_unreachable_hub_says_what_to_do(monkeypatch, name):
    def hf_hub_download(*arguments):
        raise LocalEntryNotFoundError("check your connection")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    with pytest.raises(OSError, match=rf"timm/{name}\.tv_in1k.*check your connection.*its path"):
        load_pretrained(network("cnn"), "imagenet", name=name)


@pytest.mark.parametrize("name", ["cnn", "mlp", "timm:vit_tiny"])
def test_no_imagenet_weights_for_the_others(name):
    with pytest.raises(ValueError, match=f"no 'imagenet' weights for {name}"):
        load_pretrained(network("cnn"), "imagenet", name=name)
