"""Steps and forward passes as CUDA graphs: recorded once, then launched as one.

The host needs 5 to 10 us for each of the thousands of kernels of a step, often more than a GPU
needs to run them; a recorded graph is launched in a few microseconds. What is computed is the same,
random numbers too: a graph draws from the default generator as seeded when it is replayed.
"""

import logging
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)


def capture(
    run: Callable[..., Tensor], *given: Tensor, stream: torch.cuda.Stream | None = None
) -> Callable[..., Tensor]:
    """Record `run(*given)` as a CUDA graph without running it; call the result with new tensors.

    run: has run before on these shapes, on `stream` where it runs backward, so that all is set up;
    waits for nothing and reads nothing from the host. What a call returns is overwritten by the
    next one. RuntimeError if it cannot be recorded, after which all works as before.
    """
    held = [x.clone() for x in given]
    device = held[0].device
    generator = torch.cuda.default_generators[device.index]
    # A capture that fails leaves the generator waiting for its end.
    untouched = generator.clone_state()
    graph = torch.cuda.CUDAGraph()
    # Weights cast to half precision before it are gone when the graph runs.
    torch.clear_autocast_cache()
    try:
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            result = run(*held)
    except RuntimeError as failure:
        generator.graphsafe_set_state(untouched)
        # To end a recording that memory did not suffice for may fail too, and hide the reason.
        if isinstance(failure.__context__, torch.OutOfMemoryError):
            raise failure.__context__ from None
        raise
    finally:
        torch.clear_autocast_cache()

    def replay(*new: Tensor) -> Tensor:
        for x, value in zip(held, new, strict=True):
            x.copy_(value, non_blocking=True)
        graph.replay()
        return result

    return replay


def why_no_graph(
    device: torch.device, *, processes: int = 1, scaled: bool = False, on_host: bool = False
) -> str | None:
    """Why a training step on this device cannot be one graph; None: nothing speaks against it.

    scaled: losses are scaled (fp16). on_host: the images are not in the device's memory.
    """
    if device.type != "cuda":
        return f"{device.type} has no CUDA graphs"
    if processes > 1:
        return f"{processes} processes exchange gradients within a step"
    if scaled:
        return "fp16's loss scaling decides on the host whether to step"
    if on_host:
        return "the images stay on the host, which looks up each batch"
    return None


class Step:
    """A training step that is launched op by op at first and then, where that pays, as one graph.

    run(index) -> loss: the whole step, from a batch's indices on the device. how: "graph" after a
    few steps; "auto" as well, unless as many steps op by op took less time; else op by op.
    A step that cannot be recorded goes on op by op, with a warning that says why.
    """

    WARM, TIMED = 3, 6

    def __init__(self, run: Callable[[Tensor], Tensor], *, device: torch.device, how: str):
        self._plain, self._device, self._how = run, device, how
        self._calls, self._began = 0, 0.0
        self._replay: Callable[[Tensor], Tensor] | None = None
        self._stream = torch.cuda.Stream(device) if how in ("auto", "graph") else None
        self._milliseconds: dict[str, float] = {}

    def __call__(self, index: Tensor) -> Tensor:
        if self._stream is not None:
            self._plan(index)
            self._calls += 1
        if self._replay is not None:
            return self._replay(index).clone()
        if self._stream is None:
            return self._plain(index)
        # Gradients and the graph's memory belong to the stream that they were made on.
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            loss = self._plain(index)
        current.wait_stream(self._stream)
        return loss

    def _plan(self, index: Tensor) -> None:
        """Before each of the first steps: time it, record it, choose."""
        timed = self.TIMED if self._how == "auto" else 0
        recorded = self.WARM + timed
        if timed and self._calls == self.WARM:
            self._started()
        if self._calls == recorded:
            if timed:
                self._ended("op by op")
            try:
                self._replay = capture(self._plain, index, stream=self._stream)
            except RuntimeError as reason:
                _warn("steps", reason)
                self._stream = None
                return
        # The first replay uploads the graph.
        if timed and self._calls == recorded + 1:
            self._started()
        if self._calls == recorded + 1 + timed:
            if timed:
                self._ended("as a graph")
                self._choose()
            self._stream = None

    def _started(self) -> None:
        torch.cuda.synchronize(self._device)
        self._began = time.perf_counter()

    def _ended(self, name: str) -> None:
        torch.cuda.synchronize(self._device)
        self._milliseconds[name] = 1e3 * (time.perf_counter() - self._began) / self.TIMED

    def _choose(self) -> None:
        plain, graph = self._milliseconds["op by op"], self._milliseconds["as a graph"]
        logger.info("a step takes %.2f ms op by op, %.2f ms as a graph", plain, graph)
        if plain < graph:
            self._replay = None
            torch.cuda.empty_cache()


class Forward:
    """A network in evaluation mode whose forward passes are graphs, one for each shape of inputs.

    Behaves as the network for what sampling asks of it. The caller's autocast is recorded with it.
    A shape that cannot be recorded runs op by op, with a warning that says why; where memory does
    not suffice, OutOfMemoryError.
    """

    def __init__(self, network: nn.Module):
        self._network = network
        self._recorded: dict[tuple[Any, ...], Callable[..., Tensor]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._network, name)

    def __call__(self, *given: Tensor) -> Tensor:
        key = tuple((x.shape, x.dtype, x.stride()) for x in given)
        if key not in self._recorded:
            self._network(*given)
            self._recorded[key] = self._record(given)
        return self._recorded[key](*given)

    def _record(self, given: tuple[Tensor, ...]) -> Callable[..., Tensor]:
        try:
            return capture(self._network, *given)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as reason:
            _warn("forward passes", reason)
            return self._network


def _warn(what: str, reason: RuntimeError) -> None:
    text = " ".join(str(reason).split())[:200]
    logger.warning("%s are launched op by op, not as a graph: %s", what, text)
