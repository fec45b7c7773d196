"""What only Triton's group norm has: regimes and their blocks, plans, the op.

Every regime runs in the interpreter with blocks so small that it takes all its loops.
"""

import itertools
import json
import math

import pytest
import shapes
import torch
import triton
import triton.language as tl
import tune
import variants
from hypothesis import given, settings
from hypothesis import strategies as st

from ddb_fast.kernels import group_norm, reference, triton_backend, triton_math, tuned
from ddb_fast.kernels import launch as launching
from ddb_fast.kernels import triton_group_norm as module
from regimes import LAYOUTS, SHAPE, errors, layouts, operands, run

if module_reasons := triton_backend.why_not("group_norm"):
    pytest.skip("; ".join(module_reasons), allow_module_level=True)


@layouts
@pytest.mark.parametrize(
    ("shape", "num_groups", "dropout_p", "residual"),
    # Each shape with two of the four pairs of options, each pair with two shapes. The last shape is
    # cut into slabs of two groups, of which the second is half empty.
    (
        (SHAPE, 4, 0.0, False),
        (SHAPE, 4, 0.4, True),
        ((2, 21, 3, 3), 1, 0.0, True),
        ((2, 21, 3, 3), 1, 0.4, False),
        ((1, 24, 4, 4), 8, 0.0, False),
        ((1, 24, 4, 4), 8, 0.4, True),
        ((1, 36, 3, 3), 3, 0.0, True),
        ((1, 36, 3, 3), 3, 0.4, False),
    ),
)
def test_every_regime(regime, layout, shape, num_groups, dropout_p, residual):
    tensors = operands(*shape, layout)
    if not residual:
        del tensors["residual"]
    options = {"dropout_p": dropout_p, "return_sum": residual}
    actual = run(tensors, num_groups, "triton", **options)
    truth = run(tensors, num_groups, "reference", dtype=torch.float64, **options)
    assert max(errors(actual, truth)) <= 2e-6


@layouts
def test_mean_of_a_thousand_deviations(regime, layout):
    x = (torch.randn(2, 8, 9, 9) + 1000).contiguous(memory_format=layout)
    y = group_norm(x, 2, backend="triton")
    truth = torch.nn.functional.group_norm(x.double(), 2)
    assert errors([y], [truth])[0] <= 1e-3


@layouts
def test_a_first_pixel_far_from_all_others(regime, layout):
    x = torch.randn(2, 8, 9, 9)
    x[:, :, 0, 0] = 1e4
    y = group_norm(x.contiguous(memory_format=layout), 2, backend="triton")
    truth = torch.nn.functional.group_norm(x.double(), 2)
    others = truth.flatten(2)[:, :, 1:]
    assert errors([y], [truth])[0] <= 2e-6
    assert errors([y.flatten(2)[:, :, 1:]], [others])[0] <= 2e-5


@layouts
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_half_precision_in_every_regime(regime, layout, dtype):
    tensors = operands(2, 24, 5, 3, layout, dtype)
    actual = run(tensors, 4, "triton")
    truth = run(tensors, 4, "reference", dtype=torch.float64)
    usual = run(tensors, 4, "torch")
    for ours, theirs in zip(errors(actual, truth), errors(usual, truth), strict=True):
        assert ours <= max(1.25 * theirs, 4e-3)


def test_a_gradient_in_the_other_layout():
    x = torch.randn(2, 8, 4, 6).contiguous(memory_format=torch.channels_last).requires_grad_()
    upstream = torch.randn(2, 8, 4, 6)
    y = group_norm(x, 2, activation="silu", backend="triton")
    actual = torch.autograd.grad(y, x, upstream)[0]
    expected = torch.autograd.grad(
        group_norm(x, 2, activation="silu", backend="reference"), x, upstream
    )[0]
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    assert actual.is_contiguous(memory_format=torch.channels_last)


def test_rows_of_a_wider_projection(regime):
    """pre_bias, scale and shift as views of one product, without a copy; no activation."""
    x, wide = torch.randn(3, 8, 3, 3), torch.randn(3, 40)
    weight, bias = torch.randn(2, 8)

    def results(dtype, backend):
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in (x, wide, weight, bias)]
        rows = dict(
            zip(("pre_bias", "scale", "shift"), leaves[1][:, 5:29].split(8, 1), strict=True)
        )
        y = group_norm(leaves[0], 2, *leaves[2:], **rows, backend=backend)
        return (y, *torch.autograd.grad(y.square().sum(), leaves))

    truth = results(torch.float64, "reference")
    assert max(errors(results(torch.float32, "triton"), truth)) <= 2e-6


