"""The command line of a run, made from the configuration's fields; standard library only.

Every leaf of `RunConfig` is an option (`--diffusion.lr 3e-4`, `--seeds 0 1 2`); four have a short
name of their own. Types and choices are those the dataclasses declare.
"""

import argparse
from collections.abc import Sequence

from ddb_fast.config import METHODS, RunConfig, flatten, with_fields
from ddb_fast.presets import PRESETS, load_config

SHORT = {
    "data": ("data.path", "an image folder or a CSV (path, y[, a][, split])"),
    "diffusion": ("diffusion.load", "start from this trained diffusion model's folder"),
    "synthetic": ("sampling.load", "start from these synthetic images, a folder per class"),
}


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, exit 2."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message}\n")


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add everything `ddb-fast run` and `accelerate launch ddb_fast/train.py` take."""
    parser.add_argument(
        "config", metavar="PRESET_OR_CONFIG", help=f"{', '.join(PRESETS)}, or a .json file"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the configuration and stop")
    for name, (target, text) in SHORT.items():
        parser.add_argument(f"--{name}", dest=target, metavar="PATH", help=text)
    texts = {"methods": f"of: {' '.join(METHODS)}", "out": "folder of the run"}
    fields = parser.add_argument_group("any field of the configuration; defaults by preset")
    for name, value in flatten(PRESETS["ddb"]()).items():
        if name == "preset":
            continue
        leaf = name.rsplit(".", 1)[-1].upper()
        several = {"nargs": "+"} if isinstance(value, list) else {}
        fields.add_argument(f"--{name}", dest=name, metavar=leaf, help=texts.get(name), **several)


def run_config(arguments: argparse.Namespace) -> RunConfig:
    """The configuration that parsed arguments ask for; ValueError names a field that is wrong."""
    given = {
        name: value
        for name, value in vars(arguments).items()
        if name not in ("config", "dry_run", "command") and value is not None
    }
    config = with_fields(load_config(arguments.config), given)
    if config.data.path is not None and config.data.source == "digits":
        if "data.source" in given or "data.path" not in given:
            raise ValueError("data.source digits is embedded and takes no data.path")
        config = with_fields(config, {"data.source": "auto"})
    if config.data.path is None and config.data.source != "digits":
        raise ValueError(f"preset {config.preset}: say which images with --data PATH")
    return config


def parse_run(argv: Sequence[str], *, prog: str) -> tuple[RunConfig, bool]:
    """(configuration, whether only to print it); exits with 2 and one line when it is wrong."""
    parser = OneLineParser(prog=prog, allow_abbrev=False, description="Run or resume the pipeline.")
    add_run_arguments(parser)
    arguments = parser.parse_args(argv)
    try:
        return run_config(arguments), arguments.dry_run
    except ValueError as error:
        parser.error(str(error))
        raise AssertionError("unreachable") from None
