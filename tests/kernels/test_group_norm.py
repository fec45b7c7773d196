"""group_norm against a loop over groups in fp64, torch's own group norm, and finite differences.

Every backend, Triton's in its interpreter; what belongs to one of them has its own file.
"""

import functools
import inspect
import itertools
import typing

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from ddb_fast.kernels import group_norm, native

NATIVE = pytest.param(
    "native",
    marks=pytest.mark.skipif(
        bool(native.why_not("group_norm")), reason="; ".join(native.why_not("group_norm"))
    ),
)
BACKENDS = ("reference", "torch", "triton", NATIVE)
CONTIGUOUS, CHANNELS_LAST = torch.contiguous_format, torch.channels_last
LAYOUTS = (CONTIGUOUS, CHANNELS_LAST)
HALVES = (torch.bfloat16, torch.float16)

backends = pytest.mark.parametrize("backend", BACKENDS)
# Triton computes in fp32.
doubles = pytest.mark.parametrize("backend", ("reference", "torch", NATIVE))
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=("contiguous", "channels_last"))


def naive(
    x,
    num_groups,
    weight=None,
    bias=None,
    eps=1e-5,
    *,
    pre_bias=None,
    scale=None,
    shift=None,
    activation=None,
    residual=None,
):
    """One sample and one group at a time, in fp64; returns y and the sum that was normalised."""
    n, c = x.shape[:2]
    size = c // num_groups
    total = torch.empty(x.shape, dtype=torch.float64)
    y = torch.empty(x.shape, dtype=torch.float64)
    for i in range(n):
        for channel in range(c):
            total[i, channel] = x[i, channel].double()
            if pre_bias is not None:
                total[i, channel] += (pre_bias if pre_bias.dim() == 1 else pre_bias[i])[channel]
            if residual is not None:
                total[i, channel] += residual[i, channel].double()
        for first in range(0, c, size):
            group = total[i, first : first + size]
            mean = group.sum() / group.numel()
            variance = ((group - mean) ** 2).sum() / group.numel()
            for channel in range(first, first + size):
                z = (total[i, channel] - mean) / (variance + eps) ** 0.5
                z = z if weight is None else z * weight[channel].double()
                z = z if bias is None else z + bias[channel].double()
                z = z if scale is None else z * (1 + scale[i, channel].double())
                z = z if shift is None else z + shift[i, channel].double()
                y[i, channel] = z / (1 + torch.exp(-z)) if activation == "silu" else z
    return y, total


def error(actual: Tensor, truth: Tensor, floor: float = 1e-30) -> float:
    """RMS of the difference over RMS of the truth, or over the floor where the truth vanishes."""
    if truth.numel() == 0:
        return 0.0
    difference = (actual.double() - truth.double()).square().mean().sqrt()
    return (difference / truth.double().square().mean().sqrt().clamp_min(floor)).item()


