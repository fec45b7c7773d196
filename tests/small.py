"""The short configuration that the end-to-end tests share: every stage, seconds each."""

import contextlib
import functools
import gc
import json
import multiprocessing.connection
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
FIELDS = {
    "data.rho": "0.9",
    "diffusion.images": "1920",
    "diffusion.batch_size": "64",
    "diffusion.unet.channels": "16",
    "diffusion.unet.channel_multipliers": "1 2",
    "diffusion.unet.attention_levels": "1",
    "sampling.per_class": "12",
    "sampling.steps": "4",
    "sampling.batch_size": "16",
    "amplifier.images": "1920",
    "amplifier.width": "8",
    "classifier.images": "1920",
    "classifier.width": "8",
    "checkpoint_images": "640",
    "threads": "1",
    "precision": "fp32",
    "progress": "false",
    "seeds": "0 1",
    "methods": "erm ddb-i ddb-ii",
    # It trains the amplifier three times more; tests of the audit ask for it.
    "audit": "false",
}


def without_generator(fields: dict[str, str]) -> dict[str, str]:
    """The fields that `--synthetic` leaves to choose."""
    return {k: v for k, v in fields.items() if not k.startswith(("diffusion.", "sampling."))}


def arguments(
    out: Path, *, generator: Path | None = None, synthetic: Path | None = None, **changes: str
) -> list[str]:
    """`digits --out OUT --field value ...` with some fields changed (dots written as `__`).

    generator: a folder for `--diffusion`, which brings all fields of that section. synthetic: one
    for `--synthetic`.
    """
    fields = FIELDS | {name.replace("__", "."): value for name, value in changes.items()}
    words = ["digits", "--out", str(out)]
    if generator is not None:
        words += ["--diffusion", str(generator)]
        fields = {k: v for k, v in fields.items() if not k.startswith("diffusion.")}
    if synthetic is not None:
        words += ["--synthetic", str(synthetic)]
        fields = without_generator(fields)
    for name, value in fields.items():
        words += [f"--{name}", *value.split()]
    return words


def run(command: list[str], *, cwd: Path | None = None, **environment: str):
    """Run a command to its end, output captured as text."""
    return subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, env={**os.environ, **environment}
    )


# One process imports what a run imports, seconds of it, before any thread exists; every command is
# a fork of that. Forks share the seed of Python's hashes with it: that results do not depend on it
# is for the tests that start an interpreter of their own.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "ddb_fast.cli",
        "ddb_fast.pipeline",
        "ddb_fast.sweep",
        "ddb_fast.train",
        "matplotlib.figure",
        "pytest",  # where its command is the main module, a fork imports that again
        "sklearn.datasets",
        "torch._dynamo",
    ]
)


def _child(words: list[str], output: list[Path], cwd, environment, before) -> None:
    gc.freeze()  # what is imported is no garbage, and every training of a run looks for some
    for stream, path in enumerate(output, 1):
        with path.open("wb") as file:
            os.dup2(file.fileno(), stream)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["ddb-fast", *words]
    if before is not None:
        before()
    from ddb_fast import cli

    sys.exit(cli.main(words))


@contextlib.contextmanager
def started(words: list[str], *, before: Callable[[], None] | None = None, **environment: str):
    """`ddb-fast` with these words, in a process forked from one that has imported everything.

    before: called in the process first. Yields the process, and a function that waits for it and
    answers as `run` does.
    """
    with tempfile.TemporaryDirectory() as folder:
        output = [Path(folder, name) for name in ("stdout", "stderr")]
        given = (words, output, Path.cwd(), {**os.environ, **environment}, before)
        process = FORKS.Process(target=_child, args=given)

        def answer() -> subprocess.CompletedProcess:
            process.join()
            texts = (path.read_text() for path in output)
            return subprocess.CompletedProcess(words, process.exitcode, *texts)

        process.start()
        try:
            yield process, answer
        finally:
            process.kill()
            process.join()


def forked(words: list[str], **options):
    """Run `ddb-fast` to its end as `run` does, in a fork; options as those of `started`."""
    with started(words, **options) as (_, answer):
        return answer()


def ranks(count: int, words: list[str], *, before: Callable[[], None] | None = None):
    """Run `ddb-fast` on so many processes, with the environment that a launcher gives them.

    Where one ends badly the others are killed, as a launcher does. before: called in rank 0 first.
    Returns what rank 0 answered.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with contextlib.ExitStack() as stack:
        begun = []
        for rank in range(count):
            where = {"RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1"}
            where |= {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
            environment = {name: str(value) for name, value in where.items()} if count > 1 else {}
            one = started(words, before=None if rank else before, **environment)
            begun.append(stack.enter_context(one))
        waiting = [process for process, _ in begun]
        while waiting:
            multiprocessing.connection.wait([process.sentinel for process in waiting])
            waiting = [process for process in waiting if process.exitcode is None]
            if any(process.exitcode for process, _ in begun):
                for process in waiting:
                    process.kill()
        return begun[0][1]()


def ddb_fast(out: Path, **changes: str):
    """`ddb-fast run` in a process of its own."""
    return forked(["run", *arguments(out, **changes)])


def kill_at(out: str, text: str, number: int, when: str) -> None:
    """Have this process kill itself with SIGKILL before or after a file is renamed into place.

    It is the `number`th of those whose path below `out` contains `text`.
    """
    rename, seen = os.replace, [0]

    def replace(source, target):
        matches = text in os.path.relpath(target, out)
        seen[0] += matches
        hit = matches and seen[0] == number
        if hit and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target)
        if hit:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = replace


def killed(argv: list[str], kills: list[tuple[str, int, str]]) -> None:
    """Run a command, killed as `kills` say (path's text, number, before or after), to its end."""
    out = argv[argv.index("--out") + 1]
    for kill in kills:
        answer = forked(["run", *argv], before=functools.partial(kill_at, out, *kill))
        assert answer.returncode == -signal.SIGKILL, f"{kill}: {answer.stderr[-2000:]}"
    answer = forked(["run", *argv])
    assert answer.returncode == 0, answer.stderr


def results(out: Path) -> dict:
    """results.json without the seconds, which no two runs share."""
    loaded = json.loads((out / "results.json").read_text())
    del loaded["seconds"]
    return loaded
