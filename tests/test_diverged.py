"""A network that diverged is not kept, and its folder takes a lower rate."""

import pytest
from accelerate.state import AcceleratorState
from three_digits import FIELDS, write_photos

from ddb_fast.train import main

ONE_STEP = {
    f"{part}.{name}": "64"
    for part in ("amplifier", "classifier")
    for name in ("images", "batch_size")
}
FEW = {"diffusion.images": "64", "sampling.per_class": "4", "sampling.steps": "2", "seeds": "0"}


def run(photos, out, **changes):
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    words = ["digits", "--data", str(photos / "table.csv"), "--out", str(out)]
    for name, value in (FIELDS | FEW | ONE_STEP | changes).items():
        words += [f"--{name}", *value.split()]
    AcceleratorState._reset_state(reset_partial_state=True)
    return main(words, prog="ddb-fast run")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("photos"))


@pytest.mark.parametrize(
    ("part", "stage", "methods"),
    [
        ("amplifier", "amplifier", "none"),
        ("amplifier", "real amplifier", "real-amplifier-i"),
        ("classifier", "erm seed 0", "erm"),
        ("classifier", "lff seed 0", "lff"),
    ],
)
@pytest.mark.parametrize("interrupted", [False, True])
def test_it_is_refused_and_binds_nobody(
    part, stage, methods, interrupted, photos, tmp_path, capsys, monkeypatch
):
    """After one step too, whose loss is finite; and where the stage was begun before."""
    monkeypatch.setattr("logging.basicConfig", lambda **_: None)
    wild = {"methods": methods, f"{part}.lr": "1e30", "checkpoint_images": "64"}
    if interrupted:

        def interrupt(*_, **__):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr("ddb_fast.classification.fit", interrupt)
            assert run(photos, tmp_path / "run", **wild) == 130
    for _ in range(2):
        capsys.readouterr()
        assert run(photos, tmp_path / "run", **wild) == 2
        told = f"ddb-fast run: {stage}: the {part} diverged; lower --{part}.lr"
        assert told in capsys.readouterr().err.splitlines()
    assert not list(tmp_path.rglob(f"*{part}*/**/*.safetensors"))
    assert run(photos, tmp_path / "run", methods=methods) == 0


def test_a_loss_that_is_not_finite_binds_nobody(photos, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("logging.basicConfig", lambda **_: None)
    wild = {"classifier.lr": "1e30", "classifier.images": "640"}
    assert run(photos, tmp_path / "run", methods="erm", **wild) == 2
    assert "the loss is nan" in capsys.readouterr().err
    assert run(photos, tmp_path / "run", methods="erm") == 0
