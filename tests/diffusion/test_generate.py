"""Generation addressed by seed: an image is the same wherever and with whomever it is made."""

import numpy as np
import pytest
import torch
from torch import nn

from ddb_fast.config import UNetConfig
from ddb_fast.data.pixels import denormalise, normalise
from ddb_fast.diffusion.generate import (
    SAMPLERS,
    PerImageNoise,
    generate_batch,
    image_seed,
    plan,
)
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
from ddb_fast.models.unet import UNet

SCHEDULE = Schedule.linear(50, 1e-3, 0.2)
PAD = 8


class TinyNet(nn.Module):
    """Convolutions and embeddings with random weights; output of the scale of noise."""

    def __init__(self, num_classes=3, channels=16):
        super().__init__()
        torch.manual_seed(0)
        self.null_class = num_classes
        self.classes = nn.Embedding(num_classes + 1, channels)
        self.times = nn.Embedding(50, channels)
        self.first = nn.Conv2d(3, channels, 3, padding=1)
        self.last = nn.Conv2d(channels, 3, 3, padding=1)
        self.batches = []

    def forward(self, x, t, y):
        self.batches.append(len(x))
        assert x.is_contiguous(memory_format=torch.channels_last) and torch.is_inference(x)
        embedding = self.classes(y) + self.times(t)
        h = torch.tanh(self.first(x) + embedding[:, :, None, None])
        return x + self.last(h)


NET = TinyNet().eval()
LABELS, SEEDS = plan(3, 4, 17)


def generate(rows, net=NET, seeds=SEEDS, **options):
    rows = torch.as_tensor(rows, dtype=torch.int64)
    fields = {
        "schedule": SCHEDULE,
        "target": "eps",
        "sampler": "dpm-solver-pp-2m",
        "steps": 5,
        "guidance_scale": 2.0,
        "clip_x0": True,
        "pixel_norm": "symmetric",
        "image_size": 8,
        "pad_to": PAD,
    }
    return generate_batch(net, LABELS[rows], seeds[rows], **(fields | options))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_image_does_not_depend_on_its_batch_or_place(sampler):
    whole = generate(range(8), sampler=sampler)
    assert whole.shape == (8, 3, 8, 8) and whole.dtype == torch.uint8
    ones = torch.cat([generate([k], sampler=sampler) for k in range(8)])
    threes = torch.cat([generate(rows, sampler=sampler) for rows in ([0, 1, 2], [3, 4, 5], [6, 7])])
    order = torch.tensor([5, 2, 7, 0, 6, 1, 4, 3])
    shuffled = generate(order, sampler=sampler)
    assert torch.equal(ones, whole) and torch.equal(threes, whole)
    assert torch.equal(shuffled, whole[order])


def test_nor_does_it_with_attention_and_group_norm():
    config = UNetConfig(
        channels=16, channel_multipliers=(1, 2), norm_groups=8, attention_levels=(1,), embedding=32
    )
    net = UNet(config, num_classes=3, timesteps=50).to(memory_format=torch.channels_last).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in net.parameters():
        # Networks start with zeros at their ends, which would hide everything behind them.
        nn.init.normal_(parameter, std=0.1, generator=generator)
    whole = generate(range(8), net=net, steps=2)
    split = torch.cat([generate(rows, net=net, steps=2) for rows in ([0, 1, 2, 3, 4], [5], [6, 7])])
    assert torch.equal(split, whole)
    assert whole.float().std(dim=0).mean() > 2


def test_the_network_always_sees_the_padded_batch():
    NET.batches.clear()
    generate([0, 1, 2])
    generate([0, 1, 2], guidance_scale=1.0)
    assert NET.batches == [2 * PAD] * 5 + [PAD] * 5
    # Steps 49, 28, 12, 3, 0: noise .995, .83, .29, .03, .001.
    NET.batches.clear()
    generate([0, 1, 2], guidance_interval=(0.2, 0.9))
    assert NET.batches == [PAD, 2 * PAD, 2 * PAD, PAD, PAD]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_images_differ_between_seeds_and_classes(sampler):
    images = generate(range(8), sampler=sampler).float()
    # Of another seed but the same class, and of another class with the same seed.
    other_seed = generate(range(8), seeds=plan(3, 4, 18)[1], sampler=sampler).float()
    same_seed = generate(range(8), seeds=SEEDS[:1].expand(8), sampler=sampler).float()
    for a, b in ((images[0], images[3]), (images[0], other_seed[0]), (same_seed[0], same_seed[1])):
        assert (a - b).abs().mean() > 2
    assert torch.equal(same_seed[0], same_seed[3])


@pytest.mark.parametrize("name", SAMPLERS)
def test_it_is_the_sampler_on_the_images_own_noise(name):
    """Assembled by hand from the parts, for one image and without padding."""
    stream = np.random.Generator(np.random.PCG64(int(SEEDS[1])))

    def noise():
        x = torch.from_numpy(stream.standard_normal((3, 8, 8), dtype=np.float32))[None]
        return x.to(memory_format=torch.channels_last)

    white = torch.full((1, 3, 1, 1), 255, dtype=torch.uint8)
    limits = normalise(0 * white, "imagenet"), normalise(white, "imagenet")
    denoise = guided(
        NET,
        LABELS[1:2],
        guidance_scale=3.0,
        null_class=3,
        target="v",
        schedule=SCHEDULE,
        clip=limits,
    )
    sample, more = {
        "ddpm": (sample_ddpm, {"noise": noise}),
        "ddpm-authors": (sample_ddpm_authors, {"noise": noise}),
        "ddim": (sample_ddim, {}),
        "dpm-solver-pp-2m": (sample_dpm_solver_pp_2m, {}),
        "unipc": (sample_unipc, {}),
    }[name]
    if name != "ddpm-authors":
        more = more | {"timesteps": timesteps(50, 5)}
    with torch.inference_mode():
        x = sample(denoise, noise().clone(), schedule=SCHEDULE, **more)
    expected = denormalise(x, "imagenet").int()
    options = {"target": "v", "guidance_scale": 3.0, "pixel_norm": "imagenet"}
    got = generate([1], sampler=name, **options).int()
    # Another batch size may round differently, which moves a pixel by a level at most.
    assert (got - expected).abs().max() <= 1


