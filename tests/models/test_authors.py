"""Our U-Net against the authors' network (`authors_form.py`) and their files."""

import os
from collections import defaultdict

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from authors_form import authors_network
from ddb_fast.models.authors import read_authors_checkpoint
from ddb_fast.models.unet import ResidualBlock, UNet, from_authors
from ddb_fast.presets import PRESETS


def batch(network, shape=(16, 24), n=4, dtype=torch.float64):
    """x, t, y and the same labels as ours counts them; the first is the null class."""
    timesteps = len(network.time_embedding["timembedding"][0].weight)
    classes = len(network.cond_embedding["condEmbedding"][0].weight) - 1
    y = torch.arange(n) % (classes + 1)
    x = torch.randn(n, 3, *shape, dtype=dtype)
    return x, torch.randint(timesteps, (n,)), y, torch.where(y == 0, classes, y - 1)


def gradients_under_their_names(unet):
    """Our gradients cut up as the authors' parameters."""
    found = {}

    def put(name, module, kinds=("weight", "bias"), unsqueeze=False):
        for kind in kinds:
            grad = getattr(module, kind).grad
            found[f"{name}.{kind}"] = (
                grad[:, :, None, None] if unsqueeze and kind == "weight" else grad
            )

    for theirs, table, mlp in (
        ("time_embedding.timembedding", unet.time_table, unet.time_mlp),
        ("cond_embedding.condEmbedding", unet.class_table, unet.class_mlp),
    ):
        put(f"{theirs}.0", table, ("weight",))
        put(f"{theirs}.1", mlp[0])
        put(f"{theirs}.3", mlp[2])
    labels = "cond_embedding.condEmbedding.0.weight"
    found[labels] = torch.cat([found[labels][-1:], found[labels][:-1]])
    put("head", unet.head)
    put("tail.0", unet.tail_norm)
    put("tail.2", unet.tail)
    row = 0
    for path in ("down", "middle", "up"):
        for index, block in enumerate(getattr(unet, path)):
            name = f"{path}blocks.{index}"
            if not isinstance(block, ResidualBlock):
                if path == "down":
                    put(f"{name}.c1", block.c1, ("weight",))
                    put(f"{name}.c2", block.c2)
                    found[f"{name}.c1.bias"] = block.c2.bias.grad
                else:
                    put(f"{name}.t", block[0])
                    put(f"{name}.c", block[1])
                continue
            width, rows = unet.config.embedding, slice(row, row + block.out_channels)
            row += block.out_channels
            found[f"{name}.temb_proj.1.weight"] = unet.projection.weight.grad[rows, :width]
            found[f"{name}.cond_proj.1.weight"] = unet.projection.weight.grad[rows, width:]
            for layer in ("temb_proj.1", "cond_proj.1", "block1.2"):
                found[f"{name}.{layer}.bias"] = unet.projection.bias.grad[rows]
            put(f"{name}.block1.0", block.norm1)
            put(f"{name}.block1.2", block.conv1, ("weight",))
            put(f"{name}.block2.0", block.norm2)
            put(f"{name}.block2.3", block.conv2)
            if isinstance(block.shortcut, nn.Conv2d):
                put(f"{name}.shortcut", block.shortcut, ("weight",))
                found[f"{name}.shortcut.bias"] = block.conv2.bias.grad
            if block.attention is not None:
                put(f"{name}.attn.group_norm", block.attention.norm)
                put(f"{name}.attn.proj", block.attention.out, unsqueeze=True)
                for letter, weight, bias in zip(
                    "qkv",
                    block.attention.qkv.weight.grad.chunk(3),
                    block.attention.qkv.bias.grad.chunk(3),
                    strict=True,
                ):
                    found[f"{name}.attn.proj_{letter}.weight"] = weight[:, :, None, None]
                    found[f"{name}.attn.proj_{letter}.bias"] = bias
    return found


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"blocks": 1, "multipliers": (1, 3, 2), "classes": 1},
        {"attends": [False, True]},
        {"multipliers": (2,), "attends": [False], "blocks": 3},
    ],
)
def test_outputs_are_the_authors(changes):
    network = authors_network(**changes)
    x, t, theirs, ours = batch(network)
    unet = from_authors(network.state_dict()).eval()
    with torch.no_grad():
        expected, found = network(x, t, theirs), unet(x, t, ours)
    assert expected.abs().mean() > 0.05
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def test_the_whole_ddb_network_in_fp32():
    preset = PRESETS["ddb"]().diffusion
    network = authors_network(
        dtype=torch.float32,
        timesteps=preset.timesteps,
        classes=2,
        channels=128,
        multipliers=(1, 2, 2, 2),
        blocks=2,
    )
    assert sum(p.numel() for p in network.parameters()) == 47_763_587
    unet = from_authors(network.state_dict()).eval()
    assert (unet.config, unet.num_classes, unet.timesteps) == (preset.unet, 2, 1000)
    x, t, theirs, ours = batch(network, (32, 32), n=2, dtype=torch.float32)
    with torch.no_grad():
        expected, found = network(x, t, theirs), unet(x, t, ours)
    assert expected.abs().mean() > 0.05
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_gradients_are_the_authors():
    network = authors_network()
    x, t, theirs, ours = batch(network, (16, 16))
    unet = from_authors(network.state_dict()).eval()
    weight = torch.randn_like(x)
    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    (network(inputs[0], t, theirs) * weight).sum().backward()
    (unet(inputs[1], t, ours) * weight).sum().backward()
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=1e-9, atol=1e-9)
    expected = {name: parameter.grad for name, parameter in network.named_parameters()}
    found = gradients_under_their_names(unet)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-9, msg=name)
    labels = found["cond_embedding.condEmbedding.0.weight"]
    assert not labels[0].any() and labels[1:].any(1).all()


