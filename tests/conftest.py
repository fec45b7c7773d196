"""Runs under test stay on the CPU: they are compared bit for bit, which a GPU does not promise.

Triton's kernels run in its interpreter, which has to be asked for before triton is imported.
"""

import os

os.environ["ACCELERATE_USE_CPU"] = "1"
os.environ["TRITON_INTERPRET"] = "1"
