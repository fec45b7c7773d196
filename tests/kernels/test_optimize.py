"""optimize on any network: what is recognised, what stays, and what the report says."""

import copy
import functools
import itertools
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from foreign_networks import (
    GroupNorm32,
    Guided,
    QKVAttentionLegacy,
    ResBlock,
    assert_same,
    conditional,
    guided_inputs,
    image,
    pair,
    plain,
    text,
    unet_2d,
)
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from ddb_fast.kernels import optimize, use_backend

CHAINED = "in nn.Sequential, where it is called as a whole"


def hooked_silu() -> nn.SiLU:
    layer = nn.SiLU()
    layer.register_forward_hook(lambda *values: None)
    return layer


def test_plain_modules():
    model, original = pair(plain())
    report = optimize(model)
    assert not report.left
    assert [(entry.name, entry.kind) for entry in report.swapped] == [
        ("1", "group norm + SiLU"),
        ("4", "group norm + SiLU"),
        ("6", "group norm"),
        ("10.0", "group norm"),
    ]
    assert_same(model, original, input=torch.randn(2, 3, 5, 7))


@pytest.mark.parametrize(
    "shape", ((3, 8), (3, 8, 5), (3, 8, 2, 3, 4), (0, 8, 2, 2), (2, 8, 0), (2, 8, 0, 3), (0, 8, 0))
)
def test_other_shapes(shape):
    model, original = pair(nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU(), nn.GroupNorm(2, 8)))
    x = torch.randn(shape)
    optimize(model)
    try:
        expected = original(x)
    except RuntimeError as refusal:
        # torch 2.14 takes no images without pixels.
        pytest.skip(str(refusal))
    torch.testing.assert_close(model(x), expected)


class Bound:
    """A method that has no code of its own."""

    def __init__(self, function):
        self.function = function

    def __get__(self, instance, owner):
        return self if instance is None else functools.partial(self.function, instance)


@pytest.mark.parametrize("made", (lambda f: f, functools.wraps(nn.GroupNorm.forward), Bound))
def test_a_forward_replaced_on_the_class_stays(monkeypatch, made):
    """As tools that scale, log or quantise do."""
    original = nn.GroupNorm.forward

    def tripled(self, x):
        return 3 * original(self, x)

    monkeypatch.setattr(nn.GroupNorm, "forward", made(tripled))
    model = nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU())
    x = torch.randn(2, 8, 4, 4)
    expected = model(x)
    report = optimize(model)
    assert not report.swapped and "GroupNorm.forward was replaced" in report.left[0].what
    assert torch.equal(model(x), expected)


def test_attention_with_masks_is_named():
    encoder = nn.TransformerEncoderLayer(8, 2)
    report = optimize(encoder)
    assert not report.swapped
    assert [(entry.name, entry.kind) for entry in report.left] == [("self_attn", "attention")]


def test_what_we_do_not_know_is_left_and_named():
    class Noisy(nn.GroupNorm):
        def forward(self, input):
            return super().forward(input) + 1

    class Wrapped(nn.GroupNorm):
        pass

    class Reverse(nn.Sequential):
        def forward(self, input):
            for layer in reversed(self):
                input = layer(input)
            return input

    class Doubled(nn.GroupNorm):
        def __call__(self, input):
            return 2 * super().__call__(input)

    class Louder(nn.SiLU):
        def forward(self, input):
            return 2 * super().forward(input)

    class Above(GroupNorm32, Noisy):
        """Its super() is not torch's."""

    SameName = type("GroupNorm", (Noisy,), {"forward": Noisy.forward})
    OtherFp32 = type("GroupNorm32", (Noisy,), {"forward": Noisy.forward})
    replaced = nn.GroupNorm(2, 8)
    replaced.forward = lambda input: input
    model = nn.ModuleDict(
        {
            "noisy": Noisy(2, 8),
            "wrapped": Wrapped(2, 8),
            "reverse": Reverse(nn.GroupNorm(2, 8), nn.SiLU()),
            "other": OtherFp32(2, 8),
            "same_name": SameName(2, 8),
            "above": Above(2, 8),
            "doubled": Doubled(2, 8),
            "called": nn.Sequential(Doubled(2, 8), nn.SiLU(), nn.GroupNorm(2, 8), nn.SiLU()),
            "louder": nn.Sequential(nn.GroupNorm(2, 8), Louder()),
            "replaced": replaced,
            "normal": nn.utils.parametrizations.weight_norm(nn.GroupNorm(2, 8)),
        }
    )
    original = copy.deepcopy(model)
    report = optimize(model)
    swapped = {entry.name for entry in report.swapped}
    assert swapped == {"wrapped", "reverse.0", "called.2", "louder.0"}
    assert {entry.name: entry.what for entry in report.left} == {
        "noisy": "Noisy overrides forward",
        "reverse": "Reverse overrides forward",
        "other": "its code is no version that we know",
        "same_name": "GroupNorm overrides forward",
        "above": "Noisy overrides forward",
        "doubled": "its class has a __call__ of its own",
        "called": "0: its class has a __call__ of its own",
        "called.0": "its class has a __call__ of its own",
        "louder": "1 is Louder",
        "replaced": "its forward was replaced on the instance",
        "normal": "its weights are parametrised",
    }
    x = torch.randn(2, 8, 4, 4)
    for name in set(model) - {"replaced"}:
        torch.testing.assert_close(model[name](x), original[name](x))


