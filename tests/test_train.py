"""What a run sets up for its process."""

import platform
import subprocess
import sys

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from ddb_fast.config import with_fields
from ddb_fast.presets import load_config
from ddb_fast.train import run

STEPS = """
import ctypes, resource, sys
from ddb_fast.train import keep_freed_memory

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p

def step():
    blocks = [ctypes.c_void_p(libc.malloc(1 << 20)) for _ in range(40)]
    for block in blocks:
        libc.memset(block, 1, 1 << 20)
    for block in blocks:
        libc.free(block)

if sys.argv[1] == "kept":
    keep_freed_memory()
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc")
def test_what_a_step_frees_is_there_for_the_next():
    faults = {}
    for how in ("kept", "returned"):
        command = [sys.executable, "-c", STEPS, how]
        answer = subprocess.run(command, capture_output=True, text=True, check=True)
        faults[how] = int(answer.stdout)
    # 10 steps touch 102,400 pages.
    assert faults["kept"] < 1_000 < 10_000 < faults["returned"], faults


def test_a_run_leaves_its_caller_as_it_was(monkeypatch, tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)
    seen = []

    def pipeline(config, accelerator, machine):
        seen.append((accelerator.mixed_precision, accelerator.gradient_accumulation_steps))
        torch.manual_seed(7)
        assert torch.get_num_threads() == 1
        torch.ones(1, requires_grad=True).mul(2).backward()  # whatever the caller switched off

    def call(precision):
        fields = {"precision": precision, "out": str(tmp_path), "threads": 1}
        run(with_fields(load_config("digits"), fields))

    monkeypatch.setattr("ddb_fast.pipeline.run_pipeline", pipeline)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    torch.set_num_threads(3)
    with torch.inference_mode():
        call("fp32")
    with torch.no_grad():
        call("bf16")
    assert torch.get_num_threads() == 3
    torch.set_num_threads(threads)
    assert seen == [("no", 1), ("bf16", 1)]
    assert torch.equal(torch.get_rng_state(), before)
    own = Accelerator(cpu=True, gradient_accumulation_steps=4)
    assert own.mixed_precision == "no", "the run's is not taken over"
    call("bf16")
    assert (own.mixed_precision, own.gradient_accumulation_steps) == ("no", 4)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
