"""A finished run's own images: found from any folder, and refused where they have changed."""

import csv
import json
import shutil

import pytest
from three_digits import read_table, train, write_photos

from ddb_fast import use_run
from ddb_fast.scoring import COLUMNS


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with photos/, and runs/b that was trained on them by a relative path."""
    monkeypatch.setattr("logging.basicConfig", lambda **_: None)
    write_photos(tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    few = {"diffusion__images": "64", "amplifier__images": "64", "classifier__images": "64"}
    train("--data", "photos/table.csv", "--out", "runs/b", **few)
    return tmp_path


def test_they_are_found_from_another_folder_and_refused_once_changed(place, monkeypatch, capsys):
    elsewhere = place / "elsewhere"
    shutil.copytree(place / "photos", elsewhere / "photos")
    table = elsewhere / "photos/table.csv"
    table.write_text("".join(table.read_text().splitlines(keepends=True)[:-9]))
    monkeypatch.chdir(elsewhere)
    assert json.loads((place / "runs/b/config.json").read_text())["data"]["path"] == str(
        place / "photos/table.csv"
    )
    capsys.readouterr()
    use_run.score(["../runs/b"])
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    own = read_table(place / "runs/b/amplifier/scores.csv")
    assert [{name: row[name] for name in COLUMNS} for row in rows] == own

    shutil.copy(table, place / "photos/table.csv")
    for command in (use_run.score, use_run.evaluate):
        with pytest.raises(ValueError, match=r"images, .* have changed; --data names others"):
            command(["../runs/b"])
    with pytest.raises(ValueError, match="have changed; a report shows those"):
        use_run.report(["../runs/b"])
    assert use_run.evaluate(["../runs/b", "--data", str(place / "photos/table.csv")]) == 0
