"""Other roads than the embedded digits: own folders and tables, own synthetic images, the authors'
checkpoints, and runs that grow."""

import csv
import json
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

import small
from authors_form import authors_network
from ddb_fast import cli, scoring
from ddb_fast.classification import import_scores
from ddb_fast.data.digits import digits
from ddb_fast.generator import load_diffusion
from ddb_fast.train import main

SHORT = {
    name: value
    for name, value in small.FIELDS.items()
    if name.startswith(("amplifier.", "classifier.", "sampling."))
} | {"seeds": "0", "threads": "1", "precision": "fp32", "progress": "false"}
SHORT |= {"amplifier.images": "640", "classifier.images": "640"}
GENERATOR = {k.replace(".", "__"): v for k, v in small.FIELDS.items() if k.startswith("diffusion.")}
GENERATOR |= {"diffusion__images": "128"}
"""A smaller network than the preset's, too."""


@pytest.fixture(autouse=True)
def one_process_many_runs(monkeypatch):
    monkeypatch.setattr("logging.basicConfig", lambda **_: None)
    AcceleratorState._reset_state(reset_partial_state=True)


def run(*argv, **changes):
    words = list(map(str, argv))
    fields = SHORT | {k.replace("__", "."): v for k, v in changes.items()}
    if "--synthetic" in words:
        fields = small.without_generator(fields)
    if "--scores" in words:
        fields = {k: v for k, v in small.without_generator(fields).items() if "amplifier." not in k}
    for name, value in fields.items():
        words += [f"--{name}", *value.split()]
    AcceleratorState._reset_state(reset_partial_state=True)
    return main(words, prog="ddb-fast run")


@pytest.fixture(scope="module")
def two_digits(tmp_path_factory):
    """Zeros and ones of the embedded set as PNG files, and a table with their colours."""
    root = tmp_path_factory.mktemp("two digits")
    rows = []
    for path, y, split, pixels, a, *_ in digits(0.9).entries:
        if y < 2 and (split != "test" or a < 2):
            file = root / path
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(file)
            rows.append({"path": path, "y": y, "a": int(a == 1), "split": split})
    with (root / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["path", "y", "a", "split"])
        writer.writeheader()
        writer.writerows(rows)
    return root


def test_a_folder_of_ones_own_needs_no_option_but_its_path(two_digits, tmp_path, monkeypatch):
    """The preset's lengths are cut; everything else is what `run tiny --data` does."""
    out = tmp_path / "out"
    short = {"diffusion__images": "128", "methods": "erm ddb-i ddb-ii"}
    assert run("tiny", "--data", two_digits, "--out", out, **short) == 0
    results = json.loads((out / "results.json").read_text())
    metrics = results["methods"]["ddb-ii"]["metrics"]
    assert metrics["average_accuracy"]["mean"] is not None
    assert metrics["worst_group_accuracy"]["mean"] is None, "no bias labels, no groups"
    assert results["methods"]["erm"]["groups"] == []
    assert results["synthetic"]["aligned_share"] is None and results["amplifier"]["auroc"] is None
    with (out / "amplifier/scores.csv").open(newline="") as file:
        assert {row["path"] for row in csv.DictReader(file)} == {
            p.relative_to(two_digits).as_posix() for p in two_digits.rglob("*.png")
        }
    # Pixels in base64 may spell anything.
    picture = r"data:image/png;base64,[\w+/=]+"
    text, pictures = re.subn(picture, "", (out / "report.html").read_text())
    assert pictures >= 2 * 18 and not re.search(r"\bnan\b", text, re.IGNORECASE)


def test_a_table_with_bias_labels_takes_true_groups_and_then_grows(two_digits, tmp_path):
    out = tmp_path / "out"
    command = ["tiny", "--data", two_digits / "table.csv", "--out", out]
    short = {**GENERATOR, "methods": "erm group-dro", "audit": "false"}
    assert run(*command, **short) == 0
    assert not (out / "diffusion").exists(), "neither method needs the amplifier"
    first = json.loads((out / "results.json").read_text())
    assert list(first["methods"]) == ["erm", "group-dro"]
    groups = first["methods"]["group-dro"]["groups"]
    assert [(g["y"], g["a"]) for g in groups] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert first["amplifier"] is None and first["synthetic"] is None

    more = short | {"methods": "erm group-dro ddb-i-predicted ddb-i-error-set", "seeds": "0 1"}
    assert run(*command, **more) == 0
    second = json.loads((out / "results.json").read_text())
    assert list(second["methods"])[2:] == ["ddb-i-error-set", "ddb-i-predicted"]
    for method in ("erm", "group-dro"):
        for name, metric in first["methods"][method]["metrics"].items():
            assert second["methods"][method]["metrics"][name]["seeds"][0] == metric["seeds"][0]
    assert second["amplifier"]["auroc"] is not None

    assert run(*command, **short) == 0
    third = json.loads((out / "results.json").read_text())
    assert third["methods"] == second["methods"], "asking for less takes nothing away"
    assert third["amplifier"] == second["amplifier"]


