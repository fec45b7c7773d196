"""Package map: the top-level `kernels/` folder is installed as `ddb_fast.kernels`.

Installed as a top-level `kernels` it would shadow Hugging Face's package of that name, which
diffusers imports. All other metadata is in pyproject.toml.
"""

from setuptools import find_packages, setup

PACKAGE_DIR = {"ddb_fast": "ddb_fast", "ddb_fast.kernels": "kernels"}

setup(
    packages=[
        *find_packages(include=["ddb_fast", "ddb_fast.*"]),
        "ddb_fast.kernels",
    ],
    package_dir=PACKAGE_DIR,
    package_data={"ddb_fast": ["*.j2"]},
)
