"""A run's folder and later versions of this library."""

import json

import pytest

from ddb_fast.config import with_fields
from ddb_fast.fields import flatten
from ddb_fast.presets import PRESETS
from ddb_fast.run_folder import RunFolder
from ddb_fast.stages import default_fields


def open_folder(config):
    folder = RunFolder(config, fingerprint="f", device="cpu", writes=True)
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