def test_the_audit_alone_trains_no_classifier_and_then_grows(two_digits, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["tiny", "--data", two_digits, "--out", out]
    short = {**GENERATOR, "methods": "none"}
    assert run(*command, **short) == 0
    assert "| method" not in capsys.readouterr().out
    assert not (out / "classifiers").exists()
    scores = (out / "amplifier" / "scores.csv").read_bytes()
    assert json.loads((out / "results.json").read_text())["methods"] == {}
    assert run(*command, **short | {"methods": "ddb-ii"}) == 0
    assert list(json.loads((out / "results.json").read_text())["methods"]) == ["ddb-ii"]
    assert (out / "amplifier" / "scores.csv").read_bytes() == scores
    with pytest.raises(SystemExit, match="2"):
        run(*command, methods="none erm")
    assert "or none alone" in capsys.readouterr().err


def test_given_scores_replace_generator_and_amplifier(two_digits, tmp_path, capsys):
    """Scores gone over by hand: one more image marked, rows in another order, another split."""
    with (two_digits / "table.csv").open(newline="") as file:
        entries = [row for row in csv.DictReader(file) if row["split"] == "train"]
    rows = [
        {
            "path": f"{row['path']}",
            "y": row["y"],
            "predicted": row["a"],
            "loss": "2.5" if row["a"] != row["y"] else "0.125",
            "probability_y": "0",
            "score": "4" if row["a"] != row["y"] else "0",
            "pseudo_conflicting": str(int(row["a"] != row["y"])),
            "by": "hand",
        }
        for row in reversed(entries)
    ]
    given = tmp_path / "given.csv"

    def write(rows):
        with given.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)

    write(rows)
    out = tmp_path / "out"
    command = ["tiny", "--data", two_digits, "--out", out, "--scores", given]
    assert run(*command, methods="ddb-i ddb-ii") == 0
    assert not (out / "diffusion").exists() and not (out / "synthetic").exists()
    kept = scoring.read_scores(out / "amplifier" / "scores.csv")
    conflicting = sum(row["a"] != row["y"] for row in entries)
    assert kept.conflicting.sum() == conflicting > 0
    assert torch.equal(kept.conflicting, kept.predicted != kept.y)
    results = json.loads((out / "results.json").read_text())
    assert results["verdict"] is None and list(results["methods"]) == ["ddb-i", "ddb-ii"]

    for number, (broken, said) in enumerate(
        [
            (rows[:-1], f"no row of training image {rows[-1]['path']}"),
            ([*rows, rows[3]], f"{rows[3]['path']} stands there twice"),
            ([{**rows[0], "y": "7"}, *rows[1:]], "is of class 7 there"),
            ([{**rows[0], "loss": "nan"}, *rows[1:]], "a figure is missing"),
            ([{**rows[0], "predicted": "2"}, *rows[1:]], "a figure is missing"),
            ([{k: v for k, v in row.items() if k != "loss"} for row in rows], "no column `loss`"),
        ]
    ):
        write(broken)
        command[command.index("--out") + 1] = tmp_path / f"refused{number}"
        assert run(*command, methods="ddb-ii") == 2
        assert said in capsys.readouterr().err
        assert not (tmp_path / f"refused{number}" / "amplifier").exists()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "latin-1"])
def test_scores_that_another_program_has_written(tmp_path, encoding):
    # A mark of the encoding stands before a column that is needed.
    row = {"path": "ä.png", "split": "train", "y": 0, "predicted": 0, "loss": 0.5}
    row |= {"probability_y": 0.6, "score": 1.0, "pseudo_conflicting": 1}
    source = tmp_path / "given.csv"
    text = ",".join(row) + "\n" + ",".join(map(str, row.values())) + "\n"
    source.write_bytes(text.encode(encoding))
    train = SimpleNamespace(paths=("ä.png",), y=torch.tensor([0]))
    context = SimpleNamespace(
        config=SimpleNamespace(pseudo_labels=SimpleNamespace(load=str(source))),
        data=SimpleNamespace(splits={"train": train}, classes=("0",)),
        accelerator=SimpleNamespace(is_main_process=True),
    )
    if encoding == "latin-1":
        with pytest.raises(ValueError, match=r"given\.csv: not a CSV in UTF-8"):
            import_scores(context, tmp_path / "kept.csv")
    else:
        import_scores(context, tmp_path / "kept.csv")
        assert scoring.read_scores(tmp_path / "kept.csv").conflicting.tolist() == [True]
        for column, wrong in (("pseudo_conflicting", "1.0"), ("loss", "-0.5"), ("score", "")):
            changed = {**row, column: wrong}
            lines = (",".join(map(str, line)) + "\n" for line in (row, changed.values()))
            source.write_text("".join(lines), encoding="utf-8")
            with pytest.raises(ValueError, match=f"ä.png: a figure .*: {column} is '{wrong}'"):
                import_scores(context, tmp_path / "kept.csv")


