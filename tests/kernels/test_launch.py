"""Launches go to the variant that was compiled for their kind of arguments, here a stand-in's."""

import pytest
import torch

from ddb_fast.kernels import launch as module
from ddb_fast.kernels.launch import launch


class Kernel:
    """Compiles as Triton does: a variant for every type, alignment, constant and number that is 1
    or a multiple of 16; writes down what is asked of it and what its variants are launched with."""

    arg_names = ("p_x", "BLOCK", "p_y", "n")

    def __init__(self):
        self.asked, self.launched = [], []

    def __getitem__(self, grid):
        def compile(**given):
            self.asked.append(given)

            class Variant:
                def __getitem__(_, grid):
                    return lambda *values: self.launched.append((given, grid, values))

            return Variant()

        return compile


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(module, "_compiled", {})
    return Kernel()


def call(kernel, x, n=5, y=None, *, grid=(3,), **options):
    options = {"block": 16, "num_warps": 4, **options}
    block = options.pop("block")
    launch(kernel, grid, {"p_x": x, "p_y": y, "n": n}, {"BLOCK": block}, **options)


def test_the_second_call_is_launched_with_its_own_arguments(kernel):
    first, second = torch.zeros(4), torch.ones(4)
    call(kernel, first)
    call(kernel, second, grid=(7, 2))
    assert len(kernel.asked) == 1
    ((given, grid, (x, block, y, n)),) = kernel.launched
    assert given["p_x"] is first and grid == (7, 2, 1)
    assert x is second and (block, y, n) == (16, None, 5)


def test_whatever_triton_compiles_anew_is_asked_for_anew(kernel):
    room = torch.zeros(16)
    calls = (
        lambda: call(kernel, room),
        lambda: call(kernel, room[1:]),  # not aligned
        lambda: call(kernel, room.bfloat16()),
        lambda: call(kernel, room, 16),
        lambda: call(kernel, room, 1),
        lambda: call(kernel, room, 2**31),
        lambda: call(kernel, room, y=room),
        lambda: call(kernel, room, block=32),
        lambda: call(kernel, room, num_warps=8),
        lambda: call(kernel, room, num_stages=2),
    )
    for number, one in enumerate(calls, 1):
        one()
        assert len(kernel.asked) == number
    for one in calls:
        one()
    assert len(kernel.asked) == len(kernel.launched) == len(calls)
    for (given, _, _), asked in zip(kernel.launched, kernel.asked, strict=True):
        assert given is asked


def test_sizes_that_never_come_back_do_not_pile_up(kernel, monkeypatch):
    monkeypatch.setattr(module, "_REMEMBERED", 10)
    for n in range(100):
        call(kernel, torch.zeros(4), n)
    assert len(module._compiled) <= 10


def test_the_interpreter_compiles_nothing(monkeypatch):
    ran = []

    class Interpreted:
        arg_names = ("p_x", "BLOCK", "p_y", "n")

        def __getitem__(self, grid):
            return lambda **given: ran.append(given["n"])

    monkeypatch.setattr(module, "_compiled", {})
    interpreted = Interpreted()
    for n in (5, 5):
        call(interpreted, torch.zeros(4), n)
    assert ran == [5, 5] and not module._compiled
