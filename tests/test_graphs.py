"""How steps are launched: each happens once and in order, whatever is chosen or fails.

What a CUDA graph computes is checked on a GPU, by `benchmarks/suite.py --part correctness`; here
torch.cuda is a stand-in whose recordings call back.
"""

import contextlib
import functools
import logging
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from ddb_fast import graphs
from ddb_fast.config import Optimisation
from ddb_fast.data.samplers import ShuffledSampler
from ddb_fast.engine import Checkpoints, build_optimizer, fit, set_learning_rate
from ddb_fast.graphs import Forward, Step, why_no_graph
from ddb_fast.trackers import RunLog

CPU = torch.device("cpu")


class Machine:
    """A device whose clock moves by `eager` or `graph` seconds a step."""

    def __init__(self, monkeypatch, *, eager=3.0, graph=1.0, failure=None):
        self.now, self.eager, self.graph, self.failure = 0.0, eager, graph, failure
        self.plain, self.replayed, self.recorded = [], [], 0
        stream = SimpleNamespace(wait_stream=lambda other: None)
        for name, value in {
            "Stream": lambda device: stream, "current_stream": lambda device: stream,
            "stream": lambda s: contextlib.nullcontext(), "synchronize": lambda device: None,
            "empty_cache": lambda: None,
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(graphs, "capture", self.capture)
        monkeypatch.setattr(graphs.time, "perf_counter", lambda: self.now)

    def run(self, index):
        self.plain.append(index.item())
        self.now += self.eager
        return index * 2

    def capture(self, run, *given, stream=None):
        self.recorded += 1
        if self.failure:
            raise RuntimeError(self.failure)

        def replay(index):
            self.replayed.append(index.item())
            self.now += self.graph
            return index * 2

        return replay


def take(machine, how, count):
    step = Step(machine.run, device=CPU, how=how)
    losses = [step(torch.tensor(i)).item() for i in range(count)]
    assert losses == [2 * i for i in range(count)]
    return step


def test_a_faster_graph_is_kept(monkeypatch):
    machine = Machine(monkeypatch)
    take(machine, "auto", 30)
    assert machine.plain == list(range(9))
    assert machine.replayed == list(range(9, 30))
    assert machine.recorded == 1


def test_a_slower_graph_is_not(monkeypatch, caplog):
    machine = Machine(monkeypatch, eager=1.0, graph=3.0)
    with caplog.at_level(logging.INFO):
        take(machine, "auto", 30)
    # One replay that uploads the graph, six that are timed.
    assert machine.replayed == list(range(9, 16))
    assert machine.plain == [*range(9), *range(16, 30)]
    assert "1000.00 ms op by op, 3000.00 ms as a graph" in caplog.text


def test_a_graph_that_is_asked_for_is_not_timed(monkeypatch):
    machine = Machine(monkeypatch, eager=1.0, graph=3.0)
    take(machine, "graph", 10)
    assert machine.plain == [0, 1, 2]
    assert machine.replayed == list(range(3, 10))


@pytest.mark.parametrize("how", ["auto", "graph"])
def test_what_cannot_be_recorded_goes_on(monkeypatch, caplog, how):
    machine = Machine(monkeypatch, failure="operation not permitted\n when stream is capturing")
    take(machine, how, 20)
    assert machine.plain == list(range(20))
    assert machine.recorded == 1
    assert "op by op, not as a graph: operation not permitted when stream" in caplog.text


def test_a_short_training_is_never_recorded(monkeypatch):
    machine = Machine(monkeypatch)
    take(machine, "auto", 9)
    assert machine.plain == list(range(9)) and not machine.recorded


def test_losses_outlive_the_next_step(monkeypatch):
    machine = Machine(monkeypatch)
    result = torch.zeros(())
    machine.capture = lambda run, *given, stream=None: lambda index: result.copy_(index)
    monkeypatch.setattr(graphs, "capture", machine.capture)
    step = Step(machine.run, device=CPU, how="graph")
    losses = [step(torch.tensor(float(i))) for i in range(6)]
    assert [loss.item() for loss in losses[3:]] == [3, 4, 5]


def test_a_forward_pass_is_recorded_once_a_shape(monkeypatch):
    recorded = []

    def capture(run, *given):
        recorded.append([tuple(x.shape) for x in given])
        return run

    monkeypatch.setattr(graphs, "capture", capture)
    network = nn.Bilinear(2, 2, 1)
    network.null_class = 3
    forward = Forward(network)
    for n in (4, 2, 4, 2):
        x, y = torch.randn(n, 2), torch.randn(n, 2)
        assert torch.equal(forward(x, y), network(x, y))
    assert recorded == [[(4, 2), (4, 2)], [(2, 2), (2, 2)]]
    assert forward.null_class == 3
    assert next(forward.parameters()) is next(network.parameters())


def test_a_forward_pass_that_cannot_be_recorded_goes_on(monkeypatch, caplog):
    attempts = []

    def capture(run, *given):
        attempts.append(given[0].shape)
        raise RuntimeError("operation not permitted\n when stream is capturing")

    monkeypatch.setattr(graphs, "capture", capture)
    network = nn.Linear(2, 3)
    forward = Forward(network)
    for n in (4, 2, 4, 2):
        x = torch.randn(n, 2)
        assert torch.equal(forward(x), network(x))
    assert attempts == [(4, 2), (2, 2)]
    assert "op by op, not as a graph: operation not permitted when stream" in caplog.text


def test_a_forward_pass_without_room_to_record_says_so(monkeypatch):
    """Whoever samples answers with a smaller batch."""

    def capture(run, *given):
        raise torch.OutOfMemoryError("no more")

    monkeypatch.setattr(graphs, "capture", capture)
    forward = Forward(nn.Linear(2, 3))
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError, match="no more"):
            forward(torch.randn(4, 2))


