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


def results(out: Path) -> dict:
    """results.json without the seconds, which no two runs share."""
    loaded = json.loads((out / "results.json").read_text())
    del loaded["seconds"]
    return loaded
