"""Runs under test stay on the CPU: they are compared bit for bit, which a GPU does not promise.

Triton's kernels run in its interpreter, which has to be asked for before triton is imported. Where
pytest-xdist runs several workers, each of them has one thread: threads that wait for each other
while another worker has the core cost more than they give.
"""

import gc
import os
import sys

os.environ["ACCELERATE_USE_CPU"] = "1"
os.environ["TRITON_INTERPRET"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

SLOW = ("test_end_to_end.py", "test_docs.py", "test_methods.py", "test_many_devices.py")
"""Files that take minutes, few tests each."""


def pytest_collection_modifyitems(items):
    """The slow files first: begun last, one would keep one worker busy and the others idle."""
    items.sort(key=lambda item: item.path.name not in SLOW)


def pytest_collection_finish():
    """What was imported is no garbage: the collections at the end of each training pass it over."""
    if "triton" in sys.modules:
        from interpreter import remember_builtins

        remember_builtins()
    gc.freeze()