def operands(shape, dtype=torch.float32, *, parameters=None, layout=CONTIGUOUS, seed=0):
    """Every tensor that group_norm takes, away from the values 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    n, c = shape[:2]

    def draw(*size, dtype=parameters or dtype):
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    x, residual = (draw(*shape, dtype=dtype).contiguous(memory_format=layout) for _ in range(2))
    return {
        "x": x,
        "weight": draw(c),
        "bias": draw(c),
        "pre_bias": draw(n, c),
        "scale": draw(n, c),
        "shift": draw(n, c),
        "residual": residual,
    }


@functools.cache
def combinations(activation):
    """Every combination of options with what `naive` says, once for all backends and layouts."""
    full = operands((2, 6, 3, 5))
    x = full.pop("x")
    pre_biases = (None, full.pop("pre_bias"), torch.randn(6, generator=torch.Generator()))
    found = []
    for flags in itertools.product((False, True), repeat=len(full)):
        given = {name: full[name] for name, flag in zip(full, flags, strict=True) if flag}
        for pre_bias in pre_biases:
            options = {**given, "pre_bias": pre_bias, "activation": activation}
            found.append((options, *naive(x, 3, **options)))
    return x, found


@backends
@layouts
@pytest.mark.parametrize("activation", (None, "silu"))
def test_every_combination_of_options(backend, layout, activation):
    x, found = combinations(activation)
    x = x.contiguous(memory_format=layout)
    for options, expected, expected_total in found:
        y, total = group_norm(x, 3, **options, return_sum=True, backend=backend)
        assert error(y, expected) <= 3e-6, options.keys()
        assert error(total, expected_total) <= 3e-6
        assert y.is_contiguous(memory_format=layout)
        assert total.is_contiguous(memory_format=layout)
        alone = group_norm(x, 3, **options, backend=backend)
        assert torch.equal(alone, y)


@backends
@layouts
@pytest.mark.parametrize("channels_per_group", (1, 3, 4, 7, 48))
@pytest.mark.parametrize("num_groups", (1, 2, 3, 32))
def test_channels_and_groups(backend, layout, channels_per_group, num_groups):
    c = channels_per_group * num_groups
    full = operands((2, c, 3, 2), layout=layout)
    x = full.pop("x")
    y = group_norm(x, num_groups, **full, backend=backend)
    total = x.double() + full["pre_bias"].double()[..., None, None] + full["residual"].double()
    z = F.group_norm(total, num_groups, full["weight"].double(), full["bias"].double())
    z = z * (1 + full["scale"].double()[..., None, None]) + full["shift"].double()[..., None, None]
    assert error(y, z) <= 3e-6


@backends
@layouts
@pytest.mark.parametrize("size", ((1, 1), (7, 5), (1, 4), (4, 1), (8, 8)))
@pytest.mark.parametrize("num_groups", (1, 4, 8))
def test_image_sizes(backend, layout, size, num_groups):
    full = operands((3, 8, *size), layout=layout)
    x = full.pop("x")
    expected, _ = naive(x, num_groups, **full, activation="silu")
    y = group_norm(x, num_groups, **full, activation="silu", backend=backend)
    # One element is its own mean, and a rounding of x grows by rstd = 1 / sqrt(eps) = 316.
    alone = size == (1, 1) and num_groups == 8
    assert error(y, expected) <= (1e-5 if alone else 3e-6)
    assert y.is_contiguous(memory_format=layout)


@backends
@pytest.mark.parametrize("shape", ((3, 8), (3, 8, 5), (2, 8, 3, 5), (2, 8, 2, 3, 4)))
def test_ranks_and_their_layouts(backend, shape):
    full = operands(shape)
    x = full.pop("x")
    expected, expected_total = naive(x, 4, **full, activation="silu")
    y, total = group_norm(x, 4, **full, activation="silu", return_sum=True, backend=backend)
    assert y.shape == x.shape and y.is_contiguous() and total.is_contiguous()
    assert error(y, expected) <= 3e-6 and error(total, expected_total) <= 3e-6

    last = x.movedim(1, -1).contiguous().movedim(-1, 1)
    y, total = group_norm(last, 4, **full, activation="silu", return_sum=True, backend=backend)
    assert y.shape == x.shape and total.shape == x.shape
    assert y.stride() == last.stride() and total.stride() == last.stride()
    assert error(y, expected) <= 3e-6 and error(total, expected_total) <= 3e-6


@backends
@pytest.mark.parametrize("shape", ((2, 4, 3, 5), (1, 4, 1, 5), (2, 1, 3, 1), (2, 4, 1, 1)))
def test_any_strides_end_in_the_nearer_layout(backend, shape):
    dense = torch.randn(shape)
    views = [
        dense.permute(order).contiguous().permute([order.index(i) for i in range(4)])
        for order in itertools.permutations(range(4))
    ]
    wide = torch.randn(shape[0] * 2, shape[1] * 2, shape[2], shape[3] * 3)
    for layout in LAYOUTS:
        views.append(wide.contiguous(memory_format=layout)[::2, shape[1] :, :, ::3])
    views.append(dense[:, :1].expand(shape))
    views.append(dense[:1, :, :1].expand(shape))
    scale, residual = torch.randn(shape[:2]), torch.randn(shape)
    for x in views:
        y = group_norm(x, 1, scale=scale, residual=residual, backend=backend)
        expected = F.group_norm(x.double() + residual, 1) * (1 + scale.double()[..., None, None])
        assert error(y, expected, floor=1.0) <= 3e-6
        last = x.is_contiguous(memory_format=CHANNELS_LAST) or (x.stride(1) == 1 and shape[1] > 1)
        last = last and not x.is_contiguous()
        assert y.is_contiguous(memory_format=CHANNELS_LAST if last else CONTIGUOUS)


@backends
@layouts
@pytest.mark.parametrize("shape", ((0, 6, 4, 4), (0, 6), (0, 6, 3), (0, 6, 0, 4), (0, 6, 0)))
def test_no_samples(backend, layout, shape):
    layout = layout if len(shape) == 4 else CONTIGUOUS
    full = {name: t.requires_grad_() for name, t in operands(shape, layout=layout).items()}
    y = group_norm(
        full["x"],
        3,
        **{name: t for name, t in full.items() if name != "x"},
        activation="silu",
        dropout_p=0.5,
        seed=torch.tensor(1),
        backend=backend,
    )
    assert y.shape == shape and y.dtype == torch.float32
    gradients = torch.autograd.grad(y.sum(), list(full.values()))
    assert all(not gradient.any() for gradient in gradients)


@backends
@layouts
@pytest.mark.parametrize("names", ((), ("pre_bias", "scale", "shift"), ("seed",)))
def test_second_derivatives(backend, layout, names):
    """Against the reference in fp64, as a gradient penalty takes them."""

    def derivatives(backend, dtype):
        torch.manual_seed(0)
        x = torch.randn(2, 6, 3, 5).to(dtype).contiguous(memory_format=layout)
        weight, bias = torch.randn(2, 6).to(dtype)
        options = {}
        if "seed" in names:
            options |= {"seed": torch.tensor(3), "dropout_p": 0.3}
        elif names:
            options |= dict(zip(names, torch.randn(3, 2, 6).to(dtype), strict=True))
        operands = [x, weight, bias, *(options[name] for name in names if name != "seed")]
        for operand in operands:
            operand.requires_grad_()
        y = group_norm(x, 3, weight, bias, activation="silu", backend=backend, **options)
        first = torch.autograd.grad(y.pow(3).sum(), operands, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), operands)

    expected = derivatives("reference", torch.float64)
    for actual, truth in zip(derivatives(backend, torch.float32), expected, strict=True):
        assert error(actual, truth) <= 1e-5


@pytest.mark.parametrize("backend", ("triton", NATIVE))
def test_second_derivatives_of_a_residual_are_refused(backend):
    x, residual = torch.randn(2, 2, 6, 3, 5).requires_grad_().unbind()
    y = group_norm(x, 3, residual=residual, backend=backend)
    with pytest.raises(RuntimeError, match='backend="torch" has'):
        torch.autograd.grad(y.pow(3).sum(), (x, residual), create_graph=True)


@backends
@layouts
@pytest.mark.parametrize("dtype", (torch.float32, *HALVES), ids=str)
@pytest.mark.parametrize("given", ("weight", "bias"))
def test_one_parameter_without_the_other(backend, layout, dtype, given):
    x = torch.randn(2, 6, 3, 5).to(dtype).contiguous(memory_format=layout).requires_grad_()
    parameter, dy = torch.randn(6, requires_grad=True), torch.randn(2, 6, 3, 5)
    exact = [t.detach().double().requires_grad_() for t in (x, parameter)]
    y, _ = naive(exact[0], 3, **{given: exact[1]})
    expected = torch.autograd.grad(y, exact, dy.double())
    actual = torch.autograd.grad(
        group_norm(x, 3, **{given: parameter}, backend=backend), (x, parameter), dy.to(dtype)
    )
    bound = 6e-6 if dtype == torch.float32 else 8e-3
    assert max(map(error, actual, expected)) <= bound


def test_a_checkpoint_that_runs_without_gradients_first_draws_the_same_mask():
    """Which backend runs must not depend on the pass; bf16 of this size has two fastest ones."""
    x = torch.randn(2, 256, 8, 8).bfloat16()
    shift = torch.zeros(2, 256, requires_grad=True)

    def block(x, shift):
        return group_norm(x, 32, shift=shift, dropout_p=0.5)

    y = torch.utils.checkpoint.checkpoint(block, x, shift, use_reentrant=True)
    y.backward((y != 0).to(y.dtype))
    assert torch.equal(shift.grad, 2.0 * (y != 0).sum((2, 3)))


@doubles
@layouts
@pytest.mark.parametrize(
    ("names", "activation"),
    (
        ((), None),
        ((), "silu"),
        (("weight", "bias"), None),
        (("scale",), "silu"),
        (("shift",), None),
    ),
    ids=str,
)
def test_gradients_against_finite_differences(backend, layout, activation, names):
    full = operands((2, 4, 1, 3), torch.float64, layout=layout)
    names = ("x", *names) if names else tuple(full)

    def run(*tensors):
        given = dict(zip(names, tensors, strict=True))
        return group_norm(
            given.pop("x"),
            2,
            **given,
            activation=activation,
            dropout_p=0.3,
            seed=torch.tensor(5),
            return_sum=True,
            backend=backend,
        )

    assert torch.autograd.gradcheck(run, [full[name].requires_grad_() for name in names])


@doubles
def test_gradients_of_a_pre_bias_per_channel(backend):
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    pre_bias = torch.randn(4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, b: group_norm(x, 2, pre_bias=b, activation="silu", backend=backend),
        (x, pre_bias),
    )


def plain(x, num_groups, weight, bias, pre_bias, scale, shift, residual):
    """What one writes in plain torch, every operand in x's dtype."""
    weight, bias, pre_bias, scale, shift = (
        t.to(x.dtype) for t in (weight, bias, pre_bias, scale, shift)
    )
    y = F.group_norm(x + pre_bias[..., None, None] + residual, num_groups, weight, bias)
    return F.silu(y * (1 + scale[..., None, None]) + shift[..., None, None])


