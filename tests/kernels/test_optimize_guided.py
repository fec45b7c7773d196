"""optimize on networks in the style of guided-diffusion, against the same network left alone."""

import pytest
import torch
from foreign_networks import (
    GroupNorm32,
    Guided,
    OneHeadAttention,
    QKVAttention,
    QKVAttentionLegacy,
    ResBlock,
    another_version,
    assert_same,
    count,
    error,
    guided_inputs,
    pair,
)
from torch import nn

from ddb_fast.kernels import optimize
from ddb_fast.kernels.swap_code import KNOWN, code_of


@pytest.mark.parametrize("attention", (QKVAttentionLegacy, QKVAttention))
@pytest.mark.parametrize("shifted", (True, False))
def test_guided_diffusion(shifted, attention):
    model, original = pair(Guided(shifted=shifted, attention=attention))
    report = optimize(model)
    assert not report.left
    assert count(report, "group norm + SiLU") == 5
    assert count(report, "group norm") == count(report, "attention") == 1
    assert_same(model, original, **guided_inputs())


def test_guided_diffusion_computes_in_halves():
    model, original = pair(Guided())
    given = guided_inputs()
    truth = original(**given).detach()
    halves = {name: x.bfloat16() for name, x in given.items()}
    for net in (model, original):
        net.bfloat16()
        for module in net.modules():
            if isinstance(module, nn.GroupNorm):
                module.float()  # as their convert_to_fp16 leaves it
    optimize(model)
    y, expected = model(**halves), original(**halves)
    assert y.dtype == torch.bfloat16
    assert error(y.float(), truth) <= 1.25 * error(expected.float(), truth)


def test_an_embedding_is_brought_to_the_images_dtype():
    model, original = pair(ResBlock(8, 8, shifted=True))
    optimize(model)
    x, emb = guided_inputs().values()
    for net in (model, original):
        net.emb_layers.bfloat16()
    torch.testing.assert_close(model(x, emb.bfloat16()), original(x, emb.bfloat16()))


def test_a_block_of_more_layers_stays():
    model, original = pair(ResBlock(8, 8, shifted=True))
    for net in (model, original):
        net.in_layers.append(nn.Identity())
    reasons = [entry.what for entry in optimize(model).left]
    assert reasons == ["its layers are not norm, SiLU, conv and norm, SiLU, dropout, conv"]
    assert_same(model, original, **guided_inputs())


def test_layers_that_are_added_later_count():
    model, original = pair(ResBlock(8, 8, shifted=True))
    optimize(model)
    for net in (model, original):
        net.in_layers.append(nn.Tanh())
        net.out_layers.append(nn.Tanh())
    assert_same(model, original, **guided_inputs())


class Unusual(ResBlock):
    """Reads and calls the same, but scales by `scale`, not by 1 + scale."""

    def _forward(self, x, emb):
        h = self.in_layers(x)
        scale, shift = self.emb_layers(emb)[:, :, None, None].chunk(2, dim=1)
        h = self.out_layers[0](h) * scale + shift
        return self.skip_connection(x) + self.out_layers[1:](h)


def test_a_res_block_that_computes_something_else_keeps_its_forward():
    class Renamed(Unusual):
        _forward = Unusual._forward

    inherited = Unusual(8, 16, shifted=True)
    renamed = Renamed(8, 16, shifted=True)
    Renamed.__name__ = "ResBlock"
    for block, why in (
        (inherited, "Unusual overrides _forward"),
        (renamed, "its code is no version that we know"),
    ):
        model, original = pair(block)
        report = optimize(model)
        assert [why in entry.what for entry in report.left] == [True]
        # Which neither calls so: that their forwards alone know.
        chained = "in nn.Sequential, where it is called as a whole"
        assert {entry.what for entry in report.swapped} == {chained}
        assert_same(model, original, **guided_inputs())


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (".softmax(", ".masked_fill(torch.ones(7, 7).triu(1) > 0, -1e9).softmax("),
        (".softmax(dim=-1)", ""),
        ("softmax(dim=-1)", "softmax(dim=-2)"),
        ('"bct,bcs->bts"', '"bct,bcs->bst"'),
        ("q, k, v =", "k, q, v ="),
        ("scale = 1 /", "scale = 1.0 /"),
    ],
    ids=["causal", "no softmax", "another softmax", "transposed", "k for q", "another constant"],
)
def test_an_attention_that_computes_something_else_stays(tmp_path, old, new):
    cls = another_version(QKVAttention, old, new, tmp_path)
    model, original = pair(cls(2))
    report = optimize(model)
    assert not report.swapped
    assert [entry.what for entry in report.left] == ["its code is no version that we know"]
    x = torch.randn(2, 48, 7)
    assert torch.equal(model(x), original(x))


def test_an_attention_whose_caller_deals_the_heads_out():
    model, original = pair(OneHeadAttention())
    (entry,) = optimize(model).swapped
    assert entry.what.startswith("QKVAttention")
    assert_same(model, original, qkv=torch.randn(2, 24, 5))


def test_a_block_that_could_resample_but_does_not_stays(tmp_path, monkeypatch):
    """As improved-diffusion's code would, in a block that has the switch all the same."""
    cls = another_version(ResBlock, "if self.updown:", "if False:", tmp_path)
    monkeypatch.setitem(KNOWN["ResBlock"], code_of(cls._forward).fingerprint, "this test")
    block = ResBlock(8, 16, shifted=True, resample=True)
    block.__class__ = cls
    assert [entry.what for entry in optimize(block).left] == [
        "it has updown, which its code does not read"
    ]


@pytest.mark.parametrize("attention", (QKVAttention(1), OneHeadAttention()))
def test_wide_heads_of_guided_diffusion_stay_with_their_owner(attention):
    model, original = pair(attention)
    optimize(model)
    x = torch.randn(2, 3 * 264, 4)
    assert torch.equal(model(x), original(x))


@pytest.mark.parametrize("attention", (QKVAttention(2), QKVAttentionLegacy(2), OneHeadAttention()))
def test_an_attention_gives_back_the_layout_that_theirs_gives(attention):
    model, original = pair(attention)
    optimize(model)
    x = torch.randn(2, 48, 7)
    for given in (x, x.mT.contiguous().mT):
        y, expected = model(given), original(given)
        assert y.stride() == expected.stride()
        torch.testing.assert_close(y, expected)


class Renamed(nn.GroupNorm):
    def forward(self, h):
        return super().forward(h.float()).type(h.dtype)


Renamed.__name__ = "GroupNorm32"


def test_a_norm_is_called_by_the_name_of_its_argument():
    x = torch.randn(2, 8, 5)
    for norm, name in ((GroupNorm32, "x"), (Renamed, "h"), (nn.GroupNorm, "input")):
        model, original = pair(norm(2, 8))
        assert optimize(model).swapped
        torch.testing.assert_close(model(**{name: x}), original(**{name: x}))
        for wrong in ({}, {"y": x}):
            with pytest.raises(TypeError):
                model(**wrong)


def test_an_attention_without_tokens():
    model, original = pair(OneHeadAttention())
    optimize(model)
    x = torch.randn(2, 24, 0)
    assert model(x).shape == original(x).shape == (2, 8, 0)
