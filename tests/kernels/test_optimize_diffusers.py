"""optimize on the networks of diffusers, against the same network left alone."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from foreign_networks import (
    TOLERANCE,
    another_version,
    assert_equal_gradients,
    assert_same,
    conditional,
    count,
    error,
    gradients,
    image,
    pair,
    randomised,
    text,
    unet_2d,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ddb_fast.kernels import optimize

UNKNOWN = "its code is no version that we know"


def test_unet_2d_with_the_defaults_of_diffusers():
    model = pytest.importorskip("diffusers").UNet2DModel()
    model = randomised(model)
    given = {"sample": torch.randn(1, 3, 16, 8), "timestep": torch.tensor([700])}
    expected = gradients(model, given)
    report = optimize(model)
    assert not report.left
    norms = {module.num_channels // module.num_groups for module in norms_of(model)}
    assert norms >= {7, 14, 21, 28}
    assert (count(report, "group norm + SiLU"), count(report, "attention")) == (2 * 22, 16)
    assert_equal_gradients(gradients(model, given), expected)


def norms_of(model: nn.Module) -> list[nn.GroupNorm]:
    return [module for module in model.modules() if isinstance(module, nn.GroupNorm)]


@pytest.mark.parametrize("shift", ("default", "scale_shift"))
@pytest.mark.parametrize("resample", ("conv", "resnet"))
def test_unet_2d(shift, resample):
    sampling = {"downsample_type": resample, "upsample_type": resample}
    model, original = pair(unet_2d(resnet_time_scale_shift=shift, **sampling))
    report = optimize(model)
    assert not report.left
    embedding = "scale, shift" if shift == "scale_shift" else "embedding"
    second = [entry for entry in report.swapped if entry.name.endswith("norm2")]
    assert second and all(embedding in entry.what for entry in second)
    assert_same(model, original, **image())


@pytest.mark.parametrize("linear", (False, True))
@pytest.mark.parametrize("shift", ("default", "scale_shift"))
def test_unet_2d_condition(shift, linear):
    model, original = pair(conditional(resnet_time_scale_shift=shift, use_linear_projection=linear))
    report = optimize(model)
    assert not report.left
    # Self- and cross-attention in one transformer going down, two going up, one in the middle.
    assert count(report, "attention") == 8
    assert_same(model, original, **text())


def test_a_call_with_a_mask_stays_with_its_owner():
    model, original = pair(conditional())
    report = optimize(model)
    masked = [entry for entry in report.swapped if entry.kind == "attention"]
    assert all("a call with a mask stays with AttnProcessor2_0" in entry.what for entry in masked)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    assert_same(model, original, **text(), encoder_attention_mask=mask)
    assert_same(model, original, **text())
    with torch.no_grad():
        given = text()
        assert error(model(**given).sample, model(**given, encoder_attention_mask=mask).sample) > 0


def test_fir_and_other_blocks_of_diffusers():
    resnet = pytest.importorskip("diffusers.models.resnet")
    for arguments in (
        {"up": True, "kernel": "fir"},
        {"down": True, "kernel": "sde_vp"},
        {"output_scale_factor": math.sqrt(2), "skip_time_act": True},
        {"out_channels": 24, "groups_out": 3, "conv_2d_out_channels": 8},
    ):
        block = resnet.ResnetBlock2D(in_channels=8, temb_channels=6, groups=2, **arguments)
        model, original = pair(block)
        assert count(optimize(model), "group norm + SiLU") == 2
        assert_same(
            Positional(model),
            Positional(original),
            x=torch.randn(2, 8, 4, 4),
            emb=torch.randn(2, 6),
        )
    # Without a projection: an autoencoder's, and one that adds what it is given.
    for kind, emb in (("group", None), ("default", None), ("default", torch.randn(2, 8, 1, 1))):
        block = resnet.ResnetBlock2D(
            in_channels=8, temb_channels=None, groups=2, time_embedding_norm=kind
        )
        model, original = pair(block)
        assert count(optimize(model), "group norm + SiLU") == 2
        given = {} if emb is None else {"emb": emb}
        assert_same(Positional(model), Positional(original), x=torch.randn(2, 8, 4, 4), **given)


def test_autoencoder():
    diffusers = pytest.importorskip("diffusers")
    model, original = pair(
        diffusers.AutoencoderKL(
            block_out_channels=(8, 16),
            down_block_types=["DownEncoderBlock2D"] * 2,
            up_block_types=["UpDecoderBlock2D"] * 2,
            norm_num_groups=4,
        )
    )
    report = optimize(model)
    assert not report.left
    assert_same(model, original, sample=torch.randn(2, 3, 8, 8))


class Positional(nn.Module):
    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        return self.block(x, emb)


def test_a_block_with_another_activation_keeps_its_forward():
    model, original = pair(unet_2d(act_fn="mish"))
    report = optimize(model)
    reasons = {entry.what for entry in report.left}
    assert reasons == {"nonlinearity is nn.Mish"}
    assert count(report, "group norm + SiLU") == 0
    assert_same(model, original, **image())


def test_a_block_that_we_do_not_know_keeps_its_forward():
    resnet = pytest.importorskip("diffusers.models.resnet")

    class Newer(resnet.ResnetBlock2D):
        """What a later version might be: the same names, and one more."""

        def forward(self, input_tensor, temb):
            return self.conv2(self.norm2(self.conv1(self.norm1(input_tensor)))) * self.gain

    Newer.__name__ = "ResnetBlock2D"
    sizes = {"in_channels": 8, "temb_channels": None, "groups": 2}
    for block, why in (
        (Newer(**sizes), UNKNOWN),
        (resnet.ResnetBlock2D(**sizes, dropout=1.0), "dropout drops everything"),
        (
            resnet.ResnetBlock2D(**sizes, time_embedding_norm="scale_shift"),
            "it has no projection to scale and shift",
        ),
    ):
        report = optimize(block)
        assert [entry.what for entry in report.left] == [why]
        assert {(entry.name, entry.kind) for entry in report.swapped} == {
            ("norm1", "group norm"),
            ("norm2", "group norm"),
        }


NORM_THEN_SILU = """
        hidden_states = self.norm1(hidden_states)
        hidden_states = self.nonlinearity(hidden_states)