def test_sizes_are_read_off_the_weights():
    network = authors_network(
        timesteps=7, classes=5, channels=64, multipliers=(1, 3, 2), attends=[False, True, False]
    )
    unet = from_authors(network.state_dict())
    assert (unet.timesteps, unet.num_classes, unet.null_class) == (7, 5, 5)
    config = unet.config
    assert (config.channels, config.channel_multipliers) == (64, (1, 3, 2))
    assert (config.blocks_per_level, config.attention_levels) == (2, (1,))
    assert (config.embedding, config.dropout, config.norm_groups) == (256, 0.15, 32)


def test_the_network_is_trainable_and_its_own():
    state = authors_network(blocks=1).state_dict()
    before = {name: tensor.clone() for name, tensor in state.items()}
    unet = from_authors(state)
    assert {p.dtype for p in unet.parameters()} == {torch.float64}
    assert unet.head.weight.is_contiguous(memory_format=torch.channels_last)
    assert all(p.requires_grad and p.is_leaf for p in unet.parameters())
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.zero_()
    assert all(torch.equal(state[name], tensor) for name, tensor in before.items())


def test_loads_back_into_a_fresh_network():
    unet = from_authors(authors_network(blocks=1, dtype=torch.float32).state_dict()).eval()
    fresh = UNet(unet.config, num_classes=unet.num_classes, timesteps=unet.timesteps).eval()
    fresh.load_state_dict(unet.state_dict())
    x, t, y = torch.randn(2, 3, 8, 8), torch.tensor([0, 19]), torch.tensor([0, 3])
    assert torch.equal(fresh(x, t, y), unet(x, t, y))


class WarmUp(torch.optim.lr_scheduler.LRScheduler):
    """As the authors' warm-up: hands over to another schedule, which it keeps as an object."""

    def __init__(self, optimizer, after):
        self.after = after
        super().__init__(optimizer)

    def get_lr(self):
        return [2 * lr for lr in self.base_lrs]


@pytest.fixture(scope="module")
def trained():
    """A small authors' network after a step, and everything their training saves with it."""
    network = nn.DataParallel(authors_network(blocks=1, dtype=torch.float32))
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, weight_decay=1e-4)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
    warm_up = WarmUp(optimizer, cosine)
    x, t, y, _ = batch(network.module, (8, 8), n=2, dtype=torch.float32)
    F.mse_loss(network.module(x, t, y), x).backward()
    optimizer.step()
    warm_up.step()
    return {
        "epoch": 41,
        "name": "waterbirds",
        "model_state_dict": network.state_dict(),
        "optimizer_state_dict": optimizer.state_dict(),
        "scheduler_state_dict": warm_up.state_dict(),
        "optimizer": optimizer,
        "scheduler": cosine,
        "history": defaultdict(dict, {"loss": {0: 1.5}}),
    }


