"""What a classifier and an amplifier are shown, trained with and asked, seen from outside."""

import csv
import math
from dataclasses import replace
from statistics import fmean, pstdev
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ddb_fast import checkpoint, classification
from ddb_fast.classification import (
    first_network,
    load_classifier,
    save_classifier,
    score_images,
    train_amplifier,
    train_classifier,
)
from ddb_fast.config import ClassifierConfig, with_fields
from ddb_fast.data.augment import amplifier_view
from ddb_fast.data.samplers import ShuffledSampler
from ddb_fast.data.store import ImageData, Split
from ddb_fast.presets import PRESETS
from ddb_fast.recipes import ERM

CPU = torch.device("cpu")


class Spy(nn.Module):
    """Remembers what it was shown; half-precision logits."""

    def __init__(self):
        super().__init__()
        self.weight, self.shown = nn.Parameter(torch.ones(())), []

    def forward(self, x):
        self.shown.append(x)
        return (self.weight * x.flatten(1)[:, :2]).bfloat16()


@pytest.mark.parametrize("whole", [False, True])
def test_what_the_loss_and_the_loop_are_given(monkeypatch, whole, tmp_path):
    config = ClassifierConfig(
        images=64, batch_size=4, image_size=14, augment="none", pixel_norm="imagenet"
    )
    images = torch.randint(0, 256, (5, 16, 16, 3), dtype=torch.uint8)
    y, index, network, seen = torch.tensor([1, 0, 1, 0, 0]), torch.tensor([4, 2]), Spy(), {}

    def loop(accelerator, trained, loss_of, **options):
        assert trained is network
        seen.update(options, loss=loss_of(network, index))
        return 7.0

    class Recipe(nn.Module):
        def forward(self, *given):
            seen["recipe_given"] = given
            return given[0].sum()

    monkeypatch.setattr(classification, "fit", loop)
    recipe, sampler = Recipe(), ShuffledSampler(5, seed=2)
    given = {"sampler": sampler, "stage": "s", "seed": 3, "clipped": [network], "stop_at": 40}
    seconds = train_classifier(
        SimpleNamespace(
            config=with_fields(PRESETS["digits"](), {"step": "eager", "progress": "false"}),
            accelerator=None,
            device=CPU,
            log=None,
            checkpoints=lambda path: ("kept at", path),
        ),
        network,
        config,
        images,
        y,
        recipe=recipe,
        resume=tmp_path / "resume",
        selection="selection",
        whole=whole,
        **given,
    )
    assert seconds == 7.0
    expected = given | {"config": config, "recipe": recipe, "selection": "selection"}
    expected |= {"checkpoints": ("kept at", tmp_path / "resume"), "step_mode": "eager"}
    assert {name: seen[name] for name in expected} == expected
    assert seen["images_on_host"] is seen["show_progress"] is False
    # The centre of 16 pixels in 14 is a plain crop; ImageNet's figures are torchvision's.
    pixels = images.permute(0, 3, 1, 2).float()
    pixels = amplifier_view(pixels, 14) if whole else pixels[:, :, 1:15, 1:15]
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
    torch.testing.assert_close(network.shown[0], ((pixels / 255 - mean) / std)[index])
    logits, labels, positions = seen["recipe_given"]
    assert logits.dtype == torch.float32 and seen["loss"].requires_grad
    assert labels.tolist() == [0, 1] and torch.equal(positions, index)
    # Asked once more at the end, of the same view.
    torch.testing.assert_close(network.shown[1], (pixels / 255 - mean) / std)


CHOSEN = {
    "amplifier.model": "mlp",
    "amplifier.width": "4",
    "amplifier.image_size": "4",
    "pseudo_labels.gamma": "1",
    "pseudo_labels.stats_over": "all",
    "seed": "6",
}


def split(y, codes):
    """Images whose first small pixel tells, and whose large ones tell nothing."""
    paths = tuple(f"{y}_{code}.png" for y, code in zip(y, codes, strict=True))
    small, large = (torch.zeros(len(y), 4, 4, 3, dtype=torch.uint8) for _ in range(2))
    small[:, 0, 0, 0] = torch.tensor(codes)
    return Split(paths=paths, y=torch.tensor(y), a=None, small=small, large=large)


TRAIN = ([0, 0, 0, 0, 1, 1, 1, 1], [90, 80, 95, 140, 130, 125, 111, 60])
VAL = ([0, 0, 1], [110, 70, 85])


