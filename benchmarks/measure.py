"""Timing: medians of CUDA graph replays over rotated inputs, or of interleaved calls on a CPU."""

import fcntl
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO
from unittest import mock

import torch

Call = Callable[[], object]

# Long enough that launching a graph does not count, in seconds.
_GRAPH = 2e-3
_REPLAYS = 20
# How much longer the slow replays of an undisturbed call take.
_STEADY = 1.1
# Without a device that says, an H100's, in bytes.
_L2 = 50 * 2**20


@dataclass(frozen=True)
class Timing:
    """Seconds for one call: the median, and the tenth and ninetieth of a hundred."""

    median: float
    low: float
    high: float
    how: str

    @classmethod
    def of(cls, seconds: Sequence[float], how: str) -> "Timing":
        tenths = statistics.quantiles(seconds, n=10, method="inclusive")
        return cls(statistics.median(seconds), tenths[0], tenths[-1], how)

    @property
    def spread(self) -> float:
        return self.high / self.low

    def row(self) -> dict[str, float | str]:
        return {"us": self.median * 1e6, "us_10": self.low * 1e6, "us_90": self.high * 1e6,
                "how": self.how}  # fmt: skip


def rotation(device: torch.device, footprint: int) -> int:
    """How many sets of operands of `footprint` bytes leave nothing of one set in the L2 cache."""
    if device.type != "cuda":
        return 1
    properties = torch.cuda.get_device_properties(device)
    cache = getattr(properties, "L2_cache_size", _L2)
    free = torch.cuda.mem_get_info(device)[0]
    wanted = max(2, math.ceil(3 * cache / max(1, footprint)))
    return max(1, min(wanted, 64, int(0.4 * free // max(1, footprint))))


_turns: TextIO | None = None
_held = False


@contextmanager
def taking_turns(lock: Path) -> Iterator[None]:
    """Inside, `alone` waits for every other process that takes turns by the same file.

    What torch.compile times to choose by waits for its turn too.
    """
    from torch._inductor.runtime.benchmarking import benchmarker

    global _turns
    usual = benchmarker.benchmark_gpu

    def benchmark_gpu(*arguments: Any, **options: Any) -> Any:
        with alone():
            return usual(*arguments, **options)

    with lock.open("a") as file, mock.patch.object(benchmarker, "benchmark_gpu", benchmark_gpu):
        _turns = file
        try:
            yield
        finally:
            _turns = None


@contextmanager
def alone() -> Iterator[None]:
    """The device is this process's until what it was given here is done; may be nested.

    But for what others compile: that they run, unasked, before they check and time it.
    """
    global _held
    if _turns is None or _held:
        yield
        return
    try:
        fcntl.flock(_turns, fcntl.LOCK_EX)
        _held = True
        yield
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    finally:
        _held = False
        fcntl.flock(_turns, fcntl.LOCK_UN)


@alone()
def timed(device: torch.device, build: Callable[[int], Call], sets: int) -> Timing:
    """Time the calls that `build(i)` returns for each set of operands, one after the other.

    On a GPU the steadiest of up to three times, if the first has a wide spread: somebody was there.
    """
    if device.type != "cuda":
        return interleaved({"": build(0)})[""]
    # Backward passes run on the stream of their forward pass, so all is built on the graph's.
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        calls = [build(i) for i in range(sets)]
        for call in calls[:2] * 3:
            call()
        stream.synchronize()
        once = _elapsed(stream, lambda: [call() for call in calls]) / len(calls)
    repeats = max(1, min(64, math.ceil(_GRAPH / max(1e-7, once * len(calls)))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(repeats):
            # Results live for a round, so that no call writes where the one before it wrote.
            kept = [call() for call in calls]
        del kept
    times, found = repeats * len(calls), []
    with torch.cuda.stream(stream):
        while len(found) < 3 and not any(timing.spread <= _STEADY for timing in found):
            graph.replay()
            graph.replay()
            seconds = [_elapsed(stream, graph.replay) / times for _ in range(_REPLAYS)]
            how = f"graph of {repeats}x{len(calls)} calls, {_REPLAYS} replays"
            found.append(Timing.of(seconds, how))
    return min(found, key=lambda timing: timing.spread)


def _elapsed(stream: torch.cuda.Stream, run: Call) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record(stream)
    run()
    end.record(stream)
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def interleaved(
    calls: Mapping[str, Call], *, rounds: int = 11, shortest: float = 2e-3
) -> dict[str, Timing]:
    """Time several calls on a CPU in turns, so that a slow moment of the machine meets them all.

    In each of the rounds a call is repeated for at least `shortest` seconds.
    """
    repeats = {}
    for name, call in calls.items():
        call()
        start = time.perf_counter()
        call()
        repeats[name] = max(1, math.ceil(shortest / max(1e-9, time.perf_counter() - start)))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            seconds[name].append((time.perf_counter() - start) / repeats[name])
    return {
        name: Timing.of(s, f"{rounds} interleaved rounds of {repeats[name]}")
        for name, s in seconds.items()
    }


def host_cost(device: torch.device, call: Call, *, calls: int = 100, rounds: int = 15) -> Timing:
    """Time that the host spends on a call, without waiting for what the device does."""
    call()
    seconds = []
    for _ in range(rounds):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            call()
        seconds.append((time.perf_counter() - start) / calls)
    return Timing.of(seconds, f"{rounds} rounds of {calls} calls, host only")
