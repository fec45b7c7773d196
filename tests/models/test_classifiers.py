"""Building by name, sizes, training and inference of every classifier, pretrained weights."""

import sys
import types

import huggingface_hub
import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from torch import nn

from ddb_fast.models.classifiers import (
    build_classifier,
    channels_last,
    linear_head,
    load_pretrained,
)

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


# Sizes.


@pytest.mark.parametrize("name", [*LARGE, "cnn"])
@pytest.mark.parametrize("size", [32, 47])
def test_any_image_size_gives_a_row_of_logits(name, size):
    model = network(name, 7, image_size=size)
    assert model(torch.randn(2, 3, size, size + 3)).shape == (2, 7)


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
    error = (logits.float() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    if name == "mlp":  # published in single precision, and too small to gain by another
        assert logits.dtype == torch.float32 and error == 0
    else:
        assert logits.dtype == torch.bfloat16 and 0 < error < 0.05


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


@pytest.fixture
def stand_in(monkeypatch):
    """A stand-in for timm that knows `known.tag`; `created` holds what it was asked to build."""
    timm = types.ModuleType("timm")
    timm.__version__ = "0"
    timm.created = []
    timm.is_model = lambda name: name == "known.tag"
    timm.get_pretrained_cfg = lambda name: types.SimpleNamespace(fixed_input_size=False)

    def create_model(name, *, num_classes=1000, **arguments):
        timm.created.append((name, arguments))
        torch.manual_seed(len(timm.created))
        return build_classifier("cnn", num_classes, image_size=32)

    timm.create_model = create_model
    monkeypatch.setitem(sys.modules, "timm", timm)
    return timm


@pytest.mark.parametrize("fixed", [True, False])
def test_timm_gets_an_image_size_only_where_it_is_fixed(stand_in, fixed):
    """`img_size` is an error for timm's convolutional networks and needed for its transformers."""
    stand_in.get_pretrained_cfg = lambda name: types.SimpleNamespace(fixed_input_size=fixed)
    assert network("timm:known.tag", 7, image_size=64).fc.out_features == 7
    size = {"img_size": 64} if fixed else {}
    assert stand_in.created == [("known.tag", {"in_chans": 3} | size)]
    with pytest.raises(ValueError, match="no network 'other'"):
        network("timm:other")


@pytest.mark.parametrize("kind", [RuntimeError, AssertionError, ValueError, TypeError])
@pytest.mark.parametrize("tag", [True, False])
def test_timm_without_the_tag_the_weights_or_the_size(stand_in, tag, kind):
    def refuse(*arguments, **named):
        raise kind("no such thing")

    setattr(stand_in, "get_pretrained_cfg" if tag else "create_model", refuse)
    with pytest.raises(ValueError, match=r"timm:known\.tag: timm 0: no such thing"):
        network("timm:known.tag")


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
    assert load_pretrained(model, path, name=name, image_size=32) is True
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.eval()(images), source(images))


@pytest.mark.parametrize(("name", "head"), [("resnet18", "fc"), ("densenet121", "classifier")])
def test_head_of_other_classes_keeps_its_initialisation(name, head, tmp_path):
    path, source = weights_file(tmp_path / "weights.safetensors", name, 9)
    model = network(name)
    own = {key: value.clone() for key, value in model.state_dict().items()}
    assert load_pretrained(model, path, name=name, image_size=32) is False
    loaded, theirs = model.state_dict(), source.state_dict()
    for key, value in loaded.items():
        assert torch.equal(value, (own if key.startswith(f"{head}.") else theirs)[key]), key


def test_files_without_batch_counters_load(tmp_path):
    path, source = weights_file(tmp_path / "weights.safetensors", "cnn", 5)
    tensors = load_file(path)
    save_file({k: v for k, v in tensors.items() if not k.endswith("num_batches_tracked")}, path)
    model = network("cnn")
    assert load_pretrained(model, path, name="cnn", image_size=32) is True
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
        load_pretrained(model, path, name="cnn", image_size=32)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_file_without_a_head_leaves_the_networks_own(tmp_path):
    """As timm's weights of encoders are."""
    path, source = weights_file(tmp_path / "weights.safetensors", "cnn", 5)
    save_file({k: v for k, v in load_file(path).items() if not k.startswith("fc.")}, path)
    model = network("cnn")
    head = model.fc.weight.clone()
    assert load_pretrained(model, path, name="cnn", image_size=32) is False
    assert torch.equal(model.fc.weight, head)
    assert torch.equal(model.features[0].weight, source.features[0].weight)


def test_weights_of_three_dimensions_stay_as_they_lie():
    """Channels_last is a way for four-dimensional ones: timm's lambda networks have others."""
    model = channels_last(nn.Sequential(nn.Conv3d(2, 3, 2), nn.Conv2d(2, 3, 2)))
    assert model[0].weight.is_contiguous()
    assert model[1].weight.is_contiguous(memory_format=torch.channels_last)


