"""Measured rows in a JSON-lines file: flushed one by one, continued by the next call.

The first line of a file says what was measured on; a file is never continued on another device or
with other versions.
"""

import gc
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]
# A key, and what measures it.
Item = tuple[str, Callable[[], Row]]


def describe(device: torch.device) -> Row:
    """What figures depend on: the device, and the versions of everything that computes."""
    try:
        from triton import __version__ as triton
    except ImportError:
        triton = None
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{_processor()}, {torch.get_num_threads()} threads"
    return {
        "device": name,
        "type": device.type,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton,
        "python": platform.python_version(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def read(path: Path) -> tuple[Row, dict[str, Row]]:
    """Read a file: what it was measured on, and its rows by key. A torn last line is left out.

    Raises ValueError if the first line is not the description that `Rows` writes.
    """
    lines = path.read_text("utf-8").splitlines(keepends=True)
    complete = [json.loads(line) for line in lines if line.endswith("\n")]
    if not complete or "device" not in complete[0]:
        raise ValueError(f"{path}: its first line does not say what was measured on")
    return complete[0], {row["key"]: row for row in complete[1:]}


def of_part(folder: Path, part: str) -> tuple[Row, dict[str, Row]] | None:
    """`read` of a part and of its shares, None if nothing of it is there.

    What failed in one is as it was measured in another. Raises ValueError if they were not
    measured on the same machine.
    """
    paths = [path for path in (folder / f"{part}.jsonl",) if path.exists()]
    paths += sorted(folder.glob(f"{part}-[0-9]*-of-*.jsonl"))
    if not paths:
        return None
    measured_on, found = read(paths[0])
    for path in paths[1:]:
        other, more = read(path)
        if other != measured_on:
            raise ValueError(f"{path} and {paths[0]} were not measured on the same machine")
        found |= {k: row for k, row in more.items() if "error" in found.get(k, {"error": ""})}
    return measured_on, found


class Rows:
    """The rows of one file, by key; `add` returns when the row is on the disk.

    Raises ValueError if the file was written on another device or with other versions.
    """

    def __init__(self, path: Path, measured_on: Row):
        self.path = path
        self.rows: dict[str, Row] = {}
        if path.exists() and path.read_text("utf-8").count("\n"):
            found, self.rows = read(path)
            differing = [k for k in {**found, **measured_on} if found.get(k) != measured_on.get(k)]
            if differing:
                what = ", ".join(
                    f"{k} {found.get(k)!r}, here {measured_on.get(k)!r}" for k in differing
                )
                raise ValueError(f"{path} was measured elsewhere ({what}); choose another --out")
            # A line torn by a kill would swallow the next row.
            text = path.read_text("utf-8")
            if not text.endswith("\n"):
                path.write_text(text[: text.rindex("\n") + 1], "utf-8")
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(measured_on) + "\n", "utf-8")

    def __contains__(self, key: str) -> bool:
        return key in self.rows

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows.values())

    def add(self, key: str, row: Row) -> None:
        self.rows[key] = {"key": key, **row}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(self.rows[key]) + "\n")
            file.flush()
            os.fsync(file.fileno())


def measure_all(
    rows: Rows, items: Iterable[Item], *, seconds: float, device: torch.device
) -> list[str]:
    """Measure what is missing until the time is up; returns the keys that are left.

    What cannot be measured becomes a row with the reason as its "error". No item is begun that
    would end late if it took as long as the longest one so far. One that is not done at the end is
    broken off: it is left for the next call, unless it had all the time of this one.

    Raises RuntimeError if the device does not answer any more: only a new process can go on.
    """
    began, longest = time.monotonic(), 0.0
    waiting = [(key, run) for key, run in items if key not in rows]
    while waiting and time.monotonic() - began + longest < seconds:
        key, run = waiting[0]
        start = time.monotonic()
        try:
            with _deadline(seconds - (start - began)):
                row = run()
        except Exception as failure:
            # Whatever it has become on its way: compilers wrap what they did not expect.
            if longest > 0 and time.monotonic() - began >= seconds:
                break
            row = {"error": reason(failure)}
        waiting.pop(0)
        rows.add(key, {**row, "took": round(time.monotonic() - start, 2)})
        print(f"{key}: {_summary(row)}", flush=True)
        if device.type == "cuda":
            _release(device)
        longest = max(longest, time.monotonic() - start)
    return [key for key, _ in waiting]


def in_own_process(script: str, *words: object) -> Row:
    """The row that a script prints as its last line; RuntimeError with how it ended."""
    command = [sys.executable, script, *map(str, words)]
    answer = subprocess.run(command, capture_output=True, text=True)
    if answer.returncode:
        raise RuntimeError(answer.stderr[-300:])
    return json.loads(answer.stdout.splitlines()[-1])


def reason(failure: Exception) -> str:
    """In one line."""
    return f"{type(failure).__name__}: {' '.join(str(failure).split())[:300]}"


@contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    def stop(number: int, frame: Any) -> None:
        raise TimeoutError(f"not done after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _summary(row: Row) -> str:
    if "error" in row:
        return row["error"]
    return ", ".join(f"{k} {x:.4g}" for k, x in row.items() if isinstance(x, float))


def _release(device: torch.device) -> None:
    gc.collect()
    try:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    except RuntimeError as error:
        raise RuntimeError(
            f"the device does not answer after this row, run the same command again: {error}"
        ) from None
