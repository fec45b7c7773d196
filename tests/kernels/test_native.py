"""The C++ group norm: every instruction set, threads, poisoned memory, and a build that fails.

What all backends share is in test_group_norm.py and test_dropout.py.
"""

import itertools
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import native_versions
import pytest
import torch
import torch.nn.functional as F
from torch.utils.cpp_extension import include_paths

from ddb_fast.kernels import dispatch, group_norm, native
from ddb_fast.kernels.reference import dropout_constants, random_halves

ROOT = Path(__file__).parents[2]
REASONS = native.why_not("group_norm")
built = pytest.mark.skipif(bool(REASONS), reason="; ".join(REASONS))
LAYOUTS = (torch.contiguous_format, torch.channels_last)
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=("contiguous", "channels_last"))
LEVELS = ("baseline", "avx2", "avx512")


def set_level(level: int) -> int:
    return torch.ops.ddb_fast_native.set_level(level)


@pytest.fixture
def best():
    """The best level of this CPU, to which the library returns."""
    best = set_level(0)
    yield best
    set_level(best)


@pytest.fixture
def threads():
    """Set the number of threads; the old one comes back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def operands(shape, dtype, *, layout, residual):
    """Every tensor that group_norm takes as a leaf, weight in x's dtype, the others in fp32."""
    generator = torch.Generator().manual_seed(0)
    n, c = shape[:2]

    def draw(*size, dtype):
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    parameters = torch.float64 if dtype == torch.float64 else torch.float32
    full = {"x": draw(*shape, dtype=dtype).contiguous(memory_format=layout)}
    full |= {"weight": draw(c, dtype=dtype), "bias": draw(c, dtype=parameters)}
    full |= {name: draw(n, c, dtype=parameters) for name in ("pre_bias", "scale", "shift")}
    if residual:
        full["residual"] = draw(*shape, dtype=dtype).contiguous(memory_format=layout)
    return {name: tensor.requires_grad_() for name, tensor in full.items()}


def run(full, groups, *, dropout_p, activation="silu"):
    """y, the sum if there is a residual, and the gradients of all operands."""
    given = {name: tensor for name, tensor in full.items() if name != "x"}
    result = group_norm(
        full["x"],
        groups,
        **given,
        activation=activation,
        dropout_p=dropout_p,
        seed=torch.tensor(11),
        return_sum="residual" in full,
        backend="native",
    )
    return _with_gradients(result if isinstance(result, tuple) else (result,), full)


def exact(full, groups, *, dropout_p):
    """The same in fp64 and plain torch, but for the mask of dropout."""
    full = {name: tensor.detach().double().requires_grad_() for name, tensor in full.items()}
    total = full["x"] + full["pre_bias"][..., None, None]
    if "residual" in full:
        total = total + full["residual"]
    y = F.group_norm(total, groups, full["weight"], full["bias"])
    y = F.silu(y * (1 + full["scale"][..., None, None]) + full["shift"][..., None, None])
    if dropout_p:
        threshold, factor = dropout_constants(dropout_p)
        y = y * (random_halves(torch.tensor(11), y.shape) >= threshold) * factor
    return _with_gradients((y, total) if "residual" in full else (y,), full)


def _with_gradients(outputs, full):
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(y.shape, generator=generator).to(y.dtype) for y in outputs]
    return [*outputs, *torch.autograd.grad(outputs, list(full.values()), upstream)]


def error(actual, truth):
    difference = (actual.double() - truth.double()).square().mean().sqrt()
    return (difference / truth.double().square().mean().sqrt()).item()


# Sizes below, at and beside every vector's width; blocks of 64 terms that end in the middle; slabs
# of several groups, of all channels, and a last one that is narrower.
SHAPES = (((2, 6, 3, 5), 3), ((1, 40, 9, 17), 8), ((2, 96, 8, 8), 32), ((3, 21, 1, 1), 3))
BOUNDS = {
    torch.float64: 1e-12,
    torch.float32: 6e-6,
    torch.bfloat16: 8e-3,
    torch.float16: 1.5e-3,
}


@built
@layouts
@pytest.mark.parametrize("level", range(3), ids=LEVELS)
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_each_instruction_set_against_fp64(best, level, dtype, layout):
    if level > best:
        pytest.skip(f"this CPU has no {LEVELS[level]}")
    set_level(level)
    for (shape, groups), residual, dropout_p in itertools.product(
        SHAPES, (False, True), (0.0, 0.3)
    ):
        full = operands(shape, dtype, layout=layout, residual=residual)
        truth = exact(full, groups, dropout_p=dropout_p)
        for i, (a, b) in enumerate(zip(run(full, groups, dropout_p=dropout_p), truth, strict=True)):
            assert error(a, b) <= BOUNDS[dtype], (shape, residual, dropout_p, i)


