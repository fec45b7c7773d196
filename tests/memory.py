"""Memory that tells on whoever reads or writes what is not theirs."""

from collections import Counter, defaultdict
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


class _Order:
    """What the programs of one launch read and write, and which of it others are known to follow.

    An access is known by its program and how often that had released something before. A program
    comes after it once it has acquired the release that followed, from a counter.
    """

    def __init__(self):
        self.writers, self.readers = {}, defaultdict(dict)
        # Of each program: how many releases of others it has acquired, how many it has made.
        self.acquired, self.released = defaultdict(Counter), Counter()
        # Every value of a counter, with the releases that whoever reads it acquires.
        self.values = defaultdict(lambda: [(0, Counter())])
        self.polls, self.unpublished = Counter(), set()

    def touch(self, program, addresses, writes):
        for address in addresses:
            others = [self.writers.get(address, (program, 0))]
            if writes:
                others += self.readers.pop(address, {}).items()
                self.writers[address] = program, self.released[program]
            else:
                self.readers[address][program] = self.released[program]
            for other, release in others:
                known = other == program or self.acquired[program][other] > release
                assert known, f"nothing orders {program}, which {writes=}, and {other}"
        if writes:
            self.unpublished.add(program)

    def count(self, program, address, polls, how):
        """Add 1 to a counter, or look what it is; its value before."""
        # Who waits is shown all that the counter ever was: it may have come that early.
        index = self.polls[program] if polls else -1
        assert index < len(self.values[address]), f"{program} waits for ever"
        value, releases = self.values[address][index]
        if "ACQUIRE" in how:
            self.acquired[program] |= releases
        if polls:
            self.polls[program] += 1
            return value
        # What other threads have written is published behind a barrier only.
        if "RELEASE" in how and program not in self.unpublished:
            self.released[program] += 1
            own = Counter({program: self.released[program]})
            releases = releases | self.acquired[program] | own
        self.values[address].append((value + 1, releases))
        return value


def ordered(launched):
    """A `launch` that fails where a program writes what another touches and no counter orders them.

    The interpreter hides that: it runs one after another. The kernels' names are appended to the
    list `launched`.
    """

    def launch(kernel, grid, arguments, constants, **options):
        order, usual = _Order(), InterpreterBuilder
        load, store = usual.create_masked_load, usual.create_masked_store
        add = usual.create_atomic_rmw

        def masked_load(self, pointers, mask, *rest):
            order.touch(self.grid_idx, pointers.data[mask.data].tolist(), False)
            return load(self, pointers, mask, *rest)

        def masked_store(self, pointers, value, mask, *rest):
            order.touch(self.grid_idx, pointers.data[mask.data].tolist(), True)
            return store(self, pointers, value, mask, *rest)

        def atomic_rmw(self, operation, pointer, value, mask, how, scope):
            polls, address = not value.data.any(), pointer.data.item()
            before = order.count(self.grid_idx, address, polls, how.name)
            result = add(self, operation, pointer, value, mask, how, scope)
            result.data[...] = before
            return result

        def barrier(self):
            order.unpublished.discard(self.grid_idx)

        with mock.patch.multiple(
            usual,
            create_masked_load=masked_load,
            create_masked_store=masked_store,
            create_atomic_rmw=atomic_rmw,
            create_barrier=barrier,
        ):
            launching.launch(kernel, grid, arguments, constants, **options)
        launched.append(kernel.__name__)

    return launch