@backends
@layouts
@pytest.mark.parametrize("dtype", (torch.float32, *HALVES), ids=str)
@pytest.mark.parametrize("parameters", ("x's", "fp32"))
def test_error_against_fp64(backend, layout, dtype, parameters):
    parameters = dtype if parameters == "x's" else torch.float32
    full = operands((2, 64, 9, 7), dtype, parameters=parameters, layout=layout)
    upstream = torch.randn(2, 64, 9, 7).contiguous(memory_format=layout)

    def run(function, tensors):
        tensors = {name: t.detach().requires_grad_() for name, t in tensors.items()}
        y = function(tensors["x"], 16, **{k: t for k, t in tensors.items() if k != "x"})
        return y, torch.autograd.grad(y, list(tensors.values()), upstream.to(y.dtype))

    exact = {name: t.double() for name, t in full.items()}
    truth, true_gradients = run(plain, exact)
    y, gradients = run(
        lambda *a, **k: group_norm(*a, **k, activation="silu", backend=backend), full
    )
    usual, usual_gradients = run(plain, full)

    half = dtype in HALVES
    assert y.dtype == dtype
    assert error(y, truth) <= (max(1.25 * error(usual, truth), 3e-3) if half else 3e-6)
    for name, actual, expected, common in zip(
        full, gradients, true_gradients, usual_gradients, strict=True
    ):
        bound = max(1.25 * error(common, expected), 4e-3) if half else 6e-6
        assert actual.dtype == full[name].dtype
        assert error(actual, expected) <= bound, name