@built
@pytest.mark.parametrize("level", range(3), ids=LEVELS)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_each_instruction_set_converts_every_half(best, level, dtype):
    """With neither weight nor statistics in the way: return_sum of x + 0 is x, bit for bit."""
    if level > best:
        pytest.skip(f"this CPU has no {LEVELS[level]}")
    set_level(level)
    bits = torch.arange(-(2**15), 2**15).to(torch.int16)
    x = bits.view(dtype).reshape(1, 2, 128, 256)
    zero = torch.zeros_like(x)
    _, total = group_norm(x, 1, residual=zero, return_sum=True, backend="native")
    assert torch.equal(total.isnan(), x.isnan())
    known = ~x.isnan() & (x != 0)
    if dtype == torch.bfloat16 and LEVELS[level] == "avx512":
        # VCVTNEPS2BF16, where the CPU has it, takes subnormals (below 1.2e-38) as zeros.
        subnormal = known & (x.abs() < torch.finfo(dtype).smallest_normal)
        assert ((total == x) | (total == 0))[subnormal].all()
        known &= ~subnormal
    assert torch.equal(total[known].view(torch.int16), x[known].view(torch.int16))

    # Rounding to nearest even: against torch's own, from sums of two neighbouring exponents.
    generator = torch.Generator().manual_seed(2)
    draws = torch.randint(-(2**15), 2**15, (2, 1, 2, 64, 64), generator=generator)
    x, y = draws.to(torch.int16).view(dtype)
    _, total = group_norm(x, 1, residual=y, return_sum=True, backend="native")
    expected = (x.float() + y.float()).to(dtype)
    if dtype == torch.bfloat16:
        expected = torch.where(expected.abs() < torch.finfo(dtype).smallest_normal, total, expected)
    torch.testing.assert_close(total, expected, rtol=0, atol=0, equal_nan=True)


