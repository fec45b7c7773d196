"""What a page of the documentation holds: blocks, commands, links; and whether they are right.

A fenced block's info string is its language and at most one tag; `TAGS` and `LANGUAGES` name all
there are, tests/test_docs.py what becomes of each.
"""

import contextlib
import functools
import io
import re
import shlex
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import small
from ddb_fast import cli
from ddb_fast.train import main as train_main

CHECKED = {"gpu", "cluster", "data", "account", "slow"}
"""Tags of blocks that need what is not here: they are checked, not run."""
TAGS = {"sh": {"setup", *CHECKED}, "python": {"fragment", *CHECKED}}
LANGUAGES = {"sh", "python", "text", "json", "csv", "html"}


class Block(NamedTuple):
    """A fenced block; `line` is that of its first line of text, from 1."""

    language: str
    tag: str
    line: int
    text: str


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page; ValueError for one that is unclosed or of an unknown kind."""
    found, fence, language, tag, start = [], "", "", "", 0
    lines = page.splitlines()
    for number, line in enumerate(lines, 1):
        match = re.match(r" {0,3}(`{3,}|~{3,})\s*(.*?)\s*$", line)
        if fence:
            if match and not match[2] and match[1].startswith(fence):
                text = "\n".join(lines[start : number - 1])
                found.append(Block(language, tag, start + 1, text))
                fence = ""
        elif match:
            fence, start = match[1], number
            language, _, tag = match[2].partition(" ")
            if language not in LANGUAGES or (tag and tag not in TAGS.get(language, ())):
                raise ValueError(f"line {number}: no block is called {match[2]!r} here")
    if fence:
        raise ValueError(f"line {start}: a block that is never closed")
    return found


def script(page: str, language: str) -> str:
    """A page's untagged blocks of one language, everything else made blank: lines stay in place."""
    lines = [""] * len(page.splitlines())
    for block in blocks(page):
        if (block.language, block.tag) == (language, ""):
            text = block.text.splitlines()
            lines[block.line - 1 : block.line - 1 + len(text)] = text
    return "\n".join(lines) + "\n"


def commands(text: str) -> list[list[str]]:
    """The commands of shell text as words: continued lines joined, NAME=... put in for $NAME.

    What only the reader's shell knows, `$NAME` of another and `$(...)`, becomes 1.
    """
    known, found = {}, []
    for line in re.sub(r"\\\n", " ", text).splitlines():
        line = re.sub(r"\$\([^()]*\)", "1", line)
        line = re.sub(r"\$\{?(\w+)\}?", lambda m: known.get(m[1], "1"), line)
        words = shlex.split(line, comments=True)
        while words and (match := re.fullmatch(r"(\w+)=(.*)", words[0], re.DOTALL)):
            known[match[1]] = match[2]
            words = words[1:]
        if words:
            found.append(words)
    return found


# --- commands that are not run here ------------------------------------------------------------


def _said(call, words: list[str]) -> str:
    """What a command line of ours prints, called in this process; AssertionError if it refuses."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = call(words)
        except SystemExit as end:
            status = end.code or 0
    assert status == 0, err.getvalue()
    return out.getvalue()


@functools.cache
def _help(command: str) -> str:
    return _said(cli.main, [command, "--help"])


def _check_launcher(words: list[str]) -> list[str]:
    """What is launched: the words after train.py, once the launcher's own parser took the rest."""
    at = next(i for i, word in enumerate(words) if word.endswith(("/train.py", "ddb_fast.train")))
    assert words[at] in ("ddb_fast/train.py", "ddb_fast.train"), words[at]
    if words[0] == "srun":
        # Options of srun that take a word are written with `=`.
        first = next(i for i, word in enumerate(words[1:], 1) if not word.startswith("-"))
        words, at = words[first:], at - first
    if words[0] == "torchrun":
        from torch.distributed.run import get_args_parser

        parsed, own = get_args_parser(), words[1:]
    else:
        assert words[:2] == ["accelerate", "launch"], words
        from accelerate.commands.launch import launch_command_parser

        parsed, own = launch_command_parser(), words[2:]
    taken = parsed.parse_args(own)
    assert taken.training_script == words[at]
    assert bool(taken.module) == (words[at] == "ddb_fast.train"), "-m goes with ddb_fast.train"
    return taken.training_script_args


