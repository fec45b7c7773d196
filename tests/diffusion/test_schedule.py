"""The noise schedule against its formulas, diffusers, and the algebra of eps, v and x0."""

import math

import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from ddb_fast.config import DiffusionConfig
from ddb_fast.diffusion.schedule import Schedule, make_schedule

LINEAR = Schedule.linear(1000, 1e-4, 0.028)
COSINE = Schedule.cosine(1000)


def betas(schedule):
    return 1 - schedule.alpha_bar / torch.cat([torch.ones(1).double(), schedule.alpha_bar[:-1]])


def test_linear_is_the_product_of_its_betas():
    product = 1.0
    for i in range(1000):
        product *= 1 - (1e-4 + (0.028 - 1e-4) * i / 999)
        assert LINEAR.alpha_bar[i].item() == pytest.approx(product, rel=1e-12)


def test_cosine_is_equation_17():
    """alpha_bar(t) = f(t) / f(0) itself, until the cut of beta at 0.999 acts on the last step."""

    def f(t):
        return math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2

    for i in range(999):
        assert COSINE.alpha_bar[i].item() == pytest.approx(f(i + 1) / f(0), rel=1e-9)
    assert betas(COSINE)[-1].item() == pytest.approx(0.999, rel=1e-9)
    assert COSINE.alpha_bar[-1] > 0


@pytest.mark.parametrize(
    ("schedule", "options"),
    [
        (LINEAR, {"beta_start": 1e-4, "beta_end": 0.028}),
        (COSINE, {"beta_schedule": "squaredcos_cap_v2"}),
    ],
)
def test_diffusers_has_the_same_betas(schedule, options):
    """To fp32's rounding, in which diffusers keeps them: measured 1e-7 of each."""
    theirs = DDPMScheduler(**options)
    assert torch.allclose(betas(schedule), theirs.betas.double(), rtol=3e-7, atol=0)
    # Their products of a thousand fp32 numbers carry a thousand roundings: measured 4e-7, 1e-5.
    assert torch.allclose(schedule.alpha_bar, theirs.alphas_cumprod.double(), rtol=5e-5, atol=0)


@pytest.mark.parametrize("schedule", [LINEAR, COSINE], ids=["linear", "cosine"])
def test_noise_and_v_agree_with_diffusers(schedule):
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 7, 3, 4, 4, generator=generator, dtype=torch.float64)
    t = torch.tensor([0, 1, 10, 500, 900, 998, 999])
    theirs = DDPMScheduler()
    theirs.alphas_cumprod = schedule.alpha_bar
    assert torch.allclose(schedule.add_noise(x0, eps, t), theirs.add_noise(x0, eps, t), atol=1e-14)
    assert torch.allclose(schedule.v(x0, eps, t), theirs.get_velocity(x0, eps, t), atol=1e-14)


@given(t=st.integers(0, 999), cosine=st.booleans())
@settings(max_examples=50, deadline=None)
def test_eps_v_and_x0_are_one_thing_seen_three_ways(t, cosine):
    schedule = COSINE if cosine else LINEAR
    x0, eps = torch.tensor([[0.7, -1.0], [1.3, 0.2]], dtype=torch.float64).view(2, 1, 2, 1, 1)
    x_t, v = schedule.add_noise(x0, eps, t), schedule.v(x0, eps, t)
    # Dividing by sqrt(alpha_bar) (5e-5 at the end of the cosine) magnifies rounding.
    for got, expected in [
        (schedule.x0_from_eps(x_t, eps, t), x0),
        (schedule.x0_from_v(x_t, v, t), x0),
        (schedule.eps_from_v(x_t, v, t), eps),
        (schedule.eps_from_x0(x_t, x0, t), eps),
    ]:
        assert torch.allclose(got, expected, atol=1e-10, rtol=0)
    assert torch.allclose(x_t**2 + v**2, x0**2 + eps**2, atol=1e-13)


def test_one_timestep_or_one_for_each_image():
    x0, eps = torch.randn(2, 3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([3, 999, 40])
    for name in ("add_noise", "v", "x0_from_eps", "x0_from_v", "eps_from_v", "eps_from_x0"):
        convert = getattr(LINEAR, name)
        rows = [convert(x0[i : i + 1], eps[i : i + 1], int(t[i])) for i in range(3)]
        assert torch.allclose(convert(x0, eps, t), torch.cat(rows), rtol=1e-5), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_images_keep_dtype_and_memory_format(dtype):
    x0 = torch.randn(2, 3, 4, 4, dtype=dtype).to(memory_format=torch.channels_last)
    t = torch.tensor([0, 9])
    for result in (LINEAR.add_noise(x0, x0, t), LINEAR.v(x0, x0, 5), LINEAR.x0_from_v(x0, x0, t)):
        assert result.dtype == dtype
        assert result.is_contiguous(memory_format=torch.channels_last)


def test_coefficients_do_not_lose_the_first_timesteps():
    """sqrt(1 - alpha_bar_0) = sqrt(beta_start); through fp32's alpha_bar it is off by 8e-5."""
    (noise,) = LINEAR.coefficients(torch.tensor([0]), torch.zeros(1))[1].flatten().tolist()
    assert noise == pytest.approx(0.01, rel=1e-7)
    assert LINEAR.coefficients(0, torch.zeros(1))[1] == pytest.approx(0.01, rel=1e-12)


def test_training_may_follow_sampling():
    schedule = Schedule.cosine(10)
    x, t = torch.ones(1, 3, 2, 2), torch.tensor([4])
    with torch.inference_mode():
        schedule.add_noise(x, x, t)
    weight = torch.ones((), requires_grad=True)
    schedule.add_noise(x * weight, x, t).sum().backward()
    assert weight.grad.item() == pytest.approx(12 * schedule.alpha_bar[4].sqrt().item())


def test_the_configuration_chooses():
    linear = DiffusionConfig(images=1, batch_size=1, timesteps=50, beta_start=0.01, beta_end=0.1)
    assert torch.equal(make_schedule(linear).alpha_bar, Schedule.linear(50, 0.01, 0.1).alpha_bar)
    cosine = DiffusionConfig(images=1, batch_size=1, timesteps=50, schedule="cosine")
    assert torch.equal(make_schedule(cosine).alpha_bar, Schedule.cosine(50).alpha_bar)
    assert make_schedule(cosine).timesteps == 50
    with pytest.raises(ValueError, match="'sigmoid' is none of linear, cosine"):
        make_schedule(DiffusionConfig(images=1, batch_size=1, schedule="sigmoid"))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Schedule.linear(10, 0.0, 0.1),
        lambda: Schedule.linear(10, 0.5, 1.0),
        lambda: Schedule.linear(0, 1e-4, 0.02),
        lambda: Schedule(torch.tensor([0.5, 0.5]).double()),
        lambda: Schedule(torch.tensor([0.5, math.nan]).double()),
        lambda: Schedule(torch.tensor([0.9, 0.5])),
    ],
)
def test_impossible_schedules_are_refused(make):
    with pytest.raises(ValueError, match="alpha_bar must"):
        make()