@built
@pytest.mark.parametrize("level", range(3), ids=LEVELS)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_a_nan_of_any_bits_stays_one(best, level, dtype):
    """Rounded to 16 bits as a number, 0x7fffffff would become a zero."""
    if level > best:
        pytest.skip(f"this CPU has no {LEVELS[level]}")
    set_level(level)
    shift = torch.full((1, 16), 0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    y = group_norm(torch.randn(1, 16, 2, 2).to(dtype), 4, shift=shift, backend="native")
    assert y.isnan().all()


@built
@layouts
@pytest.mark.parametrize("groups", (1, 8))
def test_an_image_of_which_no_slab_fits_in_a_cache(layout, groups):
    """Above 65536 pixels of 16 channels a half format's backward computes dz twice."""
    full = operands((1, 16, 301, 291), torch.bfloat16, layout=layout, residual=False)
    truth = exact(full, groups, dropout_p=0.0)
    for a, b in zip(run(full, groups, dropout_p=0.0), truth, strict=True):
        assert error(a, b) <= BOUNDS[torch.bfloat16]


@built
def test_an_unknown_level_is_refused(best):
    for level in (-1, best + 1):
        with pytest.raises(RuntimeError, match=f"level must be in 0..{best}, got {level}"):
            set_level(level)


@built
@layouts
def test_mean_of_a_million_standard_deviations(layout):
    about_zero = torch.randn(2, 12, 9, 9, dtype=torch.float64).contiguous(memory_format=layout)
    x = about_zero + 1e6
    y = group_norm(x, 3, backend="native")
    assert error(y, F.group_norm(x - 1e6, 3)) <= 1e-8


@built
@layouts
@pytest.mark.parametrize("level", range(3), ids=LEVELS)
def test_silu_far_from_zero(best, level, layout):
    if level > best:
        pytest.skip(f"this CPU has no {LEVELS[level]}")
    set_level(level)
    z = torch.cat((torch.linspace(-1e4, 1e4, 2001), torch.linspace(-100, 100, 2001)))
    for value in z.split(500):
        n = len(value)
        x = torch.randn(1, n, 2, 2).contiguous(memory_format=layout).requires_grad_()
        # A weight of 0 leaves the bias: y = silu(bias), and shift's gradient is silu's.
        shift = value[None].clone().requires_grad_()
        y = group_norm(x, n, torch.zeros(n), shift=shift, activation="silu", backend="native")
        # Without fused multiply-add exp(z) has the rounding of z, 4e-6 near -80.
        torch.testing.assert_close(
            y[0, :, 0, 0].double(), F.silu(value.double()), rtol=5e-6, atol=1e-30
        )
        exact = value.double().requires_grad_()
        (expected,) = torch.autograd.grad(F.silu(exact).sum() * 4, exact)
        (actual,) = torch.autograd.grad(y.sum(), shift)
        torch.testing.assert_close(actual[0].double(), expected, rtol=1e-5, atol=1e-5)


@built
@layouts
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("shape", ((5, 96, 24, 24), (1, 512, 16, 16), (3, 32, 40, 40)), ids=str)
def test_same_bits_for_any_number_of_threads(threads, layout, dtype, shape):
    full = operands(shape, dtype, layout=layout, residual=True)
    results = []
    for count in (1, 2, 2, 3):
        threads(count)
        results.append(run(full, 32, dropout_p=0.3))
    for others in results[1:]:
        for a, b in zip(others, results[0], strict=True):
            assert torch.equal(a, b)


@built
@layouts
def test_a_sample_does_not_depend_on_its_batch(layout):
    full = operands((4, 96, 9, 7), torch.float32, layout=layout, residual=True)
    whole = run(full, 32, dropout_p=0.0)
    one = {
        name: (t if name in ("weight", "bias") else t[:1]).detach().requires_grad_()
        for name, t in full.items()
    }
    y, total, dx, *_ = run(one, 32, dropout_p=0.0)
    assert torch.equal(y, whole[0][:1]) and torch.equal(total, whole[1][:1])
    assert dx.shape == one["x"].shape


@built
@layouts
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_every_output_is_written(monkeypatch, layout, dtype):
    """Memory that torch hands out is NaN; one element left alone would show."""
    before = torch.are_deterministic_algorithms_enabled()
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        for (shape, groups), residual in itertools.product(SHAPES, (False, True)):
            full = operands(shape, dtype, layout=layout, residual=residual)
            for result in run(full, groups, dropout_p=0.3):
                assert result.isfinite().all()
    finally:
        torch.use_deterministic_algorithms(before)


@built
@layouts
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_nothing_beside_the_operands_is_touched(layout, dtype):
    """Operands end where NaN begins, so a vector that reads on would spoil the result."""
    shape, groups = (2, 21, 3, 5), 3
    full = operands(shape, dtype, layout=layout, residual=True)
    expected = run(full, groups, dropout_p=0.3)

    def fenced(tensor):
        block = torch.full((tensor.numel() + 64,), torch.nan, dtype=tensor.dtype)
        inner = block[32:-32].as_strided(tensor.shape, tensor.stride(), 32)
        inner.copy_(tensor.detach())
        return block, inner.requires_grad_()

    blocks, inner = {}, {}
    for name, tensor in full.items():
        blocks[name], inner[name] = fenced(tensor)
    for a, b in zip(run(inner, groups, dropout_p=0.3), expected, strict=True):
        assert torch.equal(a, b)
    for name, block in blocks.items():
        assert block[:32].isnan().all() and block[-32:].isnan().all()
        assert torch.equal(inner[name], full[name])


@built
@pytest.mark.parametrize("shape", ((2, 8, 2049, 1024), (3, 16, 513, 1030)), ids=str)
@layouts
def test_outputs_that_ask_for_huge_pages(shape, layout):
    """From 32 MiB on, with sizes that are no multiple of a page: every element as in fp64."""
    x = torch.randn(shape).contiguous(memory_format=layout)
    y = group_norm(x, 4, backend="native")
    expected = F.group_norm(x.contiguous().double(), 4)
    assert y.stride() == x.stride()
    assert (y.double() - expected).abs().max() <= 1e-5


@built
def test_the_library_needs_neither_python_nor_more_of_torch():
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("readelf is not installed")
    text = subprocess.run(
        [readelf, "-d", native.LIBRARY], capture_output=True, text=True, check=True
    ).stdout
    needed = [line.split("[")[1].rstrip("]") for line in text.splitlines() if "(NEEDED)" in line]
    torch_libraries = {name for name in needed if "torch" in name or "c10" in name}
    assert torch_libraries <= {"libtorch_cpu.so", "libc10.so"} and torch_libraries
    assert not [name for name in needed if "python" in name]
    assert "RUNPATH" not in text and "RPATH" not in text


@pytest.fixture
def without_library(monkeypatch):
    def replace(path):
        monkeypatch.setattr(native, "LIBRARY", path)
        monkeypatch.setattr(native, "_unavailable", "not tried yet")

    return replace


def test_a_library_of_another_version_is_a_reason(without_library, monkeypatch):
    without_library(native.LIBRARY)
    monkeypatch.setattr(native, "_OPERATORS", ("group_norm", "an operator of tomorrow"))
    assert native.why_not("group_norm") == [
        "the C++ operators are those of another version, install again"
    ]


def test_without_the_library_there_is_a_reason(without_library, tmp_path, capsys):
    from ddb_fast.cli import main

    without_library(tmp_path / "_native.so")
    reason = "the C++ operators were not built: install again with --no-build-isolation"
    assert native.why_not("group_norm")[0].startswith(reason)
    x = torch.randn(2, 4, 3, 3)
    with pytest.raises(
        ValueError, match="'native' cannot run this: the C\\+\\+ operators were not"
    ):
        group_norm(x, 2, backend="native")
    dispatch._remembered.cache_clear()
    assert torch.allclose(group_norm(x, 2), F.group_norm(x, 2), atol=1e-6)
    main(["env"])
    (line,) = [
        line
        for line in capsys.readouterr().out.splitlines()
        if line.split()[:2] == ["group_norm", "native"]
    ]
    assert reason in line


def test_a_library_that_does_not_load_gives_its_reason(without_library, tmp_path):
    (tmp_path / "_native.so").write_bytes(b"not a library")
    without_library(tmp_path / "_native.so")
    (reason,) = native.why_not("group_norm")
    assert reason.startswith("the C++ operators do not fit this torch, install again: ")
    assert "_native.so" in reason


def test_refusals():
    if REASONS:
        pytest.skip("; ".join(REASONS))
    double = torch.ones(1, 1, 2, 4, dtype=torch.float64)
    assert "these tensors are fp64" in native.why_not("attention", double, double, double)[0]
    meta = torch.empty(2, 4, 3, 3, device="meta")
    assert native.why_not("group_norm", meta, 2) == ["the C++ operators run on CPUs, not on meta"]


@pytest.mark.skipif(shutil.which("clang++") is None, reason="clang is not installed")
@pytest.mark.parametrize("level", LEVELS)
def test_clang_takes_the_sources(level):
    if level != "baseline" and platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("the instruction set is another machine's")
    command = ["clang++", "-std=gnu++20", "-fsyntax-only", f"-DDDB_LEVEL={level}"]
    command += [f"-isystem{folder}" for folder in include_paths()]
    sources = (ROOT / "kernels" / "csrc").glob("*.cpp")
    done = subprocess.run(
        [
            *command,
            "-DTORCH_TARGET_VERSION=0x020a000000000000",
            *native_versions.flags(level),
            *sources,
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("broken", ("compiler", "cmake"))
def test_a_build_that_fails_says_why_and_installs_the_rest(tmp_path, broken):
    if shutil.which("cmake") is None:
        pytest.skip("cmake is not installed")
    sources = ("setup.py", "pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE")
    for name in sources:
        shutil.copy(ROOT / name, tmp_path)
    for name in ("kernels", "ddb_fast"):
        shutil.copytree(
            ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__")
        )
    environment = {**os.environ, "CXX": "/bin/false"}
    if broken == "cmake":
        (tmp_path / "empty").mkdir()
        environment["PATH"] = str(tmp_path / "empty")
    # What earlier builds left, in this folder before it was moved.
    older = [tmp_path / "build" / "lib" / "ddb_fast" / "kernels", tmp_path / "kernels"]
    for folder in older:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "_native.so").write_bytes(b"of older sources")
    cache = tmp_path / "build" / "temp" / "CMakeCache.txt"
    cache.parent.mkdir()
    cache.write_text("CMAKE_HOME_DIRECTORY:INTERNAL=/elsewhere\n", "utf-8")
    build = ["build", "--build-lib=build/lib", "--build-temp=build/temp", "build_ext", "--inplace"]
    done = subprocess.run(
        [sys.executable, "setup.py", *build],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    said = "is not able to compile" if broken == "compiler" else "cmake is needed"
    failed = [line for line in done.stderr.splitlines() if 'building extension "' in line]
    assert len(failed) == 1 and "_native" in failed[0] and said in failed[0], done.stderr
    rest = ("kernels/native.py", "kernels/tuned/sm_90.json", "report.html.j2", "py.typed")
    assert all((tmp_path / "build" / "lib" / "ddb_fast" / name).exists() for name in rest)
    assert not list(tmp_path.rglob("_native.so"))
