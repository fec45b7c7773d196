"""`ddb-fast sweep`: presets x rho, each a run of its methods and seeds in a folder of its own.

Every run is a process: one process has one accelerator state, and a run that fails, or is killed
for its memory, takes none of the others with it. A finished run says so within seconds, so the same
command continues a sweep as it continues a run.
"""

import argparse
import json
import logging
import os
import shlex
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddb_fast.arguments import OneLineParser, add_field_arguments, run_config
from ddb_fast.compare import as_data, compare
from ddb_fast.compared_runs import Run, read_run
from ddb_fast.config import TAKES_RHO, RunConfig
from ddb_fast.presets import PRESETS, load_config
from ddb_fast.streams import log_to_stderr
from ddb_fast.tabular import markdown, percent

RENDERED = {"digits": 10, "colored-mnist": 10}
"""Classes of the data sets that are rendered here: at rho 1 / classes they are without bias."""
_PATIENCE = 20.0
"""Seconds for a run to end before it is told less kindly."""
_KEPT = 4096
"""Bytes of a run's last words, and of a read."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Planned:
    """A run to be: its configuration as resolved here, and the words that ask for it."""

    config: RunConfig
    words: tuple[str, ...]
    unbiased: bool = False

    @property
    def folder(self) -> str:
        return self.config.out


@dataclass(frozen=True)
class Failure:
    """A run that ended with another exit status than 0, and the last line it wrote."""

    folder: str
    status: int
    message: str

    def __str__(self) -> str:
        return f"{self.folder} failed (exit {self.status}): {self.message}"


# --- what is to be run -------------------------------------------------------------------------


def build_parser(prog: str) -> OneLineParser:
    parser = OneLineParser(
        prog=prog,
        allow_abbrev=False,
        usage="%(prog)s PRESET_OR_CONFIG [...] --out DIR [--data PATH | PRESET=PATH ...] "
        "[--rho R ...] [--do-no-harm] [any field below]",
        description="A run for each preset and rho, in DIR/PRESET or DIR/PRESET-rhoR, one after "
        "the other on this machine's default device; methods and seeds of a run share its "
        "generator and amplifier. The same command continues. At the end the runs are compared, "
        "on the screen and in DIR/results.md and DIR/results.json. Exit 1 if a run failed.",
    )
    parser.add_argument(
        "configs",
        metavar="PRESET_OR_CONFIG",
        nargs="+",
        help=f"{', '.join(PRESETS)}, or .json files, which are called by their names without .json",
    )
    parser.add_argument("--out", metavar="DIR", required=True, help="folder of the runs' folders")
    parser.add_argument(
        "--data",
        "--data.path",
        dest="data",
        metavar="[PRESET=]PATH",
        nargs="+",
        help="images: PATH for every preset but those whose data is embedded (digits), "
        "PRESET=PATH for one",
    )
    parser.add_argument(
        "--rho",
        "--data.rho",
        dest="rho",
        metavar="R",
        type=float,
        nargs="+",
        help="shares of bias-aligned training images, a run each; for data made with a rho only",
    )
    parser.add_argument(
        "--do-no-harm",
        action="store_true",
        help="also a run without bias (rho = 1 / classes), and each method's difference to erm "
        f"there; for data rendered here only ({', '.join(RENDERED)})",
    )
    parser.add_argument(
        "--published", action="store_true", help="published figures beside ours in the tables"
    )
    parser.add_argument(
        "--launch",
        metavar="COMMAND",
        help="start each run with this and not with Python alone, such as 'accelerate launch' or "
        "'torchrun --standalone --nproc_per_node=2'",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the runs' commands and stop")
    add_field_arguments(parser, without=("out", "data.path", "data.rho"))
    return parser


def _names(configs: Sequence[str]) -> list[str]:
    """What a sweep calls its configurations: presets by name, files without .json."""
    names = [name if name in PRESETS else Path(name).stem for name in configs]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"{twice[0]}: named twice, and both would run in one folder")
    return names


def _paths(words: Sequence[str], embedded: dict[str, bool]) -> dict[str, str]:
    """The data path of each configuration, from `PATH` and `NAME=PATH`; absent: none given."""
    paths, plain = {}, []
    for word in words:
        name, equals, path = word.partition("=")
        if equals and name in embedded:
            paths[name] = path
        else:
            plain.append(word)
    if len(plain) > 1:
        raise ValueError(
            f"--data {' '.join(plain)}: one PATH for all, or PRESET=PATH with a preset of this "
            f"sweep ({', '.join(embedded)})"
        )
    if plain:
        takers = [name for name, own in embedded.items() if not own and name not in paths]
        if not takers:
            raise ValueError(
                f"--data {plain[0]}: no preset of this sweep is left to take it; write PRESET=PATH"
            )
        paths |= dict.fromkeys(takers, plain[0])
    return paths


def plan(arguments: argparse.Namespace) -> list[Planned]:
    """The runs that parsed arguments ask for; ValueError, one line, before any of them begins."""
    own = {"configs", "out", "data", "rho", "do_no_harm", "published", "launch", "dry_run"}
    given = {k: v for k, v in vars(arguments).items() if k not in own and v is not None}
    names = _names(arguments.configs)
    sources = {
        name: given.get("data.source", load_config(config).data.source)
        for name, config in zip(names, arguments.configs, strict=True)
    }
    paths = _paths(arguments.data or (), {n: s == "digits" for n, s in sources.items()})
    planned = []
    for name, config in zip(names, arguments.configs, strict=True):
        # A path turns the preset `digits` into one for images of one's own.
        source = "auto" if name in paths and sources[name] == "digits" else sources[name]
        rhos: list[float | None] = list(arguments.rho or [None])
        if arguments.rho and source not in TAKES_RHO:
            raise ValueError(
                f"--rho: {name} reads images as they are (source {source}); rho is for "
                f"{', '.join(TAKES_RHO)}"
            )
        if arguments.do_no_harm:
            if source not in RENDERED:
                raise ValueError(
                    f"--do-no-harm: {name} (source {source}) has no unbiased version; it is for "
                    f"data rendered here, {', '.join(RENDERED)}"
                )
            rhos.append(1 / RENDERED[source])
        for rho in dict.fromkeys(rhos):
            folder = Path(arguments.out) / (name if rho is None else f"{name}-rho{rho}")
            fields = {"out": str(folder), **given}
            fields |= {"data.path": paths[name]} if name in paths else {}
            fields |= {} if rho is None else {"data.rho": rho}
            resolved = run_config(
                argparse.Namespace(config=config, dry_run=arguments.dry_run, **fields)
            )
            words = [config]
            for field, value in fields.items():
                words += [f"--{field}", *(value if isinstance(value, list) else [str(value)])]
            unbiased = arguments.do_no_harm and rho == 1 / RENDERED[source]
            planned.append(Planned(resolved, tuple(words), unbiased))
    if arguments.do_no_harm and any("erm" not in p.config.methods for p in planned):
        raise ValueError("--do-no-harm compares with erm: add erm to --methods")
    return planned


# --- running -----------------------------------------------------------------------------------


@contextmanager
def _terminated_like_interrupted():
    """Let SIGTERM and SIGHUP end the sweep as Ctrl-C does, so that no run is left behind."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:  # what nohup asks for
            signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_one(planned: Planned, launch: Sequence[str]) -> Failure | None:
    """Run to the end in a process of its own, its output passed on; what went wrong, if anything.

    KeyboardInterrupt passes once the process, and all that it started, has ended.
    """
    command = [*launch, "-m", "ddb_fast.train", *planned.words]
    try:
        # A group of its own: Ctrl-C reaches it once, from here, and not a second time on its own.
        process = subprocess.Popen(command, stderr=subprocess.PIPE, process_group=0)
    except OSError as error:
        raise ValueError(f"{command[0]}: cannot be started ({error.strerror})") from None
    told = b""
    try:
        while chunk := process.stderr.read1(_KEPT):
            sys.stderr.buffer.write(chunk)
            sys.stderr.buffer.flush()
            told = (told + chunk)[-_KEPT:]
        status = process.wait()
    except BaseException:
        _stop(process)
        raise
    finally:
        process.stderr.close()
    if status == 0:
        return None
    lines = told.decode(errors="replace").replace("\r", "\n").split("\n")
    said = [" ".join(line.split()) for line in lines if any(map(str.isalnum, line))]
    if status < 0:
        said = [f"ended by {signal.Signals(-status).name}"]
    return Failure(planned.folder, status, said[-1] if said else "it said nothing")