@pytest.mark.parametrize("kind", ("forward", "forward_pre", "full_backward", "full_backward_pre"))
def test_hooks_fire_and_see_what_they_saw(kind):
    def watch(model):
        seen = []
        block = model.mid_block.resnets[0]
        for module in (block.norm1, block.nonlinearity, block.dropout, model.conv_act):
            register = getattr(module, f"register_{kind}_hook")
            register(lambda module, *values: seen.append(values[-1]))
        return seen

    model, original = pair(unet_2d())
    seen, expected = watch(model), watch(original)
    report = optimize(model)
    reasons = {entry.name: entry.what for entry in report.left}
    assert reasons == {"mid_block.resnets.0": "norm1 has a hook"}
    assert_same(model, original, **image())
    assert len(seen) == len(expected) > 0
    for actual, truth in zip(seen, expected, strict=True):
        torch.testing.assert_close(actual, truth, rtol=1e-4, atol=1e-5)


class Head(nn.Module):
    """Its forward is as those of diffusers end; its norm and activation serve others too."""

    def __init__(self):
        super().__init__()
        self.conv_norm_out, self.conv_act = nn.GroupNorm(2, 8), nn.SiLU()
        self.tail = nn.Sequential(self.conv_norm_out, nn.SiLU())

    def features(self, input):
        return self.conv_norm_out(input)

    def forward(self, input):
        activate = self.conv_act
        x = activate(input) + self.features(input) + 2 * self.tail(input)
        x = self.conv_norm_out(x)
        x = self.conv_act(x)
        return x


def test_a_norm_that_others_call_stays_a_norm():
    model, original = pair(Head())
    optimize(model)
    x = torch.randn(2, 8, 3, 5)
    assert_same(model, original, input=x)
    torch.testing.assert_close(model.conv_norm_out(x), original.conv_norm_out(x))
    assert torch.equal(model.conv_act(x), original.conv_act(x))


def test_a_forward_put_on_an_activation_runs():
    """As accelerate puts its hooks on; before or after."""
    x = torch.randn(2, 8, 3, 5)
    for before in (True, False):
        model, original = pair(nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU()))
        if not before:
            optimize(model)
        for net in (model, original):
            net[1].forward = lambda input: input.tanh()
        if before:
            (entry,) = optimize(model).left
            assert entry.what == "1: its forward was replaced on the instance"
        torch.testing.assert_close(model(x), original(x))


@pytest.mark.parametrize(
    ("build", "given", "cls", "method"),
    (
        (plain, lambda: {"input": torch.randn(2, 3, 5, 7)}, nn.GroupNorm, "forward"),
        (plain, lambda: {"input": torch.randn(2, 3, 5, 7)}, nn.SiLU, "forward"),
        (plain, lambda: {"input": torch.randn(2, 3, 5, 7)}, nn.Sequential, "forward"),
        (Guided, guided_inputs, nn.GroupNorm, "forward"),
        (Guided, guided_inputs, nn.Dropout, "forward"),
        (Guided, guided_inputs, GroupNorm32, "forward"),
        (Guided, guided_inputs, ResBlock, "_forward"),
        (Guided, guided_inputs, QKVAttentionLegacy, "forward"),
    ),
)
def test_a_forward_replaced_on_its_class_later_runs(monkeypatch, build, given, cls, method):
    model, original = pair(build())
    optimize(model)
    known = getattr(cls, method)
    monkeypatch.setattr(cls, method, lambda *args, **named: 2 * known(*args, **named))
    assert_same(model, original, **given())