@backends
@layouts
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_each_parameter_in_its_own_dtype(backend, layout, dtype):
    full = operands((2, 6, 3, 4), dtype, layout=layout)
    x, residual = full.pop("x"), full.pop("residual")
    expected, _ = naive(x, 3, **full, residual=residual)
    for flags in itertools.product((False, True), repeat=len(full)):
        mixed = {
            name: full[name].float() if flag else full[name]
            for name, flag in zip(full, flags, strict=True)
        }
        y = group_norm(x, 3, **mixed, residual=residual, backend=backend)
        assert y.dtype == dtype
        assert error(y, expected) <= 1.5e-2


@doubles
def test_fp32_parameters_of_an_fp64_input(backend):
    full = operands((2, 6, 3, 4), torch.float64, parameters=torch.float32)
    x = full.pop("x")
    expected, _ = naive(x, 3, **full)
    y = group_norm(x, 3, **full, backend=backend)
    assert y.dtype == torch.float64 and error(y, expected) <= 1e-12


@backends
@layouts
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_autocast_changes_nothing(backend, layout, dtype):
    full = operands((2, 8, 4, 4), dtype, parameters=torch.float32, layout=layout)
    x = full.pop("x").requires_grad_()

    def run():
        y, total = group_norm(
            x, 4, **full, activation="silu", return_sum=True, eps=1e-3, backend=backend
        )
        return y, total, *torch.autograd.grad(y.sum(), x)

    outside = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = run()
    for a, b in zip(inside, outside, strict=True):
        assert a.dtype == dtype and torch.equal(a, b)


