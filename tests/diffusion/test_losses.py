"""The diffusion loss: its value worked out with known predictions, and what the model is shown."""

import pytest
import torch

from ddb_fast.diffusion.losses import diffusion_loss, min_snr_weight
from ddb_fast.diffusion.schedule import Schedule

SCHEDULE = Schedule.linear(1000, 1e-4, 0.028)
NULL = 7


def images(n, size=8):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


class Spy:
    """A model that remembers what it was shown and answers with `answer(x_t, t)`."""

    def __init__(self, answer):
        self.answer = answer

    def __call__(self, x_t, t, y):
        self.x_t, self.t, self.y = x_t, t, y
        return self.answer(x_t, t)


def loss(model, x0, y=None, seed=0, **options):
    y = torch.zeros(len(x0), dtype=torch.int64) if y is None else y
    torch.manual_seed(seed)
    return diffusion_loss(model, x0, y, schedule=SCHEDULE, null_class=NULL, **options)


@pytest.mark.parametrize("target", ["eps", "v"])
def test_a_model_that_knows_the_image_has_no_loss(target):
    """The oracle gets eps back out of x_t with fp64 algebra of its own."""
    x0 = images(64).double()

    def oracle(x_t, t):
        alpha_bar = SCHEDULE.alpha_bar[t].view(-1, 1, 1, 1)
        eps = (x_t - alpha_bar.sqrt() * x0) / (1 - alpha_bar).sqrt()
        return eps if target == "eps" else alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * x0

    assert loss(Spy(oracle), x0, target=target).item() < 1e-20


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "window"])
def test_predicting_nothing_costs_the_variance_of_the_target(layout):
    """E eps^2 = 1; E v^2 = alpha_bar + (1 - alpha_bar) x0^2, averaged over uniform t."""
    x0, nothing = images(256, size=16), Spy(lambda x_t, t: torch.zeros_like(x_t))
    if layout == "channels_last":
        x0 = x0.contiguous(memory_format=torch.channels_last)
    elif layout == "window":
        x0 = images(256, size=20)[:, :, 2:18, 2:18]
    assert loss(nothing, x0, target="eps").item() == pytest.approx(1, abs=0.02)
    alpha_bar = SCHEDULE.alpha_bar[nothing.t].mean().item()
    expected = alpha_bar + (1 - alpha_bar) * x0.square().mean().item()
    assert loss(nothing, x0, target="v").item() == pytest.approx(expected, abs=0.02)


def test_the_authors_scale_is_384_means_at_their_batch_and_size():
    x0, model = images(32, size=64), Spy(lambda x_t, t: x_t)
    mean, authors = (loss(model, x0, loss_scale=scale).item() for scale in ("mean", "authors"))
    assert authors == pytest.approx(384 * mean, rel=1e-6)
    x0 = images(5)
    mean, authors = (loss(model, x0, loss_scale=scale).item() for scale in ("mean", "authors"))
    assert authors == pytest.approx(mean * x0.numel() / 5**2, rel=1e-6)


def test_timesteps_are_uniform_and_noise_is_standard_normal():
    model, x0 = Spy(lambda x_t, t: torch.zeros_like(x_t)), torch.zeros(20000, 1, 2, 2)
    loss(model, x0)
    t = model.t
    assert t.dtype == torch.int64 and t.min() >= 0 and t.max() <= 999
    # Of 20,000 draws each timestep gets 20 +- 4.5; the ends must not be left out.
    counts = torch.bincount(t, minlength=1000)
    assert counts.min() > 0 and counts.max() < 50
    assert counts[:10].sum() > 120 and counts[-10:].sum() > 120
    eps = model.x_t / (1 - SCHEDULE.alpha_bar[t]).sqrt().view(-1, 1, 1, 1)
    # Five standard errors of 80,000 draws.
    assert abs(eps.mean()) < 0.018 and abs(eps.std() - 1) < 0.0125


def test_labels_are_dropped_for_each_sample():
    model, y = Spy(lambda x_t, t: x_t), torch.arange(10000) % 5
    loss(model, torch.zeros(10000, 1, 1, 1), y, class_dropout=0.1)
    dropped = model.y == NULL
    # Binomial(10000, 0.1): five standard deviations are 150.
    assert abs(int(dropped.sum()) - 1000) < 150
    assert torch.equal(model.y[~dropped], y[~dropped])