def save(content, path):
    torch.save(content, path)  # noqa: TID251  (theirs are pickles)
    return path


def test_reads_a_training_file(trained, tmp_path):
    state, info = read_authors_checkpoint(save(trained, tmp_path / "ckpt_41.pt"))
    assert info == {"epoch": 41, "name": "waterbirds"}
    assert all(name.startswith("module.") for name in state)
    unet = from_authors(state)
    saved = trained["model_state_dict"]
    assert torch.equal(unet.head.weight, saved["module.head.weight"])
    assert torch.equal(unet.tail.bias, saved["module.tail.2.bias"])


def test_reads_a_bare_state_dict(trained, tmp_path):
    saved = {k.removeprefix("module."): v for k, v in trained["model_state_dict"].items()}
    state, info = read_authors_checkpoint(str(save(saved, tmp_path / "weights.pt")))
    assert info == {}
    assert state.keys() == saved.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in saved.items())
    assert from_authors(state).num_classes == 3


class RunsCode:
    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_never_runs_the_code_of_a_file(trained, tmp_path):
    content = trained | {"extra": RunsCode(tmp_path / "ran")}
    with pytest.raises(ValueError, match=r"cannot|can be read safely"):
        read_authors_checkpoint(save(content, tmp_path / "evil.pt"))
    assert not (tmp_path / "ran").exists()


def bad_files(folder, trained):
    whole = save(trained, folder / "whole.pt").read_bytes()
    (folder / "cut.pt").write_bytes(whole[: len(whole) // 2])
    (folder / "text.pt").write_text("not a checkpoint")
    (folder / "empty.pt").touch()
    save([1, 2], folder / "list.pt")
    save({"model_state_dict": [1]}, folder / "inside.pt")
    save({"epoch": 3}, folder / "numbers.pt")
    save({0: torch.zeros(1)}, folder / "unnamed.pt")
    names = ["cut", "text", "empty", "list", "inside", "numbers", "unnamed", "missing"]
    return [folder / f"{name}.pt" for name in names] + [folder]


def test_what_is_no_checkpoint_is_one_line(trained, tmp_path):
    for path in bad_files(tmp_path, trained):
        with pytest.raises(ValueError) as caught:
            read_authors_checkpoint(path)
        message = str(caught.value)
        assert message.startswith(str(path)) and "\n" not in message


def without(name):
    return lambda state: state.pop(name)


def put(name, *shape):
    return lambda state: state.update({name: torch.zeros(*shape)})


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (without("head.weight"), "missing head.weight"),
        (without("downblocks.0.block1.2.weight"), "missing downblocks.0.block1.2.weight"),
        (without("upblocks.1.cond_proj.1.bias"), "missing upblocks.1.cond_proj.1.bias"),
        (without("downblocks.0.attn.proj_k.bias"), "missing downblocks.0.attn.proj_k.bias"),
        (without("downblocks.0.attn.proj.weight"), "unknown downblocks.0.attn.group_norm.bias"),
        (put("middleblocks.2.block1.0.weight", 64), "unknown middleblocks.2.block1.0.weight"),
        (put("tail.2.weight", 3, 32, 5, 5), r"misshapen tail.2.weight \(3, 32, 5, 5\)"),
        (put("head.bias", 31), r"misshapen head.bias \(31,\)"),
        (put("middleblocks.0.attn.proj_v.weight", 64), "misshapen middleblocks.0.attn.proj_q"),
        (put("upblocks.0.shortcut.bias", 3), "misshapen upblocks.0.block2.3.bias"),
        (put("downblocks.0.temb_proj.1.weight", 32, 9), "misshapen downblocks.0.temb_proj.1"),
        (lambda state: state.clear(), "missing head.weight, .* and 2 more"),
    ],
)
def test_other_state_dicts_are_refused_by_name(trained, change, told):
    state = {k.removeprefix("module."): v for k, v in trained["model_state_dict"].items()}
    change(state)
    with pytest.raises(ValueError, match=told) as caught:
        from_authors(state)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("not a state dict of the authors' generator")
