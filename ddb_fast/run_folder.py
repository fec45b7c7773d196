"""A run's folder: what is done, with which fields, and refusal to mix two configurations.

`manifest.json` holds, for each stage begun, the fields it depends on and whether it is done.
A stage is done only after its files were renamed into place, so a killed run is never trusted
further than it got.
"""

import fcntl
import hashlib
import json
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import torch

import ddb_fast
from ddb_fast.checkpoint import write_atomically
from ddb_fast.config import (
    METHODS,
    RunConfig,
)
from ddb_fast.fields import fields_hash, to_json
from ddb_fast.stages import STAGE_FIELDS, default_fields, stage_fields


def _git_commit() -> str | None:
    """The commit of a source checkout; None for an installed package."""
    folder = Path(ddb_fast.__file__).parent
    if not (folder.parent / ".git").exists():
        return None
    try:
        answer = subprocess.run(
            ["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True
        )
    except OSError:  # no git on this machine
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None


def versions() -> dict[str, str | None]:
    """Versions that a result depends on, for the manifest and the report."""
    import accelerate
    import numpy

    return {
        "ddb_fast": ddb_fast.__version__,
        "git": _git_commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "accelerate": accelerate.__version__,
        "numpy": numpy.__version__,
    }


class RunFolder:
    """The folder of one run, shared by all processes; only the main one writes.

    Every process keeps the same record in memory and so takes the same branch at every stage.
    """

    def __init__(self, config: RunConfig, *, fingerprint: str, device: str, writes: bool):
        self.path = Path(config.out)
        self._config, self._writes = config, writes
        # Contents, not places: of the data, and of scores that were given.
        self._contents = {"data.fingerprint": fingerprint}
        if config.pseudo_labels.load is not None:
            scores = Path(config.pseudo_labels.load).read_bytes()
            self._contents["pseudo_labels.load"] = hashlib.sha256(scores).hexdigest()[:16]
        self._lock: IO[str] | None = None
        self._manifest_path = self.path / "manifest.json"
        self._stages: dict[str, dict[str, Any]] = {}
        if self._manifest_path.exists():
            try:
                self._stages = json.loads(self._manifest_path.read_text("utf-8"))["stages"]
                self._refuse_differences()
            except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{self._manifest_path}: not a manifest ({error})") from None
        elif self.path.is_dir() and any(not p.name.startswith(".") for p in self.path.iterdir()):
            raise ValueError(f"{self.path} holds files but no run; name another folder with --out")
        self._header = {
            "format": 1,
            "command": sys.argv,
            "device": device,
            "versions": versions(),
        }

    def open(self) -> None:
        """Create the folder or record the new command; call it once every process has read it."""
        if self._writes:
            self.path.mkdir(parents=True, exist_ok=True)
            # The kernel lets go of it when the process ends, however it ends.
            self._lock = (self.path / ".lock").open("w")
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"{self.path}: another process is running here") from None
            self._write()

    def record(self) -> None:
        """Write the configuration, once nothing is left that could refuse it."""
        if self._writes:
            write_atomically(self.path / "config.json", to_json(self._config))

    def close(self) -> None:
        """Let other processes run here."""
        if self._lock is not None:
            self._lock.close()

    def _fields(self, key: str) -> dict[str, Any]:
        fields = stage_fields(self._config, key.split("/")[0])
        contents = {n: v for n, v in self._contents.items() if n in fields or n.startswith("data.")}
        return {**fields, **contents}

    def _refuse_differences(self) -> None:
        differences, defaults = {}, default_fields()
        for key, entry in self._stages.items():
            if key.split("/")[0] not in STAGE_FIELDS:
                continue  # of another version of this package
            asked = self._fields(key)
            for name in sorted(set(asked) | set(entry["fields"])):
                # A field that came after this run was begun had its default there.
                there = entry["fields"].get(name, defaults.get(name))
                here = asked.get(name)
                if there != here:
                    differences[name] = f"{name} is {there} there, {here} here"
        if "data.fingerprint" in differences:  # two digests tell nobody anything
            told = "the images, labels or splits are not those that it began with"
            differences["data.fingerprint"] = told
        if differences:
            raise ValueError(
                f"{self.path} holds a run with another configuration: "
                f"{'; '.join(differences.values())}. Name another folder with --out"
            )

    def _write(self) -> None:
        if self._writes:
            content = {**self._header, "seconds": self.seconds(), "stages": self._stages}
            write_atomically(self._manifest_path, json.dumps(content, indent=2) + "\n")

    def done(self, key: str) -> bool:
        """Whether the results of `stage` or `method/seedN` are complete."""
        return self._stages.get(key, {}).get("done", False)

    def begin(self, key: str) -> None:
        """Bind a stage to today's fields."""
        fields = self._fields(key)
        self._stages[key] = {"done": False, "hash": fields_hash(fields), "fields": fields}
        self._write()

    def finish(self, key: str, seconds: float) -> None:
        """Record that the files of a stage are in place."""
        self._stages[key] |= {"done": True, "seconds": round(seconds, 3)}
        self._write()

    def forget(self, key: str) -> None:
        """Undo `begin` of a stage that refused its input and left nothing."""
        del self._stages[key]
        self._write()

    def extended(self) -> RunConfig:
        """The configuration with the methods and seeds that were finished here before added."""
        finished = [key.split("/seed") for key in self._stages if "/seed" in key and self.done(key)]
        methods = {*self._config.methods, *(method for method, _ in finished)}
        seeds = {*self._config.seeds, *(int(seed) for _, seed in finished)}
        self._config = replace(
            self._config,
            methods=tuple(m for m in METHODS if m in methods),
            seeds=tuple(sorted(seeds)),
        )
        return self._config

    def seconds(self) -> dict[str, float]:
        """Seconds of each finished stage."""
        return {key: e["seconds"] for key, e in self._stages.items() if e["done"]}
