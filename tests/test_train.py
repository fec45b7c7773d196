"""What a run sets up for its process."""

import platform
import subprocess
import sys

import pytest

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
