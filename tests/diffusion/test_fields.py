"""The fields of shorter training and sampling: read, refused, handed on, and absent by default."""

import json
from types import SimpleNamespace

import pytest
import torch

from ddb_fast import generator
from ddb_fast.arguments import parse_run
from ddb_fast.config import from_json, with_fields
from ddb_fast.diffusion.generate import SAMPLERS
from ddb_fast.fields import flatten, to_json
from ddb_fast.presets import PRESETS
from ddb_fast.run_folder import RunFolder

NEW = {
    "diffusion.loss_weight": ("none", "min-snr"),
    "diffusion.min_snr_gamma": (5.0, 3.0),
    "sampling.guidance_interval": ([0.0, 1.0], [0.1, 0.9]),
    "sampling.clip_percentile": (None, 99.5),
}


def test_options_are_read():
    words = "digits --diffusion.loss_weight min-snr --diffusion.min_snr_gamma 3 --sampling.sampler"
    words += " unipc --sampling.guidance_interval .1 .9 --sampling.clip_percentile 99.5 --dry-run"
    config, *_ = parse_run(words.split(), prog="x")
    assert {name: flatten(config)[name] for name in NEW} == {n: v for n, (_, v) in NEW.items()}
    assert config.sampling.sampler == "unipc" and config.sampling.guidance_interval == (0.1, 0.9)
    assert from_json(to_json(config)) == config


def test_the_configuration_knows_every_sampler():
    for name in SAMPLERS:
        with_fields(PRESETS["digits"](), {"sampling.sampler": name})
    with pytest.raises(ValueError, match=f"'euler' is none of {', '.join(SAMPLERS)}"):
        with_fields(PRESETS["digits"](), {"sampling.sampler": "euler"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"guidance_interval": "0.9 0.1"}, r"guidance_interval: \(0.9, 0.1\): two shares, the low"),
        ({"guidance_interval": "0.5"}, r"guidance_interval: \(0.5,\): two shares"),
        ({"guidance_interval": "0.5 2"}, "guidance_interval: 2.0 is outside 0.0 to 1.0"),
        ({"clip_percentile": "101"}, "clip_percentile: 101.0 is outside 0.0 to 100.0"),
        ({"clip_percentile": "99", "clip_x0": "false"}, "clip_percentile: needs sampling.clip_x0"),
    ],
)
def test_what_means_nothing_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        with_fields(PRESETS["digits"](), {f"sampling.{n}": v for n, v in changes.items()})


def test_a_run_from_before_these_fields_goes_on(tmp_path):
    """Its manifest and configuration lack them; asking for any of them is another run."""
    config = with_fields(PRESETS["digits"](), {"out": str(tmp_path / "run")})

    def open_folder(config):
        folder = RunFolder(config, fingerprint="f", device="cpu", writes=True)
        folder.lock()
        folder.open()
        return folder

    folder = open_folder(config)
    for stage in ("diffusion", "synthetic"):
        folder.begin(stage)
        folder.finish(stage, 1.0)
    folder.close()
    path = tmp_path / "run" / "manifest.json"
    manifest = json.loads(path.read_text())
    for stage in manifest["stages"].values():
        for name in NEW:
            stage["fields"].pop(name, None)
    path.write_text(json.dumps(manifest))
    older = json.loads(to_json(config))
    for name in NEW:
        section, leaf = name.split(".")
        del older[section][leaf]
    assert from_json(json.dumps(older)) == config

    folder = open_folder(config)
    assert folder.done("diffusion") and folder.done("synthetic")
    folder.close()
    assert json.loads(path.read_text())["stages"] == manifest["stages"]
    for name, (before, after) in NEW.items():
        assert flatten(config)[name] == before
        with pytest.raises(ValueError, match=f"{name} is .* there, .* here"):
            RunFolder(with_fields(config, {name: after}), fingerprint="f", device="", writes=False)


def test_training_weighs_as_configured(monkeypatch, tmp_path):
    """What `train_diffusion` hands to the loss, seen from a loop that takes no step."""
    seen = []

    def loop(accelerator, network, loss_of, **options):
        loss_of(network, torch.arange(2))
        return 0.0

    monkeypatch.setattr(generator, "fit", loop)
    monkeypatch.setattr(generator, "diffusion_loss", lambda *a, **options: seen.append(options))
    images = torch.zeros(2, 16, 16, 3, dtype=torch.uint8)
    train = type("Split", (), {"__len__": lambda s: 2, "small": images, "y": torch.tensor([0, 1])})
    for changes in ({}, {"diffusion.loss_weight": "min-snr", "diffusion.min_snr_gamma": "3"}):
        context = SimpleNamespace(
            config=with_fields(PRESETS["digits"](), changes),
            accelerator=SimpleNamespace(is_main_process=False),
            data=SimpleNamespace(splits={"train": train()}, classes=("a", "b")),
            device=torch.device("cpu"),
            log=None,
            checkpoints=lambda path: None,
        )
        generator.train_diffusion(context, tmp_path, tmp_path)
    assert [(o["loss_weight"], o["min_snr_gamma"]) for o in seen] == [("none", 5), ("min-snr", 3)]
