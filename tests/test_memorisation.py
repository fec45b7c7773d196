"""Copies of training images among generated ones: found, counted fairly, in bounded memory."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from ddb_fast import checkpoint, memorisation
from ddb_fast.classification import first_network, load_classifier, save_classifier
from ddb_fast.config import ClassifierConfig
from ddb_fast.data.augment import amplifier_view
from ddb_fast.data.store import ImageData, Split
from ddb_fast.memorisation import check_memorisation

CLASSES = ("cats", "dogs", "owls")
TRAINED, FRESH = 300, 400
MODES = 25


def drawn(count, seed, spread=1.0):
    """Images of three classes, (count, 12, 12, 3) uint8, from one smooth distribution a class."""
    generator = np.random.default_rng(0)
    middle = generator.uniform(90, 160, (3, 12, 12, 3))
    modes = generator.normal(size=(3, MODES, 12, 12, 3)) * 6
    generator = np.random.default_rng(seed)
    y = np.arange(count) % 3
    weights = spread * generator.normal(size=(count, MODES))
    images = middle[y] + np.einsum("nm,nmhwc->nhwc", weights, modes[y])
    return torch.tensor(images.round().clip(0, 255).astype(np.uint8)), torch.tensor(y)


def features(images):
    """What an untrained layer makes of them."""
    weights = torch.randn(12 * 12 * 3, 40, generator=torch.Generator().manual_seed(1))
    return (images.flatten(1).float() @ weights / 100).relu()


def checked(images, y, *, real=None, held_out=None, features=features):
    train, labels = real or drawn(TRAINED, 1)
    return check_memorisation(
        images.permute(0, 3, 1, 2),
        y,
        train,
        labels,
        paths=[f"train/{i}.png" for i in range(len(train))],
        classes=CLASSES,
        features=features,
        held_out=held_out,
    )


@pytest.mark.parametrize("block", [2048, 32])
def test_distances_are_scikit_learns(monkeypatch, block):
    monkeypatch.setattr(memorisation, "CHUNK", block)
    real, queries = drawn(90, 1)[0].flatten(1), drawn(70, 2)[0].flatten(1)
    distances, numbers = memorisation.nearest(queries, real, 11)
    search = NearestNeighbors(algorithm="brute").fit(real.double().numpy())
    expected, rows = search.kneighbors(queries.double().numpy(), 11)
    np.testing.assert_allclose(distances, expected, rtol=1e-12)
    assert (numbers.numpy() == rows).all()
    # Each image among the others: scikit-learn counts it as its own nearest.
    own = torch.arange(90).flip(0)[:50]
    distances, numbers = memorisation.nearest(real[own], real, 11, own=own)
    expected, rows = search.kneighbors(real[own].double().numpy(), 12)
    np.testing.assert_allclose(distances, expected[:, 1:], rtol=1e-12)
    assert (numbers.numpy() == rows[:, 1:]).all()


def test_a_copy_is_at_distance_zero_and_numbers_never_exceed_the_images():
    real = drawn(12, 1)[0].flatten(1)
    distances, numbers = memorisation.nearest(real, real, 50)
    assert (distances[:, 0] == 0).all() and (numbers[:, 0] == torch.arange(12)).all()
    assert distances.shape == (12, 12)


def test_ratios_limits_and_flags_are_those_worked_out_with_scikit_learn():
    train, y = drawn(TRAINED, 1)
    copies = train[:30].clone()
    copies[:, 3:6] = copies[:, 3:6] // 2 + 60
    shown, labels = torch.cat([drawn(45, 2)[0], copies]), torch.cat([y[:45], y[:30]])
    answer = checked(shown, labels)
    pairs = {pair["synthetic"]: pair for pair in answer["pairs"]}
    seen, flags = {}, 0
    for label, name in enumerate(CLASSES):
        real = train[y == label].flatten(1).double().numpy()
        queries = shown[labels == label].flatten(1).double().numpy()
        search = NearestNeighbors(algorithm="brute").fit(real)
        own, rows = (found[:, 1:] for found in search.kneighbors(real, 12))
        ratios = np.sort(own[:, 0] / own[:, 1:].mean(1))
        # 100 images a class: the limit is their smallest ratio.
        between = features(train[y == label]).double().numpy()
        limit = ratios[0], np.sort(np.linalg.norm(between - between[rows[:, 0]], axis=1))[49]
        distances, rows = search.kneighbors(queries, 11)
        apart = features(shown[labels == label]).double().numpy() - between[rows[:, 0]]
        for i, number in enumerate((labels == label).nonzero()[:, 0].tolist()):
            ratio = distances[i, 0] / distances[i, 1:].mean()
            feature = np.linalg.norm(apart[i])
            flagged = ratio < limit[0] and feature <= limit[1]
            flags += flagged
            seen[number] = ratio
            if number in pairs:
                pair = pairs[number]
                assert pair["class"] == name and pair["flagged"] == flagged
                assert pair["real"] == (y == label).nonzero()[rows[i, 0], 0]
                assert pair["ratio"] == pytest.approx(ratio)
                assert pair["ratio_limit"] == pytest.approx(limit[0])
                assert pair["distance"] == pytest.approx(distances[i, 0] / 432**0.5)
                assert pair["feature"] == pytest.approx(feature, rel=1e-4)
                assert pair["feature_limit"] == pytest.approx(limit[1], rel=1e-4)
    assert answer["generated"]["flagged"] == flags and 0 < flags < 75
    assert len(pairs) == memorisation.PAIRS
    order = [(not pair["flagged"], pair["ratio"]) for pair in answer["pairs"]]
    assert order == sorted(order)


CHANGES = {
    "exact": lambda images: images,
    "noise": lambda images: images + 4 * torch.randn(images.shape),
    "brighter": lambda images: images + 8.0,
}


@pytest.mark.parametrize("change", CHANGES)
def test_planted_copies_are_found_with_their_original(change):
    torch.manual_seed(0)
    train, y = drawn(TRAINED, 1)
    shown, labels = drawn(FRESH, 2)
    copies = torch.arange(0, TRAINED, 10)
    shown[: len(copies)] = CHANGES[change](train[copies].float()).round().clamp(0, 255).byte()
    labels[: len(copies)] = y[copies]
    answer = checked(shown, labels, held_out=("val", *drawn(FRESH, 3)))
    found = {p["synthetic"]: p for p in answer["pairs"] if p["flagged"]}
    assert set(range(len(copies))) <= set(found)
    for number, original in enumerate(copies.tolist()):
        assert found[number]["real"] == original
        assert found[number]["path"] == f"train/{original}.png"
    assert answer["generated"]["flagged"] <= len(copies) + 0.02 * FRESH
    assert answer["excess"] is True


def test_fresh_images_are_flagged_no_more_often_than_stated():
    """Twelve sets of 900 images that copy nothing, each against training images of its own."""
    flagged = compared = 0
    for seed in range(12):
        real = drawn(TRAINED, 100 + seed)
        control = ("test", *drawn(FRESH, 300 + seed))
        answer = checked(*drawn(900, 200 + seed), real=real, held_out=control)
        assert answer["expected_share"] == pytest.approx(1 / 101)
        assert answer["excess"] is False
        assert answer["held_out"]["split"] == "test"
        flagged += answer["generated"]["flagged"]
        compared += answer["generated"]["compared"]
    assert compared == 12 * 900
    # At most 107 expected; binomial, three standard deviations.
    assert 0 < flagged <= 107 + 3 * 107**0.5


def test_chance_is_what_exchangeable_images_give():
    """Against counting: of n + m ratios alike, how many of the m are below the r-th of the n."""
    generator = np.random.default_rng(1)
    counts = ((100, 1, 12), (100, 1, 12), (200, 9, 900))
    flagged = np.zeros(4000)
    for compared, rank, n in counts:
        alike = generator.random((4000, n + compared))
        limits = np.sort(alike[:, :n], 1)[:, rank - 1]
        flagged += (alike[:, n:] < limits[:, None]).sum(1)
    mean, most = memorisation.chance(counts)
    assert mean == pytest.approx(flagged.mean() / 400, rel=0.05)
    assert most == pytest.approx(np.quantile(flagged, 0.975) / 400, rel=0.05)
    assert memorisation.chance(counts) == (mean, most), "always the same draws"


@pytest.mark.parametrize("held_out", (False, True))
def test_small_classes_are_no_copies(held_out):
    """A large class and two of a dozen images, as many generated of each: chance, not copying."""
    found = []
    for seed in range(6):
        (train, y), (shown, labels) = drawn(TRAINED, seed), drawn(FRESH, 100 + seed)
        kept = (y == 0) | (torch.arange(TRAINED) < 36)
        fresh, of = drawn(FRESH, 200 + seed)
        # Held out as the classes are: mostly of the large one.
        few = (of == 0) | (torch.arange(FRESH) < 12)
        control = ("val", fresh[few], of[few]) if held_out else None
        # Features that tell nothing leave it to the pixels.
        found.append(
            checked(
                shown, labels, real=(train[kept], y[kept]), held_out=control,
                features=lambda images: torch.zeros(len(images), 1),
            )
        )  # fmt: skip
    assert sum(answer["excess"] is not False for answer in found) <= 1
    shares = [answer["generated"]["low"] > answer["expected_share"] for answer in found]
    assert any(shares), "an interval that counts each image by itself would call this copying"


def test_images_without_variety_are_no_copies():
    """Halfway to the class's mean they are nearer to real images than those are to each other."""
    shown, labels = drawn(FRESH, 2, spread=0.5)
    answer = checked(shown, labels)
    train, y = drawn(TRAINED, 1)
    distances = torch.cdist(shown.flatten(1).double(), train.flatten(1).double())
    distances[labels[:, None] != y] = torch.inf
    own = torch.cdist(train.flatten(1).double(), train.flatten(1).double())
    own.fill_diagonal_(torch.inf)
    own[y[:, None] != y] = torch.inf
    nearer = distances.min(1).values < own.min(1).values.quantile(0.01)
    assert nearer.double().mean() > 0.25, "the plain rule would call these copies"
    assert answer["generated"]["share"] < 0.02 and not answer["excess"]


