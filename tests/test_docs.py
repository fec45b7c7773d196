"""Every command and example of the documentation is run or parsed, and every link is followed.

A fenced block's info string says what happens to it. `sh`: run by bash, in the page's order, in one
folder, with the lengths of `SHORT` where the page names none; `sh gpu`, `cluster`, `data`, `slow`,
`account`: not run here, each command is checked; `sh setup`: targets of the Makefile and pip.
`python`: run after the page's commands, as one script in the same folder; with a tag, such as
`python fragment`, a part of somebody's program: compiled, its imports made. Other languages are
for the eye.

docs/start.md is run in a folder that holds the reader's photographs; the other pages go on where it
ends. Scripts keep the page's line numbers, so what fails is named by its line.
"""

import ast
import csv
import functools
import importlib
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fork_server
import small
from ddb_fast import cli
from pages import (
    CHECKED,
    blocks,
    broken_links,
    check_command,
    check_setup,
    commands,
    links,
    script,
)

START = small.ROOT / "docs" / "start.md"
PAGES = [
    small.ROOT / "README.md",
    small.ROOT / "CONTRIBUTING.md",
    *sorted((small.ROOT / "docs").glob("*.md")),
]
# Their examples are run by tests of their own; optimize.md's need diffusers and minutes.
PYTHON_ELSEWHERE = {"scores.md", "models.md", "optimize.md"}
# A few steps of every training: that a command works is tested here, not what it finds.
SHORT = {k: v for k, v in small.FIELDS.items() if k not in ("methods", "seeds", "audit")}
SHORT |= {"diffusion.images": "128", "amplifier.images": "320", "classifier.images": "320"}


# --- the reader's folder -----------------------------------------------------------------------

# In `fork_server.CLIENT`. A sweep starts its runs by the same road: one seed and no audit in each,
# which single runs show.
SHORTEN = """
given = {{word.split("=")[0] for word in words if word.startswith("--")}}
if words[:1] in (["run"], ["sweep"]) and not given & {{"--help", "--dry-run"}}:
    embedded = words[1] == "digits" and not given & {{"--data", "--data.path", "--rho"}}
    loaded = ("diffusion.",) if given & {{"--diffusion", "--synthetic"}} else ()
    loaded += ("sampling.",) if "--synthetic" in given else ()
    if "--scores" in given:
        loaded += ("diffusion.", "sampling.", "amplifier.", "pseudo_labels.")
    for field, value in {short!r}.items():
        ours = field != "data.rho" or embedded
        if ours and f"--{{field}}" not in given and not (loaded and field.startswith(loaded)):
            words += [f"--{{field}}", *value.split()]
    if words[0] == "sweep":
        words += ["--seeds", "0", "--audit", "false", "--launch", {launch!r}]
"""