"""
SILU_THEN_NORM = """
        hidden_states = self.nonlinearity(hidden_states)
        hidden_states = self.norm1(hidden_states)
"""


@pytest.mark.parametrize(
    ("old", "new"),
    (
        ("(1 + time_scale)", "time_scale"),
        ("hidden_states = hidden_states + temb", "pass"),
        ("self.skip_time_act", "self.skips"),
        (NORM_THEN_SILU, SILU_THEN_NORM),
        ("chunk(temb, 2, dim=1)", "chunk(temb, 2, dim=-3)"),
    ),
)
def test_a_version_of_diffusers_that_we_do_not_know_is_left(tmp_path, old, new):
    resnet = pytest.importorskip("diffusers.models.resnet")
    block = resnet.ResnetBlock2D(in_channels=8, temb_channels=6, groups=2)
    block.__class__ = another_version(resnet.ResnetBlock2D, old, new, tmp_path)
    assert optimize(block).left == (("", "group norm + SiLU", UNKNOWN),)


@pytest.mark.parametrize(
    ("old", "new"),
    (
        ("inner_dim // attn", "inner_dim * attn"),
        ("attn.norm_q", "attn.norm_of_q"),
        ("is_causal=False", "is_causal=True"),
        ("is_causal=False", "is_causal=False, scale=1.0"),
        ("key = attn.to_k(", "key = attn.to_v("),
    ),
)
def test_a_processor_that_we_do_not_know_is_left(tmp_path, old, new):
    processors = pytest.importorskip("diffusers.models.attention_processor")
    cls = another_version(processors.AttnProcessor2_0, old, new, tmp_path)
    attention = processors.Attention(16, heads=2, dim_head=8, processor=cls())
    (entry,) = optimize(attention).left
    assert entry.what == f"AttnProcessor2_0: {UNKNOWN}"


@pytest.mark.parametrize(
    ("old", "new"),
    (
        ("time_scale", "gain"),
        ("output_tensor", "sum_of_both"),
        ("hidden_states = input_tensor\n", "hidden_states = input_tensor  # as it came\n"),
        ("temb: torch.Tensor, *", "temb: Tensor | None, *"),
    ),
)
def test_other_words_for_the_same_are_known(tmp_path, old, new):
    resnet = pytest.importorskip("diffusers.models.resnet")
    block = resnet.ResnetBlock2D(in_channels=8, temb_channels=6, groups=2)
    block.__class__ = another_version(resnet.ResnetBlock2D, old, new, tmp_path)
    assert not optimize(block).left


@pytest.mark.parametrize("kind", ("default", "scale_shift"))
def test_one_image_meets_many_embeddings(kind):
    """As one start seen at three times: the sum takes the embedding's N."""
    resnet = pytest.importorskip("diffusers.models.resnet")
    sizes = {"in_channels": 8, "temb_channels": 6, "groups": 2}
    model, original = pair(resnet.ResnetBlock2D(**sizes, time_embedding_norm=kind))
    assert count(optimize(model), "group norm + SiLU") == 2
    for images, embeddings in ((1, 3), (3, 1)):
        given = {"x": torch.randn(images, 8, 4, 4), "emb": torch.randn(embeddings, 6)}
        assert_same(Positional(model), Positional(original), **given)


