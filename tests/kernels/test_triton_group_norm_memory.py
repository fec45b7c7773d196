"""Memory and Triton's group norm: what its programs read and write, and in which order."""

import dataclasses

import pytest
import torch

from ddb_fast.kernels import group_norm, triton_backend
from ddb_fast.kernels import launch as launching
from ddb_fast.kernels import triton_group_norm as module
from memory import fenced, ordered, poisoned
from regimes import SHAPE, layouts, once, operands, run

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
        # Of what reads once, up to the program that adds up the first slab's sums.
        once = kernel.__name__ == "forward_once"
        programs = (arguments["splits"] - 1) * arguments["slabs"] + 1 if once else 1
        launching.launch(kernel, (programs, *grid[1:]), arguments, constants, **options)

    monkeypatch.setattr(module, "launch", first)
    with poisoned():
        absent = [None] * 6
        y, total, mean, rstd = module.forward(x, x, *absent, 5, 1e-5, True, 0.0, True)
        zero = torch.zeros(1, 5)
        needs = (False,) * 5
        ds = module.backward(x, None, x, *absent, zero, zero + 1, 5, True, 0.0, needs).ds
    # It normalises nothing yet; how it does so is what the others do.
    for written in (ds,) if regime == "once" else (y, total, ds):
        assert written[:, channels:].isnan().all() and not written[:, :1].isnan().all()
    for written in (mean, rstd):
        assert written[:, groups:].isnan().all() and written[:, :groups].isfinite().all()


@layouts
def test_no_program_touches_what_another_writes(regime, layout, monkeypatch):
    """But behind a counter, where one waits for others."""
    launched = []
    monkeypatch.setattr(module, "launch", ordered(launched))
    # Slabs of two groups, 18 of 32 columns, and of one; or of eight channels.
    run(operands(2, 27, 3, 2, layout), 3, "triton")
    assert len(launched) >= 2, "a forward and a backward"


@pytest.mark.parametrize("lag", (1, 2, 5))
def test_a_sample_waits_for_as_many_others_as_the_plan_says(lag, monkeypatch):
    """Before it is normalised, and for nothing where there are no more."""
    x, usual = torch.randn(3, 8, 4, 2), module.plan

    def plan(*arguments, **options):
        return dataclasses.replace(once(usual(*arguments, **options), 8), lag=lag)

    def sums_alone(kernel, grid, *rest, **options):
        launching.launch(kernel, (grid[0] * lag // (3 + lag),), *rest, **options)

    monkeypatch.setattr(module, "plan", plan)
    expected = group_norm(x, 2, backend="reference")
    torch.testing.assert_close(group_norm(x, 2, backend="triton"), expected)
    monkeypatch.setattr(module, "launch", sums_alone)
    with poisoned():
        y, _, mean, _ = module.forward(x, *[None] * 7, 2, 1e-5, False, 0.0, False)
    assert y.isnan().all() and mean[:lag].isfinite().all() and mean[lag:].isnan().all()
