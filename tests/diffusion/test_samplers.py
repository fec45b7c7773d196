"""Samplers against closed forms, spacing against its definition.

For Gaussian data the best denoiser is known and linear, so a sampler maps its noises linearly to
images: feeding unit impulses gives the mean and the standard deviation of what it samples exactly,
in fp64 and without drawing anything.
"""

import itertools
import math

import pytest
import torch

from ddb_fast.diffusion.guidance import guided
from ddb_fast.diffusion.samplers import (
    sample_ddim,
    sample_ddpm,
    sample_ddpm_authors,
    sample_dpm_solver_pp_2m,
    sample_unipc,
    timesteps,
)
from ddb_fast.diffusion.schedule import Schedule

LINEAR = Schedule.linear(1000, 1e-4, 0.028)
COSINE = Schedule.cosine(1000)
BOTH = pytest.mark.parametrize("schedule", [LINEAR, COSINE], ids=["linear", "cosine"])
MEAN, STD = 0.3, 0.5

SAMPLERS = {
    "ddim": lambda noise, **o: sample_ddim(**o),
    "dpm-solver-pp-2m": lambda noise, **o: sample_dpm_solver_pp_2m(**o),
    "unipc": lambda noise, **o: sample_unipc(**o),
    "ddpm": lambda noise, **o: sample_ddpm(**o, noise=noise),
    "ddim-eta-1": lambda noise, **o: sample_ddim(**o, noise=noise, eta=1.0),
}


def gaussian(schedule, mean=MEAN, std=STD):
    """The exact denoiser of N(mean, std^2)."""

    def denoise(x, t):
        alpha_bar = schedule.alpha_bar[t]
        variance = alpha_bar * std**2 + 1 - alpha_bar
        x0 = mean + alpha_bar.sqrt() * std**2 / variance * (x - alpha_bar.sqrt() * mean)
        return x0, (x - alpha_bar.sqrt() * x0) / (1 - alpha_bar).sqrt()

    return denoise


def impulse_response(sample, draws):
    """Mean and standard deviation of `sample(x, noise)`, given how often it calls noise()."""
    # Row 0 gets no noise at all, row 1 the first state, every other row one of the draws.
    x = torch.zeros(draws + 2, 1, 1, 1, dtype=torch.float64)
    x[1] = 1
    rows = itertools.count(2)

    def noise():
        impulse = torch.zeros_like(x)
        impulse[next(rows)] = 1
        return impulse

    result = sample(x, noise).flatten()
    assert next(rows) in (2, draws + 2), "the number of draws is part of what is tested"
    return result[0].item(), (result[1:] - result[0]).norm().item()


def moments(name, schedule, steps, **gauss):
    walk = timesteps(schedule.timesteps, steps)

    def sample(x, noise):
        denoise = gaussian(schedule, **gauss)
        return SAMPLERS[name](noise, denoise=denoise, x=x, schedule=schedule, timesteps=walk)

    # The last step, to the clean image, adds no noise.
    return impulse_response(sample, steps - 1)


# --- closed forms -------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize(
    ("name", "bounds"),
    [
        ("ddim", {20: 0.1, 80: 0.025, 1000: 0.004}),
        ("dpm-solver-pp-2m", {20: 0.03, 80: 0.0015, 1000: 1e-4}),
        ("unipc", {20: 0.02, 80: 5e-5, 1000: 2e-4}),
        ("ddim-eta-1", {20: 0.17, 80: 0.05, 1000: 0.0095}),
        ("ddpm", {20: 0.08, 80: 0.02, 1000: 0.002}),
    ],
)
def test_samplers_recover_the_data(name, schedule, bounds):
    """Relative error of the standard deviation; the mean misses what is left of it at T only."""
    for steps, bound in bounds.items():
        mean, std = moments(name, schedule, steps)
        assert abs(std / STD - 1) < bound, steps
        assert abs(mean - MEAN) < 2e-4, steps


