"""Shell completion: the scripts know every word, and bash is really asked."""

import re
import shutil
import subprocess
import sys

import pytest

from ddb_fast import completion
from ddb_fast.arguments import SHORT, OneLineParser
from ddb_fast.cli import COMMANDS
from ddb_fast.completion import SHELLS, main, parser_of
from ddb_fast.config import METHODS
from ddb_fast.fields import flatten
from ddb_fast.presets import PRESETS

FIELDS = {f"--{name}" for name in flatten(PRESETS["ddb"]()) if name != "preset"}


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    """The file of each shell."""
    folder = tmp_path_factory.mktemp("scripts")
    with pytest.MonkeyPatch.context() as patched:
        for shell in SHELLS:
            written = []
            patched.setattr("sys.stdout.write", written.append)
            assert main([shell]) == 0
            (folder / shell).write_text("".join(written))
    return folder


@pytest.fixture(scope="module")
def ask(scripts):
    """What bash offers for the words of a line, the last of them unfinished."""
    if shutil.which("bash") is None:
        pytest.skip("bash is not installed")

    def answer(*words):
        # The function that `complete` has on record is called as the shell calls it on TAB.
        code = (
            'source "$1"; shift; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); '
            "set -- $(complete -p ddb-fast); "
            'while [[ $1 != -F ]]; do shift; done; "$2"; printf "%s\\n" "${COMPREPLY[@]}"'
        )
        command = ["bash", "-c", code, "bash", scripts / "bash", "ddb-fast", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stderr == ""
        return done.stdout.split()

    return answer


def test_no_parser_waits_for_torch():
    """Nor does any command's --help, which needs its parser alone."""
    code = (
        "import sys; from ddb_fast import completion; completion.main(['bash']);"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0


@pytest.mark.parametrize("shell", SHELLS)
def test_a_script_holds_every_command_field_and_preset(shell, scripts):
    words = set((scripts / shell).read_text().replace('"', " ").replace("'", " ").split())
    assert set(COMMANDS) <= words
    assert set(PRESETS) <= words and set(METHODS) <= words
    if shell == "fish":  # `-l name` for --name
        words |= {f"--{word}" for word in words}
    assert words >= FIELDS
    assert {f"--{name}" for name in SHORT} <= words


@pytest.mark.parametrize("shell", SHELLS)
def test_the_shell_itself_finds_no_fault(shell, scripts):
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    done = subprocess.run([shell, "-n", scripts / shell], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_commands_come_first(ask):
    assert ask("") == list(COMMANDS)
    assert ask("swe") == ["sweep"]
    assert ask("nothing", "") == []


def test_presets_come_after_run(ask):
    assert ask("run", "") == list(PRESETS)
    assert ask("run", "dig") == ["digits"]
    assert ask("run", "--precision", "bf16", "d") == ["ddb", "digits"]
    assert ask("run", "--dry-run", "l") == ["lean"]


def test_options_are_those_of_the_command(ask):
    offered = ask("run", "digits", "-")
    told = re.findall(r"^  (?:-h, )?(--[\w.-]+)", parser_of("run").format_help(), re.MULTILINE)
    assert sorted(offered) == sorted(["-h", *told])
    assert set(offered) > FIELDS
    assert ask("run", "digits", "--sampling.st") == ["--sampling.steps"]
    assert ask("compare", "--pub") == ["--published"]
    assert ask("env", "--") == ["--help"]


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (("run", "digits", "--precision", "b"), ["bf16"]),
        (("run", "digits", "--progress", ""), ["true", "false"]),
        (("run", "digits", "--methods", "ddb-i"), [m for m in METHODS if m.startswith("ddb-i")]),
        (("run", "digits", "--methods", "erm", "lf"), ["lff"]),
        (("run", "digits", "--methods", "no"), ["none"]),
        (("run", "digits", "--methods", "erm", "--seeds", "0", "--selection", "l"), ["last"]),
        (("sweep", "--methods", "dfr", "g"), ["group-dro"]),
        (("compare", "x", "--format", "=", "lat"), ["latex"]),
        (("compare", "x", "--format", "="), ["markdown", "latex", "json"]),
        (("compare", "x", "--metric", "worst_group_accuracy", "unb"), ["unbiased_accuracy"]),
        (("data", "photos/", "--as", "waterb"), ["waterbirds"]),
        (("kernels", ""), ["check"]),
        # Free values: nothing of ours, and `-o default` offers files.
        (("run", "tiny", "--data", ""), []),
        (("run", "tiny", "--diffusion.lr", ""), []),
    ],
)
def test_values_are_the_options_choices(words, offered, ask):
    assert ask(*words) == offered


def test_files_are_offered_where_no_word_is(scripts):
    assert "complete -o default -F _ddb_fast ddb-fast" in (scripts / "bash").read_text()


@pytest.mark.parametrize("command", COMMANDS)
def test_parsers_are_the_commands_own_and_are_let_go(command):
    assert parser_of(command).prog == f"ddb-fast {command}"
    assert "parse_args" not in vars(OneLineParser)


def test_a_command_without_such_a_parser_is_a_mistake_of_ours(monkeypatch):
    monkeypatch.setattr("ddb_fast.cli.main", lambda argv: 0)
    with pytest.raises(RuntimeError, match="env reads its arguments"):
        parser_of("env")
    assert "parse_args" not in vars(OneLineParser)


def test_words_that_a_shell_would_read_otherwise_are_refused(monkeypatch):
    monkeypatch.setattr(completion, "_VALUES", {"config": ("$(evil)",)})
    with pytest.raises(ValueError, match="evil"):
        completion.bash()


def test_another_shell_is_refused_in_a_line(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["tcsh"])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "tcsh" in line