def test_labels_are_dropped_for_the_whole_batch():
    model, y = Spy(lambda x_t, t: x_t), torch.tensor([1, 2, 3])
    batches = 0
    for seed in range(400):
        loss(
            model,
            torch.zeros(3, 1, 1, 1),
            y,
            seed=seed,
            class_dropout=0.25,
            class_dropout_per="batch",
        )
        batches += model.y.tolist() == [NULL] * 3
        assert model.y.tolist() in ([NULL] * 3, [1, 2, 3])
    # Binomial(400, 0.25): five standard deviations are 43.
    assert abs(batches - 100) < 43


@pytest.mark.parametrize("per", ["sample", "batch"])
def test_no_dropout_and_all_dropout(per):
    model, y = Spy(lambda x_t, t: x_t), torch.arange(100) % 5
    loss(model, torch.zeros(100, 1, 1, 1), y, class_dropout=0.0, class_dropout_per=per)
    assert torch.equal(model.y, y)
    loss(model, torch.zeros(100, 1, 1, 1), y, class_dropout=1.0, class_dropout_per=per)
    assert (model.y == NULL).all()


def test_the_error_is_taken_in_float32():
    """As if the network's bf16 answer were exact; in bf16 the error itself would be rounded."""
    model = Spy(lambda x_t, t: x_t.bfloat16())
    x0 = images(8)
    value = loss(model, x0)
    assert value.dtype == torch.float32
    x_t, alpha_bar = model.x_t.double(), SCHEDULE.alpha_bar[model.t].view(-1, 1, 1, 1)
    eps = (x_t - alpha_bar.sqrt() * x0) / (1 - alpha_bar).sqrt()
    expected = (model.x_t.bfloat16().double() - eps).square().mean().item()
    assert value.item() == pytest.approx(expected, rel=1e-4)


def test_gradients_reach_the_model():
    weight = torch.ones((), requires_grad=True)
    loss(Spy(lambda x_t, t: weight * x_t), images(4)).backward()
    assert weight.grad is not None and weight.grad.isfinite() and weight.grad != 0


def test_the_seed_decides_all_that_is_drawn():
    model, y, seen = Spy(lambda x_t, t: x_t), torch.arange(64) % 5, []
    for seed in (1, 1, 2):
        loss(model, images(64), y, seed=seed, class_dropout=0.5)
        seen.append((model.x_t, model.t, model.y))
    first, again, other = seen
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_memory_format_reaches_the_model():
    model = Spy(lambda x_t, t: x_t)
    loss(model, images(2).to(memory_format=torch.channels_last))
    assert model.x_t.is_contiguous(memory_format=torch.channels_last)


# --- min-SNR ------------------------------------------------------------------------------------


def test_min_snr_weights_by_hand():
    """alpha_bar .9, .75, .5, .2 is snr 9, 3, 1, 1/4; gamma 5 and 2."""
    schedule = Schedule(torch.tensor([0.9, 0.75, 0.5, 0.2], dtype=torch.float64))
    t, like = torch.tensor([0, 1, 2, 3, 0]), torch.zeros(5, 3, 2, 2, dtype=torch.float64)
    for target, gamma, expected in (
        ("eps", 5.0, [5 / 9, 1, 1, 1, 5 / 9]),
        ("v", 5.0, [5 / 10, 3 / 4, 1 / 2, 1 / 5, 5 / 10]),
        ("eps", 2.0, [2 / 9, 2 / 3, 1, 1, 2 / 9]),
        ("v", 2.0, [2 / 10, 2 / 4, 1 / 2, 1 / 5, 2 / 10]),
    ):
        weight = min_snr_weight(schedule, t, like, target=target, gamma=gamma)
        assert weight.shape == (5, 1, 1, 1) and weight.dtype == torch.float64
        assert weight.flatten().tolist() == pytest.approx(expected, rel=1e-12), (target, gamma)


