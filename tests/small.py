"""The short configuration that the end-to-end tests share: every stage, seconds each."""

import json
import os
import subprocess
import sys
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
    # It trains the amplifier five times more; tests of the audit ask for it.
    "audit": "false",
}


def arguments(out: Path, *, generator: Path | None = None, **changes: str) -> list[str]:
    """`digits --out OUT --field value ...` with some fields changed (dots written as `__`).

    generator: a folder for `--diffusion`, which brings all fields of that section.
    """
    fields = FIELDS | {name.replace("__", "."): value for name, value in changes.items()}
    words = ["digits", "--out", str(out)]
    if generator is not None:
        words += ["--diffusion", str(generator)]
        fields = {k: v for k, v in fields.items() if not k.startswith("diffusion.")}
    for name, value in fields.items():
        words += [f"--{name}", *value.split()]
    return words


def run(command: list[str], *, cwd: Path | None = None, **environment: str):
    """Run a command to its end, output captured as text."""
    return subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, env={**os.environ, **environment}
    )


def ddb_fast(out: Path, **changes: str):
    """`ddb-fast run` in a process of its own."""
    return run([sys.executable, "-m", "ddb_fast.cli", "run", *arguments(out, **changes)])


# A process that loads everything once and forks a child for each attempt. The child runs the same
# command and kills itself with SIGKILL just before or just after the n-th file whose path contains
# a given text is renamed into place.
ATTEMPTS = """
import os, signal, sys, json
import ddb_fast.pipeline, ddb_fast.train  # not run yet: forking before any thread exists
argv, kills = json.loads(sys.argv[1]), json.loads(sys.argv[2])
out = argv[argv.index("--out") + 1]
for kill in [*kills, None]:
    pid = os.fork()
    if pid == 0:
        if kill is not None:
            text, number, when = kill
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
        os._exit(ddb_fast.train.main(argv, prog="run"))
    status = os.waitpid(pid, 0)[1]
    print(kill, os.WIFSIGNALED(status) and os.WTERMSIG(status), os.WIFEXITED(status) and
          os.WEXITSTATUS(status), flush=True)
"""


def killed(argv: list[str], kills: list[tuple[str, int, str]]) -> None:
    """Run a command, killed as `kills` say (path's text, number, before or after), to its end."""
    answer = run([sys.executable, "-c", ATTEMPTS, json.dumps(argv), json.dumps(kills)])
    lines = [line for line in answer.stdout.splitlines() if line.startswith(("[", "None"))]
    assert lines[-1] == "None False 0", answer.stderr
    for kill, line in zip(kills, lines, strict=False):
        assert line == f"{list(kill)} 9 False", f"{line} for {kill}: {answer.stderr[-2000:]}"


def results(out: Path) -> dict:
    """results.json without the seconds, which no two runs share."""
    loaded = json.loads((out / "results.json").read_text())
    del loaded["seconds"]
    return loaded
