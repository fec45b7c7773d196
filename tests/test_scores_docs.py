"""Every example of docs/scores.md: commands first, then the Python in one namespace.

What needs another package is run after the rest, in a copy of it, where that package is installed.
"""

import ast
import contextlib
import csv
import importlib.util
import subprocess
import sys

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

import small
from ddb_fast import use_run
from ddb_fast.train import main
from pages import blocks, commands

PAGE = small.ROOT / "docs" / "scores.md"
BLOCKS = blocks(PAGE.read_text("utf-8"))
OURS = {"ddb_fast", "numpy", "torch", "PIL", "sklearn"} | set(sys.stdlib_module_names)


def foreign(block):
    """Packages that a block imports and that ddb_fast does not bring."""
    found = set()
    for node in ast.walk(ast.parse(block.text)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        found |= {name.split(".")[0] for name in names}
    return found - OURS


PYTHON = [block for block in BLOCKS if block.language == "python" and not block.tag]
OWN = [block for block in PYTHON if not foreign(block)]
OTHERS = [block for block in PYTHON if foreign(block)]


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """The folder in which the page's commands were run: photos/, runs/photos and what they made."""
    folder = tmp_path_factory.mktemp("reader")
    random = np.random.default_rng(0)
    for y, name in enumerate(("disc", "square")):
        (folder / "photos" / name).mkdir(parents=True)
        for i in range(32):
            pixels = random.integers(0, 90, (40, 48, 3)) + 60 * y
            pixels[..., 2 - 2 * (y if i % 8 else 1 - y)] += 90
            path = folder / "photos" / name / f"{i:03d}.jpg"
            Image.fromarray(pixels.astype(np.uint8)).save(path)
    fields = {name: value for name, value in small.FIELDS.items() if name != "data.rho"}
    fields |= {"methods": "erm ddb-ii", "seeds": "0", "audit": "false"}
    fields |= {f"{part}.images": "640" for part in ("diffusion", "amplifier", "classifier")}
    words = ["digits", "--data", "photos/", "--out", "runs/photos"]
    for name, value in fields.items():
        words += [f"--{name}", *value.split()]
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(folder):
        patch.setattr("logging.basicConfig", lambda **_: None)
        assert main(words, prog="ddb-fast run") == 0
        for block in BLOCKS:
            for command in commands(block.text) if block.language == "sh" else ():
                if command[0] == "ddb-fast":
                    assert getattr(use_run, command[1])(command[2:]) == 0
                else:
                    subprocess.run(["bash", "-c", " ".join(command)], check=True)
    return folder


def execute(block, namespace):
    # Lines as in the page, so that what fails is named by its line.
    source = "\n" * (block.line - 1) + block.text
    exec(compile(source, str(PAGE), "exec"), namespace)


@pytest.fixture(scope="module")
def namespace(reader):
    names = {"__name__": "page"}
    with contextlib.chdir(reader):
        for block in OWN:
            execute(block, names)
    return names


def test_commands_leave_what_the_page_says(reader):
    tables = {}
    for name in ("scores.csv", "inbox.csv", "runs/photos/amplifier/scores.csv"):
        with (reader / name).open(newline="") as file:
            tables[name] = list(csv.DictReader(file))
    scores, inbox, own = tables.values()
    assert [row["score"] for row in scores] == [row["score"] for row in own]
    assert len(inbox) == 10 and {row["score"] for row in inbox} == {""}
    assert len(list((reader / "generated").rglob("*.png"))) == 16
    assert sorted(p.name for p in (reader / "generated").iterdir()) == ["disc", "square"]
    assert len(list((reader / "plain" / "disc").iterdir())) == 2
    listed = [
        line.split("`")[1::2] for line in PAGE.read_text("utf-8").splitlines() if "| `" in line
    ]
    named = {name for names in listed for name in names if name.replace("_", "").isalpha()}
    assert set(own[0]) <= named and set(scores[0]) - set(own[0]) == {
        "probability_of_disc",
        "probability_of_square",
    }


def test_examples_without_other_packages(namespace, reader):
    scores = namespace["scores"]
    worst = namespace["worst"]
    assert scores.score[worst[0]] == scores.score.max() and len(worst) == 10
    assert namespace["classifier"].n_features_in_ == 8 * 8 * 3
    assert len(namespace["train"]) == len(scores.y) == len(namespace["weight"])
    assert isinstance(namespace["debiased"], torch.nn.Module)
    with contextlib.chdir(reader):
        batch = next(iter(namespace["balanced"]))
    assert torch.equal(scores.y[batch["index"]], batch["labels"])


def check(name, names, reader):
    """What each example should have made."""
    rows = sum(1 for _ in (reader / "scores.csv").open()) - 1
    if name == "cleanlab":
        assert names["train"]["label_quality"].between(0, 1).all()
        assert set(names["issues"]) <= set(range(len(names["train"])))
        of_label = names["train"]["probability_y"].to_numpy()
        assert names["train"]["label_quality"].to_numpy() == pytest.approx(of_label, abs=1e-6)
    elif name == "datasets":
        assert len(names["dataset"]) == rows
        if "worst" in names and hasattr(names["worst"], "column_names"):
            assert names["worst"][0]["score"] == max(names["worst"]["score"])
    elif name == "transformers":
        assert names["trainer"].state.global_step == 6
        assert names["trainer"].recipe.group_weights.sum().item() == pytest.approx(1)
    elif name == "fiftyone":
        assert len(names["dataset"]) == rows
    else:
        assert name == "pandas" and names["train"]["score"].is_monotonic_decreasing


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "block", [pytest.param(b, id=f"line {b.line}, {'+'.join(sorted(foreign(b)))}") for b in OTHERS]
)
def test_examples_with_another_package(block, reader, namespace, tmp_path, monkeypatch):
    packages = foreign(block)
    for package in sorted(packages):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"this example needs {package}, which is not installed")
    for name in ("HF_HOME", "FIFTYONE_DATABASE_DIR", "MPLCONFIGDIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    names = dict(namespace)
    with contextlib.chdir(reader):
        try:
            execute(block, names)
        except Exception as error:
            if type(error).__name__ == "FiftyOneConfigError":  # it starts a server of its own
                pytest.skip(f"fiftyone keeps samples in MongoDB, which is not here: {error}")
            raise
        check(min(packages - {"pandas"}, default="pandas"), names, reader)


def test_the_page_shows_every_tool():
    shown = set().union(*map(foreign, OTHERS))
    assert shown == {"pandas", "cleanlab", "fiftyone", "datasets", "transformers"}
    assert len(OWN) == 5