@backends
@pytest.mark.parametrize("affine", (False, True))
def test_half_precision_gradients_of_a_shifted_input(backend, affine):
    # Kept for the backward in bf16, the mean would be 40: a tenth of a standard deviation off.
    x = (torch.randn(2, 8, 16, 16) + 40.1).bfloat16()
    weight = torch.ones(8) if affine else None

    def gradient(x, backend):
        x = x.requires_grad_()
        parameter = None if weight is None else weight.to(torch.promote_types(x.dtype, torch.float))
        y = group_norm(x, 2, parameter, backend=backend)
        return torch.autograd.grad(y.double().pow(4).sum(), x)[0]

    assert error(gradient(x, backend), gradient(x.double(), "reference")) <= 1e-2


@backends
@layouts
def test_mean_of_a_thousand_standard_deviations(backend, layout):
    if backend == "torch" and layout is CHANNELS_LAST:
        pytest.skip("torch's CPU kernel for channels_last loses this variance: see torch_backend")
    x = (torch.randn(2, 32, 16, 16) + 1000).contiguous(memory_format=layout)
    y = group_norm(x, 8, backend=backend)
    assert error(y, F.group_norm(x.double(), 8)) <= 1e-3


@backends
@layouts
def test_constant_input_gives_the_bias(backend, layout):
    x = torch.full((2, 6, 4, 4), 3.0).contiguous(memory_format=layout)
    bias = torch.randn(6)
    y = group_norm(x, 2, torch.randn(6), bias, backend=backend)
    torch.testing.assert_close(y, bias[:, None, None].expand_as(y), atol=1e-4, rtol=0)


@backends
@layouts
def test_eps_is_the_callers(backend, layout):
    full = operands((2, 6, 3, 4), layout=layout)
    x = full.pop("x")
    expected, _ = naive(x, 3, **full, eps=0.5)
    assert error(group_norm(x, 3, **full, eps=0.5, backend=backend), expected) <= 3e-6


@backends
@layouts
def test_vectors_that_lie_apart(backend, layout):
    """Rows of a wider projection, one row for all samples, and one number for all channels."""
    x, wide = torch.randn(3, 6, 3, 4).contiguous(memory_format=layout), torch.randn(3, 40)
    pre_bias, scale = wide[:, 5:11], torch.randn(6).expand(3, 6)
    for shift, weight in (
        (wide[:, 20:32:2], wide[0, 5:11]),
        (wide[:, :1].expand(3, 6), wide[1, :12:2]),
    ):
        full = {"weight": weight, "pre_bias": pre_bias, "scale": scale, "shift": shift}
        expected, _ = naive(x, 3, **full)
        assert error(group_norm(x, 3, **full, backend=backend), expected) <= 3e-6