def test_clipping_and_steps_and_sampler_are_not_ignored():
    base = generate(range(4))
    for change in (
        {"clip_x0": False},
        {"steps": 10},
        {"sampler": "ddim"},
        {"sampler": "unipc"},
        {"guidance_interval": (0.2, 0.9)},
        {"clip_percentile": 90.0},
        {"guidance_scale": 1.0},
        {"target": "v"},
        {"pixel_norm": "imagenet"},
    ):
        assert not torch.equal(generate(range(4), **change), base), change
    authors = generate(range(4), sampler="ddpm-authors", steps=5)
    assert torch.equal(generate(range(4), sampler="ddpm-authors", steps=9), authors)


# --- seeds and noise ----------------------------------------------------------------------------


def test_seeds_are_many_wide_and_never_shared_by_runs():
    seeds = np.array([image_seed(run, k) for run in (0, 1, 2, 2**32) for k in range(5000)])
    assert len(np.unique(seeds)) == 20000
    assert seeds.min() >= 0 and seeds.max() < 2**63
    # Every one of 63 bits is set in half of the seeds; five standard deviations are 354.
    bits = (seeds[:, None] >> np.arange(63)) & 1
    assert np.abs(bits.sum(0) - 10000).max() < 354
    assert image_seed(7 + (3 << 32), 0) != image_seed(7, 3)


def test_seeds_are_pinned():
    """A change of these figures would make an interrupted synthetic set two half sets."""
    seeds = [image_seed(0, 0), image_seed(0, 1), image_seed(1, 0)]
    assert seeds == [4334430513956379144, 2440950710608614359, 4215923173971654960]
    noise = PerImageNoise([5], (3,))().flatten().tolist()
    assert noise == pytest.approx([-1.2224977, -2.1383154, -0.0647231], abs=1e-6)


def test_noise_of_an_image_depends_on_its_seed_and_the_call_only():
    alone, together = PerImageNoise([11], (3, 4, 4)), PerImageNoise([7, 11, 9], (3, 4, 4))
    calls = [(alone(), together()) for _ in range(3)]
    for one, three in calls:
        assert three.shape == (3, 3, 4, 4) and three.dtype == torch.float32
        assert torch.equal(one[0], three[1])
    assert not torch.equal(calls[0][0], calls[1][0])


def test_seeds_that_agree_in_32_bits_make_different_noise():
    """torch's CPU generator would not tell these apart."""
    low, high = PerImageNoise([5, 5 + 2**32], (3, 4, 4))()
    assert not torch.equal(low, high)


def test_noise_is_standard_normal_and_independent():
    noise = PerImageNoise([image_seed(0, k) for k in range(100)], (3, 16, 16))
    first, second = noise().flatten(1).double(), noise().flatten(1).double()
    # Five standard errors of 76,800 draws, and of correlations of 768 draws each.
    assert abs(first.mean()) < 0.018 and abs(first.std() - 1) < 0.013
    assert torch.corrcoef(torch.cat([first, second])).fill_diagonal_(0).abs().max() < 0.2
    assert first.square().square().mean().item() == pytest.approx(3, abs=0.2)


def test_plan_is_balanced_when_cut_short():
    labels, seeds = plan(3, 4, 17)
    assert labels.tolist() == [0, 1, 2] * 4
    assert seeds.tolist() == [image_seed(17, k) for k in range(12)]
    assert labels.dtype == seeds.dtype == torch.int64


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda: generate([0], sampler="euler"), "'euler' is none of ddpm, ddpm-authors, ddim"),
        (lambda: generate([0], target="x0"), "'x0' is none of eps, v"),
        (lambda: generate([0], guidance_interval=(1.0, 0.0)), "1.0 to 0.0 must not fall"),
        (lambda: generate([0], clip_x0=False, clip_percentile=99.0), "99.0 needs limits"),
        (lambda: generate([0], pixel_norm="unit"), "'unit' is none of symmetric, imagenet"),
        (lambda: generate([0], steps=51), "51 sampling steps of 50 timesteps"),
        (lambda: generate(range(9)), r"\(9,\) labels and \(9,\) seeds: must be 1 to 8"),
        (lambda: generate([]), r"\(0,\) labels"),
        (lambda: image_seed(-1, 0), "seed -1"),
        (lambda: plan(0, 5, 0), "5 images of 0 classes"),
        (lambda: plan(3, 0, 0), "0 images of 3 classes"),
    ],
)
def test_bad_arguments_are_named(run, message):
    with pytest.raises(ValueError, match=message):
        run()


def test_a_diverged_network_is_not_drawn_as_black_images():
    net = TinyNet().eval()
    nn.init.constant_(net.last.bias, float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        generate([0, 1], net=net)