def test_hooks_that_come_later_fire_too():
    resnet = pytest.importorskip("diffusers.models.resnet")
    emb = torch.randn(2, 6)
    for model, name, times in (
        (resnet.ResnetBlock2D(in_channels=8, temb_channels=6, groups=2), "nonlinearity", 3),
        (ResBlock(8, 8, shifted=True), "out_layers.1", 1),
        (ResBlock(8, 8, shifted=False), "out_layers", 1),
        (nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU()), "1", 1),
    ):
        optimize(model)
        seen = []
        model.get_submodule(name).register_forward_hook(lambda *values, seen=seen: seen.append(1))
        x = torch.randn(2, 8, 4, 4)
        _ = model(x) if isinstance(model, nn.Sequential) else model(x, emb)
        assert len(seen) == times, name


def test_a_layer_that_is_exchanged_later_counts():
    model, original = pair(plain())
    optimize(model)
    for net in (model, original):
        net[1], net[5] = nn.GroupNorm(1, 8), nn.Tanh()
    assert_same(model, original, input=torch.randn(2, 3, 5, 7))
    model, original = pair(ResBlock(8, 8, shifted=True))
    optimize(model)
    for net in (model, original):
        net.out_layers[2] = nn.Tanh()
    assert_same(model, original, **guided_inputs())


@pytest.mark.parametrize("build", (unet_2d, conditional, Guided, plain))
def test_parameters_and_names_stay(build):
    model = build()
    before = {name: id(x) for name, x in model.named_parameters()}
    state = {name: x.clone() for name, x in model.state_dict().items()}
    optimize(model)
    assert {name: id(x) for name, x in model.named_parameters()} == before
    after = model.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[name], x) for name, x in state.items())
    fresh = build()
    model.load_state_dict(fresh.state_dict())
    fresh.load_state_dict(model.state_dict())


@pytest.mark.parametrize(
    ("build", "given"), ((unet_2d, image), (Guided, guided_inputs), (conditional, text))
)
def test_a_copy_is_a_network_of_its_own(build, given):
    model, original = pair(build())
    optimize(model)
    clone = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert_same(clone.double().float(), original, **given())


def test_a_network_can_be_sent_to_another_process():
    model, original = pair(conditional())
    optimize(model)
    sent = ForkingPickler.loads(ForkingPickler.dumps(model))
    assert_same(sent, original, **text())


@pytest.mark.parametrize("build", (unet_2d, Guided, plain))
def test_twice_changes_nothing(build):
    model = build()
    first = optimize(model)
    forwards = {name: vars(module).get("forward") for name, module in model.named_modules()}
    second = optimize(model)
    assert not second.swapped
    assert {entry.name for entry in second.left} == {entry.name for entry in first.swapped}
    assert {entry.what for entry in second.left} == {"already optimised"}
    again = {name: vars(module).get("forward") for name, module in model.named_modules()}
    assert forwards == again


@pytest.mark.parametrize("backend", (None, "torch", "reference"))
@pytest.mark.parametrize("layout", (torch.contiguous_format, torch.channels_last))
@pytest.mark.parametrize(
    ("build", "given", "key"),
    ((unet_2d, image, "sample"), (conditional, text, "sample"), (Guided, guided_inputs, "x")),
)
def test_any_backend_and_layout(backend, layout, build, given, key):
    model, original = pair(build())
    optimize(model)
    model.to(memory_format=layout)
    inputs = given()
    inputs[key] = inputs[key].to(memory_format=layout)
    with use_backend(group_norm=backend, attention=backend):
        assert_same(model, original, **inputs)


def small_conditional() -> nn.Module:
    types = {"down_block_types": ["CrossAttnDownBlock2D"], "up_block_types": ["CrossAttnUpBlock2D"]}
    return conditional(block_out_channels=[16], **types)


@pytest.mark.parametrize(
    ("build", "given", "backend"),
    # aot_eager also traces the backward, the same operators in every network.
    ((small_conditional, text, "eager"), (Guided, guided_inputs, "aot_eager")),
)
def test_compiles_whole(build, given, backend):
    model, original = pair(build())
    optimize(model)
    counter = CompileCounterWithBackend(backend)
    model.compile(backend=counter, fullgraph=True)
    assert_same(model, original, **given())
    assert counter.frame_count == 2  # training and not


def test_the_report_counts():
    model = nn.Sequential(
        *(nn.GroupNorm(2, 8), nn.SiLU(), nn.GroupNorm(2, 8), nn.GroupNorm(2, 8)),
        nn.MultiheadAttention(8, 2),
    )
    title, *rows = str(optimize(model)).splitlines()
    assert title == "3 swapped, 1 left"
    assert [" ".join(row.split()) for row in rows] == [
        "swapped 2 group norm nn.GroupNorm 2, ...",
        f"swapped 1 group norm + SiLU {CHAINED} 0",
        "left 1 attention nn.MultiheadAttention takes masks and returns weights 4",
    ]
    assert str(optimize(nn.Identity())) == "0 swapped, 0 left"