def _stop(process: subprocess.Popen) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(_PATIENCE)
            return
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            continue
        except ProcessLookupError:  # it had ended
            process.wait()
            return


# --- what came out -----------------------------------------------------------------------------


def harm(run: Run) -> dict[str, dict[str, Any]]:
    """Each method's average accuracy minus that of erm with the same seed, summarised over seeds.

    run: a finished one on data without bias, where the difference should not be negative.
    """
    from ddb_fast.metrics import summarise

    base = run.metric("erm", "average_accuracy")["seeds"]
    differences = {}
    for method in run.results["methods"]:
        if method != "erm":
            seeds = run.metric(method, "average_accuracy")["seeds"]
            differences[method] = summarise([x - y for x, y in zip(seeds, base, strict=True)])
    return differences


def _harm_text(found: dict[str, dict[str, dict[str, Any]]]) -> str:
    rows = [["run", "method", "difference"]]
    for folder, differences in found.items():
        for method, summary in differences.items():
            rows.append([folder, method, ("" if summary["mean"] < 0 else "+") + percent(summary)])
    return (
        f"### without bias: difference to erm\n\n{markdown(rows)}\n\n"
        "points of average accuracy on the test split, seed by seed; negative = harm\n"
    )


def run_sweep(
    planned: Sequence[Planned], *, out: Path, launch: Sequence[str], published: bool = False
) -> list[Failure]:
    """Run what is planned, compare what finished, write results.md and results.json in `out`.

    Returns the failures. ValueError if a launcher cannot be started or runs cannot be compared.
    """
    failures, finished = [], []
    for number, one in enumerate(planned, 1):
        logger.info("sweep: run %d of %d, %s", number, len(planned), one.folder)
        failure = run_one(one, launch)
        if failure is None:
            finished.append(one)
        else:
            failures.append(failure)
            print(f"sweep: {failure}", file=sys.stderr)
    # It brings torch, whose memory is better left to the runs while they last.
    from ddb_fast.checkpoint import write_atomically

    runs = {one.folder: read_run(one.folder) for one in finished}
    text = compare(list(runs.values()), published=published) if runs else "no run finished\n"
    data = as_data(list(runs.values()), published=published)
    unbiased = {one.folder: harm(runs[one.folder]) for one in finished if one.unbiased}
    if unbiased:
        text += "\n" + _harm_text(unbiased)
    if failures:
        text += "\n" + "".join(f"- {failure}\n" for failure in failures)
    data["difference_to_erm_without_bias"] = unbiased
    data["failed"] = [vars(failure) for failure in failures]
    write_atomically(out / "results.md", text)
    write_atomically(out / "results.json", json.dumps(data, indent=2) + "\n")
    print(f"\n{text}\ntables: {out / 'results.md'}\nfigures: {out / 'results.json'}")
    return failures


def main(argv: Sequence[str], *, prog: str = "ddb-fast sweep") -> int:
    """Sweep from arguments: 0, 1 if a run failed, 2 for a user's error, 130 if interrupted."""
    arguments = build_parser(prog).parse_args(argv)
    planned = plan(arguments)
    launch = shlex.split(arguments.launch) if arguments.launch else [sys.executable]
    if not launch:
        raise ValueError("--launch: empty; give a command such as 'accelerate launch'")
    if arguments.dry_run:
        for one in planned:
            print(shlex.join([*launch, "-m", "ddb_fast.train", *one.words]))
        return 0
    log_to_stderr()
    out = Path(arguments.out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: not a folder")
    if (out / "manifest.json").exists():
        raise ValueError(f"--out {out}: holds a run of its own; name another folder")
    try:
        with _terminated_like_interrupted():
            failures = run_sweep(planned, out=out, launch=launch, published=arguments.published)
    except KeyboardInterrupt:
        print(f"{prog}: interrupted; the same command continues", file=sys.stderr)
        return 130
    return 1 if failures else 0