def test_an_embedding_that_the_block_ignores():
    resnet = pytest.importorskip("diffusers.models.resnet")
    sizes = {"in_channels": 8, "temb_channels": None, "groups": 2}
    model, original = pair(resnet.ResnetBlock2D(**sizes, time_embedding_norm="none"))
    assert count(optimize(model), "group norm + SiLU") == 2
    x, emb = torch.randn(2, 8, 4, 4), torch.randn(2, 8, 1, 1)
    torch.testing.assert_close(model(x, emb), original(x, emb))


def test_attention_whose_output_is_divided():
    attention = pytest.importorskip("diffusers.models.attention_processor").Attention
    model, original = pair(attention(16, heads=2, dim_head=8, rescale_output_factor=2.0))
    assert not optimize(model).left
    assert_same(model, original, hidden_states=torch.randn(2, 5, 16))


def test_attention_without_tokens_stays_with_its_owner():
    attention = pytest.importorskip("diffusers.models.attention_processor").Attention
    model, original = pair(attention(16, heads=2, dim_head=8))
    optimize(model)
    x, none = torch.randn(2, 5, 16), torch.randn(2, 0, 16)
    for given in ((none,), (x, none), (none, x), (torch.randn(2, 16, 0, 3),)):
        assert torch.equal(model(*given), original(*given))
    assert model(x[:0]).shape == (0, 5, 16)  # which theirs refuses


def test_attention_that_has_more_to_it_stays():
    attention = pytest.importorskip("diffusers.models.attention_processor").Attention
    keeps = {
        "its head dimension 272 is above 256": {"heads": 1, "dim_head": 272},
        "it has norm_q, norm_k": {"qk_norm": "layer_norm"},
        "it has norm_cross": {"cross_attention_norm": "layer_norm"},
        "its processor is AttnProcessor": {"scale_qk": False},
        "it has fewer heads for k and v than for q": {"heads": 4, "kv_heads": 2},
    }
    for why, arguments in keeps.items():
        report = optimize(attention(16, **arguments))
        assert [entry.what for entry in report.left] == [why]
        assert not report.swapped
    (entry,) = optimize(attention(32, spatial_norm_dim=8)).left
    assert entry.what == "it has spatial_norm"
    assert not optimize(attention(16, heads=1, dim_head=256)).left


