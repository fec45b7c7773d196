"""A run's folder: later versions of this library, other processes, and what was given to it."""

import errno
import fcntl
import json
import os
import shutil
from types import SimpleNamespace

import pytest

from ddb_fast.config import with_fields
from ddb_fast.fields import flatten
from ddb_fast.pipeline import Stages
from ddb_fast.presets import PRESETS
from ddb_fast.run_folder import RunFolder, lock_folder
from ddb_fast.stages import default_fields


def open_folder(config):
    folder = RunFolder(config, fingerprint="f", device="cpu", writes=True)
    folder.lock()
    folder.open()
    return folder


def finished(out):
    """Configuration and manifest of a run with one finished stage."""
    config = with_fields(PRESETS["digits"](), {"out": str(out)})
    folder = open_folder(config)
    folder.begin("erm/seed0")
    folder.finish("erm/seed0", 1.0)
    folder.close()
    return config, out / "manifest.json"


def test_a_field_that_came_later_had_its_default(tmp_path):
    """A run of an older version goes on, unless the new field is asked for."""
    config, manifest = finished(tmp_path / "run")
    older = json.loads(manifest.read_text())
    del older["stages"]["erm/seed0"]["fields"]["selection"]
    manifest.write_text(json.dumps(older))

    again = open_folder(config)
    assert again.done("erm/seed0")
    again.close()
    other = with_fields(config, {"selection": "worst_group_accuracy"})
    with pytest.raises(ValueError, match="selection is last there, worst_group_accuracy here"):
        open_folder(other)


def test_a_stage_of_another_version_is_left_alone(tmp_path):
    config, manifest = finished(tmp_path / "run")
    other = json.loads(manifest.read_text())
    other["stages"]["polish"] = other["stages"]["erm/seed0"]
    manifest.write_text(json.dumps(other))

    again = open_folder(config)
    assert again.done("erm/seed0")
    again.close()
    assert "polish" in json.loads(manifest.read_text())["stages"]


def test_defaults_are_those_of_the_dataclasses():
    defaults, digits = default_fields(), flatten(PRESETS["digits"]())
    assert set(defaults) < set(digits)
    assert set(digits) - set(defaults) == {
        "preset",
        *(f"{part}.{name}" for part in ("diffusion", "amplifier", "classifier")
          for name in ("images", "batch_size")),
    }  # fmt: skip
    assert defaults["data.rho"] == digits["data.rho"] and defaults["seeds"] == [0]


