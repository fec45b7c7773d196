"""What a compiler made of a kernel: registers, spills, access widths, matrix instructions.

Works without a GPU: ptxas, cuobjdump and nvdisasm are in Triton's wheel.
"""

import functools
import re
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import sm_arch_from_capability
from triton.compiler import ASTSource
from variants import Variant

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Dot:
    """One tt.dot of the Triton IR; precision is "ieee" where the IR names none."""

    m: int
    operand: str
    precision: str


@dataclass(frozen=True)
class Facts:
    """What the machine code of one variant shows.

    widths: the widths in bits of the global loads, stores and asynchronous copies of each pointer
    argument. opcodes: how often an instruction of that opcode, as "LDG.128", occurs.
    """

    registers: int
    shared: int
    spills: int
    widths: dict[str, set[int]]
    opcodes: dict[str, int]
    dots: tuple[Dot, ...]


@dataclass(frozen=True)
class Build:
    """A compiled variant: its instructions, undecoded, and what the compiler's other words show."""

    arch: str
    code: bytes
    registers: int
    shared: int
    widths: dict[str, set[int]]
    dots: tuple[Dot, ...]


def compile_variant(variant: Variant, arch: str) -> Build:
    """Compile for an architecture such as "sm_90".

    Raises whatever Triton raises where the kernel cannot be built.
    """
    source = ASTSource(variant.kernel, variant.signature, variant.constants, variant.attrs)
    target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    built = triton.compile(source, target=target, options=options)
    pointers = [
        name if kind.startswith("*") else None
        for name, kind in variant.signature.items()
        if kind != "constexpr"
    ]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "-res-usage", file.name)
    return Build(
        arch=arch,
        code=code_of(built.asm["cubin"]),
        registers=max(map(int, re.findall(r"REG:(\d+)", usage))),
        shared=built.metadata.shared,
        widths=access_widths(built.asm["ptx"], pointers),
        dots=find_dots(built.asm["ttir"]),
    )


def disassemble(builds: Sequence[Build]) -> list[Facts]:
    """Disassemble compiled variants, all of one architecture in one go.

    nvdisasm takes a third of a second to start, whatever it is given.
    """
    facts: dict[int, Facts] = {}
    for arch in {build.arch for build in builds}:
        chosen = [i for i, build in enumerate(builds) if build.arch == arch]
        with tempfile.NamedTemporaryFile(suffix=".bin") as file:
            file.write(b"".join(builds[i].code for i in chosen))
            file.flush()
            # "sm_90a", written "SM90a" here.
            name = sm_arch_from_capability(int(arch.removeprefix("sm_"))).replace("sm_", "SM")
            sass = _run("nvdisasm", "-ndf", "-b", name, file.name)
        lines = [line for line in sass.splitlines() if _INSTRUCTION.match(line)]
        if len(lines) != sum(len(builds[i].code) for i in chosen) // _INSTRUCTION_BYTES:
            raise ValueError(f"nvdisasm shows {len(lines)} instructions, which is not all")
        for i in chosen:
            count = len(builds[i].code) // _INSTRUCTION_BYTES
            facts[i] = _facts(builds[i], count_opcodes("\n".join(lines[:count])))
            del lines[:count]
    return [facts[i] for i in range(len(builds))]


def _facts(build: Build, opcodes: dict[str, int]) -> Facts:
    return Facts(
        registers=build.registers,
        shared=build.shared,
        spills=sum(n for opcode, n in opcodes.items() if opcode.split(".")[0] in ("LDL", "STL")),
        widths=build.widths,
        opcodes=opcodes,
        dots=build.dots,
    )


_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s")
_INSTRUCTION_BYTES = 16  # of every architecture since sm_70