def test_the_amplifier_has_to_see_the_same_two():
    train, y = drawn(TRAINED, 1)
    mark = train[:60].clone()
    mark[:, 0, 0] = 255

    def apart(images):
        return features(images) + 100 * (images[:, :1, 0, 0] == 255)

    assert checked(mark, y[:60])["generated"]["share"] > 0.9
    assert checked(mark, y[:60], features=apart)["generated"]["flagged"] == 0
    # Features that tell nothing forbid nothing.
    flat = checked(mark, y[:60], features=lambda images: torch.zeros(len(images), 4))
    assert flat["generated"]["share"] > 0.9


def test_repeated_training_images_count_once_and_their_copies_are_found():
    train, y = drawn(TRAINED, 1)
    twice = torch.cat([train, train]), torch.cat([y, y])
    shown, labels = drawn(FRESH, 2)
    shown[:20], labels[:20] = train[:20], y[:20]
    once, answer = checked(shown, labels), checked(shown, labels, real=twice)
    assert answer["real"] == {"total": 600, "compared": 300, "duplicates": 300, "left_out": 0}
    assert answer["pairs"] == once["pairs"] and answer["generated"] == once["generated"]
    assert {p["synthetic"] for p in answer["pairs"] if p["flagged"]} >= set(range(20))


