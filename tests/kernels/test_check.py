"""`ddb-fast kernels check`: every op and backend within its bounds, and bounds that can fail."""

import dataclasses

import pytest
import torch

from ddb_fast import cli
from ddb_fast.kernels import check, dispatch


def test_every_backend_that_runs_here_is_within_its_bounds(capsys):
    assert cli.main(["kernels", "check", "--device", "cpu"]) == 0
    *table, verdict = capsys.readouterr().out.splitlines()
    assert verdict == "every error is within its bound"
    rows = {tuple(line.split()[:4]) for line in table[1:]}
    for op, backends in dispatch.backends().items():
        for backend, reasons in backends.items():
            mine = [row for row in rows if row[:2] == (op, backend)]
            # Three dtypes in two layouts, or one line with the reasons.
            assert len(mine) == (1 if reasons else 6), (op, backend)
            assert all((row[2] == "not") == bool(reasons) for row in mine)


@pytest.mark.parametrize("wrong", ("output", "gradient", "unwritten"))
def test_a_wrong_backend_exceeds_its_bound(wrong, monkeypatch, capsys):
    torch_backend = dispatch._backend("torch")
    right = torch_backend.ops["attention"]

    def attention(q, k, v, *, scale):
        if wrong == "gradient":
            q = q + 1e-3 * (q - q.detach()) * q.detach()
        o = right(q, k, v, scale=scale)
        if wrong == "output":
            return o * (1 + 2**-7)
        if wrong == "unwritten":
            # As a kernel does that forgets the last token of the tensor it allocates.
            return torch.cat([o[:, :, :-1], torch.empty_like(o[:, :, -1:])], 2)
        return o

    planted = dataclasses.replace(torch_backend, ops={**torch_backend.ops, "attention": attention})
    monkeypatch.setattr(dispatch, "BACKENDS", (planted, dispatch._backend("reference")))
    monkeypatch.setattr(check, "_SHAPES", {**check._SHAPES, "group_norm": ((1, 8, 2, 2, 2),)})
    assert cli.main(["kernels", "check", "--device", "cpu"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "an error exceeds its bound"
    broken = [line for line in lines if "EXCEEDED" in line]
    assert all(line.split()[:2] == ["attention", "torch"] for line in broken)
    # fp32 in both layouts, whatever half precision hides.
    assert sum(line.split()[2] == "fp32" for line in broken) == 2
    named = [line.split("EXCEEDED by ")[1].split(", ") for line in broken]
    assert all(("d_q" if wrong == "gradient" else "o") in names for names in named)


def test_a_device_that_is_not_there_is_one_line(capsys):
    assert cli.main(["kernels", "check", "--device", "cuda:97"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("ddb-fast kernels: device 'cuda:97': ") and error.count("\n") == 1
    assert not torch.cuda.is_initialized()
