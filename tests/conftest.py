"""Runs under test stay on the CPU: they are compared bit for bit, which a GPU does not promise.

Triton's kernels run in its interpreter, which has to be asked for before triton is imported. Where
pytest-xdist runs several workers, each of them has one thread: threads that wait for each other
while another worker has the core cost more than they give.
"""

import os

os.environ["ACCELERATE_USE_CPU"] = "1"
os.environ["TRITON_INTERPRET"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
