"""Package map, and the C++ operators as an optional CMake extension.

Installed as a top-level `kernels` the folder `kernels/` would shadow Hugging Face's package of that
name, which diffusers imports, so it becomes `ddb_fast.kernels`. All other metadata is in
pyproject.toml.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

PACKAGE_DIR = {"ddb_fast": "ddb_fast", "ddb_fast.kernels": "kernels"}
ROOT = Path(__file__).parent


class CMakeBuild(build_ext):
    """Builds the extension with CMake; setuptools reports a CompileError and goes on without it."""

    def get_ext_filename(self, fullname: str) -> str:
        return f"{super().get_ext_filename(fullname).split('.')[0]}.so"

    def build_extension(self, ext: Extension) -> None:
        """Build `ext` where setuptools expects it."""
        target = Path(self.get_ext_fullpath(ext.name))
        # Where this build fails, an earlier one's library must not go with today's Python.
        target.unlink(missing_ok=True)
        try:
            from torch.utils.cpp_extension import include_paths, library_paths
        except ImportError as error:
            raise CompileError(
                f"torch is needed, install with --no-build-isolation: {error}"
            ) from error
        if shutil.which("cmake") is None:
            raise CompileError("cmake is needed")
        build = Path(self.build_temp).resolve()
        # It may be of another folder, or of a torch that is gone.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        run(
            "cmake", "-S", ROOT, "-B", build,
            f"-DTORCH_INCLUDE_DIRS={';'.join(include_paths())}",
            f"-DTORCH_LIBRARY_DIRS={';'.join(library_paths())}",
        )  # fmt: skip
        run("cmake", "--build", build, "--parallel")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(build / "_native.so", target)

    def copy_extensions_to_source(self) -> None:
        """Of an editable install: the library into `kernels/`, whose older one goes in any case."""
        (ROOT / "kernels" / "_native.so").unlink(missing_ok=True)
        super().copy_extensions_to_source()


def run(*command: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    print(done.stdout, file=sys.stderr)
    if done.returncode != 0:
        # From the first line that speaks of an error, CMake's message being on those after it.
        found = re.search(r"^.*error", done.stderr, re.IGNORECASE | re.MULTILINE)
        said = done.stderr[found.start() if found else 0 :]
        raise CompileError(" ".join(said.split())[:400])


setup(
    packages=[
        *find_packages(include=["ddb_fast", "ddb_fast.*"]),
        "ddb_fast.kernels",
    ],
    package_dir=PACKAGE_DIR,
    package_data={"ddb_fast": ["*.j2", "py.typed"], "ddb_fast.kernels": ["tuned/*.json"]},
    include_package_data=False,
    ext_modules=[
        Extension(
            "ddb_fast.kernels._native",
            sources=[str(path.relative_to(ROOT)) for path in ROOT.glob("kernels/csrc/*.cpp")],
            depends=["CMakeLists.txt", *map(str, ROOT.glob("kernels/csrc/*.h"))],
            optional=True,
        )
    ],
    cmdclass={"build_ext": CMakeBuild},
)