@pytest.mark.parametrize("layout", LAYOUTS, ids=("contiguous", "channels_last"))
def test_the_registered_op(layout):
    def draw(*size):
        return torch.randn(size, requires_grad=True)

    x, residual = (
        torch.randn(2, 8, 4, 3).contiguous(memory_format=layout).requires_grad_() for _ in "xr"
    )
    vectors = (draw(2, 8), draw(8), draw(8), draw(2, 8), draw(2, 8))
    for arguments in (
        (x, None, None, None, None, None, None, None, 4, 1e-5, False, 0.0, False),
        (x, residual, *vectors, torch.tensor(3), 4, 1e-5, True, 0.3, True),
        (x, None, draw(8), *vectors[1:], None, 2, 1e-5, True, 0.0, True),
    ):
        torch.library.opcheck(torch.ops.ddb_fast.group_norm_triton.default, arguments)


def test_refusals():
    x = torch.randn(1, 4, 2, 2)
    with pytest.raises(ValueError, match="fp32, x is fp64"):
        group_norm(x.double(), 2, backend="triton")
    with pytest.raises(ValueError, match="on meta"):
        group_norm(x.to("meta"), 2, backend="triton")
    wide = torch.empty(1, 8193, 1, 1)
    with pytest.raises(ValueError, match="8193"):
        group_norm(wide, 1, backend="triton")
    assert module.why_not(wide, 3) == [], "it is the groups that must not be so wide"
    huge = torch.empty(1, device="meta").expand(1, 2**15, 2**8, 2**8)
    assert "2147483648" in module.why_not(huge, 32)[0]


@triton.jit
def _functions(p_x, p_y, SIZE: tl.constexpr):
    b_i = tl.arange(0, SIZE)
    b_x = tl.load(p_x + b_i)
    tl.store(p_y + b_i, triton_math.reciprocal(b_x))
    tl.store(p_y + SIZE + b_i, triton_math.sigmoid(b_x))
    tl.store(p_y + 2 * SIZE + b_i, triton_math.tanh(b_x, False))


def test_the_functions_that_triton_lacks():
    x = torch.cat(
        [torch.linspace(-80, 80, 200), torch.linspace(-2, 2, 54), torch.tensor([-1e9, 1e9])]
    )
    y = torch.empty(3, len(x))
    _functions[(1,)](x, y, len(x))
    truth = torch.stack([x.double().reciprocal(), x.double().sigmoid(), x.double().tanh()])
    off = (y.double() - truth).abs()
    # 1e-5: what fp32 leaves of exp(-80).
    assert (off[:2] <= 1e-5 * truth[:2].abs()).all()
    assert off[2].max() <= 2e-7


def test_the_three_ways_to_cut_channels_last():
    def cut(c, size, **options):
        x = torch.empty(128, c, size, size, dtype=torch.bfloat16, device="meta")
        x = x.contiguous(memory_format=torch.channels_last)
        return module.plan(x, 32, dropout=False, **options)

    for backward in (False, True):
        # 16 channels, where the usual 32 would not stay in registers.
        held = cut(256, 16, backward=backward)
        assert held.one_tile and held.slab_groups * 8 == 16
        walked = cut(256, 32, backward=backward)
        assert not walked.splits and not walked.one_tile and walked.slab_groups * 8 == 32
        assert cut(256, 64, backward=backward).splits > 1


SHAPES = {
    "n": st.sampled_from((1, 2, 16, 128)),
    "group": st.sampled_from((1, 3, 4, 6, 7, 8, 12, 18, 21, 42, 48, 96, 700)),
    "num_groups": st.sampled_from((1, 2, 3, 32)),
    "size": st.sampled_from(((1, 1), (7, 5), (8, 8), (16, 16), (33, 20), (64, 64))),
    "dtype": st.sampled_from((torch.float32, torch.bfloat16)),
    "layout": st.sampled_from(LAYOUTS),
    "backward": st.booleans(),
    "dropout": st.booleans(),
}


# What a table may ask for; {} is what is launched without one.
ASKED = (
    {},
    {"registers": 16384},
    {"split": 0, "num_warps": 16, "stages": 1},
    {"split": 1, "num_warps": 8, "unroll": 2},
)


