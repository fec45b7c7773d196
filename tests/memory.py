"""Memory that tells on whoever reads or writes what is not theirs."""

from collections import defaultdict
from contextlib import contextmanager
from unittest import mock

import torch
from triton.runtime.interpreter import InterpreterBuilder

from ddb_fast.kernels import launch as launching

# Read by accident, it makes any index or sum absurd.
_WHOLE = 2**30 + 3


@contextmanager
def poisoned():
    """Fill what torch.empty returns with NaN."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all(), "torch.empty must be poisoned here"
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def fenced(launched, fence=64):
    """A `launch` that puts every tensor between canaries, NaN or huge, for this one launch.

    fence: elements on either side. The kernels' names are appended to the list `launched`.
    """

    def launch(kernel, grid, arguments, constants, **options):
        inside, buffers = {}, {}
        for name, value in arguments.items():
            if not isinstance(value, torch.Tensor):
                inside[name] = value
                continue
            canary = float("nan") if value.is_floating_point() else _WHOLE
            size = 1 + sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True))
            buffer = torch.full((size + 2 * fence,), canary, dtype=value.dtype)
            inside[name] = buffer.as_strided(value.shape, value.stride(), fence)
            inside[name].copy_(value)
            buffers[name] = buffer
        launching.launch(kernel, grid, inside, constants, **options)
        for name, buffer in buffers.items():
            edges = torch.cat([buffer[:fence], buffer[-fence:]])
            whole = edges.isnan() if edges.is_floating_point() else edges == _WHOLE
            assert whole.all(), name
            arguments[name].copy_(inside[name])
        launched.append(kernel.__name__)

    return launch


class _Touched:
    """Which program of a launch has written an element, and which others have read it."""

    def __init__(self):
        self.writers, self.readers = {}, defaultdict(set)

    def touch(self, program, addresses, writes):
        for address in addresses:
            others = {self.writers.get(address, program)}
            if writes:
                others |= self.readers[address]
                self.writers[address] = program
            else:
                self.readers[address].add(program)
            assert others <= {program}, f"{program}, which {writes=}, and {others}"


def apart(launched):
    """A `launch` that fails where a program writes what another touches, which nothing orders.

    The interpreter hides that: it runs one after another. The kernels' names are appended to the
    list `launched`.
    """

    def launch(kernel, grid, arguments, constants, **options):
        touched, usual = _Touched(), InterpreterBuilder
        load, store = usual.create_masked_load, usual.create_masked_store

        def masked_load(self, pointers, mask, *rest):
            touched.touch(self.grid_idx, pointers.data[mask.data].tolist(), False)
            return load(self, pointers, mask, *rest)

        def masked_store(self, pointers, value, mask, *rest):
            touched.touch(self.grid_idx, pointers.data[mask.data].tolist(), True)
            return store(self, pointers, value, mask, *rest)

        def atomic(*_):
            raise AssertionError("an atomic operation, which is not seen")

        with mock.patch.multiple(
            usual,
            create_masked_load=masked_load,
            create_masked_store=masked_store,
            create_atomic_rmw=atomic,
            create_atomic_cas=atomic,
        ):
            launching.launch(kernel, grid, arguments, constants, **options)
        launched.append(kernel.__name__)

    return launch