def test_what_is_left_out_is_stated(monkeypatch):
    monkeypatch.setattr(memorisation, "REAL", 60)
    monkeypatch.setattr(memorisation, "QUERIES", 40)
    answer = checked(*drawn(FRESH, 2), held_out=("val", *drawn(150, 3)))
    assert answer["real"] == {"total": 300, "compared": 180, "duplicates": 0, "left_out": 120}
    assert (answer["generated"]["total"], answer["generated"]["compared"]) == (400, 120)
    assert (answer["held_out"]["total"], answer["held_out"]["compared"]) == (150, 120)
    assert answer["expected_share"] == pytest.approx(1 / 41)
    assert sum(answer["histograms"]["ratio"]["train"]) == 120


def test_larger_images_are_averaged_down():
    """A grain that averages to nothing, +-60 from pixel to pixel, hides no copy at 64 pixels."""
    generator = torch.Generator().manual_seed(0)
    train = torch.randint(70, 180, (90, 32, 32, 3), generator=generator, dtype=torch.uint8)
    large = train.repeat_interleave(2, 1).repeat_interleave(2, 2)
    y = torch.arange(90) % 3
    grain = torch.tensor([[60, -60], [-60, 60]]).repeat(32, 32)[:, :, None]
    grained = (large[:30].int() + grain).to(torch.uint8)

    def seen(images):
        return images[:, 0].flatten(1).float()

    answer = checked(grained, y[:30], real=(large, y), features=seen)
    assert answer["side"] == 32
    assert {p["synthetic"]: p["real"] for p in answer["pairs"]} == {i: i for i in range(30)}
    assert {p["distance"] for p in answer["pairs"]} == {0.0}
    assert checked(*drawn(30, 2))["side"] == 12