def test_the_report_names_each_pair_of_a_chain():
    chain = nn.Sequential(nn.GroupNorm(2, 8), hooked_silu(), nn.GroupNorm(2, 8), nn.SiLU())
    report = optimize(chain)
    assert [(entry.name, entry.what) for entry in report.swapped] == [
        ("0", "nn.GroupNorm"),
        ("2", CHAINED),
    ]
    assert report.left == (("", "group norm + SiLU", "1 has a hook"),)


def test_the_report_knows_the_chain_of_a_norm_met_before():
    model = nn.Module()
    model.norm = nn.GroupNorm(2, 8)
    model.chain = nn.Sequential(model.norm, nn.SiLU())
    assert optimize(model).swapped == (("norm", "group norm + SiLU", CHAINED),)


@pytest.mark.parametrize("later", ((nn.Tanh(),), (), (hooked_silu(),)))
@pytest.mark.parametrize("order", (1, -1))
def test_the_report_of_a_norm_that_two_chains_share(later, order):
    """One fuses it, the other does not: it is a norm, which sometimes takes the activation in."""
    norm = nn.GroupNorm(2, 8)
    chains = nn.Sequential(norm, nn.SiLU()), nn.Sequential(norm, *later)
    model = nn.ModuleList([*chains[::order], nn.Sequential(norm, nn.SiLU())])
    both = copy.deepcopy(nn.Sequential(*chains[0], *chains[1])[::order])
    what = f"nn.GroupNorm; with SiLU {CHAINED}"
    assert optimize(model).swapped == (("0.0", "group norm", what),)
    assert [(kind, why) for _, kind, why in optimize(both).swapped] == [("group norm", what)]


def test_the_report_of_a_norm_that_a_block_and_a_chain_share():
    model, block = nn.Module(), ResBlock(8, 8, shifted=True)
    model.block, model.chain = block, nn.Sequential(block.in_layers[0], nn.Tanh())
    assert optimize(model).swapped == (
        ("block.in_layers.0", "group norm", "GroupNorm32; with SiLU in ResBlock"),
        ("block.out_layers.0", "group norm + SiLU", "in ResBlock, with scale, shift and dropout"),
    )


class Delegating(nn.Module):
    """As wrappers and torch.compile hand on what is asked of them."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)


def test_the_report_of_a_wrapper_is_that_of_what_it_wraps():
    attention = pytest.importorskip("diffusers.models.attention_processor").Attention
    for module in (Head(), attention(8, heads=2, dim_head=4), unet_2d()):
        report, inner = optimize(Delegating(copy.deepcopy(module))), optimize(module)
        assert not report.left and not inner.left
        names = [f"module.{entry.name}".rstrip(".") for entry in inner.swapped]
        assert [entry.name for entry in report.swapped] == names


def test_takes_modules_only():
    with pytest.raises(ValueError, match="got dict"):
        optimize({"weight": torch.zeros(1)})


def _layouts(shape: tuple[int, ...]) -> list[torch.Tensor]:
    """Tensors with every order of the dimensions in memory, dense and cut out of a larger one."""
    found = []
    for order in itertools.permutations(range(len(shape))):
        back = [order.index(axis) for axis in range(len(shape))]
        found.append(torch.randn([shape[axis] for axis in order]).permute(back))
        found.append(torch.randn([2 * shape[axis] for axis in order]).permute(back))
        found[-1] = found[-1][tuple(slice(size) for size in shape)]
    return found


@pytest.mark.parametrize(
    "shape", ((3, 8), (2, 8, 5), (2, 8, 3, 5), (1, 8, 3, 1), (2, 8, 1, 1), (2, 8, 2, 3, 5))
)
def test_a_norm_gives_back_the_layout_that_torchs_gives(shape):
    """Code behind it may take a `view` of what it gets."""
    for module in (
        nn.GroupNorm(2, 8),
        GroupNorm32(2, 8),
        nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU()),
    ):
        model, original = pair(module)
        optimize(model)
        for x in _layouts(shape):
            y, expected = model(x), original(x)
            strides = [
                [stride for stride, size in zip(tensor.stride(), shape, strict=True) if size > 1]
                for tensor in (y, expected)
            ]
            assert strides[0] == strides[1], x.stride()
            torch.testing.assert_close(y, expected)
