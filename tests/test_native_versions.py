"""Versions of the C++ kernels in one program: how it is built, when it refuses, what it prints."""

import shutil
from pathlib import Path

import native_versions
import pytest

ROOT = Path(__file__).parents[1]
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")


def test_flags_are_those_of_the_library():
    assert {"-mavx512bf16", "-mfma", "-fno-math-errno"} <= set(native_versions.flags("avx512"))
    assert not any(flag.startswith("-m") for flag in native_versions.flags("baseline"))
    with pytest.raises(ValueError, match="'sse9' is none of baseline, avx2, avx512"):
        native_versions.flags("sse9")


def version(folder, old, new):
    """A copy of the sources in which `old` is `new`, wherever it stands."""
    target = folder / native_versions.SOURCES
    shutil.copytree(ROOT / native_versions.SOURCES, target)
    changed = 0
    for file in target.iterdir():
        text = file.read_text("utf-8")
        changed += old in text
        file.write_text(text.replace(old, new), "utf-8")
    assert changed
    return target


def built(folders, work):
    return native_versions.build(folders, "baseline", work, optimised="-O0")


def timed(program, layout):
    return native_versions.run(program, ((64, 3), (32, 65)), layout=layout, rounds=2, threads=2)


@needs_compiler
def test_versions_take_turns(tmp_path):
    own = ROOT / native_versions.SOURCES
    program = built([own, version(tmp_path / "other", "terms = 64", "terms = 32")], tmp_path)
    for rows in (timed(program, layout) for layout in ("nhwc", "nchw")):
        assert [(row, number) for row, number, _ in rows] == [
            ((dtype, channels, pixels, direction), number)
            for dtype in ("fp32", "bf16")
            for channels, pixels in ((64, 3), (32, 65))
            for direction in ("forward", "backward")
            for number in (0, 1)
        ]
        assert all(milliseconds > 0 for _, _, milliseconds in rows)


@needs_compiler
@pytest.mark.parametrize(
    ("layout", "old", "new"),
    [
        ("nhwc", "slab.b[i] =\n", "slab.b[i] = 1e-3 +\n"),
        ("nhwc", "R(-rstd * rstd * m2)", "R(-rstd * m2)"),
        (
            "nchw",
            "x = static_cast<const T*>(slab.call.x) + origin",
            "x = static_cast<const T*>(slab.call.x)",
        ),
    ],
    ids=["forward", "backward", "contiguous"],
)
def test_a_version_that_computes_something_else_is_not_timed(tmp_path, layout, old, new):
    own, wrong = ROOT / native_versions.SOURCES, version(tmp_path / "wrong", old, new)
    program = built([own, wrong], tmp_path)
    with pytest.raises(ValueError, match=r"version 1 is off by"):
        timed(program, layout)


def test_versions_that_do_not_fit_are_refused(tmp_path, capsys):
    version(tmp_path / "other", "bool keep_dz;", "bool keep_dz, more;")
    assert native_versions.main([str(ROOT), str(tmp_path / "other"), "--level", "baseline"]) == 2
    assert "group_norm.h differs: such versions cannot" in capsys.readouterr().err
    assert native_versions.main([str(tmp_path / "nothing")]) == 2
    assert "nothing: no folder with kernels/csrc, no revision" in capsys.readouterr().err


def test_the_table_has_factors_and_their_geometric_mean():
    times = {
        ("fp32", 64, 4, "forward"): {0: 2.0, 1: 1.0, 2: 2.0},
        ("fp32", 32, 9, "forward"): {0: 4.0, 1: 8.0, 2: 4.0},
        ("fp32", 64, 4, "backward"): {0: 3.0, 1: 2.0, 2: 3.0},
    }
    assert native_versions.table(["a", "b", "a again"], times).splitlines()[2:] == [
        "| fp32 forward, 16x64x4 | 2.000 | 2.00 | 1.00 |",
        "| fp32 forward, 16x32x9 | 4.000 | 0.50 | 1.00 |",
        "| fp32 backward, 16x64x4 | 3.000 | 1.50 | 1.00 |",
        "| fp32 forward, geometric mean |  | **1.000** | **1.000** |",
        "| fp32 backward, geometric mean |  | **1.500** | **1.000** |",
    ]
