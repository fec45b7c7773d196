"""Compile every kind of shipped Triton kernel without a GPU and check the machine code.

    python benchmarks/machine_code.py [--arch sm_80 sm_90 sm_100] [--jobs 2] [--json FILE]

One line per variant and architecture, then the violations; exit 1 if there are any. The rules:

* bf16 and fp16: no spills, and every operand whose contiguous dimension is a multiple of 8 is read
  and written 16 bytes at a time;
* sm_90: every product with at least 64 rows runs on warp group matrix instructions (HGMMA);
* fp32: products are `ieee` or `tf32x3`, never Triton's default, and no tanh of 11 bits; spills are
  printed, not forbidden;
* shared memory fits.
"""

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

if os.environ.pop("TRITON_INTERPRET", None) is not None:
    print("TRITON_INTERPRET is ignored: this compiles", file=sys.stderr)

import checkout  # noqa: F401 - before ddb_fast
from disassembly import Build, Facts, compile_variant, disassemble
from variants import Variant, recorded

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
# What one thread block may use, in bytes. sm_80 stands for all that run its instructions, and of
# those the GeForce cards (8.6, 8.9, 12.0) have the least.
SHARED_MEMORY = {"sm_80": 99 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}
_FP32_PRECISIONS = ("ieee", "tf32x3")


def violations(variant: Variant, arch: str, facts: Facts) -> list[str]:
    """Every rule that the machine code of a variant breaks, in words."""
    found = []
    if facts.shared > SHARED_MEMORY[arch]:
        found.append(f"{facts.shared} bytes of shared memory, {arch} has {SHARED_MEMORY[arch]}")
    for dot in facts.dots:
        if dot.operand == "f32" and dot.precision not in _FP32_PRECISIONS:
            found.append(f"fp32 product with {dot.precision}: write out ieee or tf32x3")
    large = sum(dot.m >= 64 and dot.operand in ("bf16", "f16") for dot in facts.dots)
    if arch == "sm_90" and facts.opcodes.get("HGMMA", 0) < large:
        found.append(f"{large} products with 64 rows or more, {_count(facts, 'HGMMA')} HGMMA")
    if not variant.half:
        if _count(facts, "MUFU.TANH"):
            found.append("fp32 with a tanh that is good to 2^-11")
        return found
    if facts.spills:
        found.append(f"{facts.spills} spills")
    for name in sorted(variant.wide & facts.widths.keys()):
        if narrow := sorted(facts.widths[name] - {128}):
            found.append(f"{name} is moved {narrow} bits at a time")
    # The widths are read from the PTX, which knows the operands; ptxas has to agree.
    if variant.wide & facts.widths.keys() and not any(
        _count(facts, opcode) for opcode in ("LDG.128", "STG.128", "LDGSTS", "UBLKCP")
    ):
        found.append("no 128-bit access in the machine code")
    return found


def _count(facts: Facts, opcode: str) -> int:
    return facts.opcodes.get(opcode, 0)


_variants: Sequence[Variant] = ()


def _build(task: tuple[int, str]) -> Build | str:
    """A compiled variant, or why it cannot be."""
    index, arch = task
    try:
        return compile_variant(_variants[index], arch)
    except Exception as error:
        # Whatever stops the compiler is a finding about this variant; the others still count.
        message = " ".join(str(error).split())[:300]
        return f"cannot be built: {type(error).__name__}: {message}"


# So many builds are disassembled together: their rows are shown together.
_TOGETHER = 30


def _rows(tasks: Sequence[tuple[int, str]], answers: Iterable[Build | str]) -> list[dict[str, Any]]:
    answers = list(answers)
    facts = iter(disassemble([answer for answer in answers if isinstance(answer, Build)]))
    rows = []
    for (index, arch), answer in zip(tasks, answers, strict=True):
        variant = _variants[index]
        row = {
            "kernel": variant.name,
            "blocks": variant.blocks,
            "calls": variant.labels,
            "arch": arch,
        }
        if isinstance(answer, str):
            rows.append({**row, "violations": [answer]})
            continue
        found = next(facts)
        measured = asdict(found)
        measured["widths"] = {name: sorted(bits) for name, bits in found.widths.items()}
        rows.append({**row, **measured, "violations": violations(variant, arch, found)})
    return rows


def check(
    variants: Sequence[Variant], architectures: Iterable[str], jobs: int
) -> Iterator[dict[str, Any]]:
    """Compile each variant for each of its architectures in `jobs` processes; a row for each."""
    global _variants
    _variants = variants
    tasks = [
        (i, arch)
        for i, variant in enumerate(variants)
        for arch in architectures
        if variant.arch in (None, arch)
    ]
    with contextlib.ExitStack() as stack:
        answers = map(_build, tasks)
        if jobs > 1:
            # Forked, the workers have the variants: kernels cannot be sent to another process.
            pool = multiprocessing.get_context("fork").Pool(jobs)
            answers = stack.enter_context(pool).imap(_build, tasks)
        for start in range(0, len(tasks), _TOGETHER):
            some = tasks[start : start + _TOGETHER]
            yield from _rows(some, itertools.islice(answers, len(some)))


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    more = f" (+{len(row['calls']) - 1})" if len(row["calls"]) > 1 else ""
    numbers = [row.get(name, "-") for name in ("registers", "shared", "spills")]
    verdict = "; ".join(row["violations"]) or "ok"
    return (
        f"{row['kernel']:<20} {row['arch']:<6} {numbers[0]:>4} {numbers[1]:>6} {numbers[2]:>4}  "
        f"{row['blocks']:<18} {row['calls'][0]}{more}: {verdict}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="check the machine code of the Triton kernels")
    parser.add_argument("--arch", nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES)
    parser.add_argument("--jobs", type=int, default=2, help="processes (2)")
    parser.add_argument("--json", type=Path, help="file for all that was found")
    parser.add_argument("--only", default="", help="variants whose kernel or call contains this")
    arguments = parser.parse_args(argv)

    began = time.monotonic()
    variants = [
        variant
        for variant in recorded()
        if any(arguments.only in text for text in (variant.name, *variant.labels))
    ]
    if not variants:
        print(f"no variant contains {arguments.only!r}", file=sys.stderr)
        return 2
    header = ("kernel", "arch", "regs", "shared", "spills", "tile, warps, stages", "call: verdict")
    print("{:<20} {:<6} {:>4} {:>6} {:>4}  {:<18} {}".format(*header))
    rows = []
    for row in check(variants, arguments.arch, arguments.jobs):
        rows.append(row)
        print(line(row), flush=True)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")
    broken = [row for row in rows if row["violations"]]
    seconds = time.monotonic() - began
    print(f"{len(variants)} variants, {len(rows)} builds, {len(broken)} violate, {seconds:.0f} s")
    for row in broken:
        print(line(row))
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
