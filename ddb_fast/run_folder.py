"""A run's folder: what is done, with which fields, and refusal to mix two configurations.

`manifest.json` holds, for each stage begun, the fields it depends on and whether it is done.
A stage is done only after its files were renamed into place, so a killed run is never trusted
further than it got.
"""

import errno
import fcntl
import hashlib
import json
import os
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
from ddb_fast.data.files import image_files
from ddb_fast.fields import fields_hash, flatten, to_json
from ddb_fast.provenance import FinishedRun, read_json
from ddb_fast.stages import STAGE_FIELDS, default_fields, stage_fields

GIVEN = {
    "diffusion.load": "diffusion",
    "sampling.load": "synthetic",
    "pseudo_labels.load": "scores",
}
"""What may be given to a run, and the stage that makes a copy of it."""
PRETRAINED = ("amplifier.weights", "classifier.weights")
"""What networks start from: no copy is made, and a run that has trained them all needs no file."""


def is_copied(config: RunConfig, name: str) -> bool:
    """Whether what was given is gone, and the run in `config.out` once made its copy of it."""
    source = flatten(config)[name]
    if Path(source, "model.safetensors" if name == "diffusion.load" else "").exists():
        return False
    try:
        run = FinishedRun.open(config.out)
    except ValueError:  # no run is there, or a damaged one: what is missing is what was given
        return False
    return GIVEN[name] in run.done and flatten(run.config)[name] == source


def _digest(name: str, source: Path) -> str:
    """Of the contents of what was given; OSError where it cannot be read."""
    digest = hashlib.sha256()
    if name == "sampling.load":
        for file in sorted(image_files(source, [])):
            content = hashlib.sha256(file.read_bytes()).hexdigest()
            digest.update(json.dumps([file.relative_to(source).as_posix(), content]).encode())
    else:
        file = source / "model.safetensors" if name == "diffusion.load" else source
        with file.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256")
    return digest.hexdigest()[:16]


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


def lock_folder(path: Path) -> IO[str]:
    """Keep a run's folder for this process until the file is closed; clear away what was cut off.

    ValueError, one line, where another process works there, or where nothing can be locked.
    """
    # The kernel lets go of it when the process ends, however it ends.
    lock = (path / ".lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        if isinstance(error, BlockingIOError):
            raise ValueError(f"{path}: another process is running here") from None
        if error.errno in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
            raise ValueError(
                f"{path}: its file system cannot lock files (flock: {error.strerror}), so two "
                "processes could spoil each other's work; use a folder on another one"
            ) from None
        raise
    # Of a process that was killed; the second is what safetensors writes before it gets our name.
    for pattern in (".*.part", ".tmp??????"):
        for unfinished in path.rglob(pattern):
            if unfinished.is_file():
                unfinished.unlink(missing_ok=True)
    return lock


class RunFolder:
    """The folder of one run, shared by all processes; only the main one writes.

    Every process keeps the same record in memory and so takes the same branch at every stage.
    Making one refuses what does not fit, and leaves nothing; then `lock`, and `open` on every
    process once that is done.
    """

    def __init__(self, config: RunConfig, *, fingerprint: str, device: str, writes: bool):
        self.path = Path(config.out)
        self._config, self._writes = config, writes
        # Contents, not places: of the data, and of what was given.
        self._contents = {"data.fingerprint": fingerprint}
        fields = flatten(config)
        self._places = {
            name: fields[name]
            for name in (*GIVEN, *PRETRAINED)
            if fields[name] not in (None, "imagenet")
        }
        self._copied = [name for name in GIVEN if name in self._places and is_copied(config, name)]
        self._gone = [
            name
            for name in PRETRAINED
            if name in self._places and not Path(self._places[name]).is_file()
        ]
        for name, place in self._places.items():
            if name not in (*self._copied, *self._gone):
                self._contents[name] = _digest(name, Path(place))
        self._lock: IO[str] | None = None
        self._manifest_path = self.path / "manifest.json"
        self._stages: dict[str, dict[str, Any]] = {}
        self._read()
        self._header = {
            "format": 1,
            "command": sys.argv,
            "device": device,
            "versions": versions(),
        }

    def _read(self) -> None:
        if self._manifest_path.exists():
            content = read_json(self._manifest_path)
            try:
                self._stages = content["stages"]
                for name in self._copied:
                    self._contents[name] = self._stages[GIVEN[name]]["fields"][name]
                self._refuse_differences()
            except (KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{self._manifest_path}: not a manifest ({error})") from None
        elif self.path.is_dir() and any(not p.name.startswith(".") for p in self.path.iterdir()):
            raise ValueError(f"{self.path} holds files but no run; name another folder with --out")

    def lock(self) -> None:
        """Create the folder and keep it for this run; ValueError as `lock_folder`."""
        if self._writes:
            try:
                str(self.path).encode()
            except UnicodeEncodeError:  # known to the disk, not to safetensors
                raise ValueError(f"--out {str(self.path)!r} is not valid Unicode") from None
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = lock_folder(self.path)

    def open(self) -> None:
        """Read what is there once it is locked, and record the new command.

        Another command may have begun a stage after the first reading; ValueError as that.
        """
        self._read()
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
                # Runs from before its contents counted are bound to the place of what was given.
                if there == here or (there is not None and there == self._places.get(name)):
                    continue
                if name in self._gone and there not in (None, "imagenet"):
                    continue
                differences[name] = f"{name} is {there} there, {here} here"
                # Two digests tell nobody anything.
                if name in self._places and None not in (there, here):
                    differences[name] = f"{name} is not what it began with"
        for name in self._copied:
            differences.pop(name, None)
        if "data.fingerprint" in differences:
            told = "the images, labels or splits are not those that it began with"
            differences["data.fingerprint"] = told
        if differences:
            raise ValueError(
                f"{self.path} holds a run with another configuration: "
                f"{'; '.join(differences.values())}. Name another folder with --out"
            )

    def _write(self) -> None:
        if self._writes:
            lock = Path(self._lock.name)
            if not (lock.exists() and os.path.samestat(lock.stat(), os.fstat(self._lock.fileno()))):
                # A manifest would vouch for files that are gone, or for those of another process.
                raise ValueError(f"{self.path}: removed or moved while the run was going on")
            content = {**self._header, "seconds": self.seconds(), "stages": self._stages}
            write_atomically(self._manifest_path, json.dumps(content, indent=2) + "\n")

    @property
    def known(self) -> str:
        """What every process has to see alike: which stages are bound to what, and done."""
        return json.dumps(self._stages, sort_keys=True)

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
