"""optimize on networks in the style of guided-diffusion, against the same network left alone."""

import pytest
import torch
from foreign_networks import (
    Guided,
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


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


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
        (renamed, "* scale + shift"),
    ):
        model, original = pair(block)
        report = optimize(model)
        assert [why in entry.what for entry in report.left] == [True]
        assert {entry.what for entry in report.swapped} == {"in nn.Sequential"}
        assert_same(model, original, **guided_inputs())


@pytest.mark.parametrize(
    ("new", "why"),
    [
        (".masked_fill(torch.ones(7, 7).triu(1) > 0, -1e9).softmax(dim=-1)", "calls masked_fill"),
        ("", "does not call softmax"),
    ],
    ids=["causal", "no softmax"],
)
def test_an_attention_that_computes_something_else_stays(tmp_path, new, why):
    cls = another_version(QKVAttention, ".softmax(dim=-1)", new, tmp_path)
    model, original = pair(cls(2))
    report = optimize(model)
    assert not report.swapped and [why in entry.what for entry in report.left] == [True]
    x = torch.randn(2, 48, 7)
    assert torch.equal(model(x), original(x))


def test_wide_heads_of_guided_diffusion_stay_with_their_owner():
    model, original = pair(QKVAttention(1))
    optimize(model)
    x = torch.randn(2, 3 * 264, 4)
    assert torch.equal(model(x), original(x))