def test_a_refused_method_leaves_a_finished_run_as_it_was(two_digits, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["tiny", "--data", two_digits, "--out", out]
    assert run(*command, methods="erm") == 0
    before = (out / "config.json").read_text()
    assert run(*command, methods="erm group-dro") == 2
    assert "needs bias labels" in capsys.readouterr().err
    assert (out / "config.json").read_text() == before
    assert cli.main(["compare", str(out)]) == 0
    assert "| erm " in capsys.readouterr().out


def test_synthetic_images_of_ones_own_replace_the_generator(two_digits, tmp_path):
    own = tmp_path / "own"
    for label, value in (("0", 40), ("1", 200)):
        for i in range(20):
            file = own / label / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            noise = np.random.default_rng(i).integers(-20, 20, (24, 24, 3))
            Image.fromarray((value + noise).astype(np.uint8)).save(file)
    out = tmp_path / "out"
    command = ["tiny", "--data", two_digits, "--out", out, "--synthetic", own]
    assert run(*command, methods="ddb-ii") == 0
    assert not (out / "diffusion").exists()
    manifest = json.loads((out / "manifest.json").read_text())
    assert "diffusion" not in manifest["stages"]
    bound = manifest["stages"]["synthetic"]["fields"]["sampling.load"]
    assert len(bound) == 16, "to the contents, wherever they lie"
    assert json.loads((out / "results.json").read_text())["synthetic"]["count"] == 40


def test_an_authors_checkpoint_is_imported_and_run(two_digits, tmp_path, capsys):
    """Their pixels are ImageNet-normalised: sampling must invert that, whatever the preset says."""
    theirs = authors_network(classes=2, timesteps=30, dtype=torch.float32)
    path, folder, out = tmp_path / "ckpt.pt", tmp_path / "imported", tmp_path / "out"
    torch.save({"model_state_dict": theirs.state_dict()}, path)  # noqa: TID251
    assert cli.main(["import", str(path), "--out", str(folder), "--image-size", "16"]) == 0
    assert "2 classes, 30 steps" in capsys.readouterr().out
    unet, config, classes = load_diffusion(folder)
    assert (config.pixel_norm, config.ema_half_life, config.timesteps) == ("imagenet", None, 30)
    assert (config.schedule, config.beta_end, config.target) == ("linear", 0.028, "eps")
    assert len(classes) == 2
    x, t = torch.randn(3, 3, 16, 16), torch.tensor([0, 7, 29])
    with torch.no_grad():
        expected = theirs(x, t, torch.tensor([1, 2, 0]))
        got = unet(x, t, torch.tensor([0, 1, unet.null_class]))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)

    command = ["tiny", "--data", two_digits, "--out", out, "--diffusion", folder]
    assert run(*command, methods="ddb-ii") == 0
    used = json.loads((out / "manifest.json").read_text())["stages"]["synthetic"]["fields"]
    assert used["diffusion.pixel_norm"] == "imagenet"
    assert len(used["diffusion.load"]) == 16, "to the contents, wherever they lie"
    assert used["diffusion.image_size"] == 16, "the generator decides, not the preset"


def test_data_and_env_commands(two_digits, capsys):
    assert cli.main(["data", str(two_digits / "table.csv")]) == 0
    shown = capsys.readouterr().out
    assert "2 classes" in shown and "train" in shown
    assert cli.main(["env"]) == 0
    shown = capsys.readouterr().out
    assert torch.__version__ in shown and "group_norm" in shown and "available" in shown
    assert cli.main(["--help"]) == 0


def test_one_command_line_serves_both_entrances(tmp_path):
    """`python ddb_fast/train.py` and `ddb-fast run` resolve the same configuration."""
    words = ["digits", "--dry-run", "--seeds", "4", "--out", str(tmp_path)]
    one = small.run([sys.executable, "-m", "ddb_fast.cli", "run", *words])
    two = small.run([sys.executable, "ddb_fast/train.py", *words], cwd=small.ROOT)
    assert one.returncode == two.returncode == 0, two.stderr
    assert one.stdout == two.stdout


def test_weights_chosen_by_validation(two_digits, tmp_path, capsys):
    """`--selection` keeps the look that validates best, and says after how many images it was."""
    out = tmp_path / "out"
    command = ["tiny", "--data", two_digits / "table.csv", "--out", out]
    short = {"methods": "erm lff", "selection": "average_accuracy", "looks": "5"}
    assert run(*command, **short) == 0
    for method in ("erm", "lff"):
        folder = out / "classifiers" / method / "seed0"
        chosen = json.loads((folder / "selection.json").read_text())
        metrics = json.loads((folder / "metrics.json").read_text())
        best = max(row["average_accuracy"] for row in chosen["curve"])
        assert len(chosen["curve"]) == 5 and chosen["by"] == "average_accuracy"
        assert metrics["val"]["metrics"]["average_accuracy"] == best
        last = [row for row in chosen["curve"] if row["average_accuracy"] == best][-1]
        assert metrics["images"] == last["images"]
    assert json.loads((out / "results.json").read_text())["selection"] == "average_accuracy"
    assert "best average accuracy on validation" in capsys.readouterr().out
    other = tmp_path / "other"
    no_labels = ["tiny", "--data", two_digits, "--out", other]
    assert run(*no_labels, methods="erm", selection="worst_group_accuracy") == 2
    assert "selection worst_group_accuracy needs bias labels; use last" in capsys.readouterr().err
