"""Runs under test stay on the CPU: they are compared bit for bit, which a GPU does not promise."""

import os

os.environ["ACCELERATE_USE_CPU"] = "1"
