"""An optimised network as a `torch.export` program and as ONNX, run where nothing of ours is."""

import json
import logging
import subprocess
import sys

import pytest
import torch
from foreign_networks import AttentionBlock, QKVAttention, QKVAttentionLegacy, pair
from torch import nn

from ddb_fast.kernels import dispatch, native, optimize, use_backend

RUN = """
import sys, torch
alone = "ddb_fast" not in sys.modules
program = torch.export.load("program.pt2")
print(program.module()(*program.example_inputs[0]).tolist())
assert alone == ("ddb_fast" not in sys.modules)
"""


def network() -> nn.Module:
    return nn.Sequential(
        *(nn.GroupNorm(2, 16), nn.SiLU(), nn.Dropout(0.1), nn.GroupNorm(4, 16)),
        *(AttentionBlock(16, QKVAttention(2)), AttentionBlock(16, QKVAttentionLegacy(2))),
    )


def run_elsewhere(folder, program, *first) -> torch.Tensor:
    """What the program gives for its examples in a new process, which does `first` before."""
    torch.export.save(program, folder / "program.pt2")
    run = [sys.executable, "-c", "\n".join((*first, RUN))]
    answer = subprocess.run(run, cwd=folder, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    return torch.tensor(json.loads(answer.stdout))


@pytest.mark.parametrize("strict", (False, True))
def test_an_exported_network_runs_without_this_package(tmp_path, monkeypatch, caplog, strict):
    monkeypatch.setattr(dispatch, "_logged", set())
    model, original = (net.eval() for net in pair(network()))
    optimize(model)
    inputs = (torch.randn(2, 16, 3, 4),)
    with torch.no_grad(), caplog.at_level(logging.INFO, logger="ddb_fast.kernels"):
        program = torch.export.export(model, inputs, strict=strict)
    why = "an exported program gets torch's own operators, which are everywhere"
    assert {f"{op}: not native, because {why}" for op in dispatch.OPS} <= set(caplog.messages)
    y = run_elsewhere(tmp_path, program)
    torch.testing.assert_close(y, original(*inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(
    torch.__version__.startswith("2.10."),
    reason="torch 2.10 does not export the original with these sizes either",
)
def test_an_exported_network_takes_other_sizes():
    model, original = (net.eval() for net in pair(network()))
    optimize(model)
    sizes = ({0: torch.export.Dim("n"), 2: torch.export.Dim("h")},)
    with torch.no_grad():
        program = torch.export.export(model, (torch.randn(2, 16, 3, 4),), dynamic_shapes=sizes)
    x = torch.randn(5, 16, 11, 4)
    torch.testing.assert_close(program.module()(x), original(x), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(bool(native.why_not("group_norm")), reason="the C++ operators were not built")
def test_a_backend_asked_for_by_name_is_exported(tmp_path):
    """And finds its library itself, where nothing has asked yet whether it can be had."""
    model, original = (net.eval() for net in pair(network()))
    optimize(model)
    inputs = (torch.randn(2, 16, 3, 4),)
    with torch.no_grad(), use_backend(group_norm="native", attention="native"):
        program = torch.export.export(model, inputs)
    names = {str(node.target) for node in program.graph.nodes}
    assert {"ddb_fast.group_norm_native.default", "ddb_fast.attention_native.default"} <= names
    y = run_elsewhere(tmp_path, program, "import ddb_fast.kernels")
    torch.testing.assert_close(y, original(*inputs), rtol=1e-4, atol=1e-5)


def test_onnx():
    pytest.importorskip("onnxscript")
    model, original = (net.eval() for net in pair(network()))
    optimize(model)
    inputs = (torch.randn(2, 16, 3, 4),)
    program = torch.onnx.export(model, inputs, dynamo=True, verbose=False)
    # Where no runtime is installed: onnx's own evaluator.
    evaluator = pytest.importorskip("onnx.reference").ReferenceEvaluator(program.model_proto)
    (name,) = evaluator.input_names
    (y,) = evaluator.run(None, {name: inputs[0].numpy()})
    torch.testing.assert_close(torch.from_numpy(y), original(*inputs), rtol=1e-4, atol=1e-5)