def test_the_time_embedding_and_a_shared_activation_are_not_touched():
    model, original = (net.eval() for net in pair(unet_2d()))
    activation = model.conv_act
    model.time_embedding.act = model.mid_block.resnets[0].nonlinearity = activation
    optimize(model)
    assert not any(module.training for module in model.modules())
    assert model.time_embedding.act is activation and type(activation) is nn.SiLU
    x = torch.randn(3, 16)
    assert torch.equal(activation(x), F.silu(x))
    assert torch.equal(model.time_embedding(x), original.time_embedding(x))
    assert_same(model, original, **image())


def test_gradient_checkpointing():
    model, original = pair(unet_2d())
    optimize(model)
    model.enable_gradient_checkpointing()
    assert_same(model, original, **image())


def test_dropout_is_drawn_anew_and_keeps_the_mean():
    resnet = pytest.importorskip("diffusers.models.resnet")
    block = resnet.ResnetBlock2D(in_channels=32, temb_channels=None, groups=4, dropout=0.25)
    # conv2 passes on what dropout gave, so the block returns x + dropout(silu(norm2(...))).
    nn.init.dirac_(block.conv2.weight)
    nn.init.zeros_(block.conv2.bias)
    x = torch.randn(64, 32, 8, 8)
    with torch.no_grad():
        whole = block.eval()(x, None) - x
        optimize(block)
        assert error(block(x, None) - x, whole) <= TOLERANCE
        first, second = block.train()(x, None) - x, block(x, None) - x
        # MC dropout: the module's own switch decides.
        block.eval().dropout.train()
        third = block(x, None) - x
    dropped = first.abs() < 1e-7
    # 131,072 draws: four standard deviations are 0.005.
    assert abs(dropped.float().mean().item() - 0.25) < 0.005
    assert abs((third.abs() < 1e-7).float().mean().item() - 0.25) < 0.005
    assert error(first[~dropped], whole[~dropped] / 0.75) <= 1e-4
    assert not torch.equal(dropped, second.abs() < 1e-7)


@pytest.mark.parametrize("training", (True, False))
@pytest.mark.parametrize("layout", (torch.contiguous_format, torch.channels_last))
def test_the_layout_stays(training, layout):
    model = unet_2d().train(training).to(memory_format=layout)
    optimize(model)
    kept = []
    for module in model.modules():
        if type(module).__name__ in ("ResnetBlock2D", "Attention", "Conv2d"):
            module.register_forward_hook(
                lambda module, inputs, y: kept.extend(
                    t.is_contiguous(memory_format=layout) for t in (inputs[0], y)
                )
            )
    given = image()
    y = model(given["sample"].to(memory_format=layout), given["timestep"]).sample
    assert y.is_contiguous(memory_format=layout)
    assert kept and all(kept)


@pytest.mark.parametrize("residual", (True, False))
@pytest.mark.parametrize("normed", (True, False))
def test_what_attention_returns_can_be_viewed_where_theirs_can(residual, normed):
    attention = pytest.importorskip("diffusers.models.attention_processor").Attention
    arguments = {"residual_connection": residual, "norm_num_groups": 4 if normed else None}
    model, original = pair(attention(16, heads=2, dim_head=8, **arguments))
    optimize(model)
    seen = {model: [], original: []}
    tokens, images = torch.randn(2, 5, 16), torch.randn(2, 16, 3, 4)
    inputs = (
        tokens,
        tokens.mT.contiguous().mT,
        images,
        images.to(memory_format=torch.channels_last),
    )
    for hooked in (False, True):
        for net in (model, original) if hooked and normed else ():
            hook = lambda module, inputs, y, net=net: seen[net].append(y.stride())  # noqa: E731
            net.group_norm.register_forward_hook(hook)
        for x in inputs:
            y, expected = model(x), original(x)
            torch.testing.assert_close(y, expected)
            assert y.is_contiguous() or not expected.is_contiguous()
    assert seen[model] == seen[original]