@pytest.mark.parametrize(("name", "order"), [("ddim", 1), ("dpm-solver-pp-2m", 2), ("unipc", 3)])
def test_order_of_convergence(name, order):
    """The exact flow keeps x_t / std_t, so the state at the last t and its x0 are known."""
    alpha_bar = LINEAR.alpha_bar[[999, 199]]
    start, end = (alpha_bar * STD**2 + 1 - alpha_bar).sqrt().tolist()
    expected = math.sqrt(alpha_bar[1]) * STD**2 / (start * end)
    errors = []
    for stride in (20, 10, 5):
        walk = list(range(999, 198, -stride))

        def sample(x, noise, walk=walk):
            denoise = gaussian(LINEAR)
            return SAMPLERS[name](noise, denoise=denoise, x=x, schedule=LINEAR, timesteps=walk)

        errors.append(abs(impulse_response(sample, 0)[1] - expected))
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.1)


@BOTH
@pytest.mark.parametrize("steps", [2, 10, 1000])
def test_ancestral_sampling_is_exact_for_standard_normal_data(schedule, steps):
    """Every step keeps N(0, 1) (Ho et al. 2020, section 3.2); the last leaves sqrt(alpha_bar) x."""
    mean, std = moments("ddpm", schedule, steps, mean=0.0, std=1.0)
    last = timesteps(1000, steps)[-1]
    assert mean == pytest.approx(0, abs=1e-12)
    assert std == pytest.approx(schedule.alpha_bar[last].sqrt().item(), rel=1e-9)


@BOTH
@pytest.mark.parametrize("name", ["dpm-solver-pp-2m", "unipc"])
def test_the_first_order_solver_is_ddim(schedule, name):
    """Two steps: the solver's first and last are of first order, DDIM's exponential integrator."""
    ddim = moments("ddim", schedule, 2)
    assert moments(name, schedule, 2) == pytest.approx(ddim, rel=1e-9)


@BOTH
def test_the_authors_sampler_recovers_the_data_and_keeps_the_noise_of_x_0(schedule):
    mean, std = impulse_response(
        lambda x, noise: sample_ddpm_authors(gaussian(schedule), x, schedule=schedule, noise=noise),
        999,
    )
    first = schedule.alpha_bar[0].item()
    assert mean == pytest.approx(math.sqrt(first) * MEAN, abs=1e-4)
    assert std == pytest.approx(math.sqrt(first * STD**2 + 1 - first), rel=3e-3)


def test_the_authors_sampler_is_this_loop():
    """Their two passes and w = 1, with tables of betas instead of alpha_bar."""
    T, w, null = 60, 1.0, 0
    schedule = Schedule.linear(T, 1e-3, 0.05)
    y = torch.tensor([1, 2, 3])

    def model(x, t, y):
        shift = (0.01 * t + 0.3 * y).view(-1, 1, 1, 1)
        return torch.tanh(x.roll(1, dims=-1) - 0.5 * x + shift)

    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(T, 3, 3, 4, 4, generator=generator, dtype=torch.float64)
    expected = draws[0]
    betas = torch.linspace(1e-3, 0.05, T, dtype=torch.float64)
    alphas_bar = torch.cumprod(1 - betas, dim=0)
    for i, step in enumerate(reversed(range(1, T)), start=1):
        t = torch.full((3,), step)
        eps = (1 + w) * model(expected, t, y) - w * model(expected, t, torch.full_like(y, null))
        coefficient = betas[step] / torch.sqrt(1 - alphas_bar[step])
        expected = (expected - coefficient * eps) / torch.sqrt(1 - betas[step])
        expected = expected + torch.sqrt(betas[step]) * draws[i]
    stream = iter(draws)
    denoise = guided(
        model, y, guidance_scale=1 + w, null_class=null, target="eps", schedule=schedule
    )
    got = sample_ddpm_authors(denoise, next(stream), schedule=schedule, noise=lambda: next(stream))
    assert torch.allclose(got, expected, atol=1e-10, rtol=0)
    assert next(stream, None) is None


