"""The U-Net's own promises; `test_authors.py` compares it with an independent transcription."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from ddb_fast.config import UNetConfig
from ddb_fast.kernels import use_backend
from ddb_fast.models import unet as unet_module
from ddb_fast.models.unet import Attention, ResidualBlock, UNet, join, sinusoids
from ddb_fast.presets import PRESETS

SMALL = UNetConfig(
    channels=16,
    channel_multipliers=(1, 2),
    blocks_per_level=1,
    norm_groups=8,
    attention_levels=(1,),
    embedding=32,
)
OURS = replace(SMALL, time_table=False, resample="conv", attention_up=True, head_channels=8)
CHANNELS_LAST = {"memory_format": torch.channels_last}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def network(config=SMALL, **sizes):
    """A network whose every parameter has visible size, which initial ones have not."""
    unet = UNet(config, **({"num_classes": 3, "timesteps": 50} | sizes))
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return unet


def batch(n=3, height=8, width=12, dtype=torch.float32):
    x = torch.randn(n, 3, height, width, dtype=dtype)
    return x, torch.randint(50, (n,)), torch.arange(n) % 4


def test_ddb_has_the_parameters_of_the_authors_less_the_biases_that_add_up():
    with torch.device("meta"):
        unet = UNet(PRESETS["ddb"]().diffusion.unet, num_classes=2, timesteps=1000)
    added_twice = sum(2 * block.out_channels for block in unet.residual_blocks())
    shortcuts = sum(
        block.out_channels
        for block in unet.residual_blocks()
        if isinstance(block.shortcut, nn.Conv2d)
    )
    ways_down = 128 + 256 + 256
    assert sum(p.numel() for p in unet.parameters()) == 47_750_019
    assert 47_750_019 + added_twice + shortcuts + ways_down == 47_763_587


@use_backend(attention="reference")
def test_ddb_costs_74_gflop_an_image():
    """Two FLOP a multiply-add; the reference backend shows its matrix products to the counter."""
    with torch.device("meta"):
        unet = UNet(PRESETS["ddb"]().diffusion.unet, num_classes=2, timesteps=1000).eval()
        x, t = torch.empty(1, 3, 64, 64), torch.zeros(1, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        unet(x, t, t)
    products = counter.get_flop_counts()["Global"][torch.ops.aten.bmm]
    assert products / 1e9 == pytest.approx(19.5, abs=0.05)
    assert (counter.get_total_flops() - products) / 1e9 == pytest.approx(54.5, abs=0.05)


@pytest.mark.parametrize("preset", ["lean", "tiny", "digits"])
def test_presets_learn_in_every_parameter(preset):
    config = PRESETS[preset]().diffusion
    unet = network(config.unet, timesteps=config.timesteps)
    x, t, y = batch(2, 16, 16)
    out = unet(x, t, y)
    assert out.shape == x.shape
    out.square().mean().backward()
    for name, parameter in unet.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.any(), name


def test_attention_stands_where_the_configuration_says():
    def attending(config):
        unet = UNet(config, num_classes=2, timesteps=5)
        return [
            [b.attention is not None for b in path if isinstance(b, ResidualBlock)]
            for path in (unet.down, unet.middle, unet.up)
        ]

    levels = replace(SMALL, channel_multipliers=(1, 2, 2), attention_levels=(0, 2))
    assert attending(levels) == [[True, False, True], [True, False], [False] * 6]
    up = replace(levels, attention_up=True)
    assert attending(up)[2] == [True, True, False, False, True, True]
    assert attending(replace(up, attention_levels=()))[1:] == [[True, False], [False] * 6]


@pytest.mark.parametrize("head_channels", [None, 8])
def test_attention_is_multi_head_attention_of_the_sum(head_channels):
    config = replace(SMALL, head_channels=head_channels)
    ours = Attention(config, 16).double()
    theirs = nn.MultiheadAttention(16, ours.heads, batch_first=True).double()
    assert ours.heads == (1 if head_channels is None else 2)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_()
        for own, other in (
            (ours.qkv.weight, theirs.in_proj_weight),
            (ours.qkv.bias, theirs.in_proj_bias),
            (ours.out.weight, theirs.out_proj.weight),
            (ours.out.bias, theirs.out_proj.bias),
        ):
            other.copy_(own)
    x, shortcut = torch.randn(2, 2, 16, 3, 5, dtype=torch.float64).unbind(0)
    bias = torch.randn(16, dtype=torch.float64)
    total = x + bias[:, None, None] + shortcut
    tokens = F.group_norm(total, 8, ours.norm.weight, ours.norm.bias).flatten(2).mT
    expected = total + theirs(tokens, tokens, tokens)[0].mT.reshape(total.shape)
    found = ours(x.contiguous(**CHANNELS_LAST), shortcut.contiguous(**CHANNELS_LAST), bias)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert found.is_contiguous(**CHANNELS_LAST)


def test_conv_resampling_halves_and_repeats():
    unet = network(OURS)
    down = next(m for m in unet.down if not isinstance(m, ResidualBlock))
    up = next(m for m in unet.up if not isinstance(m, ResidualBlock))
    h = torch.randn(1, 16, 6, 8)
    assert torch.allclose(
        down(h), F.conv2d(h, down.weight, down.bias, padding=1)[..., ::2, ::2], atol=1e-5
    )
    h = torch.randn(1, 32, 3, 4)
    doubled = h.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert torch.allclose(up(h), up[1](doubled), atol=1e-5)


def test_sinusoids():
    found = sinusoids(torch.tensor([0.0, 3.5, 999.0]), 6)
    expected = [
        [f(t / 10_000 ** (2 * i / 6)) for i in range(3) for f in (math.sin, math.cos)]
        for t in (0.0, 3.5, 999.0)
    ]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=2e-4)


def test_the_time_table_starts_as_the_fixed_sinusoids():
    table, fixed = network(), network(replace(SMALL, time_table=False))
    start = UNet(SMALL, num_classes=3, timesteps=50).state_dict()["time_table.weight"]
    fixed.load_state_dict(table.state_dict(), strict=False)
    x, t, y = batch()
    fixed.eval(), table.eval()
    assert not torch.allclose(table(x, t, y), fixed(x, t, y), atol=1e-3)
    table.time_table.weight.data.copy_(start)
    torch.testing.assert_close(table(x, t, y), fixed(x, t, y), rtol=0, atol=1e-5)
    assert table.time_table.weight.requires_grad
    # Real timesteps lie between their neighbours' embeddings.
    near, far = (fixed(x, t + step, y) - fixed(x, t.float(), y) for step in (0.01, 1))
    assert 0 < near.abs().max() < 0.1 * far.abs().max()


@pytest.mark.parametrize("config", [SMALL, OURS], ids=["authors", "ours"])
def test_every_sample_depends_on_itself_alone(config):
    unet = network(config).double().eval()
    x, t, y = batch(dtype=torch.float64)
    together = unet(x, t, y)
    apart = torch.cat([unet(x[i : i + 1], t[i : i + 1], y[i : i + 1]) for i in range(len(x))])
    torch.testing.assert_close(together, apart, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(together, unet(x, (t + 9) % 50, y), atol=1e-3)
    assert not torch.allclose(together, unet(x, t, torch.full_like(y, unet.null_class)), atol=1e-3)


@pytest.mark.parametrize("config", [SMALL, OURS], ids=["authors", "ours"])
def test_stays_channels_last(config):
    unet = network(config).eval()
    seen = []
    for module in unet.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | unet_module.Norm):
            module.register_forward_hook(
                lambda _, x, y: seen.append(
                    all(
                        tensor.is_contiguous(**CHANNELS_LAST)
                        for tensor in (x[0], y[0] if isinstance(y, tuple) else y)
                    )
                )
            )
    x, t, y = batch(height=8, width=16)
    out = unet(x, t, y)
    assert out.is_contiguous(**CHANNELS_LAST) and not out.is_contiguous()
    assert len(seen) > 20 and all(seen)
    assert torch.equal(out, unet(x.contiguous(**CHANNELS_LAST), t, y))
    assert all(p.is_contiguous(**CHANNELS_LAST) for p in unet.parameters() if p.dim() == 4)


def test_one_pixel_at_the_bottom():
    unet = network().double().eval()
    x, t, y = batch(height=2, width=2, dtype=torch.float64)
    assert unet(x, t, y).isfinite().all()


def test_the_null_class_is_zero_and_stays_zero():
    unet = UNet(SMALL, num_classes=3, timesteps=50)
    assert unet.null_class == 3
    optimizer = torch.optim.AdamW(unet.parameters(), lr=0.1, weight_decay=0.1)
    x, t, y = batch(4)
    before = unet.class_table.weight.detach().clone()
    for _ in range(2):
        F.mse_loss(unet(x, t, y), x).backward()
        optimizer.step()
    after = unet.class_table.weight.detach()
    assert not after[3].any()
    assert (before[:3] != after[:3]).any(1).all()


def test_starts_near_zero_with_each_packed_layer_as_its_own():
    unet = UNet(SMALL, num_classes=3, timesteps=50)
    x, t, y = batch()
    assert unet(x, t, y).abs().max() < 1e-3
    for block in unet.residual_blocks():
        assert 0 < block.conv2.weight.abs().max() < 1e-5

    def bound(fan_in, fan_out):
        return math.sqrt(6 / (fan_in + fan_out))

    packed = unet.projection.weight.split(unet.block_channels)
    parts = [(part, bound(32, len(rows))) for rows in packed for part in rows.chunk(2, 1)]
    attention = unet.middle[0].attention
    parts += [(part, bound(32, 32)) for part in attention.qkv.weight.chunk(3)]
    for part, largest in parts:
        assert 0.95 * largest < part.abs().max() <= largest
    assert 0 < attention.out.weight.abs().max() < 1e-5
    assert not any(p.any() for name, p in unet.named_parameters() if name.endswith("bias"))


def test_dropout_acts_in_the_second_norm_of_each_block_while_training(monkeypatch):
    calls = []

    def recorded(*arguments, **keywords):
        calls.append(keywords.get("dropout_p", 0.0))
        return group_norm(*arguments, **keywords)

    group_norm = unet_module.group_norm
    monkeypatch.setattr(unet_module, "group_norm", recorded)
    unet = network(replace(SMALL, dropout=0.3))
    x, t, y = batch()
    assert not torch.equal(unet(x, t, y), unet(x, t, y))
    blocks = len(list(unet.residual_blocks()))
    assert sum(p == 0.3 for p in calls) == 2 * blocks and set(calls) == {0.0, 0.3}
    calls.clear()
    unet.eval()
    assert torch.equal(unet(x, t, y), unet(x, t, y))
    assert set(calls) == {0.0}


@pytest.mark.parametrize("config", [SMALL, OURS], ids=["authors", "ours"])
def test_bf16_autocast_follows_fp32(config):
    unet = network(replace(config, dropout=0.0))
    x, t, y = batch()
    expected = unet(x, t, y)
    with torch.autocast("cpu", torch.bfloat16):
        found = unet(x, t, y)
    assert found.dtype == torch.bfloat16
    error = (found.float() - expected).square().mean().sqrt()
    assert error < 0.03 * expected.square().mean().sqrt()
    found.float().square().mean().backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == p.dtype for p in unet.parameters())


@pytest.mark.parametrize("config", [SMALL, OURS], ids=["authors", "ours"])
def test_compiles_in_one_graph(config):
    unet = network(replace(config, dropout=0.0))
    compiled = torch.compile(copy.deepcopy(unet), backend="aot_eager", fullgraph=True)
    x, t, y = batch()
    expected, found = unet(x, t, y), compiled(x, t, y)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert found.is_contiguous(**CHANNELS_LAST)
    expected.square().mean().backward()
    found.square().mean().backward()
    for own, other in zip(unet.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(other.grad, own.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"norm_groups": 12}, "norm_groups 12 does not divide 16 channels"),
        ({"norm_groups": 32}, "norm_groups 32 does not divide 16 channels"),
        ({"head_channels": 24}, "head_channels 24 does not divide 32 channels"),
        ({"attention_levels": (0, 2)}, r"attention_levels \[2\] are not among the 2 levels"),
        ({"channel_multipliers": (), "attention_levels": ()}, "at least one level"),
        ({"channels": 15, "norm_groups": 1}, "channels 15"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, told):
    with pytest.raises(ValueError, match=told):
        UNet(replace(SMALL, **changes), num_classes=3, timesteps=50)


@pytest.mark.parametrize("sizes", [{"num_classes": 0}, {"timesteps": 0}])
def test_there_is_a_class_and_a_timestep(sizes):
    with pytest.raises(ValueError, match="at least one of each"):
        UNet(SMALL, **({"num_classes": 3, "timesteps": 50} | sizes))


@pytest.mark.parametrize(("height", "width"), [(9, 8), (8, 7)])
def test_sides_must_halve_at_every_level(height, width):
    with pytest.raises(ValueError, match=f"images of {height}x{width} pixels: .* multiples of 2"):
        network()(*batch(height=height, width=width))


def test_other_numbers_of_image_channels():
    unet = network(in_channels=1)
    _, t, y = batch()
    assert unet(torch.randn(3, 1, 8, 8), t, y).shape == (3, 1, 8, 8)


def test_joined_channels_have_gradients_of_their_own():
    """torch.cat's values and gradients, in tensors without gaps."""
    operands = [
        torch.randn(2, channels, 4, 3, dtype=torch.float64).to(**CHANNELS_LAST).requires_grad_()
        for channels in (6, 2)
    ]
    assert torch.autograd.gradcheck(join, operands)
    gradient = torch.randn(2, 8, 4, 3, dtype=torch.float64).to(**CHANNELS_LAST)
    expected = torch.autograd.grad(torch.cat(operands, 1), operands, gradient)
    actual = torch.autograd.grad(joined := join(*operands), operands, gradient)
    assert torch.equal(joined, torch.cat(operands, 1))
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.equal(ours, theirs)
        assert ours.is_contiguous(**CHANNELS_LAST) and not theirs.is_contiguous(**CHANNELS_LAST)