def code_of(cubin: bytes) -> bytes:
    """The instructions of a cubin, an ELF file of 64 bits: its section .text.NAME."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    # Of each section: offset of its name, and offset and length of what it holds.
    sections = [
        struct.unpack_from("<I20xQQ", cubin, at) for at in range(table, table + size * count, size)
    ]
    found = [
        cubin[start : start + length]
        for name, start, length in sections
        if cubin.startswith(b".text.", sections[names][1] + name)
    ]
    if len(found) != 1:
        raise ValueError(f"a cubin with {len(found)} functions")
    return found[0]


def _run(tool: str, *arguments: str) -> str:
    command = [str(_TOOLS / tool), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


# /*06f0*/ @P0 LDG.E.128 R12, desc[UR6][R16.64] ;
_OPCODE = re.compile(
    r"^\s+(?:/\*[0-9a-f]+\*/\s+)?(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]+)((?:\.\w+)*)"
)


def count_opcodes(sass: str) -> dict[str, int]:
    """Count instructions by opcode, of memory with their width: {"LDG.128": 3, "MUFU.EX2": 1}."""
    counts: Counter[str] = Counter()
    for line in sass.splitlines():
        if match := _OPCODE.match(line):
            opcode, suffixes = match[1], match[2].split(".")
            if opcode in ("LDG", "STG", "LDL", "STL"):
                width = next((s for s in suffixes if s in ("128", "64", "U16", "U8")), "32")
                opcode = f"{opcode}.{width}"
            elif opcode == "MUFU":
                opcode = f"{opcode}.{suffixes[1]}"
            counts[opcode] += 1
    return dict(counts)


_DEFINITION = re.compile(r"^\s*(?:@!?%p\d+ )?([a-z][\w.]*)\s+(%rd\d+), (.*);")
_PARAMETER = re.compile(r"_param_(\d+)\]")
_ACCESS = re.compile(
    r"(?:ld|st|red|atom)\.(?:\w+\.)*?global(?:[.:]\w+)*?(?:\.v(\d))?\.[a-z]+(\d+)\s.*?\[ ?(%rd\d+)"
)
_COPY = re.compile(r"cp\.async\.\w+\.shared\.global\S*\s+\[.*?\], \[ ?(%rd\d+)[^\]]*\], (\w+)")


def access_widths(ptx: str, pointers: list[str | None]) -> dict[str, set[int]]:
    """Widths in bits of the global accesses through each pointer argument of a kernel.

    pointers: for each parameter of the PTX entry its name, None for one that is no pointer. An
    address is followed back through the 64-bit registers that it was computed from.
    """
    sources: dict[str, set[str]] = {}
    roots: dict[str, str] = {}
    accesses = []
    for line in ptx.splitlines():
        if match := _DEFINITION.match(line):
            opcode, target, operands = match.groups()
            if opcode.startswith("ld.param"):
                index = int(_PARAMETER.search(operands)[1])
                if index < len(pointers) and pointers[index] is not None:
                    roots[target] = pointers[index]
            elif not opcode.startswith("ld."):
                sources.setdefault(target, set()).update(re.findall(r"%rd\d+", operands))
        if match := _ACCESS.search(line):
            lanes, bits, address = match.groups()
            accesses.append((address, int(lanes or 1) * int(bits)))
        elif match := _COPY.search(line):
            accesses.append((match[1], 8 * int(match[2], 0)))

    @functools.cache
    def origins(register: str) -> frozenset[str]:
        seen, waiting = {register}, [register]
        while waiting:
            for source in sources.get(waiting.pop(), ()):
                if source not in seen:
                    seen.add(source)
                    waiting.append(source)
        return frozenset(roots[r] for r in seen if r in roots)

    widths: dict[str, set[int]] = {}
    for address, bits in accesses:
        for name in origins(address):
            widths.setdefault(name, set()).add(bits)
    return widths


_DOT = re.compile(r": tensor<((?:\d+x)+)(\w+)> \* tensor<")


def find_dots(ttir: str) -> tuple[Dot, ...]:
    """Find the matrix products of a Triton IR module."""
    dots = []
    for line in ttir.splitlines():
        if "tt.dot " not in line:
            continue
        match = _DOT.search(line)
        if match is None:
            raise ValueError(f"cannot read this product: {line.strip()}")
        precision = re.search(r"inputPrecision = (\w+)", line)
        m = int(match[1].split("x")[-3])
        dots.append(Dot(m, match[2], precision[1] if precision else "ieee"))
    return tuple(dots)
