"""Is another version of the C++ group norm faster? Both in one program, in turns.

    python benchmarks/native_versions.py HEAD .

Each version is a git revision, or a folder with a `kernels/csrc`. On a shared machine two processes
one after the other differ by 15 % and more with nothing changed; versions that take turns of a
millisecond agree to 1 %. The first version runs a second time, as the last: what that row is off 1
is the error of the others. Forward and backward with SiLU, 16 samples, 32 groups, channels_last or
`--layout nchw`; a version whose results differ is not timed.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import geometric_mean

import merge
import torch

ROOT = Path(__file__).parents[1]
SOURCES = "kernels/csrc"
# A sample's tensors fill at most the 24 MiB up to which operators.cpp makes it one task.
SHAPES = (
    (64, 4096),
    (256, 4096),
    (256, 1024),
    (512, 1024),
    (256, 256),
    (512, 256),
    (960, 256),
    (256, 64),
    (768, 64),
)


def flags(level: str) -> list[str]:
    """What CMakeLists.txt compiles an instruction set's kernels with; ValueError if unknown."""
    text = (ROOT / "CMakeLists.txt").read_text("utf-8")
    found = {
        name: options.split() for name, options in re.findall(r"add_level\((\w+) ?(.*)\)", text)
    }
    if level not in found:
        raise ValueError(f"level {level!r} is none of {', '.join(found)}")
    common = re.search(r"target_compile_options\(.* PRIVATE -O3 (.*) \$", text)[1].split()
    return [*common, *found[level]]


def best_level() -> str:
    """The instruction set that the library would take on this machine."""
    capability = torch.backends.cpu.get_cpu_capability()
    if capability.startswith("AVX512") and torch.cpu._is_avx512_bf16_supported():
        return "avx512"
    return "avx2" if capability.startswith("AVX") else "baseline"


def sources(version: str, folder: Path) -> Path:
    """The folder of a version's sources, unpacked into `folder` where it is a git revision."""
    if (Path(version) / SOURCES).is_dir():
        return Path(version) / SOURCES
    archive = subprocess.run(
        ["git", "-C", str(ROOT), "archive", version, SOURCES], capture_output=True
    )
    if archive.returncode:
        reason = archive.stderr.decode().strip().splitlines()[-1]
        raise ValueError(f"{version}: no folder with {SOURCES}, no revision ({reason})")
    folder.mkdir()
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive.stdout, check=True)
    return folder / SOURCES


def build(versions: list[Path], level: str, folder: Path, *, optimised: str = "-O3") -> Path:
    """One program of all versions; ValueError if they do not fit together or do not compile."""
    for header in ("group_norm.h", "formats.h"):
        if len({(version / header).read_bytes() for version in versions}) > 1:
            raise ValueError(f"{header} differs: such versions cannot be called from one program")

    options = flags(level)

    def compiled(*arguments: str | Path) -> None:
        command = ["g++", "-std=gnu++20", optimised, *map(str, arguments)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise ValueError(f"g++ fails: {result.stderr.strip()[:500]}")

    def kernels(number: int) -> Path:
        target = folder / f"{number}.o"
        source = versions[number] / "group_norm_kernels.cpp"
        compiled(*options, f"-DDDB_LEVEL=v{number}", "-c", source, "-o", target)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(kernels, range(len(versions))))
    names, program = " ".join(f"V({number})" for number in range(len(versions))), folder / "program"
    main = Path(__file__).with_suffix(".cpp")
    compiled("-fopenmp", f"-I{versions[0]}", f"-DVERSIONS={names}", main, *objects, "-o", program)
    return program


Row = tuple[str, int, int, str]
"""Format, channels, pixels, direction."""


def run(
    program: Path, shapes: tuple[tuple[int, int], ...], *, layout: str, rounds: int, threads: int
) -> list[tuple[Row, int, float]]:
    """(row, version, milliseconds) of each; ValueError where a version computes something else."""
    sizes = [str(size) for shape in shapes for size in shape]
    command = [str(program), str(rounds), str(threads), layout, *sizes]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise ValueError(result.stderr.strip() or f"the program ended with {result.returncode}")
    found = []
    for line in result.stdout.splitlines():
        dtype, channels, pixels, direction, version, milliseconds = line.split()
        row = dtype, int(channels), int(pixels), direction
        found.append((row, int(version), float(milliseconds)))
    return found


def table(names: list[str], times: dict[Row, dict[int, float]]) -> str:
    """Markdown: milliseconds of the first version, how many times as fast the others are."""
    body, factors = [], defaultdict(list)
    for (dtype, channels, pixels, direction), own in times.items():
        others = [own[0] / own[number] for number in range(1, len(names))]
        factors[f"{dtype} {direction}"].append(others)
        cells = [f"{own[0]:.3f}", *(f"{factor:.2f}" for factor in others)]
        body.append([f"{dtype} {direction}, 16x{channels}x{pixels}", *cells])
    for what, rows in factors.items():
        means = map(geometric_mean, zip(*rows, strict=True))
        body.append([f"{what}, geometric mean", "", *(f"**{mean:.3f}**" for mean in means)])
    return merge.table(("", f"{names[0]}, ms", *names[1:]), body)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("versions", nargs="+", help="git revisions, or folders with kernels/csrc")
    parser.add_argument("--level", help="instruction set: baseline, avx2, avx512")
    parser.add_argument("--layout", choices=("nhwc", "nchw"), default="nhwc")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args(argv)
    names = [*arguments.versions, f"{arguments.versions[0]} again"]
    times = defaultdict(dict)
    try:
        with tempfile.TemporaryDirectory() as work:
            folders = [sources(v, Path(work) / str(i)) for i, v in enumerate(arguments.versions)]
            level = arguments.level or best_level()
            program = build([*folders, folders[0]], level, Path(work))
            for row, version, milliseconds in run(
                program,
                SHAPES,
                layout=arguments.layout,
                rounds=arguments.rounds,
                threads=arguments.threads,
            ):
                times[row][version] = milliseconds
    except (ValueError, OSError) as error:
        print(f"native_versions: {error}", file=sys.stderr)
        return 2
    print(table(names, times), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
