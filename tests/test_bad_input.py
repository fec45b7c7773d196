"""What a person can get wrong: one clear line on standard error, exit 2, and nothing lost."""

import fcntl
import functools
import importlib.util
import resource
import shutil
import sys
import types
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import tracking
from accelerate.state import AcceleratorState
from accelerate.tracking import GeneralTracker
from accelerate.utils import LoggerType
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import small
from ddb_fast import cli, train
from ddb_fast.config import with_fields
from ddb_fast.data.samplers import ShuffledSampler
from ddb_fast.data.store import ImageData, Split
from ddb_fast.feasible import check_feasible, check_labels
from ddb_fast.generator import build_unet, save_diffusion
from ddb_fast.kernels import dispatch
from ddb_fast.models.classifiers import build_classifier
from ddb_fast.presets import PRESETS
from ddb_fast.run_folder import lock_folder
from ddb_fast.train import main

WORDS = "--diffusion.images 64 --amplifier.images 64 --classifier.images 64 --progress false"


@pytest.fixture(autouse=True)
def one_process_many_runs(monkeypatch):
    """`main` is called in this process, which is quicker than a process each."""
    monkeypatch.setattr("logging.basicConfig", lambda **_: None)
    AcceleratorState._reset_state(reset_partial_state=True)


def refused(capsys, *argv):
    """Run in this process; assert one line and exit 2; return the line."""
    try:
        code = main(list(map(str, argv)), prog="ddb-fast run")
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    assert code == 2, captured.err
    lines = [line for line in captured.err.splitlines() if line.startswith("ddb-fast run: ")]
    assert len(lines) == 1, captured.err
    assert "Traceback" not in captured.err
    return lines[0]


def photo(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def photos(root, classes=("cat", "dog"), count=6):
    for label in classes:
        for i in range(count):
            photo(root / label / f"{i}.png", seed=i)
    return root


def test_a_path_that_is_not_there(capsys, tmp_path):
    line = refused(capsys, "tiny", "--data", tmp_path / "absent", "--out", tmp_path / "out")
    assert "absent" in line
    assert not (tmp_path / "out").exists()


def test_an_empty_folder(capsys, tmp_path):
    (tmp_path / "photos").mkdir()
    line = refused(capsys, "tiny", "--data", tmp_path / "photos", "--out", tmp_path / "out")
    assert "photos" in line


def test_one_class_only(capsys, tmp_path):
    root = photos(tmp_path / "photos", classes=("cat",))
    assert "cat" in refused(capsys, "tiny", "--data", root, "--out", tmp_path / "out")


def test_a_class_without_training_images(capsys, tmp_path):
    photos(tmp_path / "photos" / "train")
    photos(tmp_path / "photos" / "test", classes=("cat", "dog", "fox"))
    line = refused(capsys, "tiny", "--data", tmp_path / "photos", "--out", tmp_path / "out")
    assert "fox" in line and "train" in line


def test_a_run_within_its_images(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(photos(tmp_path / "photos"))
    line = refused(capsys, "tiny", "--data", ".", "--out", "runs/a")
    assert "runs/a lies within the images" in line
    assert not (tmp_path / "photos" / "runs").exists()


def test_a_corrupt_image_is_named_with_the_choice_to_skip_and_then_skipped(capsys, tmp_path):
    root = photos(tmp_path / "photos")
    broken = root / "cat" / "broken.png"
    broken.write_bytes(photo(tmp_path / "whole.png").read_bytes()[:200])
    command = ["tiny", "--data", root, "--out", tmp_path / "out", *WORDS.split()]
    line = refused(capsys, *command)
    assert "broken.png" in line and "--data.corrupt skip" in line
    words = [str(w) for w in command]
    small_enough = "--methods erm --data.corrupt skip --threads 1"
    assert main([*words, *small_enough.split()], prog="ddb-fast run") == 0
    assert (tmp_path / "out" / "results.json").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("path,label\na.png,0\n", ["no column `y`"]),
        ("y\n0\n", ["no column `path`"]),
        ("path,y\na.png,0\nmissing.png,1\n", ["line 3: no file", "missing.png"]),
        ("path,y\na.png,0\nb.png,2\n", ["1 is missing"]),
        ("path,y\na.png,cat\nb.png,dog\n", ["y is 'cat'"]),
        ("path,y\na.png,-1\nb.png,0\n", ["-1 is negative"]),
        ("path,y,split\na.png,0,train\nb.png,1,holdout\n", ["split is 'holdout'"]),
        ("path,y,a\na.png,0,red\nb.png,1,0\n", ["a is 'red'"]),
        ("", ["no column `path`"]),
    ],
)
def test_a_csv_that_is_wrong(capsys, tmp_path, content, words):
    for name in ("a.png", "b.png"):
        photo(tmp_path / name)
    table = tmp_path / "table.csv"
    table.write_text(content)
    line = refused(capsys, "tiny", "--data", table, "--out", tmp_path / "out")
    assert all(word in line for word in words), line