@pytest.mark.parametrize("schedule", [SCHEDULE, Schedule.cosine(1000)], ids=["linear", "cosine"])
@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_the_error_of_x0_weighs_the_same_whatever_the_target(schedule, gamma):
    """An error d of x0 at fixed x_t is one of eps or v, got here from the schedule's algebra."""
    t = torch.arange(1000)
    generator = torch.Generator().manual_seed(0)
    x0, d, eps = torch.randn(3, 1000, 1, 2, 2, generator=generator, dtype=torch.float64)
    x_t = schedule.add_noise(x0, eps, t)
    wrong = schedule.eps_from_x0(x_t, x0 + d, t)
    errors = {
        "eps": wrong - eps,
        "v": schedule.v(x0 + d, wrong, t) - schedule.v(x0, eps, t),
    }
    snr = schedule.alpha_bar / (1 - schedule.alpha_bar)
    expected = snr.clamp_max(gamma)
    assert (snr > gamma).any() and (snr < gamma).any()
    for target, error in errors.items():
        weight = min_snr_weight(schedule, t, x0, target=target, gamma=gamma)
        weighed = (weight * error.square()).sum((1, 2, 3)) / d.square().sum((1, 2, 3))
        assert torch.allclose(weighed, expected, rtol=1e-6), target


@pytest.mark.parametrize("target", ["eps", "v"])
def test_min_snr_weights_each_image_in_the_loss(target):
    x0, model = images(64).double(), Spy(lambda x_t, t: 0.3 * x_t)
    options = {"target": target, "loss_weight": "min-snr", "min_snr_gamma": 3.0}
    value = loss(model, x0, **options).item()
    alpha_bar = SCHEDULE.alpha_bar[model.t]
    a, sigma = alpha_bar.sqrt().view(-1, 1, 1, 1), (1 - alpha_bar).sqrt().view(-1, 1, 1, 1)
    eps = (model.x_t - a * x0) / sigma
    truth = eps if target == "eps" else a * eps - sigma * x0
    of_image = (0.3 * model.x_t - truth).square().mean((1, 2, 3))
    snr = alpha_bar / (1 - alpha_bar)
    least = snr.minimum(torch.tensor(3.0))
    weight = least / snr if target == "eps" else least / (snr + 1)
    assert value == pytest.approx((weight * of_image).mean().item(), rel=1e-9)
    authors = loss(model, x0, **options, loss_scale="authors").item()
    assert authors == pytest.approx(value * x0[0].numel() / 64, rel=1e-9)


def test_no_weight_is_the_loss_as_it_was():
    """By the formula of Ho et al., bit for bit, and drawing the same numbers as with weights."""
    x0, model = images(16), Spy(lambda x_t, t: 0.3 * x_t)
    value = loss(model, x0, loss_weight="none", min_snr_gamma=1.0)
    shown = model.x_t
    assert torch.equal(value, loss(model, x0))
    assert loss(model, x0, loss_weight="min-snr") < value
    assert torch.equal(model.x_t, shown)
    # An snr that is never above gamma: eps keeps its plain weight.
    high = loss(model, x0, loss_weight="min-snr", min_snr_gamma=1e9)
    assert high.item() == pytest.approx(value.item(), rel=1e-6)


def test_min_snr_weights_are_exact_at_both_ends_in_float32():
    """The cosine's snr spans 2e-9 to 2e4; from fp32 tables of both roots no digit is lost."""
    schedule = Schedule.cosine(1000)
    t = torch.arange(1000)
    for target in ("eps", "v"):
        fine, coarse = (
            min_snr_weight(schedule, t, torch.empty(1000, 1, 1, 1, dtype=d), target=target, gamma=5)
            for d in (torch.float64, torch.float32)
        )
        assert coarse.dtype == torch.float32
        assert torch.allclose(coarse.double(), fine, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_weight": "snr"}, "loss_weight 'snr' is none of none, min-snr"),
        ({"target": "x0"}, "target 'x0' is none of eps, v"),
        ({"class_dropout_per": "epoch"}, "'epoch' is none of sample, batch"),
        ({"loss_scale": "sum"}, "'sum' is none of mean, authors"),
        ({"class_dropout": 1.5}, "class_dropout 1.5"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        loss(Spy(lambda x_t, t: x_t), images(2), **options)


def test_the_authors_scale_is_of_the_batch_of_all_devices():
    """Two halves of a batch, averaged as devices average, weigh what the whole does."""
    whole, half = torch.zeros(8, 3, 4, 4), torch.zeros(4, 3, 4, 4)

    def loss(x0, **sizes):
        torch.manual_seed(0)
        return diffusion_loss(
            lambda x, t, y: torch.ones_like(x),
            x0,
            torch.zeros(len(x0), dtype=torch.int64),
            schedule=Schedule.linear(10, 1e-4, 0.02),
            null_class=1,
            loss_scale="authors",
            **sizes,
        )

    assert loss(half, batch_size=8) / loss(half) == pytest.approx(0.5)
    assert loss(whole) == pytest.approx(loss(whole, batch_size=8))