@backends
@layouts
@pytest.mark.parametrize("activation", (None, "silu"))
def test_a_sum_that_goes_on_beside_x_and_the_residual_alone(backend, layout, activation):
    """Its gradient counts where no vector asks for one, and where y is not used."""
    x, residual, *upstream = (
        torch.randn(2, 6, 3, 4).contiguous(memory_format=layout) for _ in range(4)
    )
    for used in (slice(0, 2), slice(1, 2)):
        gradients = []
        for name, dtype in ((backend, torch.float32), ("reference", torch.float64)):
            leaves = [t.to(dtype).requires_grad_() for t in (x, residual)]
            results = group_norm(
                leaves[0],
                3,
                residual=leaves[1],
                activation=activation,
                return_sum=True,
                backend=name,
            )
            given = [t.to(dtype) for t in upstream]
            gradients.append(torch.autograd.grad(results[used], leaves, given[used]))
        for actual, expected in zip(*gradients, strict=True):
            assert error(actual, expected) <= 6e-6


@pytest.mark.parametrize("backend", ("reference", "torch"))
def test_shapes_without_data(backend):
    full = {name: t.to("meta") for name, t in operands((2, 8, 4, 4)).items()}
    y = group_norm(full.pop("x"), 4, **full, activation="silu", backend=backend)
    assert y.shape == (2, 8, 4, 4) and y.is_meta


@backends
def test_without_gradients_the_input_survives(backend):
    x = torch.randn(2, 6, 4, 4)
    before = x.clone()
    with torch.no_grad():
        y, total = group_norm(x, 2, activation="silu", return_sum=True, backend=backend)
    assert torch.equal(x, before) and torch.equal(total, before)
    assert torch.equal(y, group_norm(x, 2, activation="silu", backend=backend))


@backends
@layouts
def test_compiles_whole_and_once(backend, layout):
    if backend == "reference" and layout is CHANNELS_LAST:
        pytest.skip("written to be read, it views a channels_last tensor by copying it")
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    names = ("x", "weight", "bias", "pre_bias", "scale", "shift", "residual")

    def run(x, weight, bias, pre_bias, scale, shift, residual, seed):
        return group_norm(
            x,
            4,
            weight,
            bias,
            pre_bias=pre_bias,
            scale=scale,
            shift=shift,
            activation="silu",
            dropout_p=0.2,
            seed=seed,
            residual=residual,
            return_sum=True,
            backend=backend,
        )

    compiled = torch.compile(run, backend=counter, fullgraph=True)
    for n in (3, 5):
        full = operands((n, 8, 4, 6), layout=layout, seed=n)
        for name in names:
            full[name].requires_grad_()
            if full[name].shape[0] == n:
                torch._dynamo.mark_dynamic(full[name], 0)
        arguments = [full[name] for name in names]
        seed = torch.tensor(n)
        results = []
        for function in (run, compiled):
            y, total = function(*arguments, seed)
            gradients = torch.autograd.grad(y.square().sum() + total.sum(), arguments)
            assert y.is_contiguous(memory_format=layout)
            results.append((y, total, *gradients))
        for eager, traced in zip(*results, strict=True):
            assert error(traced, eager) <= 1e-6
    assert counter.frame_count == 1