@settings(max_examples=600, deadline=None)
@given(**SHAPES, asked=st.sampled_from(ASKED))
def test_a_plan_covers_everything_once(
    n, group, num_groups, size, dtype, layout, backward, dropout, asked
):
    c, hw = group * num_groups, math.prod(size)
    x = torch.empty(n, c, *size, dtype=dtype, device="meta").contiguous(memory_format=layout)
    with tune.trying(asked, "group_norm"):
        cut = module.plan(x, num_groups, backward=backward, dropout=dropout)
    for number in (cut.block_p, cut.block_c, cut.num_warps):
        assert number >= 1 and number & (number - 1) == 0
    wide = 8 if dropout or not x.is_contiguous() or hw == 1 else 4
    assert cut.block_c >= wide and cut.num_warps <= 16
    assert cut.block_p * cut.block_c <= 16384
    if not cut.one_tile:
        # s, dy and d_sum, each two steps ahead; an RTX card has 99 KiB.
        fetched = 2 * 3 * cut.unroll * cut.block_p * cut.block_c * dtype.itemsize
        assert fetched <= 96 * 1024
    if cut.splits:
        assert cut.splits * cut.chunk >= hw > (cut.splits - 1) * cut.chunk
        assert cut.chunk % cut.block_p == 0
        assert cut.slabs * cut.block_c >= c > (cut.slabs - 1) * cut.block_c
        return
    slab = cut.slab_groups * group
    assert slab <= min(512, cut.block_c)
    assert cut.slabs * cut.slab_groups >= num_groups > (cut.slabs - 1) * cut.slab_groups
    if cut.slabs > 1 and (not cut.one_tile or cut.channels_last or dropout):
        vector = math.gcd(c, 16 // dtype.itemsize)
        assert slab % vector == 0, "slabs start on whole vectors"
        assert not dropout or slab % 8 == 0, "dropout draws for blocks of eight channels"
    assert not cut.one_tile or cut.block_p >= hw


@pytest.mark.parametrize(
    ("options", "expected"),
    (
        # A group of 18 channels in a block of 32, of 16 pixels square: 8,192 elements.
        ({}, (True, 1, 32, 8)),
        # As many pixels are masked.
        ({"size": (15, 15)}, (False, 4, 128, 4)),
        # Four groups begin on a vector of eight channels, and their 72 are too many.
        ({"dropout": True}, (False, 4, 128, 8)),
        ({"layout": torch.channels_last}, (False, 4, 128, 8)),
        ({"dtype": torch.float32}, (False, 2, 64, 8)),
        ({"size": (32, 32)}, (False, 4, 128, 16)),
    ),
    ids=("nchw", "15 pixels", "dropout", "channels_last", "fp32", "32 pixels"),
)
def test_a_group_of_a_small_image_stays_in_registers(options, expected):
    """In NCHW and 16 bits, whatever number of channels it begins with."""
    options = {
        "dtype": torch.bfloat16, "layout": LAYOUTS[0], "size": (16, 16), "dropout": False, **options
    }  # fmt: skip
    x = torch.empty(64, 576, *options["size"], dtype=options["dtype"], device="meta")
    x = x.contiguous(memory_format=options["layout"])
    cut = module.plan(x, 32, backward=True, dropout=options["dropout"])
    assert (cut.one_tile, cut.slab_groups, cut.block_c, cut.num_warps) == expected


def test_a_table_changes_what_it_was_measured_for():
    """Each of its entries, at the size and batch that it was measured at."""
    table = json.loads((tuned.FOLDER / "sm_90.json").read_text("utf-8"))
    entries = table["configurations"]["group_norm"]
    changed = set()
    for (_, shape), layout, backward in itertools.product(
        shapes.unique(shapes.GROUP_NORM), LAYOUTS, (False, True)
    ):
        x = torch.empty(shape.n, shape.c, shape.h, shape.w, dtype=torch.bfloat16, device="meta")
        x = x.contiguous(memory_format=layout)
        size = tuned.group_norm_class(x.dtype, x.is_contiguous(), x.shape[1:], backward)
        cuts = []
        for launched in (variants._on("sm_90"), tune.trying({})):
            with launched:
                cuts.append(module.plan(x, shape.g, backward=backward, dropout=False))
        if cuts[0] != cuts[1]:
            changed.add(f"{size}/{shape.c // shape.g}")
    assert changed == set(entries) != set()


def test_what_was_measured_with_many_samples_does_not_count_for_few():
    """Two samples have 64 programs at most, a GPU room for more."""
    few, many = (torch.empty(n, 384, 64, 64, dtype=torch.bfloat16, device="meta") for n in (2, 128))
    plans = {}
    for asked in ({}, {"split": 0, "num_warps": 8, "stages": 1}):
        with tune.trying(asked, "group_norm"):
            for x in (few, many):
                plans[len(x), bool(asked)] = module.plan(x, 32, backward=False, dropout=False)
    assert plans[2, True] == plans[2, False] and plans[2, True].splits > 1
    assert plans[128, True] != plans[128, False] and plans[128, True].splits == 0


@layouts
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_recording_launches_nothing(layout, dtype):
    x = torch.empty(2, 64, 96, 96, dtype=dtype, device="meta").contiguous(memory_format=layout)
    with launching.recording() as launches:
        module.forward(x, None, None, None, None, None, None, None, 32, 1e-5, True, 0.0, False)
    names = [launch.kernel.__name__ for launch in launches]
    assert names == ["forward_statistics", "forward_groups", "forward_apply"]
    assert reference.layout(launches[2].arguments["p_y"]) == layout
