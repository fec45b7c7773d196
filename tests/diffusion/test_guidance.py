"""Guidance, its interval, and the limits on x0 against their definitions, in fp64."""

import pytest
import torch
from diffusers import DDIMScheduler

from ddb_fast.diffusion.guidance import guided, limit
from ddb_fast.diffusion.samplers import (
    sample_ddim,
    sample_dpm_solver_pp_2m,
    sample_unipc,
    timesteps,
)
from ddb_fast.diffusion.schedule import Schedule

LINEAR = Schedule.linear(1000, 1e-4, 0.028)
COSINE = Schedule.cosine(1000)


class Counting:
    """A model that remembers its calls; eps by default, v of the same eps and x0 on request."""

    def __init__(self, target="eps", dtype=None):
        self.target, self.dtype, self.calls = target, dtype, []

    def __call__(self, x, t, y):
        self.calls.append((x, t, y))
        eps = torch.sin(3 * x + y.view(-1, 1, 1, 1)) + 0.1
        if self.target == "v":
            alpha_bar = LINEAR.alpha_bar[t].view(-1, 1, 1, 1)
            x0 = (x - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt()
            eps = alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * x0
        return eps if self.dtype is None else eps.to(self.dtype)


X = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.tensor([4, 5])


def denoiser(model, guidance_scale=2.0, schedule=LINEAR, **options):
    return guided(
        model,
        Y,
        guidance_scale=guidance_scale,
        null_class=9,
        target=model.target,
        schedule=schedule,
        **options,
    )


@pytest.mark.parametrize("target", ["eps", "v"])
@pytest.mark.parametrize("w", [-0.5, 0.0, 1.0, 4.0])
def test_guidance_is_the_papers_formula_whatever_the_model_predicts(target, w):
    """Guiding v gives the guided eps: eps is affine in v at fixed x_t and the weights sum to 1."""
    x0, eps = denoiser(Counting(target), guidance_scale=1 + w)(X, 400)
    model, t = Counting("eps"), torch.full((2,), 400)
    expected = (1 + w) * model(X, t, Y) - w * model(X, t, torch.full_like(Y, 9))
    assert torch.allclose(eps, expected, atol=1e-11)
    alpha_bar = LINEAR.alpha_bar[400]
    expected_x0 = (X - (1 - alpha_bar).sqrt() * expected) / alpha_bar.sqrt()
    assert torch.allclose(x0, expected_x0, atol=1e-11)


def test_both_branches_are_one_forward_pass():
    model = Counting()
    denoiser(model)(X, 7)
    ((x, t, y),) = model.calls
    assert torch.equal(x, torch.cat([X, X]))
    assert t.tolist() == [7] * 4 and t.dtype == torch.int64
    assert y.tolist() == [4, 5, 9, 9]


def test_scale_one_pays_for_the_conditional_branch_only():
    model = Counting()
    denoiser(model, guidance_scale=1.0)(X, 7)
    ((x, t, y),) = model.calls
    assert torch.equal(x, X) and t.tolist() == [7] * 2 and y.tolist() == [4, 5]


@pytest.mark.parametrize("target", ["eps", "v"])
def test_clipping_keeps_x0_in_range_and_still_explains_x_t(target):
    low, high = torch.tensor([-1.0, -0.5, 0.0]).view(3, 1, 1), torch.full((3, 1, 1), 0.9)
    x0, eps = denoiser(Counting(target), clip=(low, high))(X, 400)
    free, _ = denoiser(Counting(target))(X, 400)
    assert torch.allclose(x0, torch.minimum(torch.maximum(free, low), high))
    assert not torch.allclose(x0, free)
    assert torch.allclose(LINEAR.add_noise(x0, eps, 400), X, atol=1e-12)


def test_a_half_precision_network_leaves_the_state_in_float32():
    """The branches are subtracted in fp32: guidance magnifies whatever rounding it is given."""
    model, x = Counting(dtype=torch.bfloat16), X.float()
    x0, eps = denoiser(model, guidance_scale=8.0)(x, 400)
    assert x0.dtype == eps.dtype == torch.float32
    t = torch.full((2,), 400)
    conditional, null = (model(x, t, y).double() for y in (Y, torch.full_like(Y, 9)))
    assert torch.allclose(eps.double(), 8 * conditional - 7 * null, atol=1e-5)


def test_channels_last_reaches_the_network():
    model, x = Counting(), X.to(memory_format=torch.channels_last)
    x0, _ = denoiser(model)(x, 400)
    assert model.calls[0][0].is_contiguous(memory_format=torch.channels_last)
    assert x0.is_contiguous(memory_format=torch.channels_last)


# --- interval -----------------------------------------------------------------------------------

DETERMINISTIC = pytest.mark.parametrize(
    "sample", [sample_ddim, sample_dpm_solver_pp_2m, sample_unipc]
)


def pictures(sample, model, schedule=LINEAR, steps=20, **options):
    denoise = denoiser(model, schedule=schedule, **options)
    return sample(denoise, X, schedule=schedule, timesteps=timesteps(1000, steps))


@DETERMINISTIC
@pytest.mark.parametrize("schedule", [LINEAR, COSINE], ids=["linear", "cosine"])
def test_the_whole_interval_is_plain_guidance_and_an_empty_one_is_none(sample, schedule):
    """Bit for bit, and for the cost of it: rows that the network was shown."""

    def made(**options):
        model = Counting()
        clip = (torch.tensor(-1.0), torch.tensor(1.0))
        result = pictures(sample, model, schedule, clip=clip, **options)
        return result, sum(len(x) for x, _, _ in model.calls)

    guided_picture, guided_rows = made()
    whole, rows = made(guidance_interval=(0.0, 1.0))
    assert torch.equal(whole, guided_picture) and rows == guided_rows == 20 * 4
    plain, plain_rows = made(guidance_scale=1.0)
    assert plain_rows == 20 * 2
    for nowhere in ((0.5, 0.5), (0.0, 0.0), (1.0, 1.0)):
        empty, rows = made(guidance_interval=nowhere)
        assert torch.equal(empty, plain) and rows == plain_rows
    assert (plain - guided_picture).abs().max() > 0.1


def test_both_branches_run_inside_the_interval_only():
    """Noise 1/8, 1/4, 1/2, 3/4, 7/8: the lower end is outside, the upper one inside."""
    schedule = Schedule(torch.tensor([0.875, 0.75, 0.5, 0.25, 0.125], dtype=torch.float64))
    model = Counting()
    denoise = denoiser(model, schedule=schedule, guidance_interval=(0.25, 0.75))
    results = [denoise(X, t)[1] for t in range(5)]
    assert [len(x) for x, _, _ in model.calls] == [2, 2, 4, 4, 2]
    for (x, t, y), step in zip(model.calls, range(5), strict=True):
        assert x.shape[0] == len(t) == len(y) and t.tolist() == [step] * len(t)
        assert y.tolist() == ([4, 5, 9, 9] if len(y) == 4 else [4, 5])
    conditional, null = (model(X, torch.full((2,), 0), y) for y in (Y, torch.full_like(Y, 9)))
    for step, eps in enumerate(results):
        expected = 2 * conditional - null if step in (2, 3) else conditional
        assert torch.allclose(eps, expected, atol=1e-12), step


@pytest.mark.parametrize("schedule", [LINEAR, COSINE], ids=["linear", "cosine"])
def test_the_interval_of_a_published_sigma(schedule):
    """Noise levels of unscaled images, sigma = sqrt(1 / alpha_bar - 1), as Karras et al. count."""
    low, high = 0.3, 3.0
    sigma = (1 / schedule.alpha_bar - 1).sqrt()
    inside = ((low < sigma) & (sigma <= high)).tolist()
    assert 0 < sum(inside) < 1000
    model = Counting()
    shares = tuple(s**2 / (1 + s**2) for s in (low, high))
    denoise = denoiser(model, schedule=schedule, guidance_interval=shares)
    for t in range(1000):
        denoise(X, t)
    assert [len(x) == 4 for x, _, _ in model.calls] == inside


# --- dynamic thresholding -----------------------------------------------------------------------


def test_dynamic_thresholding_by_hand():
    """Magnitudes 0, .5, 1, 2, 4: the 75th percentile is the fourth, 2; all is halved, 4 cut to 1.

    The second image's is .4, below one, so it is only clamped.
    """
    x0 = torch.tensor([[0.0, -0.5, 1.0, -2.0, 4.0], [0.1, 0.2, -0.3, 0.4, 3.0]]).double()
    low, high = torch.tensor(-1.0), torch.tensor(1.0)
    got = limit(x0.view(2, 1, 1, 5), low, high, 75.0).view(2, 5)
    expected = [[0.0, -0.25, 0.5, -1.0, 1.0], [0.1, 0.2, -0.3, 0.4, 1.0]]
    assert got.tolist() == [pytest.approx(row) for row in expected]
    # Half-way between two ranks: magnitude 1.5 at 62.5 per cent.
    got = limit(x0[:1].view(1, 1, 1, 5), low, high, 62.5).flatten()
    assert got.tolist() == pytest.approx([0, -0.5 / 1.5, 1 / 1.5, -1, 1])


def test_dynamic_thresholding_in_a_range_that_differs_by_channel():
    """By hand: ranges 0..2 and -3..1, of middle 1 and -1 and half-width 1 and 2."""
    low, high = torch.tensor([0.0, -3.0]).view(2, 1, 1), torch.tensor([2.0, 1.0]).view(2, 1, 1)
    # In half-widths from the middle: 0, 2 and -1, 4. The 100th percentile is 4: nothing is cut.
    x0 = torch.tensor([1.0, 3.0, -3.0, 7.0]).double().view(1, 2, 1, 2)
    assert limit(x0, low, high, 100.0).flatten().tolist() == [1.0, 1.5, -1.5, 1.0]


@pytest.mark.parametrize("percentile", [60.0, 99.5])
def test_dynamic_thresholding_is_diffusers(percentile):
    scheduler = DDIMScheduler(
        thresholding=True, dynamic_thresholding_ratio=percentile / 100, sample_max_value=1e9
    )
    x0 = (
        3
        * torch.randn(4, 3, 5, 5, dtype=torch.float64)
        * torch.tensor([0.1, 1, 2, 3]).view(4, 1, 1, 1)
    )
    ours = limit(x0, torch.tensor(-1.0), torch.tensor(1.0), percentile)
    assert torch.allclose(ours, scheduler._threshold_sample(x0.clone()), atol=1e-12)
    assert not torch.allclose(ours, x0.clamp(-1, 1))


def test_images_within_the_range_are_left_alone():
    x0 = X / X.abs().max()
    low, high = torch.tensor(-1.0), torch.tensor(1.0)
    assert torch.equal(limit(x0, low, high, 99.5), x0) and torch.equal(limit(x0, low, high), x0)


@pytest.mark.parametrize("target", ["eps", "v"])
def test_thresholded_x0_still_explains_x_t(target):
    low, high = torch.tensor([-1.0, -0.5, 0.0]).view(3, 1, 1), torch.full((3, 1, 1), 0.9)
    x = X.to(memory_format=torch.channels_last)
    x0, eps = denoiser(Counting(target), clip=(low, high), clip_percentile=90.0)(x, 400)
    free, _ = denoiser(Counting(target))(x, 400)
    assert torch.allclose(x0, limit(free, low, high, 90.0))
    assert not torch.allclose(x0, free.clamp(low, high))
    assert torch.allclose(LINEAR.add_noise(x0, eps, 400), x, atol=1e-12)
    assert x0.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "x0"}, "target 'x0' is none of eps, v"),
        ({"guidance_interval": (0.6, 0.4)}, "guidance_interval 0.6 to 0.4 must not fall"),
        ({"clip_percentile": 99.0}, "clip_percentile 99.0 needs limits"),
    ],
)
def test_bad_arguments_are_named(options, message):
    fields = {"guidance_scale": 2.0, "null_class": 9, "target": "eps", "schedule": LINEAR}
    with pytest.raises(ValueError, match=message):
        guided(None, Y, **(fields | options))