@backends
def test_refusals(backend):
    x = torch.randn(2, 6, 4, 4)
    one = torch.ones(6)
    meta = torch.ones(6, device="meta")
    cases = [
        (dict(x=x, num_groups=4), "4 for 6"),
        (dict(x=x, num_groups=0), "0 for 6"),
        (dict(x=x, num_groups=12), "12 for 6"),
        (dict(x=x.long(), num_groups=2), "int64"),
        (dict(x=x.to(torch.complex64), num_groups=2), "complex64"),
        (dict(x=x[0, 0, 0], num_groups=2), r"\(4,\)"),
        (dict(x=x[:, :, :0], num_groups=2), r"\(2, 6, 0, 4\)"),
        (dict(x=x, num_groups=2, weight=torch.ones(5)), r"weight .* \(6,\), got \(5,\)"),
        (dict(x=x, num_groups=2, bias=torch.ones(6, 1)), r"bias .* \(6,\), got \(6, 1\)"),
        (dict(x=x, num_groups=2, pre_bias=torch.ones(1, 6)), r"pre_bias .* got \(1, 6\)"),
        (dict(x=x, num_groups=2, scale=one), r"scale .* \(2, 6\), got \(6,\)"),
        (dict(x=x, num_groups=2, shift=torch.ones(6, 2)), r"shift .* got \(6, 2\)"),
        (dict(x=x, num_groups=2, residual=x[:1]), r"residual .* got \(1, 6, 4, 4\)"),
        (dict(x=x, num_groups=2, weight=one.half()), r"weight must be torch.float32, got .*16"),
        (dict(x=x.half(), num_groups=2, scale=torch.ones(2, 6).bfloat16()), "scale .*bfloat16"),
        (dict(x=x.half(), num_groups=2, residual=x), "residual must be torch.float16, got .*32"),
        (dict(x=x, num_groups=2, weight=meta), "weight must be on cpu, got meta"),
        (dict(x=x, num_groups=2, activation="relu"), "relu"),
        (dict(x=x, num_groups=2, dropout_p=1.0), r"1\.0"),
        (dict(x=x, num_groups=2, dropout_p=-0.1), r"-0\.1"),
        (dict(x=x, num_groups=2, dropout_p=0.1, seed=torch.ones(1).long()), r"seed .* got \(1,\)"),
        (dict(x=x, num_groups=2, dropout_p=0.1, seed=torch.tensor(1.0)), "seed .*float32"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            group_norm(**arguments, backend=backend)


@pytest.mark.parametrize("names", (("weight",), ("bias",), ("weight", "bias")))
def test_parameters_learn_where_x_needs_no_gradient(names):
    """In channels_last the backward of torch's own CPU kernel ends the process then."""
    torch.manual_seed(0)
    x = torch.randn(2, 8, 3, 4)
    parameters = {name: torch.randn(8, requires_grad=True) for name in names}
    truth = torch.autograd.grad(
        F.group_norm(x, 2, **{"weight": torch.ones(8), **parameters}).square().sum(),
        list(parameters.values()),
    )
    y = group_norm(
        x.contiguous(memory_format=torch.channels_last), 2, **parameters, backend="torch"
    )
    assert y.is_contiguous(memory_format=torch.channels_last)
    found = torch.autograd.grad(y.square().sum(), list(parameters.values()))
    torch.testing.assert_close(found, truth)


def test_nothing_is_copied_where_nothing_learns():
    """A network that is only run, with its parameters frozen or outside of `torch.no_grad`."""
    called = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            called.append(function)
            return function(*args, **(kwargs or {}))

    x = torch.randn(2, 8, 3, 4).contiguous(memory_format=torch.channels_last)
    weight = torch.ones(8, requires_grad=True)
    with Record():
        group_norm(x, 2, weight.detach(), backend="torch")
        assert torch.ops.aten.clone.default not in called
        group_norm(x, 2, weight, backend="torch")
    assert torch.ops.aten.clone.default in called


@backends
def test_a_dropped_element_passes_nothing_back(backend):
    """A loss scale may overflow there: inf times a mask of 0 would be NaN."""
    x = torch.randn(2, 8, 3, 4).half().requires_grad_()
    y = group_norm(x, 2, dropout_p=0.5, seed=torch.tensor(0), backend=backend)
    (dx,) = torch.autograd.grad(y, x, torch.where(y == 0, 4e4, 1.0).half())
    assert dx.isfinite().all() and dx.any()


def test_type_checkers_are_told_the_arguments_that_there_are():
    own = inspect.signature(group_norm).parameters
    told = [inspect.signature(each) for each in typing.get_overloads(group_norm)]
    assert [each.return_annotation for each in told] == [Tensor, tuple[Tensor, Tensor]]
    for each in told:
        rest = {name: own[name] for name in own if name != "return_sum"}
        assert list(each.parameters) == list(own)
        assert rest == {name: each.parameters[name] for name in rest}