@pytest.mark.parametrize("name", [".small.u8.123.part", ".tmpLcm1qm"])
def test_one_process_works_in_a_folder_and_clears_away_what_was_cut_off(
    tmp_path, monkeypatch, name
):
    left = tmp_path / "cache" / name
    left.parent.mkdir()
    left.touch()
    with lock_folder(tmp_path):
        assert not left.exists()
        with pytest.raises(ValueError, match="another process is running here"):
            lock_folder(tmp_path)

    def refuse(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(ValueError, match="cannot lock files") as error:
        lock_folder(tmp_path)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("again", [False, True])
def test_a_folder_that_was_removed_meanwhile_gets_no_manifest(tmp_path, again):
    """It would vouch for files that are gone, or for those of a run that has begun there since."""
    config = with_fields(PRESETS["digits"](), {"out": str(tmp_path / "run")})
    folder = open_folder(config)
    folder.begin("diffusion")
    shutil.rmtree(tmp_path / "run")
    other = open_folder(config) if again else None
    with pytest.raises(ValueError, match="run: removed or moved while"):
        folder.finish("diffusion", 1.0)
    folder.close()
    if other is None:
        assert not (tmp_path / "run").exists()
    else:
        other.close()
        assert not open_folder(config).done("diffusion")


def test_what_another_command_began_before_the_folder_was_locked_counts(tmp_path):
    config = with_fields(PRESETS["digits"](), {"out": str(tmp_path / "run")})
    other = with_fields(config, {"diffusion.lr": 0.5})
    late = RunFolder(other, fingerprint="f", device="cpu", writes=True)
    first = open_folder(config)
    first.begin("diffusion")
    first.close()
    late.lock()
    assert late.known == "{}"
    with pytest.raises(ValueError, match=r"diffusion\.lr is .* there, 0\.5 here"):
        late.open()
    assert late.known == first.known, "what the processes of a run compare"
    late.close()


@pytest.mark.parametrize("name", ["diffusion.load", "sampling.load"])
def test_a_run_is_bound_to_the_contents_of_what_was_given(tmp_path, name):
    stage, given = {"diffusion.load": "diffusion", "sampling.load": "synthetic"}[name], "given"
    file = tmp_path / given / {"diffusion": "model.safetensors", "synthetic": "0/a.png"}[stage]
    file.parent.mkdir(parents=True)
    file.write_bytes(b"one")
    fields = {"out": str(tmp_path / "run"), name: str(tmp_path / given)}
    config = with_fields(PRESETS["digits"](), fields)
    folder = open_folder(config)
    folder.begin(stage)
    folder.record()
    folder.close()

    shutil.move(tmp_path / given, tmp_path / "moved")
    with pytest.raises(OSError, match=given):  # the stage still needs it
        open_folder(config)
    moved = with_fields(config, {name: str(tmp_path / "moved")})
    folder = open_folder(moved)
    folder.finish(stage, 1.0)
    folder.close()
    shutil.move(tmp_path / "moved", tmp_path / given)
    open_folder(config).close()
    file.write_bytes(b"two")
    with pytest.raises(ValueError, match=f"{name} is not what it began with"):
        open_folder(config)

    shutil.rmtree(tmp_path / given)
    folder = open_folder(config)  # it has a copy
    folder.begin("amplifier")
    folder.close()
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    bound = {stage["fields"][name] for stage in manifest["stages"].values()}
    assert len(bound) == 1 and str(tmp_path) not in str(bound)
    with pytest.raises(OSError, match="typo"):
        open_folder(with_fields(config, {name: str(tmp_path / "typo")}))


def test_a_run_is_bound_to_the_contents_of_pretrained_weights(tmp_path):
    weights, elsewhere = tmp_path / "weights.safetensors", tmp_path / "moved.safetensors"
    weights.write_bytes(b"first")
    fields = {"out": str(tmp_path / "run"), "classifier.weights": str(weights)}
    config = with_fields(PRESETS["digits"](), fields)
    folder = open_folder(config)
    folder.begin("erm/seed0")
    folder.finish("erm/seed0", 1.0)
    folder.close()
    weights.rename(elsewhere)
    for same in (config, with_fields(config, {"classifier.weights": str(elsewhere)})):
        again = open_folder(same)
        assert again.done("erm/seed0")
        again.close()
    weights.write_bytes(b"others")
    for here, told in (
        (str(weights), "not what it began with"),
        ("imagenet", r"\w+ there, imagenet here"),
        ("none", r"\w+ there, None here"),
    ):
        with pytest.raises(ValueError, match=rf"classifier\.weights is {told}"):
            open_folder(with_fields(config, {"classifier.weights": here}))


@pytest.mark.parametrize("before", ["none", "imagenet"])
def test_a_weights_file_that_is_not_there_stands_for_no_other_start(tmp_path, before):
    config = with_fields(
        PRESETS["digits"](), {"out": str(tmp_path / "run"), "classifier.weights": before}
    )
    folder = open_folder(config)
    folder.begin("erm/seed0")
    folder.finish("erm/seed0", 1.0)
    folder.close()
    with pytest.raises(ValueError, match=r"classifier\.weights is"):
        open_folder(with_fields(config, {"classifier.weights": str(tmp_path / "gone")}))


def test_a_run_from_before_the_contents_counted_is_bound_to_the_place(tmp_path):
    given = tmp_path / "given"
    (given / "0").mkdir(parents=True)
    fields = {"out": str(tmp_path / "run"), "sampling.load": str(given)}
    config = with_fields(PRESETS["digits"](), fields)
    folder = open_folder(config)
    folder.begin("synthetic")
    folder.close()
    manifest = tmp_path / "run" / "manifest.json"
    older = json.loads(manifest.read_text())
    older["stages"]["synthetic"]["fields"]["sampling.load"] = str(given)
    manifest.write_text(json.dumps(older))
    open_folder(config).close()
    shutil.copytree(given, tmp_path / "other")
    with pytest.raises(ValueError, match=r"sampling\.load is not what it began with"):
        open_folder(with_fields(config, {"sampling.load": str(tmp_path / "other")}))


def test_a_damaged_manifest_is_named(tmp_path):
    config, manifest = finished(tmp_path / "run")
    manifest.write_bytes(b"\xff" * 9)
    with pytest.raises(ValueError, match=r"manifest\.json: not JSON, or cut short"):
        open_folder(config)


def test_what_a_stage_kept_meanwhile_goes_though_it_was_killed_before_that(tmp_path):
    kept = tmp_path / "shards"
    (kept / "x").mkdir(parents=True)
    stages = Stages(SimpleNamespace(done=lambda _: True), SimpleNamespace(is_main_process=True))
    stages("synthetic", lambda: 1 / 0, kept)
    assert not kept.exists()