def test_weights_of_another_network_are_refused(tmp_path):
    path, _ = weights_file(tmp_path / "weights.safetensors", "cnn", 5)
    with pytest.raises(
        ValueError,
        match=r"missing: conv1\.weight, .* and 96 more; unexpected: features\.0\.weight, ",
    ):
        load_pretrained(network("resnet18"), path, name="resnet18", image_size=32)


def test_a_path_that_is_no_safetensors_file(tmp_path):
    (tmp_path / "weights.pth").write_bytes(b"PK\x03\x04 not tensors at all")
    with pytest.raises(ValueError, match=r"weights\.pth is not a safetensors file"):
        load_pretrained(network("cnn"), str(tmp_path / "weights.pth"), name="cnn", image_size=32)
    with pytest.raises(FileNotFoundError, match="absent"):
        load_pretrained(network("cnn"), str(tmp_path / "absent"), name="cnn", image_size=32)


def test_imagenet_comes_from_timms_repository(monkeypatch, tmp_path):
    path, source = weights_file(tmp_path / "model.safetensors", "resnet18", 1000)
    asked = []

    def hf_hub_download(repo_id, filename):
        asked.append((repo_id, filename))
        return path

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    model = network("resnet18")
    assert load_pretrained(model, "imagenet", name="resnet18", image_size=32) is False
    assert asked == [("timm/resnet18.tv_in1k", "model.safetensors")]
    assert torch.equal(model.layer4[1].conv2.weight, source.layer4[1].conv2.weight)


@pytest.mark.parametrize("name", LARGE)
def test_unreachable_hub_says_what_to_do(monkeypatch, name):
    def hf_hub_download(*arguments):
        raise LocalEntryNotFoundError("check your connection")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    with pytest.raises(OSError, match=rf"timm/{name}\.tv_in1k.*check your connection.*its path"):
        load_pretrained(network("cnn"), "imagenet", name=name, image_size=32)


@pytest.mark.parametrize("fixed", [True, False])
def test_imagenet_for_timms_networks_is_what_timm_fetches(stand_in, fixed):
    stand_in.get_pretrained_cfg = lambda name: types.SimpleNamespace(fixed_input_size=fixed)
    model = network("cnn", 7)
    head = model.fc.weight.clone()
    assert load_pretrained(model, "imagenet", name="timm:known.tag", image_size=64) is False
    size = {"img_size": 64} if fixed else {}
    assert stand_in.created == [("known.tag", {"in_chans": 3, "pretrained": True} | size)]
    torch.manual_seed(1)
    fetched = build_classifier("cnn", 1000, image_size=32)
    assert torch.equal(model.features[0].weight, fetched.features[0].weight)
    assert torch.equal(model.fc.weight, head)


def test_timms_weights_out_of_reach(stand_in):
    def refuse(*arguments, **named):
        raise LocalEntryNotFoundError("check your connection")

    stand_in.create_model = refuse
    told = r"timm:known\.tag .*check your connection.*at 32 pixels as safetensors"
    with pytest.raises(OSError, match=told):
        load_pretrained(network("cnn"), "imagenet", name="timm:known.tag", image_size=32)


@pytest.mark.parametrize("name", ["cnn", "mlp"])
def test_no_imagenet_weights_for_the_others(name):
    with pytest.raises(ValueError, match=f"no 'imagenet' weights for {name}"):
        load_pretrained(network("cnn"), "imagenet", name=name, image_size=32)


# The last layer.


@pytest.mark.parametrize("name", ALL)
def test_the_last_layer_turns_features_into_logits(name):
    model, features = network(name, 3).eval(), []
    head = linear_head(model)
    head.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
    with torch.no_grad():
        logits = model(torch.randn(2, 3, 32, 32))
    assert features[0].shape == (2, head.in_features)
    torch.testing.assert_close(F.linear(features[0], head.weight, head.bias), logits)


def test_the_last_layer_of_timms_networks_is_the_one_they_name():
    model = nn.Module()
    model.pretrained_cfg = {"classifier": "head.fc"}
    model.head = nn.Sequential()
    model.head.add_module("norm", nn.Linear(4, 4))
    model.head.add_module("fc", nn.Linear(4, 2))
    assert linear_head(model) is model.head.fc


@pytest.mark.parametrize(
    ("head", "kind"), [(nn.Conv2d(4, 2, 1), "Conv2d"), (nn.Linear(4, 2, bias=False), "Linear")]
)
def test_a_network_without_one_linear_last_layer(head, kind):
    model = nn.Module()
    model.fc = head
    with pytest.raises(ValueError, match=f"ends in {kind}, not in one linear layer"):
        linear_head(model)
    with pytest.raises(ValueError, match="ends in nothing"):
        linear_head(nn.Sequential(nn.Linear(4, 2)))