class Copies(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket in (torch.ops.aten.clone, torch.ops.aten.copy_)
        return function(*args, **kwargs or {})


def test_attention_whose_tokens_lie_together_copies_nothing():
    attention = pytest.importorskip("diffusers.models.attention_processor").Attention
    model = attention(16, heads=2, dim_head=8, norm_num_groups=4)
    optimize(model)
    image = torch.randn(2, 16, 3, 4).to(memory_format=torch.channels_last)
    for x in (torch.randn(2, 5, 16), image):
        with Copies() as copies, torch.no_grad():
            model(x)
        assert copies.count == 0


def test_autocast():
    model, original = pair(unet_2d())
    optimize(model)
    given = image()
    with torch.no_grad():
        truth = original(**given).sample
        with torch.autocast("cpu", torch.bfloat16):
            y, expected = model(**given).sample, original(**given).sample
    assert y.dtype == expected.dtype
    assert error(y, truth) <= 1.25 * error(expected.float(), truth)


def test_a_resnet_block_that_is_wrapped_stays(monkeypatch):
    resnet = pytest.importorskip("diffusers.models.resnet")
    original = resnet.ResnetBlock2D.forward

    @functools.wraps(original)
    def halved(self, *arguments, **options):
        return original(self, *arguments, **options) / 2

    monkeypatch.setattr(resnet.ResnetBlock2D, "forward", halved)
    model = randomised(resnet.ResnetBlock2D(in_channels=8, temb_channels=6, groups=2))
    x, embedding = torch.randn(2, 8, 4, 4), torch.randn(2, 6)
    expected = model(x, embedding)
    assert [entry.what for entry in optimize(model).left] == [UNKNOWN]
    torch.testing.assert_close(model(x, embedding), expected)


@pytest.mark.parametrize(
    ("module", "name", "method"),
    (
        ("resnet", "ResnetBlock2D", "forward"),
        ("attention_processor", "AttnProcessor2_0", "__call__"),
    ),
)
def test_what_is_replaced_on_its_class_later_runs(monkeypatch, module, name, method):
    cls = getattr(pytest.importorskip(f"diffusers.models.{module}"), name)
    model, original = pair(unet_2d())
    optimize(model)
    known = getattr(cls, method)
    monkeypatch.setattr(cls, method, lambda *args, **named: 2 * known(*args, **named))
    assert_same(model, original, **image())


@pytest.mark.parametrize(
    ("name", "arguments", "shape", "given"),
    (
        ("norm_q", {"qk_norm": "layer_norm"}, (2, 5, 32), {}),
        ("norm_k", {"qk_norm": "layer_norm"}, (2, 5, 32), {}),
        (
            "norm_cross",
            {"cross_attention_norm": "layer_norm"},
            (2, 5, 32),
            {"encoder_hidden_states": (2, 3, 32)},
        ),
        ("spatial_norm", {"spatial_norm_dim": 8}, (2, 32, 4, 4), {"temb": (2, 8, 4, 4)}),
    ),
)
def test_a_norm_that_attention_gets_later_runs(name, arguments, shape, given):
    attention = pytest.importorskip("diffusers.models.attention_processor").Attention
    model, original = pair(attention(32, heads=2, dim_head=16))
    assert not optimize(model).left
    later = getattr(attention(32, heads=2, dim_head=16, **arguments), name)
    for net in (model, original):
        setattr(net, name, later)
    x, given = torch.randn(shape), {key: torch.randn(size) for key, size in given.items()}
    assert torch.equal(model(x, **given), original(x, **given))


def test_dropout_that_drops_everything_later():
    resnet = pytest.importorskip("diffusers.models.resnet")
    block = resnet.ResnetBlock2D(in_channels=8, temb_channels=None, groups=2, dropout=0.1)
    model, original = pair(block)
    optimize(model)
    model.dropout.p = original.dropout.p = 1.0
    x = torch.randn(2, 8, 4, 4)
    for training in (True, False):
        expected = original.train(training)(x, None)
        torch.testing.assert_close(model.train(training)(x, None), expected)


def test_processors_are_made_anew_without_their_owner():
    """As diffusers does where it loads an IP-Adapter: `processor.__class__()`."""
    model, original = pair(conditional())
    optimize(model)
    for module in model.modules():
        if hasattr(module, "set_processor"):
            module.set_processor(type(module.processor)())
    assert_same(model, original, **text())