def test_a_recording_that_fails_leaves_all_as_it_was(monkeypatch):
    """The generator's state is put back; memory that did not suffice is what is reported."""
    state, put_back = object(), []
    generator = SimpleNamespace(clone_state=lambda: state, graphsafe_set_state=put_back.append)

    @contextlib.contextmanager
    def recording(graph, **options):
        try:
            yield
        finally:
            raise RuntimeError("the recording is void")

    monkeypatch.setattr(torch.cuda, "default_generators", {None: generator})
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", recording)

    def exhausted(x):
        raise torch.OutOfMemoryError("no more")

    with pytest.raises(torch.OutOfMemoryError, match="no more"):
        graphs.capture(exhausted, torch.zeros(1))
    with pytest.raises(RuntimeError, match="void"):
        graphs.capture(lambda x: x, torch.zeros(1))
    assert put_back == [state, state]


def test_reasons_against_a_graph():
    cuda = torch.device("cuda", 0)
    assert why_no_graph(cuda) is None
    assert why_no_graph(CPU) == "cpu has no CUDA graphs"
    assert "2 processes" in why_no_graph(cuda, processes=2)
    assert "fp16" in why_no_graph(cuda, scaled=True)
    assert "the images stay on the host" in why_no_graph(cuda, on_host=True)


def test_the_learning_rate_is_a_number_or_a_tensor():
    parameter = nn.Parameter(torch.ones(2))
    for rate in (0.5, torch.tensor(0.5)):
        optimizer = torch.optim.AdamW([parameter], lr=rate, fused=True)
        set_learning_rate(optimizer, 0.25)
        assert float(optimizer.param_groups[0]["lr"]) == 0.25
        assert isinstance(optimizer.param_groups[0]["lr"], type(rate))
    config = Optimisation(images=1, batch_size=1, lr=0.5)
    assert build_optimizer(config, [parameter]).param_groups[0]["lr"] == 0.5


def trained(tmp_path, name, step_mode, **options):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, 1))
    x = torch.randn(32, 4)
    fit(
        (accelerator := Accelerator(cpu=True)),
        network,
        lambda model, index: (model(x[index]) - x[index].sum(1, keepdim=True)).square().mean(),
        config=Optimisation(images=80, batch_size=8, lr=1e-2, grad_clip=1.0),
        sampler=ShuffledSampler(32, seed=0),
        stage="test",
        seed=0,
        log=RunLog(accelerator, None),
        checkpoints=Checkpoints(path=tmp_path / f"{name}.safetensors"),
        step_mode=step_mode,
        show_progress=False,
        **options,
    )
    return network


def test_a_graph_where_there_can_be_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"cannot be one graph \(--step graph\): cpu has no"):
        trained(tmp_path, "graph", "graph")


def test_images_on_the_host_are_a_reason_before_anything_is_recorded(tmp_path, monkeypatch):
    asked = []

    def why(device, **options):
        asked.append(options)
        return "why not"

    monkeypatch.setattr("ddb_fast.engine.why_no_graph", why)
    trained(tmp_path, "auto", "auto", images_on_host=True)
    assert asked == [{"processes": 1, "scaled": False, "on_host": True}]
    with pytest.raises(ValueError, match=r"\(--step graph\): why not"):
        trained(tmp_path, "graph", "graph", images_on_host=True)


def test_a_compiled_step_trains_the_same_network(tmp_path, monkeypatch):
    """Traced once; what a compiler makes of it is the compiler's matter."""
    traced = []

    def backend(module, inputs):
        traced.append(module)
        return module.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    plain, network = (trained(tmp_path, mode, mode) for mode in ("eager", "compile"))
    assert len(traced) == 1
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, network.state_dict()[name]), name
