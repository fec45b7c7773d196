"""Sampling where memory does not suffice: half as many images at once, and the same images."""

import contextlib
import gc
import logging
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ddb_fast import checkpoint, generator
from ddb_fast.config import SamplingConfig, with_fields
from ddb_fast.diffusion.generate import generate_batch, generate_within_memory, plan
from ddb_fast.diffusion.schedule import Schedule
from ddb_fast.presets import PRESETS
from ddb_fast.trackers import RunLog

LABELS, SEEDS = plan(3, 8, 5)
OPTIONS = {
    "schedule": Schedule.linear(50, 1e-3, 0.2),
    "target": "eps",
    "sampler": "unipc",
    "steps": 4,
    "guidance_scale": 2.0,
    "clip_x0": True,
    "pixel_norm": "symmetric",
    "image_size": 8,
}
MESSAGE = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8.00 GiB"


class SmallMemory(nn.Module):
    """Pixel by pixel, so that no bit depends on the batch; holds `most` rows at once."""

    def __init__(self, most=10**6):
        super().__init__()
        self.null_class, self.most = 3, most
        self.weight = nn.Parameter(torch.tensor(0.3))
        self.batches, self.held = [], []

    def forward(self, x, t, y):
        assert all(reference() is None for reference in self.held), "the first try's tensors live"
        self.batches.append(len(x))
        if len(x) > self.most:
            activation = torch.sin(x)
            self.held.append(weakref.ref(activation))
            raise torch.OutOfMemoryError(MESSAGE)
        return self.weight * torch.sin(3 * x + y.view(-1, 1, 1, 1)) + 0.9 * x


@pytest.fixture(autouse=True)
def _no_collection():
    """Tensors of a failed try must be gone at once, not when Python next collects cycles."""
    gc.disable()
    yield
    gc.enable()


def test_the_batch_is_halved_until_it_fits_and_the_images_stay(caplog, monkeypatch):
    freed = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append(len(net.batches)))
    net = SmallMemory(most=6)
    expected = generate_batch(SmallMemory(), LABELS[:8], SEEDS[:8], pad_to=8, **OPTIONS)
    images, at_once = generate_within_memory(net, LABELS[:8], SEEDS[:8], at_once=8, **OPTIONS)
    # Both branches of guidance: twice the images. Two images fit, in four steps, four times.
    assert net.batches == [16, 8] + [4] * 4 * 4
    assert at_once == 2 and torch.equal(images, expected)
    assert freed == [1, 2], "memory is given back before each next try"
    assert [r.getMessage() for r in caplog.records] == [
        f"sampling {half} images at once instead of {full}, which may change them by rounding: "
        "CUDA out of memory. Tried to allocate 2.00 GiB"
        for full, half in ((8, 4), (4, 2))
    ]


def test_enough_memory_is_one_padded_batch(caplog):
    net = SmallMemory()
    images, at_once = generate_within_memory(net, LABELS[:5], SEEDS[:5], at_once=8, **OPTIONS)
    assert net.batches == [16] * 4 and at_once == 8 and not caplog.records
    expected = generate_batch(net, LABELS[:5], SEEDS[:5], pad_to=8, **OPTIONS)
    assert torch.equal(images, expected)


def test_an_odd_size_and_a_part_that_runs_out_later():
    """7 is halved to 3; 24 images are 3 at once eight times, none lost."""
    expected = generate_batch(SmallMemory(), LABELS, SEEDS, pad_to=24, **OPTIONS)
    images, at_once = generate_within_memory(SmallMemory(7), LABELS, SEEDS, at_once=7, **OPTIONS)
    assert at_once == 3 and torch.equal(images, expected)


def test_not_one_image_fits():
    message = "^not even one image can be sampled at once: CUDA out of memory. Tried to allocate"
    with pytest.raises(ValueError, match=message):
        generate_within_memory(SmallMemory(1), LABELS, SEEDS, at_once=8, **OPTIONS)


def test_other_errors_are_not_taken_for_it():
    class Broken(SmallMemory):
        def forward(self, x, t, y):
            raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        generate_within_memory(Broken(), LABELS, SEEDS, at_once=8, **OPTIONS)


# --- the stage ----------------------------------------------------------------------------------


def synthesised(net, folder, monkeypatch, **fields):
    """The stage with a network in place of a trained one; the images and each shard's metadata."""
    names = {"per_class": 8, "batch_size": 10, "steps": 4, "sampler": "unipc"} | fields
    config = with_fields(
        PRESETS["digits"](),
        {"progress": "false"} | {f"sampling.{name}": value for name, value in names.items()},
    )
    accelerator = SimpleNamespace(
        process_index=0,
        num_processes=1,
        is_main_process=True,
        autocast=contextlib.nullcontext,
        wait_for_everyone=lambda: None,
    )
    context = SimpleNamespace(
        config=config,
        accelerator=accelerator,
        data=SimpleNamespace(classes=("a", "b", "c")),
        log=RunLog(accelerator, None),
        device=torch.device("cpu"),
    )
    loaded = (net, config.diffusion, ("a", "b", "c"))
    monkeypatch.setattr(generator, "load_diffusion", lambda folder: loaded)
    generator.synthesise(context, folder, folder, folder / "shards")
    tensors, _ = checkpoint.load_tensors(folder / "images.safetensors")
    used = [checkpoint.read_metadata(p) for p in sorted((folder / "shards").iterdir())]
    return tensors, used


def test_the_stage_goes_on_with_what_fits(tmp_path, monkeypatch, caplog):
    whole, used = synthesised(SmallMemory(), tmp_path / "whole", monkeypatch)
    assert used == [{"batch_size": 10}] * 3 and not caplog.records
    net = SmallMemory(most=12)
    halved, used = synthesised(net, tmp_path / "halved", monkeypatch)
    assert used == [{"batch_size": 5}] * 3
    # 10, 10 and 4 images in parts of 5, doubled by guidance: tried once, then what fits.
    assert net.batches == [20] + [10] * 4 * 5
    assert len(caplog.records) == 1 and caplog.records[0].levelno == logging.WARNING
    assert whole["images"].shape == (24, 3, 16, 16) and whole["images"].float().std() > 10
    for name, tensor in whole.items():
        assert torch.equal(halved[name], tensor), name


def test_the_stage_passes_every_sampling_field_on(tmp_path, monkeypatch):
    """Each change alters the images or, for the interval, the work."""
    plain, _ = synthesised(SmallMemory(), tmp_path / "plain", monkeypatch)
    assert SamplingConfig().guidance_scale == 2
    changes = {
        "sampler": "ddim",
        "guidance_interval": "0.2 0.8",
        "clip_percentile": "60",
        "clip_x0": "false",
        "steps": "5",
    }
    for name, value in changes.items():
        other, _ = synthesised(SmallMemory(), tmp_path / name, monkeypatch, **{name: value})
        assert not torch.equal(other["images"], plain["images"]), name