def test_a_class_of_two_images_is_named_and_not_compared():
    train, y = drawn(TRAINED, 1)
    kept = (y != 2) | (torch.arange(TRAINED) < 6)
    answer = checked(*drawn(FRESH, 2), real=(train[kept], y[kept]))
    assert answer["classes_skipped"] == ["owls"]
    assert answer["generated"]["compared"] == 267 and answer["generated"]["total"] == 400
    nothing = checked(*drawn(FRESH, 2), real=(train[:6], y[:6]), held_out=("val", *drawn(9, 3)))
    assert nothing["classes_skipped"] == list(CLASSES) and nothing["held_out"] is None
    assert nothing["generated"]["share"] is nothing["expected_share"] is None
    assert nothing["excess"] is False and nothing["pairs"] == []


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"generated images of \(6, 12\) pixels, real ones of"):
        checked(drawn(10, 2)[0][:, :6], torch.zeros(10, dtype=torch.int64))


def test_the_answer_is_json_and_the_histograms_count_every_image():
    answer = checked(*drawn(FRESH, 2), held_out=("val", *drawn(150, 3)))
    assert json.loads(json.dumps(answer, allow_nan=False)) == answer
    for bins in answer["histograms"].values():
        assert {name: sum(counts) for name, counts in bins.items()} == {
            "train": 300, "generated": 400, "held_out": 150,
        }  # fmt: skip
        assert all(len(counts) == memorisation.BINS for counts in bins.values())
    # The limit is the first training image's ratio: 1 of 100 is not below it.
    below = answer["histograms"]["ratio"]["train"][: round(1 / memorisation.WIDTH)]
    assert sum(below) == 0


def test_the_stage_reads_a_run_and_writes_one_file(tmp_path):
    config = ClassifierConfig(
        images=1, batch_size=1, image_size=8, model="cnn", width=4, pixel_norm="symmetric"
    )
    save_classifier(
        tmp_path / "model.safetensors", first_network(config, 3, seed=0), config, CLASSES
    )
    train, y = drawn(TRAINED, 1)
    shown, labels = drawn(60, 2)
    shown[:9] = train[:9]
    tensors = {"images": shown.permute(0, 3, 1, 2), "labels": labels, "seeds": labels}
    checkpoint.save_tensors(tmp_path / "images.safetensors", tensors, {})

    def split(images, y, name):
        paths = tuple(f"{name}/{i}.png" for i in range(len(y)))
        return Split(paths=paths, y=y, a=None, small=images, large=images[:, :1, :1])

    splits = {"train": split(train, y, "train"), "val": split(*drawn(30, 3), "val")}
    splits["test"] = split(*drawn(45, 4), "test")
    data = ImageData(name="n", classes=CLASSES, biases=None, splits=splits, fingerprint="")
    context = SimpleNamespace(data=data, device=torch.device("cpu"))

    def written():
        files = tmp_path / "images.safetensors", tmp_path / "model.safetensors"
        memorisation.memorisation(context, *files, tmp_path / "run" / "memorisation.json")
        return (tmp_path / "run" / "memorisation.json").read_text()

    answer = json.loads(written())
    assert written() == json.dumps(answer, indent=1) + "\n"
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["memorisation.json"]
    assert (answer["held_out"]["split"], answer["held_out"]["total"]) == ("val", 30)
    exact = [p for p in answer["pairs"] if p["distance"] == 0]
    assert [(p["synthetic"], p["path"]) for p in exact] == [(i, f"train/{i}.png") for i in range(9)]
    assert all(p["flagged"] and p["feature"] == pytest.approx(0, abs=1e-4) for p in exact)
    # The amplifier is shown whole images.
    network, _, _ = load_classifier(tmp_path / "model.safetensors")
    inputs = []
    last = [m for m in network.modules() if isinstance(m, torch.nn.Linear)][-1]
    last.register_forward_hook(lambda module, given, _: inputs.append(given[0]))
    pair = answer["pairs"][20]
    both = torch.stack([shown[pair["synthetic"]], train[pair["real"]]])
    with torch.no_grad():
        network(amplifier_view(both.permute(0, 3, 1, 2), 8) / 127.5 - 1)
    apart = (inputs[0][0] - inputs[0][1]).norm().item()
    assert pair["feature"] == pytest.approx(apart, rel=1e-4)
    del splits["val"]
    assert json.loads(written())["held_out"]["split"] == "test"
    del splits["test"]
    assert json.loads(written())["held_out"] is None