def photographs(folder: Path) -> None:
    """Two classes of 32 pictures: a square or a disc, nearly always on the same background."""
    rng = np.random.default_rng(0)
    rows = []
    for y, name in enumerate(("disc", "square")):
        (folder / "photos" / name).mkdir(parents=True)
        for i in range(32):
            a = y if i % 8 else 1 - y
            pixels = np.tile(np.array([(40, 90, 200), (60, 160, 50)][a]), (40, 48, 1))
            pixels = pixels + rng.integers(-20, 20, pixels.shape)
            row, column = np.mgrid[:40, :48] - rng.integers(16, 24, (2, 1, 1))
            far = np.hypot(row, column) if y == 0 else np.maximum(abs(row), abs(column))
            pixels[far < 10] = 230
            path = f"photos/{name}/{i:03d}.jpg"
            Image.fromarray(pixels.astype(np.uint8)).save(folder / path)
            split = "test" if i % 4 == 1 or i == 8 else "val" if i % 8 == 2 or i == 16 else "train"
            rows.append({"path": path, "y": y, "a": a, "split": split})
    with (folder / "photos.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["path", "y", "a", "split"])
        writer.writeheader()
        writer.writerows(rows)


def run_page(page: Path, folder: Path, bin: Path) -> None:
    """Run a page's commands, then its Python, in `folder`; AssertionError names the line."""
    text = page.read_text("utf-8")
    environment = {
        "PATH": os.pathsep.join([str(bin), str(Path(sys.executable).parent), os.environ["PATH"]]),
        "HF_HUB_OFFLINE": "1",
        "BROWSER": "true",
    }
    lines = script(text, "sh").splitlines()
    assert not lines[0], f"{page.name} begins with a command"
    lines[0] = f"trap 'echo {page.name} line $LINENO >&2' ERR"
    if any(lines[1:]):
        source = "\n".join(lines)
        answer = small.run(["bash", "-euo", "pipefail", "-c", source], cwd=folder, **environment)
        assert answer.returncode == 0, f"{answer.stdout[-1500:]}\n{answer.stderr[-3000:]}"
    source = script(text, "python")
    if source.strip() and page.name not in PYTHON_ELSEWHERE:
        file = bin / f"{page.stem}.py"
        file.write_text(source)
        answer = small.run([sys.executable, str(file)], cwd=folder, **environment)
        assert answer.returncode == 0, f"{answer.stdout[-1500:]}\n{answer.stderr[-3000:]}"


@pytest.fixture(scope="module")
def bin(tmp_path_factory):
    """A folder with a `ddb-fast` that hands everything on to the real one, with short lengths."""
    folder = tmp_path_factory.mktemp("bin")
    with fork_server.executables(
        folder, SHORTEN.format(short=SHORT, launch=str(folder / "launch"))
    ):
        yield folder


@pytest.fixture(scope="module")
def after_start(tmp_path_factory, bin):
    """The reader's folder at the end of docs/start.md."""
    folder = tmp_path_factory.mktemp("reader")
    photographs(folder)
    run_page(START, folder, bin)
    return folder


# --- tests -------------------------------------------------------------------------------------

named = functools.partial(
    pytest.mark.parametrize, ids=lambda page: str(page.relative_to(small.ROOT))
)


@pytest.mark.timeout(600)
@named("page", PAGES)
def test_what_a_page_says_to_type_works(page, after_start, bin, tmp_path):
    if page == START:
        assert (after_start / "runs").is_dir()
        return
    folder = tmp_path / "reader"
    shutil.copytree(after_start, folder)
    run_page(page, folder, bin)


@named("page", PAGES)
def test_commands_that_are_not_run_here_are_right(page):
    for block in blocks(page.read_text("utf-8")):
        for words in commands(block.text) if block.language == "sh" else ():
            try:
                if block.tag == "setup":
                    check_setup(words)
                elif block.tag in CHECKED:
                    check_command(words)
            except (AssertionError, SystemExit, OSError, StopIteration) as error:
                pytest.fail(f"line {block.line}: {shlex.join(words)}: {error}")


@named("page", PAGES)
def test_python_that_is_not_run_here_imports_what_exists(page):
    for block in blocks(page.read_text("utf-8")):
        parsed = ast.parse(block.text) if block.language == "python" and block.tag else ast.Module()
        for node in ast.walk(parsed):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    importlib.import_module(alias.name)
            elif isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                for alias in node.names:
                    assert hasattr(module, alias.name), f"line {block.line}: {alias.name}"


@named("page", PAGES)
def test_links_lead_somewhere(page):
    assert broken_links(page) == []


def test_the_index_leads_to_every_page():
    index = small.ROOT / "docs" / "README.md"
    listed = {(index.parent / link.split("#")[0]).resolve() for link in links(index.read_text())}
    assert {page for page in PAGES if page.parent == index.parent} - listed <= {index}


def test_every_command_is_documented():
    shown = {
        words[1]
        for page in PAGES
        for block in blocks(page.read_text("utf-8"))
        if block.language == "sh"
        for words in commands(block.text)
        if words[0] == "ddb-fast" and len(words) > 1
    }
    assert set(cli.COMMANDS) - shown == set()


# --- what the tests themselves are worth -------------------------------------------------------


@pytest.mark.parametrize(
    ("page", "told"),
    [
        ("# A\n```sh quick\ntrue\n```\n", "sh quick"),
        ("# A\n```\ntrue\n```\n", "''"),
        ("# A\n```sh\ntrue\n", "line 2: .* never closed"),
        ("# A\n````sh\ntrue\n```\n", "never closed"),
    ],
)
def test_a_page_of_another_form_is_refused(page, told):
    with pytest.raises(ValueError, match=told):
        blocks(page)


def test_scripts_keep_the_lines_of_the_page():
    page = "# A\n\n```sh\none\n```\n```sh gpu\ntwo\n```\n```sh\nthree\nfour\n```\n"
    lines = script(page, "sh").splitlines()
    assert [(i, line) for i, line in enumerate(lines, 1) if line] == [
        (4, "one"),
        (10, "three"),
        (11, "four"),
    ]


def test_commands_are_read_as_a_shell_reads_them():
    text = 'SETS="--a 1 --b"  # set\nA=1 run $SETS "x y" \\\n  --c ${OTHER}\n\nhead $(cat z)\n'
    assert commands(text) == [["run", "--a", "1", "--b", "x y", "--c", "1"], ["head", "1"]]


@pytest.mark.parametrize(
    "command",
    [
        "ddb-fast run digit --out x",
        "ddb-fast run lean --data x --classifier.rate 1",
        "ddb-fast sweep lean --data x",
        "ddb-fast data x --deep",
        "ddb-fast nothing --out x",
        "accelerate launch --gpus 2 ddb_fast/train.py lean --data x",
        "accelerate launch ddb_fast/train.py lean --data x --methods all",
        "accelerate launch -m ddb_fast/train.py lean --data x",
        "torchrun --nproc 2 --alone ddb_fast/train.py lean --data x",
        "srun --ntasks=2 torchrun --nnodes=2 train.py lean --data x",
        "python benchmarks/epochs.py x --nothing 1",
        "python benchmarks/nothing.py x",
        "curl x",
    ],
)
def test_a_wrong_command_is_found(command):
    with pytest.raises((AssertionError, SystemExit, OSError, StopIteration)):
        check_command(command.split())


@pytest.mark.parametrize(
    "command", ["make everything", "pip install ddb-fast[gpu]", "pip install -c pins.txt x", "rm x"]
)
def test_a_wrong_set_up_is_found(command):
    with pytest.raises(AssertionError):
        check_setup(command.split())


def test_a_broken_link_is_found(tmp_path, monkeypatch):
    page = tmp_path / "repository" / "page.md"
    page.parent.mkdir()
    (tmp_path / "page.md").touch()
    monkeypatch.setattr(small, "ROOT", page.parent)
    page.write_text(
        "# One thing: *this*\n[a](page.md#one-thing-this) [b](#two) ![c](no.png) [d](../page.md)\n"
        "[e](https://x.y/no) `[f](none.md)`\n# Two\n# Two\n[g](#two-1) [h](#two-2)\n"
    )
    assert broken_links(page) == ["no.png", "../page.md", "#two-2"]


def test_a_failing_command_is_named_by_its_line(tmp_path, bin):
    page = tmp_path / "page.md"
    page.write_text("# A\n\n```sh\ntrue\nfalse | cat\n```\n")
    with pytest.raises(AssertionError, match=r"page\.md line 5"):
        run_page(page, tmp_path, bin)


WORDS = (
    "import os, sys; name, words = 'ddb-fast', sys.argv[1:]\n"
    + SHORTEN.format(short=SHORT, launch="x")
    + "\nprint(*words)"
)


@pytest.mark.parametrize(
    ("words", "lacking"),
    [
        ("run digits --classifier.width 3", "classifier.width"),
        ("run tiny --data x", "data.rho"),
        ("sweep digits --rho 0.9", "data.rho"),
        ("run digits --diffusion x", "diffusion."),
        ("run digits --synthetic x", ("diffusion.", "sampling.")),
        ("run tiny --scores x --data y", ("diffusion.", "sampling.", "amplifier.", "data.rho")),
    ],
)
def test_runs_are_shortened_where_the_page_does_not_say_how_long(words, lacking):
    given = subprocess.run(
        [sys.executable, "-c", WORDS, *words.split()], capture_output=True, text=True, check=True
    ).stdout.split()
    assert given[: len(words.split())] == words.split()
    added = {word.removeprefix("--") for word in given[len(words.split()) :] if word[:2] == "--"}
    expected = {name for name in SHORT if not name.startswith(lacking)}
    assert added == expected | (
        {"audit", "launch", "seeds"} if words.startswith("sweep") else set()
    )


def test_a_command_ends_as_the_real_one_does(bin, tmp_path):
    for words, status, told in (
        ("env", 0, ""),
        ("data none", 2, "none: no such file"),
        ("", 2, ""),
    ):
        answer = small.run([str(bin / "ddb-fast"), *words.split()], cwd=tmp_path)
        assert (answer.returncode, told in answer.stderr) == (status, True), answer
