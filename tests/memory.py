"""Memory that tells on whoever reads or writes what is not theirs."""

from contextlib import contextmanager

import torch

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
