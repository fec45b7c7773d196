"""`ddb-fast completion`: what a shell needs to complete commands, options and their choices.

The script holds everything as words, so that a TAB starts no Python. It is made from the parsers
themselves, each caught when its command is about to read its arguments.
"""

import argparse
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ddb_fast.arguments import OneLineParser
from ddb_fast.config import METHODS
from ddb_fast.presets import PRESETS
from ddb_fast.tabular import COLUMNS

SHELLS = ("bash", "zsh", "fish")
_VALUES = {
    "config": PRESETS,
    "configs": PRESETS,
    "methods": (*METHODS, "none"),
    "metric": COLUMNS,
}
"""Values of arguments that are checked later than by their parser."""
_PLAIN = re.compile(r"[\w.+-]+")


@dataclass(frozen=True)
class Argument:
    """Names of an option, none of a positional; the values it takes where they are known; how many.

    takes: 0, 1, or 2 for several.
    """

    names: tuple[str, ...]
    values: tuple[str, ...]
    takes: int


class _CaughtError(Exception):
    """Carries a parser out of its command."""


def parser_of(command: str) -> argparse.ArgumentParser:
    """The parser that a command builds."""
    from ddb_fast.cli import main as cli_main

    def catch(parser: argparse.ArgumentParser, *_: object, **__: object) -> None:
        raise _CaughtError(parser)

    OneLineParser.parse_args = catch
    try:
        # With --help, a command that had another parser would print and end, and not start.
        cli_main([command, "--help"])
    except _CaughtError as caught:
        return caught.args[0]
    finally:
        del OneLineParser.parse_args  # the inherited one is there again
    raise RuntimeError(f"{command} reads its arguments with no OneLineParser")


def arguments_of(command: str) -> list[Argument]:
    """The arguments of a command, in the parser's order."""
    answer = []
    for action in parser_of(command)._actions:
        values = tuple(map(str, action.choices or _VALUES.get(action.dest, ())))
        if not values and isinstance(action.metavar, str) and action.metavar.startswith("{"):
            values = tuple(action.metavar.strip("{}").split(","))
        elif not values and action.metavar == "BOOL":
            values = ("true", "false")
        takes = {0: 0, None: 1}.get(action.nargs, 2)
        answer.append(Argument(tuple(action.option_strings), values, takes))
    return answer


def commands() -> dict[str, tuple[str, list[Argument]]]:
    """Every command with its line of help and its arguments."""
    from ddb_fast.cli import COMMANDS

    return {name: (text, arguments_of(name)) for name, text in COMMANDS.items()}


def _words(words: Iterable[str]) -> str:
    """Words as one, for a shell; they are our own, and need no quotes."""
    words = list(words)
    if strange := [word for word in words if not _PLAIN.fullmatch(word)]:
        raise ValueError(f"{strange[0]!r} would need quotes in a shell's script")
    return " ".join(words)


def _options(arguments: Iterable[Argument]) -> list[Argument]:
    return [argument for argument in arguments if argument.names]


def _positional(arguments: Iterable[Argument]) -> str:
    return _words(
        value for argument in arguments if not argument.names for value in argument.values
    )


_BASH = """\
_ddb_fast() {{
    local current=${{COMP_WORDS[COMP_CWORD]}} command=${{COMP_WORDS[1]}}
    local option="" between=0 takes=1 words="" i
    if [[ $COMP_CWORD -eq 1 ]]; then
        words="{commands}"
    elif [[ $current == -* ]]; then
        case $command in
{options}
        esac
    else
        # The option before the word, and how many words lie between. Bash parts --option=value.
        [[ $current == "=" ]] && current=""
        for ((i = COMP_CWORD - 1; i > 1; i--)); do
            case ${{COMP_WORDS[i]}} in
            =) ;;
            -*) option=${{COMP_WORDS[i]}}; break ;;
            *) between=$((between + 1)) ;;
            esac
        done
        [[ -z $option ]] && takes=0
        case "$command $option" in
{takes}
        esac
        if [[ $takes -eq 2 || $between -lt $takes ]]; then
            case "$command $option" in
{values}
            esac
        else
            case $command in
{positional}
            esac
        fi
    fi
    COMPREPLY=($(compgen -W "$words" -- "$current"))
}}
complete -o default -F _ddb_fast ddb-fast
"""


def _cases(lines: dict[str, list[str]], indent: int) -> str:
    """Branches of a `case`: what is done -> the patterns that lead to it."""
    space = " " * indent
    branches = [f"{space}{' | '.join(where)}) {what} ;;" for what, where in lines.items() if where]
    return "\n".join(branches) or f"{space}*) ;;"


def bash() -> str:
    """The script for bash."""
    known = commands()
    options: dict[str, list[str]] = {}
    takes: dict[str, list[str]] = {"takes=0": [], "takes=2": []}
    values: dict[str, list[str]] = {}
    positional: dict[str, list[str]] = {}
    for command, (_, arguments) in known.items():
        own = _options(arguments)
        names = _words(name for option in own for name in option.names)
        options.setdefault(f'words="{names}"', []).append(command)
        for option in own:
            where = [f'"{command} {name}"' for name in option.names]
            if option.takes != 1:
                takes[f"takes={option.takes}"] += where
            if option.values:
                values.setdefault(f'words="{_words(option.values)}"', []).extend(where)
        if given := _positional(arguments):
            positional.setdefault(f'words="{given}"', []).append(command)
    return _BASH.format(
        commands=_words(known),
        options=_cases(options, 8),
        takes=_cases(takes, 8),
        values=_cases(values, 12),
        positional=_cases(positional, 12),
    )


def zsh() -> str:
    """The script for zsh, which reads bash's."""
    load = "(( $+functions[compdef] )) || { autoload -Uz compinit && compinit }\n"
    return load + "autoload -Uz bashcompinit && bashcompinit\n" + bash()


def fish() -> str:
    """The script for fish."""
    lines = []
    for command, (text, arguments) in commands().items():
        told = text.replace("\\", "\\\\").replace("'", "\\'")
        lines.append(f"complete -c ddb-fast -n __fish_use_subcommand -fa {command} -d '{told}'")
        here = f"complete -c ddb-fast -n '__fish_seen_subcommand_from {command}'"
        if given := _positional(arguments):
            lines.append(f"{here} -a '{given}'")
        for option in _options(arguments):
            names = " ".join(
                f"-l {n[2:]}" if n.startswith("--") else f"-s {n[1:]}" for n in option.names
            )
            wants = f" -xa '{_words(option.values)}'" if option.values else " -r"
            lines.append(f"{here} {names}{wants if option.takes else ''}")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str], *, prog: str = "ddb-fast completion") -> int:
    """Print a shell's script."""
    parser = OneLineParser(
        prog=prog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="""Print the script that lets a shell complete ddb-fast's words. Once, for

bash  ddb-fast completion bash > ~/.local/share/bash-completion/completions/ddb-fast
      (where the package bash-completion is installed; else source a file of it in ~/.bashrc)
zsh   ddb-fast completion zsh > ~/.ddb-fast.zsh    and in ~/.zshrc: source ~/.ddb-fast.zsh
fish  ddb-fast completion fish > ~/.config/fish/completions/ddb-fast.fish""",
    )
    parser.add_argument("shell", choices=SHELLS)
    script = {"bash": bash, "zsh": zsh, "fish": fish}[parser.parse_args(argv).shell]()
    sys.stdout.write(f"# Completion of ddb-fast, by `{prog}`: make it anew with a new version.\n")
    sys.stdout.write(script)
    return 0