def test_an_unknown_preset(capsys, tmp_path):
    assert "digits" in refused(capsys, "tinny", "--out", tmp_path)


@pytest.mark.parametrize("source", ["auto", "folder", "csv", "bar", "urbancars", "imagenet-9"])
def test_a_rho_for_images_that_are_read_as_they_are(capsys, tmp_path, source):
    command = ["tiny", "--data", photos(tmp_path / "photos"), "--data.source", source]
    line = refused(capsys, *command, "--data.rho", "0.9", "--out", tmp_path / "out")
    assert f"data.rho: images are read as they are (source {source}); rho is for digits" in line
    assert not (tmp_path / "out").exists()


def test_a_rho_for_the_digits_preset_on_a_folder(capsys, tmp_path):
    command = ["digits", "--data", photos(tmp_path / "photos"), "--data.rho", "0.9"]
    assert "(source auto)" in refused(capsys, *command, "--out", tmp_path / "out")


def test_true_groups_without_bias_labels(capsys, tmp_path):
    root = photos(tmp_path / "photos")
    command = ["tiny", "--data", root, "--out", tmp_path / "out", "--methods", "group-dro"]
    assert "column `a`" in refused(capsys, *command)


def with_groups(train, val):
    """Decoded data of two classes and biases; images of each group 2 * y + a in the splits."""
    splits = {}
    for name, counts in (("train", train), ("val", val)):
        ids = torch.arange(4).repeat_interleave(torch.tensor(counts))
        pixels = torch.zeros((len(ids), 2, 2, 3), dtype=torch.uint8)
        paths = tuple(f"{name}{i}.png" for i in range(len(ids)))
        splits[name] = Split(paths=paths, y=ids // 2, a=ids % 2, small=pixels, large=pixels)
    return ImageData(
        name="faces",
        classes=("young", "old"),
        biases=("female", "male"),
        splits=splits,
        fingerprint="",
    )


NEEDS_GROUPS = [
    ({"selection": "worst_group_accuracy"}, "selection worst_group_accuracy"),
    ({"selection": "unbiased_accuracy"}, "selection unbiased_accuracy"),
    ({"methods": "erm dfr"}, "method dfr"),
]


@pytest.mark.parametrize(("fields", "what"), NEEDS_GROUPS)
def test_a_validation_split_without_aligned_or_conflicting_images(fields, what):
    config = with_fields(PRESETS["tiny"](), fields)
    for val, lacking in (((20, 0, 0, 20), "conflicting"), ((0, 20, 20, 0), "aligned")):
        with pytest.raises(ValueError, match=f"^{what} needs .* validation split.* {lacking}") as e:
            check_labels(config, with_groups((30, 2, 2, 30), val))
        assert "\n" not in str(e.value)
    for aside in ({"selection": "average_accuracy"}, {"methods": "erm"}):
        check_labels(
            with_fields(PRESETS["tiny"](), aside), with_groups((30, 2, 2, 30), (20, 0, 0, 20))
        )


@pytest.mark.parametrize(("fields", "what"), NEEDS_GROUPS)
def test_a_small_validation_group_is_named(caplog, fields, what):
    config = with_fields(PRESETS["tiny"](), fields)
    check_labels(config, with_groups((30, 2, 2, 30), (20, 10, 10, 20)))
    check_labels(config, with_groups((30, 0, 2, 30), (20, 0, 10, 20)))
    assert not caplog.records, "ten are enough, and a group that training lacks is none"
    check_labels(config, with_groups((30, 2, 2, 30), (20, 1, 9, 20)))
    (record,) = caplog.records
    assert record.levelname == "WARNING" and record.getMessage().startswith(what)
    assert "y=young a=male has 1 image" in record.getMessage()


def test_an_output_folder_with_somebody_elses_files(capsys, tmp_path):
    precious = tmp_path / "thesis.txt"
    precious.write_text("four years")
    assert "--out" in refused(capsys, "digits", "--out", tmp_path)
    assert precious.read_text() == "four years"


def test_fp16_without_a_gpu(capsys, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert "fp16" in refused(capsys, "digits", "--out", tmp_path / "out", "--precision", "fp16")


def test_data_that_changed_under_a_run(capsys, tmp_path):
    root, out = photos(tmp_path / "photos"), tmp_path / "out"
    words = ["tiny", "--data", str(root), "--out", str(out), "--methods", "erm", *WORDS.split()]
    assert main(words, prog="ddb-fast run") == 0
    kept = (out / "results.json").read_bytes()
    photo(root / "cat" / "new.png")
    line = refused(capsys, *words)
    assert "the images, labels or splits are not those that it began with. Name another" in line
    assert "fingerprint" not in line
    assert (out / "results.json").read_bytes() == kept


def test_a_refused_method_binds_nobody_to_the_labels_it_lacked(capsys, tmp_path):
    root, out = photos(tmp_path / "photos"), tmp_path / "out"
    rows = [f"{name}/{i}.png,{y}" for y, name in enumerate(("cat", "dog")) for i in range(6)]
    table = root / "lab.csv"
    table.write_text("\n".join(["path,y", *rows]))
    words = ["tiny", "--data", str(table), "--out", str(out), "--methods", "group-dro"]
    words += [*WORDS.split(), "--data.validation_share", "0"]
    assert "needs bias labels" in refused(capsys, *words)
    AcceleratorState._reset_state(reset_partial_state=True)
    rows = [f"{row},{i % 2}" for i, row in enumerate(rows)]
    table.write_text("\n".join(["path,y,a", *rows]))
    assert main(words, prog="ddb-fast run") == 0, capsys.readouterr().err


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    """A run whose generator can be handed to others."""
    out = tmp_path_factory.mktemp("generator") / "run"
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main([*small.arguments(out, diffusion__images="64", methods="ddb-ii")], prog="x") == 0
    return out


def test_a_generator_that_is_none(capsys, tmp_path, generator):
    out = tmp_path / "out"
    line = refused(capsys, *small.arguments(out, generator=tmp_path / "absent"))
    assert "absent" in line
    line = refused(capsys, *small.arguments(out, generator=generator / "amplifier"))
    assert "not a diffusion model" in line


def test_a_generator_of_other_classes(capsys, tmp_path, generator):
    root = photos(tmp_path / "photos")
    command = ["digits", "--data", root, "--diffusion", generator / "diffusion"]
    assert "10 classes" in refused(capsys, *command, "--out", tmp_path / "out")


def test_a_checkpoint_of_another_shape(capsys, tmp_path, generator):
    """Somebody copied a generator's weights over another's."""
    from ddb_fast import checkpoint

    folder = tmp_path / "diffusion"
    shutil.copytree(generator / "diffusion", folder)
    path = folder / "model.safetensors"
    tensors, metadata = checkpoint.load_tensors(path)
    name = next(n for n, t in tensors.items() if t.ndim == 4)
    checkpoint.save_tensors(path, {**tensors, name: tensors[name][:, :1]}, metadata)
    line = refused(capsys, *small.arguments(tmp_path / "out", generator=folder))
    assert "a checkpoint of another shape" in line and name in line


def test_a_stage_that_fails_late_keeps_the_binding_of_its_unfinished_work(capsys, tmp_path):
    words = small.arguments(tmp_path / "out", methods="ddb-ii")

    class Failing(ShuffledSampler):
        def batch(self, step, batch_size):
            if step == 15:
                raise ValueError("late")
            return super().batch(step, batch_size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ddb_fast.generator.ShuffledSampler", Failing)
        assert "late" in refused(capsys, *words)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert "diffusion.lr is" in refused(capsys, *words, "--diffusion.lr", "0.1")


def test_an_interrupted_run_says_how_to_go_on(capsys, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("ddb_fast.pipeline.train_diffusion", interrupt)
    words = small.arguments(tmp_path / "out", methods="ddb-ii")
    assert main(words, prog="ddb-fast run") == 130
    assert capsys.readouterr().err.strip().endswith("the same command continues")


@pytest.mark.parametrize(
    "command", ["run digits", "score RUN", "sample RUN --out o", "data photos"]
)
def test_an_interrupted_command_says_so_in_one_line(capsys, monkeypatch, command):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    for place in ("train.parse_run", "provenance.FinishedRun.open", "data.sources.open_listing"):
        monkeypatch.setattr(f"ddb_fast.{place}", interrupt)
    monkeypatch.setattr("ddb_fast.use_run._prepare", interrupt)
    name, *words = command.split()
    assert cli.main([name, *words]) == 130
    assert capsys.readouterr().err == f"ddb-fast {name}: interrupted\n"


def test_a_folder_in_which_another_process_runs(capsys, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with (out / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another process" in refused(capsys, *small.arguments(out))


def test_processes_that_do_not_see_the_same_manifest(capsys, tmp_path, monkeypatch):
    """They compare what they read once the folder is locked."""
    out = tmp_path / "out"

    def differ(_, seen, what):
        with pytest.raises(ValueError, match="another process"):
            lock_folder(out)
        raise ValueError(f"{what}: {seen}")

    monkeypatch.setattr("ddb_fast.pipeline.agree", differ)
    assert refused(capsys, *small.arguments(out)).endswith("manifest.json: {}")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--classifier.model vgg", "vgg"),
        ("--amplifier.image_size 4", "8 pixels"),
        ("--classifier.weights absent.safetensors", "absent.safetensors"),
        ("--classifier.weights imagenet", "no 'imagenet' weights for cnn"),
        ("--sampling.steps 2000", "2000"),
        ("--diffusion.unet.norm_groups 7", "norm_groups 7"),
        ("--diffusion.image_size 15", "sides must be multiples of 2"),
        ("--diffusion.unet.channels 256 --diffusion.unet.head_channels none", "head dimension"),
        ("--classifier.batch_size 10 --classifier.accumulate 4", "classifier.batch_size 10"),
        ("--tracker wandb", "wandb"),
    ],
)
def test_what_would_fail_hours_later_is_refused_at_once(capsys, tmp_path, words, told):
    if "wandb" in words and importlib.util.find_spec("wandb"):
        pytest.skip("wandb is installed")
    out = tmp_path / "out"
    assert told in refused(capsys, *small.arguments(out), *words.split())
    assert not out.exists()


def test_a_generator_that_cannot_run_is_refused_at_once(capsys, tmp_path):
    config = PRESETS["digits"]().diffusion
    config = replace(config, image_size=15, unet=replace(config.unet, channels=16))
    weights = build_unet(config, 10).state_dict()
    save_diffusion(tmp_path / "diffusion", weights, config, tuple(map(str, range(10))))
    words = small.arguments(tmp_path / "out", generator=tmp_path / "diffusion")
    assert "images of 15x15 pixels" in refused(capsys, *words)
    assert not (tmp_path / "out").exists()


def with_weights(path, **fields):
    config = PRESETS["digits"]()
    return replace(
        config, classifier=replace(config.classifier, weights=str(path), **fields), seeds=(0, 1)
    )


def test_weights_are_read_before_anything_is_trained(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file({"fc.weight": torch.zeros(10, 96)}, path)
    with pytest.raises(ValueError, match=r"weights\.safetensors does not fit the network: missing"):
        check_feasible(with_weights(path), num_classes=10, world=1)


def test_a_head_of_other_classes_is_told_once(caplog, tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file(build_classifier("cnn", 7, image_size=16, width=24).state_dict(), path)
    with caplog.at_level("INFO"):
        check_feasible(with_weights(path), num_classes=10, world=1)
        check_feasible(with_weights(path), num_classes=7, world=1)
    told = "classifier.weights: without a head for these classes; a new one is trained"
    assert caplog.messages == [told]


def test_weights_of_finished_stages_are_not_asked_for(tmp_path):
    config = with_weights(tmp_path / "gone.safetensors")
    stages = {f"{method}/seed{seed}" for method in config.methods for seed in config.seeds}
    check_feasible(config, num_classes=10, world=1, done=stages.__contains__)
    for stage in stages:
        with pytest.raises(ValueError, match=r"classifier\.weights: no file .*gone\.safetensors"):
            check_feasible(config, num_classes=10, world=1, done=(stages - {stage}).__contains__)
    config = replace(config, amplifier=config.classifier)
    config = replace(config, methods=(*config.methods, "real-amplifier-i"))
    stages |= {"real-amplifier-i/seed0", "real-amplifier-i/seed1"}
    stages |= {"amplifier", "verdict", "real-amplifier"}
    check_feasible(config, num_classes=10, world=1, done=stages.__contains__)
    for stage in ("amplifier", "verdict", "real-amplifier"):
        with pytest.raises(ValueError, match=r"amplifier\.weights: no file .*gone\.safetensors"):
            check_feasible(config, num_classes=10, world=1, done=(stages - {stage}).__contains__)


@pytest.fixture
def timms(monkeypatch):
    """A stand-in for timm with one network, which is to be put in `network`."""
    timm = types.ModuleType("timm")
    timm.__version__, timm.is_model = "0", lambda name: True
    timm.get_pretrained_cfg = lambda name: None
    timm.create_model = lambda name, **arguments: timm.network()
    monkeypatch.setitem(sys.modules, "timm", timm)
    return timm


class Halves(nn.Module):
    def __init__(self, answer):
        super().__init__()
        self.fc, self.answer = nn.Linear(4, 10), answer

    def forward(self, images):
        assert images.shape[-1] % 32 == 0
        return self.answer(self.fc(images[:, 0, :4, :4].mean(1)))


@pytest.mark.parametrize(
    ("size", "answer", "told"),
    [
        (16, lambda x: x, r"timm:halves does not take images of 16 pixels, 2 at a time: .+"),
        (32, lambda x: (x, x), r"timm:halves answers tuple, not \(images, classes\)"),
        (32, lambda x: x[:, None], r"timm:halves answers \(\d+, 1, 10\), not \(images, classes\)"),
    ],
)
def test_a_network_of_timm_that_cannot_serve(timms, size, answer, told):
    timms.network = lambda: Halves(answer)
    config = PRESETS["digits"]()
    part = replace(config.classifier, model="timm:halves", width=None, image_size=size)
    with pytest.raises(ValueError, match=f"^classifier: {told}$"):
        check_feasible(replace(config, classifier=part), num_classes=10, world=1)


def test_batch_norm_of_one_pixel_a_device_is_refused_at_once():
    """ResNet-18 has one pixel left of 32, and batch norm wants more than one value."""
    config = PRESETS["digits"]()
    fields = {"model": "resnet18", "width": None, "image_size": 32, "batch_size": 2}
    part = replace(config.classifier, **fields)
    check_feasible(replace(config, classifier=part), num_classes=10, world=1)
    told = "classifier: resnet18 does not take images of 32 pixels, 1 at a time: Expected"
    with pytest.raises(ValueError, match=told):
        check_feasible(replace(config, classifier=part), num_classes=10, world=2)


@pytest.mark.parametrize("part", ["amplifier", "classifier"])
def test_a_network_whose_features_are_wanted_needs_one_linear_head(timms, part):
    class TwoHeads(Halves):
        def __init__(self):
            super().__init__(lambda x: x)
            self.pretrained_cfg = {"classifier": ("fc", "other")}
            self.other = nn.Linear(4, 10)

    timms.network = TwoHeads
    config = replace(PRESETS["digits"](), methods=("erm", "dfr", "ddb-ii"))
    own = replace(getattr(config, part), model="timm:two", width=None, image_size=32)
    config = replace(config, **{part: own})
    user = {"amplifier": "the audit", "classifier": "method dfr"}[part]
    with pytest.raises(ValueError, match=f"^{part}.model timm:two does not serve {user}"):
        check_feasible(config, num_classes=10, world=1)
    check_feasible(replace(config, methods=("erm", "ddb-ii"), audit=False), num_classes=10, world=1)
    if part == "amplifier":
        check_feasible(config, num_classes=10, world=1, done=lambda stage: True)


@pytest.mark.parametrize("mean", [None, (0.5, 0.5, 0.5), (0.485, 0.456, 0.406)])
def test_weights_of_other_pixels_are_warned_of(timms, caplog, tmp_path, mean):
    def network():
        module = Halves(lambda x: x)
        if mean is not None:
            module.pretrained_cfg = {"mean": mean, "classifier": "fc"}
        return module

    timms.network = network
    save_file(nn.Linear(4, 10).state_dict(prefix="fc."), tmp_path / "x.safetensors")
    fields = {"model": "timm:halves", "width": None, "image_size": 32, "pixel_norm": "symmetric"}
    check_feasible(with_weights(tmp_path / "x.safetensors", **fields), num_classes=10, world=1)
    warned = "classifier.pixel_norm symmetric: the weights of timm:halves" in caplog.text
    assert warned == (mean == (0.485, 0.456, 0.406))


def test_the_look_at_a_generator_passes_no_backend_over(monkeypatch):
    """What is said of its meta tensors would read as if it were of the run's."""
    logged = []
    monkeypatch.setattr(dispatch, "_log_once", lambda *words: logged.append(words))
    check_feasible(PRESETS["digits"](), num_classes=10, world=1)
    assert logged == []


def test_a_tracker_says_why_it_does_not_start_and_gets_no_places(monkeypatch, capsys, tmp_path):
    """Its own words, not those of ending what never began; the folder stays of use."""

    key, sent = None, {}

    class Wandb(GeneralTracker):
        name, requires_logging_directory, main_process_only = "wandb", False, True

        def __init__(self, *arguments, settings):
            super().__init__()
            sent["settings"] = settings

        tracker = None

        def start(self):
            if key is None:
                raise RuntimeError("No API key configured.\nUse wandb login.")

        def store_init_configuration(self, values):
            sent.update(values)

        def log(self, values, step=None, **_):
            pass

        def finish(self):
            if key is None:
                raise AttributeError("no attribute 'run'")

    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: [LoggerType.WANDB])
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", Wandb)
    words = small.arguments(tmp_path / "out", methods="erm", seeds="0")
    line = refused(capsys, *words, "--tracker", "wandb")
    assert line.endswith("tracker wandb: No API key configured. Use wandb login.")
    AcceleratorState._reset_state(reset_partial_state=True)
    key = "a key"
    assert main([*words, "--tracker", "wandb"], prog="ddb-fast run") == 0
    settings = sent.pop("settings")
    assert settings == {"console": "off", "x_disable_meta": True, "disable_git": True}
    assert sent["classifier.images"] == 1920
    assert all(isinstance(value, bool | int | float | str) for value in sent.values())
    assert not any(str(tmp_path) in str(value) for value in sent.values())
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(run="of a caller"))
    line = refused(capsys, *words, "--tracker", "wandb", "--seeds", "0", "1")
    assert line.endswith(
        "tracker wandb: a run of yours is going on in this process; finish it first"
    )


def test_a_folder_that_safetensors_cannot_name_is_refused_before_any_work(capsys, tmp_path):
    out = tmp_path / "b\udce9"
    line = refused(capsys, *small.arguments(out, methods="erm"))
    assert "--out" in line and line.endswith("is not valid Unicode")
    assert not out.exists()


def test_a_compiler_that_is_missing_is_one_line(capsys, monkeypatch, tmp_path):
    """torch.compile meets it at the first step, and tells what of torch's was called."""

    kind = type("InductorError", (RuntimeError,), {"__module__": "torch._inductor.exc"})

    def run(*_, **__):
        raise kind("InvalidCxxCompiler: No working C++ compiler found\n\nSet TORCHDYNAMO_VERBOSE=1")

    monkeypatch.setattr(train, "run", run)
    line = refused(capsys, *small.arguments(tmp_path / "out"))
    reason = "InvalidCxxCompiler: No working C++ compiler found"
    assert line.endswith(f"torch.compile: {reason}; --step eager goes without")
    monkeypatch.setenv("DDB_FAST_TRACEBACK", "1")
    with pytest.raises(kind):
        main(small.arguments(tmp_path / "out"))


def test_an_interrupt_before_anything_began_is_one_line(capsys, monkeypatch, tmp_path):
    def parse(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "parse_run", parse)
    assert main(small.arguments(tmp_path / "out")) == 130
    assert capsys.readouterr().err == "train.py: interrupted\n"


def test_synthetic_images_of_other_classes(capsys, tmp_path):
    root = photos(tmp_path / "photos")
    line = refused(capsys, *small.arguments(tmp_path / "out", synthetic=root))
    assert "cat" in line


def test_an_authors_checkpoint_that_is_none(tmp_path):
    path = tmp_path / "x.pt"
    torch.save(nn.Linear(2, 2).state_dict(), path)  # noqa: TID251
    command = ["import", str(path), "--out", str(tmp_path / "o")]
    answer = small.forked(command)
    assert answer.returncode == 2 and len(answer.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("command", [[], ["nothing"], ["data", "absent"], ["import"]])
def test_a_wrong_command(command):
    answer = small.forked(command)
    assert answer.returncode == 2
    assert "Traceback" not in answer.stderr


def test_a_full_disk_keeps_what_is_complete(tmp_path):
    """The process may write files of 100 KiB at most: the generator's weights do not fit."""
    out = tmp_path / "out"
    command = ["run", *small.arguments(out, diffusion__images="64")]
    small_files = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (100 * 1024,) * 2)
    answer = small.forked(command, before=small_files, TMPDIR=str(tmp_path))
    assert answer.returncode == 2, answer.stderr
    assert "Traceback" not in answer.stderr
    assert "model.safetensors" in answer.stderr or "images" in answer.stderr
    assert not list(out.rglob("*.part")) and not (out / "results.json").exists()
    again = small.forked(command)
    assert again.returncode == 0, again.stderr
