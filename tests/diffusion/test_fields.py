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


def test_the_generator_is_trained_as_configured(monkeypatch, tmp_path):
    """What `train_diffusion` hands to the loss and to a loop of no step, and what it keeps."""
    seen = []

    def loop(accelerator, network, loss_of, **options):
        seen.append(options)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter += 1
        options["loss"] = loss_of(network, torch.tensor([2, 0]))
        options["network"] = network
        return 7.0

    def loss(model, x0, y, **options):
        options["x0"], options["y"] = x0, y
        return options

    monkeypatch.setattr(generator, "fit", loop)
    monkeypatch.setattr(generator, "diffusion_loss", loss)
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1, 1).repeat(1, 4, 4, 3)
    train = type(
        "Split", (), {"__len__": lambda s: 3, "small": images, "y": torch.tensor([0, 1, 1])}
    )
    small = {"unet.channels": 8, "unet.norm_groups": 4, "unet.embedding": 8, "timesteps": 10}
    small |= {"unet.channel_multipliers": "1", "unet.attention_levels": "0", "image_size": 4}
    given = {"loss_scale": "authors", "class_dropout": 0.3, "class_dropout_per": "batch"}
    given |= {"loss_weight": "min-snr", "min_snr_gamma": 3.0, "batch_size": 48}
    changes = {"schedule": "linear", "beta_start": 0.1, "beta_end": 0.1, "pixel_norm": "imagenet"}
    changes |= given | {"ema_half_life": 640, "ema_rampup": 0.25}
    seeds = {"seed": "4", "step": "eager"}
    base = PRESETS["digits"]().diffusion
    for target, changed in (
        ("eps", {}),
        ("v", changes),
        ("eps", changes | {"ema_half_life": None}),
    ):
        fields = {f"diffusion.{n}": v for n, v in (small | changed | {"target": target}).items()}
        context = SimpleNamespace(
            config=with_fields(PRESETS["digits"](), fields | (seeds if changed else {})),
            accelerator=SimpleNamespace(is_main_process=True),
            data=SimpleNamespace(splits={"train": train()}, classes=("a", "b")),
            device=torch.device("cpu"),
            log=None,
            checkpoints=lambda path: path,
        )
        assert generator.train_diffusion(context, tmp_path / "kept", tmp_path / "resume") == 7.0
        options = seen[-1]
        shown = options["loss"]
        assert shown["target"] == target and shown["null_class"] == options["network"].null_class
        for name in given:
            assert shown[name] == getattr(context.config.diffusion, name), name
        assert shown["y"].tolist() == [1, 0] and options["config"] is context.config.diffusion
        assert options["seed"] == options["sampler"].seed == (4 if changed else 0)
        assert options["sampler"].n == 3 and options["stage"] == "diffusion"
        assert options["checkpoints"] == tmp_path / "resume" / "last.safetensors"
        assert options["step_mode"] == ("eager" if changed else "auto")
        if changed:  # black and white by ImageNet's figures
            mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])
            ends = torch.stack([(1 - mean) / std, -mean / std])
        else:
            ends = torch.tensor([[1.0], [-1.0]]).expand(2, 3)
        torch.testing.assert_close(shown["x0"][:, :, 0, 0], ends)
        if changed:
            betas = 1 - torch.tensor(0.9, dtype=torch.float64) ** torch.arange(1, 11)
            assert torch.allclose(1 - shown["schedule"].alpha_bar, betas)
        # A moving average that was moved no step holds the first weights, one less than the last.
        unet, config, classes = generator.load_diffusion(tmp_path / "kept")
        ema = options["ema"]
        assert classes == ("a", "b") and config.target == target
        live = next(options["network"].parameters())
        assert torch.allclose(next(unet.parameters()), live if ema is None else live - 1, atol=1e-6)
        assert (ema is None) == (context.config.diffusion.ema_half_life is None)
        if ema is not None:
            long, short = ema.weight(10**9, 64), ema.weight(128, 64)
            half, ramp = (640, 0.25) if changed else (base.ema_half_life, base.ema_rampup)
            assert long == pytest.approx(1 - 0.5 ** (64 / half))
            assert short == pytest.approx(1 - 0.5 ** (64 / (128 * ramp)))
    # First weights are a function of the run's seed, and of nothing else.
    first, second, third = (next(options["network"].parameters()) for options in seen)
    assert torch.equal(second, third) and not torch.equal(first, second)
