"""Memory and Triton's group norm: what its programs read and write."""

import pytest
import torch

from ddb_fast.kernels import launch as launching
from ddb_fast.kernels import triton_backend
from ddb_fast.kernels import triton_group_norm as module
from memory import apart, fenced, poisoned
from regimes import SHAPE, layouts, operands, run

if module_reasons := triton_backend.why_not("group_norm"):
    pytest.skip("; ".join(module_reasons), allow_module_level=True)


@layouts
def test_two_runs_are_bitwise_equal(regime, layout):
    tensors = operands(*SHAPE, layout)
    first, second = (run(tensors, 4, "triton", dropout_p=0.3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@layouts
def test_nothing_unwritten_is_read_or_returned(regime, layout):
    tensors = operands(*SHAPE, layout)
    expected = run(tensors, 4, "triton")
    with poisoned():
        actual = run(tensors, 4, "triton")
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@layouts
@pytest.mark.parametrize(("shape", "num_groups"), ((SHAPE, 4), ((1, 40, 3, 1), 5)), ids=str)
def test_nothing_outside_is_read_or_written(regime, layout, shape, num_groups, monkeypatch):
    """Of the second shape the last slab is not full: one group of two."""
    tensors = operands(*shape, layout)
    expected = run(tensors, num_groups, "triton", dropout_p=0.3)
    launched = []
    monkeypatch.setattr(module, "launch", fenced(launched))
    actual = run(tensors, num_groups, "triton", dropout_p=0.3)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert len(launched) >= 2, "a forward and a backward"


@layouts
def test_a_program_writes_its_own_channels_only(regime, layout, monkeypatch):
    """In the interpreter a later program would make good what one writes into its neighbour's."""
    # Three groups of 32 columns and of four rows of groups; or eight channels, and one group.
    channels, groups = (8, 1) if regime == "split" else (21, 3)
    x = torch.randn(1, 35, 3, 3).contiguous(memory_format=layout)

    def first(kernel, grid, arguments, constants, **options):
        launching.launch(kernel, (1, *grid[1:]), arguments, constants, **options)

    monkeypatch.setattr(module, "launch", first)
    with poisoned():
        absent = [None] * 6
        y, total, mean, rstd = module.forward(x, x, *absent, 5, 1e-5, True, 0.0, True)
        zero = torch.zeros(1, 5)
        needs = (False,) * 5
        ds = module.backward(x, None, x, *absent, zero, zero + 1, 5, True, 0.0, needs).ds
    for written in (y, total, ds):
        assert written[:, channels:].isnan().all() and not written[:, :1].isnan().all()
    for written in (mean, rstd):
        assert written[:, groups:].isnan().all() and written[:, :groups].isfinite().all()


@layouts
def test_no_program_touches_what_another_writes(regime, layout, monkeypatch):
    launched = []
    monkeypatch.setattr(module, "launch", apart(launched))
    # Slabs of two groups, 18 of 32 columns, and of one; or of eight channels.
    run(operands(2, 27, 3, 2, layout), 3, "triton")
    assert len(launched) >= 2, "a forward and a backward"