# --- speed --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*SAMPLERS, "authors"])
@pytest.mark.parametrize("target", ["eps", "v"])
@pytest.mark.parametrize("percentile", [None, 99.5])
def test_no_step_waits_for_the_device(name, target, percentile):
    """Meta tensors have no values: whatever asks the device for one fails."""
    x, y = torch.empty(2, 3, 4, 4, device="meta"), torch.empty(2, dtype=torch.int64, device="meta")
    schedule = Schedule.linear(20, 1e-3, 0.2)
    denoise = guided(
        lambda x, t, y: x * t.view(-1, 1, 1, 1),
        y,
        guidance_scale=2.0,
        null_class=3,
        target=target,
        schedule=schedule,
        guidance_interval=(0.2, 0.8),
        clip=(torch.zeros(3, 1, 1, device="meta"), torch.ones(3, 1, 1, device="meta")),
        clip_percentile=percentile,
    )
    options = {"denoise": denoise, "x": x, "schedule": schedule}
    if name == "authors":
        result = sample_ddpm_authors(**options, noise=lambda: torch.empty_like(x))
    else:
        walk = timesteps(20, 5)
        result = SAMPLERS[name](lambda: torch.empty_like(x), timesteps=walk, **options)
    assert result.shape == x.shape and result.dtype == torch.float32


# --- timesteps and errors -----------------------------------------------------------------------


def test_spacing_is_quadratic():
    """By hand: 999 (i / 4)^2 is 0, 62.4, 249.8, 561.9, 999."""
    assert timesteps(1000, 5) == [999, 562, 250, 62, 0]
    assert timesteps(1000, 1) == [999]
    assert timesteps(10, 6) == [9, 6, 3, 2, 1, 0]  # 9 (i / 5)^2: 0, .36, 1.44, 3.24, 5.76, 9


@pytest.mark.parametrize("T", [1, 2, 3, 10, 101, 1000])
def test_timesteps_descend_from_the_last_without_repeats(T):
    assert timesteps(T, T) == list(range(T - 1, -1, -1))
    for steps in range(1, T + 1, max(1, T // 50)):
        walk = timesteps(T, steps)
        assert len(walk) == steps and walk[0] == T - 1 and walk[-1] >= 0
        assert steps == 1 or walk[-1] == 0
        assert all(a > b for a, b in itertools.pairwise(walk))


X = torch.zeros(2, 3, 4, 4, dtype=torch.float64)


def call(name, walk=(9, 4), **options):
    denoise = gaussian(LINEAR)
    return lambda: SAMPLERS[name](
        None, denoise=denoise, x=X, schedule=LINEAR, timesteps=walk, **options
    )


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda: timesteps(10, 11), "11 sampling steps of 10 timesteps"),
        (lambda: timesteps(10, 0), "0 sampling steps"),
        (call("ddim", ()), r"within 0..999, got \[\]"),
        (call("ddpm", (1000, 4)), "within 0..999, got"),
        (call("dpm-solver-pp-2m", (9, 9, 4)), r"got \[9, 9, 4\]"),
        (call("ddim", (4, 9)), r"got \[4, 9\]"),
        (call("ddim", (9, -1)), r"got \[9, -1\]"),
        (call("unipc", (9, 9, 4)), r"got \[9, 9, 4\]"),
        (lambda: sample_ddim(None, X, schedule=LINEAR, timesteps=[9], eta=0.5), "got 0.5"),
        (lambda: sample_ddim(None, X, schedule=LINEAR, timesteps=[9], eta=1.5), "got 1.5"),
    ],
)
def test_bad_arguments_are_named(run, message):
    with pytest.raises(ValueError, match=message):
        run()
