"""The gate on the Triton kernels' machine code: that it passes, and that each rule can fail.

Kernels are compiled in processes without the interpreter, for GPUs that need not be there.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
BENCHMARKS = HERE.parent / "benchmarks"


def compiled(*command, **environment):
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        env={**inherited, **environment},
    )


@pytest.fixture(scope="module")
def planted():
    answer = compiled(HERE / "planted_kernels.py", BENCHMARKS)
    assert answer.returncode == 0, answer.stderr
    return json.loads(answer.stdout)


@pytest.mark.parametrize(
    ("kernel", "expected"),
    (
        ("narrow", ["p_x is moved [16] bits at a time", "p_y is moved [16] bits at a time"]),
        ("narrow stores", ["p_y is moved [16] bits at a time"]),
        ("fp32 default", ["fp32 product with tf32: write out ieee or tf32x3"]),
        ("fp32 tanh", ["fp32 with a tanh that is good to 2^-11"]),
        ("no HGMMA", ["1 products with 64 rows or more, 0 HGMMA"]),
        ("shared memory", ["8192 bytes of shared memory, sm_90 has 4096"]),
    ),
)
def test_each_rule_fires(planted, kernel, expected):
    found = planted[kernel]["violations"]
    assert [text for text in found if text != "no 128-bit access in the machine code"] == expected


def test_spills_are_found_and_forbidden_in_half_precision_only(planted):
    assert planted["spills"]["violations"] == [f"{planted['spills']['spills']} spills"]
    assert planted["spills"]["spills"] > 0
    assert planted["fp32 ieee"]["spills"] > 0
    assert planted["fp32 ieee"]["violations"] == []


@pytest.mark.parametrize("kernel", ("clean", "allowed narrow", "fp32 tf32x3", "HGMMA"))
def test_what_keeps_the_rules_passes(planted, kernel):
    assert planted[kernel]["violations"] == []


def test_the_facts_are_read_from_the_machine_code(planted):
    clean, product = planted["clean"], planted["HGMMA"]
    assert clean["widths"] == {"p_x": [128], "p_y": [128]}
    assert clean["opcodes"]["LDG.128"] == 1 and clean["opcodes"]["STG.128"] == 1
    assert 8 <= clean["registers"] <= 32 and clean["shared"] == 0 and clean["spills"] == 0
    assert product["opcodes"]["HGMMA"] >= 1
    assert [(dot["m"], dot["operand"]) for dot in product["dots"]] == [(64, "bf16")]
    assert planted["allowed narrow"]["widths"]["p_x"] == [16]
    precisions = [
        planted[f"fp32 {name}"]["dots"][0]["precision"] for name in ("default", "ieee", "tf32x3")
    ]
    assert precisions == ["tf32", "ieee", "tf32x3"]


SHIPPED = (
    ("group_norm bf16 nhwc silu+pre_bias+dropout 128x512x8x8", "sm_80"),
    ("group_norm bf16 nhwc silu 128x128x64x64", "sm_90"),
    ("group_norm bf16 nchw residual+return_sum 2x256x32x32", "sm_100"),
    ("attention bf16 packed 128x3x256x64", "sm_90"),
    ("attention fp32 separate 32x1x1024x64", "sm_80"),
)
TUNED = "sm_90 bf16/backward/S1024/D64"


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """What the gate writes about each of `SHIPPED`, and of `TUNED`: one process for all."""
    folder = tmp_path_factory.mktemp("reports")
    runs = [
        ["--arch", arch, "--only", call, "--jobs", "1", "--json", str(folder / f"{i}.json")]
        for i, (call, arch) in enumerate(SHIPPED)
    ]
    runs.append(["--only", TUNED, "--jobs", "1", "--json", str(folder / f"{len(SHIPPED)}.json")])
    code = f"import sys, machine_code as gate; sys.exit(max(gate.main(run) for run in {runs}))"
    answer = compiled("-c", code, PYTHONPATH=str(BENCHMARKS))
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return [json.loads((folder / f"{i}.json").read_text()) for i in range(len(runs))]


@pytest.mark.parametrize("number", range(len(SHIPPED)), ids=[call for call, _ in SHIPPED])
def test_shipped_kernels_pass(reports, number):
    (call, arch), rows = SHIPPED[number], reports[number]
    assert len(rows) >= 2, "a forward and a backward"
    assert {row["arch"] for row in rows} == {arch}
    assert all(any(call in text for text in row["calls"]) for row in rows)
    assert all(row["violations"] == [] for row in rows)


def test_a_tuned_configuration_is_built_for_its_own_architecture(reports):
    """In the place of the kernels' own choice, which is built for all."""
    built = {}
    for row in reports[-1]:
        built.setdefault((row["kernel"], row["calls"][0] == TUNED), set()).add(row["arch"])
        assert TUNED in row["calls"] and row["violations"] == []
    assert built == {
        ("forward_flash", False): {"sm_80", "sm_90", "sm_100"},
        ("backward_queries", True): {"sm_90"},
        ("backward_keys", False): {"sm_80", "sm_90", "sm_100"},
    }


def test_violations_end_with_exit_1():
    code = (
        "import sys, machine_code as gate; gate.violations = lambda *a: ['it rains'];"
        "sys.exit(gate.main(['--arch', 'sm_90', '--only', 'silu 128x512x8x8', '--jobs', '1']))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(BENCHMARKS)},
    )
    assert answer.returncode == 1, answer.stderr
    assert answer.stdout.splitlines()[-1].endswith("it rains")
    assert "TRITON_INTERPRET is ignored" in answer.stderr


def test_a_kernel_that_cannot_be_built_is_a_violation(planted):
    assert planted["broken"]["violations"][0].startswith("cannot be built: CompilationError")