def check_command(words: list[str]) -> None:
    """Check a command that needs what is not here; AssertionError or SystemExit if it is wrong."""
    if words[0] in ("srun", "torchrun", "accelerate"):
        _said(
            functools.partial(train_main, prog="train.py"), [*_check_launcher(words), "--dry-run"]
        )
    elif words[0] == "python":
        source = (small.ROOT / words[1]).read_text()
        for option in (word for word in words if word.startswith("--")):
            # An option of ours, or a field that the script hands on.
            assert f'"{option}"' in source or option in _help("run").split(), option
    elif words[0] == "ddb-fast" and words[1] in ("run", "sweep"):
        _said(cli.main, [*words[1:], "--dry-run"])
    elif words[0] == "ddb-fast":
        known = set(re.findall(r"--[\w.-]+", _help(words[1])))
        assert {w.split("=")[0] for w in words if w.startswith("--")} <= known, words
    else:
        assert words[0] in ("export", "cd", "sbatch", "hf"), f"{words[0]}: not known here"


def check_setup(words: list[str]) -> None:
    """Check what installs: targets of the Makefile, extras of the package, files that are named."""
    if words[0] == "make":
        makefile = (small.ROOT / "Makefile").read_text()
        for target in (word for word in words[1:] if "=" not in word):
            assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE), target
        return
    if words[0] == "ddb-fast":
        check_command(words)
        return
    assert words[0] in ("git", "cd", ".", "pip", "python3"), f"{words[0]}: not known here"
    if words[0] == "pip":
        extras = re.findall(r"\[([\w,]+)\]", " ".join(words))
        declared = (small.ROOT / "pyproject.toml").read_text()
        for extra in ",".join(extras).split(",") if extras else ():
            assert re.search(rf"^{extra} = \[", declared, re.MULTILINE), extra
        for option, file in pairwise(words):
            assert option != "-c" or (small.ROOT / file).is_file(), file


# --- links -------------------------------------------------------------------------------------


def prose(page: str) -> str:
    """A page without its fenced blocks and code spans, which hold no links; lines stay in place."""
    lines = page.splitlines()
    for block in blocks(page):
        for i in range(block.line - 1, block.line - 1 + len(block.text.splitlines())):
            lines[i] = ""
    return re.sub(r"`[^`\n]+`", "", "\n".join(lines))


def anchors(page: str) -> set[str]:
    """The names of a page's headings, as GitHub makes them."""
    seen: dict[str, int] = {}
    names = set()
    fenced = {i for b in blocks(page) for i in range(b.line, b.line + len(b.text.splitlines()))}
    for number, line in enumerate(page.splitlines(), 1):
        if number not in fenced and (match := re.match(r"#{1,6} +(.+?)\s*#*$", line)):
            text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", match[1]).lower()
            name = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
            seen[name] = seen.get(name, -1) + 1
            names.add(f"{name}-{seen[name]}" if seen[name] else name)
    return names


def links(page: str) -> list[str]:
    """The relative targets of a page's links and pictures."""
    targets = re.findall(r"\]\(\s*<?([^)\s>]+)>?[^)]*\)", prose(page))
    return [t for t in targets if not re.match(r"[a-z]+:", t)]


def broken_links(page: Path) -> list[str]:
    """The links of a page that lead nowhere."""
    broken = []
    for target in links(page.read_text("utf-8")):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        inside = file.is_relative_to(small.ROOT) and file.exists()
        if not inside or (anchor and anchor not in anchors(file.read_text("utf-8"))):
            broken.append(target)
    return broken