@pytest.fixture
def context():
    config = with_fields(PRESETS["digits"](), CHOSEN)
    data = ImageData(
        name="n",
        classes=("a", "b"),
        biases=None,
        splits={"train": split(*TRAIN), "val": split(*VAL)},
        fingerprint="",
    )
    accelerator = SimpleNamespace(is_main_process=True)
    return SimpleNamespace(config=config, data=data, device=CPU, accelerator=accelerator)


@pytest.mark.parametrize("real", [False, True])
def test_an_amplifier_sees_synthetic_images_alone_unless_it_is_the_control(
    monkeypatch, context, tmp_path, real
):
    seen = {}

    def trained(context, network, config, images, y, **options):
        seen.update(options, config=config, images=images, y=y, network=network)
        return 7.0

    monkeypatch.setattr(classification, "train_classifier", trained)
    made = torch.randint(0, 256, (6, 3, 4, 4), dtype=torch.uint8)
    labels = torch.tensor([1, 0, 0, 1, 0, 1])
    checkpoint.save_tensors(tmp_path / "i.safetensors", {"images": made, "labels": labels}, {})
    source = None if real else tmp_path / "i.safetensors"
    assert train_amplifier(context, source, tmp_path, tmp_path / "resume") == 7.0
    train = context.data.splits["train"]
    images, y = (train.small, train.y) if real else (made.permute(0, 2, 3, 1), labels)
    assert torch.equal(seen["images"], images) and torch.equal(seen["y"], y)
    assert seen["config"] is context.config.amplifier and seen["whole"] is True
    assert seen["seed"] == 6 and isinstance(seen["recipe"], ERM)
    assert seen["resume"] == tmp_path / "resume" and ("real" in seen["stage"]) == real
    expected = ShuffledSampler(len(y), seed=6).batch(0, 20)
    assert torch.equal(seen["sampler"].batch(0, 20), expected)
    network, config, classes = load_classifier(tmp_path / "model.safetensors")
    first = first_network(context.config.amplifier, 2, seed=6).state_dict()
    assert all(torch.equal(t, first[name]) for name, t in network.state_dict().items())
    assert config == context.config.amplifier and classes == ("a", "b")


def test_scores_of_every_split_by_the_training_images_statistics(monkeypatch, context, tmp_path):
    """Logits 0 and m, whose cross-entropies are log(1 + exp(m)) and log(1 + exp(-m))."""

    def margin(code):
        return (code - 100) / 10

    def logits(network, images, config, *, device, crop):
        assert not crop
        m = (images[:, 0, 0, 0].double() - 100) / 10
        return torch.stack([torch.zeros_like(m), m], 1)

    monkeypatch.setattr(classification, "logits_of", logits)
    config = context.config.amplifier
    save_classifier(
        tmp_path / "m.safetensors", first_network(config, 2, seed=0), config, ("a", "b")
    )
    score_images(context, tmp_path / "m.safetensors", tmp_path / "scores.csv")
    with (tmp_path / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    cases = [("train", y, c) for y, c in zip(*TRAIN, strict=True)]
    cases += [("val", y, c) for y, c in zip(*VAL, strict=True)]
    losses = [math.log1p(math.exp(margin(c) * (1 if y == 0 else -1))) for _, y, c in cases]
    of_class = [[x for x, y in zip(losses, TRAIN[0], strict=False) if y == n] for n in (0, 1)]
    assert len(rows) == len(cases)
    marked = []
    for row, (name, y, code), loss in zip(rows, cases, losses, strict=True):
        mean, std = fmean(of_class[y]), pstdev(of_class[y])
        predicted = int(code > 100)
        assert (row["split"], row["path"], row["y"]) == (name, f"{y}_{code}.png", str(y))
        assert row["predicted"] == str(predicted)
        assert float(row["loss"]) == pytest.approx(loss, rel=1e-6)
        assert float(row["score"]) == pytest.approx((loss - mean) / std, rel=1e-5, abs=1e-6)
        conflicting = predicted != y and loss > mean + std
        assert row["pseudo_conflicting"] == str(int(conflicting))
        marked.append(conflicting)
    # At gamma 3 none of the eight would pass, and the errors would be taken.
    assert marked == [i in (3, 7) for i in range(len(cases))]
    other = replace(context.data, classes=("b", "a"))
    context.data = other
    with pytest.raises(ValueError, match="are not those of the data"):
        score_images(context, tmp_path / "m.safetensors", tmp_path / "scores.csv")
