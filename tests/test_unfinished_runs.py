"""Commands on runs that lack what they need: each says why it is not there, in the same words."""

import pytest

from ddb_fast import use_run
from ddb_fast.config import with_fields
from ddb_fast.presets import PRESETS
from ddb_fast.pretrained import BiasAmplifier, Generator
from ddb_fast.run_folder import RunFolder, lock_folder

GOES_ON = "the same `ddb-fast run` goes on"
NEED_NONE = "its methods need none; the same `ddb-fast run` with --methods ddb-ii makes one"


def stopped(path, **fields):
    """A run that was stopped once its images were decoded."""
    fields = {name.replace("__", "."): value for name, value in fields.items()}
    config = with_fields(PRESETS["digits"](), {"out": str(path), **fields})
    folder = RunFolder(config, fingerprint="f", device="cpu", writes=True)
    folder.lock()
    folder.open()
    folder.begin("data")
    folder.finish("data", 1.0)
    folder.record()
    folder.close()
    return path


def refusal(work, *words):
    with pytest.raises(ValueError) as caught:
        work(*words)
    return str(caught.value)


@pytest.fixture(autouse=True)
def no_logging(monkeypatch):
    monkeypatch.setattr("logging.basicConfig", lambda **_: None)


@pytest.mark.parametrize(
    ("fields", "amplifier", "generator"),
    [
        ({"methods": "ddb-i"}, GOES_ON, GOES_ON),
        ({"methods": "erm"}, NEED_NONE, NEED_NONE),
        ({"methods": "ddb-i", "sampling__load": "pngs"}, GOES_ON, "it used other images"),
    ],
)
def test_every_command_says_why_there_is_none(fields, amplifier, generator, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pngs").mkdir()
    run = stopped(tmp_path / "run", **fields)
    line = f"{run}: no finished bias amplifier: {amplifier}"
    assert refusal(BiasAmplifier.from_run, run) == line
    assert refusal(use_run.score, [str(run), "--data", "digits"]) == line
    line = f"{run}: no finished generator: {generator}"
    assert refusal(Generator.from_run, run) == line
    assert refusal(use_run.sample, [str(run), "--out", str(tmp_path / "out")]) == line


def test_scores_of_another_run_that_are_gone_are_not_named(tmp_path):
    given = tmp_path / "scores.csv"
    given.write_text("loss")
    run = stopped(tmp_path / "run", methods="ddb-i", pseudo_labels__load=str(given))
    words = [str(run), "--data", "digits"]
    assert refusal(use_run.score, words).endswith(f"of another run, {given}; name that one")
    given.unlink()
    assert refusal(use_run.score, words).endswith("its scores are of another run; name that one")


@pytest.mark.parametrize("methods", ["erm", "ddb-i", "none", "real-amplifier-i"])
def test_a_report_of_an_unfinished_run(methods, tmp_path):
    run = stopped(tmp_path / "run", methods=methods)
    told = f"{run}: an unfinished run; the command that began it goes on"
    assert refusal(use_run.report, [str(run)]) == told


def test_a_report_beside_a_run_of_the_same_folder(tmp_path):
    run = stopped(tmp_path / "run")
    with lock_folder(run):
        told = f"{run}: another process is running here"
        assert refusal(use_run.report, [str(run)]) == told
